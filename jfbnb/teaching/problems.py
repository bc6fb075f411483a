"""Notebook 6: your own operators, with classical methods and released networks."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import LinearOperator
from jfbnb.training.evaluation import evaluate
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods
from jfbnb.training.tuning import Tuning, tune

LABELS = {name: method.label for name, method in METHODS.items()} | {"measurement": "First guess"}
Pair = tuple[Tensor, Tensor]  # images and their measurements


def study(name: str, A: LinearOperator, other: Pair, tested: Pair, names: list[str],
          noise_std: float, networks: dict[str, Restorer]
          ) -> tuple[pd.DataFrame, dict[str, Restorer]]:
    """Restore images by every method.

    Args:
        name: of the problem, for the table.
        other: images and measurements to tune the classical methods on.
        tested: images and measurements to restore; names: of these images.
        networks: methods with weights, which are not tuned.

    Returns:
        The table of `evaluate` with a column `problem`, and the methods.
    """
    methods = make_methods(["measurement"], None, tested[0].device)
    for method in (METHODS["tikhonov"], METHODS["total-variation"]):
        best = tune(method, Tuning(noise_std, 1), A, other[1], other[0], 5)
        methods[method.name] = Restorer(
            lambda A, d, noise, m=method, s=best: m.restore(A, d, s, 1.0))
    methods |= networks
    return evaluate(methods, A, *tested, noise_std, names).assign(problem=name), methods


def restored(A: LinearOperator, x: Tensor, d: Tensor, noise_std: float,
             methods: dict[str, Restorer], *names: str) -> dict[str, tuple[Tensor, float]]:
    """Crops of one image and of its restorations, each with the PSNR of the whole image."""
    images = {"Original": A.visible(x)}
    for name in names:
        images[LABELS[name]] = A.visible(methods[name](A, d, noise_std)[0])
    return {label: (y[0, :, 8:88, -80:], psnr(y, images["Original"]).item())
            for label, y in images.items()}


def some_lines(n: int, power: float, seed: int) -> Tensor:
    """A mask (n, n) of a third of the lines of k-space: all in the middle, and some around it.

    Args:
        power: how fast the density of the others decreases towards the edge; 0 is uniform.
    """
    far = np.abs(np.arange(n) - n // 2) / (n / 2)  # 0 in the middle, 1 at the edge
    middle = far < 0.1
    density = np.where(middle, 0, (1 - far) ** power)  # of the others, up to a factor
    expected = density.cumsum() / density.sum() * (n // 3 - middle.sum())  # lines so far
    drawn = np.diff(np.floor(expected + np.random.default_rng(seed).random()), prepend=0) > 0
    return torch.from_numpy(middle | drawn).float().expand(n, n)
