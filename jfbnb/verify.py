"""Measure a finished run's tables again, from what it stored, and say what differs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from jfbnb import evaluation
from jfbnb.common import ROOT, UserError, pick_device
from jfbnb.datasets import load_splits
from jfbnb.methods import make_methods
from jfbnb.operators import get_protocol, make_blur, measure
from jfbnb.reproduce import file_hash, load_profile

DECIBELS, SIMILARITY = 0.01, 1e-3  # how far another machine may be off, per image


def verify(profile: str, data: str | None, limit: int | None) -> Iterator[str]:
    """The differences found, one line each; none if all is as the run left it.

    Args:
        data: where the images are now, if not where the profile says.
        limit: measure on the first test images only.

    Raises:
        UserError: if there is no finished run to verify.
    """
    figures, runs = ROOT / "figures" / profile, ROOT / "runs" / profile
    provenance = _read_provenance(figures)
    yield from _changed_files(provenance)
    steps = provenance["steps"]
    last = max(steps)
    parameters = load_profile(profile) | steps[last]["parameters"]
    if not last.startswith("05"):
        raise UserError(f"the run {profile} has not got to notebook 5: finish it with "
                        f"`jfbnb reproduce --profile {profile}`")
    stored = pd.read_csv(figures / "metrics.csv")
    yield from _different_table(figures, stored)
    yield from _different_metrics(stored, parameters, data, limit, runs)


def _read_provenance(figures: Path) -> dict:
    try:
        return json.loads((figures / "provenance.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"no finished run in {figures} ({error}): run `jfbnb reproduce` first"
                        ) from error


def _changed_files(provenance: dict) -> Iterator[str]:
    for step in provenance["steps"].values():
        for name, digest in step["outputs"].items():
            path = ROOT / name
            if not path.is_file():
                yield f"{name} is missing"
            elif file_hash(path) != digest:
                yield f"{name} is not what the run wrote"


def _different_table(figures: Path, metrics: pd.DataFrame) -> Iterator[str]:
    """Table 2 against the metrics that it summarises."""
    stored = pd.read_csv(figures / "table2_comparison.csv").set_index("Method")
    again = evaluation.table2(evaluation.summarise(metrics)).set_index("Method")
    for column in ("PSNR (dB)", "± PSNR", "SSIM", "± SSIM", "Converged"):
        apart = (stored[column] - again[column]).abs() > 1e-6
        for method in stored.index[apart | (stored[column].isna() != again[column].isna())]:
            yield f"table 2, {method}: {column} is not that of metrics.csv"


def _different_metrics(stored: pd.DataFrame, parameters: dict, data: str | None,
                       limit: int | None, runs: Path) -> Iterator[str]:
    """The per-image metrics against those of the stored weights, measured now."""
    setup = get_protocol(parameters["protocol"])
    splits = load_splits(data or parameters["data"], setup.image_size, parameters["n_train"],
                         parameters["n_validation"], parameters["n_test"])
    images = splits.test[:limit]
    device = pick_device(parameters["device"])
    A, x = make_blur(setup).to(device), images.as_float().to(device)
    d = measure(A, x, setup.noise_std, parameters["seed"], images.indices)
    methods = make_methods(list(stored.method.unique()), runs, device)
    again = evaluation.evaluate(methods, A, x, d, setup.noise_std, images.names)
    both = stored.merge(again, on=["method", "image"], suffixes=("", "_now"), how="right")
    for row in both.itertuples():
        if not abs(row.psnr - row.psnr_now) <= DECIBELS:
            yield f"{row.method}, {row.image}: {row.psnr:.3f} dB stored, {row.psnr_now:.3f} now"
        elif not abs(row.ssim - row.ssim_now) <= SIMILARITY:
            yield f"{row.method}, {row.image}: SSIM {row.ssim:.4f} stored, {row.ssim_now:.4f} now"
