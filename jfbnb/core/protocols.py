"""Protocols: which operator measures, with how much noise; and the measurement itself, Eq. 1."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, seeded_generator
from jfbnb.core.operators import Blur, LinearOperator

# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """What is measured: side of the scene in pixels, operator, noise level on images in [0, 1].

    Args:
        make: image size, a side or (H, W) -> the operator on images of that size.
    """

    name: str
    image_size: int
    make: Callable[[int | tuple[int, int]], LinearOperator]
    noise_std: float

    def operator(self, image_size: int | tuple[int, int] | None = None) -> LinearOperator:
        """A, for the protocol's own image size or for another."""
        return self.make(image_size or self.image_size)


PROTOCOLS = {protocol.name: protocol for protocol in (
    # The paper's section 5, read literally: variance 5, noise 0.01.
    Protocol("paper", 128, partial(Blur, kernel_size=5, kernel_std=math.sqrt(5)), 0.01),
    # The code published with it, github.com/lliu58b/Jacobian-free-Backprop-Implicit-Networks (two
    # letters l) up to its commit d8e6ada: standard deviation 5; noise 0.01 on images in [-1, 1].
    # Its later state has other kernels.
    Protocol("code", 128, partial(Blur, kernel_size=5, kernel_std=5.0), 0.005),
    # What a camera does: pictures of 128 x 128 cut from blurred scenes that go on beyond them.
    Protocol("camera", 132, partial(Blur, kernel_size=5, kernel_std=math.sqrt(5), border="unknown"),
             0.01),
)}


def get_protocol(name: str) -> Protocol:
    """Look up a protocol: "paper", its text read literally; "code", the code published with it, up
    to its commit d8e6ada; "camera", pictures cut from larger scenes.

    Raises UserError for an unknown name.
    """
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def measure(A: nn.Module, x: Tensor, noise_std: float, seed: int, indices: Sequence[int]) -> Tensor:
    """Eq. 1: d = A x + noise, with noise drawn once per image from (seed, image index).

    A measurement so depends neither on the batch that an image is in nor on the device.

    Args:
        x: images (B, C, H, W) in [0, 1].
        noise_std: standard deviation of the white noise, on the same scale.
        indices: B integers that name the images.

    Raises:
        ValueError: if there is not one index per image.
    """
    if len(indices) != len(x):
        raise ValueError(f"{len(x)} images but {len(indices)} indices")
    Ax = A(x)
    noise = torch.empty(Ax.shape)
    for row, index in enumerate(indices):
        noise[row] = torch.randn(Ax.shape[1:], generator=seeded_generator(seed, index))
    return Ax + noise_std * noise.to(Ax)
