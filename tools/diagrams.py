"""Draw the diagrams of the notebooks: `python tools/diagrams.py` writes docs/diagrams/*.svg."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from jfbnb.core.maps import PreconditionedMap, SplittingMap
from jfbnb.teaching.figures import GRADIENT_COLOURS

FOLDER = Path(__file__).parents[1] / "docs" / "diagrams"
GREY, INK = "#dddddd", "#333333"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of so many inches, in units of a hundredth of an inch."""
    figure = Figure(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, 100 * width), ylim=(0, 100 * height))
    ax.axis("off")
    return figure, ax


def box(ax: Axes, x: float, y: float, text: str, width: float = 90, height: float = 44,
        colour: str = GREY, size: float = 11) -> None:
    """A rounded box around (x, y), with its text."""
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, edgecolor=colour,
                                boxstyle="round,pad=0,rounding_size=8", linewidth=2,
                                facecolor="white" if colour != GREY else "#f2f2f2"))
    ax.text(x, y, text, ha="center", va="center", color=INK, fontsize=size)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK,
          bend: float = 0.0, dashed: bool = False) -> None:
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=colour,
                                 connectionstyle=f"arc3,rad={bend}", linewidth=1.8,
                                 linestyle=(0, (3, 2)) if dashed else "-"))


def half_steps() -> Figure:
    """The two half-steps of 4.3 as a circle, and where each map reads its image."""
    figure, ax = canvas(9, 2.6)
    for x, words, colour, where, name in (
            (300, "$x$\nfits the data", PreconditionedMap.colour, "right", "the preconditioned map"
             "\nreads here: $x^*$"),
            (600, "$z$\nlooks clean", SplittingMap.colour, "left", "the splitting\nreads here: "
             "$z^* = D(x^*)$")):
        box(ax, x, 130, words, 130, 56, colour, 12)
        ax.text(x + (-80 if where == "right" else 80), 130, name, ha=where, va="center",
                fontsize=10.5, color=colour)
    arrow(ax, (590, 164), (310, 164), bend=0.3)
    arrow(ax, (310, 96), (590, 96), bend=0.3)
    for y, words in ((230, "data: $x = (A^T\\!A + \\tau I)^{-1}(A^T d + \\tau z)$"),
                     (30, "denoiser: $z = D(x)$")):
        ax.text(450, y, words, ha="center", va="center", fontsize=12, color=INK)
    return figure


def backward_passes() -> Figure:
    """Three gradients: the applications that are kept for the way back, and that way."""
    figure, ax = canvas(9, 3.4)
    for name, y, kept, words in (
            ("unrolled", 300, 5, "all $K$ are kept:\nmemory grows with $K$"),
            ("exact", 185, 1, "one is kept for $J$, one for\n$\\Theta$; $y = g + yJ$ is solved"),
            ("JFB", 60, 1, "one is kept, and\npassed once")):
        colour = GRADIENT_COLOURS[name]
        ax.text(15, y, name, fontsize=13, color=colour, weight="bold", va="center")
        for i in range(5):
            x, tracked = 140 + 100 * i, i >= 5 - kept
            box(ax, x, y, "..." if i == 2 else "$T$", 56, 34, colour if tracked else GREY)
            arrow(ax, (x + 29, y), (x + 71, y))
            if tracked:
                arrow(ax, (x + 95, y - 20), (x + 5, y - 20), colour, -0.25, dashed=True)
        box(ax, 645, y, "loss", 64, 34)
        if name == "exact":
            for reach in (12, 20):
                arrow(ax, (540 + reach, y - 20), (540 - reach, y - 20), colour, -1.6, dashed=True)
        ax.text(695, y, words, fontsize=10.5, color=INK, va="center")
    return figure


def course() -> Figure:
    """The notebooks, and what each is about."""
    figure, ax = canvas(9, 1.4)
    steps = {"1": "a blur, and\nits inverse", "2": "a formula\nas the prior",
             "3": "a denoiser\n$D$", "4": "an output\nthat is an\nequilibrium",
             "4b": "its gradient,\ncut short", "5": "measured\nbeside its\nrivals",
             "6": "any $A$,\nany picture"}
    for i, (number, words) in enumerate(steps.items()):
        x = 66 + 128 * i
        box(ax, x, 50, words, 106, 76)
        ax.text(x, 104, number, ha="center", fontsize=14, weight="bold", color=INK)
        if i + 1 < len(steps):
            arrow(ax, (x + 53, 50), (x + 76, 50))
    return figure


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "jfbnb", "font.size": 11}):
        for draw in (half_steps, backward_passes, course):
            draw().savefig(FOLDER / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
