"""Solve x = T(x) for each row of a batch: Picard's iteration, Anderson acceleration.

Both return `(x, info)`. x is the last iterate whose residual was measured, so `info` describes x
itself. The residual is `|T(x) - x| / |x|`, one number per row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class SolveInfo:
    """The report of a solve, per image (B,): evaluations of T, last residual, convergence.

    `residuals` (k, B) has the residual at each evaluation.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    residuals: Tensor

    @property
    def ends(self) -> list[str]:
        """How each image's solve ended.

        "converged"; "diverged", to a residual that is not finite; "stalled", at one that no longer
        falls; or "out of iterations".
        """
        earlier = self.residuals[len(self.residuals) // 2].tolist()
        return ["converged" if done else "diverged" if not math.isfinite(residual)
                else "stalled" if residual > 0.9 * before else "out of iterations"
                for done, residual, before in zip(self.converged.tolist(), self.residual.tolist(),
                                                  earlier, strict=True)]

    def complaint(self) -> str:
        """One line on the images that did not converge, the first four by number; "" if all did."""
        failed = [(i, end) for i, end in enumerate(self.ends) if end != "converged"]
        if not failed:
            return ""
        lines = [f"image {i} (relative residual {self.residual[i].item():.1e}, {end})"
                 for i, end in failed[:4]]
        more = f" and {len(failed) - 4} more" if len(failed) > 4 else ""
        return (f"{len(failed)} of {len(self.converged)} did not converge in "
                f"{self.iterations.max().item()} iterations: {', '.join(lines)}{more}; if they are "
                "out of iterations, allow more; else the map is not stable: check the blur and the "
                "noise level")


# Of Anderson's small system, relative to its Gram matrix: an absolute one would dominate as soon
# as the residuals are small.
RIDGE = 1e-8
Callback = Callable[[int, Tensor], None]
Solved = tuple[Tensor, SolveInfo]
Solver = Callable[..., Solved]


def picard(T: Callable[..., Tensor], x0: Tensor, tolerance: float = 1e-4, max_iterations: int = 100,
           callback: Callback | None = None, given: Tensor | None = None) -> Solved:
    """The iteration x <- T(x) of Eq. 4 (Picard 1890, Banach 1922).

    Args:
        T: the map, (B, ...) -> (B, ...), which treats each image independently.
        x0: where to start, (B, ...).
        tolerance: an image is done when its relative residual is at most this.
        max_iterations: the largest number of evaluations of T, at least 1.
        callback: called with (k, x) at each evaluation.
        given: a second argument of T, (B, ...), such as d. T is then called as T(x, given), only
            on the images that are not yet done.

    Raises:
        ValueError: if max_iterations is below 1.
    """
    return _iterate(T, x0, lambda f, g: f, tolerance, max_iterations, callback, given)


def anderson(T: Callable[..., Tensor], x0: Tensor, tolerance: float = 1e-4,
             max_iterations: int = 100, callback: Callback | None = None, window: int = 5,
             given: Tensor | None = None) -> Solved:
    """Anderson acceleration (1965) in the form of Walker and Ni (2011), Algorithm AA.

    The next iterate is the combination of the last `window` values T(x_i), with weights of sum 1,
    whose combined residual is smallest. The other arguments and errors are those of `picard`.
    """
    return _iterate(T, x0, anderson_step(x0, min(window, max_iterations)), tolerance,
                    max_iterations, callback, given)


def anderson_step(x0: Tensor, window: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Anderson's next iterate as a function of T(x) and T(x) - x; it remembers earlier ones."""
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
        gram = gram / scale[:, None, None] + RIDGE * torch.eye(m, device=f.device)
        weights, failed = torch.linalg.solve_ex(gram, gram.new_ones(len(f), m))
        weights = weights / weights.sum(dim=1, keepdim=True)
        # Where the small system is singular, fall back on the plain step.
        usable = (failed == 0) & weights.isfinite().all(dim=1)
        latest = torch.zeros_like(weights)
        latest[:, row] = 1
        weights = torch.where(usable[:, None], weights, latest)
        return (weights.to(f.dtype)[:, None] @ F[:, :m]).view_as(f)

    return step


def norm(x: Tensor) -> Tensor:
    """|x| of each row: (B, ...) -> (B,)."""
    return x.flatten(1).norm(dim=1)


def relative_residual(g: Tensor, x: Tensor) -> Tensor:
    """|g| / |x| of each row, with g = T(x) - x: (B, ...) twice -> (B,)."""
    return norm(g) / norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def require_evaluation(max_iterations: int) -> None:
    """Raise ValueError if max_iterations is below 1."""
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}: at least one evaluation is needed")


def solve(T: Callable[..., Tensor], d: Tensor, tolerance: float = 1e-4, max_iterations: int = 100,
          solver: Solver | None = None, start: Tensor | None = None,
          callback: Callback | None = None) -> Solved:
    """Solve x* = T(x*; d), Eq. 3, without gradients. Images that are done leave the batch.

    Args:
        T: the map, called as T(x, d).
        d: the measurements, (B, ...).
        tolerance: of the residual, in units of `scale_of(T)`, so that it means the same distance
            from x* for every map.
        solver: `picard`, `anderson` or `descent`; by default `T.solver`, else `anderson`. The
            other arguments and errors are the solver's.
        start: where to start, by default `T.start(d)`.

    >>> import jfbnb, torch
    >>> d = torch.ones(1, 1)
    >>> x, info = jfbnb.solve(lambda x, d: x / 2 + d, d, start=torch.zeros(1, 1))
    >>> round(x.item(), 3), info.converged.item()
    (2.0, True)
    """
    x0 = T.start(d) if start is None else start
    chosen = solver or getattr(T, "solver", anderson)
    return chosen(T, x0, tolerance * scale_of(T), max_iterations, callback, given=d)


def scale_of(T: Callable[..., Tensor]) -> float | Tensor:
    """`T.scale`, the unit of the residual T(x) - x; 1 for a map without one.

    A map with small steps, such as gradient descent with a small step size, has small residuals
    even far from its fixed point.
    """
    return getattr(T, "scale", 1.0)


@torch.no_grad()
def _iterate(T, x0, step, tolerance, max_iterations, callback, given) -> Solved:
    require_evaluation(max_iterations)
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
        residual = torch.where(active, relative_residual(g, x), residual)
        iterations = iterations + active
        residuals.append(residual)
        if callback is not None:
            callback(k, x)
        # An image that is done, or has overflowed, no longer changes.
        active = active & (residual > tolerance) & residual.isfinite()
        if k == max_iterations or not active.any():
            break
        x = torch.where(active.view(shape), step(f, g), x)
    return x, SolveInfo(iterations, residual, residual <= tolerance, torch.stack(residuals))
