import os
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from jfbnb import data
from jfbnb.common import UserError
from jfbnb.data import bundled_photos, decode, load_images, load_splits, random_crops


def test_bundled_photos_are_split_by_photograph():
    sets = {split: bundled_photos(split) for split in ("train", "validation", "test", "beside")}
    photos = {split: {name.split("/")[0] for name in s.names} for split, s in sets.items()}
    assert not photos["train"] & photos["validation"]
    assert not (photos["train"] | photos["validation"]) & photos["test"]
    for s in sets.values():
        assert s.images.shape[1:] == (3, 128, 128) and s.images.dtype == torch.uint8
        assert s.as_float().min() >= 0 and s.as_float().max() <= 1
    assert [len(s) for s in sets.values()] == [375, 7, 20, 594]
    # The benchmarks measure on these.
    assert not photos["beside"] & {"chelsea", "astronaut", "coffee", "rocket"}


# --- files, folders and archives ------------------------------------------------------------------


def pack(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir(), reverse=True):  # the order in it must not matter
            archive.write(file, file.name)
    return path


def test_a_zip_gives_what_the_folder_gives_and_half_of_one_is_refused(image_folder, tmp_path):
    folder, path = load_images(image_folder), pack(image_folder, tmp_path / "a.zip")
    assert folder.images.shape == (6, 3, 128, 128)
    assert folder.names == [f"00000{i}.jpg" for i in range(1, 7)]
    whole = load_images(path)
    assert whole.names == folder.names and torch.equal(whole.images, folder.images)
    content = path.read_bytes()
    for part in (content[:len(content) // 2], content[:100], b""):
        path.write_bytes(part)
        with pytest.raises(UserError, match=f"damaged.*compare its {len(part)} bytes") as caught:
            load_images(path)
        assert "\n" not in str(caught.value)


def test_resize_is_torchvisions(image_folder):
    import torchvision.transforms as transforms

    path = image_folder / "000001.jpg"
    steps = transforms.Compose([transforms.Resize((128, 128)), transforms.PILToTensor()])
    assert (decode(path, 128).int() - steps(Image.open(path)).int()).abs().max() <= 1


def test_the_cache_is_used_renewed_and_not_needed(image_folder, monkeypatch, tmp_path):
    first = load_images(image_folder)
    with monkeypatch.context() as patch:
        patch.setattr(data, "decode", lambda *args: pytest.fail("decoded again"))
        assert torch.equal(load_images(image_folder).images, first.images)
    (stored,) = data.CACHE.iterdir()
    stored.write_bytes(stored.read_bytes()[:-99])
    assert torch.equal(load_images(image_folder).images, first.images)
    before = data.fingerprint(image_folder)
    Image.new("RGB", (178, 218), "red").save(image_folder / "000001.jpg")
    assert data.fingerprint(image_folder) != before
    assert not torch.equal(load_images(image_folder).images[0], first.images[0])
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "CACHE", tmp_path / "file")
    warnings = []
    assert len(load_images(image_folder, warn=warnings.append)) == 6
    assert "cannot be cached" in warnings[0]


def test_what_is_no_image_is_named_and_the_others_keep_their_indices(image_folder):
    whole = load_images(image_folder)
    cut, gone = image_folder / "000003.jpg", image_folder / "000005.jpg"
    cut.write_bytes(cut.read_bytes()[:200])
    gone.unlink()
    gone.symlink_to("nowhere.jpg")
    os.mkfifo(image_folder / "pipe.png")  # reading it would never end
    (image_folder / "note.txt").write_text("no image by its name")
    warnings = []
    images = load_images(image_folder, warn=warnings.append)
    assert warnings == [f"warning: skipped {name}: not a readable image"
                        for name in ("000003.jpg", "000005.jpg", "pipe.png")]
    assert images.indices == [0, 1, 3, 5] and images.skipped == 3
    assert torch.equal(images.images, whole.images[images.indices])
    splits = load_splits(str(image_folder), n_train=4, n_validation=2, n_test=2, warn=str.encode)
    assert [s.indices for s in (splits.train, splits.validation, splits.test)] == [[0, 1], [3], [5]]


def test_a_damaged_member_is_skipped(image_folder, tmp_path):
    path = pack(image_folder, tmp_path / "a.zip")
    content = bytearray(path.read_bytes())
    content[500] ^= 255  # its checksum is now wrong
    path.write_bytes(content)
    assert load_images(path, warn=str.encode).indices == [0, 1, 2, 3, 4]


def test_linked_folders_are_followed_and_loops_are_not(image_folder, tmp_path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (folder / "linked").symlink_to(image_folder)
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "other").symlink_to("../../side")
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "back").symlink_to(folder)  # a loop through a folder outside
    photos = load_images(image_folder)
    found = load_images(folder)
    assert found.names == [f"linked/{name}" for name in photos.names]
    assert torch.equal(found.images, photos.images)


def test_what_cannot_be_loaded_is_said_in_one_line(image_folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "hopeless").mkdir()
    (tmp_path / "hopeless" / "a.jpg").write_bytes(b"no image")
    (tmp_path / "outer").mkdir()
    pack(image_folder, tmp_path / "outer" / "inner.zip")
    (tmp_path / "page.zip").write_text("\ufeff\n <!DOCTYPE html>\n<title>Quota exceeded</title>")
    os.mkfifo(tmp_path / "pipe.zip")
    for name, message in (("nowhere", "no data at"), ("empty", "no images in"),
                          ("hopeless", "none of the 1 images"),
                          ("outer", "it holds an archive, inner.zip"),
                          ("page.zip", "or a web page"),
                          ("pipe.zip", "not a folder or zip")):
        with pytest.raises(UserError, match=message) as caught:
            load_images(tmp_path / name, warn=str.encode)
        assert "\n" not in str(caught.value)

    def refuse(folder):  # nothing is refused to root, who runs many containers
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*images \(Permission denied\)"):
        load_images(image_folder)


def test_names_in_a_zip_are_never_used_as_paths(image_folder, tmp_path):
    names = ["../../up.jpg", "/tmp/absolute.jpg", "\x1b[31mred.jpg", "once.jpg"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i, name in enumerate(names, 1):
            archive.write(image_folder / f"00000{i}.jpg", zipfile.ZipInfo(name).filename)
    before = sorted(tmp_path.rglob("*"))
    images = load_images(tmp_path / "a.zip")
    assert "\\x1b[31mred.jpg" in images.names
    last = images.images[images.names.index("once.jpg")]
    assert torch.equal(last, decode(image_folder / "000004.jpg", 128))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("L", 128, (128, 128, 128)),
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # transparent: a white background
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("I;16", 257 * 100, (100, 100, 100)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ("P", 0, (0, 0, 0)),
])
def test_unusual_modes_and_a_camera_held_upright(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image = Image.new(mode, (20, 10), colour)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, **({"exif": exif} if mode == "L" else {}))
    pixels = decode(path)
    assert pixels.shape == ((3, 20, 10) if mode == "L" else (3, 10, 20))
    assert pixels.dtype == torch.uint8 and tuple(pixels[:, 0, 0].tolist()) == expected


def test_too_many_pixels_and_other_programs_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="10 x 10 pixels are too many"):
        decode(tmp_path / "large.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "a.eps")  # Pillow would run a program for it
    with pytest.raises(UnidentifiedImageError):
        decode(tmp_path / "a.eps")


# --- splits and crops -----------------------------------------------------------------------------


def test_splits_follow_file_order_and_an_empty_one_is_refused(image_folder):
    folder, sizes = str(image_folder), {"n_train": 4, "n_validation": 1, "n_test": 2}
    alone = load_splits(folder, **sizes)
    assert [s.indices for s in (alone.train, alone.validation, alone.test)] == [
        [0, 1, 2], [3], [4, 5]]
    both = load_splits(folder, **sizes, beside=True)
    photographs = bundled_photos("beside")
    assert torch.equal(both.train.images, torch.cat([
        alone.train.images, *[photographs.images] * data.OFTEN]))
    assert len(both.train.names) == len(both.train.indices) == len(both.train.images)
    assert torch.equal(both.test.images, alone.test.images)
    assert f"{len(photographs)} crops of photographs" in both.source
    with pytest.raises(UserError, match="6 readable images, too few for n_train=6"):
        load_splits(folder, n_train=6, n_validation=1, n_test=2)
    with pytest.raises(UserError, match="n_validation=6 must be between 1 and n_train=6"):
        load_splits(folder, n_train=6, n_validation=6, n_test=2)
    assert load_splits("bundled", n_test=4).test.names == bundled_photos("test").names[:4]
    for source in (folder, "bundled"):
        with pytest.raises(UserError, match="n_test=0: give at least one test image"):
            load_splits(source, n_train=4, n_validation=1, n_test=0)


def test_random_crops_are_cut_and_mirrored_and_depend_on_their_keys_alone():
    ramp = torch.arange(16, dtype=torch.uint8).expand(40, 3, 16, 16)
    crops = random_crops(ramp, 8, 0)
    steps = np.diff((crops[:, 0, 0] * 255).round().numpy())
    assert crops.shape == (40, 3, 8, 8) and (abs(steps) == 1).all()
    assert set(steps[:, 0]) == {1.0, -1.0}
    assert torch.equal(crops, random_crops(ramp, 8, 0))
    assert not torch.equal(crops, random_crops(ramp, 8, 1))
