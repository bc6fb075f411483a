"""Measure a finished run's tables again, from what it stored, and say what differs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from jfbnb import evaluation
from jfbnb.common import ROOT, UserError, pick_device
from jfbnb.datasets import load_splits
from jfbnb.methods import LABELS, make_methods
from jfbnb.operators import get_protocol, make_blur, measure
from jfbnb.reproduce import check_parameters, file_hash, known_parameters

METRICS = ("psnr", "ssim", "iterations", "residual", "converged", "seconds")
COLUMNS = ("PSNR (dB)", "± PSNR", "SSIM", "± SSIM", "Converged")
MEASURED = ("data", "protocol", "seed", "device", "n_train", "n_validation", "n_test")
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
    steps = _read_steps(figures / "provenance.json")
    yield from _changed_files(steps)
    last = max(steps)
    if not last.startswith("05"):
        raise UserError(f"the run {profile} has not got to notebook 5: finish it with "
                        f"`jfbnb reproduce --profile {profile}`")
    stored = _read_table(figures / "metrics.csv", METRICS, ("method", "image"))
    if not set(stored.method) <= set(LABELS):
        raise UserError(f"the table {figures / 'metrics.csv'} has a method that is none of "
                        f"{', '.join(LABELS)}: run `jfbnb reproduce` again")
    yield from _different_table(figures, stored)
    parameters = {k: v for k, v in steps[last]["parameters"].items() if k in MEASURED}
    check_parameters(parameters, known_parameters())
    if missing := set(MEASURED) - set(parameters):
        raise UserError(f"{figures / 'provenance.json'} does not say the {', '.join(missing)} of "
                        "the run: run `jfbnb reproduce` again")
    yield from _different_metrics(stored, parameters, data, limit, runs)


def _read_steps(provenance: Path) -> dict[str, dict]:
    """Each step's record, as `reproduce.write_provenance` stored it."""
    try:
        steps = json.loads(provenance.read_text())["steps"]
        for step in steps.values():
            if not all(isinstance(step[key], dict) for key in ("parameters", "outputs")):
                raise TypeError("a step without parameters or outputs")
        max(steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no finished run: {provenance} is missing or damaged ({error}); run "
                        "`jfbnb reproduce` first") from error
    return steps


def _read_table(file: Path, numbers: tuple[str, ...], names: tuple[str, ...]) -> pd.DataFrame:
    """These columns of a stored table."""
    kinds = dict.fromkeys(names, str) | dict.fromkeys(numbers, float)
    try:
        table = pd.read_csv(file, dtype=kinds)[[*kinds]].dropna(subset=[*names])
        if table.empty:
            raise ValueError("no rows")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the table {file} is missing or damaged ({error}): run `jfbnb reproduce` "
                        "again") from error
    return table


def _changed_files(steps: dict[str, dict]) -> Iterator[str]:
    for step in steps.values():
        for name, digest in step["outputs"].items():
            path = ROOT / name
            if not path.is_file():
                yield f"{name} is missing"
            elif file_hash(path) != digest:
                yield f"{name} is not what the run wrote"


def _different_table(figures: Path, metrics: pd.DataFrame) -> Iterator[str]:
    """Table 2 against the metrics that it summarises."""
    stored = _read_table(figures / "table2_comparison.csv", COLUMNS, ("Method",))
    stored = stored.drop_duplicates("Method").set_index("Method")
    again = evaluation.table2(evaluation.summarise(metrics)).set_index("Method")
    for method in stored.index.symmetric_difference(again.index):
        yield f"table 2, {method}: not in both it and metrics.csv"
    stored, again = stored.align(again[[*COLUMNS]], join="inner", axis=0)
    for column in COLUMNS:
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
