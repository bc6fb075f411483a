"""What a file holds for one picture: the formats that Pillow reads, and PNG with 16 bits too."""

import io
import struct
import zlib
from dataclasses import dataclass, field

import imagecodecs
import numpy as np
from PIL import Image, ImageCms

from jfbnb.data import FORMATS

MAX_PIXELS = 2**28  # of a page, before it is decoded
PNG = b"\x89PNG\r\n\x1a\n"
COLOUR_CHUNKS = (b"gAMA", b"cHRM", b"sRGB", b"cICP")  # of a PNG: what its values look like
ORIENTATION = 274  # its tag in EXIF
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # what Pillow warns of; it refuses twice as many


@dataclass(kw_only=True)
class Metadata:
    """What a file has besides the numbers of its pixels."""

    alpha_kind: int = 2  # or 0 for a channel of which a TIFF does not say what it is
    icc: bytes | None = None  # the colour profile
    exif: bytes | None = None  # from "II" or "MM" on, upright, with a TIFF's other tags
    resolution: tuple[float, float, int] | None = None  # x, y, and the unit: 1 none, 2 inch, 3 cm
    chunks: tuple[tuple[bytes, bytes], ...] = ()  # a PNG's on colour


@dataclass
class Frame(Metadata):
    """One picture as in a file, or one page of a TIFF."""

    samples: np.ndarray  # (H, W, 1 to 4): grey or RGB, then alpha where there is one
    orientation: int = 1  # 1 to 8, as in EXIF
    notes: list[str] = field(default_factory=list)  # what was decided for the user

    @property
    def colours(self) -> int:
        """3, or 1 for grey."""
        return 3 if self.samples.shape[2] > 2 else 1


def check_size(width: int, height: int) -> None:
    """Raise ValueError for a picture that would fill memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many: cut it into parts")


def resolution(x: float, y: float, unit: int) -> tuple[float, float, int] | None:
    """A `Metadata.resolution`, or None where a damaged file would have it infinite, or nothing."""
    x, y = float(x), float(y)
    return (x, y, unit) if 0 < x < 1e6 and 0 < y < 1e6 and unit in (1, 2, 3) else None


def read(content: bytes) -> Frame:
    """JPEG, PNG, WebP, BMP, GIF or PPM. A damaged one raises all sorts."""
    return _read_png(content) if content.startswith(PNG) else _read_with_pillow(content)


def _read_with_pillow(content: bytes) -> Frame:
    """Any format but PNG of 16 bits."""
    with open_image(content) as image:
        if image.format == "PPM" and image.tile[0].codec_name == "ppm" and (
                image.tile[0].args[-1] > 255):  # Pillow would make 8 bits of 16
            shape = (image.height, image.width, len(image.getbands()))
            frame = Frame(np.frombuffer(content, ">u2", int(np.prod(shape)), image.tile[0].offset)
                          .reshape(shape).astype(np.uint16))
        else:
            frame = decode(image)
        if image.format in ("GIF", "WEBP", "PNG") and image.is_animated:
            frame.notes.append(f"an animation of {image.n_frames} pictures: the first is taken")
        if image.mode != "CMYK":  # whose profile is that of the inks
            frame.icc = image.info.get("icc_profile")
        frame.resolution = resolution(*image.info.get("dpi", (0, 0)), 2)
        frame.orientation, frame.exif = _upright(_find_exif(image))
    return frame


def open_image(content: bytes) -> Image.Image:
    """A picture of a size that can be decoded."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    check_size(*image.size)
    return image


def decode(image: Image.Image) -> Frame:
    """The samples of a picture in any of Pillow's modes."""
    image.load()
    alpha, notes = image.has_transparency_data, []
    if image.mode[0] in "FI":  # a PFM, or a PPM in words: 16 bits too
        samples = np.array(image).astype(np.float32 if image.mode == "F" else np.uint16)
    elif image.mode == "CMYK":
        notes.append("CMYK is turned to RGB")
        samples = np.array(_from_inks(image))
    elif image.mode in ("1", "L", "LA"):
        samples = np.array(image.convert("LA" if alpha and image.mode != "1" else "L"))
    else:
        samples = np.array(image.convert("RGBA" if alpha else "RGB"))
        if image.mode in ("P", "PA") and "icc_profile" not in image.info and np.all(
                samples[..., :1] == samples[..., 1:3]):
            samples = np.delete(samples, (1, 2), axis=2)  # a palette of greys
    return Frame(samples.reshape(image.height, image.width, -1), notes=notes)


def _from_inks(image: Image.Image) -> Image.Image:
    """CMYK as sRGB, by its colour profile where that can be used."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image.convert("RGB")


def _find_exif(image: Image.Image) -> bytes | None:
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
    exif, orientation = bytearray((exif or b"").removeprefix(b"Exif\0\0")), 1
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


def _read_png(content: bytes) -> Frame:
    chunks = {}  # the first of each name
    at = len(PNG)
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name != b"IDAT":
            chunks.setdefault(name, content[at + 8:at + 8 + length])
        at += length + 12
    wide = chunks.get(b"IHDR", b"")[8:9] == b"\x10"  # its bits per sample
    frame = _read_png16(content, chunks) if wide else _read_with_pillow(content)
    frame.chunks = tuple((name, chunks[name]) for name in COLOUR_CHUNKS if name in chunks)
    return frame


def _read_png16(content: bytes, chunks: dict[bytes, bytes]) -> Frame:
    check_size(*struct.unpack(">II", chunks[b"IHDR"][:8]))
    samples = imagecodecs.png_decode(content)
    frame = Frame(samples.reshape(*samples.shape[:2], -1))
    frame.orientation, frame.exif = _upright(chunks.get(b"eXIf"))
    if b"iCCP" in chunks:
        packed = chunks[b"iCCP"].partition(b"\0")[2][1:]
        frame.icc = zlib.decompressobj().decompress(packed, 2**24)  # a bomb's are more
    density = chunks.get(b"pHYs", b"")
    if len(density) == 9 and density[8] == 1:  # pixels per metre
        frame.resolution = resolution(*(n / 100 for n in struct.unpack(">II", density[:8])), 3)
    return frame


def make_png(frame: Frame) -> bytes:
    """The content of a PNG with 8 or 16 bits."""
    # Of the settings tried these are the fastest, and within a few per cent of the smallest.
    content = imagecodecs.png_encode(frame.samples, level=1, strategy=3, filter=128)
    chunks = list(frame.chunks)
    if frame.icc:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(frame.icc)))
    if frame.resolution and frame.resolution[2] > 1:
        *sides, unit = frame.resolution
        per_metre = [round(side * 100 / (2.54 if unit == 2 else 1)) for side in sides]
        chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
    if frame.exif:
        chunks.append((b"eXIf", frame.exif))
    packed = b"".join(struct.pack(">I", len(data)) + name + data
                      + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    header = len(PNG) + 25
    return content[:header] + packed + content[header:]
