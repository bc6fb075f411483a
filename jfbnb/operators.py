"""The forward model d = A x + noise (Eq. 1): linear operators, the blur, the measurement.

A `LinearOperator` needs A and its adjoint, nothing else. `Blur` knows more: with zero padding and a
separable kernel it is `A X = K_h X K_w'` per channel, with K_h and K_w banded Toeplitz matrices. A
symmetric kernel makes them symmetric, `K = Q diag(lam) Q'`, so the inverse, the Tikhonov solution
and the spectrum of A are all exact and cost four small matrix products. Nothing is approximated at
the border.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, seeded_generator


class LinearOperator(nn.Module):
    """A of Eq. 1, from images (B, *domain) to measurements (B, *range), the same for each image.

    A subclass writes `forward`, A x, and `adjoint`, A' d, in the type of what they are given. What
    follows from these two is here; a class that knows a faster way overrides it. Buffers hold what
    an operator is made of. They are given, not learned, so they are in no `state_dict`.
    """

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = False) -> None:
        super().register_buffer(name, tensor, persistent)

    def adjoint(self, d: Tensor) -> Tensor:
        """A' d, with <A x, d> = <x, A' d>: (B, *range) -> (B, *domain)."""
        raise NotImplementedError(f"{type(self).__name__} has no adjoint: write one")

    def guess(self, d: Tensor) -> Tensor:
        """An image to start an iteration from: A' d, where nothing better is known."""
        return self.adjoint(d)

    def inverse(self, d: Tensor) -> Tensor:
        """A^-1 d. Raises UserError where no inverse is known."""
        raise UserError(f"{type(self).__name__} has no known inverse: leave the direct inverse out")

    def solve_normal(self, r: Tensor, tau: float | Tensor) -> Tensor:
        """(A'A + tau I)^-1 r for tau > 0, by conjugate gradients; differentiable in r and tau."""
        return _SolveNormal.apply(r, torch.as_tensor(tau, dtype=r.dtype, device=r.device), self)

    def check_adjoint(self, *domain: int, tolerance: float = 1e-6) -> float:
        """How far <A u, v> and <u, A' v> are apart, relative to |A u| |v|, for random u and v.

        Args:
            domain: the shape of an image, e.g. 3, 32, 32.

        Raises:
            UserError: if that is over the tolerance.
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


class _SolveNormal(torch.autograd.Function):
    """x = (A'A + tau I)^-1 r. Its derivatives are solves with the same symmetric matrix."""

    @staticmethod
    def forward(ctx, r: Tensor, tau: Tensor, A: LinearOperator) -> Tensor:
        x = conjugate_gradients(lambda v: A.adjoint(A(v)) + tau * v, r,
                                torch.finfo(r.dtype).eps ** 0.8)
        ctx.save_for_backward(x, tau)
        ctx.A = A
        return x

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, None]:
        x, tau = ctx.saved_tensors
        v = _SolveNormal.apply(g, tau, ctx.A)
        return v, -(v * x).sum(), None


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    tolerance: float = 1e-8,
    max_iterations: int = 1000,
) -> Tensor:
    """Solve `apply(x) = b` for a symmetric positive definite linear map, image by image.

    Hestenes and Stiefel (1952). Stops when every image's residual is below `tolerance * |b|`.

    Args:
        apply: x -> M x on (B, ...), e.g. `lambda x: A.adjoint(A(x)) + tau * x`.
    """
    def dot(u: Tensor, v: Tensor) -> Tensor:
        return (u * v).flatten(1).sum(dim=1).view(-1, *(1,) * (b.dim() - 1))

    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), dot(r, r)
    goal = tolerance**2 * rr
    for _ in range(max_iterations):
        if (rr <= goal).all():
            break
        Mp = apply(p)
        # A solved image has p = 0: the floor turns its 0/0 into 0.
        alpha = rr / dot(p, Mp).clamp_min(torch.finfo(b.dtype).tiny)
        x, r = x + alpha * p, r - alpha * Mp
        rr, rr_old = dot(r, r), rr
        p = r + rr / rr_old.clamp_min(torch.finfo(b.dtype).tiny) * p
    else:
        warnings.warn(f"conjugate gradients stopped after {max_iterations} iterations at "
                      f"{(rr / goal).max().sqrt().item():.1g} times their tolerance", stacklevel=2)
    return x


# --- the blur -----------------------------------------------------------------------------------


def gaussian_kernel(size: int, std: float) -> Tensor:
    """A sampled one-dimensional Gaussian of sum 1, shape (size,), float64.

    Raises:
        UserError: if size is not odd and positive, or std is not positive and finite.
    """
    if size < 1 or size % 2 == 0:
        raise UserError(f"kernel size {size}: choose an odd, positive number of pixels")
    if not (std > 0 and math.isfinite(std)):
        raise UserError(f"kernel std {std}: choose a positive number of pixels")
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    kernel = torch.exp(-0.5 * (offsets / std) ** 2)
    return kernel / kernel.sum()


def toeplitz(kernel: Tensor, n: int) -> Tensor:
    """The (n, n) matrix K with `K x = kernel * x`, the convolution with zeros beyond the border."""
    offsets = torch.arange(n)[:, None] - torch.arange(n)[None, :] + len(kernel) // 2
    inside = (offsets >= 0) & (offsets < len(kernel))
    return torch.where(inside, kernel[offsets.clamp(0, len(kernel) - 1)], 0.0)


class Blur(LinearOperator):
    """The Gaussian blur A of Eq. 1 on images (B, C, H, W), with zero padding; A = A'.

    Args:
        image_size: side in pixels, or (H, W).
        kernel_size, kernel_std: the Gaussian's support and standard deviation, in pixels.

    Raises:
        UserError: if the kernel is invalid or larger than the image.
    """

    def __init__(self, image_size: int | tuple[int, int], kernel_size: int, kernel_std: float):
        super().__init__()
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < kernel_size:
            raise UserError(
                f"an image of {width} x {height} pixels is smaller than the {kernel_size} x "
                f"{kernel_size} blur kernel: use a larger image or a smaller kernel"
            )
        kernel = gaussian_kernel(kernel_size, kernel_std)
        self.image_size = height, width
        self.kernel_size, self.kernel_std = kernel_size, kernel_std
        # float64 here, cast at use: the inverse divides by eigenvalues near 1e-5.
        for side, n in (("h", height), ("w", width)):
            K = toeplitz(kernel, n)
            lam, Q = torch.linalg.eigh(K)
            self.register_buffer(f"K_{side}", K)
            self.register_buffer(f"Q_{side}", Q)
            self.register_buffer(f"lam_{side}", lam)

    def extra_repr(self) -> str:
        height, width = self.image_size
        return f"{height} x {width}, kernel {self.kernel_size}, std {self.kernel_std:.6g}"

    @property
    def spectrum(self) -> Tensor:
        """All H x W eigenvalues of A, as products of those of its factors; float64."""
        return self.lam_h[:, None] * self.lam_w[None, :]

    @property
    def cond(self) -> float:
        """The condition number of A, largest over smallest singular value."""
        singular_values = self.spectrum.abs()
        return (singular_values.max() / singular_values.min()).item()

    def forward(self, x: Tensor) -> Tensor:
        """A x: blur images (B, C, H, W)."""
        return self.K_h.to(x.dtype) @ x @ self.K_w.to(x.dtype).mT

    def adjoint(self, d: Tensor) -> Tensor:
        """A' d, with <A x, d> = <x, A' d>."""
        return self.K_h.to(d.dtype).mT @ d @ self.K_w.to(d.dtype)

    def guess(self, d: Tensor) -> Tensor:
        """d itself, which is an image already, if a blurred one."""
        return d

    def filter(self, x: Tensor, response: Tensor) -> Tensor:
        """Multiply x by `response` (H, W) in the eigenbasis of A, and come back."""
        Q_h, Q_w = self.Q_h.to(x.dtype), self.Q_w.to(x.dtype)
        return Q_h @ (response.to(x.dtype) * (Q_h.mT @ x @ Q_w)) @ Q_w.mT

    def inverse(self, d: Tensor) -> Tensor:
        """A^-1 d, exactly; computed in float64, as A is badly conditioned."""
        return self.filter(d.double(), 1 / self.spectrum).to(d.dtype)

    def solve_normal(self, r: Tensor, tau: float | Tensor) -> Tensor:
        """(A'A + tau I)^-1 r, exactly, for tau > 0."""
        return self.filter(r, 1 / (self.spectrum**2 + tau))


# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """What is measured: image side in pixels, operator, noise level on images in [0, 1].

    Args:
        make: image size, a side or (H, W) -> the operator on images of that size.
    """

    name: str
    image_size: int
    make: Callable[[int | tuple[int, int]], LinearOperator]
    noise_std: float

    def operator(self, image_size: int | tuple[int, int] | None = None) -> LinearOperator:
        """A, for the protocol's own image size or for another."""
        return self.make(image_size or self.image_size)


PROTOCOLS = {protocol.name: protocol for protocol in (
    # The paper's section 5, read literally: variance 5, noise 0.01.
    Protocol("paper", 128, partial(Blur, kernel_size=5, kernel_std=math.sqrt(5)), 0.01),
    # The code published with it: standard deviation 5; noise 0.01 on images in [-1, 1].
    Protocol("code", 128, partial(Blur, kernel_size=5, kernel_std=5.0), 0.005),
)}


def get_protocol(name: str) -> Protocol:
    """Look up a protocol. Raises UserError for an unknown name."""
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def measure(A: nn.Module, x: Tensor, noise_std: float, seed: int, indices: Sequence[int]) -> Tensor:
    """Eq. 1: d = A x + noise, with noise drawn once per image from (seed, image index).

    A measurement so depends neither on the batch that an image is in nor on the device.

    Args:
        x: images (B, C, H, W) in [0, 1].
        noise_std: standard deviation of the white noise, on the same scale.
        indices: B integers that name the images.

    Raises:
        ValueError: if there is not one index per image.
    """
    if len(indices) != len(x):
        raise ValueError(f"{len(x)} images but {len(indices)} indices")
    Ax = A(x)
    noise = torch.empty(Ax.shape)
    for row, index in enumerate(indices):
        noise[row] = torch.randn(Ax.shape[1:], generator=seeded_generator(seed, index))
    return Ax + noise_std * noise.to(Ax)
