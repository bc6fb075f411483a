"""What this installation has, and what of the suite would not work with it."""

import importlib
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from jfbnb.common import UserError, describe_device, pick_device
from jfbnb.data import load_images
from jfbnb.run import checkout
from jfbnb.training.restorers import RELEASED, expected_methods, make_methods

LIBRARIES = ("jfbnb", "torch", "torchvision", "numpy", "scikit-image", "safetensors")
FOR_NOTEBOOKS = ("matplotlib", "jupyterlab", "ipywidgets", "anywidget", "papermill")
NEEDED_BYTES = 200_000_000  # of profile quick: executed notebooks, figures, checkpoints


def examine(data: str, weights: Path) -> Iterator[tuple[bool, str]]:
    """One finding after another: whether all is well, and the line that says it."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    yield from _libraries()
    yield from _kernel()
    memory = psutil.virtual_memory()
    yield True, (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch, "
                 f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free")
    yield True, f"device `auto` is {describe_device(pick_device('auto'))}"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield False, (f"an NVIDIA driver is here, but torch {torch.__version__} cannot use it: "
                      "install a build for CUDA, and see what nvidia-smi says")
    if torch.backends.mps.is_available():
        yield True, "Apple's GPU is not used: the CPU computes"
    yield from _folder()
    yield from _data(data)
    yield from _weights(weights)


def _libraries() -> Iterator[tuple[bool, str]]:
    missing = []
    for name in (*LIBRARIES, *FOR_NOTEBOOKS):
        try:
            found = version(name)
        except PackageNotFoundError:
            missing.append(name)
        else:
            yield True, f"{name} {found}"
    if needed := [name for name in missing if name in LIBRARIES]:
        yield False, f"not installed: {', '.join(needed)}; `make reproduce` installs all"
    if lacking := [name for name in missing if name in FOR_NOTEBOOKS]:
        yield True, (f"no {', '.join(lacking)}: pictures are restored without, the notebooks would "
                     "not run; pip install 'jfbnb[notebooks]'")
    try:
        yield True, f"distributed {version('distributed')}"
    except PackageNotFoundError:
        yield True, "no distributed: `jfbnb sweep` would not work; pip install 'jfbnb[sweep]'"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        yield False, f"torchvision does not fit this torch ({error}): install both from the lock"


def _kernel() -> Iterator[tuple[bool, str]]:
    try:
        from jfbnb.run.reproduce import check_kernel  # slow to import

        yield True, f"the Jupyter kernel python3 has the package in {check_kernel()}"
    except ModuleNotFoundError as error:
        yield True, f"no Jupyter kernel was looked for, as {error.name} is not installed"
    except UserError as error:
        yield False, str(error)


def _folder() -> Iterator[tuple[bool, str]]:
    try:
        checkout.need_checkout()
    except UserError as error:
        yield True, f"no checkout: {error}"
        return
    base = checkout.work()
    free = shutil.disk_usage(base).free
    yield free > NEEDED_BYTES, f"{free / 1e9:.1f} GB free on the disk of {base}"
    for folder in (base / "runs", base / "figures"):
        if not os.access(folder if folder.exists() else base, os.W_OK):
            yield False, f"{folder} cannot be written: nothing can be reproduced here"


def _data(data: str) -> Iterator[tuple[bool, str]]:
    yield True, "photographs for profile quick are inside scikit-image"
    if not os.path.exists(data):
        yield True, f"no CelebA at {data}: the profiles cpu, paper and best need --data"
        return
    try:
        images = load_images(data, limit=1)
        yield True, f"images at {data}, the first is {images.names[0]}"
    except (UserError, OSError) as error:
        yield False, str(error)


def _weights(weights: Path | None) -> Iterator[tuple[bool, str]]:
    usable = []
    for name in expected_methods(weights):
        try:
            make_methods([name], weights, torch.device("cpu"))
        except (UserError, OSError) as error:
            yield False, f"method {name}: {error}"
        else:
            usable.append(name)
    yield bool(usable), f"weights in {weights or RELEASED}: {', '.join(usable) or 'none'}"
