"""Methods without learning: direct inverse, Tikhonov regularisation, total variation."""

import torch
from torch import Tensor

from jfbnb.core.fixed_point import Callback, Solved, SolveInfo
from jfbnb.core.linear_operator import LinearOperator
from jfbnb.core.operators import Blur


def direct_inverse(A: LinearOperator, d: Tensor) -> Tensor:
    """Section 2.2: x = A^-1 d = x_true + A^-1 noise, (B, *range) -> (B, C, H, W), not clipped.

    Raises UserError where A has no known inverse.
    """
    return A.inverse(d)


def tikhonov(A: LinearOperator, d: Tensor, lam: float) -> Tensor:
    """Eq. 2 with R = |x|^2 / 2, in closed form: (A'A + lam I)^-1 A'd, lam > 0."""
    return A.solve_normal(A.adjoint(d), lam)


@torch.no_grad()
def tikhonov_gradient_descent(A: LinearOperator, d: Tensor, lam: float, step: float,
                              iterations: int, callback: Callback | None = None) -> Tensor:
    """Gradient descent on Eq. 2 with R = |x|^2 / 2, from `A.guess(d)`, which is d for a blur.

    x <- x - step (A'(A x - d) + lam x). It converges to `tikhonov` for 0 < step < 2 / (1 + lam),
    if |A| <= 1. Early stopping regularises even with lam = 0: along singular vectors with small
    singular values, where the inverse amplifies noise, x has hardly changed.

    Args:
        lam: weight of R, >= 0.
        iterations: number of steps.
        callback: called with (k, x) for k = 0 .. iterations.
    """
    x = A.guess(d).clone()
    for k in range(iterations + 1):
        if callback is not None:
            callback(k, x)
        if k < iterations:
            x = x - step * (A.adjoint(A(x) - d) + lam * x)
    return x


def gradient_descent_iterate(A: Blur, d: Tensor, lam: float, step: float, k: int) -> Tensor:
    """Iterate k of `tikhonov_gradient_descent` in closed form, at the same cost for every k.

    In the eigenbasis of A every coefficient converges geometrically, with ratio
    1 - step (s^2 + lam) for the eigenvalue s.

    Args:
        A: a blur with a black border, symmetric.
    """
    s = A.spectrum
    limit = s / (s**2 + lam)
    return A.factors.filter(d, limit + (1 - step * (s**2 + lam)) ** k * (1 - limit))


def discrepancy_lambda(A: LinearOperator, d: Tensor, noise_std: float, lams: Tensor) -> float:
    """Morozov's discrepancy principle (1966): the largest lam whose misfit is no more than noise.

    The misfit |A x_lam - d|^2 must be at most noise_std^2 times the number of values in d. If no
    candidate qualifies, the smallest is returned. The true image is not needed.

    Args:
        lams: candidates, in any order.
    """
    for lam in sorted(lams.tolist(), reverse=True):
        if (A(tikhonov(A, d, lam)) - d).square().mean() <= noise_std**2:
            return lam
    return float(lams.min())


def image_gradient(x: Tensor) -> Tensor:
    """Forward differences to the next row and column, 0 at the last: (B, C, H, W) -> (2, ...)."""
    p = torch.zeros(2, *x.shape, dtype=x.dtype, device=x.device)
    p[0, :, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    p[1, :, :, :, :-1] = x[:, :, :, 1:] - x[:, :, :, :-1]
    return p


def image_gradient_adjoint(p: Tensor) -> Tensor:
    """The adjoint of `image_gradient`, minus the divergence: (2, B, C, H, W) -> (B, C, H, W)."""
    x = torch.zeros_like(p[0])
    x[:, :, :-1] -= p[0, :, :, :-1]
    x[:, :, 1:] += p[0, :, :, :-1]
    x[:, :, :, :-1] -= p[1, :, :, :, :-1]
    x[:, :, :, 1:] += p[1, :, :, :, :-1]
    return x


def _magnitude(p: Tensor) -> Tensor:
    """|p| at each pixel, over both directions and all channels: (2, B, C, H, W) -> (B, 1, H, W)."""
    return p.square().sum(dim=(0, 2)).sqrt()[:, None]


@torch.no_grad()
def total_variation(A: LinearOperator, d: Tensor, weight: float, tolerance: float = 1e-4,
                    max_iterations: int = 300, step: float | None = None) -> Solved:
    """Minimise |A x - d|^2 / 2 + weight TV(x), Eq. 2, by Chambolle and Pock (2011), Algorithm 1.

    TV is isotropic (Rudin, Osher and Fatemi 1992) and couples the channels: it sums, over the
    pixels, the norm of the image gradient over both directions and all channels. The data term's
    proximal map is exact, so the method converges for any `step` > 0.

    Args:
        weight: of TV, > 0.
        tolerance: on the primal-dual residuals of Goldstein et al. (2013), relative to |A'd|
            and |x|, whichever is larger.
        step: tau; sigma = 1 / (8 tau), as the squared norm of the image gradient is below 8. The
            default, 0.018 / weight, follows the dual variable, whose size is at most `weight`. It
            takes 50 to 150 iterations at weights of 1e-4 to 2e-2; a fixed tau takes many more.

    Returns:
        x (B, C, H, W), and `SolveInfo` per image.
    """
    tau = 0.018 / weight if step is None else step
    sigma = 1 / (8 * tau)
    b = A.adjoint(d)
    x, p = A.guess(d).clone(), torch.zeros(2, *b.shape, dtype=b.dtype, device=b.device)
    x_bar = x
    iterations = torch.zeros(len(d), dtype=torch.long, device=d.device)
    residual = b.new_full((len(d),), float("inf"))
    residuals = []
    for _ in range(max_iterations):
        p_new = p + sigma * image_gradient(x_bar)
        p_new = p_new / (_magnitude(p_new) / weight).clamp_min(1)
        x_new = A.solve_normal(b + x / tau - image_gradient_adjoint(p_new), 1 / tau, x)
        dx, dp = x - x_new, p - p_new
        primal = (dx / tau - image_gradient_adjoint(dp)).flatten(1).norm(dim=1)
        dual = (dp / sigma - image_gradient(dx)).transpose(0, 1).flatten(1).norm(dim=1)
        active = residual > tolerance  # images that are done stay as they are
        iterations += active
        residual = torch.where(active, torch.maximum(
            primal / b.flatten(1).norm(dim=1), dual / x_new.flatten(1).norm(dim=1)), residual)
        residuals.append(residual)
        moves = active[:, None, None, None]
        x_bar = torch.where(moves, 2 * x_new - x, x_bar)
        x, p = torch.where(moves, x_new, x), torch.where(moves, p_new, p)
        if (residual <= tolerance).all():
            break
    return x, SolveInfo(iterations, residual, residual <= tolerance, torch.stack(residuals))
