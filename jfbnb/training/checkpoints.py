"""Checkpoints of a training: the last two, each checked by its own hash before it is believed.

They are safetensors files, so that loading one runs no code.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path
from jfbnb.training.weights import tensor_list

History = list[dict[str, float]]


def save_checkpoint(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
                    history: History) -> None:
    """Store weights, Adam's moments and the history, whole or not at all.

    What `file` was becomes `previous(file)`.
    """
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v.contiguous() for k, v in moments.items()}
    text = json.dumps(history)
    written = file.with_suffix(".new")
    with atomic_path(written) as temporary:
        try:
            save_file(tensors, temporary,
                      metadata={"history": text, "sha256": _digest(tensors, text)})
        except SafetensorError as error:
            raise OSError(f"cannot write the checkpoint {file} ({error}): free some space and run "
                          "again; the one before it is kept") from error
    # A kill between these two leaves the previous one, which `resume` then takes.
    if file.exists():
        file.replace(previous(file))
    written.replace(file)


def previous(file: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return file.with_name(f"{file.stem}.previous{file.suffix}")


def resume(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
           log: Callable[[str], None]) -> History:
    """Restore the newest checkpoint that is whole, in place; return its history, or [].

    Raises:
        UserError: if there are checkpoints and none of them is whole.
    """
    found = [path for path in (file, previous(file)) if path.exists()]
    complaints = []
    for path in found:
        try:
            return load_checkpoint(path, module, optimizer)
        except UserError as error:
            complaints.append(str(error))
            log(f"warning: {error}")
            path.replace(path.with_suffix(".damaged"))  # else the next one would be kept below it
    if found:
        raise UserError(f"{complaints[-1]} and there is no other one: run again to start afresh")
    return []


def load_checkpoint(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> History:
    """Restore what `save_checkpoint` stored, in place; return the history.

    Raises:
        UserError: if the file is damaged; module and optimizer are then as before.
        OSError: if it cannot be read now, which says nothing of what is in it.
    """
    try:
        with safe_open(file, "pt") as stored:
            _check_list(tensor_list(stored), module, optimizer)
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = stored.metadata()
        if _digest(tensors, metadata["history"]) != metadata["sha256"]:
            raise ValueError("its hash is not the stored one")
        history = json.loads(metadata["history"])
        if not (isinstance(history, list) and all(isinstance(r, dict) for r in history)):
            raise ValueError("its history is none")
    except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"the checkpoint {file} is damaged ({error})") from error
    except OSError as error:
        raise OSError(f"cannot read the checkpoint {file} ({error})") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, i, moment = name.split(".")
            state.setdefault(int(i), {})[moment] = value
    module.load_state_dict({name.removeprefix("module."): value for name, value in tensors.items()
                            if name.startswith("module.")})
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return history


def _check_list(found: dict[str, tuple[str, list[int]]], module: nn.Module,
                optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless the tensors are the module's and Adam's, before any is read."""
    weights = {f"module.{name}": list(v.shape) for name, v in module.state_dict().items()}
    moments = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if f"adam.{i}.step" in found:  # frozen weights have none
            moments |= {f"adam.{i}.step": [], f"adam.{i}.exp_avg": list(p.shape),
                        f"adam.{i}.exp_avg_sq": list(p.shape)}
    if ({name: shape for name, (_, shape) in found.items()} != weights | moments
            or not {kind for kind, _ in found.values()} <= {"F32", "F64", "I64"}):
        raise ValueError("its tensors are not those of this training")


def _digest(tensors: dict[str, Tensor], history: str) -> str:
    digest = hashlib.sha256(history.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
