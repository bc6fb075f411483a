"""A kernel as a user gives it: a shape with its numbers, or a file."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError, printable
from jfbnb.core.kernels import MOST, disk, gaussian, motion
from jfbnb.photo.files import read_pictures


def read(path: Path) -> Tensor:
    """A kernel from a file: a table of numbers (.npy, or .txt with blanks or commas) or a picture.

    A picture's values are the kernel, in colour their mean. The kernel is divided by its sum.

    Raises:
        UserError: where there is no such file, or its values are no kernel's.
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
