"""Random blurs, borders and noise levels to train over."""

import math
from dataclasses import dataclass, field

import torch

from jfbnb.core import kernels
from jfbnb.core.operators import Blur, Convolution, LinearOperator
from jfbnb.core.protocols import PROTOCOLS


@dataclass(frozen=True)
class Conditions:
    """The distribution of each training step's operator and noise level.

    Sides and standard deviations are log-uniform between their two values.

    Args:
        kernel_side, kernel_std: of Gaussian kernels, in pixels; the side is odd.
        noise_std: of the noise, on images in [0, 1].
        unknown: the probability that the border is unknown; else it is black.
        motion_share, defocus_share: the probabilities of a motion kernel, at least 3 pixels long,
            and of a disk; both are at most as wide as the Gaussians.
        protocol_share: the probability of each of the `PROTOCOLS`, by name.
    """

    kernel_side: tuple[int, int] = (3, 13)
    kernel_std: tuple[float, float] = (0.6, 5.0)
    noise_std: tuple[float, float] = (0.002, 0.05)
    unknown: float = 0.0
    motion_share: float = 0.0
    defocus_share: float = 0.0
    protocol_share: dict[str, float] = field(default_factory=dict)

    def draw(self, image_size: int, generator: torch.Generator) -> tuple[LinearOperator, float]:
        """Draw an operator on images of that size, and a noise level."""
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        side, kernel, noise = u[:3]
        for name, share in self.protocol_share.items():
            if u[3] < share:
                return PROTOCOLS[name].operator(image_size), PROTOCOLS[name].noise_std
            u[3] -= share
        border = "unknown" if u[4] < self.unknown else "black"
        noise_std = _between(self.noise_std, noise)
        low, high = self.kernel_side
        if u[5] < self.motion_share:
            made = kernels.motion(_between((3.0, float(high)), side), 180 * u[6])
        elif u[5] < self.motion_share + self.defocus_share:
            made = kernels.disk(_between((1.0, high / 2), side))
        else:
            return Blur(image_size, low + 2 * math.floor(side * ((high - low) // 2 + 1)),
                        _between(self.kernel_std, kernel), border), noise_std
        return Convolution(image_size, made, border), noise_std


# Those of photographs, and the protocols.
RANDOM_DEGRADATIONS = Conditions(
    (3, 15), (0.5, 5.0), unknown=0.6, motion_share=0.2, defocus_share=0.15,
    protocol_share={"paper": 0.36, "code": 0.12, "camera": 0.12})


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** share
