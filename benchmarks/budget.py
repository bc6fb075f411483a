"""Quality against the computation of training: python benchmarks/budget.py FOLDER ...

Each folder has networks that `jfbnb train` stored; their cards say with which budget and seed. With
tuning.json there, methods without training come along, with a budget of 0. All restore the same
test images. budget.csv has a row for each method; a stopped run continues.
"""

from pathlib import Path

import pandas as pd
import torch
from command import Bench, Rows, options, run

from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.run.train import TRAINED
from jfbnb.teaching.figures import labelled_line, new_figure, save_figure, save_table
from jfbnb.training.evaluation import evaluate
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods
from jfbnb.training.weights import read_card

CPU = torch.device("cpu")
UNTRAINED = ("total-variation", "plug-and-play-admm", "annealed")  # at most a denoiser is trained
NO_CARD = {"protocol": "paper", "training": {"budget": 0, "learning_rate": 0, "seed": 0}}


def measure_networks(bench: Bench) -> None:
    """Add the networks to budget.csv that it does not have yet."""
    test = load_splits(bench.data).test[:bench.images]
    rows, x = Rows(bench.out / "budget.csv"), test.as_float()
    for folder in bench.folders:
        names = [name for name in TRAINED if (folder / f"{name}.safetensors").is_file()]
        names += UNTRAINED * (folder / "tuning.json").is_file()
        for name in names:
            card = NO_CARD if name in UNTRAINED else read_card(folder / f"{name}.json")
            setup, done = get_protocol(card["protocol"]), card["training"]
            key = {"protocol": setup.name, "method": name, "budget": done["budget"],
                   "learning_rate": done["learning_rate"], "seed": done["seed"], "images": len(x)}
            if len(rows.where(**key)):
                continue
            A = setup.operator()
            d = measure(A, x, setup.noise_std, 0, test.indices)
            restorers = make_methods([name], folder, CPU)
            found = evaluate(restorers, A, x, d, setup.noise_std, test.names)
            mean = found.psnr.mean()
            rows.add({**key, "psnr": round(mean.item(), 4), "converged": found.converged.mean()})
            print(f"{name}, {done['budget']:g} applications: {mean:.3f} dB", flush=True)


def report(out: Path) -> None:
    """A table of budget.csv alone: means over seeds, where there are several."""
    rows = pd.read_csv(out / "budget.csv")
    groups = rows.groupby(["protocol", "budget", "method"])
    table = pd.DataFrame({
        "networks": groups.size(), "images": groups.images.min(), "PSNR (dB)": groups.psnr.mean(),
        "± over trainings": groups.psnr.sem(), "converged": groups.converged.min()}).reset_index()
    figure, (ax,) = new_figure(width=6.5, height=4.5)
    best = table[table.protocol == "paper"].sort_values("PSNR (dB)", ascending=False)
    for name in dict.fromkeys(best.method):
        line = best[best.method == name].sort_values("budget")
        if line.budget.max() > 0:
            labelled_line(ax, line.budget, line["PSNR (dB)"], name, "o")
            ax.errorbar(line.budget, line["PSNR (dB)"], line["± over trainings"], fmt="none",
                        color=METHODS[name].colour, capsize=3)
        else:
            ax.axhline(line["PSNR (dB)"].item(), color=METHODS[name].colour, linestyle="--",
                       label=METHODS[name].label)
    ax.set(xscale="log", xlabel="applications of the network in training",
           ylabel="PSNR (dB)", title="Quality and the computation of training")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, out / "budget", "CelebA")
    table["budget"] = [f"{budget:,.0f}" for budget in table.budget]
    table["method"] = [METHODS[name].label for name in table.method]
    save_table(table, out / "budget_table",
               "The same test images restored by networks that were trained with one computation "
               "and with another. Budget: applications of the network to a training crop. ± over "
               "trainings is a standard error, where there are several. Converged: the smallest "
               "share of these.")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, images=100)
    parser.add_argument("folders", nargs="*", type=Path, help="folders with METHOD.safetensors")
    return run(parser.parse_args(arguments), {"budget": measure_networks}, report)


if __name__ == "__main__":
    raise SystemExit(main())
