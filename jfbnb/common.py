"""What every module needs: one kind of user error, seeded draws, safe writes, the device."""

import contextlib
import ctypes
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml

CHECK_FAILED = "NOT MET:"
UNFINISHED = ".unfinished-"  # how the name of a file begins that is still being written


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do.

    >>> import jfbnb
    >>> jfbnb.disk(-1)
    Traceback (most recent call last):
    jfbnb.common.UserError: disk radius -1: choose a positive number of pixels, at most 83
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback: in a notebook, too, it is one line."""
        return [f"{type(self).__name__}: {self}"]


def seeded_generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on the integer keys alone, e.g. (seed, image index).

    Raises:
        UserError: for a negative key.
    """
    if min(keys, default=0) < 0:
        raise UserError(f"seed {min(keys)}: choose one that is not negative")
    state = np.random.SeedSequence([int(key) for key in keys]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` only if the block succeeds.

    So readers never see half a file, and a failed write leaves the earlier file as it was.

    Raises:
        UserError: if `path` is a folder, a device or anything else that is not a file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it exists and is not a file; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(prefix=UNFINISHED, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner can read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: str | Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_unfinished(folder: Path) -> None:
    """Delete the temporary files that killed processes left below `folder`."""
    for path in folder.rglob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def printable(text: str) -> str:
    """The text with control characters and broken Unicode escaped, to show it on one line."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 5e-4 is a number, 010 is ten, `no` and 12:30 are text. PyYAML follows YAML 1.1.

    An empty value is an empty text here, where YAML 1.2 has null: no parameter is null.
    """

    yaml_implicit_resolvers: ClassVar = {None: [
        (f"tag:yaml.org,2002:{tag}", re.compile(f"({pattern})\\Z")) for tag, pattern in (
            ("null", "null|Null|NULL|~"),
            ("bool", "true|True|TRUE|false|False|FALSE"),
            ("int", "[-+]?[0-9]+"),
            ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"))]}


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The value of a YAML text. Raises UserError, which names the source, if it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML raises all sorts for values such as !!timestamp x
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source} is not YAML: {reason}") from error


def pick_device(device: str | torch.device) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device, and turn TF32 off in convolutions.

    A device is returned as it is, so that a cell `device = pick_device(device)` may be run again.

    Raises:
        UserError: for another name, or for "cuda" if there is no CUDA device.
    """
    if isinstance(device, torch.device):
        return device
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no CUDA device: use device=cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Convolutions in TF32, PyTorch's default on a GPU, round too much for solves to reach 1e-4.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


def keep_freed_memory() -> None:
    """Let this process reuse freed memory for its next large arrays.

    Linux's C library returns large arrays to the system at once, and each new page costs a fault:
    in the U-Net on large tiles a sixth of the time. Other systems have no such setting.
    """
    with contextlib.suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: larger arrays are placed by themselves. Older ones refuse over 32 MB.
        if mallopt(-3, 2**30) or mallopt(-3, 2**25):
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: free memory above it is returned


def describe_device(device: torch.device) -> str:
    """A short name of the hardware, for logs and provenance."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def check(claim: str, holds: bool) -> None:
    """Print whether a claim holds. No error is raised: the reader may have changed the notebook."""
    print(f"{'ok:' if holds else CHECK_FAILED} {claim}")
