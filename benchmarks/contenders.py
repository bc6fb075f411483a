"""The problem that the contenders share, and the contenders: this project, deepinv and torchdeq.

All solve for the same equilibrium with the same weights. A contender is told how far to go, by a
number of iterations or by the residual at which each image is done, and returns the tracked image
that a loss would see; one function judges all of them by the distance of that image to x*.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jfbnb.datasets import bundled_photos
from jfbnb.fixed_point import anderson, picard
from jfbnb.gradients import implicit, jfb, neumann, unrolled
from jfbnb.maps import GradientMap, SplittingMap
from jfbnb.methods import RELEASED
from jfbnb.networks import DnCNN, Regulariser, load_regulariser, precision
from jfbnb.operators import Blur, conjugate_gradients, get_protocol, make_blur, measure

MAPS = {"Eq. 4": GradientMap, "our map": SplittingMap}


# --- the problem --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Of a problem: `batch` images of `side` x `side` pixels, DnCNN of `depth` x `width`."""

    batch: int
    side: int
    depth: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.side}-{self.depth}x{self.width}"

    @staticmethod
    def parse(name: str) -> "Size":
        """Read "16x64-8x32". Raises ValueError for another form, or a network that is too small."""
        found = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\d+)", name)
        if not found:
            raise ValueError(f"{name!r}: write a problem as BATCHxSIDE-DEPTHxWIDTH")
        size = Size(*map(int, found.groups()))
        if size.depth < 8 or size.width < 32:
            raise ValueError(f"{name!r}: the network must be at least the released one, 8x32")
        return size


@dataclass
class Problem:
    """Photographs, measurements, weights, and the equilibrium.

    Args:
        goals: for each map its fixed point, in float64.
    """

    A: Blur
    S: Regulariser
    x: Tensor
    d: Tensor
    goals: dict[str, Tensor]

    def distance(self, map_name: str, state: Tensor) -> float:
        """|x - x*| / |x*|, the largest of the batch."""
        goal = self.goals[map_name]
        return ((state.double() - goal).flatten(1).norm(dim=1)
                / goal.flatten(1).norm(dim=1)).max().item()


def solve_problem(file: Path, batch: int, side: int) -> None:
    """Write a problem's images and its equilibrium, solved in float64 to a residual of 1e-9.

    The small network is enough: a larger one made by `grown` has the same equilibrium.
    """
    setup = get_protocol("paper")
    A = make_blur(setup, side)
    photos = bundled_photos("train", side)
    photos = photos[::len(photos) // batch][:batch]
    x = photos.as_float()
    d = measure(A, x, setup.noise_std, 0, photos.indices)
    T = SplittingMap(A, load_regulariser(RELEASED / "jfb.safetensors"))
    near, _ = anderson(T, d, 3e-6, 100, given=d)  # most of the way at float32's speed
    T.double()
    with torch.no_grad():
        z_star, info = anderson(T, near.double(), 1e-9, 1000, given=d.double())
        if not info.converged.all():
            raise RuntimeError(f"no equilibrium found: {info.complaint()}")
        x_star = T.data_step(z_star, d.double())
    save_file({"x": x, "d": d, "x_star": x_star.contiguous(), "z_star": z_star.contiguous()}, file)


def load_problem(file: Path, depth: int = 8, width: int = 32) -> Problem:
    """What `solve_problem` wrote, with a network of the given size."""
    stored = load_file(file)
    S = load_regulariser(RELEASED / "jfb.safetensors")
    S = Regulariser(grown(S.network, depth, width), S.tau.item(), S.sigma.item())
    A = make_blur(get_protocol("paper"), stored["x"].shape[-1])
    return Problem(A, S, stored["x"], stored["d"],
                   {"Eq. 4": stored["x_star"], "our map": stored["z_star"]})


def grown(small: DnCNN, depth: int, width: int) -> DnCNN:
    """A deeper and wider DnCNN that computes the same function: what is new passes values on.

    So a network of the paper's size has a known equilibrium at its own full cost. Chen et al.
    (2016) grow networks in this way.
    """
    large = DnCNN(depth, width, small.channels)
    convolutions = [layer for layer in large.layers if isinstance(layer, torch.nn.Conv2d)]
    given = [layer for layer in small.layers if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for i, layer in enumerate(convolutions):
            layer.weight.zero_()
            layer.bias.zero_()
            source = given[-1] if i == depth - 1 else given[i] if i < len(given) - 1 else None
            if source is None:  # after a ReLU no value is negative, so the next changes nothing
                for c in range(small.width):
                    layer.weight[c, c, 1, 1] = 1
            else:
                c_out, c_in = source.weight.shape[:2]
                layer.weight[:c_out, :c_in] = source.weight
                layer.bias[:c_out] = source.bias
    return large


# --- the contenders -----------------------------------------------------------------------------

Run = Callable[[], Tensor]  # solves, and returns the image that a loss would see, tracked

# Each library's solvers to choose from, with their settings.
MOST = 50  # evaluations of T, where a residual decides
# Ours is Anderson over 5 iterates. So many evaluations of T run in bfloat16, before the others, and
# where there are any, the gradient too. Profile cpu trains with all of them.
OURS = {"float32": 0, "bf16 first": 4, "bf16": MOST}
TORCHDEQ = {"Anderson": ("anderson", {}),
            "Anderson, window 10": ("anderson", {"m": 10, "lam": 1e-8}),
            "Broyden": ("broyden", {}), "Picard": ("fixed_point_iter", {})}
DEEPINV = {"Anderson": 5, "Anderson, window 10": 10, "Picard": None}

# What can be changed in our step, to see what it is worth. The last three make the same iterates in
# another way.
CHANGES = ("float32", "Picard", "window 10", "start at D(Tikhonov)", "whole batches",
           "channels first", "conjugate gradients")
SAME_ITERATES = CHANGES[-3:]


@dataclass(frozen=True)
class Contender:
    """A library, one of its gradients, and the map that it is given.

    Args:
        change: one of CHANGES, in our step; "" for none.
    """

    library: str
    gradient: str
    map: str = "our map"
    change: str = ""

    @property
    def name(self) -> str:
        ours = self.library == "jfbnb" and self.map == "our map"
        details = (self.library + " " + self.gradient, "" if ours else self.map, self.change)
        return ", ".join(detail for detail in details if detail)

    @property
    def by_residual(self) -> bool:
        """Whether it stops each image at a residual. The peers stop whole batches."""
        return self.library == "jfbnb" and self.gradient != "unrolled"

    @property
    def solvers(self) -> tuple[str, ...]:
        """Those to choose from; the one that is fastest to a distance is taken."""
        if self.library == "torchdeq":
            return tuple(TORCHDEQ)
        if self.library == "deepinv":
            return tuple(DEEPINV)
        if self.gradient == "unrolled":
            return ("Picard",)
        if self.change == "float32":
            return ("float32",)
        # A changed step goes to the nearest target, where bfloat16 alone does not come.
        return ("float32", "bf16 first") if self.change else tuple(OURS)


CONTENDERS = [
    *(Contender("jfbnb", g) for g in ("jfb", "neumann-5", "implicit", "unrolled")),
    Contender("jfbnb", "jfb", change="float32"),
    *(Contender("torchdeq", g, m) for m in MAPS for g in ("jfb", "phantom-5", "implicit")),
    *(Contender("deepinv", g, m) for m in MAPS for g in ("jfb", "implicit")),
]
PARTS = [Contender("jfbnb", "jfb"), *(Contender("jfbnb", "jfb", change=c) for c in CHANGES),
         Contender("jfbnb", "jfb", "Eq. 4")]
GRADIENTS = tuple(dict.fromkeys(contender.gradient for contender in CONTENDERS))


def available(library: str) -> bool:
    """Whether a contender's library is installed."""
    return importlib.util.find_spec(library) is not None


def make(problem: Problem, contender: Contender, solver: str, effort: float) -> Run:
    """The contender, ready to run. An implicit gradient's adjoint equation gets the same effort.

    Args:
        effort: the residual for a contender that goes by it, else the number of iterations.
    """
    makers = {"jfbnb": _ours, "torchdeq": _torchdeqs, "deepinv": _deepinvs}
    return makers[contender.library](problem, contender, solver, effort)


def _ours(problem: Problem, contender: Contender, solver: str, effort: float) -> Run:
    change, network, d = contender.change, problem.S.network, problem.d
    A = ByConjugateGradients(problem.A) if change == "conjugate gradients" else problem.A
    T = MAPS[contender.map](A, problem.S)
    if change == "channels first":
        channels_first(network)

    def apply(z: Tensor) -> Tensor:
        return T(z, d)

    if contender.gradient == "unrolled":
        return lambda: unrolled(apply, T.start(d), int(effort))
    gradient = {"jfb": jfb, "neumann-5": partial(neumann, terms=5),
                "implicit": partial(implicit, tolerance=effort, max_iterations=MOST)}
    solve = {"Picard": picard, "window 10": partial(anderson, window=10)}.get(change, anderson)
    solve = partial(solve, tolerance=effort, max_iterations=MOST)
    coarse = OURS[solver]

    def refine(k: int, z: Tensor) -> None:
        if k == coarse:
            network.bf16 = False

    def run() -> Tensor:
        with precision(problem.S, coarse > 0), torch.no_grad():
            # From z = 0 the data step is Tikhonov's solution.
            start = T(0 * d, d) if change == "start at D(Tikhonov)" else T.start(d)
            state, _ = (solve(apply, start, callback=refine) if change == "whole batches"
                        else solve(T, start, callback=refine, given=d))
        if coarse and not torch.is_grad_enabled():
            return state
        with precision(problem.S, coarse > 0):
            output = gradient[contender.gradient](apply, state)
        # The image is as exact as the solve, whatever the gradient.
        return state + (output - output.detach()) if coarse else output

    return run


class ByConjugateGradients(torch.nn.Module):
    """A blur whose data step is solved by iteration, as where no closed form is known."""

    def __init__(self, A: Blur):
        super().__init__()
        self.A, self.adjoint = A, A.adjoint

    def forward(self, x: Tensor) -> Tensor:
        return self.A(x)

    def solve_normal(self, r: Tensor, tau: Tensor) -> Tensor:
        return conjugate_gradients(lambda x: self.adjoint(self(x)) + tau * x, r, tolerance=1e-5)


def channels_first(network: DnCNN) -> None:
    """PyTorch's own layout in memory, in the place of channels_last."""
    network.to(memory_format=torch.contiguous_format)
    network.layers.register_forward_pre_hook(lambda layers, inputs: inputs[0].contiguous())


def _torchdeqs(problem: Problem, contender: Contender, solver: str, iterations: int) -> Run:
    import torchdeq

    T = MAPS[contender.map](problem.A, problem.S)
    d = problem.d
    name, options = TORCHDEQ[solver]
    gradients = {"jfb": {"grad": 1}, "phantom-5": {"grad": 5, "tau": 0.5},
                 "implicit": {"ift": True, "b_solver": name, "b_max_iter": iterations,
                              "b_tol": 0.0, "b_stop_mode": "rel"}}
    deq = torchdeq.get_deq(f_solver=name, f_max_iter=iterations, f_tol=0.0, f_stop_mode="rel",
                           **gradients[contender.gradient])

    def run() -> Tensor:
        output, _ = deq(lambda z: T(z, d), T.start(d), solver_kwargs=options)
        return output[-1]

    return run


def _deepinvs(problem: Problem, contender: Contender, solver: str, iterations: int) -> Run:
    import deepinv
    from deepinv.optim.optimizers import AndersonAccelerationConfig, DEQConfig

    A, S, d = problem.A, problem.S, problem.d

    class Denoiser(torch.nn.Module):
        def forward(self, x, sigma):
            return S.denoise(x)

    class Physics(deepinv.physics.LinearPhysics):
        def prox_l2(self, z, y, gamma, **_):  # ours, in closed form
            return A.solve_normal(A.adjoint(y) + z / gamma, 1 / gamma)

    physics = Physics(A=lambda x, **_: A(x), A_adjoint=lambda y, **_: A.adjoint(y))
    window = DEEPINV[solver]
    common = {
        "data_fidelity": deepinv.optim.L2(), "max_iter": iterations, "early_stop": False,
        "unfold": True, "trainable_params": [], "custom_init": lambda y, physics: (y, y),
        "sigma_denoiser": S.sigma.item(),
        "anderson_acceleration":
            AndersonAccelerationConfig(window, beta=1.0, eps=1e-8) if window else None,
        "DEQ": DEQConfig(jacobian_free=contender.gradient == "jfb", max_iter_backward=iterations,
                         anderson_acceleration_backward=window is not None,
                         eps_backward=1e-8)}
    tau = S.tau.item()
    if contender.map == "Eq. 4":
        model = deepinv.optim.GD(prior=deepinv.optim.RED(Denoiser()), lambda_reg=tau, stepsize=1.0,
                                 **common)
    else:
        model = deepinv.optim.HQS(prior=deepinv.optim.PnP(Denoiser()), stepsize=1 / tau, **common)
    return lambda: model(d, physics)
