import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from jfbnb import data
from jfbnb.common import UserError
from jfbnb.data import bundled_photos, decode, load_images, load_splits, random_crops


def test_bundled_photos_are_split_by_photograph():
    sets = {split: bundled_photos(split) for split in ("train", "validation", "test")}
    photos = {split: {name.split("/")[0] for name in s.names} for split, s in sets.items()}
    assert not photos["train"] & photos["validation"]
    assert not (photos["train"] | photos["validation"]) & photos["test"]
    for s in sets.values():
        assert s.images.shape[1:] == (3, 128, 128) and s.images.dtype == torch.uint8
        assert s.as_float().min() >= 0 and s.as_float().max() <= 1
    assert len(sets["train"]) > 200 and len(sets["test"]) == 20


def test_folder_tar_and_zip_give_the_same(image_folder, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for path in sorted(image_folder.iterdir(), reverse=True):  # order in it must not matter
            archive.add(path, path.name)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in image_folder.iterdir():
            archive.write(path, path.name)
    folder = load_images(image_folder)
    assert folder.images.shape == (6, 3, 128, 128)
    assert folder.names == sorted(path.name for path in image_folder.iterdir())
    for archive in ("a.tar", "a.zip"):
        other = load_images(tmp_path / archive)
        assert other.names == folder.names and torch.equal(other.images, folder.images)


def test_resize_is_torchvisions(image_folder):
    import torchvision.transforms as transforms

    path = image_folder / "000001.jpg"
    steps = transforms.Compose([transforms.Resize((128, 128)), transforms.PILToTensor()])
    expected = steps(Image.open(path))
    assert (decode(path, 128).int() - expected.int()).abs().max() <= 1


def test_second_load_comes_from_the_cache(image_folder, monkeypatch):
    first = load_images(image_folder)
    monkeypatch.setattr(data, "decode", lambda *args: pytest.fail("decoded again"))
    assert torch.equal(load_images(image_folder).images, first.images)


def test_a_changed_file_is_decoded_again(image_folder):
    first = load_images(image_folder)
    Image.new("RGB", (178, 218), "red").save(image_folder / "000001.jpg")
    assert not torch.equal(load_images(image_folder).images[0], first.images[0])


def test_corrupt_file_is_named_skipped_and_counted(image_folder):
    whole = load_images(image_folder)
    path = image_folder / "000003.jpg"
    path.write_bytes(path.read_bytes()[:200])
    warnings = []
    images = load_images(image_folder, warn=warnings.append)
    assert any("000003.jpg" in line for line in warnings)
    assert any("skipped 1 unreadable of 6" in line for line in warnings)
    assert images.skipped == 1 and len(images) == 5
    # The others keep their place, and so their noise.
    assert images.indices == [0, 1, 3, 4, 5]
    assert torch.equal(images.images[2], whole.images[3])


def pack(folder, path):
    """The files of a folder as an archive of the kind that the path's suffix says."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.iterdir():
                archive.write(file, file.name)
    else:
        with tarfile.open(path, f"w:{path.suffix[1:].replace('tar', '')}") as archive:
            archive.add(folder, folder.name)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_half_a_download(image_folder, tmp_path, kind):
    path = pack(image_folder, tmp_path / f"a.{kind}")
    assert len(load_images(path)) == 6
    content = path.read_bytes()
    for part in (content[:len(content) // 2], content[:100], b""):
        path.write_bytes(part)
        with pytest.raises(UserError, match=r"incomplete download.*fetch it again") as caught:
            load_images(path)
        assert f"{len(part)} bytes" in str(caught.value) and "\n" not in str(caught.value)
    whole = pack(image_folder, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "a.part").write_bytes(whole[:-30])  # as a browser names it until it is complete
    with pytest.raises(UserError, match="incomplete download"):
        load_images(tmp_path / "a.part")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "A.TAR.GZ"])
def test_a_web_page_in_place_of_the_download(tmp_path, name):
    (tmp_path / name).write_text("\ufeff\n <!DOCTYPE html>\n<title>Quota exceeded</title>" * 99)
    with pytest.raises(UserError, match=r"incomplete download: a web page.*open its address"):
        load_images(tmp_path / name)
    (tmp_path / name).rename(tmp_path / "page.html")
    with pytest.raises(UserError, match="no folder, tar or zip"):
        load_images(tmp_path / "page.html")
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(UserError, match="no folder, tar or zip"):  # and does not wait for it
        load_images(tmp_path / "pipe.zip")


def test_an_archive_in_an_archive_and_in_a_folder(image_folder, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    pack(image_folder, outer / "Inner.ZIP")
    with pytest.raises(UserError, match=r"no images in .*, but an archive: give the Inner\.ZIP"):
        load_images(outer)
    for kind in ("zip", "tar"):
        path = pack(outer, tmp_path / f"a.{kind}")
        with pytest.raises(UserError, match=rf"archive: unpack .*a\.{kind} and give .*Inner\.ZIP"):
            load_images(path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:  # it now ends as a zip does
        archive.add(image_folder / "000001.jpg", "only.jpg")
        archive.add(outer / "Inner.ZIP", "Inner.ZIP")
    assert load_images(tmp_path / "a.tar").names == ["only.jpg"]


def test_linked_folders_are_followed_and_loops_are_not(image_folder, tmp_path):
    data = tmp_path / "data"
    (data / "a").mkdir(parents=True)
    (data / "m.jpg").symlink_to(image_folder / "000001.jpg")
    (data / "linked").symlink_to(image_folder)
    (data / "again").symlink_to(data / "linked")
    (data / "a" / "up").symlink_to("..")
    (data / "a" / "other").symlink_to("../../side")
    (tmp_path / "side").mkdir()
    (tmp_path / "side" / "back").symlink_to(data)  # a loop through a folder outside
    warnings = []
    names = load_images(data, warn=warnings.append).names
    photos = [path.name for path in sorted(image_folder.iterdir())]
    assert names == [*(f"again/{p}" for p in photos), *(f"linked/{p}" for p in photos), "m.jpg"]
    assert not warnings
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.write(data / name, name)
    other = load_images(tmp_path / "a.zip")
    assert other.names == names and torch.equal(other.images, load_images(data).images)
    assert load_images(data / "linked").names == photos


def test_a_changed_file_in_a_linked_folder_is_seen(image_folder, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(image_folder)
    first, before = load_images(data), data.fingerprint(data)
    assert data.fingerprint(data) == before
    Image.new("RGB", (178, 218), "red").save(image_folder / "000001.jpg")
    assert data.fingerprint(data) != before
    assert not torch.equal(load_images(data).images[0], first.images[0])


def test_broken_links_are_named_skipped_and_keep_their_place(image_folder, tmp_path):
    whole = load_images(image_folder)
    (image_folder / "000003.jpg").rename(tmp_path / "away.jpg")
    (image_folder / "000003.jpg").symlink_to("away.jpg")
    (image_folder / "self.png").symlink_to("self.png")
    (image_folder / "more").symlink_to(tmp_path / "unmounted")
    (image_folder / ".#lock").symlink_to("user@host")  # an editor's
    before, warnings = data.fingerprint(image_folder), []
    images = load_images(image_folder, warn=warnings.append)
    assert images.indices == [0, 1, 3, 4, 5] and images.skipped == 2
    assert torch.equal(images.images[2], whole.images[3])
    assert warnings == [*(f"warning: skipped {name}: a broken link"
                          for name in ("more", "000003.jpg", "self.png")),
                        f"warning: skipped 2 unreadable of 7 images in {image_folder}"]
    (tmp_path / "away.jpg").rename(image_folder / "away.jpg")
    assert data.fingerprint(image_folder) != before
    assert load_images(image_folder, warn=warnings.append).names[2] == "000003.jpg"


def test_a_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    (image_folder / "locked").mkdir()

    def refuse(folder):  # as root, who runs many containers, nothing is refused
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*/locked \(Permission denied\)"):
        load_images(image_folder)


def test_names_that_differ_in_case_only(image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("x/a.jpg", "X/A.jpg", "x/b.JPG"):
            archive.write(image_folder / "000001.jpg", name)
    warnings = []
    assert load_images(tmp_path / "a.zip", warn=warnings.append).names == [
        "X/A.jpg", "x/a.jpg", "x/b.JPG"]
    assert len(warnings) == 1 and "X/A.jpg and x/a.jpg differ in case only" in warnings[0]


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_that_an_archive_has_twice_the_last_counts(image_folder, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with (zipfile.ZipFile if kind == "zip" else tarfile.open)(path, "w") as archive:
        add = archive.write if kind == "zip" else archive.add
        for file in ("000002.jpg", "000001.jpg", "000004.jpg"):
            add(image_folder / file, "same.jpg")
        add(image_folder / "000003.jpg", "z.jpg")
    images = load_images(path)
    assert images.names == ["same.jpg", "z.jpg"] and not images.skipped
    assert torch.equal(images.images, load_images(image_folder).images[[3, 2]])


def test_missing_empty_and_hopeless(tmp_path):
    with pytest.raises(UserError, match="no data at"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        load_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 images"):
        load_images(tmp_path / "empty", warn=lambda _: None)


@pytest.mark.parametrize(("mode", "colour", "expected"), [
    ("L", 128, (128, 128, 128)),
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # transparent: the white behind it
    ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
    ("I;16", 257 * 100, (100, 100, 100)),
    ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ("P", 0, (0, 0, 0)),
])
def test_unusual_modes(tmp_path, mode, colour, expected):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (20, 10), colour).save(path)
    pixels = decode(path)
    assert pixels.shape == (3, 10, 20) and pixels.dtype == torch.uint8
    assert tuple(pixels[:, 0, 0].tolist()) == expected


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # a camera held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg").shape == (3, 20, 10)


def test_splits_follow_file_order(image_folder):
    splits = load_splits(str(image_folder), n_train=4, n_validation=1, n_test=2)
    assert splits.train.indices == [0, 1, 2]
    assert splits.validation.indices == [3]
    assert splits.test.indices == [4, 5]


def test_splits_keep_their_members_when_a_file_is_corrupt(image_folder):
    (image_folder / "000002.jpg").write_bytes(b"")
    splits = load_splits(str(image_folder), n_train=4, n_validation=1, n_test=2,
                         warn=lambda _: None)
    assert splits.train.indices == [0, 2] and splits.test.indices == [4, 5]


def test_splits_that_cannot_be(image_folder):
    with pytest.raises(UserError, match="no test images"):
        load_splits(str(image_folder), n_train=6, n_validation=1, n_test=2)
    with pytest.raises(UserError, match="n_validation=6 must be between 1 and n_train=6"):
        load_splits(str(image_folder), n_train=6, n_validation=6, n_test=2)


def test_photographs_beside_the_images_are_trained_on_alone(image_folder):
    """They come after the others, under numbers of their own; what is measured stays as it is."""
    sizes = {"n_train": 4, "n_validation": 1, "n_test": 2}
    alone = load_splits(str(image_folder), **sizes)
    both = load_splits(str(image_folder), **sizes, beside=True)
    photographs = bundled_photos("beside")
    assert torch.equal(both.train.images, torch.cat([
        alone.train.images, *[photographs.images] * data.OFTEN]))
    assert len(both.train.names) == len(both.train.indices) == len(both.train.images)
    for part in ("validation", "test"):
        one, two = getattr(alone, part), getattr(both, part)
        assert torch.equal(one.images, two.images) and one.indices == two.indices
    numbers = [set(part.indices) for part in (both.train, both.validation, both.test)]
    assert sum(map(len, numbers)) == len(set.union(*numbers))
    assert both.train.indices.count(both.train.indices[-1]) == data.OFTEN
    assert f"{len(photographs)} crops of photographs" in both.source
    assert "photographs" not in alone.source


def test_photographs_that_are_measured_on_are_not_among_those_beside():
    kept = {*data.PHOTOS["validation"], *data.PHOTOS["test"], "coffee", "rocket"}
    assert not kept & set(data.PHOTOS["beside"])
    assert not kept & {name.split("/")[0] for name in bundled_photos("beside").names}


def test_random_crops_depend_on_their_keys_alone():
    images = torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8)
    a, b = random_crops(images, 8, 1, 2), random_crops(images, 8, 1, 2)
    assert torch.equal(a, b) and a.shape == (5, 3, 8, 8)
    assert not torch.equal(a, random_crops(images, 8, 1, 3))


def test_crops_are_cut_from_the_image_and_mirrored():
    ramp = torch.arange(16, dtype=torch.uint8).expand(40, 3, 16, 16)
    rises = set()
    for crop in random_crops(ramp, 8, 0):
        row = (crop[0, 0] * 255).round()
        steps = np.diff(row.numpy())
        assert abs(steps).tolist() == [1.0] * 7
        rises.add(steps[0])
    assert rises == {1.0, -1.0}


def test_a_damaged_member_is_skipped(image_folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in sorted(image_folder.iterdir())[:2]:
            archive.write(path, path.name)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[500] ^= 255  # in the first picture: its checksum is now wrong
    (tmp_path / "a.zip").write_bytes(content)
    warnings = []
    images = load_images(tmp_path / "a.zip", warn=warnings.append)
    assert images.names == ["000002.jpg"] and "000001.jpg" in warnings[0]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    zeros = bytes(500_000)
    path = tmp_path / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.jpg", zeros)
    else:
        with tarfile.open(path, "w:gz") as archive:
            member = tarfile.TarInfo("a.jpg")
            member.size = len(zeros)
            archive.addfile(member, io.BytesIO(zeros))
    with pytest.raises(UserError, match="unpacks to over 100 times its size"):
        load_images(path)


def test_names_in_archives_are_never_used_as_paths(image_folder, tmp_path):
    names = ["../../up.jpg", "/tmp/absolute.jpg", "\x1b[31mred.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            archive.add(image_folder / "000001.jpg", name)
            archive.members[-1].name = name  # add() strips a leading slash
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    images = load_images(tmp_path / "a.tar")
    assert len(images) == 3 and "\\x1b[31mred.jpg" in images.names
    assert sorted(tmp_path.rglob("*")) == before


def test_too_many_pixels_other_programs_formats_and_pipes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 99)
    Image.new("RGB", (10, 10)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="10 x 10 pixels are too many"):
        decode(tmp_path / "large.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "a.eps")  # Pillow would run a program for it
    with pytest.raises(ValueError, match="no readable image"):
        decode(tmp_path / "a.eps")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="no file"):
        decode(tmp_path / "pipe.png")
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "none.png")


def test_a_damaged_cache_is_made_again_and_none_is_needed(image_folder, monkeypatch, tmp_path):
    first = load_images(image_folder)
    (stored,) = data.CACHE.iterdir()
    stored.write_bytes(stored.read_bytes()[:-99])
    assert torch.equal(load_images(image_folder).images, first.images)
    (tmp_path / "file").touch()
    monkeypatch.setattr(data, "CACHE", tmp_path / "file")
    warnings = []
    assert len(load_images(image_folder, warn=warnings.append)) == 6
    assert "are not kept for the next time" in warnings[0]


def test_failed_download_prints_the_manual_steps(monkeypatch, tmp_path):
    import torchvision.datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("Too many users have viewed or downloaded this file recently.\nmore")

    monkeypatch.setattr(torchvision.datasets, "CelebA", refuse)
    with pytest.raises(UserError) as caught:
        data.download_celeba(tmp_path)
    assert "Too many users" in str(caught.value) and "by hand" in str(caught.value)
