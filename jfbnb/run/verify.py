"""Measure a finished run's tables again, from what it stored, and say what differs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from jfbnb.common import UserError, pick_device
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.run import checkout
from jfbnb.run.reproduce import file_hash
from jfbnb.teaching import tables
from jfbnb.training import evaluation
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods

COLUMNS = ["PSNR (dB)", "± PSNR", "SSIM", "± SSIM", "Converged"]
DECIBELS, SIMILARITY = 0.01, 1e-3  # how far another machine may be off, per image


def verify(profile: str, data: str | None, limit: int | None) -> Iterator[str]:
    """The differences found, one line each; none if all is as the run left it.

    Args:
        data: where the images are now, if not where the profile says.
        limit: measure on the first test images only.

    Raises:
        UserError: if there is no finished run to verify.
    """
    runs, figures = checkout.run_dirs(profile)
    try:
        steps = json.loads((figures / "provenance.json").read_text(encoding="utf-8"))["steps"]
        (parameters,) = (step["parameters"] for step in steps.values()
                         if any(name.endswith("/metrics.csv") for name in step["outputs"]))
        yield from _changed_files(steps)
        stored = pd.read_csv(figures / "metrics.csv", dtype={"method": str, "image": str})
        table = pd.read_csv(figures / "table2_comparison.csv").set_index("Method")[COLUMNS]
        if unknown := set(stored.method) - set(METHODS):
            raise ValueError(f"unknown method {min(unknown)}")
        again = tables.table2(evaluation.summarise(stored)).set_index("Method")[COLUMNS]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"no finished run in {figures}: its record or a table is missing or "
                        f"damaged ({error}); run `jfbnb reproduce --profile {profile}`") from error
    yield from _different_table(table, again)
    yield from _different_metrics(stored, parameters, data, limit, runs)


def _changed_files(steps: dict[str, dict]) -> Iterator[str]:
    for step in steps.values():
        for name, digest in step["outputs"].items():
            path = checkout.work() / name
            if not path.is_file():
                yield f"{name} is missing"
            elif file_hash(path) != digest:
                yield f"{name} is not what the run wrote"


def _different_table(stored: pd.DataFrame, again: pd.DataFrame) -> Iterator[str]:
    """Table 2 against the metrics that it summarises."""
    for method in stored.index.symmetric_difference(again.index):
        yield f"table 2, {method}: not in both it and metrics.csv"
    stored, again = stored.align(again, join="inner", axis=0)
    for column in COLUMNS:
        apart = (stored[column] - again[column]).abs() > 1e-6
        for method in stored.index[apart | (stored[column].isna() != again[column].isna())]:
            yield f"table 2, {method}: {column} is not that of metrics.csv"


def _different_metrics(stored: pd.DataFrame, parameters: dict, data: str | None,
                       limit: int | None, runs: Path) -> Iterator[str]:
    """The per-image metrics against those of the stored weights, measured now."""
    setup = get_protocol(parameters["protocol"])
    splits = load_splits(data or checkout.find_path(parameters["data"]), setup.image_size,
                         parameters["n_train"], parameters["n_validation"], parameters["n_test"])
    images = splits.test[:limit]
    device = pick_device(parameters["device"])
    A, x = setup.operator().to(device), images.as_float().to(device)
    d = measure(A, x, setup.noise_std, parameters["seed"], images.indices)
    methods = make_methods(list(stored.method.unique()), runs, device)
    again = evaluation.evaluate(methods, A, x, d, setup.noise_std, images.names)
    both = stored.merge(again, on=["method", "image"], suffixes=("", "_now"), how="right")
    for row in both.itertuples():
        if not abs(row.psnr - row.psnr_now) <= DECIBELS:
            yield f"{row.method}, {row.image}: {row.psnr:.3f} dB stored, {row.psnr_now:.3f} now"
        elif not abs(row.ssim - row.ssim_now) <= SIMILARITY:
            yield f"{row.method}, {row.image}: SSIM {row.ssim:.4f} stored, {row.ssim_now:.4f} now"
