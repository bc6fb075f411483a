"""What the theory asks of a map and of a gradient, and what a gradient costs; measured."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from jfbnb.core.fixed_point import SolveInfo
from jfbnb.core.gradients import implicit, neumann
from jfbnb.core.maps import ImplicitMap

Gradient = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def parameter_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                       gradient: Gradient) -> Tensor:
    """The gradient of the mean squared error in all of Theta, as one vector.

    Args:
        state: the solved fixed point; d, truth: measurement and original (B, C, H, W).
        gradient: (T, x*) -> tracked output, as in `jfbnb.core.gradients`.

    Leaves the parameters' own `.grad` alone.
    """
    output = T.image(gradient(lambda z: T(z, d), state))
    parts = torch.autograd.grad((output - truth).square().mean(), list(T.parameters()))
    return torch.cat([part.flatten() for part in parts])


def neumann_cosines(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor, terms: list[int],
                    exact: Tensor) -> list[float]:
    """Cosine of the angle between the Neumann-k gradient (Eq. 7) and the exact one, for each k.

    k = 1 is JFB. A positive cosine is a direction of descent.
    """
    return [torch.cosine_similarity(
        parameter_gradient(T, state, d, truth, partial(neumann, terms=k)), exact, dim=0
    ).item() for k in terms]


def exact_gradient(T: ImplicitMap, state: Tensor, d: Tensor, truth: Tensor,
                   tolerance: float = 1e-6, max_iterations: int = 200) -> tuple[Tensor, SolveInfo]:
    """The implicit gradient (Eq. 5), and what the solver of the adjoint equation reports."""
    reports: list[SolveInfo] = []
    gradient = parameter_gradient(T, state, d, truth, partial(
        implicit, tolerance=tolerance, max_iterations=max_iterations, report=reports.append))
    return gradient, reports[0]


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

    Below 1 the fixed point is locally stable: small deviations die out in the end. Returned is the
    mean growth over the last half of the iterations: a complex pair of eigenvalues makes single
    steps oscillate.
    """
    J = Jacobian(T, x_star)
    growths = _power_iteration(J.times, x_star, iterations, generator)
    return growths[iterations // 2:].log().mean(dim=0).exp()


def jacobian_norm(T: Callable[[Tensor], Tensor], x_star: Tensor, iterations: int = 50,
                  generator: torch.Generator | None = None) -> Tensor:
    """The largest singular value of J at x*, per image (B,): power iteration on J'J.

    Below 1 every small deviation shrinks at every step: near x* T is a contraction in the Euclidean
    norm. It is an estimate from below, like every power iteration.
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

    For networks small enough. For JFB to descend the paper's section 4 asks that T is a contraction
    with a factor gamma and continuously differentiable in Theta, that M has full column rank, and
    that cond(M'M) is at most 1 / gamma. A ReLU network meets neither the second nor the third: it
    has kinks, and to scale what enters a channel up and what leaves it down changes nothing.
    """
    parameters = dict(T.named_parameters())

    def apply(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(T, theta, (state, d)).flatten()

    columns = torch.func.jacrev(apply)(parameters)
    return torch.cat([columns[name].reshape(state.numel(), -1) for name in parameters], dim=1)


Step = Callable[[ImplicitMap, Tensor, Tensor, int], Tensor]
