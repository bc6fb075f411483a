"""Whether the networks in a module compute in bfloat16."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jfbnb.common import UserError


@contextmanager
def precision(module: nn.Module, bf16: bool) -> Iterator[Callable[[bool], None]]:
    """Within the block, set the attribute `bf16` of each network in a module that has one.

    Yields a function that sets it anew. At the end each network has its earlier value.
    """
    networks = [network for network in module.modules() if hasattr(network, "bf16")]
    before = [network.bf16 for network in networks]

    def put(value: bool) -> None:
        for network in networks:
            network.bf16 = value

    put(bf16)
    try:
        yield put
    finally:
        for network, was in zip(networks, before, strict=True):
            network.bf16 = was


def pick_bf16(choice: str, device: torch.device) -> bool:
    """Whether to train in bfloat16: "always", "never", or "auto", where the device has it.

    Devices without it emulate it, 10 to 20 times slower than float32.

    Raises:
        UserError: for another choice.
    """
    if choice not in ("auto", "always", "never"):
        raise UserError(f"bf16={choice!r}: choose auto, always or never")
    if choice != "auto":
        return choice == "always"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
