"""The benchmark's figures, and its verdicts on what was promised. Nothing is measured here."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from jfbnb.figures import COLOURS, labelled_line, new_figure
from jfbnb.methods import LABELS

LIBRARY_COLOURS = {"jfbnb": COLOURS["jfb"], "torchdeq": COLOURS["gradient-descent"],
                   "deepinv": COLOURS["total-variation"]}
GRADIENT_COLOURS = {"jfb": COLOURS["jfb"], "implicit": COLOURS["deq"],
                    "unrolled": COLOURS["unrolled"]}
SERIES_LABELS = {"K": "iterations $K$", "batch": "images in a batch", "side": "side (pixels)",
                 "width": "channels"}
TIME_PARTS = {"network": COLOURS["jfb"], "data step": COLOURS["gradient-descent"],
              "solver": COLOURS["measurement"]}


def with_ratio(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the seconds over those of our own JFB on the same problem, to the same distance."""
    keys = ["problem", "to distance"]
    ours = table[table.contender == "jfbnb jfb"].set_index(keys).seconds
    ratio = table.seconds / table.set_index(keys).index.map(ours)
    table.insert(table.columns.get_loc("seconds") + 1, "times ours", ratio)
    return table


def exponent(x: pd.Series, y: pd.Series) -> float:
    """The p of y = c x^p, by least squares on logarithms."""
    return np.polyfit(np.log(x), np.log(y), 1)[0]


# --- figures ------------------------------------------------------------------------------------


def bars(table: pd.DataFrame, label: str) -> Figure:
    """A panel for each problem and distance; a bar is pale where its contender did not arrive."""
    panels = list(table.groupby(["problem", "to distance"], sort=False))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    most = max(len(part) for _, part in panels)
    figure, axes = new_figure(columns, rows, 6.5 * columns, rows * (1.3 + 0.3 * most))
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, ((problem, distance), part) in zip(axes, panels, strict=False):
        part = part.sort_values("seconds")
        colours = [LIBRARY_COLOURS[name.split()[0]] for name in part.contender]
        drawn = ax.barh(part.contender, part.seconds, color=colours)
        for bar, reached, ratio in zip(drawn, part.reached, part["times ours"], strict=True):
            bar.set_alpha(1 if reached == "yes" else 0.3)
            ax.annotate(f"{ratio:.1f}" if reached == "yes" else f"not there at {ratio:.1f}",
                        (bar.get_width(), bar.get_y() + bar.get_height() / 2), (4, 0),
                        textcoords="offset points", va="center", fontsize=10)
        ax.set(xlabel=f"{label} (numbers: over ours)", title=f"{problem}, distance {distance}")
        ax.margins(x=0.3)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    return figure


def time_parts(table: pd.DataFrame) -> Figure:
    """Where the time of one evaluation within a solve goes."""
    figure, (ax,) = new_figure(width=9, height=1.5 + 0.5 * len(table))
    left = np.zeros(len(table))
    for part, colour in TIME_PARTS.items():
        share = 100 * table[f"ms {part}"].clip(lower=0) / table["ms per evaluation"]
        ax.barh(table.problem + ", " + table.type, share, left=left, color=colour, label=part)
        left = left + share.to_numpy()
    ax.set(xlabel="% of the time of an evaluation of $T$")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(TIME_PARTS))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    return figure


def growth_curves(table: pd.DataFrame, fits: pd.DataFrame) -> Figure:
    """Time above, memory below; the fitted exponents in the legends."""
    names = list(table.series.unique())
    figure, axes = new_figure(len(names), 2, width=3.3 * len(names), height=6.6)
    fits = fits.set_index(["series", "gradient"])
    for i, ax in enumerate(axes):
        series = names[i % len(names)]
        quantity, fitted = (("seconds", "exponent of time"), ("MB", "exponent of memory"))[
            i // len(names)]
        for gradient, own in table[table.series == series].groupby("gradient", sort=False):
            ax.loglog(own.value, own[quantity], "o-", color=GRADIENT_COLOURS[gradient],
                      label=f"{gradient}, power {fits.loc[(series, gradient), fitted]:.2f}")
            ax.set_xticks(own.value, own.value)
        ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.set(xlabel=SERIES_LABELS[series], ylabel=quantity)
        ax.legend(fontsize=9)
    return figure


def quality_curves(table: pd.DataFrame, goal: float) -> Figure:
    figure, (ax,) = new_figure()
    for name, own in table.groupby("method", sort=False):
        labelled_line(ax, own["time (s)"], own.psnr, name, marker="o")
    ax.axhline(goal, color=COLOURS["measurement"], linestyle="--",
               label=f"{LABELS['deq']}, published: {goal} dB")
    ax.set(xlabel="seconds of training, pretraining included", ylabel="validation PSNR (dB)",
           xlim=(0, None))
    ax.legend(fontsize=9)
    return figure


# --- what was promised --------------------------------------------------------------------------


def verdicts(out: Path) -> pd.DataFrame:
    """Each target beside what the tables in the folder say, for the sections that have run."""
    rows: list[dict] = []

    def judge(target: str, measured: float, met: bool) -> None:
        rows.append({"target": target, "measured": measured, "met": "yes" if met else "no"})

    step, image, limits, fits, trained = (
        pd.read_csv(file) if (file := out / f"{name}.csv").exists() else pd.DataFrame()
        for name in ("step", "reconstruction", "limit", "growth_exponents", "time_to_quality"))
    if len(step):
        for name, least in (("Eq. 4", 5.0), ("our map", 1.5)):
            peers = step[step.contender.str.endswith(f" jfb, {name}")]
            for distance, own in peers.groupby("to distance"):
                ratio = own["times ours"].min()
                judge(f"a peer's JFB step with {name} takes {least} times ours or more, to "
                      f"{distance:g}", ratio, ratio >= least)
        exact = step[(step.contender == "jfbnb implicit") & (step["to distance"] == 1e-3)]
        if len(exact):
            ratio = exact["times ours"].min()
            judge("our implicit step takes 3 times our JFB step or more, to 0.001", ratio,
                  ratio >= 3)
    if len(image):
        single = image[(image.contender == "jfbnb jfb") & image.problem.str.startswith("1x128-")]
        if len(single):
            seconds = single.seconds.max()
            judge("one image of 128 x 128 in under 0.15 s", seconds, seconds < 0.15)
    if len(limits):
        share = limits["solve's share"][limits.type == "float32"].min()
        judge("the solve runs at 0.6 of the matrix product's rate or more", share, share >= 0.6)
    if len(fits):
        flat = fits["most over least MB"][(fits.series == "K") & (fits.gradient == "jfb")].max()
        judge("JFB's memory varies by at most 1.05 over K", flat, flat <= 1.05)
    if len(trained):
        column = next(c for c in trained if c.startswith("to "))
        seconds = trained[column][trained.method == "jfb"].min()
        judge(f"JFB from scratch {column} under 300, {trained.images[0]}", seconds, seconds < 300)
    return pd.DataFrame(rows, columns=["target", "measured", "met"])
