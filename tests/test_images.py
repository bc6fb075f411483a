import io
import os
import random
import struct

import imagecodecs
import numpy as np
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
EXIF, GPS, MAKER_NOTE = 0x8769, 0x8825, 0x927C


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


def raw(header, pixels):
    return lambda path: path.write_bytes(header + pixels.astype(pixels.dtype.newbyteorder(">"))
                                         .tobytes())


@pytest.mark.parametrize(("name", "make", "pixels", "suffix"), [
    ("8.png", png(RGB8), RGB8, ".png"),
    ("grey8.png", png(GREY8), GREY8, ".png"),
    ("grey8.bmp", pillow(GREY8), GREY8, ".png"),
    ("grey8.gif", pillow(GREY8), GREY8, ".png"),
    ("8.webp", pillow(RGB8, lossless=True), RGB8, ".png"),
    ("8.ppm", raw(b"P6 31 23 255\n", RGB8), RGB8, ".png"),
    ("1.png", pillow(GREY8 > 90), (GREY8 > 90) * np.uint8(255), ".png"),
    ("fax.tif", pillow(GREY8 > 90, compression="group4"), (GREY8 > 90) * np.uint8(255), ".png"),
    ("16.png", png(RGB16), RGB16, ".png"),
    ("grey16.png", png(GREY16), GREY16, ".png"),
    ("grey-alpha16.png", png(RGB16[..., :2]), RGB16[..., :2], ".png"),
    ("rgb-alpha16.png", png(np.dstack([RGB16, GREY16])), np.dstack([RGB16, GREY16]), ".png"),
    ("16.ppm", raw(b"P6\n# dcraw\n31 23\n65535\n", RGB16), RGB16, ".png"),
    ("16.tif", tiff(RGB16), RGB16, ".png"),
    ("big-endian.tif", tiff(RGB16, byteorder=">"), RGB16, ".png"),
    ("planes.tif", tiff(np.moveaxis(RGB16, 2, 0), photometric="rgb", planarconfig="separate"),
     RGB16, ".png"),
    ("tiles.tif", tiff(RGB16, tile=(16, 16)), RGB16, ".png"),
    ("strips.tif", tiff(RGB16, rowsperstrip=4, compression="lzw", predictor=True), RGB16, ".png"),
    ("zstd.tif", tiff(RGB16, compression="zstd"), RGB16, ".png"),
    ("bigtiff.tif", tiff(RGB16, bigtiff=True), RGB16, ".png"),
    ("a-tiff-named.jpg", tiff(RGB16), RGB16, ".png"),
    ("white-is-zero.tif", tiff(GREY16, photometric="miniswhite"), 65535 - GREY16, ".png"),
    ("alpha.tif", tiff(np.dstack([RGB16, GREY16]), extrasamples=["unassalpha"]),
     np.dstack([RGB16, GREY16]), ".png"),
    ("int8.tif", tiff((GREY8 >> 1).astype(np.int8)), (GREY8 >> 1).astype(np.int8), ".tif"),
    ("int16.tif", tiff(GREY16.astype(np.int32).astype(np.int16)), GREY16.astype(np.int16), ".tif"),
    ("int32.tif", tiff(GREY8.astype(np.int32)), GREY8.astype(np.int32), ".tif"),
    ("uint32.tif", tiff(RGB16.astype(np.uint32) * 250), RGB16.astype(np.uint32) * 250, ".tif"),
    ("float.tif", tiff(RGB32), RGB32, ".tif"),
    ("grey-float.tif", tiff(RGB32[..., 0]), RGB32[..., 0], ".tif"),
    ("big-endian-float.tif", tiff(RGB32, byteorder=">"), RGB32, ".tif"),
    ("float-to-255.tif", tiff(RGB32 * 700), RGB32 * 700, ".tif"),
    ("faint-float.tif", tiff(RGB32 / 3000), RGB32 / 3000, ".tif"),
    ("float-alpha.tif", tiff(np.dstack([RGB32, RGB32[..., 0]]), extrasamples=["unassalpha"]),
     np.dstack([RGB32, RGB32[..., 0]]), ".tif"),
    ("half.tif", tiff(RGB32.astype(np.float16)), RGB32.astype(np.float16), ".tif"),
    ("double.tif", tiff(RGB32.astype(float)), RGB32, ".tif"),
    ("dot.png", png(GREY16[:1, :1]), GREY16[:1, :1], ".png"),
    ("dot.tif", tiff(RGB32[:1, :1]), RGB32[:1, :1], ".tif"),
    ("row.tif", tiff(GREY16[:1]), GREY16[:1], ".png"),
    ("column.tif", tiff(RGB32[:, :1]), RGB32[:, :1], ".tif"),
])
def test_what_is_read_is_written_bit_for_bit(tmp_path, name, make, pixels, suffix):
    make(tmp_path / name)
    (picture,), target = rewrite(tmp_path / name)
    assert target.suffix == suffix
    written = stored(target)
    kept = np.float32 if pixels.dtype.kind == "f" else pixels.dtype
    assert written.dtype == kept and np.array_equal(written, pixels)
    if picture.alpha is not None and suffix == ".tif":
        with tifffile.TiffFile(target) as tif:
            assert tif.pages[0].extrasamples == (2,)
    assert picture.pixels.shape == (3 if pixels.ndim > 2 and pixels.shape[2] > 2 else 1,
                                    *pixels.shape[:2])


@pytest.mark.parametrize(("dtype", "largest", "white"), [
    (np.uint8, 9, 255), (np.uint16, 200, 255), (np.uint16, 256, 1023), (np.uint16, 1023, 1023),
    (np.uint16, 4000, 4095), (np.uint16, 16383, 16383), (np.uint16, 16384, 65535),
    (np.uint16, 65535, 65535), (np.uint16, 0, 65535), (np.int16, 20000, 32767),
    (np.int32, 255, 255), (np.uint32, 70000, 2**18 - 1), (np.uint32, 2**32 - 1, 2**32 - 1),
])
def test_integers_are_scaled_by_the_bits_that_they_use(tmp_path, dtype, largest, white):
    pixels = np.array([[0, largest // 2, largest]], dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
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


def test_pixels_have_black_at_0_and_white_at_1(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[-100, 0, 300]], np.int16))
    picture, = read_pictures(tmp_path / "a.tif")
    assert picture.pixels.tolist() == [[[0, 0.25, 1]]] and "-100 to 300" in picture.note
    for bad in ((5, 1), (1, 1), (0, float("nan"))):
        with pytest.raises(UserError, match="range"):
            read_pictures(tmp_path / "a.tif", bad)


def test_packed_bits_are_spread_over_their_type(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY16 >> 4, bitspersample=12, photometric="minisblack")
    _, target = rewrite(tmp_path / "a.tif")
    assert np.abs(stored(target) / 65535 - (GREY16 >> 4) / 4095).max() < 1e-5


def test_integers_are_rounded_and_cut_off_and_floats_are_not(tmp_path):
    def write(pixels, values):
        tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
        picture = read_pictures(tmp_path / "a.tif")[0].with_pixels(torch.tensor([[values]]))
        write_pictures(tmp_path / "b.tif", [picture])
        return stored(tmp_path / "b.tif").tolist()

    values = [-0.1, 0.5004, 1.1]
    assert write(np.array([[0, 9, 4095]], np.uint16), values) == [[0, 2049, 4095]]
    assert write(np.array([[0, 9, 60000]], np.uint16), values) == [[0, 32794, 65535]]
    assert write(np.array([[0, 0.5, 1]], np.float32), values) == np.float32([values]).tolist()


# --- what else is in a file -------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once_and_to_alpha_too(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.dstack([RGB8, GREY8])).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=exif)
    for name in ("a.png", "a.jpg"):
        _, target = rewrite(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            expected = np.array(ImageOps.exif_transpose(image))
        assert np.array_equal(stored(target), expected)
        with Image.open(target) as image:
            assert image.getexif()[0x0112] == 1
    for pixels in (GREY8, GREY16):  # which Pillow garbles if it opens them by name
        tifffile.imwrite(tmp_path / "b.tif", pixels, extratags=[(274, 3, 1, orientation, True)])
        _, target = rewrite(tmp_path / "b.tif")
        with Image.open(io.BytesIO((tmp_path / "b.tif").read_bytes())) as image:
            assert np.array_equal(stored(target), np.array(image))
    write_pictures(tmp_path / "b2.tif", read_pictures(tmp_path / "b.tif"))
    assert np.array_equal(stored(tmp_path / "b2.tif"), stored(target))


def camera_exif(byteorder: str) -> Image.Exif:
    exif = Image.Exif()
    exif.endian = byteorder
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif[EXIF] = {33434: 0.004, 34855: 400, MAKER_NOTE: b"NOTE\0\1\2", 36867: "2020:01:02 03:04:05"}
    exif[GPS] = {1: "N", 2: (10.0, 20.0, 30.5)}
    loaded = Image.Exif()
    loaded.load(exif.tobytes())
    return loaded


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.png", "grey16.png", "a.tif", "float.tif"])
@pytest.mark.parametrize("byteorder", "<>")
def test_profile_exif_and_resolution_are_kept(tmp_path, name, byteorder):
    pixels = {"grey16.png": GREY16, "float.tif": RGB32[..., 0]}.get(name, RGB8)
    exif = camera_exif(byteorder)
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, icc_profile=SRGB, dpi=(300, 200))
    _, target = rewrite(tmp_path / name)
    with Image.open(target) as image:
        image.load()
        kept = image.getexif()
        assert image.size == pixels.shape[:2] and kept.get(0x0112, 1) == 1  # it was turned
        assert kept[0x010F] == "Maker" and image.info["icc_profile"] == SRGB
        for directory in (EXIF, GPS):
            assert kept.get_ifd(directory) == exif.get_ifd(directory) != {}
        if name != "a.webp":  # it has no place for it
            assert image.info["dpi"] == pytest.approx((200, 300), rel=1e-5)


def test_exif_is_kept_byte_for_byte(tmp_path):
    exif = camera_exif(">")
    exif[0x0112] = 1
    Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=exif)
    (picture,), target = rewrite(tmp_path / "a.jpg")
    assert picture.exif == exif.tobytes()[6:]
    with Image.open(target) as image:
        image.load()
        assert image.info["exif"] == exif.tobytes()
    write_pictures(tmp_path / "b.tif", [picture])  # and in TIFF's own way, which is another
    with tifffile.TiffFile(tmp_path / "b.tif") as tif:
        assert tif.pages[0].tags[EXIF].value["MakerNote"] == b"NOTE\0\1\2"
        assert tif.pages[0].tags[GPS].value["GPSLatitude"] == (10, 1, 20, 1, 61, 2)


def test_types_of_a_tiffs_tags_are_kept(tmp_path):
    """Of numbers that a looser reader takes for others: geographic ones here."""
    tags = [(33550, 12, 3, (0.5, 0.5, 0.0), True), (315, 2, 3, "me", True),
            (34737, 2, 7, "wgs|84", True)]
    tifffile.imwrite(tmp_path / "a.tif", RGB32, photometric="rgb", byteorder=">", extratags=tags,
                     resolution=((1, 3), (10000, 254)), resolutionunit=3)
    _, target = rewrite(tmp_path / "a.tif")
    with tifffile.TiffFile(target) as tif:
        kept = {tag.code: tag for tag in tif.pages[0].tags}
        assert [(code, int(kept[code].dtype), kept[code].count, kept[code].value)
                for code, *_ in tags] == [tag[:4] for tag in tags]
        assert all(tag.valueoffset % 2 == 0 for tag in kept.values())
        assert kept[282].value == (1, 3) and kept[283].value == (5000, 127)
        assert kept[296].value == 3


def test_colour_of_a_png_is_kept(tmp_path):
    chunks = {b"gAMA": struct.pack(">I", 100000), b"pHYs": struct.pack(">IIB", 11811, 5000, 1)}
    for pixels in (RGB8, RGB16):
        content = imagecodecs.png_encode(pixels)
        added = b"".join(struct.pack(">I", len(data)) + name + data
                         + struct.pack(">I", imagecodecs.zlib_crc32(name + data))
                         for name, data in chunks.items())
        (tmp_path / "a.png").write_bytes(content[:33] + added + content[33:])
        _, target = rewrite(tmp_path / "a.png")
        written = target.read_bytes()
        assert all(struct.pack(">I", len(data)) + name + data in written
                   for name, data in chunks.items())
        with Image.open(target) as image:  # which checks the sums
            image.load()


def test_a_thumbnail_that_still_lies_is_cut_off(tmp_path):
    for orientation, place in ((6, 0), (1, 26)):
        exif = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 26)
        exif += struct.pack("<HI", 0, 0)  # the thumbnail's directory, empty
        Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
        kept = read_pictures(tmp_path / "a.jpg")[0].exif
        assert kept == exif[:18] + struct.pack("<HHI", 1, 0, place) + exif[26:]


def test_damaged_exif_is_left_out(tmp_path):
    for exif in (b"junk", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
        assert read_pictures(tmp_path / "a.jpg")[0].exif is None
    # Deeper damage is kept in a PNG, whose EXIF is the same bytes; a TIFF's has to be understood.
    for tag in ((EXIF, 4, 1, 8), (0x010F, 2, 99, 8)):  # in itself; behind the end
        exif = struct.pack("<2sHIHHHIII", b"II", 42, 8, 1, *tag, 0)
        Image.fromarray(RGB8).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
        (picture,), _ = rewrite(tmp_path / "a.jpg")
        assert picture.exif == exif
        write_pictures(tmp_path / "b.tif", [picture.with_pixels(picture.pixels[:, 1:])])
        with tifffile.TiffFile(tmp_path / "b.tif") as tif:
            assert tag[0] not in tif.pages[0].tags


@pytest.mark.parametrize(("mode", "name", "channels", "alpha"), [
    ("RGBA", "a.png", 3, True), ("LA", "a.png", 1, True), ("P", "a.png", 3, False),
    ("P", "a.tif", 3, False), ("YCbCr", "a.tif", 3, False), ("CMYK", "a.tif", 3, False),
    ("CMYK", "a.jpg", 3, False),
])
def test_pillows_modes(tmp_path, mode, name, channels, alpha):
    image = Image.fromarray(np.dstack([RGB8, GREY8] if alpha else [RGB8])).convert(mode)
    path = tmp_path / name
    image.save(path, **({"icc_profile": SRGB} if mode == "CMYK" else {}))
    (picture,), target = rewrite(path)
    assert len(picture.pixels) == channels and (picture.alpha is not None) == alpha
    with Image.open(path) as image:
        expected = image.convert(mode if alpha else "RGB")
    assert np.array_equal(stored(target), np.array(expected))
    assert ("CMYK" in picture.note) == (mode == "CMYK")
    if mode == "CMYK":  # a profile of another kind is no use, and none of the result's
        assert picture.icc is None


def test_a_transparent_colour_becomes_alpha(tmp_path):
    Image.fromarray(GREY8).save(tmp_path / "a.png", transparency=int(GREY8[0, 0]))
    picture, = read_pictures(tmp_path / "a.png")
    assert np.array_equal(picture.alpha > 0, GREY8[0, 0] != GREY8)
    Image.fromarray(RGB8).quantize(9).save(tmp_path / "b.png", transparency=3)
    assert 0 in read_pictures(tmp_path / "b.png")[0].alpha


def test_colours_multiplied_by_alpha_are_divided(tmp_path):
    alpha = np.full_like(GREY16, 65535)
    alpha[:9], alpha[0, :5] = 20000, 0
    multiplied = np.rint(RGB16 * (alpha / 65535)[..., None]).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.dstack([multiplied, alpha]), photometric="rgb",
                     extrasamples=["assocalpha"])
    _, target = rewrite(tmp_path / "a.tif")
    difference = np.abs(stored(target)[..., :3].astype(int) - RGB16)[alpha > 0]
    assert difference.max() <= 2 and np.array_equal(stored(target)[..., 3], alpha)


def test_a_channel_that_is_not_alpha_does_not_become_it(tmp_path):
    pixels = np.dstack([RGB16, GREY16])  # near infrared, a selection, ...
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unspecified"])
    (picture,), target = rewrite(tmp_path / "a.tif")
    assert "last channel" in picture.note and target.suffix == ".tif"
    with tifffile.TiffFile(target) as tif:
        assert np.array_equal(tif.asarray(), pixels) and tif.pages[0].extrasamples == (0,)
    with pytest.raises(UserError, match=r"\.tif"):
        write_pictures(tmp_path / "b.png", [picture])


def test_the_first_of_an_animation_is_taken_with_a_word(tmp_path):
    first, second = Image.fromarray(RGB8), Image.fromarray(255 - RGB8)
    for name, options in (("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})):
        first.save(tmp_path / name, save_all=True, append_images=[second], **options)
        picture, = read_pictures(tmp_path / name)
        assert "first" in picture.note
        # A GIF has 256 colours.
        assert (picture.pixels.permute(1, 2, 0).numpy() * 255 - RGB8).max() < (9 if "gif" in name
                                                                              else 0.01)


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


# --- stacks -----------------------------------------------------------------------------------

STACK = np.stack([GREY16 >> 9, GREY16 >> 4, GREY16 >> 5])


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"bigtiff": True}, {"ome": True},
                                     {"truncate": True}, {"imagej": True},
                                     {"imagej": True, "truncate": True}])
@pytest.mark.parametrize("colour", [False, True])
def test_every_page_of_a_stack(tmp_path, options, colour):
    stack = np.stack([RGB8, 255 - RGB8]) if colour else STACK
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="rgb" if colour else "minisblack",
                     **options)
    pictures, target = rewrite(tmp_path / "a.tif")
    assert len(pictures) == len(stack) and target.suffix == ".tif"
    assert np.array_equal(stored(target), stack)
    with tifffile.TiffFile(target) as tif:
        assert not tif.is_shaped and not any(270 in page.tags for page in tif.pages[1:])
    if not colour:  # one scale for all, or the darkest page would be as light as the others
        assert {picture.scale for picture in pictures} == {(0, 4095)}
        assert [bool(picture.note) for picture in pictures] == [True, False, False]


@pytest.mark.parametrize("byteorder", "<>")
def test_an_imagej_stack_stays_one(tmp_path, byteorder):
    tifffile.imwrite(tmp_path / "a.tif", STACK, imagej=True, byteorder=byteorder,
                     resolution=(9.5, 9.5), metadata={
                         "axes": "ZYX", "unit": "um", "spacing": 2.5, "Labels": ["a", "b", "c"]})
    _, target = rewrite(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(target) as after:
        assert after.imagej_metadata == before.imagej_metadata
        assert after.series[0].axes == "ZYX" and after.pages[0].tags[282].value == (19, 2)
        places = [page.dataoffsets[0] for page in after.pages]  # ImageJ asks for the first alone
        assert np.all(np.diff(places) == STACK[0].nbytes)


def test_tifffiles_description_of_the_shape_is_not_kept(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    pictures, target = rewrite(tmp_path / "a.tif")
    write_pictures(target, [p.with_pixels(p.pixels[:, :, 3:]) for p in pictures])
    assert np.array_equal(stored(target), STACK[:, :, 3:])
    assert not caplog.records  # in which tifffile would say that it is wrong


def test_a_microscopes_description_goes_where_the_size_changes(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, ome=True, metadata={"axes": "ZYX",
                                                                    "PhysicalSizeX": 0.3})
    pictures, target = rewrite(tmp_path / "a.tif")
    with tifffile.TiffFile(target) as tif:
        assert "PhysicalSizeX" in tif.ome_metadata and tif.series[0].axes == "ZYX"
    write_pictures(target, [p.with_pixels(p.pixels[:, 2:-2]) for p in pictures])
    with tifffile.TiffFile(target) as tif:
        assert not tif.is_ome and tif.asarray().shape == (3, 19, 31)


def test_pages_may_differ_and_thumbnails_are_no_pages(tmp_path):
    pages = [GREY16, RGB8, RGB32[:9], GREY16[:, :5] >> 6]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for i, page in enumerate(pages):
            tif.write(page, photometric="rgb" if page.ndim == 3 else "minisblack", metadata=None,
                      extratags=[(285, 2, 2, str(i), True)])
        tif.write(RGB8[::2, ::2], photometric="rgb", subfiletype=1, metadata=None)
    pictures, target = rewrite(tmp_path / "a.tif")
    assert len(pictures) == 4
    with tifffile.TiffFile(target) as tif:
        assert all(np.array_equal(page.asarray(), pixels) and page.tags[285].value == str(i)
                   for i, (page, pixels) in enumerate(zip(tif.pages, pages, strict=True)))


def test_pillow_reads_what_is_written(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack", byteorder=">",
                     metadata=None)
    _, target = rewrite(tmp_path / "a.tif")
    with Image.open(target) as image:
        assert image.n_frames == 3
        for i, page in enumerate(STACK):
            image.seek(i)
            assert np.array_equal(np.array(image), page)


# --- what is no picture -----------------------------------------------------------------------


def refuse(path, words=""):
    with pytest.raises(UserError) as error:
        read_pictures(path)
    assert str(error.value).startswith("cannot read the image") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "make"), [
    ("a.jpg", pillow(np.tile(RGB8, (9, 9, 1)))), ("8.png", png(RGB8)), ("16.png", png(RGB16)),
    ("a.bmp", pillow(RGB8)), ("a.webp", pillow(RGB8)), ("a.tif", tiff(RGB16)),
    ("lzw.tif", tiff(RGB16, compression="lzw", rowsperstrip=4)), ("tiles.tif", tiff(
        RGB16, tile=(16, 16))), ("float.tif", tiff(RGB32)), ("16.ppm", raw(
            b"P6 31 23 65535\n", RGB16)),
])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_half_a_file(tmp_path, name, make, part):
    make(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:int(part * len(content))])
    refuse(tmp_path / name)


def small_tiff(following, before):
    """A picture of one pixel; where its next page is said to be, and what is before its tags."""
    tags = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 1}
    tags[273] = 8 + len(before) + 2 + 12 * len(tags) + 4
    return io.BytesIO(struct.pack("<4sI", b"II*", 8 + len(before)) + before
                      + struct.pack("<H", len(tags))
                      + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags.items())
                      + struct.pack("<IB", following, 200))


def test_no_pictures(tmp_path):
    refuse(tmp_path / "nowhere.png", "nowhere.png: No such file")
    (tmp_path / "empty.png").touch()
    refuse(tmp_path / "empty.png", "empty")
    (tmp_path / "page.jpg").write_text("<html>")
    refuse(tmp_path / "page.jpg", "known formats")
    refuse(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "known formats")
    refuse(small_tiff(0, b"CR\2\0----"), "raw file")
    assert len(read_pictures(small_tiff(0, b"anything"))) == 1
    refuse(tmp_path, "no file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        refuse(tmp_path / "pipe.png", "no file")  # and does not wait for it


@pytest.mark.parametrize(("pixels", "options", "words"), [
    (np.where(RGB32 > 0.2, np.nan, RGB32), {}, "finite"), (RGB32 - np.inf, {}, "finite"),
    (RGB32 * np.float64(1e300), {}, "finite"),  # float64, and no float32
    (GREY16.astype(complex), {}, "complex"), (GREY16.astype(np.uint64) << 45, {}, "2^53"),
    (np.dstack([RGB16] * 2), {"photometric": "minisblack", "planarconfig": "contig"}, "channels"),
    (RGB8, {"subfiletype": 1, "metadata": None}, "raw file"),
])
def test_tiffs_that_are_refused(tmp_path, pixels, options, words):
    tiff(pixels, **options)(tmp_path / "a.tif")
    refuse(tmp_path / "a.tif", words)


def change_tag(make, folder, code, value):
    """The content of a TIFF in which a tag has another value."""
    make(folder / "a.tif")
    content = bytearray((folder / "a.tif").read_bytes())
    with tifffile.TiffFile(folder / "a.tif") as tif:
        place = tif.pages[0].tags[code].valueoffset
    struct.pack_into("<I", content, place, value)
    return bytes(content)


@pytest.mark.parametrize(("make", "tag", "value"), [
    (tiff(GREY16), 257, 2**20),  # more rows than there are strips
    (tiff(GREY16, compression="zlib"), 257, 2**20),
    (pillow(GREY8 > 90), 257, 2**20),
    (tiff(GREY16), 256, 2**20),  # wider than there are bytes
    (pillow(GREY8 > 90), 256, 2**20),
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 273, 0),  # strips that were never written
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 279, 0),
    (tiff(GREY16, compression="lzw", rowsperstrip=6), 273, 2**20),  # or are elsewhere
])
def test_nothing_is_filled_with_black(tmp_path, make, tag, value):
    refuse(io.BytesIO(change_tag(make, tmp_path, tag, value)), "cut short")


def test_bombs(tmp_path):
    header = struct.pack(">IIBBBBB", 2**20, 2**20, 16, 0, 0, 0, 0)
    refuse(io.BytesIO(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
                      + struct.pack(">I", imagecodecs.zlib_crc32(b"IHDR" + header))), "too many")
    refuse(io.BytesIO(change_tag(tiff(GREY16), tmp_path, 257, 2**30)), "too many")
    refuse(small_tiff(8, b""), "circle")  # a page that is followed by itself


def test_damaged_bytes_end_in_a_picture_or_in_one_line(tmp_path):
    exif = camera_exif("<")
    makers = {"a.jpg": pillow(RGB8, exif=exif, icc_profile=SRGB), "16.png": png(RGB16),
              "a.tif": pillow(GREY8, exif=exif), "z.tif": tiff(RGB16, compression="zlib"),
              "stack.tif": tiff(STACK, imagej=True), "f.tif": tiff(RGB32, byteorder=">")}
    draw = random.Random(0)
    ended = {"picture": 0, "line": 0}
    for name, make in makers.items():
        make(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            for _ in range(draw.choice((1, 1, 3))):
                content[draw.randrange(min(len(content), 500))] = draw.choice((0, 1, 127, 255))
            try:
                pictures = read_pictures(io.BytesIO(content))
            except UserError as error:
                assert "\n" not in str(error)
                ended["line"] += 1
            else:
                write_pictures(tmp_path / f"out{pictures[0].suffix}", pictures)
                ended["picture"] += 1
    assert min(ended.values()) > 50


def test_what_cannot_be_written(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", STACK / np.float32(65535), photometric="minisblack")
    pictures = read_pictures(tmp_path / "a.tif")
    target = tmp_path / "b.png"
    target.write_bytes(b"before")
    for several in (pictures, pictures[:1]):  # more than one; floats
        with pytest.raises(UserError, match=r"\.tif"):
            write_pictures(target, several)
    with pytest.raises(UserError, match="ends in"):
        write_pictures(tmp_path / "b.jpg", pictures)
    assert target.read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "b.png"]
