"""The problem that all contenders solve, and the contenders: this project, deepinv and torchdeq.

All have the same weights, the same splitting map and so the same equilibrium x*. Our steps are the
losses that `recipes.prepare` builds for a training, our reconstruction is `models.Equilibrium`; the
peers have their own solvers and their own one-step gradient.
"""

import copy
import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import solve
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Convolution
from jfbnb.core.protocols import get_protocol
from jfbnb.data import bundled_photos
from jfbnb.run.train import network_parameters
from jfbnb.training.losses import LossSettings, draw_measurement
from jfbnb.training.methods import METHODS, Settings
from jfbnb.training.muon import Muon
from jfbnb.training.recipes import prepare
from jfbnb.training.restorers import BEST, RELEASED, load_model

PAPER = get_protocol("paper")
JFB = METHODS["jfb"]
KEYS = (0, 1, 0, 1)  # of the noise: those of a training's first batch
MAX_EVALUATIONS = 50  # of T in our solves


# --- the problem --------------------------------------------------------------------------------


class Size(NamedTuple):
    """`batch` scenes of `side` x `side` pixels, for the released DnCNN of 8 layers x 32 channels.

    Args:
        unet: the network of profile `best` instead; the name then has `-UNet`.
        camera: a blur with an unknown border, as a photograph has; the name then has `-camera`.
    """

    batch: int
    side: int
    unet: bool = False
    camera: bool = False

    def __str__(self) -> str:
        network = "UNet" if self.unet else "8x32"
        return f"{self.batch}x{self.side}-{network}" + "-camera" * self.camera


@dataclass
class Problem:
    """Photographs x, their measurement d, a network with tau and sigma, and the equilibrium x*."""

    A: Convolution
    network: nn.Module
    settings: Settings
    x: Tensor
    d: Tensor
    x_star: Tensor  # in float64

    def draw(self) -> Tensor:
        """The measurement, drawn as a training step draws it."""
        return draw_measurement(self.A, self.x, PAPER.noise_std, KEYS)

    def map(self) -> SplittingMap:
        """T on a copy of the network, so that no contender touches another's."""
        D = Denoiser(copy.deepcopy(self.network), self.settings["sigma"])
        return SplittingMap(self.A, D, self.settings["tau"])

    def distance(self, state: Tensor) -> float:
        """|x - x*| / |x*|, the largest of the batch."""
        error = (state.double() - self.x_star).flatten(1).norm(dim=1)
        return (error / self.x_star.flatten(1).norm(dim=1)).max().item()


@cache
def make_problem(size: Size) -> Problem:
    """A problem with its equilibrium, solved in float64 to a residual of 1e-9."""
    photos = bundled_photos("train", size.side)
    x = photos[::len(photos) // size.batch][:size.batch].as_float()
    A = (get_protocol("camera") if size.camera else PAPER).operator(size.side)
    trained = load_model(JFB, BEST if size.unet else RELEASED).T
    settings = {"tau": trained.tau.item(), "sigma": trained.D.sigma.item()}
    problem = Problem(A, trained.D.network, settings, x, x, x)
    problem.d = problem.draw()
    T, d = problem.map(), problem.d
    near, _ = solve(T, d, 3e-6, 100)  # most of the way in float32, which is faster
    problem.x_star, info = solve(copy.deepcopy(T).double(), d.double(), 1e-9, 1000,
                                 start=near.double())
    if not info.converged.all():
        raise RuntimeError(f"no equilibrium found: {info.complaint()}")
    return problem


# --- the contenders -----------------------------------------------------------------------------


class Run(NamedTuple):
    """A contender, ready to run.

    Args:
        image: d -> the image that the loss sees, tracked.
        loss: of one training step, which draws its measurement itself; None in a reconstruction.
        trained: the module that has the parameters.
        network: the denoiser's network in it.
        batch_reuse: steps in a row on one batch; only the first of them solves from the start.
        optimizer: of the training.
    """

    image: Callable[[Tensor], Tensor]
    loss: Callable[[], Tensor] | None
    trained: nn.Module
    network: nn.Module
    batch_reuse: int = 1
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam


@dataclass(frozen=True)
class Contender:
    """A library's training step, or its reconstruction.

    Args:
        name: begins with the library's.
        solvers: the fastest one is taken.
        make: (problem, solver, effort) -> `Run`. The effort is a number of iterations for the whole
            batch or, with `by_residual`, the residual at which each image is done.
    """

    name: str
    solvers: tuple[str, ...]
    make: Callable[[Problem, str, float], Run]
    by_residual: bool = False

    @property
    def library(self) -> str:
        return self.name.split()[0]

    def available(self) -> bool:
        """Whether its library is installed."""
        return importlib.util.find_spec(self.library) is not None


def training(profile: str, tolerance: float) -> tuple[LossSettings, type[torch.optim.Optimizer]]:
    """What a profile trains with, but at protocol paper: no blurs or noise levels are drawn."""
    p = network_parameters(profile, {"data": "bundled", "device": "cpu"})
    losses = LossSettings(PAPER.noise_std, tolerance, MAX_EVALUATIONS, p["power_iterations"],
                          p["max_growth"])
    if p["random_degradations"]:
        return replace(losses.random_degradations(), conditions=None), Muon
    return losses, torch.optim.Adam


def our_step(profile: str, problem: Problem, solver: str, effort: float) -> Run:
    """The loss that `recipes.prepare` builds.

    Args:
        profile: which trains so; "" for a loss without penalty, as the peers have it.
    """
    losses, optimizer = training(profile or "cpu", effort)
    if not profile:
        losses = replace(losses, penalty=0.0)
    model, loss = prepare(JFB, problem.network, problem.settings, problem.A, losses)
    steps = itertools.count()

    def value() -> Tensor:  # of the next step
        keys = KEYS if losses.batch_reuse == 1 else (0, 1, next(steps) // losses.batch_reuse, 1)
        return loss(problem.x, keys)[0].mean()

    return Run(lambda d: loss.restored(d)[0], value, model, model.T.D.network, losses.batch_reuse,
               optimizer)


def our_image(problem: Problem, solver: str, effort: float) -> Run:
    T = problem.map()
    model = Equilibrium(T)
    model.tolerance, model.max_iterations = effort, MAX_EVALUATIONS
    return Run(lambda d: model(d)[0], None, model, T.D.network)


def _peer(problem: Problem, T: SplittingMap, image: Callable[[Tensor], Tensor]) -> Run:
    return Run(image, lambda: (image(problem.draw()) - problem.x).square().mean(), T, T.D.network)


TORCHDEQ = {"Anderson": ("anderson", {}),
            "Anderson, window 10": ("anderson", {"m": 10, "lam": 1e-8}),
            "Broyden": ("broyden", {}), "Picard": ("fixed_point_iter", {})}


def torchdeqs(problem: Problem, solver: str, effort: int) -> Run:
    import torchdeq

    T = problem.map()
    name, settings = TORCHDEQ[solver]
    deq = torchdeq.get_deq(f_solver=name, f_max_iter=effort, f_tol=0.0, f_stop_mode="rel", grad=1)
    return _peer(problem, T, lambda d: deq(lambda z: T(z, d), T.start(d),
                                           solver_kwargs=settings)[0][-1])


DEEPINV = {"Anderson": 5, "Anderson, window 10": 10, "Picard": None}


def deepinvs(problem: Problem, solver: str, effort: int) -> Run:
    import deepinv
    from deepinv.optim.optimizers import AndersonAccelerationConfig, DEQConfig

    A, T, window = problem.A, problem.map(), DEEPINV[solver]

    class Denoise(nn.Module):  # T.D has its noise level
        def forward(self, x, sigma):
            return T.D(x)

    class Physics(deepinv.physics.LinearPhysics):
        def prox_l2(self, z, y, gamma, **_):  # ours, in closed form
            return A.solve_normal(A.adjoint(y) + z / gamma, 1 / gamma)

    physics = Physics(A=lambda x, **_: A(x), A_adjoint=lambda y, **_: A.adjoint(y))
    model = deepinv.optim.HQS(
        prior=deepinv.optim.PnP(Denoise()), data_fidelity=deepinv.optim.L2(),
        stepsize=1 / problem.settings["tau"], sigma_denoiser=problem.settings["sigma"],
        max_iter=effort, early_stop=False, unfold=True, trainable_params=[],
        custom_init=lambda y, physics: (T.start(y),) * 2,
        anderson_acceleration=AndersonAccelerationConfig(window, beta=1.0, eps=1e-8)
        if window else None,
        DEQ=DEQConfig(jacobian_free=True))
    return _peer(problem, T, lambda d: model(d, physics))


PEERS = [Contender("torchdeq jfb, our map", tuple(TORCHDEQ), torchdeqs),
         Contender("deepinv jfb, our map", tuple(DEEPINV), deepinvs)]
# The others are compared with the first.
STEPS = [*(Contender(name, ("Anderson",), partial(our_step, profile), by_residual=True)
           for name, profile in (("jfbnb jfb", ""), ("jfbnb jfb, as shipped", "cpu"),
                                 ("jfbnb jfb, as best ships", "best"))), *PEERS]
RECONSTRUCTIONS = [Contender("jfbnb", ("Anderson",), our_image, by_residual=True), *PEERS]
