"""TIFF in and out, with all its pages and tags, and EXIF, which is a directory of tags as well.

tifffile reads it; what is not plain numbers, such as palettes, Pillow does. It is written by hand,
as tifffile writes no EXIF.
"""

import contextlib
import io
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import tifffile

from jfbnb.photo.formats import ORIENTATION, Frame, check_size, decode, open_image, resolution

MAX_SAMPLES = 2**31  # of all pages and their channels: 8 GiB in float32
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CANON_RAW = b"II*\0\x10\0\0\0CR\2\0"  # a TIFF whose first page is a small JPEG of the picture
# Tags. The last three hold directories of tags again.
DESCRIPTION, ICC, EXIF, GPS, INTEROP = 270, 34675, 34665, 34853, 40965
RESOLUTION = (282, 283, 296)
# Tags that say how pixels are stored, which may change, or that `Frame` has apart, or that hold
# the old pixels once more.
LAYOUT = {*range(254, 260), 262, 266, 273, ORIENTATION, *range(277, 282), *RESOLUTION, 284, 292,
          293, 317, 320, *range(322, 326), 330, *range(338, 342), 347, 400, *range(512, 533),
          32997, 32998, EXIF, ICC, GPS, 37724, INTEROP}
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type


def _read_directory(data: bytes, at: int, order: str, depth: int = 0) -> dict:
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


def _header(order: str, first: int) -> bytes:
    return struct.pack(order + "2sHI", b"MM" if order == ">" else b"II", 42, first)


def _make_exif(entries: dict, order: str) -> bytes | None:
    return _header(order, 8) + _make_directory(entries, 8, order) if entries else None


def without_size(exif: bytes | None) -> bytes | None:
    """EXIF without a microscope's description, which tells the size too."""
    entries, order = _parse_exif(exif or b"")
    if b"<OME" not in entries.get(DESCRIPTION, (b"",))[-1]:
        return exif
    del entries[DESCRIPTION]
    return _make_exif(entries, order)


def read(content: bytes) -> list[Frame]:
    """Every page, but for thumbnails and masks. A damaged file raises all sorts."""
    # is_ome: a microscope's file may name others, which are not to be opened.
    with tifffile.TiffFile(io.BytesIO(content), is_ome=False) as tif:
        pages = _check_pages(tif, content)
        # These two may have many pictures to a page.
        series = tif.series if tif.is_imagej or tif.is_shaped else []
        held, told = sum(page.size for page in pages), sum(s.size for s in series)
        if max(held, told) > MAX_SAMPLES:
            raise ValueError(f"its pages have over {MAX_SAMPLES} samples in all: cut it into parts")
        if told > held:
            frames = [_plain_frame(s.keyframe, samples) for s in series
                      for samples in s.asarray().reshape(-1, *s.keyframe.shape)]
            pages = pages[:1]  # it has the tags of all
        else:
            frames = [_read_page(page, content) for page in pages]
        for frame, page in zip(frames, pages, strict=False):
            _add_metadata(frame, page, content)
    return frames


def _check_pages(tif: tifffile.TiffFile, content: bytes) -> list[tifffile.TiffPage]:
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
    return pages


def _check_page(page: tifffile.TiffPage, length: int) -> None:
    """Raise ValueError for a page that would fill memory, or come out black in part."""
    check_size(page.imagewidth, page.imagelength)
    check_size(page.tilewidth, page.tilelength)
    channels, planes, bits = page.samplesperpixel, page.imagedepth, page.bitspersample
    if planes > 1 or channels > 4 or not isinstance(bits, int):
        raise ValueError(f"{channels} channels and {planes} planes to a page: save it with one or "
                         "three channels of the same number of bits, one plane")
    plain = page.imagelength * (page.imagewidth * channels * bits // 8)
    parts = zip(page.dataoffsets, page.databytecounts, strict=True)
    if (len(page.dataoffsets) < np.prod(page.chunked) or (page.compression == 1 and plain > length)
            or not all(at and n and at + n <= length for at, n in parts)):
        raise ValueError("it is cut short, or parts of the picture were never written")


def _read_page(page: tifffile.TiffPage, content: bytes) -> Frame:
    if page.bitspersample != 1 and page.photometric.name in ("MINISBLACK", "MINISWHITE", "RGB"):
        return _plain_frame(page, page.asarray())
    with open_image(content) as image:  # Pillow knows the rest, and turns it upright by itself
        image.seek(page.index)
        return decode(image)


def _plain_frame(page: tifffile.TiffPage, samples: np.ndarray) -> Frame:
    """A page of plain numbers as (H, W, C), in which high is light and all bits are used."""
    if samples.dtype.kind not in "uif":
        raise ValueError(f"its numbers are of type {samples.dtype}: save it as integers or floats")
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(*samples.shape[:2], -1)
    bits = page.bitspersample
    if samples.dtype.kind == "u":
        if page.photometric.name == "MINISWHITE":
            samples = samples.dtype.type(2**bits - 1) - samples
        if bits < 16 and bits != 8:  # packed, such as 12: spread over the type, as PNG does
            full = np.iinfo(samples.dtype).max
            samples = np.rint(samples * (full / (2**bits - 1))).astype(samples.dtype)
    frame = Frame(samples, page.tags.valueof(ORIENTATION, default=1))
    if samples.shape[2] in (2, 4):
        kind = page.extrasamples[0].name if page.extrasamples else "UNSPECIFIED"
        if kind == "UNSPECIFIED":
            frame.alpha_kind = 0
            frame.notes.append("the last channel, of which it does not say what it is, is left as "
                               "it is")
        elif kind == "ASSOCALPHA":
            frame.samples = _divide_by_alpha(samples)
    return frame


def _divide_by_alpha(samples: np.ndarray) -> np.ndarray:
    """The colours themselves, of colours that were multiplied by alpha."""
    full = np.iinfo(samples.dtype).max if samples.dtype.kind in "ui" else 1.0
    colours, alpha = samples[..., :-1].astype(np.float64), samples[..., -1:]
    colours = np.divide(colours * full, alpha, out=np.zeros_like(colours), where=alpha != 0)
    if full > 1:
        colours = np.rint(colours).clip(0, full)
    return np.concatenate([colours.astype(samples.dtype), alpha], axis=2)


def _add_metadata(frame: Frame, page: tifffile.TiffPage, content: bytes) -> None:
    tags, order = page.tags, page.parent.byteorder
    entries = {}
    for tag in tags:
        if tag.code not in LAYOUT:
            code, kind, count, value, _ = tag.astuple()
            shape = code == DESCRIPTION and value.startswith(b'{"shape":')  # tifffile's own layout
            if not shape and len(value) == SIZES.get(kind, 0) * count:
                entries[code] = kind, count, value
    for code in (EXIF, GPS):
        if code in tags and not page.parent.is_bigtiff:
            with contextlib.suppress(KeyError, ValueError, struct.error):  # damaged
                place, = struct.unpack_from(order + "I", content, tags[code].offset + 8)
                entries[code] = _read_directory(content, place, order)
    frame.exif = _make_exif(entries, order)
    icc = tags.valueof(ICC)
    if page.photometric.name != "SEPARATED" and isinstance(icc, bytes):  # not of inks, nor damaged
        frame.icc = icc
    x, y, unit = (tags.valueof(code) for code in RESOLUTION)
    if isinstance(x, tuple) and isinstance(y, tuple) and x[1] and y[1]:  # fractions
        frame.resolution = resolution(x[0] / x[1], y[0] / y[1], int(unit or 2))


def write(path: Path, frames: Iterable[Frame], exifs: list[bytes | None]) -> None:
    """The pixels of all pages, uncompressed, then their tags: where ImageJ looks for its stacks'.

    `frames` may be made one by one, but their EXIF tells the file's byte order, which comes first.
    """
    parsed = [_parse_exif(exif or b"") for exif in exifs]
    order = max(order for _, order in parsed)
    with open(path, "wb") as file:
        file.write(_header(order, 0))
        pages = []
        for frame, (entries, _) in zip(frames, parsed, strict=True):
            pages.append({tag: entry for tag, entry in entries.items() if tag not in LAYOUT or
                          isinstance(entry, dict)} | _layout(frame, file.tell(), order))
            samples = frame.samples
            file.write(samples.astype(samples.dtype.newbyteorder(order), copy=False).data)
        link = 4  # where the next page's place is to stand
        for tags in pages:
            at = file.tell() + file.tell() % 2
            file.seek(link)
            file.write(struct.pack(order + "I", at))
            file.seek(at)
            file.write(_make_directory(tags, at, order))
            link = at + 2 + 12 * len(tags)


def _layout(frame: Frame, place: int, order: str) -> dict[int, tuple[int, int, bytes]]:
    """The tags that say how a page's pixels are stored, and where."""
    def short(*values: int) -> tuple[int, int, bytes]:
        return 3, len(values), struct.pack(f"{order}{len(values)}H", *values)

    def long(value: int) -> tuple[int, int, bytes]:
        return 4, 1, struct.pack(order + "I", value)

    samples, (height, width, channels) = frame.samples, frame.samples.shape
    tags = {256: long(width), 257: long(height),
            258: short(*[8 * samples.itemsize] * channels), 259: short(1),
            262: short(2 if frame.colours == 3 else 1), 273: long(place), 277: short(channels),
            278: long(height), 279: long(samples.nbytes), 284: short(1),
            339: short(*[{"u": 1, "i": 2, "f": 3}[samples.dtype.kind]] * channels)}
    if channels > frame.colours:
        tags[338] = short(frame.alpha_kind)
    if frame.icc:
        tags[ICC] = 7, len(frame.icc), frame.icc
    if frame.resolution:
        *sides, unit = frame.resolution
        for tag, side in zip(RESOLUTION, sides, strict=False):
            ratio = Fraction(side).limit_denominator(int((2**32 - 1) / max(side, 1)))
            tags[tag] = 5, 1, struct.pack(order + "II", *ratio.as_integer_ratio())
        tags[296] = short(unit)
    return tags
