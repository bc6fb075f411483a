"""Evaluate methods on images: one long table of metrics, and its summary."""

import time

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from jfbnb.core.metrics import psnr, ssim
from jfbnb.core.models import Restorer, Result
from jfbnb.core.operators import LinearOperator


@torch.no_grad()
def evaluate(
    methods: dict[str, Restorer],
    A: LinearOperator,
    x: Tensor,
    d: Tensor,
    noise_std: float,
    names: list[str],
) -> pd.DataFrame:
    """One row per method and image: PSNR, SSIM, and how the solve ended.

    Args:
        x, d: images (N, C, H, W) and their measurements, on the device of A. Metrics are computed
            on the part of x that d shows.
        names: N image names.

    Returns:
        Columns method, image, psnr (dB), ssim, iterations, residual, converged, seconds. The
        solver's columns are empty for methods without a solver.
    """
    parts, batch_size = [], together(x)
    for name, method in methods.items():
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            clock = time.perf_counter()
            y, info = method(A, d[part], noise_std)
            if y.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - clock
            seen = A.visible(y), A.visible(x[part])
            parts.append(pd.DataFrame({
                "method": name,
                "image": names[part],
                "psnr": psnr(*seen).cpu(),
                "ssim": ssim(*seen),
                "iterations": info.iterations.cpu() if info else np.nan,
                "residual": info.residual.cpu() if info else np.nan,
                "converged": info.converged.cpu().double() if info else np.nan,
                "seconds": seconds / len(y),
            }))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def by_computation(methods: dict[str, Restorer], counts: list[int], A: LinearOperator, x: Tensor,
                   d: Tensor, noise_std: float) -> pd.DataFrame:
    """The PSNR of iterative methods after k evaluations of T.

    An equilibrium's solver is stopped after k; an unrolled network gets k layers, however many it
    was trained with.

    Args:
        counts: the values of k, each at least 1.

    Returns:
        A row for each method and k: method, evaluations, psnr (dB, mean over the images).
    """
    rows = []
    for name, method in methods.items():
        for k in counts:
            model = method.model(A, noise_std)  # a new object with the same weights
            model.tolerance, model.max_iterations, model.iterations = 0.0, k, k
            y = torch.cat([model(d[i:i + 1])[0] for i in range(len(d))])
            rows.append({"method": name, "evaluations": k,
                         "psnr": psnr(A.visible(y), A.visible(x)).mean().item()})
    return pd.DataFrame(rows)


def quality(A: LinearOperator, x: Tensor, result: Result) -> dict[str, float]:
    """The mean PSNR in dB of a model's images, and the share of its solves that converged."""
    y, info = result
    found = {"psnr": psnr(A.visible(y), A.visible(x)).mean().item()}
    if info is not None:
        found["converged"] = info.converged.float().mean().item()
    return found


def together(x: Tensor) -> int:
    """How many images to solve in a batch: one on a CPU, where larger batches gain nothing."""
    return 1 if x.device.type == "cpu" else 50


def complaints(table: pd.DataFrame, most: int = 4) -> list[str]:
    """One line for each method whose solver failed on some images, naming the `most` worst."""
    lines = []
    for method, rows in table.groupby("method", sort=False):
        failed = rows[rows.converged == 0].sort_values("residual", ascending=False)
        if len(failed):
            named = ", ".join(f"{image} (relative residual {residual:.1e})" for image, residual
                              in zip(failed.image[:most], failed.residual[:most], strict=True))
            more = f" and {len(failed) - most} more" if len(failed) > most else ""
            lines.append(f"{method}: {len(failed)} of {len(rows)} images did not converge: "
                         f"{named}{more}")
    return lines


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, in the table's order: means with standard errors, and convergence.

    Seconds and iterations are medians, which depend less on the load of the machine.
    """
    groups = table.groupby("method", sort=False)
    return pd.DataFrame({
        "images": groups.size(),
        "psnr": groups.psnr.mean(),
        "psnr_se": groups.psnr.sem(),
        "ssim": groups.ssim.mean(),
        "ssim_se": groups.ssim.sem(),
        "converged": groups.converged.mean(),
        "median_iterations": groups.iterations.median(),
        "seconds_per_image": groups.seconds.median(),
    }).reset_index()
