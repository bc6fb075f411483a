"""Protocols (an operator and a noise level) and the measurement, Eq. 1: d = A x + noise."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, seeded_generator
from jfbnb.core.operators import Blur, LinearOperator


@dataclass(frozen=True)
class Protocol:
    """How images are measured.

    Args:
        image_size: side of the scene in pixels.
        make: image size, a side or (H, W) -> the operator on images of that size.
        noise_std: standard deviation of the noise, on images in [0, 1].
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
    # As a camera does: pictures of 128 x 128, cut from larger blurred scenes.
    Protocol("camera", 132, partial(Blur, kernel_size=5, kernel_std=math.sqrt(5), border="unknown"),
             0.01),
)}


def get_protocol(name: str | Protocol) -> Protocol:
    """The protocol of that name, one of `PROTOCOLS`. Raises UserError for another name.

    A `Protocol` is returned as it is: a cell `protocol = get_protocol(protocol)` may be run again.
    """
    if isinstance(name, Protocol):
        return name
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def measure(A: nn.Module, x: Tensor, noise_std: float, seed: int, indices: Sequence[int]) -> Tensor:
    """Eq. 1: d = A x + noise, (B, *range), with white noise drawn from (seed, image index).

    So a measurement depends neither on the image's batch nor on the device.

    Args:
        x: images (B, C, H, W) in [0, 1].
        noise_std: standard deviation of the noise, on the same scale.
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
