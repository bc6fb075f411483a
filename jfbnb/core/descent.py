"""Descent on an energy: L-BFGS with a line search, for maps that are gradient steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.core.fixed_point import (
    RIDGE,
    Callback,
    SolveInfo,
    _check,
    _dot,
    _mixing,
    _norm,
    _residual,
)

WINDOW = 10  # of the points that a descent remembers: with 5 it stagnates
SUFFICIENT = 0.1  # of the fall of the energy that its slope promises, to accept a step
CURVED = 1e-6  # least cosine of a step and the gradient's change along it, to learn from the two


@torch.no_grad()
def descent(
    T: Callable[..., Tensor],
    x0: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    callback: Callback | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Anderson's steps as long as each lowers an energy enough; from then on those of L-BFGS.

    A step is accepted if the energy E falls by a share of what its slope promises (Armijo 1966);
    else L-BFGS goes on, with half the step after each that is refused. E is bounded below and its
    gradient is to be Lipschitz, so the slopes go to 0 from any start, as far as rounding allows: no
    map needs to be a contraction for it. Where E's own rounding hides its fall, the residual has to
    fall instead.

    Args:
        T: a map that descends: C (x - T(x)) is the gradient of an energy E, half a sum of squares,
            with C symmetric and positive definite. `T.metric(v)` is C v, and `T.energy(x, given)`
            is T(x), E(x) and, of r = T(x) - x, at most r'C r: the rate at which E falls along r.

    Other arguments as in `anderson`. An evaluation is one of T and E together.
    """
    _check(max_iterations)
    mix, bend = _mixing(x0, min(WINDOW, max_iterations), RIDGE), _bending(WINDOW)
    eps, shape = torch.finfo(x0.dtype).eps, (len(x0),) + (1,) * (x0.dim() - 1)

    def metric(rows: Tensor, v: Tensor) -> Tensor:
        """C v in some rows, and 0 in others."""
        Cv = torch.zeros_like(v)
        if rows.any():
            Cv[rows] = T.metric(v[rows])
        return Cv

    x = y = x0  # the point reached, and the next to try
    r = g = torch.zeros_like(x0)  # T(x) - x; where it is needed, C times that, which E falls along
    active = torch.ones(len(x0), dtype=torch.bool, device=x0.device)
    bent = ~active  # left to L-BFGS
    E = lowest = torch.full((len(x0),), float("inf"), dtype=torch.float64, device=x0.device)
    slope, t, residual = torch.zeros_like(E), torch.ones_like(E), E.to(x0.dtype)
    iterations, residuals = torch.zeros_like(active, dtype=torch.long), []
    for k in range(1, max_iterations + 1):
        f, E_y, slope_y = y.clone(), E.clone(), slope.clone()
        f[active], E_y[active], slope_y[active] = T.energy(
            y[active], None if given is None else given[active])
        r_y = f - y
        rounding = eps * (lowest.sqrt() + _norm(x))
        hidden = (E_y.sqrt() <= lowest.sqrt() + rounding) & (_norm(r_y) < _norm(r))
        lower = active & ((E_y <= E - SUFFICIENT * t * slope) | hidden)
        refused = active & ~lower & ~bent
        bent = bent | refused
        g, g_y = g + metric(refused, r), metric(bent & active, r_y)
        step, fell, change, moved = y - x, r - r_y, g - g_y, lower.view(shape)
        x, r, g = (torch.where(moved, new, old) for new, old in ((y, x), (r_y, r), (g_y, g)))
        E, slope = torch.where(lower, E_y, E), torch.where(lower, slope_y, slope)
        lowest = torch.minimum(lowest, E)
        residual = torch.where(lower, _residual(r, x), residual)
        iterations = iterations + active
        residuals.append(residual)
        if callback is not None:
            callback(k, x)
        active = active & (residual > tolerance) & residual.isfinite()
        if k == max_iterations or not active.any():
            break
        y = mix(f, r_y)
        if (bent & active).any():
            p, curved = bend(r, g, step, fell, change)
            slope = torch.where(bent, _dot(p, g).flatten(), slope)
            longer = torch.where(curved, 1.0, 2 * t)  # over a plain the step grows
            t = torch.where(bent, torch.where(lower, longer, t / 2), t)
            y = torch.where(bent.view(shape), x + t.view(shape).to(x.dtype) * p, y)
    return x, SolveInfo(iterations, residual, residual <= tolerance, torch.stack(residuals))


def _bending(window: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """L-BFGS's next step (Nocedal 1980): T(x) - x, bent by what steps so far say of E's curvature.

    Its matrix, before it has learned anything, is a multiple of C^-1.
    """
    pairs: list[tuple[Tensor, ...]] = []
    scale: Tensor | float = 1.0

    def bend(r: Tensor, g: Tensor, step: Tensor, fell: Tensor,
             change: Tensor) -> tuple[Tensor, Tensor]:
        """The step from where T(x) - x is r and C r is g, and whether E curved upwards before.

        Along the step before, accepted or not, the two fell by `fell` and `change`.
        """
        nonlocal scale
        curvature = _dot(step, change)
        curved = curvature > CURVED * _dot(step, step).sqrt() * _dot(change, change).sqrt()
        pairs.append(tuple(torch.where(curved, v, 0) for v in (
            step, fell, change, 1 / curvature)))
        del pairs[:-window]
        scale = torch.where(curved, curvature / _dot(fell, change), scale)
        p, q, shares = r, g, []
        for step, fell, change, inverse in reversed(pairs):
            shares.append(inverse * _dot(step, q))
            p, q = p - shares[-1] * fell, q - shares[-1] * change
        p = scale * p
        for (step, _, change, inverse), share in zip(pairs, reversed(shares), strict=True):
            p = p + (share - inverse * _dot(change, p)) * step
        return torch.where(_dot(p, g) > 0, p, r), curved.flatten()  # rounding may turn it uphill

    return bend
