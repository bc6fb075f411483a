"""The paper's Table 2, compared with ours."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from jfbnb.core.metrics import psnr
from jfbnb.training.methods import METHODS

PUBLISHED = Path(__file__).parent / "published_table2.csv"
PUBLISHED_LOSS = Path(__file__).parent / "published_loss.csv"
SPENT = "Applications in training"  # Table 2's column of a training's computation
EQUALLY = 1.01  # the largest ratio of computations that counts as equal


def reference_table2() -> pd.DataFrame:
    """The paper's Table 2, as data with its source (see the file).

    Returns:
        Columns method, label, psnr and ssim as printed, data_range, and usual_psnr: a text with the
        PSNR on the usual scale, or both readings if the range of the images is unknown.
    """
    table = pd.read_csv(PUBLISHED, comment="#", dtype={"data_range": str})
    table["usual_psnr"] = [
        " or ".join(f"{psnr + 20 * np.log10(float(r)):.2f}" for r in ranges.split(" or "))
        for psnr, ranges in zip(table.psnr, table.data_range, strict=True)]
    return table


def published_loss() -> pd.DataFrame:
    """The loss of the authors' training, as data with its source (see the file).

    Returns:
        Columns epoch, images (seen so far), and mse, on images in [0, 1].
    """
    table = pd.read_csv(PUBLISHED_LOSS, comment="#")
    # A sum over 3 x 128 x 128 values, on a range of 2 instead of 1.
    return pd.DataFrame({"epoch": table.epoch, "images": 8000 * table.epoch,
                         "mse": table.loss / (3 * 128**2) / 4})


def table2(summary: pd.DataFrame, applications: Mapping[str, float] | None = None
           ) -> pd.DataFrame:
    """Table 2: our means beside the published values, one row per method of either.

    The published JFB value is on the scale of its code (see `on_published_scale`); the column
    `Published PSNR, range 1` converts it to the usual one. The scale of the others is unknown, so
    the column has both readings.

    Args:
        applications: each trained method's applications of a network to a training crop.
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
    rows[SPENT] = pd.Series(applications or {}, dtype=float).reindex(order)
    rows["Published PSNR"] = published.psnr.reindex(order)
    rows["Published PSNR, range 1"] = published.usual_psnr.reindex(order, fill_value="")
    rows["Published SSIM"] = published.ssim.reindex(order)
    return rows.reset_index(drop=True)


def trained_for(applications: Iterable[float]) -> str:
    """A sentence on how long the methods of a table were trained, and whether equally long."""
    least, most = min(applications := list(applications)), max(applications)
    if most <= EQUALLY * least:
        return (f"Each trained method had {least:,.0f} applications of its network to a training "
                "crop, to less than 1%.")
    return (f"The trained methods had {least:,.0f} to {most:,.0f} applications of their networks "
            "to a training crop: this order is one of efforts as well as of methods.")


def on_published_scale(x: Tensor, truth: Tensor) -> Tensor:
    """PSNR as the paper's code computes it: images mapped to [-1, 1], but a data range of 1."""
    return psnr(2 * x - 1, 2 * truth - 1, data_range=1.0)
