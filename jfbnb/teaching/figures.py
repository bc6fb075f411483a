"""Draw and write every figure and table. This module computes nothing.

A figure is saved as PNG and PDF, and a notebook shows the saved PNG itself. A table is saved as
CSV, Markdown and LaTeX, long data as CSV.
"""

import io
import math
import re
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from IPython.display import Image as DisplayedImage
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from jfbnb.common import atomic_path, atomic_write
from jfbnb.core.maps import GradientMap, ImplicitMap, PreconditionedMap, SplittingMap
from jfbnb.training.methods import METHODS

MAPS = (GradientMap, PreconditionedMap, SplittingMap)  # in notebook 4b
# A gradient has the colour of the method that it trains.
GRADIENT_COLOURS = {"exact": METHODS["deq"].colour, "Neumann": "#117733",
                    "unrolled": METHODS["unrolled"].colour, "JFB": METHODS["jfb"].colour}
# The format of a table's numbers, by a word in the name of their column.
FORMATS = {"ssim": ".3f", "seconds to": ".3g", "seconds": ".2g", "loss": ".2e", "mse": ".2e",
           "converged": ".2%", "residual": ".1e", "rate": ".1e", "distance": ".1e", "radius": ".3f",
           "norm": ".3f", "drift": "+.3f", "applications": ",.0f"}
# Line style and marker of a method's versions, by what they were tuned or trained for.
VERSIONS = {"tuned here": (":", "s"), "protocol": ("-", "o"), "conditions": ("--", "D")}
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


class Picture(Figure):
    """A figure that is shown if it is a cell's last value."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def new_figure(columns: int = 1, rows: int = 1, width: float = 7.0,
               height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure in the common style, and the list of its axes, row by row; sizes in inches."""
    with mpl.rc_context(STYLE):
        figure = Picture(figsize=(width, height))
        axes = figure.subplots(rows, columns, squeeze=False)
        return figure, list(axes.flat)


def save_figure(figure: Figure, path: str | Path, source: str = "") -> DisplayedImage:
    """Write `path`.png and .pdf, without dates, so that equal figures are equal files.

    Args:
        source: the source of the images, to print below the figure.
    """
    path = Path(path)
    if source:
        figure.supxlabel(source, fontsize=9, color="#555555")
    with mpl.rc_context(STYLE):
        for suffix, metadata in ((".png", {"Software": None}),
                                 (".pdf", {"CreationDate": None, "Creator": None})):
            with atomic_path(path.with_suffix(suffix)) as temporary:
                figure.savefig(temporary, metadata=metadata)
    return DisplayedImage(filename=str(path.with_suffix(".png")), alt=described(figure))


def described(figure: Figure) -> str:
    """Alternative text for a figure: its panels' titles, axes and legends."""
    panels = []
    for ax in figure.axes:
        title, x, y = ax.get_title(), ax.get_xlabel(), ax.get_ylabel()
        if ax.images:
            parts = "picture", ", ".join(filter(None, (title, x, y)))
        else:
            legend = ax.get_legend()
            named = ", ".join(text.get_text() for text in legend.get_texts()) if legend else ""
            axes = f"{y or 'values'} against {x}" if x else y
            parts = "plot", title, axes, named
        panels.append(": ".join(filter(None, parts)))
    return " ".join(re.sub(r"[$\\{}]", "", "; ".join(dict.fromkeys(panels))).split())


def save_table(table: pd.DataFrame, path: str | Path, caption: str) -> Markdown:
    """Write `path`.csv, .md and .tex; the CSV keeps full precision."""
    path = Path(path)
    save_data(table, path)
    text = table.copy()
    for column in text.select_dtypes("float"):
        spec = next((spec for word, spec in FORMATS.items() if word in column.lower()), ".2f")
        text[column] = [format(v, spec) if pd.notna(v) else "" for v in text[column]]
    alignment = ["right" if pd.api.types.is_numeric_dtype(table[c]) else "left" for c in table]
    markdown = text.to_markdown(index=False, disable_numparse=True, colalign=alignment)
    atomic_write(path.with_suffix(".md"), f"{markdown}\n\n{caption}\n")
    latex = text.to_latex(index=False, escape=True, caption=caption, label=f"tab:{path.name}")
    atomic_write(path.with_suffix(".tex"), latex.replace("±", r"$\pm$"))
    return Markdown(f"{markdown}\n\n*{caption}*")


def save_data(table: pd.DataFrame, path: str | Path) -> None:
    """Write only `path`.csv, in full precision: data for programs, too long to read."""
    with atomic_path(Path(path).with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False)


def show(axes: Axes, image: Tensor, title: str = "") -> None:
    """Show one image (3, H, W), clipped to [0, 1], without ticks."""
    axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=11)


def gallery(rows: dict[str, dict[str, tuple[Tensor, float]]], side: float = 1.65) -> Figure:
    """Labelled rows of pictures (3, H, W), each with its PSNR in dB, which is shown if finite.

    The first row's labels are above it; `side` is the side of a picture, in inches.
    """
    columns = len(next(iter(rows.values())))
    figure, axes = new_figure(columns, len(rows), side * columns + 0.2,
                              (side + 0.3) * len(rows) + 0.3)
    for i, (name, pictures) in enumerate(rows.items()):
        axes[i * columns].set_ylabel(name)
        for ax, (label, (image, quality)) in zip(
                axes[i * columns:], pictures.items(), strict=False):
            show(ax, image, label if i == 0 else "")
            ax.set_xlabel(f"{quality:.1f} dB" if math.isfinite(quality) else "")
    return figure


def image_row(images: dict[str, Tensor], psnrs: dict[str, float]) -> Figure:
    """One row of a gallery, with the PSNR in dB below the pictures that have one."""
    return gallery({"": {label: (image, psnrs.get(label, math.nan))
                         for label, image in images.items()}}, 2.6)


def labelled_line(ax: Axes, x, y, method: str, marker: str = "", linestyle: str = "-",
                  label: str = "") -> None:
    """A curve in its method's colour, with the method's label by default."""
    ax.plot(x, y, color=METHODS[method].colour, label=label or METHODS[method].label, marker=marker,
            markersize=4, linestyle=linestyle)


def learning_curves(curves: pd.DataFrame) -> Figure:
    """PSNR on the fixed crops against the computation spent, from `recipes.trainings`."""
    figure, (ax,) = new_figure(height=4.6)
    for name in [name for name in METHODS if name in set(curves.method)]:
        own = curves[curves.method == name]
        labelled_line(ax, own.applications / 1000, own.psnr, name, "o")
    ax.set(xlabel="thousands of applications of the network to a crop",
           ylabel="PSNR on the fixed crops (dB)", title="Learning curves",
           ylim=(curves.groupby("method").psnr.last().min() - 1.5, None))
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def logarithmic(ax: Axes, at: list) -> None:
    """Make the x axis logarithmic, with plain numbers at the given ticks."""
    ax.set(xscale="log", xticks=at, xticklabels=at)
    ax.minorticks_off()


def training_loss(epochs: pd.Series, loss: pd.Series, title: str, method: str,
                  start: tuple[str, float] | None = None) -> Figure:
    """Fig. 1: average loss per image against the epoch, in the method's colour.

    Args:
        start: the method that training starts from and its loss, drawn as a dashed line.
    """
    figure, (ax,) = new_figure()
    if start is not None:
        ax.axhline(start[1], color=METHODS[start[0]].colour, linestyle="--",
                   label=METHODS[start[0]].label)
        epochs, loss = [0, *epochs], [start[1], *loss]
    labelled_line(ax, epochs, loss, method, "o")
    ax.set(xlabel="epoch", ylabel="average loss per image\n(mean squared error)", title=title,
           yscale="log")
    ax.yaxis.set_minor_formatter(mpl.ticker.LogFormatterSciNotation(minor_thresholds=(2, 1)))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return figure


def ways_to_equilibrium(distances: dict[tuple[type[ImplicitMap], str], list[float]],
                        residuals: Tensor, tolerance: float) -> Figure:
    """Notebook 4b: each map and solver's distance to the fixed point, and when a solver stops.

    Args:
        distances: (map, solver) -> relative distance at each evaluation of T.
        residuals: (evaluations, images), of one solve, which ends at `tolerance`.
    """
    figure, (left, right) = new_figure(columns=2, width=9.5)
    for (kind, solver), values in distances.items():
        left.semilogy(values, "-" if solver == "Anderson" else "--", color=kind.colour,
                      label=f"{kind.name}, {solver}")
    left.set(xlabel="evaluations of $T$", ylabel="relative distance to the fixed point",
             title="One equilibrium, four ways to it")
    right.semilogy(range(1, len(residuals) + 1), residuals.cpu(), color=SplittingMap.colour,
                   alpha=0.5)
    right.axhline(tolerance, color="black", linestyle=":", label="the solver stops here")
    right.set(xlabel="evaluations of $T$", ylabel=r"residual $\|T(x) - x\| / \|x\|$",
              title=f"Splitting, Anderson: {residuals.shape[1]} images")
    left.legend()
    right.legend()
    return figure


def gradient_angles(terms: list[int], cosines: dict[str, list[float]]) -> Figure:
    """Notebook 4b: the cosine between Neumann-k and the exact gradient, for each map and k."""
    figure, (ax,) = new_figure()
    for kind, marker in zip(MAPS, "osx", strict=True):
        ax.plot(terms, cosines[kind.name], f"{marker}-", color=kind.colour, label=kind.name)
    ax.set(xlabel="terms $k$ (JFB has one)", ylabel="cosine to the exact gradient",
           title="Neumann-k after training", ylim=(None, 1.03))
    logarithmic(ax, terms)
    ax.legend()
    return figure


def walks(lengths: list[float], losses: dict[str, dict[str, list[float]]]) -> Figure:
    """Notebook 4b: how a loss changes with a step against a gradient, a panel for each loss.

    Args:
        lengths: of the steps, as shares of the length of all weights.
        losses: loss -> gradient (a key of GRADIENT_COLOURS) -> change at each length.
    """
    figure, axes = new_figure(len(losses), width=9, height=3.6)
    for ax, (title, changes) in zip(axes, losses.items(), strict=True):
        for gradient, values in changes.items():
            ax.plot([1e4 * length for length in lengths], values, "o-",
                    color=GRADIENT_COLOURS[gradient], label=gradient)
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title=title, xlabel="length of the step, in 1/10,000 of the weights' norm",
               ylabel="change of the loss")
        ax.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes[0].legend()
    return figure


def gradient_cost(cost: pd.DataFrame) -> Figure:
    """Notebook 4b: seconds and memory of one training step against K, by gradient.

    Args:
        cost: columns gradient (a key of GRADIENT_COLOURS), K, seconds, MB.
    """
    figure, axes = new_figure(columns=2, width=9, height=3.6)
    for ax, column, label in zip(axes, ("seconds", "MB"), ("seconds", "peak memory (MB)"),
                                 strict=True):
        for gradient, part in cost.groupby("gradient", sort=False):
            ax.plot(part.K, part[column], "o-", color=GRADIENT_COLOURS[gradient], label=gradient)
        ax.set(xlabel="iterations $K$ of the solve", ylabel=label, title="One training step")
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter("{x:g}")
    axes[1].yaxis.set_minor_locator(mpl.ticker.LogLocator(subs=(2, 5)))
    axes[0].legend()
    return figure


def other_conditions(table: pd.DataFrame, panels: dict[str, tuple[str, str]],
                     usual: dict[str, object]) -> Figure:
    """Notebook 5: PSNR under other conditions, with a panel for each study.

    A method has one colour; its versions differ in lines and markers. A marker is hollow if not all
    of its images have converged.

    Args:
        table: columns study, condition, method, version (a key of VERSIONS), psnr, converged.
            Named conditions are drawn as points side by side, numbers as curves.
        panels: study -> title and label of the horizontal axis.
        usual: study -> the protocol's condition, which is marked.
    """
    figure, axes = new_figure(columns=2, rows=2, width=9.5, height=9)
    methods = list(dict.fromkeys(table.method))
    for ax, (study, (title, xlabel)) in zip(axes, panels.items(), strict=True):
        part = table[table.study == study]
        conditions = list(dict.fromkeys(part.condition))
        named = isinstance(conditions[0], str)
        if study in usual:
            at = conditions.index(usual[study]) if named else usual[study]
            ax.axvline(at, color=METHODS["measurement"].colour, linewidth=8, alpha=0.25, zorder=0)
        for (method, version), rows in part.groupby(["method", "version"], sort=False):
            colour, (linestyle, marker) = METHODS[method].colour, VERSIONS[version]
            at = rows.condition
            if named:
                shift = 0.8 * ((methods.index(method) + 0.5) / len(methods) - 0.5)
                at = rows.condition.map(conditions.index) + shift
            else:
                ax.plot(at, rows.psnr, color=colour, linestyle=linestyle)
            for points, face in ((~(rows.converged < 1), colour), (rows.converged < 1, "white")):
                ax.scatter(at[points], rows.psnr[points], s=34, marker=marker, facecolors=face,
                           edgecolors=colour, linewidths=1.6, zorder=3)
        if named:
            ax.set_xticks(range(len(conditions)), [name.replace("_", " ") for name in conditions],
                          rotation=35, ha="right")
        elif max(conditions) > 10 * min(conditions):
            logarithmic(ax, conditions)
        ax.set(title=title, xlabel=xlabel, ylabel="PSNR (dB)")
    figure.legend(handles=_condition_handles(methods, list(dict.fromkeys(table.version))),
                  loc="outside upper center", ncols=4, fontsize=12, frameon=False)
    return figure


def _condition_handles(methods: list[str], versions: list[str]) -> list[Line2D]:
    """The legend's entries: methods by colour, then the meaning of lines and markers."""
    def line(label: str, **style: object) -> Line2D:
        return Line2D([], [], label=label, **{"color": "black", **style})

    return [
        *(line(METHODS[m].label, color=METHODS[m].colour, linewidth=3) for m in methods),
        *(line(v if v == "tuned here" else f"trained: {v}", linestyle=VERSIONS[v][0],
               marker=VERSIONS[v][1]) for v in versions),
        line("not all converged", linestyle="none", marker="o", markerfacecolor="white"),
        line("the protocol's", color=METHODS["measurement"].colour, linewidth=8, alpha=0.25)]
