"""What the theory asks of a map and of a gradient, measured."""

from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.fixed_point import SolveInfo
from jfbnb.gradients import implicit, neumann
from jfbnb.maps import ImplicitMap

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
    gradients = torch.autograd.grad((output - truth).square().mean(), list(T.S.parameters()))
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


def spectral_radius(T: Callable[[Tensor], Tensor], x_star: Tensor, iterations: int = 50,
                    generator: torch.Generator | None = None) -> Tensor:
    """The modulus of the largest eigenvalue of J = dT/dx at x*, per image (B,).

    By power iteration; J v is the derivative of u J, which is linear in u. The mean growth over
    the last half of the iterations is returned: a complex pair of eigenvalues makes single steps
    oscillate.
    """
    x = x_star.detach().requires_grad_()
    with torch.enable_grad():
        image = T(x)
        u = torch.zeros_like(image, requires_grad=True)
        (pullback,) = torch.autograd.grad(image, x, u, create_graph=True)  # u J, linear in u
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    growths = []
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.dim() - 1))
        (v,) = torch.autograd.grad(pullback, u, v, retain_graph=True)  # J v
        growths.append(v.flatten(1).norm(dim=1))
    return torch.stack(growths[iterations // 2:]).log().mean(dim=0).exp()
