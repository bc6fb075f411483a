"""What a file holds for each of its pictures, in any of the formats that are read.

Pillow reads the usual ones, imagecodecs PNG with 16 bits, pillow-heif HEIC, and tifffile TIFF.
Damaged files raise all sorts.
"""

import contextlib
import io
import logging
import threading
from dataclasses import dataclass, field

import imagecodecs
import numpy as np
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from jfbnb import data

FORMATS = (*data.FORMATS, "AVIF")  # that Pillow may try
MAX_PIXELS = 2**28  # of a page, before it is decoded
MAX_SAMPLES = 2**31  # of all pages and their channels: 8 GiB in float32
TIFF, PNG = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\x89PNG\r\n\x1a\n"
TOO_LARGE = "it has too many pixels, over 2^28: cut it into parts"
# Tags of TIFF and EXIF. Description, maker, model, software, date, artist, copyright are texts.
DESCRIPTION, ORIENTATION, ICC = 270, 274, 34675
TEXTS = (DESCRIPTION, 271, 272, 305, 306, 315, 33432)
EXIF, GPS, INTEROP = 34665, 34853, 40965  # directories of further tags
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha that colours are multiplied by, or not

_pillows_limit = threading.Lock()

# They log damaged metadata; a program that wants to know of it can still add a handler.
for reader in ("tifffile", "imagecodecs"):
    logging.getLogger(reader).addHandler(logging.NullHandler())


@dataclass
class Metadata:
    """What a file has besides the numbers of its pixels.

    Attributes:
        icc: the colour profile.
        exif: of the upright picture: texts, and the directories of the camera and its GPS.
        resolution: along x and y, and its unit: 1 none, 2 inch, 3 cm.
        alpha_kind: as TIFF counts: 1 associated, 2 unassociated, 0 not specified.
    """

    icc: bytes | None = None
    exif: Image.Exif = field(default_factory=Image.Exif)
    resolution: tuple[float, float, int] | None = None
    alpha_kind: int = UNASSOCIATED


@dataclass
class Page:
    """One picture as in a file.

    Attributes:
        samples: (H, W, 1 to 4), grey or RGB, then alpha where there is one.
        orientation: 1 to 8, as in EXIF.
        notes: what was decided for the user.
    """

    samples: np.ndarray
    orientation: int = 1
    notes: list[str] = field(default_factory=list)
    metadata: Metadata = field(default_factory=Metadata)

    @property
    def colours(self) -> int:
        """3, or 1 for grey."""
        return 3 if self.samples.shape[2] > 2 else 1


def decode(content: bytes) -> list[Page]:
    """The pages of a TIFF, or the one picture of another file, upright."""
    if content.startswith(TIFF):
        pages = _read_tiff(content)
    elif content[4:8] == b"ftyp" and content[8:12] not in (b"avif", b"avis"):
        pages = [_read_heif(content)]
    else:
        pages = [_read_with_pillow(content)]
    for page in pages:
        _turn_upright(page)
    return pages


def _turn_upright(page: Page) -> None:
    turn, page.orientation = page.orientation, 1
    page.samples = page.samples[::-1 if turn in (3, 4, 6, 7) else 1,
                                ::-1 if turn in (2, 3, 7, 8) else 1]
    if turn in (5, 6, 7, 8):
        page.samples = page.samples.swapaxes(0, 1)
        if page.metadata.resolution:
            x, y, unit = page.metadata.resolution
            page.metadata.resolution = y, x, unit


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(TOO_LARGE)


def _open(content: bytes) -> Image.Image:
    """A picture of a size that can be decoded, but not decoded yet."""
    with _pillows_limit:  # on sizes, of which the whole process has but one, and a lower one
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, MAX_PIXELS // 2
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError as error:  # over twice its limit
            raise ValueError(TOO_LARGE) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _read_with_pillow(content: bytes) -> Page:
    with _open(content) as image:
        if content.startswith(PNG) and content[24] == 16:  # of which Pillow would make 8 bits
            samples = imagecodecs.png_decode(content)
            page = Page(samples.reshape(*samples.shape[:2], -1))
        else:
            page = _to_page(image)
        if image.format != "MPO" and getattr(image, "is_animated", False):
            page.notes.append(f"an animation of {image.n_frames} pictures: the first is taken")
        if image.mode != "CMYK":  # whose profile is that of the inks
            page.metadata.icc = image.info.get("icc_profile")
        page.metadata.resolution = _resolution(*image.info.get("dpi", (0, 0)), 2)
        with contextlib.suppress(Exception):  # of damaged EXIF Pillow raises all sorts
            exif = image.getexif()
            page.orientation = exif.get(ORIENTATION, 1)
            page.metadata.exif = _keep_true(exif)
    return page


def _to_page(image: Image.Image) -> Page:
    """The samples of a picture in any of Pillow's modes with 8 bits."""
    if image.mode[0] in "FI" or (image.format == "PPM" and image.tile[0].codec_name == "ppm"
                                 and image.tile[0].args[-1] > 255):
        raise ValueError("it has more than 8 bits in a format of which they are not read: save it "
                         "as a PNG or TIFF")
    image.load()
    alpha, notes = image.has_transparency_data, []
    if image.mode == "CMYK":
        notes.append("CMYK is turned to RGB")
        samples = np.array(_from_inks(image))
    elif image.mode in ("1", "L", "LA"):
        samples = np.array(image.convert("LA" if alpha and image.mode != "1" else "L"))
    else:
        samples = np.array(image.convert("RGBA" if alpha else "RGB"))
        if image.mode in ("P", "PA") and "icc_profile" not in image.info and np.all(
                samples[..., :1] == samples[..., 1:3]):
            samples = np.delete(samples, (1, 2), axis=2)  # a palette of greys
    return Page(samples.reshape(image.height, image.width, -1), notes=notes)


def _from_inks(image: Image.Image) -> Image.Image:
    """CMYK as sRGB, by its colour profile where that can be used."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"),
                                         outputMode="RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image.convert("RGB")


def _read_heif(content: bytes) -> Page:
    """A phone's HEIC; 10 and 12 bits become 16."""
    import pillow_heif  # slow to import, and needed here only

    if not pillow_heif.is_supported(content):
        raise UnidentifiedImageError
    image = pillow_heif.open_heif(content, convert_hdr_to_8bit=False)
    _check_size(*image.size)
    samples = np.array(image)  # upright
    page = Page(samples.reshape(*samples.shape[:2], -1))
    if len(image) > 1:
        page.notes.append(f"{len(image)} pictures in a file: the main one is taken")
    if image.premultiplied_alpha:
        page.metadata.alpha_kind = ASSOCIATED
    page.metadata.icc = image.info.get("icc_profile")
    with contextlib.suppress(Exception):
        exif = Image.Exif()
        exif.load(image.info["exif"])
        page.metadata.exif = _keep_true(exif)
    return page


def _resolution(x: float, y: float, unit: int) -> tuple[float, float, int] | None:
    """A `Metadata.resolution`, or None where a damaged file would have it infinite, or nothing."""
    x, y = float(x), float(y)
    return (x, y, unit) if 0 < x < 1e6 and 0 < y < 1e6 and unit in (1, 2, 3) else None


def _keep_true(exif: Image.Exif) -> Image.Exif:
    """What stays true of the upright picture: texts, and what the camera and its GPS wrote.

    Not the orientation, the thumbnail, nor how the pixels were stored.
    """
    def keep(value):
        # Pillow reads text as Latin-1, but writes it as ASCII.
        return value.encode("latin-1") if isinstance(value, str) and not value.isascii() else value

    kept = Image.Exif()
    kept.endian = exif.endian
    for tag in TEXTS:
        if isinstance(exif.get(tag), str):
            kept[tag] = keep(exif[tag])
    for tag in (EXIF, GPS):
        if directory := exif.get_ifd(tag):
            kept[tag] = {code: keep(value) for code, value in directory.items() if code != INTEROP}
    kept.tobytes()  # raises what would else be raised when it is written
    return kept


def _read_tiff(content: bytes) -> list[Page]:
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
        if not pages or content[8:10] == b"CR":  # Canon's
            raise ValueError("it looks like a camera's raw file: develop it into a TIFF or PNG")
        held = sum(page.size for page in pages)
        if held > MAX_SAMPLES:
            raise ValueError(f"its pages have over {MAX_SAMPLES} samples in all: cut it into parts")
        if (tif.is_imagej or tif.is_shaped) and sum(s.size for s in tif.series) > held:
            raise ValueError("it has one page for several pictures: save it with a page for each")
        return [_read_tiff_page(page, content) for page in pages]


def _check_page(page: tifffile.TiffPage, length: int) -> None:
    """Raise ValueError for a page that would fill memory, or come out black in part."""
    _check_size(page.imagewidth, page.imagelength)
    _check_size(page.tilewidth, page.tilelength)
    channels, planes, bits = page.samplesperpixel, page.imagedepth, page.bitspersample
    if planes > 1 or channels > 4 or not isinstance(bits, int):
        raise ValueError(f"{channels} channels and {planes} planes to a page: save it with one or "
                         "three channels of the same number of bits, one plane")
    plain = page.imagelength * (page.imagewidth * channels * bits // 8)
    parts = zip(page.dataoffsets, page.databytecounts, strict=True)
    if (len(page.dataoffsets) < np.prod(page.chunked) or (page.compression == 1 and plain > length)
            or not all(at and n and at + n <= length for at, n in parts)):
        raise ValueError("it is cut short, or parts of the picture were never written")


def _read_tiff_page(page: tifffile.TiffPage, content: bytes) -> Page:
    photometric = page.photometric.name
    if page.bitspersample >= 8 and photometric in ("MINISBLACK", "MINISWHITE", "RGB"):
        found = _read_plain_page(page)
    else:
        with _open(content) as image:  # Pillow knows the rest, and turns it upright by itself
            image.seek(page.index)
            found = _to_page(image)
    icc, x, y, unit = (page.tags.valueof(code) for code in (ICC, 282, 283, 296))
    if photometric != "SEPARATED" and isinstance(icc, bytes):  # not of inks, nor damaged
        found.metadata.icc = icc
    if isinstance(x, tuple) and isinstance(y, tuple) and x[1] and y[1]:  # fractions
        found.metadata.resolution = _resolution(x[0] / x[1], y[0] / y[1], int(unit or 2))
    with contextlib.suppress(Exception):
        exif = Image.Exif()
        exif.endian, exif.bigtiff = page.parent.byteorder, page.parent.is_bigtiff
        exif.load_from_fp(io.BytesIO(content), page.offset)
        if DESCRIPTION in exif and (page.is_shaped or page.is_imagej or page.is_ome):
            del exif[DESCRIPTION]  # a program's, of how the pages are stored
        found.metadata.exif = _keep_true(exif)
    return found


def _read_plain_page(page: tifffile.TiffPage) -> Page:
    """A page of plain numbers, in which high becomes light."""
    samples = page.asarray()
    if samples.dtype.kind not in "uif":
        raise ValueError(f"its numbers are of type {samples.dtype}: save it as integers or floats")
    if page.axes == "SYX":
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(*samples.shape[:2], -1)
    if page.photometric.name == "MINISWHITE" and samples.dtype.kind == "u":
        samples = samples.dtype.type(2**page.bitspersample - 1) - samples
    found = Page(samples, page.tags.valueof(ORIENTATION, default=1))
    if samples.shape[2] in (2, 4):
        found.metadata.alpha_kind = int(page.extrasamples[0]) if page.extrasamples else 0
        if found.metadata.alpha_kind not in (ASSOCIATED, UNASSOCIATED):
            found.notes.append("the last channel, of which the file does not say what it is, is "
                               "left as it is")
    return found
