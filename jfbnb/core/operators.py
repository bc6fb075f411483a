"""The operators A of Eq. 1, d = A x + noise: convolutions, masks, MRI.

- `Separable`: A X = V_h X V_w' per channel. Two small eigendecompositions turn (A'A + tau I)^-1
  into four matrix products, exactly; nothing is approximated at the border.
- `Convolution` with any kernel (PSF): `Separable` where the kernel is an outer product, else by
  FFT. `Blur` is the Gaussian one; `Downsampling` then drops rows and columns.
- `Inpainting` and `MRI` are diagonal, one in the image and the other in k-space.

`border` says what lies beyond the picture. With "black", the paper's model, the scene is as large
as the picture and zero beyond it; with "periodic" it repeats itself. With "unknown" the scene is
larger than the picture by the kernel's reach, as for a camera, and nothing is assumed about what
lies there.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from jfbnb.common import UserError
from jfbnb.core.kernels import gaussian_kernel
from jfbnb.core.linear_operator import LinearOperator, require_floats

BORDERS = ("unknown", "black", "periodic")


def _require_size(x: Tensor, size: tuple[int, ...], kind: str = "an image") -> None:
    require_floats(x)
    found = tuple(x.shape[-len(size):])
    if found != tuple(size):
        raise UserError(f"{kind} of {found} for an operator on {tuple(size)}: they need the same "
                        "height and width")


# --- separable operators --------------------------------------------------------------------------


class Separable(LinearOperator):
    """A X = V_h X V_w' on each channel of images (B, C, H, W), for any V_h (h, H) and V_w (w, W).

    A'A is the Kronecker product of V_h'V_h and V_w'V_w, so their eigenvectors diagonalise it.
    """

    def __init__(self, V_h: Tensor, V_w: Tensor):
        super().__init__()
        # float64 here, cast at use: the inverse divides by singular values near 1e-5.
        for side, V in (("h", V_h.double()), ("w", V_w.double())):
            lam, Q = _eigen(V)
            self.register_buffer(f"V_{side}", V)
            self.register_buffer(f"Q_{side}", Q)
            self.register_buffer(f"lam_{side}", lam)

    @property
    def spectrum(self) -> Tensor:
        """H x W values whose squares are the eigenvalues of A'A; those of A if it is symmetric."""
        return self.lam_h[:, None] * self.lam_w[None, :]

    def forward(self, x: Tensor) -> Tensor:
        return self.V_h.to(x.dtype) @ x @ self.V_w.to(x.dtype).mT

    def adjoint(self, d: Tensor) -> Tensor:
        return self.V_h.to(d.dtype).mT @ d @ self.V_w.to(d.dtype)

    def filter(self, x: Tensor, response: Tensor) -> Tensor:
        """Multiply x by `response` (H, W) in the eigenbasis of A'A."""
        Q_h, Q_w = self.Q_h.to(x.dtype), self.Q_w.to(x.dtype)
        return Q_h @ (response.to(x.dtype) * (Q_h.mT @ x @ Q_w)) @ Q_w.mT

    def inverse(self, d: Tensor) -> Tensor:
        """A^-1 d, or the smallest x with A x = d if there are many; computed in float64."""
        V_h, V_w = (torch.linalg.pinv(V, rtol=1e-12) for V in (self.V_h, self.V_w))
        return (V_h @ d.double() @ V_w.mT).to(d.dtype)

    def solve_normal(self, r: Tensor, tau: float | Tensor, start: Tensor | None = None) -> Tensor:
        """(A'A + tau I)^-1 r, exactly, for tau > 0."""
        return self.filter(r, 1 / (self.spectrum**2 + tau))


def _eigen(V: Tensor) -> tuple[Tensor, Tensor]:
    """lam, Q with V'V = Q diag(lam^2) Q'; V = Q diag(lam) Q' if V is symmetric."""
    if V.shape[0] == V.shape[1] and torch.equal(V, V.mT):
        lam, Q = torch.linalg.eigh(V)  # of V itself: squares would lose half of the digits
        return lam, Q
    squares, Q = torch.linalg.eigh(V.mT @ V)
    return squares.clamp_min(0).sqrt(), Q


# --- convolutions ---------------------------------------------------------------------------------


def toeplitz(kernel: Tensor, n: int, border: str = "black", stride: int = 1) -> Tensor:
    """Every stride-th row of the matrix K with K x = kernel * x, a convolution of n values.

    With border="black", zeros beyond x, K is (n, n). "unknown" leaves out the rows that need values
    beyond x.
    """
    centre = len(kernel) // 2
    offsets = torch.arange(n)[:, None] - torch.arange(n)[None, :] + centre
    inside = (offsets >= 0) & (offsets < len(kernel))
    K = torch.where(inside, kernel[offsets.clamp(0, len(kernel) - 1)], 0.0)
    return K[_rows(len(kernel), n, border, stride)]


def _rows(kernel_size: int, n: int, border: str, stride: int) -> slice:
    """Which of the n values of a convolution are measured."""
    if border != "unknown":
        return slice(0, n, stride)
    return slice(kernel_size - 1 - kernel_size // 2, n - kernel_size // 2, stride)


def scene_size(measured: tuple[int, int], kernel_shape: tuple[int, int],
               border: str = "unknown") -> tuple[int, int]:
    """(H, W) of the scene that a picture of (h, w) pixels shows, for a kernel of that shape."""
    if border != "unknown":
        return tuple(measured)
    return tuple(n + k - 1 for n, k in zip(measured, kernel_shape, strict=True))


class Convolution(LinearOperator):
    """A x = k * x on each channel of images (B, C, H, W), true convolution with any kernel k.

    The centre of a kernel of n rows is its row n // 2, as in SciPy. A kernel that is an outer
    product is `Separable`. Any other is applied by FFT, and `solve_normal` uses conjugate
    gradients with a circulant preconditioner (Chan 1988), inexact near the border alone.

    Args:
        image_size: of the scene, (H, W) or one side, in pixels.
        kernel: (kh, kw), a tensor or array, of sum 1; a filter may have a smaller sum, such as 0.
        border: "unknown", which measures (H - kh + 1, W - kw + 1); "black" or "periodic", (H, W).
        stride: every stride-th row and column of these is measured.

    Raises:
        UserError: for an invalid kernel, or one larger than the scene; for another border; from
            A(x) and adjoint(d), for another height or width.

    >>> import jfbnb, torch
    >>> A = jfbnb.Convolution((20, 30), jfbnb.disk(2))
    >>> A(torch.ones(1, 3, 20, 30)).shape
    torch.Size([1, 3, 16, 26])
    """

    def __init__(self, image_size: int | tuple[int, int], kernel: Tensor | np.ndarray,
                 border: str = "unknown", stride: int = 1):
        super().__init__()
        kernel = torch.as_tensor(kernel, dtype=torch.float64, device="cpu")
        if border not in BORDERS:
            raise UserError(f"border {border!r}: choose {', '.join(BORDERS)}")
        if kernel.dim() != 2 or not kernel.numel():
            raise UserError(f"a kernel of shape {tuple(kernel.shape)}: give one with rows and "
                            "columns")
        if not (kernel.isfinite().all() and kernel.any()):
            raise UserError("a kernel of zeros, or with values that are not finite: check it")
        if kernel.sum() > 1.5:  # a file's integers; an image in [0, 1] would leave it
            raise UserError(f"a kernel of sum {kernel.sum():.4g}: give kernel / kernel.sum()")
        self.image_size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
        (H, W), (kh, kw) = self.image_size, kernel.shape
        if kh > H or kw > W:
            raise UserError(f"an image of {W} x {H} pixels is smaller than the {kw} x {kh} blur "
                            "kernel: use a larger image or a smaller kernel")
        self.border, self.stride = border, stride
        self.rows, self.columns = _rows(kh, H, border, stride), _rows(kw, W, border, stride)
        self.measured_size = len(range(H)[self.rows]), len(range(W)[self.columns])
        periodic = border == "periodic"
        if not periodic and (factors := _factors(kernel)):
            self.factors = Separable(*(toeplitz(k, n, border, stride)
                                       for k, n in zip(factors, (H, W), strict=True)))
            return
        self.factors = None
        # Room for the whole convolution. An unknown border needs less, but with this room the
        # preconditioner is better: conjugate gradients take half the iterations.
        self.grid = (H, W) if periodic else (_fast_length(H + kh - 1), _fast_length(W + kw - 1))
        on_grid = torch.zeros(self.grid, dtype=torch.float64)
        on_grid[:kh, :kw] = kernel
        on_grid = on_grid.roll((-(kh // 2), -(kw // 2)), (0, 1))
        # As pairs of real numbers: module.to(dtype) makes a complex tensor real.
        self.register_buffer("transfer", torch.view_as_real(torch.fft.rfft2(on_grid)))

    def extra_repr(self) -> str:
        H, W = self.image_size
        return f"{H} x {W}, border {self.border}" + f", stride {self.stride}" * (self.stride > 1)

    def _circulant(self, x: Tensor, response: Tensor) -> Tensor:
        """Pad x with zeros, multiply it by a response on the grid's frequencies, and crop."""
        H, W = self.image_size
        response = response.to(_complex(x.dtype) if response.is_complex() else x.dtype)
        return torch.fft.irfft2(torch.fft.rfft2(x, self.grid) * response, self.grid)[..., :H, :W]

    def forward(self, x: Tensor) -> Tensor:
        _require_size(x, self.image_size)
        if self.factors:
            return self.factors(x)
        transfer = torch.view_as_complex(self.transfer)
        return self._circulant(x, transfer)[..., self.rows, self.columns]

    def adjoint(self, d: Tensor) -> Tensor:
        _require_size(d, self.measured_size, "a measurement")
        if self.factors:
            return self.factors.adjoint(d)
        x = d.new_zeros(*d.shape[:-2], *self.image_size)
        x[..., self.rows, self.columns] = d
        return self._circulant(x, torch.view_as_complex(self.transfer).conj())

    def visible(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self._window()
        return x[..., max(top, 0):bottom, max(left, 0):right]

    def guess(self, d: Tensor) -> Tensor:
        """d, enlarged by `stride`, and continued beyond the border by its outermost values."""
        _require_size(d, self.measured_size, "a measurement")
        for dim, ((first, end), n) in enumerate(zip(self._window(), self.image_size,
                                                    strict=True), -2):
            at = (torch.arange(n, device=d.device) - first).clamp(0, end - first - 1)
            d = d.index_select(dim, at // self.stride)
        return d

    def _window(self) -> list[tuple[int, int]]:
        """For rows and for columns: the first that the picture shows, and the first after it.

        A pixel is `stride` wide around its sample, so the outer ones may reach beyond the scene.
        """
        starts = [where.start - (self.stride - 1) // 2 for where in (self.rows, self.columns)]
        return [(first, min(first + m * self.stride, n)) for first, m, n in
                zip(starts, self.measured_size, self.image_size, strict=True)]

    def inverse(self, d: Tensor) -> Tensor:
        return self.factors.inverse(d) if self.factors else super().inverse(d)

    def solve_normal(self, r: Tensor, tau: float | Tensor, start: Tensor | None = None) -> Tensor:
        _require_size(r, self.image_size)
        if self.factors:
            return self.factors.solve_normal(r, tau)
        if self.border == "periodic" and self.stride == 1:
            return self.precondition(r, tau)  # the inverse itself
        return super().solve_normal(r, tau, start)

    def precondition(self, r: Tensor, tau: float | Tensor) -> Tensor:
        if self.factors:
            return r
        # One of stride^2 pixels is measured, so A'A has about 1 / stride^2 of the energy.
        power = self.transfer.square().sum(-1) / self.stride**2
        return self._circulant(r, 1 / (power + tau))


def _fast_length(n: int) -> int:
    """The smallest length >= n without a prime factor over 7: FFTs of other lengths are slow."""
    while pow(210, 64, n):
        n += 1
    return n


def _factors(kernel: Tensor) -> tuple[Tensor, Tensor] | None:
    """(a, b) with kernel = a b', up to float32's rounding; None if there is none, or it sums to 0.
    """
    a, b = kernel.sum(1), kernel.sum(0) / kernel.sum()
    outer = torch.outer(a, b)
    return (a, b) if (outer - kernel).abs().sum() <= 1e-7 * kernel.abs().sum() else None


class Blur(Convolution):
    """The Gaussian blur A of Eq. 1 on images (B, C, H, W).

    With the paper's black border A X = K_h X K_w' with K_h and K_w symmetric, so A = A'.

    Args:
        image_size: of the scene, (H, W) or one side, in pixels.
        kernel_size, kernel_std: the Gaussian's support and standard deviation, in pixels.
        border: "black" or "unknown", as in `Convolution`.

    Raises:
        UserError: if the kernel is invalid or larger than the image.

    >>> import jfbnb
    >>> jfbnb.Blur(16, kernel_size=5, kernel_std=1.0).spectrum.shape
    torch.Size([16, 16])
    """

    def __init__(self, image_size: int | tuple[int, int], kernel_size: int, kernel_std: float,
                 border: str = "black"):
        kernel = gaussian_kernel(kernel_size, kernel_std)
        super().__init__(image_size, torch.outer(kernel, kernel), border)
        self.kernel_size, self.kernel_std = kernel_size, kernel_std

    def extra_repr(self) -> str:
        height, width = self.image_size
        return (f"{height} x {width}, kernel {self.kernel_size}, std {self.kernel_std:.6g}"
                + f", border {self.border}" * (self.border != "black"))

    @property
    def K_h(self) -> Tensor:
        """The factor that blurs columns, (H, H) with a black border."""
        return self.factors.V_h

    @property
    def K_w(self) -> Tensor:
        """The factor that blurs rows, (W, W) with a black border."""
        return self.factors.V_w

    @property
    def spectrum(self) -> Tensor:
        """All H x W eigenvalues of A, as products of those of its factors; float64."""
        return self.factors.spectrum

    @property
    def cond(self) -> float:
        """The condition number of A, largest over smallest singular value."""
        singular_values = self.spectrum.abs()
        return (singular_values.max() / singular_values.min()).item()


class Downsampling(Convolution):
    """Convolve, then keep every factor-th row and column.

    Args:
        image_size: of the sharp image, as in `Convolution`.
        kernel: of the convolution; by default each pixel is the mean of factor x factor.

    Raises:
        UserError: for a factor below 1, and as `Convolution`.

    >>> import jfbnb, torch
    >>> jfbnb.Downsampling(16, factor=2)(torch.ones(1, 3, 16, 16)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(self, image_size: int | tuple[int, int], factor: int,
                 kernel: Tensor | np.ndarray | None = None, border: str = "unknown"):
        if factor < 1:
            raise UserError(f"factor {factor}: give a positive number of pixels")
        box = torch.full((factor, factor), 1 / factor**2, dtype=torch.float64)
        super().__init__(image_size, box if kernel is None else kernel, border, factor)


# --- masks ----------------------------------------------------------------------------------------


def _checked(mask: Tensor | np.ndarray) -> Tensor:
    mask = torch.as_tensor(mask, dtype=torch.float64)
    if not (((mask == 0) | (mask == 1)).all() and mask.any()):
        raise UserError("a mask needs values 0 and 1, and at least one 1: check it")
    return mask


class Inpainting(LinearOperator):
    """A x = mask x on images (B, C, H, W): a pixel is known where the mask is 1.

    Args:
        mask: (H, W) or (C, H, W), of 0 and 1.

    Raises:
        UserError: for a mask of zeros, or of other values; from A(x), for another size.

    >>> import jfbnb, torch
    >>> jfbnb.Inpainting(torch.eye(2))(torch.full((1, 1, 2, 2), 0.5))
    tensor([[[[0.5000, 0.0000],
              [0.0000, 0.5000]]]])
    """

    def __init__(self, mask: Tensor | np.ndarray):
        super().__init__()
        self.register_buffer("mask", _checked(mask))

    def forward(self, x: Tensor) -> Tensor:
        _require_size(x, self.mask.shape)
        return self.mask.to(x.dtype) * x

    def adjoint(self, d: Tensor) -> Tensor:
        return self(d)

    def guess(self, d: Tensor) -> Tensor:
        """The known pixels, continued into the holes by the mean of the neighbours with a value.

        A channel without any known pixel is the mean of the others.
        """
        _require_size(d, self.mask.shape, "a measurement")
        known = self.mask.to(d.dtype).expand_as(d)
        x = known * d
        missing = ~known.any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)  # whole channels
        known = torch.where(missing, 1, known)
        while not known.all():
            near = avg_pool2d(known, 3, 1, 1)
            x = torch.where(known > 0, x, avg_pool2d(x, 3, 1, 1) / near.clamp_min(1e-6))
            known = (near > 0).to(d.dtype)
        others = x.sum(dim=1, keepdim=True) / (~missing).sum(dim=1, keepdim=True)
        return torch.where(missing, others, x)

    def solve_normal(self, r: Tensor, tau: float | Tensor, start: Tensor | None = None) -> Tensor:
        """(A'A + tau I)^-1 r, exactly, for tau > 0: A'A is diagonal."""
        return r / (self.mask.to(r.dtype) + tau)


class MRI(LinearOperator):
    """Single-coil Cartesian MRI of a real image: the samples of k-space in a mask.

    A x = mask F (e^(i phase) x), F the orthonormal Fourier transform, with the origin of the image
    and of k-space in the middle, as in fastMRI (Zbontar et al. 2018). (B, C, H, W) ->
    (B, C, H, W, 2), the real and the imaginary part.

    Args:
        mask: (H, W), of 0 and 1.
        phase: (H, W), in radians, of the image that was measured; 0 if not given.

    Raises:
        UserError: for a mask of zeros, or of other values, or a phase of another shape; from A(x)
            and adjoint(d), for another height or width.

    >>> import jfbnb, torch
    >>> jfbnb.MRI(torch.ones(8, 8))(torch.ones(1, 3, 8, 8)).shape
    torch.Size([1, 3, 8, 8, 2])
    """

    def __init__(self, mask: Tensor | np.ndarray, phase: Tensor | np.ndarray | None = None):
        super().__init__()
        self.register_buffer("mask", _checked(mask))
        if phase is not None:
            phase = torch.as_tensor(phase, dtype=torch.float64)
            if phase.shape != self.mask.shape or not phase.isfinite().all():
                raise UserError(f"a phase of shape {tuple(phase.shape)} for a mask of "
                                f"{tuple(self.mask.shape)}: give finite values of the same shape")
            phase = torch.stack([phase.cos(), phase.sin()], dim=-1)
        self.register_buffer("rotation", phase)  # real, as `Convolution`'s transfer

    def forward(self, x: Tensor) -> Tensor:
        _require_size(x, self.mask.shape)
        z = x
        if self.rotation is not None:
            z = x * torch.view_as_complex(self.rotation).to(_complex(x.dtype))
        k = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(z, (-2, -1)), norm="ortho"),
                               (-2, -1))
        return torch.view_as_real(self.mask.to(x.dtype) * k)

    def adjoint(self, d: Tensor) -> Tensor:
        _require_size(d, (*self.mask.shape, 2), "a k-space")
        k = self.mask.to(d.dtype) * torch.view_as_complex(d.contiguous())
        z = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(k, (-2, -1)), norm="ortho"),
                               (-2, -1))
        if self.rotation is not None:
            z = z * torch.view_as_complex(self.rotation).to(z.dtype).conj()
        return z.real

    def guess(self, d: Tensor) -> Tensor:
        """A' d: the image whose unmeasured samples of k-space are zero."""
        return self.adjoint(d)

    def solve_normal(self, r: Tensor, tau: float | Tensor, start: Tensor | None = None) -> Tensor:
        """(A'A + tau I)^-1 r, exactly without a phase: A'A is diagonal in k-space.

        The k-space of a real image at k and at -k is conjugate, so A'A multiplies both by the mean
        of the mask at the two.
        """
        if self.rotation is not None:
            return super().solve_normal(r, tau, start)
        m = torch.fft.ifftshift(self.mask).to(r.dtype)
        response = (m + m.flip((0, 1)).roll((1, 1), (0, 1))) / 2
        return torch.fft.ifft2(torch.fft.fft2(r) / (response + tau)).real


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64
