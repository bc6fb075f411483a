"""Is the restored image an equilibrium everywhere? python benchmarks/grid.py

CelebA's validation images and crops of photographs are restored under each pair of a kernel and a
noise level, as `models.Equilibrium` solves for all tables. Then the solve is continued to a
residual of 1e-6. An equilibrium hardly moves; where a solve was only stopped, its PSNR drifts.

grid.csv has a row for each point. A stopped run continues; other weights, images or options
start anew.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from command import Bench, Rows, options, run
from matplotlib.figure import Figure
from torch import Tensor

from jfbnb.common import UserError, pick_device
from jfbnb.core import kernels
from jfbnb.core.fixed_point import solve
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur, Convolution, LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import ImageSet, bundled_photos, load_splits
from jfbnb.teaching.figures import new_figure, save_figure, save_table
from jfbnb.training.checkpoints import digest
from jfbnb.training.evaluation import together
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import BEST, make_methods

SIDE = 128  # of the scenes, in pixels
FURTHER = 200  # evaluations of the continued solve, at most
SETTLED = 1e-6  # a residual; float32 and some kernels' inner solves have few digits below
NOISES = (0.002, 0.005, 0.01, 0.02, 0.05)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
KINDS = {"faces": "validation images of CelebA",
         "photographs": "crops of photographs from scikit-image"}


def gaussian(side: int, std: float) -> Callable[[int], LinearOperator]:
    return partial(Blur, kernel_size=side, kernel_std=std, border="unknown")


# By kernel and border: the size of a scene -> the operator.
KERNELS: dict[tuple[str, str], Callable[[int], LinearOperator]] = {
    ("Gaussian 3 x 3, std 1", "unknown"): gaussian(3, 1.0),
    ("Gaussian 5 x 5, std 1", "unknown"): gaussian(5, 1.0),
    ("Gaussian 5 x 5, std sqrt 5", "unknown"): gaussian(5, math.sqrt(5)),
    ("Gaussian 5 x 5, std 5", "unknown"): gaussian(5, 5.0),
    ("Gaussian 9 x 9, std sqrt 5", "unknown"): gaussian(9, math.sqrt(5)),
    ("Gaussian 15 x 15, std 3", "unknown"): gaussian(15, 3.0),
    ("protocol paper", "black"): get_protocol("paper").operator,
    ("protocol code", "black"): get_protocol("code").operator,
    ("motion of 9 at 30 degrees", "unknown"): partial(Convolution, kernel=kernels.motion(9, 30)),
    ("disk of radius 3", "unknown"): partial(Convolution, kernel=kernels.disk(3)),
}


def photographs(count: int) -> ImageSet:
    """`count` crops of the photographs, evenly spread, or all that there are."""
    parts = [bundled_photos(split, SIDE) for split in ("test", "validation", "train")]
    names = [name for part in parts for name in part.names]
    own = [i for i, name in enumerate(names) if name.split("/")[0] in PHOTOGRAPHS]
    count = min(count, len(own))
    own = [own[i * len(own) // count] for i in range(count)]
    images = torch.cat([part.images for part in parts])[own]
    return ImageSet(images, [names[i] for i in own], list(range(count)))


def point(model: Equilibrium, x: Tensor, d: Tensor) -> dict[str, float]:
    """A point's row of the grid. An image whose PSNR is NaN has an infinite drift."""
    T, size, parts = model.T, together(x), []
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        state, info = solve(T, d[part], model.tolerance, model.max_iterations)
        later, _ = solve(T, d[part], SETTLED, FURTHER, start=state)
        before, after = (psnr(T.A.visible(T.image(z)), T.A.visible(x[part]))
                         for z in (state, later))
        parts.append((before, after - before, info.converged, info.iterations))
    before, drift, converged, iterations = (torch.cat(p) for p in zip(*parts, strict=True))
    return {"images": len(x), "psnr": before.mean().item(),
            "converged": converged.float().mean().item(),
            "most_evaluations": iterations.max().item(),
            "worst_drift": drift.abs().nan_to_num(nan=math.inf).max().item()}


def measure_grid(bench: Bench) -> None:
    """Add the points to grid.csv that it does not have yet."""
    if bench.images < 1:
        raise UserError("--images must be positive")
    device = pick_device(bench.device)
    methods = make_methods(bench.methods, bench.weights, device)
    for name, method in methods.items():
        if method.model is None or not isinstance(method.model(None, 1.0), Equilibrium):
            raise UserError(f"{name} has no equilibrium: choose jfb or jfb-energy")
    faces = load_splits(bench.data).validation[:bench.images]
    kinds = dict(zip(KINDS, (faces, photographs(bench.images)), strict=True))
    made_of = {name: digest(dict(method.model(None, 1.0).state_dict()), FURTHER,
                            [images.names for images in kinds.values()])[:16]
               for name, method in methods.items()}
    rows = Rows(bench.out / "grid.csv")
    rows.table = pd.concat([rows.where(made_of=key) for key in made_of.values()])
    for (kernel, border), make in KERNELS.items():
        for noise_std in NOISES:
            for kind, images in kinds.items():
                for name, method in methods.items():
                    key = {"method": name, "kernel": kernel, "border": border, "noise": noise_std,
                           "kind": kind, "made_of": made_of[name]}
                    if len(rows.where(**key)):
                        continue
                    A, x = make(SIDE).to(device), images.as_float().to(device)
                    d = measure(A, x, noise_std, 0, images.indices)
                    found = point(method.model(A, noise_std), x, d)
                    rows.add({**key, **found})
                    print(f"{name}, {kernel}, {border}, {noise_std}, {kind}: "
                          f"{found['converged']:.0%} converge", flush=True)


# --- the report ---------------------------------------------------------------------------------


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and kind of images."""
    points = rows.assign(everywhere=rows.converged == 1).groupby(["method", "kind"], sort=False)
    return pd.DataFrame({
        "Points": points.size(), "on every image": points.everywhere.sum(),
        "Converged": points.converged.mean(), "at worst converged": points.converged.min(),
        "Evaluations at most": points.most_evaluations.max(),
        "Change (dB)": points.worst_drift.max(),
    }).reset_index().rename(columns={"method": "Method", "kind": "Images"}).assign(
        Method=lambda table: [METHODS[name].label for name in table.Method])


def heat_maps(rows: pd.DataFrame) -> Figure:
    """For each method and kind of images: kernel x noise, the share that converges, the drift."""
    rows = rows.assign(label=rows.kernel + rows.border.map({"black": ", black border"}).fillna(""))
    labels, noises = rows.label.unique(), rows.noise.unique()
    panels = list(rows.groupby(["method", "kind"], sort=False))
    methods, kinds = rows.method.nunique(), rows.kind.nunique()
    figure, axes = new_figure(kinds, methods, 4.8 + 1.05 * len(noises) * kinds,
                              1.2 + (1.2 + 0.58 * len(labels)) * methods)
    for ax, ((method, kind), own) in zip(axes, panels, strict=False):
        share, drift = (own.pivot(index="label", columns="noise", values=column)
                        .reindex(index=labels, columns=noises).to_numpy()
                        for column in ("converged", "worst_drift"))
        ax.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for r, c in zip(*(~pd.isna(share)).nonzero(), strict=True):
            colour = "black" if share[r, c] > 0.5 else "white"
            ax.text(c, r, f"{math.floor(100 * share[r, c] + 1e-9)}%", fontsize=15, color=colour,
                    ha="center", va="bottom")  # rounded down: 100% are all
            ax.text(c, r + 0.06, f"{drift[r, c]:.3f} dB", fontsize=12, color=colour, ha="center",
                    va="top")
        ax.set_title(f"{METHODS[method].label}, {kind}: {(own.converged == 1).sum()} of {len(own)} "
                     "points", fontsize=15)
        ax.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        ax.set_yticks(range(len(labels)), labels if kind == rows.kind.iloc[0] else [])
        ax.set_xlabel("noise level, on images in [0, 1]", fontsize=14)
        ax.tick_params(labelsize=14, length=0)
        ax.grid(False)
    figure.suptitle(
        f"Large: the images that converge within {Equilibrium.max_iterations} evaluations; in "
        "titles, the points where all do.\nSmall: the largest change of a PSNR when the solve is "
        "continued.", fontsize=15)
    return figure


def report(out: Path) -> None:
    """The table and the figure, of grid.csv alone."""
    rows = pd.read_csv(out / "grid.csv")
    counts = rows.groupby("kind", sort=False).images.max()
    source = "; ".join(f"{counts[kind]} {what}" for kind, what in KINDS.items() if kind in counts)
    save_table(overview(rows), out / "grid_overview",
               f"{(rows.converged == 1).sum()} of {len(rows)} points converge on every image "
               f"within {Equilibrium.max_iterations} evaluations; the worst drift is "
               f"{rows.worst_drift.max():.3f} dB. {source}. The change is the largest, either way, "
               "that an image's PSNR makes when its solve is continued.")
    save_figure(heat_maps(rows), out / "grid", source)


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, images=50)
    parser.add_argument("--weights", type=Path, default=BEST,
                        help="a folder of trained networks, with tuning.json")
    parser.add_argument("--methods", nargs="+", default=["jfb"])
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    return run(parser.parse_args(arguments), {"grid": measure_grid}, report)


if __name__ == "__main__":
    raise SystemExit(main())
