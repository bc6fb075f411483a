"""Restore a photograph of any size, by tiles that overlap; its noise estimated, its model doubted.

Each tile is a picture of its own, cut from a scene that goes on, so it is restored with an unknown
border. What a border does reaches some pixels inwards: that much of each tile is thrown away, and
over some more two neighbours are blended.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.fixed_point import SolveInfo
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Convolution, LinearOperator, scene_size
from jfbnb.photo.model_check import contradictions, estimate_noise

TILE = 448  # pixels on a side at most, with all that overlaps
THROWN, BLENDED = 16, 16  # of these at each side that has a neighbour
ROUNDING = 1 / 255 / 12**0.5  # the noise that eight bits are, and the least that is taken for it


@dataclass(frozen=True)
class Restored:
    """A restored picture (C, h, w), what was taken for its noise, and what the solver said.

    Args:
        warnings: what of the picture contradicts the model, and what did not converge.
        iterations, residual: the largest of all tiles; None for methods without a solver.
    """

    pixels: Tensor
    noise_std: float
    warnings: list[str]
    tiles: int
    iterations: int | None = None
    residual: float | None = None


def restore(
    restorer: Restorer,
    d: Tensor,
    kernel: Tensor,
    noise_std: float | None = None,
    border: str = "unknown",
    progress: Callable[[int, int], None] = lambda done, tiles: None,
) -> Restored:
    """Restore a picture that was convolved with a kernel.

    Args:
        restorer: of `methods.make_methods`.
        d: (C, h, w) with C 1 or 3, in [0, 1], on the device to use. Grey is restored as three equal
            channels.
        kernel: (kh, kw), of sum 1; see `kernels`.
        noise_std: of d; estimated if not given.
        border: as in `Convolution`; "black" is restored in one piece, however large.
        progress: called with how many tiles are done, and of how many.

    Raises:
        UserError: if the kernel is larger than the picture, the method has no way with it, or what
            comes out is not finite.
    """
    (_, h, w), (kh, kw) = d.shape, kernel.shape
    if kh > h or kw > w:
        raise UserError(f"a picture of {w} x {h} pixels is smaller than the {kw} x {kh} blur "
                        "kernel: use a larger picture or a smaller kernel")
    noise = max(ROUNDING, estimate_noise(d, kernel)) if noise_std is None else noise_std
    x, infos = _by_tiles(restorer, d, kernel, noise, border, progress)
    if not x.isfinite().all():
        raise UserError("no finite picture comes out: try another --method, --kernel or "
                        "--noise-std")
    warnings = contradictions(d, kernel, noise, x, border)
    if infos[0] is None:
        return Restored(x, noise, warnings, len(infos))
    worst = max(infos, key=lambda info: info.residual.item())
    if failed := sum(not info.converged.all() for info in infos):
        most = max(info.iterations.item() for info in infos)
        warnings.append(f"{failed} of {len(infos)} tiles did not converge in {most} iterations "
                        f"(relative residual up to {worst.residual.item():.1e}): what is shown is "
                        "no equilibrium there; try --method jfb-energy or total-variation")
    return Restored(x, noise, warnings, len(infos), max(i.iterations.item() for i in infos),
                    worst.residual.item())


def _by_tiles(restorer: Restorer, d: Tensor, kernel: Tensor, noise_std: float, border: str,
              progress: Callable[[int, int], None]) -> tuple[Tensor, list[SolveInfo | None]]:
    """The picture, and what the solver said of each tile."""
    channels, *size = d.shape
    reach = max(kernel.shape) // 2
    tiles = list(itertools.product(*(
        list(_cut(n, n if border == "black" else TILE + 2 * reach, THROWN + reach))
        for n in size)))
    x, weights = torch.zeros_like(d), d.new_zeros(size)
    operators: dict[tuple[int, ...], LinearOperator] = {}
    infos = []
    for (rows, row_weights), (columns, column_weights) in tiles:
        progress(len(infos), len(tiles))
        part = d[None, :, rows, columns].expand(1, 3, -1, -1)
        shape = tuple(part.shape[2:])
        if shape not in operators:
            A = Convolution(scene_size(shape, kernel.shape, border), kernel, border)
            operators[shape] = A.to(d.device)
        y, info = restorer(operators[shape], part, noise_std)
        y = operators[shape].visible(y)[0]
        weight = (row_weights[:, None] * column_weights).to(d)
        x[:, rows, columns] += weight * (y if channels == 3 else y.mean(0, keepdim=True))
        weights[rows, columns] += weight
        infos.append(info)
    progress(len(tiles), len(tiles))
    return x / weights, infos


def _cut(n: int, most: int, thrown: int) -> Iterator[tuple[slice, Tensor]]:
    """n pixels in pieces of equal length, at most so long, that overlap; and their weights."""
    overlap = 2 * thrown + BLENDED
    count = max(1, math.ceil((n - overlap) / (most - overlap)))
    length = math.ceil((n + (count - 1) * overlap) / count)
    at = torch.arange(length) + 0.5
    for i in range(count):
        start = round(i * (n - length) / max(1, count - 1))
        weights = torch.ones(length)
        for inside, from_border in ((i > 0, at), (i < count - 1, length - at)):
            if inside:
                weights = weights.minimum(((from_border - thrown) / BLENDED).clamp(0, 1))
        yield slice(start, start + length), weights
