"""Estimate the kernel of a blurred picture from the picture alone.

A Gaussian, a disk and a straight motion compete, each with its best parameters. The judge is the
spectral likelihood of `model_check.fit` (Whittle 1953): of all kernels, the one wins with which a
natural scene and noise explain the picture's power spectrum best. This maximises the likelihood of
the picture over the kernel alone, which Levin et al. (2011) advise; maximising it over the image
too would favour no blur. A spectrum has no phases, so a kernel and its mirror image look alike:
the kernels that are offered here are their own mirror images.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.photo import model_check

SURE = 0.0125  # the largest misfit of an estimate that is sure
BLURRED = 0.6  # the largest share of the misfit without a blur
SMALLEST = 192  # pixels: a smaller picture has too few blocks
FLOOR, FINEST = 2, 0.35  # noise that is added, over that at the finest scales, cycles per pixel
ROUNDS = 4  # of the search around the best of a grid, each with half the step


@dataclass(frozen=True)
class Family:
    """Kernels of one shape.

    Args:
        make: the kernel of a size in pixels, and of an angle in degrees where it has one.
        sizes: the smallest, the largest, and the step of their logarithm in the grid.
        angles: the grid's step in degrees; None for a round kernel.
    """

    name: str
    make: Callable[..., Tensor]
    sizes: tuple[float, float, float]
    angles: float | None = None

    def grid(self) -> list[np.ndarray]:
        """Points of log size and, where the kernel has one, angle."""
        low, high, step = self.sizes
        sizes = np.arange(math.log(low), math.log(high) + step / 2, step)
        angles = [np.arange(0, 180, self.angles)] if self.angles else []
        return [np.array(point) for point in itertools.product(sizes, *angles)]

    def steps(self) -> np.ndarray:
        return np.array([self.sizes[2], self.angles][: 2 if self.angles else 1])

    def option(self, point: np.ndarray) -> str:
        """The kernel at a point, as `--kernel` takes it."""
        size, *angle = point
        numbers = [math.exp(size), *(turn % 180 for turn in angle)]
        return f"{self.name}:{','.join(f'{number:.3g}' for number in numbers)}"

    def kernels(self, points: list[np.ndarray]) -> list[Tensor]:
        return [self.make(math.exp(size), *angle) for size, *angle in points]


FAMILIES = (Family("gaussian", kernels.gaussian, (0.4, 6, 0.2)),
            Family("disk", kernels.disk, (1, 12, 0.12)),
            Family("motion", kernels.motion, (3, 30, 0.18), 10))


def estimate(d: Tensor) -> str:
    """The kernel of a blurred picture, as `--kernel` takes it, e.g. motion:9,30.

    Args:
        d: (C, h, w), in [0, 1].

    Raises:
        UserError: if the picture is too small, or smooth, or sharp, or no kernel explains it.
    """
    if min(d.shape[1:]) < SMALLEST or d.std() < 0.01:
        raise UserError("the picture is too small or too smooth to show its blur: give --kernel")
    misfit = _judge(d)
    sharp = misfit([torch.ones(1, 1)]).item()
    best, option = min(_best(misfit, family) for family in FAMILIES)
    if best > BLURRED * sharp and sharp < SURE:
        raise UserError("the picture looks sharp: if it is blurred, give --kernel")
    if best > min(SURE, BLURRED * sharp):
        raise UserError("no Gaussian, disk or straight motion explains the picture's blur: give "
                        "--kernel")
    return option


def _judge(d: Tensor) -> Callable[[list[Tensor]], Tensor]:
    """A function of kernels, which returns their misfits.

    White noise is added to the expected power: JPEG removes much of what is as weak as its own
    errors, in patterns that no scene or noise explains.
    """
    blocks = model_check.usable_blocks(d.mean(0, keepdim=True), torch.ones(1, 1))[:, 0][None]
    power, _, scene, noise = model_check.spectra(blocks, [torch.ones(1, 1)])
    power = power + FLOOR * power[:, scene[:, 1] > math.log(FINEST)].quantile(0.95)

    def misfit(blurs: list[Tensor]) -> Tensor:
        gains = model_check.spectra(blocks[:, :1], blurs)[1]
        return model_check.fit(power, gains, scene, noise)[0]

    return misfit


def _best(misfit: Callable[[list[Tensor]], Tensor], family: Family) -> tuple[float, str]:
    """The smallest misfit in a family, and its kernel as `--kernel` takes it."""
    points = family.grid()
    found = sorted(zip(misfit(family.kernels(points)).tolist(), map(tuple, points), strict=True))
    near, step = found[:2], family.steps()  # two: neighbours may change places
    for _ in range(ROUNDS):
        step = step / 2
        for i, (least, point) in enumerate(near):
            moves = [np.array(move) for move in itertools.product((-1, 0, 1), repeat=len(step))]
            around = [tuple(point + move * step) for move in moves if move.any()]
            values = misfit(family.kernels(around)).tolist()
            near[i] = min((least, point), *zip(values, around, strict=True))
    least, point = min(near)
    return least, family.option(point)
