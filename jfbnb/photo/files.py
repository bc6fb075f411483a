"""A user's picture in and out, with what else is in its file.

A `Picture` has the pixels of any format on one scale, and all that it takes to write others in
their place, as a PNG or TIFF.
"""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import UnidentifiedImageError
from PIL.PngImagePlugin import putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable
from jfbnb.photo.formats import EXIF, GPS, UNASSOCIATED, Metadata, Page, decode

MAX_TIFF = 2**32 - 2**26  # bytes of pixels; what is larger becomes a BigTIFF


@dataclass
class Picture:
    """One picture, or one page of a stack.

    Attributes:
        pixels: float32 (C, H, W), C 1 or 3, upright, from 0 for black to 1 for white. Floats may
            go beyond, and so may integers where the user gives a range.
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
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def suffix(self) -> str:
        """Of the file to write: .png for 8 and 16 bits, .tif for other numbers and for stacks."""
        fits = (self.pages == 1 and self.dtype in (np.uint8, np.uint16)
                and self.metadata.alpha_kind == UNASSOCIATED
                and max(self.pixels.shape) <= 10**6)  # libpng's limit
        return ".png" if fits else ".tif"

    def with_pixels(self, pixels: Tensor) -> "Picture":
        """The same picture with other pixels, (C, H', W') for any H' and W'.

        Alpha is cut, or its border repeated, on all sides alike.
        """
        if pixels.dim() != 3 or len(pixels) != len(self.pixels):
            raise ValueError(f"pixels {tuple(pixels.shape)} in place of {tuple(self.pixels.shape)}")
        alpha = self.alpha
        if alpha is not None:
            alpha = alpha[np.ix_(*((np.arange(n) + int((m - n) / 2)).clip(0, m - 1) for n, m in
                                   zip(pixels.shape[1:], alpha.shape, strict=True)))]
        return replace(self, pixels=pixels.detach().float().cpu(), alpha=alpha)


def read_pictures(
    source: str | Path | io.BytesIO,
    value_range: tuple[float, float] | None = None,
) -> list[Picture]:
    """Every page of a TIFF, or the one picture of another file; of an animation the first.

    8 bits are divided by 255. Wider integers seldom fill their type: they are divided by the
    smallest of 2^8 - 1, 2^10 - 1, 2^12 - 1, ... that holds the largest of all pages. Floats stay
    as they are if they about fit in [0, 1], and are divided by a power of two if not. `note` says
    so. float32 has 24 bits: of larger integers the last ones are rounded off.

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
            return _to_pictures(decode(_read(source)), value_range)
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise all sorts
        reason = ("it is none of the known formats: JPEG, PNG, TIFF, HEIC, AVIF, WebP, BMP, GIF, "
                  "PPM" if isinstance(error, UnidentifiedImageError)
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


# --- from numbers to pixels -------------------------------------------------------------------


def _to_pictures(pages: list[Page], value_range: tuple[float, float] | None) -> list[Picture]:
    """Pages with numbers of one type share a scale, and the first of them has the note on it."""
    extremes = {}
    for page in pages:
        if page.samples.dtype.kind == "f":
            page.samples = page.samples.astype(np.float32, copy=False)
        values = page.samples[..., :page.colours]
        low, high = values.min().item(), values.max().item()
        if not np.isfinite(low + high):
            raise ValueError("it holds values that are no finite numbers: replace them")
        if values.dtype.kind != "f" and max(-low, high) > 2**53:
            raise ValueError("it holds integers over 2^53: scale them down")
        extremes.setdefault(values.dtype, []).extend((low, high))
    scales = {dtype: _choose_scale(dtype, min(found), max(found), value_range)
              for dtype, found in extremes.items()}
    pictures = []
    for page in pages:
        samples, dtype, colours = page.samples, page.samples.dtype, page.colours
        (low, high), limits, note = scales[dtype]
        scales[dtype] = (low, high), limits, ""
        alpha = samples[..., -1].copy() if samples.shape[2] > colours else None
        pixels = np.empty((colours, *samples.shape[:2]), np.float32)
        for c in range(colours):  # one at a time: float64 of all is twice the size of the pixels
            pixels[c] = (samples[..., c].astype(np.float64) - low) / (high - low)
        pictures.append(Picture(torch.from_numpy(pixels), dtype, (low, high), limits,
                                "; ".join(filter(None, [*page.notes, note])), alpha,
                                len(pages), page.metadata))
        page.samples = None  # so that all pages are never there twice
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


# --- out --------------------------------------------------------------------------------------


def write_pictures(path: str | Path, pictures: list[Picture]) -> None:
    """Write one picture as a PNG, or any as the pages of a TIFF, by the suffix; all or nothing.

    Integers are rounded, and cut off at `Picture.limits`; floats are written as they are.

    Raises:
        UserError: for another suffix, and for .png where `Picture.suffix` is not.
    """
    path, suffix = Path(path), ".tif" if len(pictures) > 1 else pictures[0].suffix
    kind = path.suffix.lower()
    if kind not in (suffix, ".tif", ".tiff"):
        raise UserError(f"cannot write {path}: give it a name that ends in {suffix}")
    with atomic_path(path) as temporary:
        if kind == ".png":
            _write_png(temporary, pictures[0])
        else:
            _write_tiff(temporary, pictures)


def _to_samples(picture: Picture) -> np.ndarray:
    """The numbers to write, (H, W) or (H, W, C)."""
    (low, high), (colours, height, width) = picture.scale, picture.pixels.shape
    samples = np.empty((height, width, colours + (picture.alpha is not None)), picture.dtype)
    for c, channel in enumerate(picture.pixels.numpy()):
        values = channel.astype(np.float64) * (high - low) + low
        samples[..., c] = values if picture.limits is None else (
            np.rint(values).clip(*picture.limits))
    if picture.alpha is not None:
        samples[..., -1] = picture.alpha
    return samples if samples.shape[2] > 1 else samples[..., 0]


def _write_png(path: Path, picture: Picture) -> None:
    # Of the settings tried these are the fastest, and within a few per cent of the smallest.
    content = imagecodecs.png_encode(_to_samples(picture), level=1, strategy=3, filter=128)
    metadata, header = picture.metadata, 33  # bytes of signature and IHDR
    with open(path, "wb") as file:
        file.write(content[:header])
        if metadata.icc:
            putchunk(file, b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc))
        if metadata.resolution and metadata.resolution[2] > 1:
            *sides, unit = metadata.resolution
            per_metre = [round(side * 100 / (2.54 if unit == 2 else 1)) for side in sides]
            putchunk(file, b"pHYs", struct.pack(">IIB", *per_metre, 1))
        if metadata.exif:
            putchunk(file, b"eXIf", metadata.exif.tobytes().removeprefix(b"Exif\0\0"))
        file.write(content[header:])


def _write_tiff(path: Path, pictures: list[Picture]) -> None:
    size = sum(p.dtype.itemsize * p.pixels[0].numel() * (len(p.pixels) + 1) for p in pictures)
    big = size > MAX_TIFF
    with tifffile.TiffWriter(path, bigtiff=big) as tif:
        for picture in pictures:
            metadata = picture.metadata
            tags = [(code - 1, "Q" if big else "I", 1, 0, True) if code in (EXIF, GPS)
                    else (code, "s", 0, value, True) for code, value in metadata.exif.items()]
            *sides, unit = metadata.resolution or (1, 1, 1)
            tif.write(
                _to_samples(picture), metadata=None, software=False, planarconfig="contig",
                photometric="rgb" if len(picture.pixels) == 3 else "minisblack",
                extrasamples=None if picture.alpha is None else [metadata.alpha_kind],
                iccprofile=metadata.icc, resolution=sides, resolutionunit=unit, extratags=tags)
    _link_directories(path, pictures)


def _link_directories(path: Path, pictures: list[Picture]) -> None:
    """Append what the camera and its GPS wrote: tifffile does not, but has left room for it."""
    with tifffile.TiffFile(path, mode="r+") as tif:
        file = tif.filehandle
        file.seek(0)
        header = file.read(16 if tif.is_bigtiff else 8)
        for page, picture in zip(tif.pages, pictures, strict=True):
            for code in {EXIF, GPS} & set(picture.metadata.exif):
                directory = ImageFileDirectory_v2(header, group=code)
                directory.update(picture.metadata.exif[code])
                end = file.seek(0, os.SEEK_END)
                place = file.seek(end + end % 2)
                file.write(directory.tobytes(place))
                room = page.tags[code - 1].overwrite(place)
                file.seek(room.offset)
                file.write(struct.pack(tif.byteorder + "H", code))
