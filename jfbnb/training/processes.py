"""One training or evaluation shared by several processes, which torchrun starts.

Without torchrun there is one process, rank 0 of 1, and nothing here has any effect.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jfbnb.common import UserError

# Where a machine has gone silent. Longer than rank 0 takes to decode images or to validate.
TIMEOUT = timedelta(minutes=30)
AGAIN = "start the same command again; training goes on from its last checkpoint"


def rank() -> int:
    """Which process this is. Rank 0 alone logs, validates and writes."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _grouped() else 1


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join torchrun's processes: NCCL between GPUs, gloo between CPUs. Yields this one's device.

    Raises:
        UserError: if this machine has fewer GPUs than processes, or if another process dies.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"process {device.index} of this machine has no GPU: start at most "
                            f"{torch.cuda.device_count()} (--nproc-per-node), or use device=cpu")
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    signal.signal(signal.SIGTERM, _told_to_stop)  # so torchrun ends the others when one dies
    try:
        yield device
    except RuntimeError as error:  # a lost connection is one, and so is a lack of memory
        raise UserError(f"process {rank()} stopped: {str(error).splitlines()[0]}; {AGAIN}"
                        ) from error
    dist.destroy_process_group()


def _told_to_stop(*_: Any) -> None:
    raise UserError(f"process {rank()} was told to stop, as when another one has died; {AGAIN}")


# --- training -----------------------------------------------------------------------------------


class _SharedLoss(nn.Module):
    """A loss as a module: DistributedDataParallel acts on the forward pass of one."""

    def __init__(self, module: nn.Module, batch_loss: Any):
        super().__init__()
        self.module, self.batch_loss = module, batch_loss

    def forward(self, *arguments: Any) -> Any:
        return self.batch_loss(*arguments)


def share_out(module: nn.Module, batch_loss: Any) -> Any:
    """`batch_loss` of a training whose processes have a `share` of each batch.

    All start from rank 0's weights. The backward pass averages the gradients in the parameters of
    `module` over the processes. Each of them must enter the loss.
    """
    if world_size() == 1:
        return batch_loss
    return DistributedDataParallel(_SharedLoss(module, batch_loss))


def add_up(values: list[float], device: torch.device) -> list[float]:
    """Each number's sum over the processes."""
    if world_size() == 1:
        return values
    together = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return together.tolist()


@contextmanager
def rank_0_first() -> Iterator[None]:
    """The others run the block after rank 0: they find what it has read, mended or cached."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


# --- who has which images -----------------------------------------------------------------------


def share(n: int) -> slice:
    """This process's part of n images, a block of about n / world_size(), perhaps none."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def block(n: int) -> slice:
    """The same of images to evaluate. Raises UserError where a process would have none."""
    if n < world_size():
        raise UserError(f"{n} images for {world_size()} processes: start at most {n}")
    return share(n)


def gather(value: Any) -> list[Any]:
    """What each process has, in order of rank, in all of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
