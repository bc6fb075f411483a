"""Conjugate gradients for many images at once."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(apply: Callable[[Tensor], Tensor], b: Tensor, tolerance: float = 1e-8,
                        max_iterations: int = 1000, start: Tensor | None = None,
                        precondition: Callable[[Tensor], Tensor] = lambda r: r) -> Tensor:
    """Solve M x = b for each image of (B, ...) by conjugate gradients (Hestenes and Stiefel 1952).

    Stops when |P r| <= tolerance |P b| for the residual r of every image, with P the
    preconditioner: P r approximates the error of x. Warns if max_iterations do not suffice. An
    image that is not finite does not affect the others.

    Args:
        apply: x -> M x, symmetric and positive definite, e.g. A.adjoint(A(x)) + tau * x.
        b: (B, ...).
        start: (B, ...), used for each image for which |P r| is smaller than from 0.
        precondition: r -> P r, an approximation of M^-1 r; symmetric and positive definite.
    """
    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(dim=1).view(-1, *(1,) * (b.dim() - 1))

    tiny = torch.finfo(b.dtype).tiny
    r, z = b, precondition(b)
    goal = tolerance**2 * dot(z, z)
    x = 0 * goal * b
    if start is not None:
        r_start = b - apply(start)
        z_start = precondition(r_start)
        nearer = dot(z_start, z_start) < dot(z, z)
        x, r, z = (torch.where(nearer, new, old)
                   for new, old in ((start, x), (r_start, r), (z_start, z)))
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
