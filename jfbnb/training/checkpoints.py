"""Checkpoints of a training: the last two, each verified by its hash before it is used.

They are safetensors files, so loading one runs no code. A checkpoint's name is a hash of everything
that the training depends on.
"""

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path

History = list[dict[str, float]]
PACKAGE = Path(__file__).parents[1]
# `digest` skips the source of these: `training_key` hashes the package's own.
KNOWN = ("jfbnb", "torch", "builtins", "functools", "collections")


# --- what a training depends on -----------------------------------------------------------------


def training_key(*values: Any) -> str:
    """A hash of what a training depends on: module, loss, images, settings, and their code."""
    files = sorted(path for pattern in ("core/*.py", "training/*.py", "data.py", "common.py")
                   for path in PACKAGE.glob(pattern))
    return digest(*values, *(path.read_bytes() for path in files))


def digest(*values: Any) -> str:
    """A hash of some values, the same in every process.

    It covers numbers, tensors, a module's weights and buffers, the source of each class and
    function from outside the package, and the variables that a function captures. It does not cover
    further files that these import.
    """
    found = hashlib.sha256()
    for part in _parts(values, set()):
        found.update(part)
    return found.hexdigest()


def _parts(value: Any, seen: set[int]) -> Iterator[bytes | np.ndarray]:
    """The bytes that distinguish a value from others."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    yield type(value).__qualname__.encode()
    inner: tuple | list = ()
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad}".encode()
        yield value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy()
    elif isinstance(value, dict):
        inner = (len(value), *(part for item in value.items() for part in item))
    elif isinstance(value, list | tuple):
        inner = (len(value), *value)
    elif isinstance(value, set | frozenset):
        inner = sorted(value, key=repr)
    elif inspect.ismethod(value):
        inner = (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
    elif id(value) in seen:
        pass
    elif isinstance(value, type) or inspect.isroutine(value):
        seen.add(id(value))
        yield value.__qualname__.encode()
        yield _source(value).encode()
        inner = (*getattr(value, "__bases__", ()),
                 *(cell.cell_contents for cell in getattr(value, "__closure__", None) or ()),
                 *(getattr(value, k, None) for k in ("__defaults__", "__kwdefaults__")))
    elif type(value).__module__ == "builtins":
        yield repr(value).encode()
    else:
        seen.add(id(value))
        inner = (type(value), getattr(value, "__dict__", repr(value)))
    for part in inner:
        yield from _parts(part, seen)


def _source(value: Any) -> str:
    """The text of the file that contains a class or function; in a notebook, its own source."""
    if (getattr(value, "__module__", None) or "builtins").split(".")[0] in KNOWN:
        return ""
    try:
        module = inspect.getmodule(value)
        return inspect.getsource(module if getattr(module, "__file__", None) else value)
    except (OSError, TypeError):  # a class in a notebook: its methods
        parts = vars(value).values() if isinstance(value, type) else ()
        return "".join(_source(part) for part in parts if inspect.isfunction(part))


# --- on disk ------------------------------------------------------------------------------------


def save_checkpoint(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
                    history: History) -> None:
    """Store weights, Adam's moments and the history, completely or not at all.

    The former `file` becomes `previous(file)`.
    """
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v.contiguous() for k, v in moments.items()}
    text = json.dumps(history)
    written = file.with_suffix(".new")
    with atomic_path(written) as temporary:
        try:
            save_file(tensors, temporary, metadata={
                "history": text, "sha256": digest(sorted(tensors.items()), text)})
        except SafetensorError as error:
            raise OSError(f"cannot write the checkpoint {file} ({error}): free some space and run "
                          "again; the one before it is kept") from error
    # A kill between these two leaves the previous one, which `resume` then uses.
    if file.exists():
        file.replace(previous(file))
    written.replace(file)


def previous(file: Path) -> Path:
    """The path of the checkpoint before this one."""
    return file.with_name(f"{file.stem}.previous{file.suffix}")


def resume(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
           log: Callable[[str], None]) -> History:
    """Restore the newest intact checkpoint, in place; return its history, or [].

    Raises:
        UserError: if there are checkpoints, but none is intact.
    """
    complaint = None
    for path in (file, previous(file)):
        try:
            return load_checkpoint(path, module, optimizer)
        except FileNotFoundError:
            continue
        except UserError as error:
            complaint = error
            log(f"warning: {error}")
            with suppress(FileNotFoundError):  # another process of this training was faster
                path.replace(path.with_suffix(".damaged"))
    if complaint:
        raise UserError(f"{complaint}, and there is no other one: run again to start from scratch")
    return []


def load_checkpoint(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> History:
    """Restore what `save_checkpoint` stored, in place; return the history.

    Raises:
        UserError: if the file is damaged; module and optimizer are then as before.
        OSError: if the file system fails to read it.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"the checkpoint {file} is damaged ({error})") from error
    except PermissionError as error:
        raise OSError(f"cannot read the checkpoint {file} ({error})") from error
    history = metadata.get("history", "")
    if digest(sorted(tensors.items()), history) != metadata.get("sha256"):
        raise UserError(f"the checkpoint {file} is damaged (its hash is not the stored one)")
    weights, moments = {}, {}
    for name, value in tensors.items():
        kind, _, name = name.partition(".")
        if kind == "module":
            weights[name] = value
        else:
            number, moment = name.split(".")
            moments.setdefault(int(number), {})[moment] = value
    module.load_state_dict(weights)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return json.loads(history)
