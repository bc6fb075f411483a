"""Solve x = T(x), image by image: Picard, Anderson, descent. They know nothing of images.

All return `(x, info)`; x is the last iterate whose residual was measured, so that what `info`
says is true of x itself. The residual is `|T(x) - x| / |x|`, one number per image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SolveInfo:
    """What a solve did, per image (B,), and the residual at each evaluation of T (k, B)."""

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    residuals: Tensor

    def complaint(self, names: Sequence[str] | None = None, most: int = 4) -> str:
        """One line on the images that did not converge, by name or number; "" if all did."""
        failed = (~self.converged).nonzero().flatten().tolist()
        if not failed:
            return ""
        lines = []
        for i in failed[:most]:
            trend = "still falling"
            if not self.residual[i].isfinite():
                trend = "diverged"
            elif self.residual[i] > 0.9 * self.residuals[len(self.residuals) // 2, i]:
                trend = "no longer falling"
            lines.append(f"{names[i] if names else f'image {i}'} (relative residual "
                         f"{self.residual[i].item():.1e}, {trend})")
        more = f" and {len(failed) - most} more" if len(failed) > most else ""
        return (f"{len(failed)} of {len(self.converged)} did not converge in "
                f"{self.iterations.max().item()} iterations: {', '.join(lines)}{more}; where the "
                "residual still falls more iterations help, elsewhere the map is not stable: "
                "check the blur and the noise level")


RIDGE = 1e-8  # of Anderson's small system, relative to its Gram matrix
Callback = Callable[[int, Tensor], None]
Solver = Callable[..., tuple[Tensor, SolveInfo]]


def picard(
    T: Callable[..., Tensor],
    x0: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    callback: Callback | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, SolveInfo]:
    """The iteration x <- T(x) of Eq. 4 (Picard 1890, Banach 1922).

    Args:
        T: the map, (B, ...) -> (B, ...), acting on each image on its own.
        x0: where to start, (B, ...).
        tolerance: an image is done when its relative residual is at most this.
        max_iterations: evaluations of T at most.
        callback: called with (k, x) at each evaluation.
        given: what T is told of each image, (B, ...). T is then called as T(x, given), and the
            images that are done are left out.
    """
    return _iterate(T, x0, lambda f, g: f, tolerance, max_iterations, callback, given)


def anderson(
    T: Callable[..., Tensor],
    x0: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    callback: Callback | None = None,
    window: int = 5,
    ridge: float = RIDGE,
    given: Tensor | None = None,
) -> tuple[Tensor, SolveInfo]:
    """Anderson acceleration (1965) in the form of Walker and Ni (2011), Algorithm AA.

    The next iterate is the combination of the last `window` values T(x_i), with weights of sum 1,
    whose combined residual is smallest. `ridge` is relative to the residuals' Gram matrix: an
    absolute one would dominate as soon as the residuals are small. Other arguments as in `picard`.
    """
    return _iterate(T, x0, _mixing(x0, min(window, max_iterations), ridge), tolerance,
                    max_iterations, callback, given)


def _mixing(x0: Tensor, window: int, ridge: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Anderson's next iterate, of T(x) and T(x) - x at the points so far."""
    # The last values T(x) and residuals T(x) - x, one row each, the oldest overwritten first.
    F = x0.new_empty(len(x0), window, x0.flatten(1).shape[1])
    G = torch.empty_like(F)
    k = 0

    def step(f: Tensor, g: Tensor) -> Tensor:
        nonlocal k
        row, m = k % window, min(k + 1, window)
        k += 1
        F[:, row], G[:, row] = f.flatten(1), g.flatten(1)
        gram = (G[:, :m] @ G[:, :m].mT).double()  # (B, m, m)
        scale = gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-300)
        gram = gram / scale[:, None, None] + ridge * torch.eye(m, device=f.device)
        weights, failed = torch.linalg.solve_ex(gram, gram.new_ones(len(f), m))
        weights = weights / weights.sum(dim=1, keepdim=True)
        # Where the small system is singular, fall back on the plain step.
        usable = (failed == 0) & weights.isfinite().all(dim=1)
        latest = torch.zeros_like(weights)
        latest[:, row] = 1
        weights = torch.where(usable[:, None], weights, latest)
        return (weights.to(f.dtype)[:, None] @ F[:, :m]).view_as(f)

    return step


def _dot(u: Tensor, v: Tensor) -> Tensor:
    return (u * v).sum(dim=tuple(range(1, u.dim())), keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _residual(g: Tensor, x: Tensor) -> Tensor:
    return _norm(g) / _norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def _check(max_iterations: int) -> None:
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}: at least one evaluation is needed")


def solve(
    T: Callable[..., Tensor],
    d: Tensor,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    solver: Solver | None = None,
    start: Tensor | None = None,
    callback: Callback | None = None,
) -> tuple[Tensor, SolveInfo]:
    """x* = T(x*; d), Eq. 3. Nothing is tracked, and images that are done leave the batch.

    Args:
        T: the map, called as T(x, d); its `start(d)` is where to start, unless `start` is given.
        d: the measurements, (B, ...).
        tolerance: multiplied by `T.scale`, where the map has one: how small its steps are wherever
            it is. So it means the same distance from x* for every map.
        solver: one of those above, by default the map's own, else `anderson`; other arguments as
            there.
    """
    x0 = T.start(d) if start is None else start
    chosen = solver or getattr(T, "solver", anderson)
    return chosen(T, x0, tolerance * scale_of(T), max_iterations, callback, given=d)


def scale_of(T: Callable[..., Tensor]) -> float | Tensor:
    """How small a map's steps are wherever it is, on the scale of one whose steps are not: 1.

    What is called small of T(x) - x, or near 1 of its growth, is so in this unit.
    """
    return getattr(T, "scale", 1.0)


@torch.no_grad()
def _iterate(T, x0, step, tolerance, max_iterations, callback, given) -> tuple[Tensor, SolveInfo]:
    _check(max_iterations)
    batch = len(x0)
    shape = (batch,) + (1,) * (x0.dim() - 1)
    x = x0
    iterations = torch.zeros(batch, dtype=torch.long, device=x0.device)
    residual = x0.new_full((batch,), float("inf"))
    active = torch.ones(batch, dtype=torch.bool, device=x0.device)
    residuals = []
    for k in range(1, max_iterations + 1):
        if given is None:
            f = T(x)
        elif active.all():
            f = T(x, given)
        else:
            f = x.clone()
            f[active] = T(x[active], given[active])
        g = f - x
        residual = torch.where(active, _residual(g, x), residual)
        iterations = iterations + active
        residuals.append(residual)
        if callback is not None:
            callback(k, x)
        # An image that is done, or that has overflowed, stays where it is.
        active = active & (residual > tolerance) & residual.isfinite()
        if k == max_iterations or not active.any():
            break
        x = torch.where(active.view(shape), step(f, g), x)
    return x, SolveInfo(iterations, residual, residual <= tolerance, torch.stack(residuals))
