"""Kernels (PSFs) for `operators.Convolution`: float64 tensors (kh, kw) of sum 1."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from jfbnb.common import UserError

FINE = 15  # sample points along each side of a pixel, to measure which share a shape covers
MOST = 501  # the largest number of rows or columns of a kernel


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


def gaussian(std: float, size: int | None = None) -> Tensor:
    """A sampled Gaussian, (size, size), with a standard deviation in pixels.

    By default it extends to three standard deviations.

    Raises:
        UserError: for a std that is not positive or too large, or a size that is not odd.

    >>> import jfbnb
    >>> jfbnb.gaussian(1.0).shape
    torch.Size([7, 7])
    """
    if size is None:
        size = 2 * math.ceil(3 * _length("std", std)) + 1
    row = gaussian_kernel(size, std)
    return torch.outer(row, row)


def motion(length: float, angle: float) -> Tensor:
    """The blur of a camera that moved along a straight line at constant speed.

    The line is one pixel wide; each value is proportional to the share of the pixel that it covers.

    Args:
        length: in pixels, from 1 to 83.
        angle: in degrees, anticlockwise from the right in the displayed picture.

    Raises:
        UserError: for another length, or an angle that is not finite.

    >>> import jfbnb
    >>> jfbnb.motion(9, 0).shape
    torch.Size([1, 9])
    """
    if _length("motion length", length) < 1 or not math.isfinite(angle):
        raise UserError(f"motion of {length} pixels at {angle} degrees: give at least 1 pixel, as "
                        "in motion:9,30")
    turn = math.radians(angle)

    def line(x: Tensor, y: Tensor) -> Tensor:
        along = x * math.cos(turn) + y * math.sin(turn)
        across = y * math.cos(turn) - x * math.sin(turn)
        return (along.abs() <= length / 2) & (across.abs() <= 0.5)

    return _covered(line, length / 2 + 1)


def disk(radius: float) -> Tensor:
    """The blur of a lens out of focus: a disk, whose values are shares of covered pixels.

    Args:
        radius: in pixels, over 0, up to 83.

    Raises:
        UserError: for another radius.

    >>> import jfbnb
    >>> jfbnb.disk(3).shape
    torch.Size([7, 7])
    """
    _length("disk radius", radius)
    return _covered(lambda x, y: x**2 + y**2 <= radius**2, radius)


def _length(name: str, value: float) -> float:
    if not 0 < value <= MOST / 6:
        raise UserError(f"{name} {value}: choose a positive number of pixels, at most {MOST // 6}")
    return value


def _covered(inside: Callable[[Tensor, Tensor], Tensor], reach: float) -> Tensor:
    """The share of each pixel that a shape around the origin covers, divided by the sum of all."""
    half = math.ceil(reach - 0.5)
    n = (2 * half + 1) * FINE
    at = (torch.arange(n, dtype=torch.float64) - n // 2) / FINE  # exactly symmetric
    fine = inside(at[None, :], -at[:, None]).double()
    kernel = fine.view(2 * half + 1, FINE, 2 * half + 1, FINE).mean(dim=(1, 3))
    kernel = kernel[kernel.sum(1) > 0][:, kernel.sum(0) > 0]
    return kernel / kernel.sum()
