"""What a training may meet in the place of one blur and one noise level."""

import math
from dataclasses import dataclass, field

import torch

from jfbnb.core import kernels
from jfbnb.core.operators import Blur, Convolution, LinearOperator
from jfbnb.core.protocols import PROTOCOLS


@dataclass(frozen=True)
class Conditions:
    """What a training may meet in the place of one blur and one noise level: ranges to draw from.

    Gaussian kernels, their side odd, in pixels; the standard deviations of kernel and noise are
    uniform on a logarithmic axis, and the noise's is on images in [0, 1].

    Args:
        unknown: the share of steps whose scene goes on beyond the border; it is black in others.
        moved, unfocused: the shares whose kernel is a motion, 3 pixels long or more, or a disk;
            both are as wide as the Gaussians are.
        home: the shares that have one of the `PROTOCOLS`, as it is, by its name.
    """

    kernel_side: tuple[int, int] = (3, 13)
    kernel_std: tuple[float, float] = (0.6, 5.0)
    noise_std: tuple[float, float] = (0.002, 0.05)
    unknown: float = 0.0
    motion_share: float = 0.0
    defocus_share: float = 0.0
    protocol_share: dict[str, float] = field(default_factory=dict)

    def draw(self, image_size: int, generator: torch.Generator) -> tuple[LinearOperator, float]:
        """An operator on images of that size, and a noise level."""
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


# Borders, kernels and noise that are met in photographs, and the protocols.
RANDOM_DEGRADATIONS = Conditions(
    (3, 15), (0.5, 5.0), unknown=0.6, motion_share=0.2, defocus_share=0.15,
    protocol_share={"paper": 0.36, "code": 0.12, "camera": 0.12})


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** share
