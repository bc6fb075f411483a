"""Is it an equilibrium everywhere? python benchmarks/grid.py

Images are restored under every pair of a kernel and a noise level, as `models.Equilibrium` solves
for all tables: one at a time, or on a GPU fifty together. Then the solve goes on from there, to a
residual of 1e-6: what has arrived does not move any more, and of what was only stopped the PSNR
drifts. A point of the grid is a method, a kernel, a noise level and a kind of images.

Each point is a file in grid/METHOD-KEY, written when it is done, and not done again, so that a run
that was stopped goes on. The key is of all that a point is made of but the code: other weights,
images or options have another folder.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import parent_process
from pathlib import Path

import pandas as pd
import torch
from command import options, run
from matplotlib.figure import Figure
from processes import alone
from torch import Tensor

from jfbnb.common import UserError, pick_device
from jfbnb.core import kernels
from jfbnb.core.diagnostics import jacobian_norm, spectral_radius
from jfbnb.core.fixed_point import solve
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Equilibrium, Restorer
from jfbnb.core.operators import Blur, Convolution, LinearOperator
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import ImageSet, bundled_photos, load_splits
from jfbnb.teaching.figures import new_figure, save_data, save_figure, save_table
from jfbnb.training.checkpoints import digest
from jfbnb.training.evaluation import together
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import BEST, make_methods
from jfbnb.training.tuning import Tuning

Row = dict[str, object]
CPU = torch.device("cpu")
SIDE = 128  # of the scenes, in pixels
ARRIVED = 1e-6  # a residual; float32 and the inner solves of some kernels know little below
NOISES = (0.002, 0.005, 0.01, 0.02, 0.05)
KINDS = {"faces": "validation images of CelebA",
         "photographs": "crops of photographs from scikit-image"}
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")


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


# --- what is measured ---------------------------------------------------------------------------


def equilibria(names: list[str], weights: Path, device: torch.device) -> dict[str, Restorer]:
    """The methods, each with weights and an equilibrium. Raises UserError for one without."""
    methods = make_methods(names, weights, device)
    for name, method in methods.items():
        if method.model is None or not isinstance(method.model(None, 1.0), Equilibrium):
            raise UserError(f"{name} has no equilibrium: choose from "
                            f"{', '.join(m for m in METHODS if METHODS[m].trainable)}")
    return methods


def photographs(count: int) -> ImageSet:
    """So many crops, or all that there are, evenly spread over those of the four photographs."""
    parts = [bundled_photos(split, SIDE) for split in ("test", "validation", "train")]
    names = [name for part in parts for name in part.names]
    own = [i for i, name in enumerate(names) if name.split("/")[0] in PHOTOGRAPHS]
    count = min(count, len(own))
    own = [own[i * len(own) // count] for i in range(count)]
    images = torch.cat([part.images for part in parts])[own]
    return ImageSet(images, [names[i] for i in own], list(range(count)))


def restored(model: Equilibrium, x: Tensor, d: Tensor, further: int,
             certified: int) -> dict[str, Tensor]:
    """What comes of some images, and what of them when the solve goes on from there."""
    T = model.T
    state, info = solve(T, d, model.tolerance, model.max_iterations)
    later, rest = solve(T, d, ARRIVED, further, start=state)
    before, after = (psnr(T.A.visible(T.image(z)), T.A.visible(x)) for z in (state, later))
    radius, norm = torch.full((2, len(x)), math.nan)
    if certified > 0:
        radius[:certified], norm[:certified] = (
            found(lambda z: T(z, d[:certified]), later[:certified], 20,
                  torch.Generator().manual_seed(0)) for found in (spectral_radius, jacobian_norm))
    return {"evaluations": info.iterations, "residual": info.residual,
            "converged": info.converged, "psnr": before,
            "further": rest.iterations, "residual_later": rest.residual,
            "psnr_later": after, "drift": after - before, "radius": radius, "norm": norm}


def point(method: Restorer, A: LinearOperator, noise_std: float, images: ImageSet, further: int,
          certified: int, device: torch.device = CPU) -> pd.DataFrame:
    """A row for each image; the Jacobian is measured at the equilibria of the first few."""
    A, x = A.to(device), images.as_float().to(device)
    d = measure(A, x, noise_std, 0, images.indices)
    model, parts, size = method.model(A, noise_std), [], together(x)
    for start in range(0, len(x), size):
        if (parent := parent_process()) and not parent.is_alive():
            os._exit(1)  # who ends the command ends its process, which has hours to go
        part = slice(start, start + size)
        found = restored(model, x[part], d[part], further, certified - start)
        parts.append(pd.DataFrame({"image": images.names[part],
                                   **{name: v.cpu() for name, v in found.items()}}))
    return pd.concat(parts, ignore_index=True)


def summary(rows: pd.DataFrame, certified: int) -> Row:
    """A point's row of the grid. Where a PSNR is no number the drift is infinite."""
    drift, radii = rows.drift.abs().fillna(math.inf), rows.radius[:certified]
    return {"images": len(rows), "psnr": rows.psnr.mean(skipna=False),
            "converged": rows.converged.mean(), "most_evaluations": rows.evaluations.max(),
            "mean_drift": drift.mean(), "worst_drift": drift.max(),
            "radius_max": radii.max(skipna=False),
            "norm_max": rows.norm[:certified].max(skipna=False), "stable": (radii < 1).mean()}


def folders(bench: argparse.Namespace, methods: dict[str, Restorer],
            kinds: dict[str, ImageSet]) -> dict[str, Path]:
    """Where each method's points are."""
    tuning = Tuning.load(bench.weights / "tuning.json")
    shown = [images.images for images in kinds.values()]
    keys = {name: digest(dict(method.model(None, 1.0).state_dict()), tuning.noise_std,
                         tuning.settings(METHODS[name]), shown, bench.further, bench.certified)
            for name, method in methods.items()}
    return {name: bench.out / "grid" / f"{name}-{key[:12]}" for name, key in keys.items()}


def measure_grid(bench: argparse.Namespace) -> None:
    """Write each point as it is done, and grid.csv of all that are."""
    if min(bench.images, bench.further, bench.threads) < 1 or bench.certified < 0:
        raise UserError("--images, --further and --threads must be positive, --certified not "
                        "negative")
    torch.set_num_threads(bench.threads)
    device = pick_device(bench.device)
    methods = equilibria(bench.methods, bench.weights, device)
    faces = load_splits(bench.data, SIDE, 8000, 200, 2000).validation[:bench.images]
    faces = replace(faces, images=faces.images.clone())  # not a view of all ten thousand
    kinds = dict(zip(KINDS, (faces, photographs(bench.images)), strict=True))
    parts, rows = folders(bench, methods, kinds), []
    for (kernel, border), make in KERNELS.items():
        for noise_std in NOISES:
            for kind, images in kinds.items():
                for name, method in methods.items():
                    file = parts[name] / f"{kernel}, {border}, {noise_std}, {kind}.csv"
                    if not file.is_file():
                        # An operator of its own: it starts its inner solves from the last one.
                        save_data(point(method, make(SIDE), noise_std, images, bench.further,
                                        bench.certified, device), file)
                    rows.append({"method": name, "kernel": kernel, "border": border,
                                 "noise": noise_std, "kind": kind,
                                 **summary(pd.read_csv(file), bench.certified)})
                    save_data(pd.DataFrame(rows), bench.out / "grid")
                    print("{method}, {kernel}, {border}, {noise}, {kind}: {converged:.0%} of "
                          "{images} converge, worst drift {worst_drift:.3f} dB".format(**rows[-1]),
                          flush=True)


# --- the report ---------------------------------------------------------------------------------


def sentence(rows: pd.DataFrame) -> str:
    return (f"{(rows.converged == 1).sum()} of {len(rows)} points converge on every image within "
            f"{Equilibrium.max_iterations} evaluations; the worst drift is "
            f"{rows.worst_drift.max():.3f} dB.")


def overview(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and kind of images."""
    points = rows.assign(everywhere=rows.converged == 1).groupby(["method", "kind"], sort=False)
    return pd.DataFrame({
        "Points": points.size(), "on every image": points.everywhere.sum(),
        "Converged": points.converged.mean(), "at worst converged": points.converged.min(),
        "Evaluations at most": points.most_evaluations.max(),
        "Change (dB)": points.worst_drift.max(), "Radius at most": points.radius_max.max(),
        "Norm at most": points.norm_max.max(),
    }).reset_index().rename(columns={"method": "Method", "kind": "Images"}).assign(
        Method=lambda table: [METHODS[name].label for name in table.Method])


def heat_maps(rows: pd.DataFrame) -> Figure:
    """For each method and kind of images: kernel x noise, the share that converges, the drift."""
    rows = rows.assign(label=rows.kernel + rows.border.map({"black": ", black border"}).fillna(""))
    methods, kinds, labels, noises = (list(dict.fromkeys(rows[column])) for column in
                                      ("method", "kind", "label", "noise"))
    figure, axes = new_figure(len(kinds), len(methods), 4.8 + 1.05 * len(noises) * len(kinds),
                              1.2 + (1.2 + 0.58 * len(labels)) * len(methods))
    for ax, (method, kind) in zip(axes, ((m, k) for m in methods for k in kinds), strict=True):
        own = rows[(rows.method == method) & (rows.kind == kind)]
        share, drift = (own.pivot(index="label", columns="noise", values=column)
                        .reindex(index=labels, columns=noises).to_numpy()
                        for column in ("converged", "worst_drift"))
        drawn = ax.imshow(100 * share, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for r, c in ((r, c) for r in range(len(labels)) for c in range(len(noises))):
            if not math.isnan(share[r, c]):  # one that is done
                colour = "black" if share[r, c] > 0.5 else "white"
                # Rounded down: 100% are all.
                ax.text(c, r, f"{math.floor(100 * share[r, c] + 1e-9)}%", fontsize=15,
                        color=colour, ha="center", va="bottom")
                ax.text(c, r + 0.06, f"{drift[r, c]:.3f} dB", fontsize=12, color=colour,
                        ha="center", va="top")
        ax.set_title(f"{METHODS[method].label}, {kind}: {(own.converged == 1).sum()} of {len(own)} "
                     "points", fontsize=15)
        ax.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        ax.set_yticks(range(len(labels)), labels if kind == kinds[0] else [""] * len(labels))
        ax.set_xlabel("noise level, on images in [0, 1]", fontsize=14)
        ax.tick_params(labelsize=14, length=0)
        ax.grid(False)
    bar = figure.colorbar(drawn, ax=axes, pad=0.02)
    bar.set_label(f"images that converge within {Equilibrium.max_iterations} evaluations (%)",
                  fontsize=14)
    bar.ax.tick_params(labelsize=14)
    figure.suptitle("Large: the images that converge; in titles, the points where all do.\n"
                    "Small: the worst |drift| of a PSNR when the solve goes on.", fontsize=15)
    return figure


def report(out: Path) -> None:
    """The table, the figure and the sentence, of grid.csv alone."""
    if not (out / "grid.csv").is_file():
        raise UserError(f"no grid.csv in {out}: leave --report out")
    rows = pd.read_csv(out / "grid.csv")
    counts = rows.groupby("kind", sort=False).images.max()
    source = "; ".join(f"{counts[kind]} {what}" for kind, what in KINDS.items() if kind in counts)
    save_table(overview(rows), out / "grid_overview", f"{sentence(rows)} {source}. The change is "
               "the largest, either way, that an image's PSNR makes when its solve goes on.")
    save_figure(heat_maps(rows), out / "grid", source)
    print(sentence(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--weights", type=Path, default=BEST,
                        help="a folder of trained networks, with tuning.json")
    parser.add_argument("--methods", nargs="+", default=["jfb"])
    parser.add_argument("--images", type=int, default=50, help="of each kind")
    parser.add_argument("--further", type=int, default=200,
                        help="evaluations in which a solve goes on, at most")
    parser.add_argument("--certified", type=int, default=1,
                        help="images of a point at which the Jacobian is measured")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    # Where nothing has set the threads before.
    return run("grid", parser.parse_args(arguments), lambda bench: alone(measure_grid, bench),
               report)


if __name__ == "__main__":
    raise SystemExit(main())
