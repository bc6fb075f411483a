"""Methods x images -> one long table of metrics; its summary; the paper's Table 2."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from jfbnb.datasets import ImageSet
from jfbnb.diagnostics import jacobian_norm, spectral_radius
from jfbnb.fixed_point import SolveInfo, picard, solve
from jfbnb.maps import ImplicitMap
from jfbnb.methods import METHODS, Restorer
from jfbnb.metrics import psnr, ssim
from jfbnb.operators import LinearOperator, measure

PUBLISHED = Path(__file__).parent / "published_table2.csv"

ROUNDING = 5e-7  # a relative change that float32 cannot tell from none

# --- tables -------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    methods: dict[str, Restorer],
    A: LinearOperator,
    x: Tensor,
    d: Tensor,
    noise_std: float,
    names: list[str],
    batch_size: int | None = None,
) -> pd.DataFrame:
    """One row per method and image: PSNR, SSIM, and what the solver said.

    Args:
        x, d: truths (N, C, H, W) and measurements of them, on the device of A. What counts is the
            part of x that d shows.
        names: N image names.
        batch_size: images solved together, which take as long as the slowest of them. None is 1 on
            a CPU, where a batch gains nothing, and 50 on a GPU.

    Returns:
        Columns method, image, psnr (dB), ssim, iterations, residual, converged, seconds. The
        solver's are empty for methods without one.
    """
    batch_size = batch_size or _batch_size(x)
    parts = []
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        for name, (y, info, seconds) in _restore_all(methods, A, d[part], noise_std).items():
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
    return join(parts)


def join(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Tables of some images each as one: method by method, in the first table's order."""
    table = pd.concat(tables, ignore_index=True)
    order = {name: i for i, name in enumerate(table.method.unique())}
    return table.sort_values("method", key=lambda column: column.map(order), kind="stable",
                             ignore_index=True)


def _restore_all(methods: dict[str, Restorer], A: LinearOperator, d: Tensor,
                 noise_std: float) -> dict[str, tuple[Tensor, SolveInfo | None, float]]:
    """Each method's images, what its solver said, and its seconds.

    A head acts on the image of the method before it, and has that one's seconds added to its own.
    """
    done: dict[str, tuple[Tensor, SolveInfo | None, float]] = {}
    for name, method in methods.items():
        clock = time.perf_counter()
        if method.head is not None and method.base in done:
            y, info, before = done[method.base]
            y = method.head(A, y, d, noise_std)
        else:
            (y, info), before = method(A, d, noise_std), 0.0
        if y.is_cuda:
            torch.cuda.synchronize()
        done[name] = y, info, before + time.perf_counter() - clock
    return done


def evaluate_conditions(
    methods: dict[str, Restorer],
    conditions: dict[object, tuple[LinearOperator, LinearOperator, float]],
    images: ImageSet,
    seed: int,
    device: torch.device,
) -> pd.DataFrame:
    """`summarise` under each condition, for methods that are not retrained for it.

    Args:
        conditions: for each name the operator that measures, the one that the methods
            are told, and the noise level, which they are told too.

    Returns:
        The rows of `summarise`, after a column condition.
    """
    x = images.as_float().to(device)
    parts = []
    for condition, (true_A, A, noise_std) in conditions.items():
        d = measure(true_A.to(device), x, noise_std, seed, images.indices)
        table = evaluate(methods, A.to(device), x, d, noise_std, images.names)
        part = summarise(table)
        part.insert(0, "condition", condition)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def certify(T: ImplicitMap, x: Tensor, d: Tensor, names: list[str], further: int = 1000,
            seed: int = 0) -> pd.DataFrame:
    """Is x* an equilibrium? One row per image.

    Each is solved to a residual of 1e-5. Then T is applied further, plainly, and its Jacobian is
    measured where that ends: after `further` times, or where each moves the image by less than
    5e-7 of its norm, a few roundings of float32. From there on nothing changes any more.

    Returns:
        Columns image, evaluations (of T, to a residual of 1e-4; infinite if it is not reached),
        residual, psnr, further (how often T was applied), psnr_later (dB), radius, norm: the
        spectral radius and the norm of the Jacobian, as in `diagnostics`.
    """
    size = _batch_size(x)
    parts = []

    def quality(state: Tensor, part: slice) -> Tensor:
        return psnr(T.A.visible(T.image(state)), T.A.visible(x[part])).cpu()

    for start in range(0, len(x), size):
        part = slice(start, start + size)

        def apply(z: Tensor, part: slice = part) -> Tensor:
            return T(z, d[part])

        state, info = solve(T, d[part], 1e-5, 200)
        reached = info.residuals <= 1e-4
        evaluations = torch.where(reached.any(0), reached.int().argmax(0) + 1.0, float("inf"))
        later, rest = solve(T, d[part], ROUNDING, further, picard, state)
        radius, norm = (measured(apply, later, 30, torch.Generator().manual_seed(seed)).cpu()
                        for measured in (spectral_radius, jacobian_norm))
        parts.append(pd.DataFrame({
            "image": names[part], "evaluations": evaluations.cpu(),
            "residual": info.residual.cpu(), "psnr": quality(state, part),
            "further": rest.iterations.cpu(), "psnr_later": quality(later, part),
            "radius": radius, "norm": norm}))
    return pd.concat(parts, ignore_index=True)


def _batch_size(x: Tensor) -> int:
    """Images solved together: a batch gains nothing on a CPU."""
    return 1 if x.device.type == "cpu" else 50


def complaints(table: pd.DataFrame, most: int = 4) -> list[str]:
    """One line for each method whose solver failed on some images, the worst of them by name."""
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

    Seconds and iterations are medians: what else the machine had to do matters less to them.
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


def reference_table2() -> pd.DataFrame:
    """The paper's Table 2, as data with its source: method, psnr, ssim."""
    return pd.read_csv(PUBLISHED, comment="#")


def table2(summary: pd.DataFrame) -> pd.DataFrame:
    """Table 2: our means beside the published values, one row per method of either.

    The published JFB value is on the scale of its code (see `on_published_scale`); the column
    `published PSNR, range 1` puts it on the usual one.
    """
    published = reference_table2().set_index("method")
    ours = summary.set_index("method")
    order = list(ours.index) + [m for m in published.index if m not in ours.index]
    rows = pd.DataFrame(index=order)
    rows["Method"] = [METHODS[m].label if m in METHODS else published.label[m] for m in order]
    rows["PSNR (dB)"] = ours.psnr.reindex(order)
    rows["± PSNR"] = ours.psnr_se.reindex(order)
    rows["SSIM"] = ours.ssim.reindex(order)
    rows["± SSIM"] = ours.ssim_se.reindex(order)
    rows["Converged"] = ours.converged.reindex(order)
    rows["Seconds per image"] = ours.seconds_per_image.reindex(order)
    rows["Published PSNR"] = published.psnr.reindex(order)
    shift = published.data_range.map(lambda r: 20 * np.log10(r))
    rows["Published PSNR, range 1"] = (published.psnr + shift).reindex(order)
    rows["Published SSIM"] = published.ssim.reindex(order)
    return rows.reset_index(drop=True)


def on_published_scale(x: Tensor, truth: Tensor) -> Tensor:
    """PSNR as the paper's code computes it: images mapped to [-1, 1], but a data range of 1."""
    return psnr(2 * x - 1, 2 * truth - 1, data_range=1.0)
