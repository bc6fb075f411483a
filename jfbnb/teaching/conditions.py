"""Evaluate methods for blurs, noise levels and images other than their own (notebook 5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Blur, LinearOperator
from jfbnb.core.protocols import measure
from jfbnb.data import PHOTOS, ImageSet, bundled_photos
from jfbnb.training.evaluation import evaluate, summarise
from jfbnb.training.methods import METHODS, Settings

TUNED_HERE = "tuned here"  # the version of a method that is tuned for each condition
RUN_ON = 8  # the most images per method and condition whose solves are continued
FURTHER = 300  # evaluations of T in a continued solve


@dataclass(frozen=True, eq=False)
class Condition:
    """Images, the operator that measures them, and the one that the methods are given.

    Args:
        true_A: the operator that measures.
        A: the operator that the methods are given.
        noise_std: of the measurements; also given to the methods.
    """

    images: ImageSet
    true_A: LinearOperator
    A: LinearOperator
    noise_std: float

    def measure(self, images: ImageSet, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Some images and their measurements under this condition."""
        x = images.as_float().to(device)
        return x, measure(self.true_A.to(device), x, self.noise_std, seed, images.indices)


def study_conditions(
    A: Blur, noise_std: float, images: ImageSet, seen: Sequence[str]
) -> tuple[dict[tuple[str, object], Condition], dict[str, object]]:
    """The conditions of notebook 5: other kernels and noise levels, a wrong blur, other images.

    Args:
        A, noise_std: the protocol's; images: for the first three studies.
        seen: photographs in the networks' training data, to leave out.

    Returns:
        The conditions by study and name, and for each study the name of the protocol's condition.
    """
    size, kernel, std = images.images.shape[-1], A.kernel_size, A.kernel_std
    usual = Condition(images, A, A, noise_std)
    conditions = {}
    for name, (side, width) in {"5 x 5, std 1": (5, 1.0), "5 x 5, std √5": (5, 5**0.5),
                                "5 x 5, std 5": (5, 5.0), "9 x 9, std √5": (9, 5**0.5)}.items():
        B = Blur(size, side, width)
        conditions["kernel", name] = (
            usual if (side, width) == (kernel, std) else Condition(images, B, B, noise_std))
    for value in (0.002, 0.005, 0.01, 0.02, 0.05):
        conditions["noise", value] = (
            usual if value == noise_std else Condition(images, A, A, value))
    for value in sorted((1.8, 2.0, std, 2.5, 3.0)):  # of the true blur; methods are given A
        conditions["true kernel std", round(value, 2)] = (
            usual if value == std else Condition(images, Blur(size, kernel, value), A, noise_std))
    for split in ("validation", "test", "train"):
        crops = bundled_photos(split, size)
        for photo in (photo for photo in PHOTOS[split] if photo not in seen):
            own = [i for i, name in enumerate(crops.names) if name.startswith(f"{photo}/")]
            conditions["photograph", photo] = Condition(
                crops[own[0] : own[-1] + 1][: len(images)], A, A, noise_std)
    return conditions, {study: name for (study, name), c in conditions.items() if c is usual}


def evaluate_conditions(
    versions: dict[str, dict[str, Restorer]],
    conditions: dict[tuple[str, object], Condition],
    tuned: list[str],
    validation: ImageSet,
    seed: int,
    device: torch.device,
    candidates: int = 9,
) -> pd.DataFrame:
    """Evaluate methods under conditions, and continue solves that did not converge.

    Methods without weights are tuned anew for every operator and noise level, so that each is near
    its best. If some of a network's solves have not converged, the worst, at most 8, are continued
    for 300 more evaluations of T.

    Args:
        versions: methods that are ready to use, by what they were trained for.
        conditions: by study and name. One that several studies share is evaluated once.
        tuned: the names of the methods to tune.
        validation: the images to tune on, measured under the condition.
        candidates: about how many settings are tried for each method.

    Returns:
        A row for each condition, version (those of `versions`, and "tuned here") and method: the
        columns of `summarise`; run_on (how many solves were continued), converged_later (the share
        of these that then converged) and drift (the mean increase of their PSNR in dB), which are
        empty if run_on is 0; version, settings (if tuned here), study, condition.
    """
    done: dict[Condition, pd.DataFrame] = {}
    found: dict[object, dict[str, Settings]] = {}
    for condition in conditions.values():
        if condition in done:
            continue
        key = condition.true_A, condition.A, condition.noise_std
        if key not in found:
            x, d = condition.measure(validation, seed, device)
            found[key] = {name: tuned_under(condition, name, x, d, candidates) for name in tuned}
        x, d = condition.measure(condition.images, seed, device)
        here = {name: _with(name, settings) for name, settings in found[key].items()}
        table = pd.concat([_under(condition, methods, x, d).assign(version=version) for
                           version, methods in {TUNED_HERE: here, **versions}.items() if methods])
        words = {name: ", ".join(f"{k} {value:.3g}" for k, value in settings.items())
                 for name, settings in found[key].items()}
        table["settings"] = table.method.map(words).where(table.version == TUNED_HERE, "")
        done[condition] = table
    return pd.concat([done[condition].assign(study=study, condition=name)
                      for (study, name), condition in conditions.items()], ignore_index=True)


@torch.no_grad()
def tuned_under(condition: Condition, name: str, x: Tensor, d: Tensor, n: int) -> Settings:
    """The best of about n settings of a method without weights, on images x measured as d.

    If the candidates differ in one number only, the search climbs from the middle until PSNR falls
    on both sides; else all are tried.
    """
    method, A = METHODS[name], condition.A.to(x.device)
    candidates = method.candidates(condition.noise_std, n)

    @cache
    def score(k: int) -> float:
        value = psnr(A.visible(method.restore(A, d, candidates[k], 1.0)[0]), A.visible(x)).mean()
        return value.nan_to_num(-float("inf")).item()

    numbers = [len({settings[key] for settings in candidates}) for key in candidates[0]]
    if sum(number > 1 for number in numbers) > 1:
        return candidates[max(range(len(candidates)), key=score)]
    k, better = None, len(candidates) // 2
    while better != k:
        k = better
        better = max(range(max(k - 1, 0), min(k + 2, len(candidates))), key=score)
    return candidates[k]


def _with(name: str, settings: Settings) -> Restorer:
    """A method without weights, with settings for the noise level at hand."""
    return Restorer(lambda A, d, noise_std: METHODS[name].restore(A, d, settings, 1.0))


def _under(condition: Condition, methods: dict[str, Restorer], x: Tensor,
           d: Tensor) -> pd.DataFrame:
    """`summarise` under one condition, with the results of continued solves."""
    A = condition.A.to(x.device)
    table = evaluate(methods, A, x, d, condition.noise_std, condition.images.names)
    later = [_run_on(methods[name], rows.reset_index(drop=True), A, x, d, condition.noise_std)
             for name, rows in table.groupby("method", sort=False)]
    return summarise(table).join(pd.DataFrame(later))


def _run_on(method: Restorer, rows: pd.DataFrame, A: LinearOperator, x: Tensor, d: Tensor,
            noise_std: float) -> dict[str, float]:
    """Continue the unconverged solves of one method: run_on, converged_later, drift.

    Solving again from the start, with a higher limit, gives the same iterates as continuing,
    Anderson's memory included.
    """
    failed = rows[rows.converged == 0].sort_values("residual", ascending=False,
                                                   na_position="first")
    if not len(failed) or method.model is None:
        return {"run_on": 0, "converged_later": np.nan, "drift": np.nan}
    at = failed.index[:RUN_ON].tolist()
    model = method.model(A, noise_std)
    model.max_iterations += FURTHER
    with torch.no_grad():
        y, info = model(d[at])
    change = psnr(A.visible(y), A.visible(x[at])).cpu().numpy() - rows.psnr[at].to_numpy()
    return {"run_on": len(at), "converged_later": info.converged.double().mean().item(),
            "drift": change.mean()}
