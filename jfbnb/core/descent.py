"""Minimise an energy whose gradient step is the map T: L-BFGS with Armijo's line search."""

from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.core.fixed_point import (
    Callback,
    Solved,
    SolveInfo,
    anderson_step,
    norm,
    relative_residual,
    require_evaluation,
)

WINDOW = 10  # how many points Anderson, and pairs L-BFGS, remembers: with 5 it stagnates
ARMIJO = 0.1  # a step must reach this share of the decrease that the slope predicts
CURVATURE = 1e-6  # a pair is used if the cosine of the angle between s and y is above this


@torch.no_grad()
def descent(T: Callable[..., Tensor], x0: Tensor, tolerance: float = 1e-4,
            max_iterations: int = 100, callback: Callback | None = None,
            given: Tensor | None = None) -> Solved:
    """Minimise an energy E by Anderson's steps, and by L-BFGS after the first one that fails.

    A step of length t along p is accepted if E decreases by at least a tenth of t times the slope
    -<p, grad E> (Armijo 1966); else t is halved. An Anderson step must satisfy this for t = 1 and
    p = T(x) - x. If E is bounded below and its gradient is Lipschitz, the slopes converge to 0 from
    any start, up to rounding, whether or not T is a contraction. If rounding hides E's decrease, a
    smaller residual is accepted instead.

    Args:
        T: a map with C (x - T(x)) = grad E(x), C symmetric and positive definite, E half a sum of
            squares. `T.metric(v)` is C v. `T.energy(x, given)` is T(x), E(x) and a lower bound
            on r'C r with r = T(x) - x: the slope of E along r.

    The other arguments and errors are those of `picard`. One evaluation is one of `T.energy`.
    """
    require_evaluation(max_iterations)
    anderson, lbfgs = anderson_step(x0, min(WINDOW, max_iterations)), _lbfgs(WINDOW)
    eps, shape = torch.finfo(x0.dtype).eps, (len(x0),) + (1,) * (x0.dim() - 1)

    def metric(rows: Tensor, v: Tensor) -> Tensor:
        """C v in some rows, and 0 in the others."""
        Cv = torch.zeros_like(v)
        if rows.any():
            Cv[rows] = T.metric(v[rows])
        return Cv

    x = trial = x0  # the accepted point, and the next one to try
    r = g = torch.zeros_like(x0)  # T(x) - x; and C r = -grad E, in the rows that use L-BFGS
    active = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    by_lbfgs = ~active  # the rows that use L-BFGS
    E = lowest = torch.full((len(x0),), float("inf"), dtype=torch.float64, device=x0.device)
    slope, t, residual = torch.zeros_like(E), torch.ones_like(E), E.to(x0.dtype)
    iterations, residuals = torch.zeros_like(active, dtype=torch.long), []
    for k in range(1, max_iterations + 1):
        f, E_trial, slope_trial = trial.clone(), E.clone(), slope.clone()
        f[active], E_trial[active], slope_trial[active] = T.energy(
            trial[active], None if given is None else given[active])
        r_trial = f - trial
        rounding = eps * (lowest.sqrt() + norm(x))
        hidden = (E_trial.sqrt() <= lowest.sqrt() + rounding) & (norm(r_trial) < norm(r))
        accepted = active & ((E_trial <= E - ARMIJO * t * slope) | hidden)
        refused = active & ~accepted & ~by_lbfgs
        by_lbfgs = by_lbfgs | refused
        g, g_trial = g + metric(refused, r), metric(by_lbfgs & active, r_trial)
        s, Cinv_y, y, moved = trial - x, r - r_trial, g - g_trial, accepted.view(shape)
        x, r, g = (torch.where(moved, new, old)
                   for new, old in ((trial, x), (r_trial, r), (g_trial, g)))
        E, slope = (torch.where(accepted, new, old)
                    for new, old in ((E_trial, E), (slope_trial, slope)))
        lowest = torch.minimum(lowest, E)
        residual = torch.where(accepted, relative_residual(r, x), residual)
        iterations = iterations + active
        residuals.append(residual)
        if callback is not None:
            callback(k, x)
        active = active & (residual > tolerance) & residual.isfinite()
        if k == max_iterations or not active.any():
            break
        trial = anderson(f, r_trial)
        if (by_lbfgs & active).any():
            p, curved = lbfgs(r, g, s, y, Cinv_y)
            slope = torch.where(by_lbfgs, _dot(p, g).flatten(), slope)
            longer = torch.where(curved, 1.0, 2 * t)  # where E is not convex the step grows
            t = torch.where(by_lbfgs, torch.where(accepted, longer, t / 2), t)
            trial = torch.where(by_lbfgs.view(shape), x + t.view(shape).to(x.dtype) * p, trial)
    return x, SolveInfo(iterations, residual, residual <= tolerance, torch.stack(residuals))


def _lbfgs(window: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The two-loop recursion of L-BFGS (Nocedal 1980), with the initial matrix H0 = gamma C^-1.

    The first loop updates C^-1 q beside q, so no system with C is solved. gamma is that of Liu and
    Nocedal (1989), s'y / y'C^-1 y of the latest pair.
    """
    pairs: list[tuple[Tensor, ...]] = []
    gamma: Tensor | float = 1.0

    def direction(r: Tensor, g: Tensor, s: Tensor, y: Tensor,
                  Cinv_y: Tensor) -> tuple[Tensor, Tensor]:
        """The direction p at a point with g = -grad E and r = C^-1 g, and where s'y > 0.

        s is the latest step, accepted or not, and y the change of grad E along it.
        """
        nonlocal gamma
        sy = _dot(s, y)
        curved = sy > CURVATURE * _dot(s, s).sqrt() * _dot(y, y).sqrt()
        pairs.append(tuple(torch.where(curved, v, 0) for v in (s, y, Cinv_y, 1 / sy)))
        del pairs[:-window]
        gamma = torch.where(curved, sy / _dot(Cinv_y, y), gamma)
        p, q, alphas = r, g, []
        for s, y, Cinv_y, rho in reversed(pairs):
            alphas.append(rho * _dot(s, q))
            p, q = p - alphas[-1] * Cinv_y, q - alphas[-1] * y
        p = gamma * p
        for (s, y, _, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            beta = rho * _dot(y, p)
            p = p + (alpha - beta) * s
        return torch.where(_dot(p, g) > 0, p, r), curved.flatten()  # rounding may turn it uphill

    return direction


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """<u, v> of each row: (B, ...) twice -> (B, 1, ...)."""
    return (u * v).sum(dim=tuple(range(1, u.dim())), keepdim=True)
