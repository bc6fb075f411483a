"""Kernels (PSFs), made or read: float64 tensors (kh, kw) of sum 1, for `operators.Convolution`.

Angles are in degrees, anticlockwise from the right, as one sees the picture.
"""

import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError, printable
from jfbnb.images import read_pictures
from jfbnb.operators import gaussian_kernel

FINE = 15  # points on each side of a pixel, to measure how much of it a shape covers
MOST = 501  # rows and columns of a kernel


def gaussian(std: float, size: int | None = None) -> Tensor:
    """A sampled Gaussian with a standard deviation in pixels; by default it reaches three of them.

    Raises:
        UserError: for a std that is not positive and finite, or a size that is not odd.
    """
    if size is None:
        size = 2 * math.ceil(3 * _length("std", std)) + 1
    row = gaussian_kernel(size, std)
    return torch.outer(row, row)


def motion(length: float, angle: float) -> Tensor:
    """A camera that moved evenly along a straight line: its length in pixels, its angle in degrees.

    The line is one pixel wide. Each value is the share of a pixel that it covers.

    Raises:
        UserError: for a length below one pixel, or values that are not finite.
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
    """A lens out of focus: a disk, its radius in pixels. Values are shares of covered pixels.

    Raises:
        UserError: for a radius that is not positive and finite.
    """
    _length("disk radius", radius)
    return _covered(lambda x, y: x**2 + y**2 <= radius**2, radius)


def read(path: Path) -> Tensor:
    """A kernel from a file: a table of numbers (.npy, or .txt with blanks or commas) or a picture.

    Of a picture the values count, in colour their mean. What is read is divided by its sum.

    Raises:
        UserError: where there is no such kernel, or its values are no kernel's.
    """
    try:
        if path.suffix.lower() == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix.lower() in (".txt", ".csv"):
            text = path.read_text(encoding="utf-8-sig").replace(",", " ")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # NumPy's, of an empty file: that is said below
                values = np.loadtxt(text.splitlines(), ndmin=2)
        else:
            values = read_pictures(path)[0].pixels.mean(0).numpy()
        kernel = torch.from_numpy(np.asarray(values).astype(np.float64, casting="same_kind"))
    except UserError:
        raise
    except Exception as error:  # NumPy's readers raise all sorts
        raise UserError(f"cannot read the kernel {path}: {printable(str(error))}") from error
    if kernel.dim() != 2 or not kernel.numel() or max(kernel.shape) > MOST:
        raise UserError(f"the kernel {path} has the shape {tuple(kernel.shape)}: give rows and "
                        f"columns, at most {MOST} of them")
    if not kernel.isfinite().all():
        raise UserError(f"the kernel {path} has values that are not finite: mend it")
    if not kernel.sum() > 1e-9 * kernel.abs().sum():
        raise UserError(f"the kernel {path} has the sum {kernel.sum().item():.3g}: a blur's kernel "
                        "has a positive one")
    return kernel / kernel.sum()


def parse(text: str) -> Tensor:
    """A kernel as the command takes it: gaussian:STD, motion:LENGTH,ANGLE, disk:RADIUS or a file.

    gaussian:STD,SIZE cuts the Gaussian off to SIZE x SIZE.

    Raises:
        UserError: for anything else, and as the functions above.
    """
    kind, colon, numbers = text.partition(":")
    if not colon or kind not in MAKERS:
        if not os.path.isfile(text):  # pathlib's raises OSError for a name that is too long
            raise UserError(f"kernel {text!r} is no file: give one, or {FORMS}")
        return read(Path(text))
    make, counts = MAKERS[kind]
    try:
        values = [float(number) for number in numbers.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise UserError(f"kernel {text!r}: write it as {FORMS}")
    return make(*values)


def _gaussian_of(std: float, size: float | None = None) -> Tensor:
    if size is not None and not (size.is_integer() and size <= MOST):
        raise UserError(f"kernel size {size:g}: choose an odd, positive number of pixels, at most "
                        f"{MOST}")
    return gaussian(std, None if size is None else int(size))


FORMS = "gaussian:STD, gaussian:STD,SIZE, motion:LENGTH,ANGLE or disk:RADIUS, in pixels and degrees"
MAKERS = {"gaussian": (_gaussian_of, (1, 2)), "motion": (motion, (2,)), "disk": (disk, (1,))}


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
