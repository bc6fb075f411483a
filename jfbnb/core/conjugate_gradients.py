"""Conjugate gradients (Hestenes and Stiefel 1952), for many images at once."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
    start: Tensor | None = None,
    precondition: Callable[[Tensor], Tensor] = lambda r: r,
) -> Tensor:
    """Solve `apply(x) = b` for a symmetric positive definite linear map, image by image.

    Hestenes and Stiefel (1952). With P for `precondition`, stops when |P r| is below `tolerance`
    |P b| for every image's residual r: P r is about what is wrong with x. What is not finite
    stays so.

    Args:
        apply: x -> M x on (B, ...), e.g. `lambda x: A.adjoint(A(x)) + tau * x`.
        start: where to start, for each image where that is nearer than 0.
        precondition: r -> about M^-1 r, linear, symmetric and positive definite.
    """
    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(dim=1).view(-1, *(1,) * (b.dim() - 1))

    tiny = torch.finfo(b.dtype).tiny
    r, z = b, precondition(b)
    goal = tolerance**2 * dot(z, z)
    x = 0 * goal * b
    if start is not None:
        left = b - apply(start)
        wrong = precondition(left)
        nearer = dot(wrong, wrong) < dot(z, z)
        x, r, z = (torch.where(nearer, new, old)
                   for new, old in ((start, x), (left, r), (wrong, z)))
    p, rz = z, dot(r, z)
    for _ in range(max_iterations):
        if not (dot(z, z) > goal).any():  # NaN is never over it
            break
        Mp = apply(p)
        # A solved image has p = 0: the floor turns its 0/0 into 0.
        alpha = rz / dot(p, Mp).clamp_min(tiny)
        x, r = x + alpha * p, r - alpha * Mp
        z = precondition(r)
        rz, before = dot(r, z), rz
        p = z + rz / before.clamp_min(tiny) * p
    else:
        warnings.warn(f"conjugate gradients stopped after {max_iterations} iterations at "
                      f"{(dot(z, z) / goal).nan_to_num().max().sqrt().item():.1g} times their "
                      "tolerance",
                      stacklevel=2)
    return x
