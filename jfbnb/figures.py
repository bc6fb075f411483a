"""Every figure and table of the paper, drawn and written. This module computes nothing.

A figure is saved as PNG and PDF, and what a notebook shows is the saved PNG itself. A table is
saved as CSV, Markdown and LaTeX.
"""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from IPython.display import Image as DisplayedImage
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from jfbnb.common import atomic_path, atomic_write
from jfbnb.methods import LABELS

# One colour per method, the same everywhere. The classical ones, plug-and-play and JFB have Okabe
# and Ito's, safe for colour-blind eyes.
COLOURS = {
    "measurement": "#999999",
    "direct-inverse": "#CC79A7",
    "gradient-descent": "#E69F00",
    "tikhonov": "#D55E00",
    "total-variation": "#009E73",
    "plug-and-play": "#56B4E9",
    "feedforward": "#B8A000",
    "feedforward-tikhonov": "#8C510A",
    "feedforward-tikhonov-head": "#DFC27D",
    "unrolled": "#762A83",
    "de-grad": "#C51B7D",
    "de-prox": "#4D9221",
    "de-admm": "#35978F",
    "deq": "#000000",
    "deq-head": "#777777",
    "jfb": "#0072B2",
    "jfb-head": "#7FB8DE",
}
# How a table's numbers are written, by a word in the name of their column.
FORMATS = {"ssim": ".3f", "seconds": ".2g", "loss": ".2e", "mse": ".2e", "converged": ".0%",
           "residual": ".1e", "radius": ".3f", "norm": ".3f", "drift": ".4f"}
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "pdf.fonttype": 42,
}


def new_figure(columns: int = 1, rows: int = 1, width: float = 7.0,
               height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure in the common style and its axes, flat, row by row; sizes in inches."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
        return figure, list(axes.flat)


def save_figure(figure: Figure, path: str | Path, source: str = "") -> DisplayedImage:
    """Write `path`.png and .pdf, without dates, so that equal figures are equal files.

    Args:
        source: where the images come from that the figure shows or measures, for its foot.
    """
    path = Path(path)
    if source:
        figure.supxlabel(source, fontsize=9, color="#555555")
    with mpl.rc_context(STYLE):
        for suffix, metadata in ((".png", {"Software": None}),
                                 (".pdf", {"CreationDate": None, "Creator": None})):
            with atomic_path(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, metadata=metadata)
    return DisplayedImage(filename=str(path.with_suffix(".png")))


def save_table(table: pd.DataFrame, path: str | Path, caption: str) -> Markdown:
    """Write `path`.csv, .md and .tex; the CSV keeps full precision."""
    path = Path(path)
    with atomic_path(path.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False)
    text = table.copy()
    for column in text.select_dtypes("float"):
        spec = next((spec for word, spec in FORMATS.items() if word in column.lower()), ".2f")
        text[column] = [format(v, spec) if pd.notna(v) else "" for v in text[column]]
    markdown = text.to_markdown(index=False, disable_numparse=True, colalign=_alignment(table))
    atomic_write(path.with_suffix(".md"), f"{markdown}\n\n{caption}\n")
    latex = text.to_latex(index=False, escape=True, caption=caption, label=f"tab:{path.name}")
    atomic_write(path.with_suffix(".tex"), latex.replace("±", r"$\pm$"))
    return Markdown(f"{markdown}\n\n*{caption}*")


def _alignment(table: pd.DataFrame) -> list[str]:
    return ["right" if pd.api.types.is_numeric_dtype(table[c]) else "left" for c in table]


def show(axes: Axes, image: Tensor, title: str = "") -> None:
    """One image (3, H, W), clipped to [0, 1], without ticks."""
    axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)


def image_row(images: dict[str, Tensor], psnrs: dict[str, float]) -> Figure:
    """Labelled images (3, H, W) side by side, with the PSNR in dB below those that have one."""
    figure, axes = new_figure(columns=len(images), width=2.6 * len(images), height=3.4)
    for ax, (label, image) in zip(axes, images.items(), strict=True):
        show(ax, image, label)
        if label in psnrs:
            ax.set_xlabel(f"{psnrs[label]:.1f} dB")
    return figure


def image_table(rows: dict[str, Tensor]) -> Figure:
    """Table 1: one labelled row per method, the same images (N, 3, H, W) in each."""
    n = len(next(iter(rows.values())))
    figure, axes = new_figure(columns=n, rows=len(rows), width=0.95 * n + 1.3,
                              height=0.95 * len(rows) + 0.3)
    for r, (label, images) in enumerate(rows.items()):
        for c in range(n):
            show(axes[r * n + c], images[c])
        axes[r * n].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
    return figure


def training_loss(history: pd.DataFrame, title: str, method: str) -> Figure:
    """Fig. 1: average training loss per image against the epoch, in the method's colour."""
    figure, (ax,) = new_figure()
    ax.plot(history.epoch, history.loss, "o-", color=COLOURS[method], markersize=4)
    ax.set(xlabel="epoch", ylabel="average training loss per image\n(mean squared error)",
           title=title, yscale="log")
    ax.yaxis.set_minor_formatter(mpl.ticker.LogFormatterSciNotation(minor_thresholds=(2, 1)))
    ax.xaxis.get_major_locator().set_params(integer=True)
    return figure


def labelled_line(ax: Axes, x, y, method: str, marker: str = "", linestyle: str = "-") -> None:
    """A curve in its method's colour, under its method's label."""
    ax.plot(x, y, color=COLOURS[method], label=LABELS[method], marker=marker, markersize=4,
            linestyle=linestyle)
