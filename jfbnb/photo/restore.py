"""Restore a photograph of any size, in overlapping tiles.

Each tile is cut from a larger scene, so it is restored with an unknown border. A border affects
some pixels inwards: these are discarded, and the next ones are blended with the neighbouring tile.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.fixed_point import SolveInfo
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Convolution, scene_size
from jfbnb.photo import blind, kernel_option, light
from jfbnb.photo.model_check import (
    ROUNDING,
    Warning,
    contradictions,
    doubt,
    estimate_noise,
    level,
    replace_cut_noise,
    replace_outliers,
)
from jfbnb.training.restorers import check_noise

METHOD, SAFER = "jfb", "total-variation"  # the default; the one to use if that is doubtful
TILE = 448  # the longest side of a tile in pixels, overlaps included
THROWN, BLENDED = 16, 16  # pixels at each side that has a neighbour
DIM = 0.5  # a picture whose brightest values are below it is brightened for the networks


@dataclass(frozen=True)
class Restored:
    """A restored picture.

    Args:
        image: (C, h, w); from `jfbnb.deblur`, in the type and layout of its argument.
        noise_std: the noise level that was used.
        warnings: where the picture contradicts the model, and whether tiles did not converge.
        tiles: the number of tiles.
        iterations, residual: the solver's, the largest of all tiles; None without a solver.
        converged: whether every tile converged; None without a solver.
        ends: how each tile's solve ended, as in `SolveInfo.ends`; None without a solver.
        doubtful: whether the method's image contradicts the model; the first warning says how. If
            `restore` was given a safer method, `image` is that method's.
        kernel: the estimated one, as "motion:9,30", or (kh, kw) for a shake; None if it was
            given.
    """

    image: Tensor = field(repr=False)
    noise_std: float
    warnings: list[Warning]
    tiles: int
    iterations: int | None = None
    residual: float | None = None
    converged: bool | None = None
    doubtful: bool = False
    kernel: str | Tensor | None = None
    ends: list[str] | None = None


def restore(
    restorer: Restorer,
    d: Tensor,
    kernel: Tensor | None,
    noise_std: float | None = None,
    border: str = "unknown",
    progress: Callable[[int, int], None] = lambda done, tiles: None,
    safer: Restorer | None = None,
    gamma: str | float | None = None,
) -> Restored:
    """Restore a picture that was convolved with a kernel.

    Args:
        restorer: of `restorers.make_methods`.
        d: (C, h, w) with C 1 or 3, in [0, 1], on the device to use. Grey is restored as three equal
            channels.
        kernel: (kh, kw), of sum 1; see `kernels`. None estimates it: see `blind.estimate`.
        noise_std: of d; estimated if not given.
        border: as in `Convolution`; all but "unknown" are restored in one tile, however large.
        progress: called with the number of finished tiles and of all tiles.
        safer: a method to use instead if the result is doubtful. Its noise level is doubled, to 16
            times at most, until its result is not: what the model does not explain is noise to it.
        gamma: how d stores light, which is what the kernel blurs; see `light.decode`. By default
            the stored values are restored, and if that is doubtful the light, by sRGB's curve.

    Raises:
        UserError: if the kernel is larger than the picture or cannot be estimated, the picture has
            only two values, the noise level is invalid, the method cannot use the kernel, or the
            result is not finite.
    """
    if kernel is None:
        estimated, rival = blind.estimate(light.decode(d, 1.0 if gamma is None else gamma),
                                          restorer)
        kernel = kernel_option.parse(estimated) if isinstance(estimated, str) else estimated
        found = restore(restorer, d, kernel, noise_std, border, progress, safer, gamma)
        doubts = [Warning("kernel", "another kernel explains the blur nearly as well",
                          {"kernel": rival})] if rival else []
        return replace(found, kernel=estimated, warnings=[*found.warnings, *doubts])
    (_, h, w), (kh, kw) = d.shape, kernel.shape
    if kh > h or kw > w:
        raise UserError(f"a picture of {w} x {h} pixels is smaller than the {kw} x {kh} blur "
                        "kernel: use a larger picture or a smaller kernel")
    if noise_std is not None:
        check_noise(noise_std)
        noise_std = float(noise_std)
    low, high = d.aminmax()
    if low < high and ((d == low) | (d == high)).all():
        raise UserError("the picture has only two values, like a black-and-white scan, so it is "
                        "not blurred: scan it in grey")

    def attempt(gamma: str | float, method: Restorer = restorer, factor: float = 1.0) -> Restored:
        return _in_light(method, d, kernel, noise_std, border, progress, gamma, factor)

    first = attempt(1.0 if gamma is None else gamma)
    if not first.doubtful:
        return first
    if gamma is None and not (second := attempt("srgb")).doubtful:
        text = "only as light, stored by sRGB's curve, does the picture fit the model: restored so"
        return replace(second, warnings=[Warning("light", text), *second.warnings])
    if safer is None:
        return first
    for doublings in range(5):
        found = attempt(1.0 if gamma is None else gamma, safer, 2.0**doublings)
        if not found.doubtful:
            break
    return replace(found, warnings=first.warnings, doubtful=True)


def _in_light(restorer: Restorer, d: Tensor, kernel: Tensor, noise_std: float | None, border: str,
              progress: Callable[[int, int], None], gamma: str | float, factor: float) -> Restored:
    """`restore` with one method and gamma, and `factor` times the noise level."""
    slope = light.slope(d, gamma)
    d, warnings = replace_outliers(light.decode(d, gamma), kernel)
    # The networks were trained on pictures that fill [0, 1].
    bright = d.flatten()[::max(1, d.numel() // 2**20)].quantile(0.999).item()
    gain = 1 / bright if 0.001 < bright < DIM else 1.0
    d = gain * d
    noise_std = (max(ROUNDING, estimate_noise(d, kernel)) if noise_std is None
                 else noise_std * gain * slope)
    told = level(d, factor * noise_std)
    x, infos = _by_tiles(restorer, replace_cut_noise(d, noise_std), kernel, told, border, progress)
    if not x.isfinite().all():
        raise UserError("the result is not finite: try another method, kernel or noise level")
    warnings += contradictions(d, kernel, noise_std, border)
    # The highlights of a dim picture may be of any brightness.
    if doubtful := doubt(x, 1.0 if gain == 1 else math.inf):
        warnings.insert(0, doubtful)
    iterations = residual = converged = ends = None
    if infos[0] is not None:
        iterations = max(info.iterations.item() for info in infos)
        residual = max(info.residual.item() for info in infos)
        ends = [info.ends[0] for info in infos]
        failed = Counter(end for end in ends if end != "converged")
        converged = not failed
        if failed:
            how = ", ".join(f"{count} {end}" for end, count in failed.items())
            warnings.append(Warning(
                "unconverged", f"{failed.total()} of {len(infos)} tiles did not converge in "
                f"{iterations} iterations ({how}; relative residual up to {residual:.1e}): the "
                "result is no equilibrium there", {"method": "jfb-energy"}))
    return Restored(light.encode(x / gain, gamma), factor * noise_std / (gain * slope), warnings,
                    len(infos), iterations, residual, converged, doubtful is not None, ends=ends)


def _by_tiles(restorer: Restorer, d: Tensor, kernel: Tensor, noise_std: float, border: str,
              progress: Callable[[int, int], None]) -> tuple[Tensor, list[SolveInfo | None]]:
    """The restored picture, and the solver's report on each tile."""
    channels, *size = d.shape
    reach = max(kernel.shape) // 2
    tiles = list(itertools.product(*(
        list(_cut(n, TILE + 2 * reach if border == "unknown" else n, THROWN + reach))
        for n in size)))
    tile_size = [len(weights) for _, weights in tiles[0]]  # all have the same
    A = Convolution(scene_size(tile_size, kernel.shape, border), kernel, border).to(d.device)
    x, weights, infos = torch.zeros_like(d), d.new_zeros(size), []
    for (rows, row_weights), (columns, column_weights) in tiles:
        progress(len(infos), len(tiles))
        y, info = restorer(A, d[None, :, rows, columns].expand(1, 3, -1, -1), noise_std)
        y = A.visible(y)[0]
        weight = (row_weights[:, None] * column_weights).to(d)
        x[:, rows, columns] += weight * (y if channels == 3 else y.mean(0, keepdim=True))
        weights[rows, columns] += weight
        infos.append(info)
    progress(len(tiles), len(tiles))
    return x / weights, infos


def _cut(n: int, most: int, thrown: int) -> Iterator[tuple[slice, Tensor]]:
    """Overlapping pieces of n pixels, with weights; all of the same length, at most `most`."""
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
