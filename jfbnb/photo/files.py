"""A user's picture, in and out, without losing anything of it.

A `Picture` has the pixels of any format on one scale, and with them all that it takes to write
others in their place. The formats themselves are in `formats` and `tiff`.
"""

import io
import logging
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable
from jfbnb.photo import formats, tiff
from jfbnb.photo.formats import Frame, Metadata

# They log damaged metadata; a program that wants to know of it can still add a handler.
for reader in ("tifffile", "imagecodecs"):
    logging.getLogger(reader).addHandler(logging.NullHandler())


@dataclass
class Picture(Metadata):
    """One picture, or one page of a stack, with its `Metadata`.

    Attributes:
        pixels: float32 (C, H, W), C 1 or 3, upright, from 0 for black to 1 for white. Floats may
            go beyond, and so may integers where the user tells a range.
        dtype: of the numbers in the file: uint8, uint16, int32, float32, ...
        scale: the numbers that are black and white.
        limits: the smallest and the largest number to write; None for floats.
        note: one line if something was decided for the user, else "".
        alpha: (H, W), upright, as in the file, or None.
        pages: how many the file had.
    """

    pixels: Tensor
    dtype: np.dtype
    scale: tuple[float, float]
    limits: tuple[float, float] | None
    note: str = ""
    alpha: np.ndarray | None = None
    pages: int = 1

    @property
    def suffix(self) -> str:
        """Of the file to write: .png for 8 and 16 bits, .tif for other numbers and for stacks."""
        return ".png" if self.pages == 1 and self.fits_png else ".tif"

    @property
    def fits_png(self) -> bool:
        """Whether a PNG can hold it: libpng ends at a million pixels on a side."""
        return (self.dtype in (np.uint8, np.uint16) and self.alpha_kind == 2
                and max(self.pixels.shape) <= 10**6)

    def with_pixels(self, pixels: Tensor) -> "Picture":
        """The same picture with other pixels, (C, H', W') for any H' and W'.

        Alpha is cut, or its border repeated, on all sides alike.
        """
        if pixels.dim() != 3 or len(pixels) != len(self.pixels):
            raise ValueError(f"pixels {tuple(pixels.shape)} in place of {tuple(self.pixels.shape)}")
        alpha, exif = self.alpha, self.exif
        if pixels.shape != self.pixels.shape:
            exif = tiff.without_size(exif)
            if alpha is not None:
                alpha = alpha[np.ix_(*((np.arange(n) + int((m - n) / 2)).clip(0, m - 1) for n, m in
                                       zip(pixels.shape[1:], alpha.shape, strict=True)))]
        return replace(self, pixels=pixels.detach().float().cpu(), alpha=alpha, exif=exif)


def read_pictures(
    source: str | Path | io.BytesIO,
    value_range: tuple[float, float] | None = None,
) -> list[Picture]:
    """Every page of a TIFF, or the one picture of another file; of an animation the first.

    8 bits are divided by 255. Wider integers seldom fill their type: they are divided by the
    smallest of 2^8 - 1, 2^10 - 1, 2^12 - 1, ... that holds the largest of all pages. Floats stay
    as they are if they about fit in [0, 1], and are divided by a power of two if not. `note` tells.
    float32 has 24 bits: of larger integers the last ones are rounded off.

    Args:
        source: a file, whatever its name ends in, or the content of one.
        value_range: the numbers to take for black and white instead.

    Raises:
        UserError: if it is no readable picture, holds NaN or infinity, has over 2^28 pixels to a
            page, or channels that are neither grey, RGB nor alpha; and for an empty range.
    """
    if value_range is not None and not (
            np.isfinite(value_range).all() and value_range[0] < value_range[1]):
        raise UserError(f"range {value_range[0]:g},{value_range[1]:g}: give two numbers, the lower "
                        "one first, e.g. 0,4095")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
            content = _read(source)
            return _to_pictures(tiff.read(content) if content[:4] in tiff.MAGIC
                                else [formats.read(content)], value_range)
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise all sorts
        reason = ("it is none of the known formats: JPEG, PNG, TIFF, WebP, BMP, GIF, PPM"
                  if isinstance(error, UnidentifiedImageError)
                  else getattr(error, "strerror", None) or str(error) or type(error).__name__)
        name = "" if isinstance(source, io.BytesIO) else f" {printable(str(source))}"
        raise UserError(f"cannot read the image{name}: "
                        f"{printable(' '.join(reason.split()))}") from error


def _read(source: str | Path | io.BytesIO) -> bytes:
    if isinstance(source, io.BytesIO):
        content = source.getvalue()
    elif Path(source).exists() and not Path(source).is_file():
        raise ValueError("it is no file")  # a pipe would be waited for
    else:
        content = Path(source).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    return content


def _to_pictures(frames: list[Frame], value_range: tuple[float, float] | None) -> list[Picture]:
    """Pages with numbers of one type share a scale, and the first of them has the note on it."""
    extremes = {}
    for frame in frames:
        if frame.samples.dtype.kind == "f":
            frame.samples = frame.samples.astype(np.float32, copy=False)
        values = frame.samples[..., :frame.colours]
        low, high = values.min().item(), values.max().item()
        if not np.isfinite(low + high):
            raise ValueError("it holds values that are no finite numbers: replace them")
        if values.dtype.kind != "f" and max(-low, high) > 2**53:
            raise ValueError("it holds integers over 2^53: scale them down")
        extremes.setdefault(values.dtype, []).extend((low, high))
    scales = {dtype: _choose_scale(dtype, min(found), max(found), value_range)
              for dtype, found in extremes.items()}
    pictures = []
    for frame in frames:
        dtype, colours = frame.samples.dtype, frame.colours
        scale, limits, note = scales[dtype]
        scales[dtype] = scale, limits, ""
        turn = frame.orientation
        samples = frame.samples[::-1 if turn in (3, 4, 6, 7) else 1,
                                ::-1 if turn in (2, 3, 7, 8) else 1]
        if 5 <= turn <= 8:
            samples = samples.swapaxes(0, 1)
            if frame.resolution:
                frame.resolution = (*frame.resolution[1::-1], frame.resolution[2])
        alpha = samples[..., -1].copy() if samples.shape[2] > colours else None
        pictures.append(Picture(_pixels(samples[..., :colours], scale), dtype, scale, limits,
                                "; ".join(filter(None, [*frame.notes, note])), alpha,
                                len(frames), **_metadata(frame)))
        frame.samples = None  # so that all pages are never there twice
    return pictures


def _choose_scale(
    dtype: np.dtype, low: float, high: float, value_range: tuple[float, float] | None
) -> tuple[tuple[float, float], tuple[float, float] | None, str]:
    """(scale, limits, note) for numbers of a type from `low` to `high`."""
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "ui" else None
    if value_range is not None:
        return value_range, limits, ""
    otherwise = "if that is wrong, give the range LOW,HIGH"
    if limits is None:
        if (low >= -0.5 and 0.05 < high <= 1.5) or low == high == 0:
            return (0.0, 1.0), None, ""
        black = low if low < -0.05 * abs(high) else 0.0
        # A power of two leaves a float's digits as they are.
        white = black + 2.0 ** np.ceil(np.log2(high - black or 1.0)).item()
        return (black, white), None, (f"floats from {low:.4g} to {high:.4g}: {black:.4g} is taken "
                                      f"for black and {white:.4g} for white; {otherwise}")
    if low < 0:
        return (low, max(high, low + 1)), limits, (f"integers from {low} to {high}: these are "
                                                   f"taken for black and white; {otherwise}")
    bits = next(n for n in range(8, 66, 2) if high < 2**n)
    white = min(2**bits - 1, limits[1])
    if high == 0 or white == limits[1]:
        return (0, limits[1]), limits, ""
    return (0, white), (0, white), (f"{bits} bits in {8 * dtype.itemsize}: {white} is taken for "
                                    f"white; {otherwise}")


def _pixels(samples: np.ndarray, scale: tuple[float, float]) -> Tensor:
    """Numbers (H, W, C) of any type as pixels (C, H, W)."""
    low, high = scale
    pixels = np.empty((samples.shape[2], *samples.shape[:2]), np.float32)
    for top in range(0, len(samples), 64):  # float64 of a whole picture is twice its size
        rows = slice(top, top + 64)
        values = (samples[rows].astype(np.float64) - low) / (high - low)
        pixels[:, rows] = np.moveaxis(values, 2, 0)
    return torch.from_numpy(pixels)


def _to_frame(picture: Picture) -> Frame:
    """What is to be written."""
    low, high = picture.scale
    pixels = picture.pixels.numpy()
    colours, height, width = pixels.shape
    samples = np.empty((height, width, colours + (picture.alpha is not None)), picture.dtype)
    for top in range(0, height, 64):
        rows = slice(top, top + 64)
        values = pixels[:, rows].astype(np.float64) * (high - low) + low
        if picture.limits is not None:
            values = np.rint(values).clip(*picture.limits)
        samples[rows, :, :colours] = np.moveaxis(values, 0, 2)
    if picture.alpha is not None:
        samples[..., -1] = picture.alpha
    return Frame(samples, **_metadata(picture))


def _metadata(of: Metadata) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in fields(Metadata)}


def write_pictures(path: str | Path, pictures: list[Picture]) -> None:
    """Write one picture as a PNG, or any as the pages of a TIFF, by the suffix; all or nothing.

    Integers are rounded, and cut off at `Picture.limits`; floats are written as they are.

    Raises:
        UserError: for another suffix, and where a PNG cannot hold the pictures.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".png", ".tif", ".tiff"):
        raise UserError(f"cannot write {path}: give it a name that ends in .png or .tif")
    if kind == ".png" and not (len(pictures) == 1 and pictures[0].fits_png):
        raise UserError(f"cannot write {path}: a PNG holds one page of 8 or 16 bits, with no "
                        "channel but alpha, up to a million pixels on a side; give it a name that "
                        "ends in .tif")
    if sum(p.dtype.itemsize * (p.pixels.numel() + (0 if p.alpha is None else p.alpha.size))
           for p in pictures) > 2**32 - 2**26:
        raise UserError(f"cannot write {path}: over 4 GiB, which no TIFF holds; split the stack")
    with atomic_path(path) as temporary:
        if kind == ".png":
            temporary.write_bytes(formats.make_png(_to_frame(pictures[0])))
        else:
            tiff.write(temporary, map(_to_frame, pictures), [p.exif for p in pictures])
