"""Estimate the kernel of a blurred picture from the picture alone.

Gaussians, disks and straight motions compete, and if none of them explains the picture, the shake
that `shake.estimate` finds has to. The judge is the likelihood of the picture's power
spectrum (Whittle 1953), computed by `model_check.fit`: the kernel wins with which a natural scene
and noise explain the spectrum best. No image is estimated with it: Levin et al. (2011) show that
the likelihood of the kernel alone finds the kernel, where that of image and kernel together favours
no blur. A spectrum has no phases, so it cannot tell a kernel from its mirror image; the kernels of
the three families are their own.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core import kernels
from jfbnb.core.models import Restorer
from jfbnb.photo import model_check, shake

SURE = 0.0125  # the largest misfit that noise, JPEG and the scene leave to a right kernel
RIVAL = 1.15  # times the least misfit: another kernel that has less may be right, too
SMALLEST, FLAT = 128, 0.01  # pixels a side and standard deviation below which nothing is estimated
FLOOR, FINE = 2, 0.35  # white noise that is added, relative to that beyond FINE cycles per pixel
BATCH = 16  # kernels that are judged at once: a processor's cache holds no more
CLOSE = 20  # kernels of each family, the best of the grid, among which halves of the picture choose
ALIKE = 0.9  # a choice that correlates less with the picture's kernel is another one
AGREE = 0.92  # least correlation of the shakes that halves of a picture give
ROUNDS = 4  # of the search around the grid's best points, each with half the step


@dataclass(frozen=True)
class Family:
    """Kernels of one shape.

    Args:
        name: as in `kernel_option.parse`.
        make: a kernel from its size in pixels and, if `turn` is given, its angle in degrees.
        smallest, largest, ratio: the sizes in the grid, and what each is times the one before.
        turn: the step of the angles in the grid.
    """

    name: str
    make: Callable[..., Tensor]
    smallest: float
    largest: float
    ratio: float
    turn: float | None = None

    @property
    def steps(self) -> np.ndarray:
        """The grid's step in log size and, if there is one, angle."""
        return np.array([math.log(self.ratio), *([self.turn] if self.turn else [])])

    def grid(self) -> np.ndarray:
        """Points (n, 1 or 2) of log size and angle."""
        axes = [np.arange(math.log(self.smallest), math.log(self.largest), self.steps[0]),
                *([np.arange(0, 180, self.turn)] if self.turn else [])]
        return np.array(list(itertools.product(*axes)))

    def kernels(self, points: np.ndarray) -> list[Tensor]:
        return [self.make(math.exp(size), *angle) for size, *angle in points]

    def option(self, point: np.ndarray) -> str:
        """The kernel at a point, as `kernel_option.parse` takes it."""
        numbers = [math.exp(point[0]), *(angle.round() % 180 for angle in point[1:])]
        return f"{self.name}:{','.join(f'{number:.3g}' for number in numbers)}"


FAMILIES = (Family("gaussian", kernels.gaussian, 0.4, 6, 1.22),
            Family("disk", kernels.disk, 1, 12, 1.125),
            Family("motion", kernels.motion, 3, 30, 1.18, 10))
Judge = Callable[[list[Tensor]], np.ndarray]  # the misfits of kernels


def estimate(d: Tensor, restorer: Restorer) -> tuple[str | Tensor, str | None]:
    """Estimate a blurred picture's kernel: a Gaussian, a disk, a straight motion or a shake.

    Args:
        d: (C, h, w), in [0, 1].
        restorer: the method that restores images to estimate a shake.

    Returns:
        The kernel as `kernel_option.parse` takes it, e.g. motion:9,30, in pixels and degrees, or
        (kh, kw) for a shake; and that of another family which explains the picture nearly as well,
        or None.

    Raises:
        UserError: if the picture is too small or smooth, or hardly blurred; if no kernel explains
            its spectrum, as after a motion of over 30 pixels; if its parts disagree.
    """
    if min(d.shape[1:]) < SMALLEST or d.std() < FLAT:
        raise UserError("the picture is too small or too smooth to show its blur: give the kernel")
    judge = _judge(d)
    if judge([torch.ones(1, 1)]) < SURE:
        raise UserError("the picture looks sharp, or too noisy to show its blur: give the kernel")
    found = [(*_best(judge, family), family) for family in FAMILIES]
    (misfit, point, _, family), (second, other, _, rival), *_ = sorted(found, key=itemgetter(0))
    (kernel,) = family.kernels([point])
    named = misfit < SURE and math.exp(point[0]) < family.largest
    if not named:
        kernel, agreement = shake.estimate(d, restorer)
        if judge([kernel]) > SURE or agreement < AGREE:
            raise UserError("no Gaussian, disk, straight motion or shake of up to 30 pixels "
                            "explains the picture well enough: give the kernel")
    others = [kernel for _, _, close, _ in found for kernel in close]
    if any(_disagrees(half, kernel, others) for half in (*d.chunk(2, dim=1), *d.chunk(2, dim=2))):
        raise UserError("parts of the picture show different blurs, or lines of the scene pass for "
                        "one: give the kernel")
    if not named:
        return kernel, None
    return family.option(point), rival.option(other) if second < RIVAL * misfit else None


def _judge(d: Tensor) -> Judge:
    """The judge of kernels for a picture d (C, h, w).

    White noise is added to the measured power. JPEG erases what is weaker than its own errors, in
    patterns that neither a scene nor noise explains; the addition drowns them.
    """
    no_blur = torch.ones(1, 1)
    blocks = model_check.usable_blocks(d.mean(0, keepdim=True), no_blur)[None, :, 0]
    power, _, scene, noise = model_check.spectra(blocks, [no_blur])
    power = power + FLOOR * power[:, scene[:, 1] > math.log(FINE)].quantile(0.95)

    def judge(blurs: list[Tensor]) -> np.ndarray:
        gains = model_check.spectra(blocks[:, :1], blurs)[1]  # the same for all blocks
        parts = [model_check.fit(power, part, scene, noise)[0] for part in gains.split(BATCH)]
        return torch.cat(parts).numpy()

    return judge


def _best(judge: Judge, family: Family) -> tuple[float, np.ndarray, list[Tensor]]:
    """The smallest misfit in a family, its point, and the kernels of the grid's best points.

    The point is the best of the grid, then of closer and closer ones.
    """
    points, steps = family.grid(), family.steps
    moves = np.array(list(itertools.product((-1, 0, 1), repeat=len(steps))))
    points = points[judge(family.kernels(points)).argsort()[:CLOSE]]
    found = []
    for point in points[:2]:  # the second may become the best
        for halvings in range(1, ROUNDS + 1):
            around = point + moves * steps / 2**halvings
            values = judge(family.kernels(around))
            point = around[values.argmin()]
        found.append((values.min(), point))
    return *min(found, key=itemgetter(0)), family.kernels(points)


def _disagrees(half: Tensor, kernel: Tensor, others: list[Tensor]) -> bool:
    """Whether half of a picture excludes the kernel, because quite another one explains it better.

    All parts share a blur, but not the lines of the scene that pass for one.
    """
    kernels = [kernel, *others]
    misfits = _judge(half)(kernels)
    own, best = (torch.fft.fft2(kernels[i], s=(64, 64)).abs().flatten()
                 for i in (0, misfits.argmin()))
    alike = torch.cosine_similarity(own, best, dim=0).item()
    return bool(misfits[0] > RIVAL * misfits.min()) and alike < ALIKE
