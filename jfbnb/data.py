"""Images as float32 tensors in [0, 1]: bundled photographs, CelebA, or any folder or zip.

Decoded images are uint8 (N, 3, H, W), a quarter of the memory.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps
from platformdirs import user_cache_path
from torch import Tensor

from jfbnb.common import UserError, atomic_path, printable, seeded_generator

CACHE = user_cache_path("jfbnb")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Pillow reads other formats too, such as PostScript, for which it runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 2**26  # of an image, before it is decoded: 8192 x 8192
MAX_BYTES = 2**28  # of an image file in an archive, unpacked
OFTEN = 3  # a crop of a photograph is used so many times as often as a face


@dataclass
class ImageSet:
    """Images (N, 3, H, W) uint8, with one name and one index each.

    The index is the image's place in file order; it seeds the noise of the image's measurement.
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
        return self.images.float() / 255


# --- the photographs that ship inside scikit-image --------------------------------------------

# Split by photograph: no crop of a held-out photograph is used in training.
PHOTOS = {
    "train": ("coffee", "rocket", "motorcycle", "hubble_deep_field", "retina",
              "immunohistochemistry"),
    "validation": ("chelsea",),
    "test": ("astronaut",),
    # To train on besides faces: none that the benchmarks use.
    "beside": ("motorcycle", "hubble_deep_field", "retina", "immunohistochemistry", "camera",
               "brick", "grass", "gravel", "coins", "moon", "page", "text"),
}


def bundled_photos(split: str, size: int = 128) -> ImageSet:
    """`size` x `size` crops of scikit-image's photographs, at full and at half scale.

    They replace the paper's data and need no download. Crops of "train" and "beside" overlap by
    half; those of "validation" and "test" are disjoint within each scale.
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

    It is turned upright by its EXIF tag. Grey becomes three equal channels, transparency white, 16
    bits become 8. Of an animation the first picture is read.

    Raises:
        Exception: of many kinds, if the file is not a readable image, or too large.
    """
    if isinstance(source, Path) and not source.is_file():
        raise ValueError("not a file")  # Pillow would wait for a pipe
    with Image.open(source, formats=FORMATS) as opened:
        if opened.width * opened.height > MAX_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels are too many")
        if opened.mode == "F":
            raise ValueError("pixels are floats, of unknown range")
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
    """Load the first `limit` images, in file order, of a folder or zip, resized to size x size.

    `warn` is called with the name of each file that cannot be decoded; the other images keep their
    indices. The decoded images are cached. Nothing is unpacked to disk.

    Raises:
        UserError: if the path does not exist, has no readable image or a folder that cannot be
            read, or is an incomplete or damaged zip.
        OSError: if the file system fails to read a file.
    """
    path = Path(path)
    with ExitStack() as stack:
        files, read = _open(path, stack)
        listing = _images(path, files)[:limit]
        key = hashlib.sha256(repr((str(path.resolve()), listing, size)).encode()).hexdigest()
        stored = CACHE / f"{key[:20]}.npz"
        try:
            with np.load(stored, allow_pickle=False) as arrays:
                images, good = arrays["images"], arrays["good"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            images, good = _decode_all([name for name, *_ in listing], read, size)
            try:
                with atomic_path(stored) as temporary:
                    np.savez(temporary, images=images, good=good)
            except OSError as error:
                warn(f"warning: the decoded images cannot be cached: {error}")
    names = [printable(name) for name, *_ in listing]
    for name in (name for name, is_good in zip(names, good, strict=True) if not is_good):
        warn(f"warning: skipped {name}: not a readable image")
    if not good.any():
        raise UserError(f"none of the {len(names)} images in {path} could be decoded")
    indices = np.flatnonzero(good).tolist()
    images = images if good.all() else images[good]
    return ImageSet(torch.from_numpy(images), [names[i] for i in indices], indices,
                    len(names) - len(indices))


def fingerprint(path: str | Path) -> str:
    """A hash of the names, sizes and times of the images at `path`, not of their pixels."""
    with ExitStack() as stack:
        files, _ = _open(Path(path), stack)
        return hashlib.sha256(repr(_images(Path(path), files)).encode()).hexdigest()


Files = dict[str, tuple[int, float]]  # size, and time or checksum, by name
Read = Callable[[str], Path | io.BytesIO]


def _images(path: Path, files: Files) -> list[tuple[str, int, float]]:
    """Name, size and time of each image, sorted by name. Raises UserError if there is none."""
    visible = sorted(name for name in files if not PurePosixPath(name).name.startswith("."))
    images = [(name, *files[name]) for name in visible if name.lower().endswith(SUFFIXES)]
    if not images:
        inner = [printable(name) for name in visible if name.lower().endswith(".zip")]
        raise UserError(f"no images in {path}: " + (
            f"it holds an archive, {inner[0]}: give that one" if inner
            else f"it must hold {', '.join(SUFFIXES)} files"))
    return images


def _open(path: Path, stack: ExitStack) -> tuple[Files, Read]:
    """The files at a path, and a function that reads one. `stack` closes the zip."""
    if not path.exists():
        raise UserError(f"no data at {path}: give a folder or zip of images (CelebA: see "
                        "data/README.md)")
    if path.is_dir():
        return _walk(path), path.joinpath
    if not path.is_file():
        raise UserError(f"{path} is not a folder or zip of images: give one")
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is not a zip of images ({error}): the download may be incomplete "
                        f"or damaged, or a web page; compare its {path.stat().st_size} bytes with "
                        "the size at its source, and download it again; unpack other archives and "
                        "give the folder") from error
    members = {m.filename: m for m in archive.infolist() if not m.is_dir()}

    def read(name: str) -> io.BytesIO:
        if members[name].file_size > MAX_BYTES:
            raise ValueError("too large")
        try:
            return io.BytesIO(archive.read(members[name]))
        except Exception as error:  # for a wrong offset zipfile raises an OSError with a number
            raise ValueError("damaged") from error

    return {name: (m.file_size, m.CRC) for name, m in members.items()}, read


def _walk(folder: Path) -> Files:
    """The files below a folder. Links are followed, except to a parent folder."""
    files = {}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        above = {os.path.realpath(parent) for parent in (here, *Path(here).parents)}
        folders[:] = sorted(f for f in folders if os.path.realpath(Path(here, f)) not in above)
        for name in names:
            path = Path(here, name)
            status = path.stat() if path.exists() else path.lstat()  # a broken link has none
            files[path.relative_to(folder).as_posix()] = status.st_size, status.st_mtime
    return files


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {printable(error.filename)} ({error.strerror}): make "
                    "it readable, or remove it from the data") from error


def _decode_all(names: list[str], read: Read, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, 3, size, size), black if one cannot be decoded; and which can, (n,)."""
    images, good = np.zeros((len(names), 3, size, size), np.uint8), np.zeros(len(names), bool)

    def one(i: int) -> None:
        try:
            images[i] = decode(read(names[i]), size).numpy()
            good[i] = True
        except Exception as error:  # damaged files raise all sorts
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise  # the file itself may be intact

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        list(pool.map(one, range(len(names))))  # raises what a thread raised
    return images, good


# --- the splits -------------------------------------------------------------------------------


@dataclass
class Splits:
    """Three disjoint sets, and a text on their source, for captions."""

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
    """Load the training, validation and test images.

    Args:
        data: "bundled" for scikit-image's photographs, of which `n_test` limits the test images;
            else a folder or zip: its first `n_train` files are for training, the next `n_test` for
            testing.
        n_validation: images held out from the end of the training part.
        beside: whether to train on crops of scikit-image's photographs too, each `OFTEN` times
            because they are few.

    Raises:
        UserError: if the data cannot be read, or a split would be empty.
    """
    if n_test < 1:
        raise UserError(f"n_test={n_test}: give at least one test image")
    if data == "bundled":
        train, validation, test = (bundled_photos(split, size)
                                   for split in ("train", "validation", "test"))
        return Splits(train, validation, test[:n_test],
                      "photographs from scikit-image, not the paper's data")
    if not 0 < n_validation < n_train:
        raise UserError(f"n_validation={n_validation} must be between 1 and n_train={n_train}")
    whole = load_images(data, size, n_train + n_test, warn)
    first, last = np.searchsorted(whole.indices, [n_train - n_validation, n_train])
    train, validation, test = whole[:first], whole[first:last], whole[last:]
    if not (len(train) and len(validation) and len(test)):
        raise UserError(f"{data} has {len(whole)} readable images, too few for n_train={n_train}, "
                        f"n_validation={n_validation} and n_test={n_test}: lower them")
    source = f"images from {Path(data).name}"
    if beside:
        photographs = bundled_photos("beside", size)
        source += f", and {len(photographs)} crops of photographs from scikit-image to train on"
        train = ImageSet(torch.cat([train.images, *[photographs.images] * OFTEN]),
                         [*train.names, *photographs.names * OFTEN],
                         [*train.indices, *[len(whole) + i for i in photographs.indices] * OFTEN])
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
    return torch.stack(crops).float() / 255
