"""What this installation has, and what of the suite would not work with it."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from jfbnb.common import ROOT, UserError, describe_device, pick_device
from jfbnb.datasets import load_images
from jfbnb.methods import HEADS, LABELS, make_methods

LIBRARIES = ("jfbnb", "torch", "torchvision", "numpy", "scikit-image", "safetensors", "matplotlib",
             "jupyterlab", "ipywidgets", "anywidget", "papermill", "nbval")
NEEDED_BYTES = 200_000_000  # of profile quick: executed notebooks, figures, checkpoints


def examine(data: Path, weights: Path) -> Iterator[tuple[bool, str]]:
    """One finding after another: whether all is well, and the line that says it."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    yield from _libraries()
    yield True, f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch"
    yield True, f"device `auto` is {describe_device(pick_device('auto'))}"
    yield from _folder()
    yield from _data(data)
    yield from _weights(weights)


def _libraries() -> Iterator[tuple[bool, str]]:
    missing = []
    for name in LIBRARIES:
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
        else:
            yield True, f"{name} {found}"
    if missing:
        yield False, f"not installed: {', '.join(missing)}; `make reproduce` installs all"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        yield False, f"torchvision does not fit this torch ({error}): install both from the lock"


def _folder() -> Iterator[tuple[bool, str]]:
    free = shutil.disk_usage(ROOT).free
    yield free > NEEDED_BYTES, f"{free / 1e9:.1f} GB free on the disk of {ROOT}"
    for name in ("runs", "figures"):
        folder = ROOT / name
        place = folder if folder.exists() else ROOT
        if not os.access(place, os.W_OK):
            yield False, f"{folder} cannot be written: nothing can be reproduced here"


def _data(data: Path) -> Iterator[tuple[bool, str]]:
    yield True, "photographs for profile quick are inside scikit-image"
    if not data.exists():
        yield True, f"no CelebA at {data}: the profiles cpu and paper need --data"
        return
    try:
        images = load_images(data, limit=1)
        yield True, f"images at {data}, the first is {images.names[0]}"
    except UserError as error:
        yield False, str(error)


def _weights(weights: Path) -> Iterator[tuple[bool, str]]:
    usable = []
    for name in (n for n in LABELS if n not in HEADS):
        try:
            make_methods([name], weights, torch.device("cpu"))
        except UserError as error:
            yield False, f"method {name}: {error}"
        else:
            usable.append(name)
    yield bool(usable), f"weights in {weights}: {', '.join(usable) or 'none'}"
