"""Check what is installed, and which parts of the suite would not work."""

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

LIBRARIES = ("jfbnb", "torch", "numpy", "scikit-image", "safetensors", "matplotlib", "jupyterlab",
             "ipywidgets", "anywidget", "papermill", "distributed")
NEEDED_BYTES = 200_000_000  # for profile quick: executed notebooks, figures, checkpoints
Finding = tuple[bool, str]  # whether it is ok, and a line that says so


def examine(data: str, weights: Path | None) -> Iterator[Finding]:
    """Findings on the machine, the installation, the data and the weights, one by one."""
    memory = psutil.virtual_memory()
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    yield True, (f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for PyTorch, "
                 f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free")
    yield True, f"device `auto` is {describe_device(pick_device('auto'))}"
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        yield False, (f"there is an NVIDIA driver, but torch {torch.__version__} cannot use it: "
                      "install a build for CUDA, and run nvidia-smi")
    if torch.backends.mps.is_available():
        yield True, "Apple's GPU is not used: the CPU computes"
    for name in LIBRARIES:
        try:
            yield True, f"{name} {version(name)}"
        except PackageNotFoundError:  # without the others this command would not run
            yield True, (f"no {name}: not needed to restore pictures; for notebooks and sweeps "
                         "pip install 'jfbnb[notebooks,sweep]'")
    yield from notebooks()
    try:
        yield True, f"images at {data}, the first is {load_images(data, limit=1).names[0]}"
    except (UserError, OSError) as error:
        yield not os.path.exists(data), f"{error}; the profiles cpu, paper and best need CelebA"
    usable = []
    for name in expected_methods(weights):
        try:
            make_methods([name], weights, torch.device("cpu"))
            usable.append(name)
        except (UserError, OSError) as error:
            yield False, f"method {name}: {error}"
    yield bool(usable), f"weights in {weights or RELEASED}: {', '.join(usable) or 'none'}"


def notebooks() -> Iterator[Finding]:
    """Check for a checkout, and for disk space for its results."""
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
            yield False, f"{folder} cannot be written: make it writable to run notebooks"
