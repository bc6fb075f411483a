"""Check whether a solver's result is an equilibrium."""

import pandas as pd
from torch import Tensor

from jfbnb.core.diagnostics import jacobian_norm, spectral_radius
from jfbnb.core.fixed_point import anderson, picard, scale_of, solve
from jfbnb.core.maps import ImplicitMap
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Model
from jfbnb.training.evaluation import together

ROUNDING = 5e-7  # a relative change that is lost in float32 rounding


def check_equilibrium(T: ImplicitMap, x: Tensor, d: Tensor, names: list[str], further: int = 1000,
                      seed: int = 0, tolerance: float = Model.tolerance,
                      max_iterations: int = Model.max_iterations) -> pd.DataFrame:
    """Check whether the solver's result is an equilibrium. One row per image.

    Each image is solved as for the tables, by `models.Equilibrium`. Then T is applied without
    acceleration, at most `further` times, until one application changes the image by less than 5e-7
    of its norm, a few roundings of float32. (A map with another solver than Anderson continues with
    that.) The last iterate is taken for x*, where T's Jacobian is measured. Its radius and norm are
    estimates: evidence, not a proof.

    Returns:
        Columns image, evaluations (of T, to the tolerance; infinite if it is not reached),
        residual, distance (|x - x*| / |x*|), psnr (dB), further (applications of T after the
        solve), residual_later, psnr_later, drift (psnr_later - psnr), radius, radius_residual,
        norm: the spectral radius and the norm of the Jacobian, as in `diagnostics`.
    """
    size = together(x)
    parts = []

    def quality(state: Tensor, part: slice) -> Tensor:
        return psnr(T.A.visible(T.image(state)), T.A.visible(x[part])).cpu()

    for start in range(0, len(x), size):
        part = slice(start, start + size)

        state, info = solve(T, d[part], tolerance, max_iterations)
        own = getattr(T, "solver", anderson)
        onward = picard if own is anderson else own
        later, rest = solve(T, d[part], ROUNDING / scale_of(T), further, onward, state)
        distance = (state - later).flatten(1).norm(dim=1) / later.flatten(1).norm(dim=1)
        radius, radius_residual = spectral_radius(T, later, d[part], seed=seed)
        before, after = quality(state, part), quality(later, part)
        parts.append(pd.DataFrame({
            "image": names[part],
            "evaluations": info.iterations.double().where(info.converged, float("inf")).cpu(),
            "residual": info.residual.cpu(), "distance": distance.cpu(), "psnr": before,
            "further": rest.iterations.cpu(), "residual_later": rest.residual.cpu(),
            "psnr_later": after, "drift": after - before, "radius": radius,
            "radius_residual": radius_residual, "norm": jacobian_norm(T, later, d[part],
                                                                      seed=seed)}))
    return pd.concat(parts, ignore_index=True)
