"""The base class of linear operators: a subclass defines A and A', and the rest follows."""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from jfbnb.common import UserError
from jfbnb.core.conjugate_gradients import conjugate_gradients


def require_floats(x: Tensor) -> None:
    """Raise UserError unless x is a tensor of float32 or float64."""
    if not (isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)):
        raise UserError(f"an image or measurement that is a {type(x).__name__} of "
                        f"{getattr(x, 'dtype', 'no type')}: give a tensor of floats, such as "
                        "torch.from_numpy(x).float()")


class LinearOperator(nn.Module):
    """A of Eq. 1, d = A x + noise: each image (B, *domain) -> its measurement (B, *range).

    A subclass defines `forward`, A x, and `adjoint`, A' d. Both return the dtype of their argument.
    It may override any other method with a faster one. Its buffers are constants, not weights, so
    they are left out of `state_dict`.

    Raises:
        UserError: from A(x), where x is no tensor of floats.

    >>> import jfbnb
    >>> class RowSums(jfbnb.LinearOperator):
    ...     def forward(self, x):
    ...         return x.sum(dim=-1)
    ...     def adjoint(self, d):
    ...         return d[..., None].expand(*d.shape, 8)
    >>> RowSums().check_adjoint(3, 8, 8) < 1e-12
    True
    """

    def __call__(self, x: Tensor) -> Tensor:
        require_floats(x)
        return super().__call__(x)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = False) -> None:
        super().register_buffer(name, tensor, persistent)

    def adjoint(self, d: Tensor) -> Tensor:
        """A' d, with <A x, d> = <x, A' d>: (B, *range) -> (B, *domain)."""
        raise NotImplementedError(f"{type(self).__name__} has no adjoint: write one")

    def guess(self, d: Tensor) -> Tensor:
        """An image to start an iteration from, smooth where nothing is measured.

        It approximates the minimiser of |A x - d|^2 + w |Laplacian x|^2, by at most 100 iterations
        of conjugate gradients; w is a tenth of |A A' d|^2 / |A' d|^2. A penalty on the gradient
        would leave a spike at each isolated known pixel, which a solve removes slowly. For images
        that are not (B, C, H, W) it is A' d.
        """
        b = self.adjoint(d)
        if b.dim() != 4:
            return b
        weight = 0.1 * self(b).square().sum() / b.square().sum().clamp_min(1e-30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a start need not be exact
            return conjugate_gradients(
                lambda x: self.adjoint(self(x)) + weight * _laplacian(_laplacian(x)),
                b, 1e-3, 100)

    def inverse(self, d: Tensor) -> Tensor:
        """A^-1 d. Raises UserError where no inverse is known."""
        raise UserError(f"{type(self).__name__} has no known inverse: leave the direct inverse out")

    def visible(self, x: Tensor) -> Tensor:
        """The part of images (B, *domain) that the measurement shows; errors are measured there.

        By default it is all of x. Override it if the scene extends beyond the picture.
        """
        return x

    def solve_normal(self, r: Tensor, tau: float | Tensor, start: Tensor | None = None) -> Tensor:
        """(A'A + tau I)^-1 r for tau > 0, by conjugate gradients; differentiable in r and tau.

        Args:
            start: an image near the solution, if known. Conjugate gradients start from it if it is
                nearer than zero; closed forms ignore it.
        """
        tau = torch.as_tensor(tau, dtype=r.dtype, device=r.device)
        return _SolveNormal.apply(r, tau, self, None if start is None else start.detach())

    def precondition(self, r: Tensor, tau: float | Tensor) -> Tensor:
        """An approximation of (A'A + tau I)^-1 r, symmetric and positive definite, for CG."""
        return r

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"

    def check_adjoint(self, *domain: int, tolerance: float = 1e-6) -> float:
        """|<A u, v> - <u, A' v>| / (|A u| |v|) for random u and v: 0 up to rounding.

        Args:
            domain: the shape of an image, e.g. 3, 32, 32.

        Raises:
            UserError: if the result is not at most the tolerance.
        """
        generator = torch.Generator().manual_seed(0)
        device = next(self.buffers(), torch.empty(())).device
        u = torch.randn(2, *domain, dtype=torch.float64, generator=generator).to(device)
        Au = self(u)
        v = torch.randn(Au.shape, dtype=torch.float64, generator=generator).to(device)
        left, right = (Au * v).sum().item(), (u * self.adjoint(v)).sum().item()
        apart = abs(left - right) / (Au.norm() * v.norm()).item()
        if not apart <= tolerance:
            raise UserError(f"{type(self).__name__}.adjoint is not the adjoint of its forward: "
                            f"<A u, v> = {left:.6g} and <u, A' v> = {right:.6g}, apart by "
                            f"{apart:.1e} of |A u| |v|")
        return apart


def _laplacian(x: Tensor) -> Tensor:
    """Minus the Laplacian of images (B, C, H, W), with Neumann boundary conditions."""
    padded = pad(x, (1, 1, 1, 1), mode="replicate")
    return 4 * x - (padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1]
                    + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2])


class _SolveNormal(torch.autograd.Function):
    """x = (A'A + tau I)^-1 r. Its derivatives are solves with the same symmetric matrix."""

    @staticmethod
    def forward(ctx, r: Tensor, tau: Tensor, A: LinearOperator, start: Tensor | None) -> Tensor:
        x = conjugate_gradients(lambda v: A.adjoint(A(v)) + tau * v, r,
                                torch.finfo(r.dtype).eps ** 0.75, start=start,
                                precondition=lambda v: A.precondition(v, tau))
        ctx.save_for_backward(x, tau)
        ctx.A = A
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, tau = ctx.saved_tensors
        v = _SolveNormal.apply(g, tau, ctx.A, None)
        return v, -(v * x).sum(), None, None
