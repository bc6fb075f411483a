"""Quality against computation, and over seeds: python benchmarks/schedules.py --weights runs/cpu

Every point is a training of its own, from the same denoiser, whose learning rate has fallen to 0
at its end: a longer schedule read early would not do, as a cosine flattens by itself. Methods,
learning rates and budgets are those of the model cards in --weights; a seed draws other crops and
other noise, not another denoiser. The curves are of validation images, the table of test images.

What is in schedules.csv is not done again, so that a run that was stopped goes on.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from command import options, run
from matplotlib.figure import Figure

from jfbnb.common import UserError
from jfbnb.core.models import Model
from jfbnb.core.protocols import get_protocol
from jfbnb.data import load_splits
from jfbnb.teaching.figures import new_figure, save_data, save_figure, save_table
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import LossSettings
from jfbnb.training.methods import METHODS, Method
from jfbnb.training.recipes import (
    Problem,
    Run,
    read_cards,
    score,
    train_method,
    validation_problem,
    with_images,
)
from jfbnb.training.restorers import load_model
from jfbnb.training.weights import load_denoiser

CPU = torch.device("cpu")
RIVALS = ("jfb", "deq", "unrolled", "feedforward-tikhonov")
KEYS = ["method", "length", "seed"]
SAME = ["protocol", "learning_rate", "full_budget"]  # of a method's rows: else they are of others
Row = dict[str, object]


def planned(bench: argparse.Namespace) -> Iterator[tuple[float, int]]:
    """Lengths, as shares of the cards' budgets, and seeds: the table's seeds first."""
    yield from ((1.0, seed) for seed in range(bench.seeds))
    yield from ((length, 0) for length in bench.lengths if length != 1)


def trained(method: Method, card: dict, length: float, seed: int, weights: Path,
            problem: Problem) -> tuple[Model, float]:
    """A model, and the applications of its network that its training made."""
    if not card["training"].get("budget"):
        raise UserError(f"{weights / method.name}.json is of a training without a budget: make "
                        "one with `jfbnb train`")
    if length == 1 and seed == card["training"]["seed"]:
        return load_model(method, weights), card["history"][-1]["applications"]
    config = TrainingConfig(**card["training"])
    config = replace(config, budget=length * config.budget, seed=seed, unconverged_limit=1.0)
    network = load_denoiser(weights / "denoiser.safetensors").network
    model, made = train_method(method, network, card["settings"], problem, config,
                               LossSettings.read(card), Run(CPU, log=lambda line: None))
    return model, made["history"][-1]["applications"]


def measure(bench: argparse.Namespace) -> None:
    """Write a row for each training and set of images, as soon as it is known."""
    setup = get_protocol(bench.protocol)
    splits = load_splits(bench.data, setup.image_size, 8000, 200, 2000)
    few = validation_problem(setup, splits, 1, 0, CPU)  # nothing is chosen on it
    sets = {"validation": with_images(few, splits.validation[:bench.validation]),
            "test": with_images(few, splits.test[:bench.test])}
    file = bench.out / "schedules.csv"
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    done = {tuple(row[key] for key in KEYS): [row[key] for key in SAME] for row in rows}
    for length, seed in planned(bench):
        for name in bench.methods:
            card = read_cards(bench.weights, [name])[name]
            what = [bench.protocol, card["training"]["learning_rate"],
                    card["training"].get("budget")]
            if before := done.get((name, length, seed)):
                if before != what:
                    raise UserError(f"{file} has trainings of {name} by other cards than those in "
                                    f"{bench.weights}: move it away, or choose another --out")
                continue
            model, applications = trained(METHODS[name], card, length, seed, bench.weights, few)
            for images, problem in sets.items():
                if images == "test" and length != 1:
                    continue  # they are for the table
                rows.append({"method": name, "length": length, "seed": seed,
                             "applications": applications, "images": images,
                             "count": len(problem.x),
                             **dict(zip(SAME, what, strict=True)),
                             **score(model.on(problem.A), problem)})
            save_data(pd.DataFrame(rows), file.with_suffix(""))
            print(name, length, seed, {k: round(v, 3) for k, v in rows[-1].items()
                                       if isinstance(v, float)}, flush=True)


def with_heads(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, and for each method with a head those of its second network's image."""
    head_of = {m.head_of.name: m.name for m in METHODS.values() if m.head_of}
    heads = rows.dropna(subset="psnr_head")
    heads = heads.assign(psnr=heads.psnr_head, method=heads.method.map(head_of))
    return pd.concat([rows, heads], ignore_index=True)


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds on test images, and differences from JFB paired by seed.

    The standard errors are over trainings: what another seed would have changed. With so few they
    are rough.
    """
    by_seed = rows[(rows.images == "test") & (rows.length == 1)].pivot(
        index="seed", columns="method", values="psnr")
    order = [name for name in METHODS if name in by_seed]
    apart = by_seed.sub(by_seed.jfb, axis=0)
    return pd.DataFrame({
        "Method": [METHODS[name].label for name in order],
        "trainings": [by_seed[name].count() for name in order],
        "PSNR (dB)": by_seed[order].mean().values,
        "± over seeds": by_seed[order].sem().values,
        "minus JFB (dB)": apart[order].mean().values,
        "± over pairs": apart[order].sem().values})


def quality_against_computation(ends: pd.DataFrame) -> Figure:
    """PSNR at the end of whole schedules; over seeds the mean, with its standard error."""
    figure, (ax,) = new_figure(height=4.6)
    for name in [name for name in METHODS if name in set(ends.method)]:
        own, method = ends[ends.method == name], METHODS[name]
        points = own.groupby("length").agg(at=("applications", "mean"), psnr=("psnr", "mean"),
                                           sem=("psnr", "sem")).fillna(0)
        ax.errorbar(points["at"] / 1000, points.psnr, points["sem"], color=method.colour,
                    marker="o", markersize=4, linestyle="--" if method.head_of else "-", capsize=3,
                    label=method.label)
    ax.set(xscale="log", xlabel="thousands of applications of the network to a training crop,\n"
           "each point a whole schedule", ylabel="PSNR on validation images (dB)",
           title="Quality against computation")
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def report(out: Path) -> None:
    """The figure and the table, of schedules.csv alone."""
    rows = with_heads(pd.read_csv(out / "schedules.csv"))
    test = rows[rows.images == "test"]
    save_table(over_seeds(rows), out / "seeds",
               f"{test.full_budget.max():,.0f} applications of its network to a training crop "
               f"each, from the same denoiser, on {test['count'].max()} test images and the same "
               "measurements. ± is the standard error over trainings.")
    watched = rows[rows.images == "validation"]
    save_figure(quality_against_computation(watched), out / "schedules",
                f"CelebA, {watched['count'].max()} validation images")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--weights", type=Path, default=Path("runs/cpu"),
                        help="a folder of trained networks, with their model cards")
    parser.add_argument("--protocol", default="paper")
    parser.add_argument("--methods", nargs="+", default=list(RIVALS))
    parser.add_argument("--lengths", nargs="+", type=float, default=[0.25, 1, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--validation", type=int, default=24, help="images of the curves")
    parser.add_argument("--test", type=int, default=100, help="images of the table")
    return run("schedules", parser.parse_args(arguments), measure, report)


if __name__ == "__main__":
    raise SystemExit(main())
