"""What the theory asks of a map and of a gradient, and what a gradient costs; measured."""

import os
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jfbnb.fixed_point import SolveInfo, anderson, picard
from jfbnb.gradients import implicit, jfb, neumann, unrolled
from jfbnb.maps import GradientMap, ImplicitMap, PreconditionedMap, SplittingMap
from jfbnb.networks import Regulariser

Gradient = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def parameter_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                       method: Gradient) -> Tensor:
    """The gradient of the mean squared error in all of Theta, as one vector, by `method`.

    Args:
        state: the solved fixed point; d, truth: measurement and original (B, C, H, W).
        method: (T, x*) -> tracked output, as in `jfbnb.gradients`.

    Leaves the parameters' own `.grad` alone.
    """
    output = T.image(method(lambda z: T(z, d), state))
    # DE-PROX does without tau, whose gradient is then 0.
    gradients = torch.autograd.grad((output - truth).square().mean(), list(T.S.parameters()),
                                    materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def neumann_cosines(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor, terms: list[int],
                    exact: Tensor) -> list[float]:
    """Cosine of the angle between the Neumann-k gradient (Eq. 7) and the exact one, for each k.

    k = 1 is JFB. A positive cosine is a direction of descent.
    """
    return [torch.cosine_similarity(
        parameter_gradient(T, state, d, truth, lambda F, x, k=k: neumann(F, x, k)), exact, dim=0
    ).item() for k in terms]


def exact_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                   tolerance: float = 1e-6, max_iterations: int = 200) -> tuple[Tensor, SolveInfo]:
    """The implicit gradient (Eq. 5), and what the solver of the adjoint equation reports."""
    reports: list[SolveInfo] = []
    gradient = parameter_gradient(
        T, state, d, truth,
        lambda F, x: implicit(F, x, tolerance, max_iterations, reports.append))
    return gradient, reports[0]


def direction(A: nn.Module, S: Regulariser, d: Tensor, truth: Tensor,
              seed: int = 0) -> dict[str, float]:
    """JFB's direction through three maps at one equilibrium: x* of Eq. 4, and z* = D(x*).

    Returns:
        For * = gradient, preconditioned and splitting: cosine_* to the exact gradient of that
        map's loss, on x* for the first two and on z* for the third, and radius_*, the median
        spectral radius of J over the images.
    """
    maps = {"gradient": GradientMap(A, S), "preconditioned": PreconditionedMap(A, S),
            "splitting": (splitting := SplittingMap(A, S))}
    z_star, _ = anderson(lambda z: splitting(z, d), d, 1e-5, 200)
    x_star = splitting.data_step(z_star, d).detach()
    found = {}
    # Gradient and preconditioned map share x* and so the exact gradient, which the second gives
    # in far fewer steps.
    exact, _ = exact_gradient(maps["preconditioned"], x_star, d, truth, 1e-4, 200)
    for name, T in maps.items():
        state = x_star
        if name == "splitting":
            state = z_star
            exact, _ = exact_gradient(T, z_star, d, truth, 1e-4, 200)
        found[f"cosine_{name}"] = neumann_cosines(T, state, d, truth, [1], exact)[0]
        found[f"radius_{name}"] = spectral_radius(
            lambda z, T=T: T(z, d), state, generator=torch.manual_seed(seed)).median().item()
    return found


class Jacobian:
    """J = dT/dx at x*, as products with vectors: J v and u J; image by image (B, ...)."""

    def __init__(self, T: Callable[[Tensor], Tensor], x_star: Tensor):
        self.x = x_star.detach().requires_grad_()
        with torch.enable_grad():
            self.image = T(self.x)
            # u J is linear in u, and its derivative along v is J v.
            self.u = torch.zeros_like(self.image, requires_grad=True)
            (self.uJ,) = torch.autograd.grad(self.image, self.x, self.u, create_graph=True)

    def times(self, v: Tensor) -> Tensor:
        """J v."""
        return torch.autograd.grad(self.uJ, self.u, v, retain_graph=True)[0]

    def transposed_times(self, u: Tensor) -> Tensor:
        """J' u."""
        return torch.autograd.grad(self.image, self.x, u, retain_graph=True)[0]


def spectral_radius(T: Callable[[Tensor], Tensor], x_star: Tensor, iterations: int = 50,
                    generator: torch.Generator | None = None) -> Tensor:
    """The modulus of the largest eigenvalue of J = dT/dx at x*, per image (B,), by power iteration.

    Below 1 deviations die out in the end. The mean growth over the last half of the iterations is
    returned: a complex pair of eigenvalues makes single steps oscillate.
    """
    J = Jacobian(T, x_star)
    growths = _power_iteration(J.times, x_star, iterations, generator)
    return growths[iterations // 2:].log().mean(dim=0).exp()


def jacobian_norm(T: Callable[[Tensor], Tensor], x_star: Tensor, iterations: int = 50,
                  generator: torch.Generator | None = None) -> Tensor:
    """The largest singular value of J at x*, per image (B,): power iteration on J'J.

    Below 1 every deviation shrinks at every step: T contracts there in the Euclidean norm. It is
    an estimate from below, like every power iteration.
    """
    J = Jacobian(T, x_star)
    growths = _power_iteration(lambda v: J.transposed_times(J.times(v)), x_star, iterations,
                               generator)
    return growths[-1].sqrt()


def _power_iteration(apply: Callable[[Tensor], Tensor], like: Tensor, iterations: int,
                     generator: torch.Generator | None) -> Tensor:
    """|M v| at each step from a random unit v, (iterations, B)."""
    v = torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
    growths = []
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.dim() - 1))
        v = apply(v)
        growths.append(v.flatten(1).norm(dim=1))
    return torch.stack(growths)


def parameter_jacobian(T: ImplicitMap, state: Tensor, d: Tensor) -> Tensor:
    """M = dT/dTheta at a fixed point, a matrix (values in the state, parameters).

    For networks small enough. The paper's section 4 asks that M has full column rank and that
    cond(M'M) is at most 1 / gamma, gamma being the contraction factor, for JFB to descend.
    """
    parameters = dict(T.S.named_parameters())

    def apply(theta: dict[str, Tensor]) -> Tensor:
        named = {f"S.{name}": value for name, value in theta.items()}
        return torch.func.functional_call(T, named, (state, d)).flatten()

    columns = torch.func.jacrev(apply)(parameters)
    return torch.cat([columns[name].reshape(state.numel(), -1) for name in parameters], dim=1)


def gradient_costs(T: ImplicitMap, d: Tensor, truth: Tensor, iterations: list[int],
                   gradients: Sequence[str] = ("jfb", "implicit", "unrolled")) -> list[dict]:
    """Time and memory of one training step by each of the gradients.

    Args:
        iterations: values of K, the number of plain iterations that find x*, of adjoint
            iterations (implicit), or of tracked applications of T (unrolled).

    Returns:
        A record for each gradient and K: gradient, K, seconds, bytes.
    """
    def step(gradient: str, K: int) -> Tensor:
        if gradient == "unrolled":
            return parameter_gradient(T, T.start(d), d, truth, lambda F, z: unrolled(F, z, K))
        state, _ = picard(lambda z: T(z, d), T.start(d), 0.0, K)
        method = jfb if gradient == "jfb" else lambda F, z: implicit(F, z, 0.0, K)
        return parameter_gradient(T, state, d, truth, method)

    records = []
    for gradient in gradients:
        for K in iterations:
            seconds, peak = step_cost(lambda g=gradient, K=K: step(g, K))
            records.append({"gradient": gradient, "K": K, "seconds": seconds, "bytes": peak})
    return records


def step_cost(step: Callable[[], object]) -> tuple[float, int]:
    """What one call takes: seconds, and the peak of the memory that it allocates, in bytes.

    On a CPU the peak is counted from PyTorch's own record of tensors made and freed. The call is
    made three times: to warm up, to time, and to count.
    """
    step()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    clock = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
        return time.perf_counter() - clock, torch.cuda.max_memory_allocated() - before
    seconds = time.perf_counter() - clock
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    changes = [(event.start_ns(), event.nbytes())
               for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for _, nbytes in sorted(changes):
        total += nbytes
        peak = max(peak, total)
    return seconds, peak
