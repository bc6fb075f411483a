"""bfloat16: where to compute in it, and when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from jfbnb.common import UserError

# --- bfloat16 -----------------------------------------------------------------------------------


@contextmanager
def precision(module: nn.Module, bf16: bool) -> Iterator[Callable[[bool], None]]:
    """Within it the networks in a module that have an attribute `bf16` have that value of it.

    Yields what sets another value, until the block ends.
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
    """Whether to train in bfloat16. "auto" says yes where the processor computes in it.

    Elsewhere it is emulated, and 10 to 20 times slower than float32.

    Raises:
        UserError: for another word than auto, always or never.
    """
    if choice not in ("auto", "always", "never"):
        raise UserError(f"bf16={choice!r}: choose auto, always or never")
    if choice != "auto":
        return choice == "always"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
