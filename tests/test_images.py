"""Pictures in and out, against other readers and writers of the same formats."""

import io
import os
import struct

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import skimage.data
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps

from jfbnb.common import UserError
from jfbnb.photo.files import Picture, read_pictures, write_pictures

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RGB8 = skimage.data.coffee()[100:123, 200:231]
RGB16 = RGB8.astype(np.uint16) * 257 + np.arange(31, dtype=np.uint16)[:, None]
GREY8, GREY16 = RGB8[..., 0].copy(), RGB16[..., 0].copy()
RGB32 = RGB16.astype(np.float32) / 65535 / 3
RGBA8 = Image.fromarray(np.dstack([RGB8, GREY8]))
RGBA16 = np.dstack([RGB16, GREY16])
STACK = np.stack([GREY16 >> 9, GREY16 >> 4, GREY16 >> 5])
EXIF, GPS, ORIENTATION, COPYRIGHT = 0x8769, 0x8825, 0x0112, 0x8298


def stored(path) -> np.ndarray:
    """The numbers in a file, by another reader."""
    return (tifffile.imread(path) if path.suffix == ".tif"
            else imagecodecs.png_decode(path.read_bytes()))


def rewrite(path):
    """Read a file and write it again as it is; both, and the name written to."""
    pictures = read_pictures(path)
    target = path.with_name(f"out-{path.stem}{pictures[0].suffix}")
    write_pictures(target, pictures)
    for before, after in zip(pictures, read_pictures(target), strict=True):
        assert torch.equal(before.pixels, after.pixels) and before.dtype == after.dtype
    return pictures, target


def tiff(pixels, **options):
    photometric = "rgb" if pixels.shape[-1] in (3, 4) and pixels.ndim > 2 else "minisblack"
    return lambda path: tifffile.imwrite(path, pixels, **{"photometric": photometric, **options})


def png(pixels):
    return lambda path: path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))


def pillow(pixels, **options):
    return lambda path: Image.fromarray(pixels).save(path, **options)


def heic(pixels, **options):
    """Without loss, but for the change to YCbCr."""
    mode = "RGB" if pixels.dtype == np.uint8 else "RGB;16"
    height, width, _ = pixels.shape
    return lambda path: pillow_heif.from_bytes(mode, (width, height), pixels.tobytes()).save(
        path, quality=-1, chroma=444, **options)


def mode(name):
    """In one of Pillow's modes."""
    image = RGBA8 if name.endswith("A") else RGBA8.convert("RGB")
    return lambda path: image.convert(name).save(path)


LOSS = {"8.heic": 3, "16.heic": 400, "avif.heic": 4}  # of 16 bits a HEIC keeps 10
BLACK_OR_WHITE = (GREY8 > 90) * np.uint8(255)


@pytest.mark.parametrize(("name", "make", "pixels", "suffix"), [
    ("8.png", png(RGB8), RGB8, ".png"),
    ("greys.gif", pillow(GREY8), np.dstack([GREY8] * 3), ".png"),  # a palette is one of colours
    ("8.webp", pillow(RGB8, lossless=True), RGB8, ".png"),
    ("8.bmp", pillow(RGB8), RGB8, ".png"),
    ("1.png", pillow(GREY8 > 90), BLACK_OR_WHITE, ".png"),
    ("fax.tif", pillow(GREY8 > 90, compression="group4"), BLACK_OR_WHITE, ".png"),
    ("grey-alpha16.png", png(RGB16[..., :2]), RGB16[..., :2], ".png"),
    ("rgb-alpha16.png", png(RGBA16), RGBA16, ".png"),
    ("tiles.jpg", tiff(RGB16, tile=(16, 16)), RGB16, ".png"),  # whatever its name says
    ("strips.tif", tiff(RGB16, rowsperstrip=4, compression="lzw", predictor=True), RGB16, ".png"),
    ("12-bits.tif", tiff(GREY16 >> 4, bitspersample=12), GREY16 >> 4, ".png"),
    ("bigtiff.tif", tiff(RGB16, bigtiff=True, byteorder=">"), RGB16, ".png"),
    ("white-is-zero.tif", tiff(GREY8, photometric="miniswhite"), 255 - GREY8, ".png"),
    ("alpha.tif", tiff(RGBA16, extrasamples=["unassalpha"]), RGBA16, ".png"),
    ("int32.tif", tiff(RGB16.astype(np.int32) - 9), RGB16 - np.float32(9), ".tif"),
    ("dot.tif", tiff(RGB32[:1, :1]), RGB32[:1, :1], ".tif"),
    ("double.tif", tiff(RGB32.astype(float)), RGB32, ".tif"),
    ("float-to-255.tif", tiff(RGB32[..., 0] * 700), RGB32[..., 0] * 700, ".tif"),
    ("float-alpha.tif", tiff(np.dstack([RGB32, RGB32[..., 0]]), extrasamples=["unassalpha"]),
     np.dstack([RGB32, RGB32[..., 0]]), ".tif"),
    ("grey-alpha.png", mode("LA"), np.array(RGBA8.convert("LA")), ".png"),
    ("rgb-alpha.png", mode("RGBA"), np.array(RGBA8), ".png"),
    *((name, mode(name[:-4]), np.array(RGBA8.convert("RGB").convert(name[:-4]).convert("RGB")),
       ".png") for name in ("P.png", "P.tif", "YCbCr.tif")),
    ("8.heic", heic(RGB8), RGB8, ".png"), ("16.heic", heic(RGB16), RGB16, ".png"),
    ("avif.heic", pillow(RGB8, format="AVIF", quality=100, subsampling="4:4:4"), RGB8, ".png"),
])
def test_what_is_read_is_written_bit_for_bit(tmp_path, name, make, pixels, suffix):
    make(tmp_path / name)
    (picture,), target = rewrite(tmp_path / name)
    written, kept = stored(target), np.float32 if pixels.dtype.kind == "f" else pixels.dtype
    assert target.suffix == suffix
    assert written.dtype == kept and written.shape == pixels.shape
    assert np.abs(written.astype(float) - pixels).max() <= LOSS.get(name, 0)
    assert picture.pixels.shape == (3 if pixels.ndim > 2 and pixels.shape[2] > 2 else 1,
                                    *pixels.shape[:2])


# --- scale --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest", "white"), [
    (np.uint8, 9, 255), (np.uint16, 200, 255), (np.uint16, 256, 1023), (np.uint16, 4000, 4095),
    (np.uint16, 16383, 16383), (np.uint16, 16384, 65535), (np.uint16, 0, 65535),
])
def test_integers_are_scaled_by_the_bits_that_they_use(tmp_path, dtype, largest, white):
    pixels = np.array([[0, largest // 2, largest]], dtype)
    tiff(pixels)(tmp_path / "a.tif")
    picture, = read_pictures(tmp_path / "a.tif")
    assert picture.scale == (0, white)
    np.testing.assert_allclose(picture.pixels[0], pixels / white, rtol=1e-6)
    assert ("give the range" in picture.note) == (white != np.iinfo(dtype).max)
    chosen, = read_pictures(tmp_path / "a.tif", (10, 20))  # what the user says goes before all
    np.testing.assert_allclose(chosen.pixels[0], (pixels - 10.0) / 10, rtol=1e-6)
    assert not chosen.note
    write_pictures(tmp_path / "b.tif", [chosen])  # and nothing outside it is cut off
    np.testing.assert_allclose(stored(tmp_path / "b.tif"), pixels, rtol=1e-7)


@pytest.mark.parametrize(("low", "high", "scale"), [
    (0, 1, (0, 1)), (-0.02, 1.3, (0, 1)), (0, 0, (0, 1)), (0, 255, (0, 256)), (0, 20, (0, 32)),
    (0, 1e-3, (0, 2**-9)), (-1000, 3000, (-1000, 3096)), (-3, -3, (-3, -2)),
])
def test_floats_are_scaled_if_they_have_to_be(tmp_path, low, high, scale):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[low, high]], np.float32))
    picture, = read_pictures(tmp_path / "a.tif")
    assert picture.scale == scale and bool(picture.note) == (scale != (0, 1))


@pytest.mark.parametrize("bad", [(5, 1), (1, 1), (0, float("nan"))])
def test_a_range_that_is_none(bad):
    with pytest.raises(UserError, match="range"):
        read_pictures("never opened", bad)


@pytest.mark.parametrize(("pixels", "written"), [
    (np.array([[0, 9, 4095]], np.uint16), [[0, 2049, 4095]]),
    (np.array([[0, 9, 60000]], np.uint16), [[0, 32794, 65535]]),
    (np.array([[0, 0.5, 1]], np.float32), np.float32([[-0.1, 0.5004, 1.1]]).tolist())])
def test_integers_are_rounded_and_cut_off_and_floats_are_not(tmp_path, pixels, written):
    tiff(pixels)(tmp_path / "a.tif")
    picture, = read_pictures(tmp_path / "a.tif")
    write_pictures(tmp_path / "b.tif",
                   [picture.with_pixels(torch.tensor([[[-0.1, 0.5004, 1.1]]]))])
    assert stored(tmp_path / "b.tif").tolist() == written


# --- what else is in a file -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_and_to_alpha_too(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    makers = {"a.png": pillow(np.dstack([RGB8, GREY8]), exif=exif),
              "a.jpg": pillow(RGB8, exif=exif), "a.avif": pillow(RGB8, exif=exif),
              "a.heic": heic(RGB8, exif=exif.tobytes()),
              "palette.tif": lambda path: Image.fromarray(RGB8).quantize().save(path, exif=exif),
              "a.tif": tiff(GREY16, extratags=[(ORIENTATION, 3, 1, orientation, True)])}
    for name, make in makers.items():
        make(tmp_path / name)
        _, target = rewrite(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        with (Image.fromarray(RGB8) if name == "a.heic" else
              Image.open(io.BytesIO(content))) as image:  # by name Pillow garbles such a TIFF
            if name == "a.heic":
                image.getexif()[ORIENTATION] = orientation
            expected = ImageOps.exif_transpose(image)
        expected = np.array(expected.convert("RGB") if expected.mode == "P" else expected)
        assert stored(target).shape == expected.shape
        assert np.abs(stored(target).astype(int) - expected).max() <= (3 if name == "a.heic" else 0)
        with Image.open(target) as image:
            assert ORIENTATION not in image.getexif()


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png", "grey16.png", "a.tif", "float.tif",
                                  "a.avif", "a.heic", "stack.tif"])
@pytest.mark.parametrize("byteorder", "<>")
def test_profile_and_exif_are_kept(tmp_path, name, byteorder):
    pixels = {"grey16.png": GREY16, "float.tif": RGB32[..., 0]}.get(name, RGB8)
    exif = Image.Exif()
    exif.endian = byteorder
    exif[ORIENTATION], exif[0x010F], exif[COPYRIGHT] = 6, "Maker", "© Jörg".encode()
    exif[EXIF] = {33434: 0.004, 34855: 400, 36867: "2020:01:02 03:04:05"}
    exif[GPS] = {1: "N", 2: (10.0, 20.0, 30.5)}
    data = exif.tobytes()
    exif.load(data)
    options = {"exif": data, "icc_profile": SRGB}
    if name == "stack.tif":
        options |= {"save_all": True, "append_images": [Image.fromarray(pixels)]}
    (heic if name == "a.heic" else pillow)(pixels, **options)(tmp_path / name)
    pictures, target = rewrite(tmp_path / name)
    write_pictures(tmp_path / "all.tif", pictures)
    for written in (target, tmp_path / "all.tif"):
        with Image.open(written) as image:
            image.load()
            assert image.size == pixels.shape[:2] and image.info["icc_profile"] == SRGB
            kept = image.getexif()
            assert ORIENTATION not in kept  # it was turned
            if not name.endswith("tif") and written == target:
                assert kept[0x010F] == "Maker"
                if name != "a.avif":  # where Pillow spoils it
                    assert kept[COPYRIGHT] == exif[COPYRIGHT]
                for directory in (EXIF, GPS):
                    assert kept.get_ifd(directory) == exif.get_ifd(directory) != {}


@pytest.mark.parametrize("exif", [
    b"junk", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff",
    struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, 0x010F, 2, 99, 8, 0)])
def test_damaged_exif_is_left_out(tmp_path, exif):
    pillow(RGB8, exif=b"Exif\0\0" + exif)(tmp_path / "a.jpg")
    (picture,), _ = rewrite(tmp_path / "a.jpg")
    assert not picture.exif


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif"])
def test_the_first_of_an_animation_is_taken_with_a_word(tmp_path, name):
    first, second = Image.fromarray(RGB8), Image.fromarray(255 - RGB8)
    first.save(tmp_path / name, save_all=True, append_images=[second])
    picture, = read_pictures(tmp_path / name)
    assert "first" in picture.note
    difference = picture.pixels.permute(1, 2, 0).numpy() - RGB8 / 255
    assert np.abs(difference).mean() < 0.04  # a GIF has 256 colours


@pytest.mark.parametrize("shape", [(21, 33), (23, 31), (25, 28), (1, 1)])
def test_alpha_follows_a_change_of_size(shape):
    alpha = np.arange(23 * 31).reshape(23, 31)
    picture = Picture(torch.zeros(3, 23, 31), np.dtype(np.uint16), (0, 1), (0, 1), alpha=alpha)
    changed = picture.with_pixels(torch.zeros(3, *shape))
    assert changed.alpha.shape == shape
    assert changed.alpha[shape[0] // 2, shape[1] // 2] == alpha[11, 15]
    if shape == (25, 28):
        assert changed.alpha[0, 0] == changed.alpha[1, 0] == alpha[0, 1]
    with pytest.raises(ValueError):
        picture.with_pixels(torch.zeros(1, *shape))


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"bigtiff": True}, {"ome": True},
                                     {"imagej": True}])
@pytest.mark.parametrize("colour", [False, True])
def test_every_page_of_a_stack(tmp_path, options, colour):
    stack = np.stack([RGB8, 255 - RGB8]) if colour else STACK
    tiff(stack, **options)(tmp_path / "a.tif")
    pictures, target = rewrite(tmp_path / "a.tif")
    assert len(pictures) == len(stack) and target.suffix == ".tif"
    with tifffile.TiffFile(target) as tif:
        assert np.array_equal(tif.asarray(), stack)
        assert not any(270 in page.tags for page in tif.pages)  # a description of what was
    if not colour:  # one scale for all, or the darkest page would be as light as the others
        assert {picture.scale for picture in pictures} == {(0, 4095)}
        assert [bool(picture.note) for picture in pictures] == [True, False, False]


def test_pages_may_differ_in_size_and_thumbnails_are_no_pages(tmp_path):
    pages = [GREY16, RGB16, GREY16[:, :5] >> 6]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for page in pages:
            tif.write(page, photometric="rgb" if page.ndim == 3 else "minisblack", metadata=None)
        tif.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    _, target = rewrite(tmp_path / "a.tif")
    with tifffile.TiffFile(target) as tif:
        assert all(np.array_equal(page.asarray(), pixels)
                   for page, pixels in zip(tif.pages, pages, strict=True))


# --- what is no picture -----------------------------------------------------------------------


def refuse(path, words=""):
    with pytest.raises(UserError) as error:
        read_pictures(path)
    assert str(error.value).startswith("cannot read the image") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "make"), [
    ("a.jpg", pillow(np.tile(RGB8, (9, 9, 1)))), ("8.png", png(RGB8)), ("16.png", png(RGB16)),
    ("a.webp", pillow(RGB8)), ("a.avif", pillow(RGB8)), ("a.heic", heic(RGB8)),
    ("lzw.tif", tiff(RGB16, compression="lzw", rowsperstrip=4)), ("tiles.tif", tiff(
        RGB16, tile=(16, 16))),
])
@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9])
def test_part_of_a_file(tmp_path, name, make, part):
    make(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    refuse(io.BytesIO(content[:int(part * len(content))]), "" if part else "its format is not")


def test_no_pictures(tmp_path):
    refuse(tmp_path / "nowhere.png", "nowhere.png: No such file")
    refuse(io.BytesIO(b"<html>"), "its format is not")
    refuse(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "its format is not")
    refuse(tmp_path, "not a file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        refuse(tmp_path / "pipe.png", "not a file")  # and does not wait for it


@pytest.mark.parametrize(("make", "words"), [
    (tiff(np.where(RGB32 > 0.2, np.nan, RGB32)), "finite"),
    (tiff(RGB32 * np.float64(1e300)), "finite"),  # float64, and no float32
    (tiff(GREY16.astype(complex)), "complex"),
    (tiff(GREY16, photometric="miniswhite"), "mode I;16"),
    (tiff(np.moveaxis(RGB16, 2, 0), photometric="rgb", planarconfig="separate"), "save each page"),
    (tiff(np.dstack([RGB16] * 2), photometric="minisblack", planarconfig="contig"), "6 channels"),
    (tiff(RGBA16, extrasamples=["unspecified"]), "not plain alpha"),
    (tiff(RGBA16, extrasamples=["assocalpha"]), "not plain alpha"),
    (tiff(RGB8, subfiletype=1, metadata=None), "raw file"),
    (tiff(STACK, imagej=True, truncate=True), "a page for each"),
    (tiff(STACK, truncate=True), "a page for each"),
    (tiff(GREY16, photometric="cfa"), "mosaic"),
    (tiff(RGB8, photometric="cielab"), "mode LAB: save it in"),
    (lambda path: Image.fromarray(RGB8).convert("CMYK").save(path), "mode CMYK: save it in"),
    (lambda path: Image.fromarray(RGB8).convert("CMYK").save(path, "JPEG"), "mode CMYK"),
    (pillow(RGB8, format="TIFF", save_all=True, append_images=[Image.fromarray(GREY16)]),
     "different types"),
])
def test_what_is_refused(tmp_path, make, words):
    make(tmp_path / "a.tif")
    refuse(tmp_path / "a.tif", words)


@pytest.mark.parametrize(("make", "tag", "value", "words"), [
    (tiff(GREY16), 257, 2**20, "truncated"),  # more rows than there are strips
    (pillow(GREY8 > 90), 257, 2**20, "truncated"),
    (tiff(GREY16), 256, 2**20, ""),  # wider than there are bytes
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 273, 0, "truncated"),  # never written
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 279, 0, "truncated"),
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 273, 2**20, ""),  # elsewhere
    (tiff(GREY16), 257, 2**30, "too many"),
])
def test_nothing_is_filled_with_black(tmp_path, make, tag, value, words):
    make(tmp_path / "a.tif")
    content = bytearray((tmp_path / "a.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "a.tif") as tif:
        struct.pack_into("<I", content, tif.pages[0].tags[tag].valueoffset, value)
    refuse(io.BytesIO(content), words)


@pytest.mark.parametrize(("name", "make"), [
    ("16.png", png(RGB16)), ("8.jpg", pillow(RGB8)), ("8.heic", heic(RGB8)), ("8.tif", tiff(RGB8))])
def test_too_large(tmp_path, monkeypatch, name, make):
    make(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY8.size / 2 + 1)  # Pillow's warns from half
    assert len(read_pictures(tmp_path / name)) == 1
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY8.size / 2 - 1)
    refuse(tmp_path / name, "too many")


def test_what_cannot_be_written(tmp_path):
    tiff(STACK / np.float32(65535))(tmp_path / "a.tif")
    pictures = read_pictures(tmp_path / "a.tif")
    target = tmp_path / "b.png"
    target.write_bytes(b"before")
    for several in (pictures, pictures[:1]):  # more than one; floats
        with pytest.raises(UserError, match=r"ends in \.tif"):
            write_pictures(target, several)
    with pytest.raises(UserError, match=r"ends in \.tif"):
        write_pictures(tmp_path / "b.jpg", pictures)
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "b.png"]
