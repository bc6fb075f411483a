"""The problem that the contenders share, and the contenders: this project, deepinv and torchdeq.

All solve for the same equilibrium with the same weights. Ours are the package's own losses and
models; nothing of a step is put together here. A contender is told how far to go, by a number of
iterations or by the residual at which each image is done. One function judges all of them, by the
distance to x* of the image that their loss sees.
"""

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jfbnb.common import parse_yaml
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import solve
from jfbnb.core.gradients import neumann
from jfbnb.core.maps import GradientMap, ImplicitMap, SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Convolution
from jfbnb.core.precision import pick_bf16
from jfbnb.core.protocols import get_protocol
from jfbnb.data import bundled_photos
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import EquilibriumLoss, LossSettings, draw_measurement
from jfbnb.training.methods import METHODS, Settings
from jfbnb.training.muon import Muon
from jfbnb.training.recipes import prepare
from jfbnb.training.restorers import BEST, RELEASED, load_model

ROOT = Path(__file__).resolve().parents[1]
PAPER = get_protocol("paper")
CPU = torch.device("cpu")
MAPS = {"Eq. 4": GradientMap, "our map": SplittingMap}
KEYS = (0, 1, 0, 1)  # of the noise: those of a training's first batch


def profile(name: str = "cpu") -> dict:
    """The parameters of a profile: `cpu` and `best` trained the released networks."""
    return parse_yaml((ROOT / f"notebooks/profiles/{name}.yaml").read_bytes(), f"profile {name}")


# --- the problem --------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of a problem: `batch` scenes of `side` x `side` pixels, DnCNN of `depth` x `width`.

    Its name says `-UNet` where it is that of profile `best`, and `-camera` where the border is
    unknown.
    """

    batch: int
    side: int
    depth: int = 8
    width: int = 32
    unet: bool = False
    camera: bool = False

    @staticmethod
    def parse(name: str) -> "Size":
        shape, *more = name.split("-")
        batch, side = map(int, shape.split("x"))
        if set(more) - {"UNet", "camera"}:
            raise ValueError(f"{name} is no problem")
        return Size(batch, side, unet="UNet" in more, camera="camera" in more)

    def __str__(self) -> str:
        network = "UNet" if self.unet else f"{self.depth}x{self.width}"
        return f"{self.batch}x{self.side}-{network}" + "-camera" * self.camera


@dataclass
class Problem:
    """Photographs, a network with its tau and sigma, and the equilibrium.

    Args:
        d: what `draw` makes, for which the equilibrium was solved.
        goals: for each map its fixed point, in float64.
    """

    A: Convolution
    network: nn.Module
    settings: Settings
    x: Tensor
    d: Tensor
    goals: dict[str, Tensor]

    def draw(self) -> Tensor:
        """The measurements, drawn as a training step draws them."""
        return draw_measurement(self.A, self.x, PAPER.noise_std, KEYS, range(len(self.x)))

    def map(self, name: str) -> ImplicitMap:
        D = Denoiser(self.network, self.settings["sigma"])
        return MAPS[name](self.A, D, self.settings["tau"])

    def distance(self, map_name: str, state: Tensor) -> float:
        """|x - x*| / |x*|, the largest of the batch."""
        goal = self.goals[map_name]
        return ((state.double() - goal).flatten(1).norm(dim=1)
                / goal.flatten(1).norm(dim=1)).max().item()


def solve_problem(file: Path, size: Size) -> None:
    """Write a problem's images and its equilibrium, solved in float64 to a residual of 1e-9."""
    photos = bundled_photos("train", size.side)
    x = photos[::len(photos) // size.batch][:size.batch].as_float()
    # d is yet to be drawn
    problem = Problem(operator(size.side, size.camera), *released(size.unet), x, x, {})
    d, T = problem.draw(), problem.map("our map")
    near, _ = solve(T, d, 3e-6, 100)  # most of the way at float32's speed
    T.double()
    with torch.no_grad():
        z_star, info = solve(T, d.double(), 1e-9, 1000, start=near.double())
        if not info.converged.all():
            raise RuntimeError(f"no equilibrium found: {info.complaint()}")
        x_star = T.data_step(z_star, d.double())
    save_file({"x": x, "d": d, "Eq. 4": x_star.contiguous(), "our map": z_star.contiguous()}, file)


def load_problem(file: Path) -> Problem:
    """What `solve_problem` wrote, in a file of the problem's name."""
    goals = load_file(file)
    x, d = goals.pop("x"), goals.pop("d")
    A = operator(x.shape[-1], "-camera" in file.stem)
    return Problem(A, *released("-UNet" in file.stem), x, d, goals)


def operator(side: int, camera: bool) -> Convolution:
    """The blur of a scene: with protocol camera's unknown border, or the paper's black one."""
    return (get_protocol("camera") if camera else PAPER).operator(side)


def released(unet: bool) -> tuple[nn.Module, Settings]:
    """A released network, with the tau that was trained with it."""
    T = load_model(METHODS["jfb"], BEST if unet else RELEASED).T
    return T.D.network, {"tau": T.tau.item(), "sigma": T.D.sigma.item()}


# --- the contenders -----------------------------------------------------------------------------


class Run(NamedTuple):
    """A contender, ready to run.

    Args:
        image: the measurements -> the image that the loss sees, tracked.
        loss: of one training step, which draws its measurements itself; None in a reconstruction.
        trained: what has the parameters; `network` in it is the denoiser's.
        visits: how many steps in a row meet a batch, of which only the first solves from the start.
        optimizer: what moves the parameters, as in a training.
    """

    image: Callable[[Tensor], Tensor]
    loss: Callable[[], Tensor] | None
    trained: nn.Module
    network: nn.Module
    batch_reuse: int = 1
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam


@dataclass(frozen=True)
class Contender:
    """A library's training step with one of its gradients, or its reconstruction, on a map.

    Args:
        solvers: to choose from; the one that is fastest to a distance is taken.
        make: (problem, one of the solvers, effort) -> `Run`. An implicit gradient's adjoint
            equation gets the same effort.
        by_residual: whether the effort is the residual at which each image is done, and not a
            number of iterations for the whole batch.
    """

    name: str  # the library's first
    gradient: str
    map: str
    solvers: tuple[str, ...]
    make: Callable[[Problem, str, float], Run]
    by_residual: bool = False

    @property
    def library(self) -> str:
        return self.name.split()[0]

    @property
    def iterates(self) -> tuple:
        """What decides how far it must go. A peer's solve does not depend on its gradient."""
        return (self.name,) if self.library == "jfbnb" else (self.library, self.map)


MOST = 50  # evaluations of T, where a residual decides
OURS = {"jfb": METHODS["jfb"], "implicit": METHODS["deq"], "unrolled": METHODS["unrolled"],
        "neumann-5": replace(METHODS["jfb"], loss=partial(EquilibriumLoss, gradient=partial(
            neumann, terms=5)))}


def training(name: str, tolerance: float, bf16: bool) -> tuple[TrainingConfig, LossSettings]:
    """What a profile trains with, at protocol paper: drawn conditions are left out."""
    own = profile(name)
    config = TrainingConfig(1, own["batch_size"], own["crop"], own["learning_rate"], own["seed"],
                            unconverged_limit=1.0)
    losses = LossSettings(PAPER.noise_std, tolerance, MOST, own["power_iterations"],
                          own.get("max_growth", LossSettings.max_growth), bf16=bf16)
    if own.get("random_degradations"):
        config = config.random_degradations()
        losses = replace(losses.random_degradations(), conditions=None)
    return config, losses


def our_step(gradient: str, bf16: bool, shipped: str, problem: Problem, solver: str,
             effort: float) -> Run:
    """The loss that `recipes.prepare` builds for a method of OURS.

    Args:
        bf16: for the first evaluations of T and for the gradient.
        shipped: the profile that trains so, with its penalty, and a head if it trains one. The
            peers have neither.
    """
    config, losses = training(shipped or "cpu", effort, bf16)
    if not shipped:
        losses = replace(losses, penalty=0.0, heads=False)
    model, loss = prepare(OURS[gradient], problem.network,
                          {**problem.settings, "iterations": effort}, problem.A, losses)
    steps = itertools.count()

    def value() -> Tensor:  # of the next step
        keys = KEYS if losses.batch_reuse == 1 else (0, 1, next(steps) // losses.batch_reuse, 1)
        return loss(problem.x, keys, range(len(problem.x)))[0].mean()

    return Run(lambda d: loss.restored(d)[0], value, model, model.T.D.network, losses.batch_reuse,
               Muon if config.muon else torch.optim.Adam)


def our_image(problem: Problem, solver: str, effort: float) -> Run:
    """The package's model."""
    model = Equilibrium(problem.map("our map"))
    model.tolerance, model.max_iterations = effort, MOST
    return Run(lambda d: model(d)[0], None, model, problem.network)


def _peer(problem: Problem, T: ImplicitMap, image: Callable[[Tensor], Tensor]) -> Run:
    return Run(image, lambda: (image(problem.draw()) - problem.x).square().mean(), T, T.D.network)


TORCHDEQ = {"Anderson": ("anderson", {}),
            "Anderson, window 10": ("anderson", {"m": 10, "lam": 1e-8}),
            "Broyden": ("broyden", {}), "Picard": ("fixed_point_iter", {})}


def torchdeqs(gradient: str, map_name: str, problem: Problem, solver: str, effort: int) -> Run:
    import torchdeq

    T = problem.map(map_name)
    name, options = TORCHDEQ[solver]
    gradients = {"jfb": {"grad": 1}, "phantom-5": {"grad": 5, "tau": 0.5},
                 "implicit": {"ift": True, "b_solver": name, "b_max_iter": effort,
                              "b_tol": 0.0, "b_stop_mode": "rel"}}
    deq = torchdeq.get_deq(f_solver=name, f_max_iter=effort, f_tol=0.0, f_stop_mode="rel",
                           **gradients[gradient])
    return _peer(problem, T, lambda d: deq(lambda z: T(z, d), T.start(d),
                                           solver_kwargs=options)[0][-1])


DEEPINV = {"Anderson": 5, "Anderson, window 10": 10, "Picard": None}


def deepinvs(gradient: str, map_name: str, problem: Problem, solver: str, effort: int) -> Run:
    import deepinv
    from deepinv.optim.optimizers import AndersonAccelerationConfig, DEQConfig

    A, T, tau = problem.A, problem.map(map_name), problem.settings["tau"]

    class Told(nn.Module):  # T.D knows its noise level
        def forward(self, x, sigma):
            return T.D(x)

    class Physics(deepinv.physics.LinearPhysics):
        def prox_l2(self, z, y, gamma, **_):  # ours, in closed form
            return A.solve_normal(A.adjoint(y) + z / gamma, 1 / gamma)

    physics = Physics(A=lambda x, **_: A(x), A_adjoint=lambda y, **_: A.adjoint(y))
    window = DEEPINV[solver]
    common = {
        "data_fidelity": deepinv.optim.L2(), "max_iter": effort, "early_stop": False,
        "unfold": True, "trainable_params": [], "custom_init": lambda y, physics: (T.start(y),) * 2,
        "sigma_denoiser": problem.settings["sigma"],
        "anderson_acceleration":
            AndersonAccelerationConfig(window, beta=1.0, eps=1e-8) if window else None,
        "DEQ": DEQConfig(jacobian_free=gradient == "jfb", max_iter_backward=effort,
                         anderson_acceleration_backward=window is not None, eps_backward=1e-8)}
    if map_name == "Eq. 4":
        model = deepinv.optim.GD(prior=deepinv.optim.RED(Told()), lambda_reg=tau, stepsize=1.0,
                                 **common)
    else:
        model = deepinv.optim.HQS(prior=deepinv.optim.PnP(Told()), stepsize=1 / tau, **common)
    return _peer(problem, T, lambda d: model(d, physics))


def ours(gradient: str, how: str = "", bf16: bool = False, shipped: str = "") -> Contender:
    return Contender(f"jfbnb {gradient}{how}", gradient, "our map", ("Anderson",),
                     partial(our_step, gradient, bf16, shipped), by_residual=True)


PEERS = [Contender(f"{library} {g}, {m}", g, m, tuple(solvers), partial(make, g, m))
         for library, make, solvers, gradients in (
             ("torchdeq", torchdeqs, TORCHDEQ, ("jfb", "phantom-5", "implicit")),
             ("deepinv", deepinvs, DEEPINV, ("jfb", "implicit")))
         for m in MAPS for g in gradients]
BF16 = pick_bf16("auto", CPU)  # whether the processor computes in it
# The first is what the others are compared with.
STEPS = [ours("jfb"), *([ours("jfb", ", bf16", True)] if BF16 else []),
         ours("jfb", ", as shipped", BF16, "cpu"), ours("jfb", ", as best ships", BF16, "best"),
         ours("neumann-5"), ours("implicit"),
         Contender("jfbnb unrolled", "unrolled", "our map", ("Picard",),
                   partial(our_step, "unrolled", False, "")), *PEERS]
RECONSTRUCTIONS = [Contender("jfbnb", "none", "our map", ("Anderson",), our_image, True),
                   *(peer for peer in PEERS if peer.gradient == "jfb")]


def available(library: str) -> bool:
    """Whether a contender's library is installed."""
    return importlib.util.find_spec(library) is not None
