"""What there was before learning: the direct inverse and Tikhonov regularisation."""

from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.operators import Blur


def direct_inverse(A: Blur, d: Tensor) -> Tensor:
    """Section 2.2: x = A^-1 d = x_true + A^-1 noise. Unbounded; shapes (B, C, H, W)."""
    return A.inverse(d)


def tikhonov(A: Blur, d: Tensor, lam: float) -> Tensor:
    """Eq. 2 with R = |x|^2 / 2, in closed form: (A'A + lam I)^-1 A'd, lam > 0."""
    return A.solve_normal(A.adjoint(d), lam)


@torch.no_grad()
def tikhonov_gradient_descent(
    A: Blur,
    d: Tensor,
    lam: float,
    step: float,
    iterations: int,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Gradient descent on Eq. 2 with R = |x|^2 / 2, from x = d.

    x <- x - step (A'(A x - d) + lam x). It converges to `tikhonov` for 0 < step < 2 / (1 + lam),
    as |A| <= 1. Stopped early it regularises by itself, also with lam = 0: the directions that A
    hardly sees, where the noise is, have not moved yet.

    Args:
        iterations: number of steps.
        callback: called with (k, x) for k = 0 .. iterations.
    """
    x = d.clone()
    for k in range(iterations + 1):
        if callback is not None:
            callback(k, x)
        if k < iterations:
            x = x - step * (A.adjoint(A(x) - d) + lam * x)
    return x


def discrepancy_lambda(A: Blur, d: Tensor, noise_std: float, lams: Tensor) -> float:
    """Morozov's discrepancy principle: the largest lam whose misfit is that of the noise.

    That is, with |A x_lam - d|^2 at most noise_std^2 times the number of values in d. It needs
    the noise level, but no ground truth.

    Args:
        lams: candidates, any order.
    """
    for lam in sorted(lams.tolist(), reverse=True):
        if (A(tikhonov(A, d, lam)) - d).square().mean() <= noise_std**2:
            return lam
    return float(lams.min())
