"""The speed benchmark's figures, and the targets beside what was measured."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from jfbnb.teaching.figures import new_figure
from jfbnb.training.methods import METHODS

COLOURS = {library: METHODS[name].colour for library, name in (
    ("jfbnb", "jfb"), ("torchdeq", "gradient-descent"), ("deepinv", "total-variation"))}
# The least ratio of the faster peer's JFB step to ours: our contender, the network, the ratio.
FACTORS = (("jfbnb jfb", "", 1.3), ("jfbnb jfb, as shipped", "-8x32", 1.0),
           ("jfbnb jfb, as best ships", "-UNet", 1.0))
Verdict = tuple[str, float, bool]  # the target, what was measured, whether it is met


def bars(table: pd.DataFrame, label: str) -> Figure:
    """A panel for each problem and distance."""
    panels = list(table.groupby(["problem", "to distance"], sort=False))
    rows = -(-len(panels) // 2)
    figure, axes = new_figure(2, rows, 13, rows * (1.3 + 0.3 * table.contender.nunique()))
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, ((problem, distance), part) in zip(axes, panels, strict=False):
        part = part.sort_values("seconds")
        colours = [COLOURS[name.split()[0]] for name in part.contender]
        drawn = ax.barh(part.contender, part.seconds, color=colours)
        ax.bar_label(drawn, part["times ours"].map("{:.2f}".format), padding=4, fontsize=10)
        ax.set(xlabel=f"{label} (numbers: over ours)", title=f"{problem}, distance {distance}")
        ax.margins(x=0.3)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    return figure


# --- targets ------------------------------------------------------------------------------------


def verdicts(out: Path) -> pd.DataFrame:
    """Each target beside what the tables in the folder say, for the sections that have run."""
    rows = [verdict for name, judge in (("step", of_steps), ("reconstruction", of_one_image),
                                        ("photographs_large", of_large))
            if (file := out / f"{name}.csv").exists() for verdict in judge(pd.read_csv(file))]
    table = pd.DataFrame(rows, columns=["target", "measured", "met"])
    return table.assign(met=["yes" if met else "no" for met in table.met])


def of_steps(step: pd.DataFrame) -> Iterator[Verdict]:
    """The faster peer's seconds over ours, on the problem where that ratio is least."""
    peers = step[step.contender.str.endswith(" jfb, our map")]
    peers = peers.groupby(["to distance", "problem"]).seconds.min()
    for ours, network, wanted in FACTORS:
        own = step[(step.contender == ours) & step.problem.str.endswith(network)]
        ratios = (peers / own.set_index(["to distance", "problem"]).seconds).dropna()
        for distance, least in ratios.groupby("to distance").min().items():
            yield (f"a peer's JFB step with our map takes {wanted:g} times that of {ours} or more, "
                   f"to {distance:g}", least, least >= wanted)


def of_one_image(table: pd.DataFrame) -> Iterator[Verdict]:
    own = table[(table.contender == "jfbnb") & table.problem.str.startswith("1x128-")]
    for seconds in own.seconds:
        yield "one image of 128 x 128 in under 0.12 s", seconds, seconds < 0.12


def of_large(table: pd.DataFrame) -> Iterator[Verdict]:
    most = table[table.megapixels == table.megapixels.max()].max(numeric_only=True)
    minutes, gib = most.seconds / 60, most["process MB"] / 1024
    size = f"a photograph of {most.megapixels:g} megapixels"
    yield f"{size} in 10 minutes or less", minutes, minutes <= 10
    yield f"{size} in 4 GiB or less", gib, gib <= 4
