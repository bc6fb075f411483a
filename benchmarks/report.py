"""The benchmark's figures, and its verdicts on what was promised. Nothing is measured here."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from jfbnb.teaching.figures import new_figure
from jfbnb.training.methods import METHODS

COLOURS = {library: METHODS[name].colour for library, name in (
    ("jfbnb", "jfb"), ("torchdeq", "gradient-descent"), ("deepinv", "total-variation"))}


def with_ratio(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the seconds over those of the first contender, to the same distance of a problem."""
    keys = ["problem", "to distance"]
    first = table[table.contender == table.contender.iloc[0]].set_index(keys).seconds
    ratio = table.seconds / table.set_index(keys).index.map(first)
    table.insert(table.columns.get_loc("seconds") + 1, "times ours", ratio)
    return table


# --- figures ------------------------------------------------------------------------------------


def bars(table: pd.DataFrame, label: str) -> Figure:
    """A panel for each problem and distance; a bar is pale where its contender did not arrive."""
    panels = list(table.groupby(["problem", "to distance"], sort=False))
    rows = -(-len(panels) // 2)
    height = 1.3 + 0.3 * table.contender.nunique()
    figure, axes = new_figure(2, rows, 13, rows * height)
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, ((problem, distance), part) in zip(axes, panels, strict=False):
        part = part.sort_values("seconds")
        colours = [COLOURS[name.split()[0]] for name in part.contender]
        drawn = ax.barh(part.contender, part.seconds, color=colours)
        for bar, reached, ratio in zip(drawn, part.reached, part["times ours"], strict=True):
            bar.set_alpha(1 if reached == "yes" else 0.3)
            ax.annotate(f"{ratio:.2f}" if reached == "yes" else f"not there at {ratio:.2f}",
                        (bar.get_width(), bar.get_y() + bar.get_height() / 2), (4, 0),
                        textcoords="offset points", va="center", fontsize=10)
        ax.set(xlabel=f"{label} (numbers: over ours)", title=f"{problem}, distance {distance}")
        ax.margins(x=0.3)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    return figure


# --- what was promised --------------------------------------------------------------------------

# How many times ours the fastest peer's JFB step is to take: by ours, the peers' map, and how the
# problems end, which is in the network's name.
FACTORS = (("jfbnb jfb", "Eq. 4", "", 5.0), ("jfbnb jfb", "our map", "", 1.3),
           ("jfbnb jfb, bf16", "our map", "", 1.7),
           ("jfbnb jfb, as shipped", "our map", "-8x32", 1.0),
           ("jfbnb jfb, as best ships", "our map", "-UNet", 1.0))


def verdicts(out: Path) -> pd.DataFrame:
    """Each target beside what the tables in the folder say, for the sections that have run."""
    rows: list[dict] = []

    def judge(target: str, measured: float, met: bool) -> None:
        rows.append({"target": target, "measured": measured, "met": "yes" if met else "no"})

    step, image, trainings, large = (
        pd.read_csv(file) if (file := out / f"{name}.csv").exists() else pd.DataFrame()
        for name in ("step", "reconstruction", "quality", "photographs_large"))
    if len(step):
        for ours, name, network, wanted in FACTORS:
            fitting = step[step.problem.str.endswith(network)]
            for distance, own in fitting.groupby("to distance"):
                factor = least_factor(own, ours, name)
                if factor is not None:
                    judge(f"a peer's JFB step with {name} takes {wanted:g} times that of {ours} or "
                          f"more, to {distance:g}", factor, factor >= wanted)
        exact = step[(step.contender == "jfbnb implicit") & (step["to distance"] == 1e-3)]
        if len(exact):
            judge("our implicit step takes 3 times our JFB step or more, to 0.001",
                  ratio := exact["times ours"].min(), ratio >= 3)
    single = image[image.problem.str.startswith("1x128-")] if len(image) else image
    if len(single):
        seconds = single.seconds[single.contender == "jfbnb"].max()
        judge("one image of 128 x 128 in under 0.12 s", seconds, seconds < 0.12)
    if len(trainings):
        peers = trainings["times ours, 34 dB"][~trainings.training.str.startswith("jfbnb")]
        judge("a peer's training takes twice as long as ours or more, to 34.0 dB", peers.min(),
              peers.min() >= 2)
    if len(large):
        most = large[large.megapixels == large.megapixels.max()][["seconds", "process MB"]].max()
        minutes, size = most.seconds / 60, f"a photograph of {large.megapixels.max():g} megapixels"
        judge(f"{size} in 10 minutes or less", minutes, minutes <= 10)
        judge(f"{size} in 4 GiB or less", gib := most["process MB"] / 1024, gib <= 4)
    return pd.DataFrame(rows, columns=["target", "measured", "met"])


def least_factor(step: pd.DataFrame, ours: str, map_name: str) -> float | None:
    """The fastest peer's seconds over ours, where that is worst; NaN where we did not arrive."""
    peers = step[step.contender.str.endswith(f" jfb, {map_name}")].groupby("problem").seconds.min()
    own = step[step.contender == ours].set_index("problem")
    both = own.index.intersection(peers.index)
    factor = (peers / own.seconds.where(own.reached == "yes")).loc[both]
    return None if factor.empty else factor.min(skipna=False)
