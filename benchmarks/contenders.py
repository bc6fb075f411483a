"""The contenders of the benchmark: one training step, by us and by deepinv and torchdeq.

All solve the same problem with the same weights. A contender is told how many iterations of its
solver to make and says where it came to, so that all are judged by the same distance to x*.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jfbnb.datasets import bundled_photos
from jfbnb.fixed_point import anderson, picard
from jfbnb.gradients import implicit, jfb, neumann, unrolled
from jfbnb.maps import GradientMap, ImplicitMap, SplittingMap
from jfbnb.methods import RELEASED
from jfbnb.networks import DnCNN, Regulariser, load_regulariser
from jfbnb.operators import Blur, get_protocol, make_blur, measure

MAPS = {"Eq. 4": GradientMap, "splitting": SplittingMap}


@dataclass
class Problem:
    """A batch of crops to train on, the released weights, and its equilibrium in float64.

    Args:
        goals: for each map its fixed point, solved to a residual of 1e-8 or better.
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


def make_problem(batch: int, side: int, depth: int, width: int) -> Problem:
    setup = get_protocol("paper")
    A = make_blur(setup, side)
    photos = bundled_photos("train", side)[:batch]
    x = photos.as_float()
    d = measure(A, x, setup.noise_std, 0, photos.indices)
    S = load_regulariser(RELEASED / "jfb.safetensors")
    S = Regulariser(grown(S.network, depth, width), S.tau.item(), S.sigma.item())
    exact = copy.deepcopy(S).double()
    splitting = SplittingMap(A, exact)
    z_star, info = anderson(lambda z: splitting(z, d.double()), d.double(), 1e-9, 1000)
    if not info.converged.all():
        raise RuntimeError(f"the equilibrium was not found: residual {info.residual.max():.1e}")
    x_star = splitting.data_step(z_star, d.double()).detach()
    return Problem(A, S, x, d, {"Eq. 4": x_star, "splitting": z_star})


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
            if source is None:  # after a ReLU all values are positive, so the next changes nothing
                for c in range(small.width):
                    layer.weight[c, c, 1, 1] = 1
            else:
                c_out, c_in = source.weight.shape[:2]
                layer.weight[:c_out, :c_in] = source.weight
                layer.bias[:c_out] = source.bias
    return large


# A contender: how many iterations -> (the state it solved for, and the tracked image).
Run = Callable[[int], tuple[Tensor, Tensor]]


def ours(problem: Problem, map_name: str, gradient: str, solver: str = "anderson") -> Run:
    T = MAPS[map_name](problem.A, problem.S)
    d = problem.d

    def apply(z: Tensor) -> Tensor:
        return T(z, d)

    def run(iterations: int) -> tuple[Tensor, Tensor]:
        if gradient == "unrolled":
            output = unrolled(apply, T.start(d), iterations)
            return output.detach(), output
        solve = anderson if solver == "anderson" else picard
        state, _ = solve(apply, T.start(d), 0.0, iterations)
        output = {"jfb": jfb, "neumann-5": lambda F, z: neumann(F, z, 5),
                  "implicit": lambda F, z: implicit(F, z, 0.0, iterations)}[gradient](apply, state)
        return state, output

    return run


def torchdeqs(problem: Problem, map_name: str, gradient: str, solver: str) -> Run:
    import torchdeq

    T: ImplicitMap = MAPS[map_name](problem.A, problem.S)
    d = problem.d

    def run(iterations: int) -> tuple[Tensor, Tensor]:
        settings = {"f_solver": solver, "f_max_iter": iterations, "f_tol": 0.0,
                    "f_stop_mode": "rel"}
        settings |= {"jfb": {"grad": 1}, "phantom-5": {"grad": 5, "tau": 0.5},
                     "implicit": {"ift": True, "b_solver": solver, "b_max_iter": iterations,
                                  "b_tol": 0.0, "b_stop_mode": "rel"}}[gradient]
        output, _ = torchdeq.get_deq(**settings)(lambda z: T(z, d), T.start(d))
        return output[-1].detach(), output[-1]

    return run


def deepinvs(problem: Problem, map_name: str, gradient: str, solver: str) -> Run:
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
    tau = S.tau.item()

    def run(iterations: int) -> tuple[Tensor, Tensor]:
        common = {
            "data_fidelity": deepinv.optim.L2(), "max_iter": iterations, "early_stop": False,
            "unfold": True, "trainable_params": [], "custom_init": lambda y, physics: (y, y),
            "sigma_denoiser": 0.05, "anderson_acceleration": AndersonAccelerationConfig(
                history_size=5, beta=1.0, eps=1e-8) if solver == "anderson" else None,
            "DEQ": DEQConfig(jacobian_free=gradient == "jfb", max_iter_backward=iterations,
                             anderson_acceleration_backward=solver == "anderson",
                             eps_backward=1e-8)}
        if map_name == "Eq. 4":
            model = deepinv.optim.GD(prior=deepinv.optim.RED(Denoiser()), lambda_reg=tau,
                                     stepsize=1.0, **common)
        else:
            model = deepinv.optim.HQS(prior=deepinv.optim.PnP(Denoiser()), stepsize=1 / tau,
                                      **common)
        output = model(d, physics)
        return output.detach(), output

    return run


# name -> (maker, map, gradient, solvers to choose from by calibration)
CONTENDERS: dict[str, tuple[Callable[..., Run], str, str, tuple[str, ...]]] = {
    **{f"jfbnb {g}": (ours, "splitting", g, ("anderson",))
       for g in ("jfb", "neumann-5", "implicit", "unrolled")},
    **{f"torchdeq {g}, {m}": (torchdeqs, m, g, ("anderson", "broyden", "fixed_point_iter"))
       for g in ("jfb", "phantom-5", "implicit") for m in MAPS},
    **{f"deepinv {g}, {m}": (deepinvs, m, g, ("anderson", "picard"))
       for g in ("jfb", "implicit") for m in MAPS},
}


def available(name: str) -> bool:
    """Whether the contender's library is installed."""
    import importlib.util

    library = name.split()[0]
    return library == "jfbnb" or importlib.util.find_spec(library) is not None


def results_folder() -> Path:
    return Path(__file__).parent / "results"
