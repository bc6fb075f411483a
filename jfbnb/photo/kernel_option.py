"""Parse a kernel that a user gives: a shape with its numbers, or a file."""

import os
import warnings
from pathlib import Path

import numpy as np
import scipy.io
import torch
from PIL import Image
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable
from jfbnb.core.kernels import MOST, disk, gaussian, motion
from jfbnb.photo.files import read_pictures

WIDE = 9  # smaller kernels are not tested for a pedestal, or a centre in the corner


def read(path: Path) -> Tensor:
    """Read a kernel from a file, (kh, kw), divided by its sum.

    The file is .npy, .npz, .mat, a table (.txt, .csv, .tsv), or a picture, whose colours are
    averaged. Axes of length 1, a table's header and index, and a pedestal are removed, and a kernel
    centred in the corner is moved to the middle. A warning says so, and also if the kernel is not
    centred, and so shifts the picture.

    Raises:
        UserError: if there is no such file, or its values are not a kernel; for a stack, several
            arrays, black on white, and a kernel that is drawn in transparency.
    """
    notes = []
    try:
        kernel = np.asarray(_numbers(path, notes)).astype(np.float64, casting="same_kind")
    except UserError as error:
        raise UserError(f"{error}; a kernel may also be a .npy, .npz, .mat, .txt, .csv or .tsv"
                        ) from error
    except Exception as error:  # readers of damaged files raise all sorts
        raise UserError(f"cannot read the kernel {path}: "
                        f"{printable(' '.join(str(error).split()))}") from error
    if kernel.ndim > 2:
        kernel = kernel.squeeze()
    if not (kernel.ndim == 2 and kernel.size and max(kernel.shape) <= MOST
            and abs(kernel).max() < 1e300):
        raise UserError(f"the kernel {path} has the shape {kernel.shape}: give finite numbers in "
                        f"rows and columns, at most {MOST} of them, and one plane of a stack")
    kernel = _centred(_without_pedestal(kernel, path, notes), notes)
    if not kernel.sum() > 1e-9 * abs(kernel).sum():
        raise UserError(f"the kernel {path} has the sum {kernel.sum():.3g}: a blur's kernel has a "
                        "positive one")
    kernel = kernel / kernel.sum()
    down, right = ((kernel.sum(1 - axis) * (np.arange(n) - n // 2)).sum()
                   for axis, n in enumerate(kernel.shape))
    if max(abs(down), abs(right)) > 1:
        notes.append(f"its centre of mass is {down:+.1f} pixels down and {right:+.1f} to the right "
                     "of its middle, which shifts the picture")
    if notes:
        warnings.warn(f"kernel {path}: {'; '.join(notes)}", stacklevel=2)
    return torch.from_numpy(kernel)


def write(path: Path, kernel: Tensor) -> None:
    """Write a kernel (kh, kw), its largest weight white, as a PNG for `read`."""
    with atomic_path(path) as temporary:
        levels = (kernel / kernel.max() * 65535).round().numpy().astype(np.uint16)
        Image.fromarray(levels).save(temporary, "png")


def _numbers(path: Path, notes: list[str]) -> np.ndarray:
    """The numbers in the file."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix in (".npz", ".mat"):
        try:
            stored = (scipy.io.loadmat(path) if suffix == ".mat"
                      else np.load(path, allow_pickle=False))
        except NotImplementedError as error:
            raise ValueError("it is in MATLAB's format 7.3: save the kernel alone, by save -v7"
                             ) from error
        found = [array for name, array in stored.items()
                 if not name.startswith("__") and array.ndim > 1 and array.size > 1]
        if len(found) != 1:
            raise ValueError(f"it holds {len(found)} arrays of rows and columns: save only the "
                             "kernel")
        return found[0]
    if suffix in (".txt", ".csv", ".tsv"):
        return _table(path.read_text(encoding="utf-8-sig"), notes)
    pages = read_pictures(path, (0, 1))  # the numbers as they are
    if len(pages) > 1:
        raise ValueError(f"it is a stack of {len(pages)} planes: save the one in focus")
    pixels = pages[0].pixels.double()
    if pages[0].alpha is not None and pixels.min() == pixels.max():
        raise ValueError("it is drawn in transparency, on one colour: save it without alpha, in "
                         "white on black")
    notes += filter(None, [pages[0].note])
    return pixels.mean(0).numpy()


def _table(text: str, notes: list[str]) -> np.ndarray:
    """Numbers separated by semicolons, tabs, commas or spaces.

    With semicolons or tabs, commas are decimal points. A first row or column of words, or of
    0, 1, 2, ..., is left out.
    """
    mark = next((mark for mark in ";\t," if mark in text), None)
    if mark in (";", "\t") and "," in text:
        notes.append("its commas are read as decimal points")
        text = text.replace(",", ".")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an empty file
        values = np.genfromtxt(text.splitlines(), delimiter=mark, ndmin=2)
    if np.isnan(values[:, -1]).all():  # each line ends in a delimiter
        values = values[:, :-1]
    if len(values) > 1 and _labels(values[0]):
        notes.append("its first row is skipped as a header")
        values = values[1:]
    if values.shape[1] > 1 and _labels(values[:, 0]):
        notes.append("its first column is skipped as an index")
        values = values[:, 1:]
    return values


def _labels(values: np.ndarray) -> bool:
    """Whether these are words, or at least three of 0, 1, 2, ... or 1, 2, 3, ..."""
    counts = len(values) > 2 and values[0] in (0, 1) and (np.diff(values) == 1).all()
    return counts or np.isnan(values[0])


def _without_pedestal(kernel: np.ndarray, path: Path, notes: list[str]) -> np.ndarray:
    """Subtract the value of the kernel's border, if it is the same all around."""
    ring = np.concatenate([kernel[[0, -1]].ravel(), kernel[1:-1, [0, -1]].ravel()])
    level, low, high = np.median(ring), kernel.min(), kernel.max()
    if min(kernel.shape) < 3 or low == high or np.ptp(ring) > 0.02 * (high - low):
        return kernel
    if level > high - 0.1 * (high - low) and low >= 0:
        raise UserError(f"the kernel {path} looks like black on white: invert it")
    if min(kernel.shape) >= WIDE and 5 * np.ptp(ring) < level < high / 2:
        notes.append(f"its border, {level:.4g}, is subtracted as a pedestal")
        return kernel - level
    return kernel


def _centred(kernel: np.ndarray, notes: list[str]) -> np.ndarray:
    """Move the origin to the middle, if it seems to be in the corner, as for an FFT."""
    y, x = (np.arange(n) - n // 2 for n in kernel.shape)
    distance, moved = y[:, None]**2 + x**2, np.fft.fftshift(kernel)
    spread, after = ((abs(k) * distance).sum() for k in (kernel, moved))
    if min(kernel.shape) >= WIDE and after < spread / 4:
        notes.append("its centre is moved from the corner to the middle")
        return moved
    return kernel


def _size(text: str) -> int:
    if (size := int(text)) > MOST:
        raise ValueError
    return size


FORMS = "gaussian:STD, gaussian:STD,SIZE, motion:LENGTH,ANGLE or disk:RADIUS, in pixels and degrees"
SHAPES = {"gaussian": (gaussian, float, _size), "motion": (motion, float, float),
          "disk": (disk, float)}


def parse(text: str) -> Tensor:
    """Parse gaussian:STD, motion:LENGTH,ANGLE, disk:RADIUS or the name of a file.

    gaussian:STD,SIZE truncates the Gaussian to SIZE x SIZE.

    Raises:
        UserError: for anything else, and as in `read` and the functions in `kernels`.
    """
    kind, colon, numbers = text.partition(":")
    if not colon or kind not in SHAPES:
        if not os.path.isfile(text):  # pathlib's raises OSError for a name that is too long
            raise UserError(f"kernel {text!r}: there is no such file; give one, or {FORMS}")
        return read(Path(text))
    (make, *types), words = SHAPES[kind], numbers.split(",")
    try:
        return make(*(to(word) for to, word in zip(types[:len(words)], words, strict=True)))
    except (TypeError, ValueError) as error:  # too few, too many or no numbers
        raise UserError(f"kernel {text!r}: write it as {FORMS}, at most {MOST}") from error
