"""What this installation has, and what of the suite would not work with it."""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

from jfbnb.common import ROOT, UserError, describe_device, pick_device
from jfbnb.datasets import load_images
from jfbnb.methods import HEADS, LABELS, make_methods

LIBRARIES = ("jfbnb", "torch", "torchvision", "numpy", "scikit-image", "safetensors", "matplotlib",
             "jupyterlab", "ipywidgets", "anywidget", "papermill", "nbval")
OPTIONAL = {"distributed": "`jfbnb sweep` would not work: pip install 'jfbnb[sweep]'"}
NEEDED_BYTES = 200_000_000  # of profile quick: executed notebooks, figures, checkpoints


def examine(data: Path, weights: Path) -> Iterator[tuple[bool, str]]:
    """One finding after another: whether all is well, and the line that says it."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    yield from _libraries()
    yield from _kernel()
    memory = psutil.virtual_memory()
    yield True, (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch, "
                 f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free")
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
    for name, without in OPTIONAL.items():
        try:
            yield True, f"{name} {version(name)}"
        except PackageNotFoundError:
            yield True, f"no {name}: {without}"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        yield False, f"torchvision does not fit this torch ({error}): install both from the lock"


def _kernel() -> Iterator[tuple[bool, str]]:
    """The kernel that runs the notebooks: it must be of this very installation."""
    try:
        program = Path(KernelSpecManager().get_kernel_spec("python3").argv[0])
    except NoSuchKernel:
        yield False, "no Jupyter kernel python3: `make reproduce` installs ipykernel, which has one"
        return
    own = not program.is_absolute() or program.parent == Path(sys.executable).parent
    yield own, "the Jupyter kernel python3 is of " + (
        "this Python" if own else f"{program}, not of {sys.executable}: notebooks would run there")


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
    except (UserError, OSError) as error:
        yield False, str(error)


def _weights(weights: Path) -> Iterator[tuple[bool, str]]:
    usable = []
    for name in (n for n in LABELS if n not in HEADS):
        try:
            make_methods([name], weights, torch.device("cpu"))
        except (UserError, OSError) as error:
            yield False, f"method {name}: {error}"
        else:
            usable.append(name)
    yield bool(usable), f"weights in {weights}: {', '.join(usable) or 'none'}"
