"""A kernel as a user gives it: a shape with its numbers, or a file."""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import scipy.io
import torch
from torch import Tensor

from jfbnb.common import UserError, printable
from jfbnb.core.kernels import MOST, disk, gaussian, motion
from jfbnb.photo.files import read_pictures

WIDE = 9  # rows and columns from which on a kernel's border may tell how it was stored


def read(path: Path) -> Tensor:
    """A kernel from a file, (kh, kw), divided by its sum.

    The numbers are taken as they are stored: .npy, .npz, .mat, a table (.txt, .csv, .tsv), or a
    picture, in colour their mean. Axes of length 1, a table's header and index, and a pedestal are
    left out, and a kernel centred in the corner is moved to the middle; a warning says so. It also
    says if the kernel is off its middle, and so shifts the picture.

    Raises:
        UserError: where there is no such file, or its values are no kernel's; for a stack, several
            arrays, black on white, and a kernel that is drawn in transparency.
    """
    notes = []
    try:
        values = _numbers(path, notes)
        kernel = np.asarray(values).astype(np.float64, casting="same_kind")
    except Exception as error:  # readers of damaged files raise all sorts
        raise UserError(f"cannot read the kernel {path}: "
                        f"{printable(' '.join(str(error).split()))}") from error
    if kernel.ndim > 2:
        kernel = kernel.squeeze()
    if kernel.ndim != 2 or not kernel.size or max(kernel.shape) > MOST:
        raise UserError(f"the kernel {path} has the shape {kernel.shape}: give rows and columns, "
                        f"at most {MOST} of them, and one plane of a stack")
    if not (np.isfinite(kernel).all() and abs(kernel).max() < 1e300):
        raise UserError(f"the kernel {path} has values that are not finite, or too large: mend it")
    kernel = _centred(_without_pedestal(kernel, path, notes), notes)
    if not kernel.sum() > 1e-9 * abs(kernel).sum():
        raise UserError(f"the kernel {path} has the sum {kernel.sum():.3g}: a blur's kernel has a "
                        "positive one")
    kernel = kernel / kernel.sum()
    down, right = _centroid(kernel)
    if max(abs(down), abs(right)) > 1:
        notes.append(f"its centre of mass is {down:+.1f} pixels down and {right:+.1f} to the right "
                     "of its middle, and the picture is shifted so")
    if notes:
        warnings.warn(f"kernel {path}: {'; '.join(notes)}", stacklevel=2)
    return torch.from_numpy(kernel)


def _numbers(path: Path, notes: list[str]) -> np.ndarray:
    """What the file holds, as it is stored."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            return _only_array(dict(stored))
    if suffix == ".mat":
        if b"MATLAB 7.3" in path.read_bytes()[:128]:  # which is HDF5, with columns first
            import h5py  # not among what the package needs

            with h5py.File(path) as stored:
                return _only_array({name: data[()].T for name, data in stored.items()
                                    if isinstance(data, h5py.Dataset)})
        return _only_array({name: data for name, data in scipy.io.loadmat(path).items()
                            if not name.startswith("__")})
    if suffix in (".txt", ".csv", ".tsv"):
        return _table(path.read_text(encoding="utf-8-sig"), notes)
    pages = read_pictures(path, (0, 1))  # the numbers as they are
    if len(pages) > 1:
        raise ValueError(f"it is a stack of {len(pages)} planes: save the one in focus")
    pixels = pages[0].pixels.double()
    if pages[0].alpha is not None and pixels.min() == pixels.max():
        raise ValueError("it is drawn in transparency, on one colour: save it without alpha, white "
                         "on black")
    notes += filter(None, [pages[0].note])
    return pixels.mean(0).numpy()


def _only_array(arrays: dict[str, np.ndarray]) -> np.ndarray:
    found = {name: a for name, a in arrays.items() if a.ndim > 1 and a.size > 1}
    if len(found) != 1:
        listed = ", ".join(f"{name} {a.shape}" for name, a in arrays.items())
        raise ValueError(f"it holds {listed or 'no array'}: save the kernel alone")
    return next(iter(found.values()))


def _table(text: str, notes: list[str]) -> np.ndarray:
    """Numbers in rows, with any usual delimiter, decimal commas, a header row, an index column."""
    lines = [line.split("#")[0].strip("\r\n ") for line in text.splitlines()]
    lines = [line for line in lines if line.strip()]
    whole = "\n".join(lines)
    mark = next((m for m in ";\t" if m in whole), "")
    if not mark and "," in whole and not re.search(r"[^,\s][ ]+[^,\s]", whole):
        mark = ","
    rows = [[cell.strip().strip('"') for cell in (line.split(mark) if mark else line.split())]
            for line in lines]
    if mark in ("", ";", "\t") and "," in whole:
        notes.append("its commas are taken for decimal points")
        rows = [[cell.replace(",", ".") for cell in row] for row in rows]
    if rows and not rows[0][-1] and all(not row[-1] for row in rows):
        rows = [row[:-1] for row in rows]  # a delimiter at the end of each line
    count = len(rows[0]) if rows else 0
    if not rows or any(len(row) != count for row in rows):
        raise ValueError(f"its rows have {sorted({len(row) for row in rows})} numbers: give as "
                         "many in each")
    try:
        values = np.array([[float(cell or "nan") for cell in row] for row in rows[1:]])
        first = np.array([float(cell or "nan") for cell in rows[0]])
        values = np.vstack([first, values.reshape(-1, count)])
    except ValueError:
        if len(rows) < 2 or any(re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?", c) for c in rows[0]):
            raise
        notes.append("its first row is taken for a header")
        values = np.array([[float(cell) for cell in row] for row in rows[1:]])
    if len(values) > 1 and (np.isnan(values[0, 0]) or _counts(values[0])):
        notes.append("its first row is taken for a header")
        values = values[1:]
    if values.shape[1] > 1 and _counts(values[:, 0]):
        notes.append("its first column is taken for an index")
        values = values[:, 1:]
    if mark == "," and "." not in whole and count % 2 == 0 and values[:, 1::2].any() and not (
            values[:, ::2].any()):
        raise ValueError("it looks like decimal commas between commas: separate by semicolons")
    return values


def _counts(values: np.ndarray) -> bool:
    """True for 0, 1, 2, ..., or 1, 2, 3, ... of at least three."""
    return len(values) > 2 and values[0] in (0, 1) and (np.diff(values) == 1).all()


def _without_pedestal(kernel: np.ndarray, path: Path, notes: list[str]) -> np.ndarray:
    """Less the value of its border, if that is one and the same all around."""
    ring = np.concatenate([kernel[[0, -1]].ravel(), kernel[1:-1, [0, -1]].ravel()])
    level, low, high = np.median(ring), kernel.min(), kernel.max()
    if min(kernel.shape) < 3 or low == high or np.ptp(ring) > 0.02 * (high - low):
        return kernel
    if level > high - 0.1 * (high - low) and low >= 0:
        raise UserError(f"the kernel {path} looks like black on white: invert it")
    if min(kernel.shape) >= WIDE and 5 * np.ptp(ring) < level < high / 2:
        notes.append(f"its border, {level:.4g}, is taken for a pedestal and subtracted")
        return kernel - level
    return kernel


def _centroid(kernel: np.ndarray) -> tuple[float, float]:
    """Rows down and columns to the right of the middle, row n // 2, of the kernel's mass."""
    return tuple((kernel.sum(1 - axis) * (np.arange(n) - n // 2)).sum().item() / kernel.sum().item()
                 for axis, n in enumerate(kernel.shape))


def _centred(kernel: np.ndarray, notes: list[str]) -> np.ndarray:
    """With the origin in the middle, if it looks as if it were in the corner, as for an FFT."""
    y, x = (np.arange(n) - n // 2 for n in kernel.shape)
    distance, moved = y[:, None]**2 + x**2, np.fft.fftshift(kernel)
    spread, after = ((abs(k) * distance).sum() for k in (kernel, moved))
    if min(kernel.shape) >= WIDE and after < spread / 4:
        notes.append("its centre is in the corner, and moved to the middle")
        return moved
    return kernel


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
