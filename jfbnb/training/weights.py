"""Weights: safetensors files, each with a JSON model card beside it."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path, atomic_write
from jfbnb.core.denoisers import LARGEST, NETWORKS, Denoiser

Built = TypeVar("Built", bound=nn.Module)


def save_weights(path: str | Path, module: nn.Module, card: dict) -> None:
    """Write a module's weights to `path` (.safetensors) and its model card beside it (.json).

    The file describes the networks of its denoisers by class and constructor arguments.

    Args:
        card: facts for the reader: protocol, training data, metrics, command, versions.

    Raises:
        UserError: if a network does not keep its constructor's arguments.
    """
    path = Path(path)
    networks = [describe(D.network) for D in module.modules() if isinstance(D, Denoiser)]
    tensors = {name: value.detach().cpu().contiguous()
               for name, value in module.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"networks": json.dumps(networks)})
    card = {"networks": networks, "weights": sum(v.numel() for v in tensors.values()),
            "numbers": {name: v.item() for name, v in tensors.items() if v.dim() == 0}, **card}
    atomic_write(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def describe(network: nn.Module) -> dict:
    """A network's class and constructor arguments, as they are stored. See `save_weights`."""
    kind = type(network)
    names = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    missing = [name for name in names if not hasattr(network, name)]
    if missing:
        raise UserError(f"{kind.__name__} does not keep {', '.join(missing)} of its constructor: "
                        "set self.NAME = NAME for each, so that it can be saved and built again")
    found = {"class": kind.__qualname__, "arguments": {name: getattr(network, name)
                                                      for name in names}}
    if not _is_description(found):
        raise UserError(f"{kind.__name__} cannot be stored: its constructor may only take text, "
                        f"flags and numbers up to {LARGEST}, not {found['arguments']}")
    return found


def load_weights(path: str | Path, build: Callable[..., Built],
                 networks: Sequence[type[nn.Module]] = ()) -> Built:
    """The module that `save_weights` stored. Nothing that the file names is imported.

    Args:
        build: called with the file's networks, untrained, in order; returns the module.
        networks: classes that the file may name by their `__qualname__`, besides `NETWORKS`.

    Raises:
        UserError: if the file is missing, damaged or of another kind, or names another class.
    """
    tensors, metadata = _read(path)
    try:
        descriptions = json.loads(metadata.get("networks", "null"))
    except (ValueError, RecursionError):
        descriptions = None
    if not (isinstance(descriptions, list) and all(map(_is_description, descriptions))):
        raise UserError(f"the weights {path} do not name their networks: download weights of this "
                        "release")
    known = [*networks, *NETWORKS]
    try:
        with building():
            with torch.device("meta"):  # uses no memory, whatever size the file claims
                wanted = build(*(_untrained(d, known) for d in descriptions)).state_dict()
            if _shapes(tensors) != _shapes(wanted):
                raise UserError(f"the weights {path} do not fit the networks that they name: "
                                f"{descriptions}")
            module = build(*(_untrained(d, known) for d in descriptions))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(f"the weights {path} belong to something else ({error})") from error
    return _load(path, module, tensors)


def load_denoiser(path: str | Path, networks: Sequence[type[nn.Module]] = ()) -> Denoiser:
    """Read a denoiser; arguments and errors as in `load_weights`."""
    return load_weights(path, lambda network: Denoiser(network, 0.0), networks)


def fill(path: str | Path, module: nn.Module) -> None:
    """Load a file's tensors into a module, in place. Raises UserError if they do not fit."""
    tensors, _ = _read(path)
    if _shapes(tensors) != _shapes(module.state_dict()):
        raise UserError(f"the weights {path} are not those of {type(module).__name__}")
    _load(path, module, tensors)


@contextmanager
def building() -> Iterator[None]:
    """Modules made inside are float32, as in weights files, and leave the random generator alone.

    The program's default dtype is restored afterwards.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(default)


def read_card(path: str | Path) -> dict:
    """The model card beside a weights file. Raises UserError if it is missing or damaged."""
    file = Path(path).with_suffix(".json")
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(card, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"no model card {file} ({error}): train the network first, or give the "
                        "folder that contains it") from error
    return card


def _read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    if not Path(path).is_file():
        raise UserError(f"no weights at {path}: train them first, or give the folder that contains "
                        "them")
    try:
        with safe_open(path, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            return tensors, stored.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the weights {path} are damaged ({error}): download or train them again"
                        ) from error


def _load(path: str | Path, module: Built, tensors: dict[str, Tensor]) -> Built:
    if not all(value.isfinite().all() for value in tensors.values()):
        raise UserError(f"the weights {path} are not all finite: download or train them again")
    module.load_state_dict(tensors)
    return module


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (value.dtype, value.shape) for name, value in tensors.items()}


def _is_description(found: object) -> bool:
    """Whether `describe` may have stored this, with numbers up to `LARGEST`."""
    return (isinstance(found, dict) and set(found) == {"class", "arguments"}
            and isinstance(found["class"], str) and isinstance(found["arguments"], dict)
            and all(isinstance(v, str | bool | None)
                    or (isinstance(v, int | float) and abs(v) <= LARGEST)
                    for v in found["arguments"].values()))


def _untrained(description: dict, known: list[type[nn.Module]]) -> nn.Module:
    kind = next((k for k in known if k.__qualname__ == description["class"]), None)
    if kind is None:
        raise UserError(f"the weights name the network class {description['class']}, which is not "
                        f"among {', '.join(k.__qualname__ for k in known)}: pass it in `networks`, "
                        "or add it to jfbnb.core.denoisers.NETWORKS")
    return kind(**description["arguments"])
