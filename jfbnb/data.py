"""Images as float32 tensors in [0, 1]: bundled photographs, CelebA, or any folder or archive.

Decoded images are kept as uint8 (N, 3, H, W), a quarter of the memory; `as_float` makes a batch.
"""

import errno
import hashlib
import io
import itertools
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from platformdirs import user_cache_path
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable, seeded_generator

CACHE = user_cache_path("jfbnb")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")
# What Pillow may try. Its others include PostScript, which it has another program run.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**26  # of an image, before it is decoded: 8192 x 8192
MAX_BYTES = 2**28  # of an image file in an archive, unpacked
MAX_RATIO = 100  # of a larger archive's size unpacked to its own; images hardly shrink at all
OFTEN = 3  # times as often as a face a crop of a photograph is trained on
BROKEN = -1  # stands for the size of a file where a link leads nowhere


@dataclass
class ImageSet:
    """Images (N, 3, H, W) uint8, with one name and one index each.

    The index is the image's place in file order; its measurement's noise is drawn from it.
    """

    images: Tensor
    names: list[str]
    indices: list[int]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, where: slice) -> "ImageSet":
        return ImageSet(self.images[where], self.names[where], self.indices[where])

    def as_float(self) -> Tensor:
        """All images as float32 in [0, 1]."""
        return as_float(self.images)


def as_float(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0, 1]."""
    return images.float() / 255


# --- the photographs that ship inside scikit-image --------------------------------------------

# Split by photograph, so that nothing of a held-out one is ever trained on.
PHOTOS = {
    "train": ("coffee", "rocket", "motorcycle", "hubble_deep_field", "retina",
              "immunohistochemistry"),
    "validation": ("chelsea",),
    "test": ("astronaut",),
    # To train on beside faces: none on which the benchmarks of photographs measure.
    "beside": ("motorcycle", "hubble_deep_field", "retina", "immunohistochemistry", "camera",
               "brick", "grass", "gravel", "coins", "moon", "page", "text"),
}


def bundled_photos(split: str, size: int = 128) -> ImageSet:
    """`size` x `size` crops of scikit-image's photographs, at full and at half scale.

    Not the paper's data: a stand-in that needs no download. "train" crops overlap by half, and so
    do those of "beside", in part grey ones; "validation" (one photograph) and "test" (another) are
    disjoint within each scale.
    """
    crops, names = [], []
    for photo in PHOTOS[split]:
        for scale in (2, 1):
            image = _photo(photo)
            image = image.resize((image.width // scale, image.height // scale), Image.LANCZOS)
            stride = size // 2 if split in ("train", "beside") else size
            for top in range(0, image.height - size + 1, stride):
                for left in range(0, image.width - size + 1, stride):
                    crops.append(np.asarray(image.crop((left, top, left + size, top + size))))
                    names.append(f"{photo}/{scale}/{top}-{left}")
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, names, list(range(len(names))))


def _photo(name: str) -> Image.Image:
    loader = skimage.data.stereo_motorcycle if name == "motorcycle" else getattr(skimage.data, name)
    pixels = loader()
    image = Image.fromarray(pixels[0] if name == "motorcycle" else pixels).convert("RGB")
    # The two largest are scans with little detail per pixel, and would outnumber the others.
    factor = max(1, max(image.size) // 500)
    return image.resize((image.width // factor, image.height // factor), Image.LANCZOS)


# --- files, folders and archives --------------------------------------------------------------


def decode(source: Path | io.BytesIO, size: int | None = None) -> Tensor:
    """One image file as uint8 (3, H, W), resized to `size` x `size` if given.

    Turned upright by its EXIF tag. Grey becomes three equal channels, transparency white, 16 bits
    become 8, and of an animation the first picture is taken.

    Raises:
        ValueError: where the file is no readable image, or too large a one.
        OSError: where it cannot be read at all.
    """
    try:
        return _decode(source, size)
    except Exception as error:  # Pillow's readers raise all sorts
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"no readable image ({printable(str(error))})") from error


def _decode(source: Path | io.BytesIO, size: int | None) -> Tensor:
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise ValueError("no file")  # a pipe would be waited for
    with Image.open(source, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels are too many: cut it down")
        if opened.mode == "F":
            raise ValueError("its pixels are fractions of unknown range: save it with 8 bits")
        if opened.mode.startswith("I"):  # 16-bit grey, which convert() would clip
            image = Image.fromarray((np.asarray(opened) / 257).clip(0, 255).astype(np.uint8))
        else:
            image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("RGB")
    if size is not None:
        image = image.resize((size, size), Image.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def load_images(
    path: str | Path,
    size: int = 128,
    limit: int | None = None,
    warn: Callable[[str], None] = print,
) -> ImageSet:
    """The first `limit` images, in file order, of a folder, tar or zip; resized to size x size.

    Linked folders in a folder are followed. A file that cannot be decoded and a broken link are
    named through `warn`, skipped and counted. Their place stays empty, so the other images keep
    their indices. The decoded images are cached. Nothing is unpacked to disk.

    Raises:
        UserError: if there is no such path, no readable image in it, a folder in it that cannot be
            read, or an incomplete or damaged archive.
        OSError: if one of its files cannot be read, which says nothing of what is in it.
    """
    path = Path(path)
    listing = _list_images(path, warn)[:limit]
    stored = _cache_file(path, listing, size)
    cached = _read_cache(stored)
    images, good = cached or _decode_all(path, listing, size)
    if not good.any():
        raise UserError(f"none of the {len(listing)} images in {path} could be decoded")
    if cached is None:
        try:
            _write_cache(stored, images, good)
        except OSError as error:
            warn(f"warning: the decoded images are not kept for the next time: {error}")
    places = np.flatnonzero(good).tolist()
    names = [printable(name) for name, *_ in listing]
    skipped = len(listing) - len(places)
    for i in np.flatnonzero(~good):
        broken = listing[i][1] == BROKEN
        warn(f"warning: skipped {names[i]}: {'a broken link' if broken else 'no readable image'}")
    if skipped:
        warn(f"warning: skipped {skipped} unreadable of {len(listing)} images in {path}")
    return ImageSet(torch.from_numpy(images), [names[i] for i in places], places, skipped)


def fingerprint(path: str | Path) -> str:
    """A hash of the names, sizes and times of the images at `path`, not of their pixels."""
    return hashlib.sha256(repr(_list_images(Path(path))).encode()).hexdigest()


def _list_images(
    path: Path, warn: Callable[[str], None] = lambda line: None
) -> list[tuple[str, int, float]]:
    """(name, size, time) of each image, sorted by name. Raises UserError where there is none."""
    # Of a name that an archive has twice the last one counts, as where it is unpacked.
    found = {f[0]: f for f in _list_files(path) if not Path(f[0]).name.startswith(".")}.values()
    images = sorted(f for f in found if f[0].lower().endswith(SUFFIXES))
    _warn_of_names(found, images, warn)
    if not images:
        inner = sorted(f[0] for f in found if f[0].lower().endswith(ARCHIVES))
        if not inner:
            raise UserError(f"no images in {path}: it must hold {', '.join(SUFFIXES)} files")
        what_to_do = "" if path.is_dir() else f"unpack {path} and "
        raise UserError(f"no images in {path}, but an archive: {what_to_do}give the "
                        f"{printable(inner[0])} in it")
    return images


def _list_files(path: Path) -> list[tuple[str, int, float]]:
    if not path.exists():
        raise UserError(f"no data at {path}: give a folder, tar or zip of images (CelebA: see "
                        "`jfbnb data celeba`)")
    try:
        if path.is_dir():
            return list(_walk(path))
        if path.is_file() and _is_tar(path):  # first: one that ends in a zip looks like a zip
            with tarfile.open(path) as archive:
                return [_tar_entry(m) for m in _members(archive, path) if m.isfile()]
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
            _check_ratio(path, sum(m.file_size for m in members))
            return [(m.filename, m.file_size, m.CRC) for m in members]
        raise UserError(_why_no_archive(path))
    except UserError:
        raise
    except Exception as error:  # damaged archives raise all sorts
        reason = printable(str(error)) or type(error).__name__
        if path.is_dir() or getattr(error, "errno", None) is not None:
            raise UserError(f"cannot read {path}: {reason}") from error
        raise UserError(_why_no_archive(path, reason)) from error


def _walk(folder: Path) -> Iterator[tuple[str, int, float]]:
    """(name, size, time) of each file below a folder; links are followed, except into a loop."""
    below = [("", frozenset())]  # the folders still to be read, each with those that it is in
    while below:
        prefix, above = below.pop()
        here = folder / prefix
        try:
            own = here.stat()
            own = own.st_dev, own.st_ino
            entries = [] if own in above else [(e.name, _status(e)) for e in os.scandir(here)]
        except OSError as error:
            raise UserError(f"cannot read the folder {printable(str(here))} ({error.strerror}): "
                            "make it readable, or take it out of the data") from error
        for name, status in entries:
            if status is None:
                yield prefix + name, BROKEN, 0.0
            elif stat.S_ISDIR(status.st_mode):
                below.append((f"{prefix}{name}/", above | {own}))
            elif stat.S_ISREG(status.st_mode):
                yield prefix + name, status.st_size, status.st_mtime


def _status(entry: os.DirEntry) -> os.stat_result | None:
    """That of the file which a link leads to; None where it leads nowhere."""
    try:
        return os.stat(entry)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _tar_entry(member: tarfile.TarInfo) -> tuple[str, int, float]:
    return member.name, member.size, member.mtime


def _warn_of_names(found: Iterable, images: list, warn: Callable[[str], None]) -> None:
    """Name broken links, of which an image's is named later, and names that differ in case only."""
    for name in sorted({f[0] for f in found if f[1] == BROKEN} - {f[0] for f in images}):
        warn(f"warning: skipped {printable(name)}: a broken link")
    seen: dict[str, str] = {}
    for name, *_ in images:
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            warn(f"warning: {printable(twin)} and {printable(name)} differ in case only: on some "
                 "systems one replaces the other, so rename one")
            break  # there may be thousands


def _why_no_archive(path: Path, reason: str = "") -> str:
    """One line on a file that is no archive, or none that can be read, and what to do."""
    no_archive = f"{path} is no folder, tar or zip of images"
    if not path.is_file():
        return no_archive  # a pipe would be waited for
    with open(path, "rb") as file:
        head = file.read(100)
    if not (reason or path.name.lower().endswith(ARCHIVES) or head.startswith(b"PK\3\4")):
        return no_archive
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return (f"{path} is an incomplete download: a web page in place of the archive; open its "
                "address in a browser and do what the page asks")
    detail = f" ({reason})" if reason else ""
    return (f"{path} is an incomplete download, or damaged{detail}: compare its "
            f"{path.stat().st_size} bytes with the size at its source, and fetch it again")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except Exception:  # a file that looks compressed and is damaged
        return False


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members in archive order, each looked at before tarfile reads on."""
    for member in archive:
        if member.size < 0:  # tarfile would read the one before it again, for ever
            raise UserError(f"cannot read {path}: {printable(member.name)} has a negative size")
        _check_ratio(path, member.offset_data + member.size)
        yield member


def _check_ratio(path: Path, unpacked: int) -> None:
    """Raise UserError for an archive that would fill memory, or time."""
    if unpacked > max(MAX_BYTES, MAX_RATIO * path.stat().st_size):
        raise UserError(f"{path} unpacks to over {MAX_RATIO} times its size: if you trust it, "
                        "unpack it yourself and give the folder")


def _decode_all(path: Path, listing: list, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images that can be decoded (n, 3, size, size), and which of the listing they are."""
    images = np.zeros((len(listing), 3, size, size), np.uint8)
    good = np.zeros(len(listing), bool)

    def one(job: tuple[int, Path | io.BytesIO]) -> None:
        i, source = job
        try:
            images[i] = decode(source, size).numpy()
        except ValueError:
            return
        good[i] = True

    sources = _sources(path, listing)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        while batch := list(itertools.islice(sources, 64)):  # not all files in memory at once
            for _ in pool.map(one, batch):
                pass  # to raise here what a thread raised
    return (images if good.all() else images[good]), good


def _sources(path: Path, listing: list) -> Iterator[tuple[int, Path | io.BytesIO]]:
    """Place and content of each image. One that is damaged or too large is left out."""
    if path.is_dir():
        yield from ((i, path / name) for i, (name, length, _) in enumerate(listing)
                    if length != BROKEN)
        return
    places = {entry: i for i, entry in enumerate(listing) if entry[1] <= MAX_BYTES}
    if _is_tar(path):
        with tarfile.open(path) as archive:
            for member in archive:  # in archive order: a tar has no index to seek by
                if member.isfile() and (entry := _tar_entry(member)) in places:
                    yield places[entry], io.BytesIO(archive.extractfile(member).read())
    else:
        with zipfile.ZipFile(path) as archive:
            for (name, *_), i in places.items():
                try:
                    content = archive.read(name)
                except Exception:  # damaged, encrypted, packed in an unknown way
                    continue
                yield i, io.BytesIO(content)


def _cache_file(path: Path, listing: list, size: int) -> Path:
    key = hashlib.sha256(repr((str(path.resolve()), listing, size)).encode()).hexdigest()[:20]
    return CACHE / f"{key}.npz"


def _read_cache(stored: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """What `_write_cache` stored, or None where that is missing or damaged."""
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            return arrays["images"], arrays["good"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(stored: Path, images: np.ndarray, good: np.ndarray) -> None:
    with atomic_path(stored) as temporary:
        np.savez(temporary, images=images, good=good)


# --- the splits -------------------------------------------------------------------------------


@dataclass
class Splits:
    """Three disjoint sets, and where they come from in words, for captions."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    source: str


def load_splits(
    data: str,
    size: int = 128,
    n_train: int = 8000,
    n_validation: int = 200,
    n_test: int = 2000,
    warn: Callable[[str], None] = print,
    beside: bool = False,
) -> Splits:
    """The training, validation and test images.

    Args:
        data: "bundled" for scikit-image's photographs, else a folder, tar or zip: its first
            `n_train` files in order are for training, the next `n_test` for the table.
        n_validation: images held out from the end of the training part.
        beside: whether crops of scikit-image's photographs are trained on, too; `OFTEN` times each,
            as they are few.

    Raises:
        UserError: if the data cannot be read, or a split would be empty.
    """
    if data == "bundled":
        source = "photographs from scikit-image, not the paper's data"
        return Splits(bundled_photos("train", size), bundled_photos("validation", size),
                      bundled_photos("test", size), source)
    if not 0 < n_validation < n_train or n_test < 1:
        raise UserError(f"n_validation={n_validation} must be between 1 and n_train={n_train}, "
                        f"and n_test={n_test} at least 1")
    whole = load_images(data, size, n_train + n_test, warn)
    is_train = [i < n_train - n_validation for i in whole.indices]
    is_test = [i >= n_train for i in whole.indices]
    first, last = sum(is_train), len(whole) - sum(is_test)
    train, validation, test = whole[:first], whole[first:last], whole[last:]
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if not len(part):
            raise UserError(f"no {name} images: {data} has {len(whole)} readable images, but "
                            f"n_train={n_train}, n_validation={n_validation}, n_test={n_test}")
    source = f"images from {Path(data).name}"
    if beside:
        photographs = bundled_photos("beside", size)
        source += f", and {len(photographs)} crops of photographs from scikit-image to train on"
        train = ImageSet(torch.cat([train.images, *[photographs.images] * OFTEN]),
                         [*train.names, *photographs.names * OFTEN],
                         [*train.indices, *[len(whole) + i for i in photographs.indices] * OFTEN],
                         train.skipped)
    return Splits(train, validation, test, source)


def random_crops(images: Tensor, size: int, *keys: int) -> Tensor:
    """One random crop of each image, flipped left to right at random; float32 in [0, 1].

    Args:
        images: uint8 (B, 3, H, W).
        size: side of the crop in pixels, at most H and W.
        keys: integers that seed the draw, e.g. (seed, step).
    """
    generator = seeded_generator(*keys)
    rows = torch.randint(images.shape[2] - size + 1, (len(images),), generator=generator)
    columns = torch.randint(images.shape[3] - size + 1, (len(images),), generator=generator)
    flips = torch.rand(len(images), generator=generator) < 0.5
    crops = []
    for image, row, column, flip in zip(images, rows, columns, flips, strict=True):
        crop = image[:, row:row + size, column:column + size]
        crops.append(crop.flip(2) if flip else crop)
    return as_float(torch.stack(crops))


# --- CelebA -----------------------------------------------------------------------------------

MANUAL_STEPS = """\
To get CelebA by hand:
  1. Open the data set's page, mmlab.ie.cuhk.edu.hk/projects/CelebA.html, and read its terms.
  2. From its Align&Cropped Images fetch img_align_celeba.zip (1.4 GB).
  3. Run `make reproduce PROFILE=cpu DATA=img_align_celeba.zip`; no need to unpack it."""


def download_celeba(folder: str | Path) -> Path:
    """Download CelebA with torchvision into `folder`; return the folder of its JPEGs.

    Raises:
        UserError: where the download fails, with the manual steps. Its host often refuses.
    """
    from torchvision.datasets import CelebA  # slow to import, and needed here only

    try:
        CelebA(str(folder), split="all", download=True)
    except Exception as error:  # gdown and torchvision raise all sorts
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"the download failed ({reason})\n{MANUAL_STEPS}") from error
    return Path(folder) / "celeba" / "img_align_celeba"
