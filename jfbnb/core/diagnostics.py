"""Measurements on a map at its fixed point: its Jacobians, and gradients in the weights."""

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
    """The gradient of the mean squared error with respect to all of Theta, as one vector.

    The parameters' `.grad` stays as it is.

    Args:
        state: the solved fixed point.
        d, truth: the measurement (B, *range), and the true image (B, C, H, W).
        gradient: (T, x*) -> tracked output, as in `jfbnb.core.gradients`.
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
    """The implicit gradient (Eq. 5), and the report of the adjoint equation's solver."""
    reports: list[SolveInfo] = []
    gradient = parameter_gradient(T, state, d, truth, partial(
        implicit, tolerance=tolerance, max_iterations=max_iterations, report=reports.append))
    return gradient, reports[0]


class Jacobian:
    """J = dT/dx at x*, as products with vectors, J v and J' u, for each image of (B, ...)."""

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
    """An estimate of the spectral radius of J = dT/dx at x*, per image (B,), by power iteration.

    If the spectral radius is below 1, x* is locally stable: small deviations decay in the end. The
    estimate is the mean growth of a random vector over the last half of the iterations, as single
    steps oscillate for a complex pair of eigenvalues. The radius is at least about this: it is
    larger where the start has too little of its eigenvector. Below 1 it proves nothing.
    """
    J = Jacobian(T, x_star)
    growths = _power_iteration(J.times, x_star, iterations, generator)
    return growths[iterations // 2:].log().mean(dim=0).exp()


def jacobian_norm(T: Callable[[Tensor], Tensor], x_star: Tensor, iterations: int = 50,
                  generator: torch.Generator | None = None) -> Tensor:
    """A lower bound on the largest singular value of J at x*, per image (B,).

    By power iteration on J'J: the norm is at least this, and the bound is sharp in the limit. Above
    1, T is no contraction near x* in the Euclidean norm. Below 1 proves nothing.
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
    """M = dT/dTheta at a fixed point, as a dense matrix (values in the state, parameters).

    For small networks. The paper's section 4 proves that JFB descends if T is a contraction with
    factor gamma and continuously differentiable in Theta, M has full column rank, and cond(M'M) is
    at most 1 / gamma. A ReLU network violates the second and the third: it has kinks, and weights
    scaled up before a channel and down after it give the same T.
    """
    parameters = dict(T.named_parameters())

    def apply(theta: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(T, theta, (state, d)).flatten()

    columns = torch.func.jacrev(apply)(parameters)
    return torch.cat([columns[name].reshape(state.numel(), -1) for name in parameters], dim=1)

