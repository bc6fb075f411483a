"""Read and write a user's picture, with its metadata.

Pillow reads the usual formats, imagecodecs PNG of 16 bits, pillow-heif HEIC, tifffile TIFF. A
`Picture` has the pixels on one scale, and whatever is needed to write others in their place, as a
PNG or TIFF.
"""

import contextlib
import io
import logging
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import putchunk
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF")  # that Pillow may try
TIFF, PNG = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\x89PNG\r\n\x1a\n"
ORIENTATION, ICC, MAKE = 274, 34675, 271  # tags of TIFF and EXIF
UNASSOCIATED = 2  # TIFF's code for alpha that is not premultiplied

# Silence their logs of damaged metadata; a program that wants these can still add a handler.
for reader in ("tifffile", "imagecodecs"):
    logging.getLogger(reader).addHandler(logging.NullHandler())


@dataclass
class Picture:
    """One picture, or one page of a stack.

    Attributes:
        pixels: float32 (C, H, W), C 1 or 3, upright, from 0 for black to 1 for white. Floats may
            exceed that, and so may integers if the user gives a range.
        dtype: of the numbers to write: uint8 or uint16 as in the file, else float32.
        scale: the numbers for black and for white.
        limits: the smallest and the largest number to write; None for floats.
        note: one line on what was decided for the user, or "".
        alpha: (H, W), upright, as in the file, or None.
        pages: the number of pages in the file.
        icc: the colour profile.
        exif: of the upright picture, without a thumbnail; None for a TIFF.
    """

    pixels: Tensor
    dtype: np.dtype
    scale: tuple[float, float]
    limits: tuple[float, float] | None
    note: str = ""
    alpha: np.ndarray | None = None
    pages: int = 1
    icc: bytes | None = None
    exif: bytes | None = None

    @property
    def suffix(self) -> str:
        """The suffix of the file to write: .png for integers, .tif for floats and stacks."""
        return ".png" if self.pages == 1 and self.dtype.kind == "u" else ".tif"

    @property
    def gamma(self) -> str | None:
        """How it stores light: "srgb" if its EXIF names a camera's maker, else None."""
        exif = Image.Exif()
        exif.load(self.exif or b"")
        return "srgb" if exif.get(MAKE) else None

    def with_pixels(self, pixels: Tensor) -> "Picture":
        """The same picture with other pixels, (C, H', W') for any H' and W'.

        Alpha is cropped, or its border repeated, equally on all sides.
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
    """Read every page of a TIFF, or the (first) picture of another file.

    8-bit numbers are divided by 255. 16-bit numbers rarely use the full range: they are divided by
    the smallest of 2^8 - 1, 2^10 - 1, 2^12 - 1, ... that is not exceeded on any page. All others
    become floats: unchanged if they are about in [0, 1], else divided by a power of two. `note`
    says so.

    Args:
        source: a file, with any suffix, or the content of one.
        value_range: the numbers for black and white, instead of these.

    Raises:
        UserError: if it is not a readable picture, has NaN or infinity, more pixels per page than
            Pillow allows (2 MAX_IMAGE_PIXELS, 179 million), or channels other than grey or RGB and
            plain alpha; and for an empty range.
    """
    name = "" if isinstance(source, io.BytesIO) else f" {printable(str(source))}"
    if value_range is not None and not (
            np.isfinite(value_range).all() and value_range[0] < value_range[1]):
        raise UserError(f"range {value_range[0]:g},{value_range[1]:g}: give two numbers, the lower "
                        "one first, e.g. 0,4095")
    try:
        if not isinstance(source, io.BytesIO):
            if Path(source).exists() and not Path(source).is_file():
                raise ValueError("it is not a file")  # reading a pipe would block
            source = io.BytesIO(Path(source).read_bytes())
        content = source.getvalue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
            if content.startswith(TIFF):
                return _to_pictures(_read_tiff(content), value_range)
            heif = content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis")
            return _to_pictures([(_read_heif if heif else _read_with_pillow)(content)], value_range)
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise all sorts
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"its format is not one of {', '.join(FORMATS)}, HEIC"
        elif isinstance(error, Image.DecompressionBombError):
            reason = "it has too many pixels: split it"
        raise UserError(f"cannot read the image{name}: "
                        f"{printable(' '.join(reason.split()))}") from error


# --- formats ------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A picture in a file: samples (H, W, 1 to 4), grey or RGB, then alpha if any."""

    samples: np.ndarray
    note: str = ""
    icc: bytes | None = None
    exif: bytes | None = None


def _read_with_pillow(content: bytes, index: int = 0) -> Page:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.seek(index)
        if content.startswith(PNG) and content[24] == 16:  # Pillow would reduce it to 8 bits
            samples = imagecodecs.png_decode(content)
        elif image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"):
            image.load()
            grey = "L" if image.mode in ("1", "L", "LA") else "RGB"
            samples = np.array(image.convert(grey + "A" * image.has_transparency_data))
        else:
            raise ValueError(f"it is of mode {image.mode}: save it in grey or RGB")
        note = ""
        if image.format not in ("MPO", "TIFF") and getattr(image, "is_animated", False):
            note = f"an animation of {image.n_frames} pictures: the first is used"
        exif, orientation = _upright_exif(image.info.get("exif"))  # a TIFF is upright
        return Page(_upright(samples, orientation), note, image.info.get("icc_profile"), exif)


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    samples = samples.reshape(*samples.shape[:2], -1)
    samples = samples[::-1 if orientation in (3, 4, 6, 7) else 1,
                      ::-1 if orientation in (2, 3, 7, 8) else 1]
    return samples.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else samples


def _upright_exif(content: bytes | None) -> tuple[bytes | None, int]:
    """EXIF without orientation and thumbnail, None if it is damaged; and the orientation."""
    exif, orientation = Image.Exif(), 1
    with contextlib.suppress(Exception):  # Pillow raises all sorts for damaged EXIF
        exif.load(content)
        orientation = exif.pop(ORIENTATION, 1)
        for tag, value in list(exif.items()):
            if isinstance(value, str):  # read as Latin-1, but Pillow would write it as ASCII
                exif[tag] = value.encode("latin-1")
        return exif.tobytes().removeprefix(b"Exif\0\0") if exif else None, orientation
    return None, orientation


def _check_size(width: int, height: int) -> None:
    """Raise like Pillow, for formats that it does not open, at the limit that is set there."""
    if Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def _read_heif(content: bytes) -> Page:
    """Read HEIC; 10 and 12 bits become 16."""
    import pillow_heif  # slow to import, and needed here only

    if not pillow_heif.is_supported(content):
        raise UnidentifiedImageError
    image = pillow_heif.open_heif(content, convert_hdr_to_8bit=False)
    _check_size(*image.size)
    return Page(_upright(np.array(image), 1), "", image.info.get("icc_profile"),
                _upright_exif(image.info.get("exif"))[0])


def _read_tiff(content: bytes) -> list[Page]:
    """Read every page except thumbnails and masks."""
    # is_ome: a microscope's file may name other files, which must not be opened.
    with tifffile.TiffFile(io.BytesIO(content), is_ome=False) as tif:
        pages = [page for page in tif.pages if not (page.is_reduced or page.is_mask)]
        if not pages or content[8:10] == b"CR":  # Canon's
            raise ValueError("it looks like a camera's raw file: develop it into a TIFF or PNG")
        if sum(series.size for series in tif.series) > sum(page.size for page in tif.pages):
            raise ValueError("it has several pictures on one page: save it with a page for each")
        return [_read_tiff_page(page, content) for page in pages]


def _read_tiff_page(page: tifffile.TiffPage, content: bytes) -> Page:
    _check_size(page.imagewidth, page.imagelength)
    if page.photometric == tifffile.PHOTOMETRIC.CFA:
        raise ValueError("it is a camera's raw mosaic: develop it into a TIFF or PNG in RGB")
    written = [at > 0 < n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if sum(written) < np.prod(page.chunked):  # tifffile would leave the rest black
        raise ValueError("it is truncated, or parts of the picture were never written")
    if page.bitspersample == 1 or page.photometric.name not in ("MINISBLACK", "RGB"):
        return _read_with_pillow(content, page.index)
    if page.axes not in ("YX", "YXS") or page.samplesperpixel > 4:
        raise ValueError(f"it has {page.samplesperpixel} channels or planes to a page: save each "
                         "page in grey or RGB")
    if page.samplesperpixel in (2, 4) and page.extrasamples != (UNASSOCIATED,):
        raise ValueError("its last channel is not plain alpha: save it without that channel")
    samples = page.asarray()
    if samples.dtype.kind not in "uif":
        raise ValueError(f"its numbers are of type {samples.dtype}: save it as integers or floats")
    kept = samples.dtype.name if samples.dtype.name in ("uint8", "uint16") else "float32"
    orientation, icc = page.tags.valueof(ORIENTATION, default=1), page.tags.valueof(ICC)
    return Page(_upright(samples.astype(kept, copy=False), orientation),
                icc=icc if isinstance(icc, bytes) else None)


# --- from numbers to pixels -------------------------------------------------------------------


def _to_pictures(pages: list[Page], value_range: tuple[float, float] | None) -> list[Picture]:
    """Convert pages with one common scale; the first page has the note on it."""
    dtype = pages[0].samples.dtype
    if any(page.samples.dtype != dtype for page in pages):
        raise ValueError("its pages have numbers of different types: save all with one type")
    split = [np.split(page.samples, [3 if page.samples.shape[2] > 2 else 1], axis=2)
             for page in pages]
    low, high = (end([end(colours) for colours, _ in split]).item() for end in (np.min, np.max))
    if not np.isfinite([low, high]).all():
        raise ValueError("it has values that are not finite: replace them")
    full = np.iinfo(dtype).max if dtype.kind == "u" else 1
    black, white = value_range or _choose_scale(low, high, full)
    limits = None if dtype.kind == "f" else (0, full if value_range else white)
    scale_note = ""
    if not value_range and (black, white) != (0, full):
        scale_note = (f"its numbers range from {low:.4g} to {high:.4g}: {black:.4g} is taken for "
                      f"black and {white:.4g} for white; if that is wrong, give the range LOW,HIGH")
    pictures = []
    for page, (colours, alpha) in zip(pages, split, strict=True):
        pixels = np.stack([((channel.astype(np.float64) - black) / (white - black))
                           .astype(np.float32) for channel in np.moveaxis(colours, 2, 0)])
        pictures.append(Picture(
            torch.from_numpy(pixels), dtype, (black, white), limits,
            "; ".join(filter(None, [page.note, scale_note])),
            alpha[..., 0].copy() if alpha.size else None, len(pages), page.icc, page.exif))
        scale_note = ""
    return pictures


def _choose_scale(low: float, high: float, full: int) -> tuple[float, float]:
    """The numbers for black and white; `full` is the largest of the type, 1 for floats."""
    if full > 1:
        bits = next(bits for bits in range(8, 18, 2) if high < 2**bits)
        return 0, min(2**bits - 1, full) if high else full
    if (low >= -0.5 and 0.05 < high <= 1.5) or low == high == 0:
        return 0.0, 1.0
    black = low if low < -0.05 * abs(high) else 0.0
    # Division by a power of two keeps a float's digits.
    return black, black + 2.0 ** np.ceil(np.log2(high - black or 1.0)).item()


# --- out --------------------------------------------------------------------------------------


def write_pictures(path: str | Path, pictures: list[Picture]) -> None:
    """Write one picture as a PNG, or pictures as the pages of a TIFF, atomically.

    Integers are rounded, and clipped to `Picture.limits`; floats are written unchanged.

    Raises:
        UserError: for another suffix, and for .png if `Picture.suffix` is .tif.
    """
    path, suffix = Path(path), ".tif" if len(pictures) > 1 else pictures[0].suffix
    kind = path.suffix.lower()
    if kind not in (suffix, ".tif", ".tiff"):
        raise UserError(f"cannot write {path}: give it a name that ends in {suffix}")
    with atomic_path(path) as temporary:
        if kind == ".png":
            temporary.write_bytes(_to_png(pictures[0]))
            return
        large = sum(picture.pixels.numel() * picture.dtype.itemsize for picture in pictures) > 2**31
        with tifffile.TiffWriter(temporary, bigtiff=large) as tif:
            for picture in pictures:
                tif.write(_to_samples(picture), metadata=None, software=False,
                          photometric="rgb" if len(picture.pixels) == 3 else "minisblack",
                          planarconfig="contig", iccprofile=picture.icc,
                          extrasamples=None if picture.alpha is None else [UNASSOCIATED])


def _to_samples(picture: Picture) -> np.ndarray:
    """The numbers to write, (H, W) or (H, W, C)."""
    (low, high), channels = picture.scale, []
    for channel in picture.pixels.numpy():
        values = channel.astype(np.float64) * (high - low) + low
        if picture.limits is not None:
            values = np.rint(values).clip(*picture.limits)
        channels.append(values.astype(picture.dtype))
    if picture.alpha is not None:
        channels.append(picture.alpha)
    return np.stack(channels, axis=-1) if len(channels) > 1 else channels[0]


def _to_png(picture: Picture) -> bytes:
    """Encode by imagecodecs, as Pillow writes no 16-bit colours; insert profile and EXIF."""
    # The fastest of the settings that were tried; files are a few per cent above the smallest.
    samples = np.ascontiguousarray(_to_samples(picture))
    content = imagecodecs.png_encode(samples, level=1, strategy=3, filter=128)
    chunks = io.BytesIO()
    if picture.icc:
        putchunk(chunks, b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc))
    if picture.exif:
        putchunk(chunks, b"eXIf", picture.exif)
    return content[:33] + chunks.getvalue() + content[33:]  # after the signature and IHDR
