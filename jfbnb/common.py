"""What every module needs: one kind of user error, seeded draws, safe writes, the device."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]


CHECK_FAILED = "NOT MET:"


class UserError(Exception):
    """Bad input. The message is one line: what is wrong and what to do."""


def seeded_generator(*keys: int) -> torch.Generator:
    """A CPU generator that depends on the integer keys alone, e.g. (seed, image index)."""
    state = np.random.SeedSequence([int(key) for key in keys]).generate_state(2)
    return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` only if the block succeeds.

    Readers so never see half a file, and a failed write leaves the earlier file as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
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
    """Write a text file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def pick_device(device: str) -> torch.device:
    """Turn "auto", "cpu" or "cuda" into a device.

    Raises:
        UserError: for another name, or for "cuda" where there is no CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but PyTorch sees no CUDA device: use device=cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def describe_device(device: torch.device) -> str:
    """A short name of the hardware, for logs and provenance."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def check(claim: str, holds: bool) -> None:
    """Print whether a claim holds. A notebook goes on if not: its reader may have changed it."""
    print(f"{'ok:' if holds else CHECK_FAILED} {claim}")
