"""Several processes, started by torchrun, that share each batch of a training; else there is one.

All must start from the same weights. Each takes its share of the images of a batch, and the
gradients are summed, so a step is that of one process but for rounding.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from jfbnb.common import UserError


def rank() -> int:
    """The number of this process. Rank 0 alone logs, validates and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun has started, and yield the device of this one.

    Raises:
        UserError: if this process has no GPU of its own, or if another process dies.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return

    def stop(*_: object) -> None:
        raise RuntimeError("torchrun ends it, as when another process has died")

    signal.signal(signal.SIGTERM, stop)
    try:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group()  # NCCL between GPUs, gloo between CPUs
        yield device
    except RuntimeError as error:  # a lost connection is one
        raise UserError(f"process {rank()} stopped ({str(error).splitlines()[0]}): start the same "
                        "command again; it resumes from the last checkpoint") from error
    dist.destroy_process_group()


def share(n: int) -> slice:
    """This process's images of a batch of n, perhaps none."""
    return slice(rank(), n, world_size())


def add_up(values: list[float], device: torch.device) -> list[float]:
    """Each number's sum over the processes."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradient of each process's share by that of the whole batch."""
    if world_size() > 1:
        for p in filter(lambda p: p.requires_grad, parameters):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
