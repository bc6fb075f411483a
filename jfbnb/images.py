"""A user's picture, in and out, without losing anything of it.

Pillow reads the common formats with 8 bits; tifffile and imagecodecs read what it would cut down,
TIFF of any type and PNG with 16 bits. A `Picture` has the pixels on one scale, and with them all
that it takes to write others in their place.
"""

import contextlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
import torch
from PIL import Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable
from jfbnb.datasets import FORMATS

MAX_PIXELS = 2**28  # of a page, before it is decoded
MAX_SAMPLES = 2**31  # of all pages and their channels: 8 GiB in float32
PNG = b"\x89PNG\r\n\x1a\n"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CANON_RAW = b"II*\0\x10\0\0\0CR\2\0"  # a TIFF whose first page is a small JPEG of the picture
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP")  # of a PNG: what its values look like
# Tags of TIFF and EXIF. The last three hold directories of tags again.
DESCRIPTION, ORIENTATION, ICC, EXIF, GPS, INTEROP = 270, 274, 34675, 34665, 34853, 40965
RESOLUTION = (282, 283, 296)
# Tags that say how pixels are stored, which may change, or that `Picture` has apart, or that hold
# the old pixels once more.
LAYOUT = {*range(254, 260), 262, 266, 273, ORIENTATION, *range(277, 282), *RESOLUTION, 284, 292,
          293, 317, 320, *range(322, 326), 330, *range(338, 342), 347, 400, *range(512, 533),
          32997, 32998, EXIF, ICC, GPS, 37724, INTEROP}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # what Pillow warns of; it refuses twice as many
# They log damaged metadata; a program that wants to know of it can still add a handler.
for reader in ("tifffile", "imagecodecs"):
    logging.getLogger(reader).addHandler(logging.NullHandler())


@dataclass
class Picture:
    """One picture, or one page of a stack.

    Attributes:
        pixels: float32 (C, H, W), C 1 or 3, upright, from 0 for black to 1 for white. Floats may
            go beyond, and so may integers where the user tells a range.
        dtype: of the numbers in the file: uint8, uint16, int32, float32, ...
        scale: the numbers that are black and white.
        limits: the smallest and the largest number to write; None for floats.
        note: one line if something was decided for the user, else "".
        alpha: (H, W), upright, as in the file, or None.
        alpha_kind: 2, or 0 for a channel of which a TIFF does not say what it is.
        icc: the colour profile.
        exif: EXIF with orientation 1, and a TIFF's other tags; it begins with "II" or "MM".
        resolution: horizontal, vertical, and their unit in TIFF: 1 none, 2 inch, 3 cm.
        chunks: a PNG's chunks on colour.
        pages: how many the file had.
    """

    pixels: Tensor
    dtype: np.dtype
    scale: tuple[float, float]
    limits: tuple[float, float] | None
    note: str = ""
    alpha: np.ndarray | None = None
    alpha_kind: int = 2
    icc: bytes | None = None
    exif: bytes | None = None
    resolution: tuple | None = None
    chunks: tuple[tuple[bytes, bytes], ...] = ()
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
            alpha = None if alpha is None else _fit(alpha, *pixels.shape[1:])
            entries, order = _parse_exif(exif or b"")
            if b"<OME" in entries.get(DESCRIPTION, (b"",))[-1]:
                del entries[DESCRIPTION]  # a microscope's, which tells the size too
                exif = _make_exif(entries, order)
        return replace(self, pixels=pixels.detach().float().cpu(), alpha=alpha, exif=exif)


def _fit(alpha: np.ndarray, *shape: int) -> np.ndarray:
    missing = [max(n - m, 0) for n, m in zip(shape, alpha.shape, strict=True)]
    alpha = np.pad(alpha, [(n // 2, n - n // 2) for n in missing], mode="edge")
    starts = [(m - n) // 2 for n, m in zip(shape, alpha.shape, strict=True)]
    return alpha[tuple(slice(i, i + n) for i, n in zip(starts, shape, strict=True))]


# --- reading ------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """What a file holds for one picture: samples (H, W, 1 to 4), and fields of its `Picture`."""

    samples: np.ndarray  # grey or RGB, then alpha where there is one
    orientation: int = 1  # 1 to 8, as in EXIF
    notes: list[str] = field(default_factory=list)
    fields: dict = field(default_factory=dict)

    @property
    def colours(self) -> np.ndarray:
        return self.samples[..., :3 if self.samples.shape[2] > 2 else 1]


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
                        "one first, e.g. --range 0,4095")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
            return _to_pictures(_read(source), value_range)
    except MemoryError:
        raise
    except Exception as error:  # readers of damaged files raise all sorts
        reason = ("it is none of the known formats: JPEG, PNG, TIFF, WebP, BMP, GIF, PPM"
                  if isinstance(error, UnidentifiedImageError)
                  else getattr(error, "strerror", None) or str(error) or type(error).__name__)
        name = "" if isinstance(source, io.BytesIO) else f" {printable(str(source))}"
        raise UserError(f"cannot read the image{name}: "
                        f"{printable(' '.join(reason.split()))}") from error


def _read(source: str | Path | io.BytesIO) -> list[_Frame]:
    if isinstance(source, io.BytesIO):
        content = source.getvalue()
    elif Path(source).exists() and not Path(source).is_file():
        raise ValueError("it is no file")  # a pipe would be waited for
    else:
        content = Path(source).read_bytes()
    if not content:
        raise ValueError("the file is empty")
    if content[:4] in TIFF:
        return _read_tiff(content)
    return [_read_png(content) if content.startswith(PNG) else _read_with_pillow(content)]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many: cut it into parts")


def _resolution(x: float, y: float, unit: int) -> tuple[float, float, int] | None:
    """None where a damaged file would have it infinite, or nothing."""
    x, y = float(x), float(y)
    return (x, y, unit) if 0 < x < 1e6 and 0 < y < 1e6 and unit in (1, 2, 3) else None


# --- formats that Pillow reads ------------------------------------------------------------------


def _read_with_pillow(content: bytes) -> _Frame:
    """JPEG, WebP, BMP, GIF, PPM, and PNG of up to 8 bits."""
    with _pillow(content) as image:
        frame, icc = _Frame(np.empty(0)), image.info.get("icc_profile")
        if image.format in ("GIF", "WEBP", "PNG") and image.is_animated:
            frame.notes.append(f"an animation of {image.n_frames} pictures: the first is taken")
        if image.format == "PPM" and image.tile[0].codec_name == "ppm" and (
                image.tile[0].args[-1] > 255):  # Pillow would make 8 bits of 16
            shape = (image.height, image.width, 3 if image.mode == "RGB" else 1)
            frame.samples = np.frombuffer(content, ">u2", int(np.prod(shape)),
                                          image.tile[0].offset).reshape(shape).astype(np.uint16)
        else:
            frame.samples = _pillow_samples(image, frame.notes)
        if image.mode == "CMYK":
            icc = None  # it was that of the inks
        frame.fields["resolution"] = _resolution(*image.info.get("dpi", (0, 0)), 2)
        frame.orientation, exif = _upright(_pillow_exif(image))
    frame.fields |= {"icc": icc, "exif": exif}
    return frame


def _pillow(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    _check_size(*image.size)
    return image


def _pillow_samples(image: Image.Image, notes: list[str]) -> np.ndarray:
    """Samples (H, W, C) of a picture in any of Pillow's modes: grey or RGB, and alpha if any."""
    image.load()
    alpha = image.has_transparency_data
    if image.mode == "F":
        samples = np.array(image)
    elif image.mode.startswith("I"):  # a PPM in words: 16 bits too
        samples = np.array(image).astype(np.uint16)
    elif image.mode == "CMYK":
        notes.append("CMYK is turned to RGB")
        samples = np.array(_from_inks(image))
    elif image.mode in ("1", "L", "LA", "La"):
        samples = np.array(image.convert("LA" if alpha and image.mode != "1" else "L"))
    else:
        samples = np.array(image.convert("RGBA" if alpha else "RGB"))
        if image.mode in ("P", "PA") and "icc_profile" not in image.info and all(
                np.array_equal(samples[..., 0], samples[..., k]) for k in (1, 2)):
            samples = np.delete(samples, (1, 2), axis=2)  # a palette of greys
    return samples.reshape(image.height, image.width, -1)


def _from_inks(image: Image.Image) -> Image.Image:
    """CMYK as sRGB, by its colour profile where that can be used."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image.convert("RGB")


def _pillow_exif(image: Image.Image) -> bytes | None:
    if "exif" in image.info:
        return image.info["exif"]
    try:
        exif = image.getexif()  # old PNGs have it as a text
        return exif.tobytes() if len(exif) else None
    except Exception:  # damaged, of which Pillow raises all sorts
        return None


def _upright(exif: bytes | None) -> tuple[int, bytes | None]:
    """The orientation that EXIF tells, and EXIF with that set to 1, byte for byte the same else.

    Damaged EXIF is left out: who reads it later may be less patient.
    """
    if not exif:
        return 1, None
    exif, orientation = bytearray(exif.removeprefix(b"Exif\0\0")), 1
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(exif[:2])]
        start, = struct.unpack_from(order + "I", exif, 4)
        entries, = struct.unpack_from(order + "H", exif, start)
        end = start + 2 + 12 * entries
        for at in range(start + 2, end, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, at)
            if tag == ORIENTATION and 2 <= value <= 8:
                orientation = value
                struct.pack_into(order + "H", exif, at + 8, 1)
        if orientation > 1:  # the thumbnail still lies: what follows here is the way to it
            struct.pack_into(order + "I", exif, end, 0)
    except (KeyError, struct.error):
        return orientation, None
    return orientation, bytes(exif)


# --- EXIF, which is a directory of tags as TIFF has ---------------------------------------------


def _read_directory(
    data: bytes, at: int, order: str, depth: int = 0
) -> dict[int, tuple[int, int, bytes] | dict]:
    """The tags of a directory: number -> (type, count, value), or a directory again."""
    entries = {}
    count, = struct.unpack_from(order + "H", data, at)
    for i in range(count):
        tag, kind, n, value = struct.unpack_from(order + "HHI4s", data, at + 2 + 12 * i)
        size = SIZES[kind] * n
        pointer, = struct.unpack(order + "I", value)
        if tag in entries or depth > 2:
            raise ValueError("directories in a circle")
        if tag in (EXIF, GPS, INTEROP):
            entries[tag] = _read_directory(data, pointer, order, depth + 1)
        else:
            value = value[:size] if size <= 4 else data[pointer:pointer + size]
            entries[tag] = kind, n, value
            if len(value) < size:
                raise ValueError("a tag behind the end")
    return entries


def _make_directory(entries: dict, at: int, order: str) -> bytes:
    """What `_read_directory` reads `at` that place."""
    table, behind = b"", b""
    for tag, entry in sorted(entries.items()):
        pointer = at + 2 + 12 * len(entries) + 4 + len(behind)
        if isinstance(entry, dict):
            kind, n, value = 4, 1, struct.pack(order + "I", pointer)
            behind += _make_directory(entry, pointer, order)
        else:
            kind, n, value = entry
            if len(value) > 4:
                behind += value + b"\0" * (len(value) % 2)
                value = struct.pack(order + "I", pointer)
        table += struct.pack(order + "HHI4s", tag, kind, n, value)
    return struct.pack(order + "H", len(entries)) + table + bytes(4) + behind


def _parse_exif(exif: bytes) -> tuple[dict, str]:
    """The tags of EXIF, none where it is damaged, and the byte order in `struct`'s words."""
    order = ">" if exif.startswith(b"MM") else "<"
    try:
        return _read_directory(exif, *struct.unpack_from(order + "I", exif, 4), order), order
    except (KeyError, ValueError, struct.error):
        return {}, order


def _make_exif(entries: dict, order: str) -> bytes | None:
    if not entries:
        return None
    return ((b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 8)
            + _make_directory(entries, 8, order))


# --- PNG ----------------------------------------------------------------------------------------


def _read_png(content: bytes) -> _Frame:
    chunks = {}  # the first of each name
    at = len(PNG)
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name != b"IDAT":
            chunks.setdefault(name, content[at + 8:at + 8 + length])
        at += length + 12
    wide = chunks.get(b"IHDR", b"")[8:9] == b"\x10"  # its bits per sample
    frame = _read_png16(content, chunks) if wide else _read_with_pillow(content)
    frame.fields["chunks"] = tuple((name, chunks[name]) for name in COLOUR_CHUNKS if name in chunks)
    return frame


def _read_png16(content: bytes, chunks: dict[bytes, bytes]) -> _Frame:
    _check_size(*struct.unpack(">II", chunks[b"IHDR"][:8]))
    samples = imagecodecs.png_decode(content)
    orientation, exif = _upright(chunks.get(b"eXIf"))
    frame = _Frame(samples.reshape(*samples.shape[:2], -1), orientation, fields={"exif": exif})
    if b"acTL" in chunks:
        frame.notes.append("an animation: its first picture is taken")
    if b"iCCP" in chunks:
        packed = chunks[b"iCCP"].partition(b"\0")[2][1:]
        frame.fields["icc"] = zlib.decompressobj().decompress(packed, 2**24)  # a bomb's are more
    density = chunks.get(b"pHYs", b"")
    if len(density) == 9 and density[8] == 1:  # pixels per metre
        frame.fields["resolution"] = _resolution(
            *(n / 100 for n in struct.unpack(">II", density[:8])), 3)
    return frame


def _png(picture: Picture) -> bytes:
    """The content of a PNG with 8 or 16 bits."""
    # Of the settings tried these are the fastest, and within a few per cent of the smallest.
    content = imagecodecs.png_encode(_samples(picture), level=1, strategy=3, filter=128)
    chunks = list(picture.chunks)
    if picture.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)))
    if picture.resolution and picture.resolution[2] > 1:
        *sides, unit = picture.resolution
        per_metre = [round(side * 100 / (2.54 if unit == 2 else 1)) for side in sides]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if picture.exif:
        chunks.append((b"eXIf", picture.exif))
    packed = b"".join(struct.pack(">I", len(data)) + name + data
                      + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    header = len(PNG) + 25
    return content[:header] + packed + content[header:]


# --- TIFF ---------------------------------------------------------------------------------------


def _read_tiff(content: bytes) -> list[_Frame]:
    """Every page, but for thumbnails and masks."""
    # is_ome: a microscope's file may name others, which are not to be opened.
    with tifffile.TiffFile(io.BytesIO(content), is_ome=False) as tif:
        seen, pages = set(), []
        for page in tif.pages:
            if page.offset in seen:
                raise ValueError("it is damaged: its pages follow one another in a circle")
            seen.add(page.offset)
            if not (page.is_reduced or page.is_mask):
                _check_page(page, len(content))
                pages.append(page)
        if not pages or content.startswith(CANON_RAW):
            raise ValueError("it looks like a camera's raw file: develop it into a TIFF or PNG")
        # These two may have many pictures to a page.
        series = tif.series if tif.is_imagej or tif.is_shaped else []
        held, told = sum(page.size for page in pages), sum(s.size for s in series)
        if max(held, told) > MAX_SAMPLES:
            raise ValueError(f"its pages have over {MAX_SAMPLES} samples in all: cut it into parts")
        if told > held:
            frames = [_plain_frame(s.keyframe, samples) for s in series
                      for samples in s.asarray().reshape(-1, *s.keyframe.shape)]
            frames[0].fields |= _tiff_fields(pages[0], content)
        else:
            frames = []
            for page in pages:
                frames.append(_plain_frame(page, page.asarray()) if _is_plain(page)
                              else _pillow_page(page, content))
                frames[-1].fields |= _tiff_fields(page, content)
    return frames


def _check_page(page: tifffile.TiffPage, length: int) -> None:
    """Raise ValueError for a page that would fill memory, or come out black in part."""
    _check_size(page.imagewidth, page.imagelength)
    _check_size(page.tilewidth, page.tilelength)
    channels, planes, bits = page.samplesperpixel, page.imagedepth, page.bitspersample
    if planes > 1 or channels > 4 or not isinstance(bits, int):
        raise ValueError(f"{channels} channels and {planes} planes to a page: save it with one or "
                         "three channels of the same number of bits, one plane")
    plain = page.imagelength * (page.imagewidth * channels * bits // 8)
    whole = (len(page.dataoffsets) >= np.prod(page.chunked)
             and (page.compression != 1 or plain <= length)
             and all(at and n and at + n <= length for at, n in
                     zip(page.dataoffsets, page.databytecounts, strict=True)))
    if not whole:
        raise ValueError("it is cut short, or parts of the picture were never written")


def _is_plain(page: tifffile.TiffPage) -> bool:
    """Whether its numbers are grey or RGB as they stand. Pillow knows the rest, all of 8 bits."""
    return page.bitspersample != 1 and page.photometric.name in ("MINISBLACK", "MINISWHITE", "RGB")


def _pillow_page(page: tifffile.TiffPage, content: bytes) -> _Frame:
    """A page of 1 bit, a palette, CMYK, YCbCr. Pillow turns it upright by itself."""
    with _pillow(content) as image:
        image.seek(page.index)
        notes = []
        return _Frame(_pillow_samples(image, notes), notes=notes)


def _plain_frame(page: tifffile.TiffPage, samples: np.ndarray) -> _Frame:
    """A page of plain numbers as (H, W, C), in which high is light and all bits are used."""
    if samples.dtype.kind not in "uif":
        raise ValueError(f"its numbers are of type {samples.dtype}: save it as integers or floats")
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(*samples.shape[:2], -1)
    frame, bits = _Frame(samples, page.tags.valueof(ORIENTATION, default=1)), page.bitspersample
    if samples.dtype.kind == "u":
        if page.photometric.name == "MINISWHITE":
            samples = samples.dtype.type(2**bits - 1) - samples
        if bits < 16 and bits != 8:  # packed, such as 12: spread over the type, as PNG does
            full = np.iinfo(samples.dtype).max
            samples = np.rint(samples * (full / (2**bits - 1))).astype(samples.dtype)
    if samples.shape[2] in (2, 4):
        kind = page.extrasamples[0].name if page.extrasamples else "UNSPECIFIED"
        if kind == "UNSPECIFIED":
            frame.fields["alpha_kind"] = 0
            frame.notes.append("the last channel, of which it does not say what it is, is left as "
                               "it is")
        elif kind == "ASSOCALPHA":
            samples = _divide_by_alpha(samples)
    frame.samples = samples
    return frame


def _divide_by_alpha(samples: np.ndarray) -> np.ndarray:
    """The colours themselves, of colours that were multiplied by alpha."""
    integers = samples.dtype.kind in "ui"
    full = np.iinfo(samples.dtype).max if integers else 1.0
    colours, alpha = samples[..., :-1].astype(np.float64), samples[..., -1:]
    colours = np.divide(colours * full, alpha, out=np.zeros_like(colours), where=alpha != 0)
    if integers:
        colours = np.rint(colours).clip(0, full)
    return np.concatenate([colours.astype(samples.dtype), alpha], axis=2)


def _tiff_fields(page: tifffile.TiffPage, content: bytes) -> dict:
    tags, order = page.tags, page.parent.byteorder
    entries = {}
    for tag in tags:
        code, kind, count, value, _ = tag.astuple() if tag.code not in LAYOUT else (0,) * 5
        shape = code == DESCRIPTION and value.startswith(b'{"shape":')  # tifffile's own layout
        if code and not shape and len(value) == SIZES.get(kind, 0) * count:
            entries[code] = kind, count, value
    for code in (EXIF, GPS):
        if code in tags and not page.parent.is_bigtiff:
            with contextlib.suppress(KeyError, ValueError, struct.error):  # damaged
                place, = struct.unpack_from(order + "I", content, tags[code].offset + 8)
                entries[code] = _read_directory(content, place, order)
    icc = tags.valueof(ICC)
    if page.photometric.name == "SEPARATED" or not isinstance(icc, bytes):
        icc = None  # that of inks, or damaged
    fields = {"icc": icc, "exif": _make_exif(entries, order)}
    x, y, unit = (tags.valueof(code) for code in RESOLUTION)
    if isinstance(x, tuple) and isinstance(y, tuple) and x[1] and y[1]:  # fractions
        fields["resolution"] = _resolution(x[0] / x[1], y[0] / y[1], int(unit or 2))
    return fields


def _write_tiff(path: Path, pictures: list[Picture]) -> None:
    """The pixels of all pages, uncompressed, then their tags: where ImageJ looks for its stacks'.

    By hand, as tifffile writes no EXIF.
    """
    parsed = [_parse_exif(picture.exif or b"") for picture in pictures]
    order = ">" if any(o == ">" for _, o in parsed) else "<"  # the pages of a file have one
    with open(path, "wb") as file:
        file.write((b"MM" if order == ">" else b"II") + struct.pack(order + "HI", 42, 0))
        places = []
        for picture in pictures:
            places.append(file.tell())
            samples = _samples(picture)
            file.write(samples.astype(samples.dtype.newbyteorder(order), copy=False).data)
        link = 4  # where the next page's place is to stand
        for picture, place, (entries, _) in zip(pictures, places, parsed, strict=True):
            at = file.tell() + file.tell() % 2
            tags = {tag: entry for tag, entry in entries.items() if tag not in LAYOUT or
                    isinstance(entry, dict)} | _layout(picture, place, order)
            file.seek(link)
            file.write(struct.pack(order + "I", at))
            file.seek(at)
            file.write(_make_directory(tags, at, order))
            link = at + 2 + 12 * len(tags)


def _layout(picture: Picture, place: int, order: str) -> dict[int, tuple[int, int, bytes]]:
    """The tags that say how a page's pixels are stored, and where."""
    def short(*values: int) -> tuple[int, int, bytes]:
        return 3, len(values), struct.pack(f"{order}{len(values)}H", *values)

    def long(value: int) -> tuple[int, int, bytes]:
        return 4, 1, struct.pack(order + "I", value)

    colours, height, width = picture.pixels.shape
    channels, size = colours + (picture.alpha is not None), picture.dtype.itemsize
    tags = {256: long(width), 257: long(height), 258: short(*[8 * size] * channels), 259: short(1),
            262: short(2 if colours == 3 else 1), 273: long(place), 277: short(channels),
            278: long(height), 279: long(height * width * channels * size), 284: short(1),
            339: short(*[{"u": 1, "i": 2, "f": 3}[picture.dtype.kind]] * channels)}
    if picture.alpha is not None:
        tags[338] = short(picture.alpha_kind)
    if picture.icc:
        tags[ICC] = 7, len(picture.icc), picture.icc
    if picture.resolution:
        *sides, unit = picture.resolution
        for tag, side in zip(RESOLUTION, sides, strict=False):
            ratio = Fraction(side).limit_denominator(int((2**32 - 1) / max(side, 1)))
            tags[tag] = 5, 1, struct.pack(order + "II", *ratio.as_integer_ratio())
        tags[296] = short(unit)
    return tags


# --- numbers and pixels -------------------------------------------------------------------------

TURNS = {  # EXIF's orientation: how (H, W, C) becomes upright
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: a[:, ::-1].swapaxes(0, 1)}


def _to_pictures(frames: list[_Frame], value_range: tuple[float, float] | None) -> list[Picture]:
    """Pages with numbers of one type share a scale, and the first of them has the note on it."""
    extremes = {}
    for frame in frames:
        if frame.samples.dtype.kind == "f":
            with np.errstate(over="ignore"):
                frame.samples = frame.samples.astype(np.float32, copy=False)
        low, high = frame.colours.min().item(), frame.colours.max().item()
        if not np.isfinite(low + high):
            raise ValueError("it holds values that are no finite numbers: replace them")
        if frame.samples.dtype.kind != "f" and max(-low, high) > 2**53:
            raise ValueError("it holds integers over 2^53: scale them down")
        extremes.setdefault(frame.samples.dtype, []).extend((low, high))
    scales = {dtype: _choose_scale(dtype, min(values), max(values), value_range)
              for dtype, values in extremes.items()}
    pictures, told = [], set()
    for frame in frames:
        dtype, channels = frame.samples.dtype, frame.colours.shape[2]
        scale, limits, note = scales[dtype]
        if dtype not in told:
            told.add(dtype)
            frame.notes.append(note)
        samples = TURNS.get(frame.orientation, TURNS[1])(frame.samples)
        if frame.orientation > 4 and frame.fields.get("resolution"):
            x, y, unit = frame.fields["resolution"]
            frame.fields["resolution"] = y, x, unit
        alpha = samples[..., -1].copy() if samples.shape[2] > channels else None
        pictures.append(Picture(_pixels(samples[..., :channels], scale), dtype, scale, limits,
                                "; ".join(filter(None, frame.notes)), alpha, pages=len(frames),
                                **frame.fields))
        frame.samples = None  # so that all pages are never there twice
    return pictures


def _choose_scale(
    dtype: np.dtype, low: float, high: float, value_range: tuple[float, float] | None
) -> tuple[tuple[float, float], tuple[float, float] | None, str]:
    """(scale, limits, note) for numbers of a type from `low` to `high`."""
    limits = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "ui" else None
    if value_range is not None:
        return value_range, limits, ""
    if dtype == np.uint8:
        return limits, limits, ""
    otherwise = "if that is wrong, give --range LOW,HIGH"
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
    for rows in _bands(len(samples)):
        values = (samples[rows].astype(np.float64) - low) / (high - low)
        pixels[:, rows] = np.moveaxis(values, 2, 0)
    return torch.from_numpy(pixels)


def _samples(picture: Picture) -> np.ndarray:
    """The numbers to write: (H, W), or (H, W, channels) where there is colour or alpha."""
    low, high = picture.scale
    pixels = picture.pixels.numpy()
    colours, *shape = pixels.shape
    samples = np.empty((*shape, colours + (picture.alpha is not None)), picture.dtype)
    for rows in _bands(shape[0]):
        values = pixels[:, rows].astype(np.float64) * (high - low) + low
        if picture.limits is not None:
            values = np.rint(values).clip(*picture.limits)
        samples[rows, :, :colours] = np.moveaxis(values, 0, 2)
    if picture.alpha is not None:
        samples[..., -1] = picture.alpha
    return samples[..., 0] if samples.shape[2] == 1 else samples


def _bands(height: int) -> Iterator[slice]:
    """Rows by the 64: float64 of a whole picture is twice its size."""
    for top in range(0, height, 64):
        yield slice(top, top + 64)


# --- writing ------------------------------------------------------------------------------------


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
            temporary.write_bytes(_png(pictures[0]))
        else:
            _write_tiff(temporary, pictures)
