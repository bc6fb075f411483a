"""Seconds of training to a quality: python benchmarks/quality.py

All start from the denoiser that comes with the package, with the same crops and the same loop. A
point is the best of whole schedules at three learning rates, all with the same budget of
applications of the network; its seconds are what that training took. A peer has its own solve and
its own one-step gradient, on our map, by the solver that was fastest in the section `step`. Quality
is the PSNR of x* on validation images, solved for all by the same function.

What is in quality_trainings.csv is not done again, so that a run that was stopped goes on.
"""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command import options, run
from contenders import BF16, CPU, PAPER, Problem, available, deepinvs, torchdeqs, training
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from report import COLOURS
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.models import Model
from jfbnb.data import load_splits
from jfbnb.teaching.figures import new_figure, save_data, save_figure, save_table
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import BatchLoss, LossSettings, draw_measurement
from jfbnb.training.methods import METHODS, Method
from jfbnb.training.recipes import Run, prepare, score, train_method, validation_problem
from jfbnb.training.restorers import RELEASED
from jfbnb.training.tuning import Tuning
from jfbnb.training.weights import load_denoiser

GOALS = (33.8, 34.0)  # dB
FACTORS = (0.5, 1.0, 2.0)  # of the profile's learning rate
TOLERANCE = 1e-3  # of our solves: a residual that is about the peers' distance of 1e-2
PLAIN, FASTER = "jfbnb, as profile cpu trains", "jfbnb, as profile best trains"
JFB = replace(METHODS["jfb"], head=False)  # the peers have none


# --- who takes part -----------------------------------------------------------------------------


@dataclass
class Shared(Problem):
    """What a peer is made of: the map that is trained, and not another of the same weights."""

    model: Model

    def map(self, name: str) -> torch.nn.Module:
        return self.model.T


def peers_loss(make, solver: str, iterations: int, model: Model, losses: LossSettings) -> BatchLoss:
    """|x* - x|^2 by a peer's solve and its one-step gradient; drawn as ours is."""
    T = model.T
    x = torch.empty(0)
    settings = {"tau": T.tau.item(), "sigma": T.D.sigma.item()}
    run = make("jfb", "our map", Shared(T.A, T.D.network, settings, x, x, {}, model), solver,
               iterations)

    def loss(x: Tensor, keys: tuple[int, ...], rows) -> tuple[Tensor, dict[str, Tensor]]:
        d = draw_measurement(T.A, x, losses.noise_std, keys, rows)
        errors = (run.image(d) - x).square().flatten(1).mean(1)
        return errors, {"mse": errors.detach()}

    return loss


@dataclass(frozen=True)
class Rival:
    """A way to train: the method, with its loss, and what its trainings have in common."""

    method: Method
    config: TrainingConfig
    losses: LossSettings


def rivals(solvers: dict[str, tuple[str, int]]) -> dict[str, Rival]:
    """Ours as profiles `cpu` and `best` train, and the peers, by their names.

    Args:
        solvers: of each peer, and after how many iterations its solve ends.
    """
    config, losses = training("cpu", TOLERANCE, BF16)
    faster, visited = training("best", TOLERANCE, BF16)
    same = {"batch_size": config.batch_size, "crop": config.crop}
    found = {PLAIN: Rival(JFB, config, losses),
             FASTER: Rival(JFB, replace(faster, **same), visited)}
    for library, make in (("torchdeq", torchdeqs), ("deepinv", deepinvs)):
        if library in solvers and available(library):
            method = replace(JFB, loss=partial(peers_loss, make, *solvers[library]))
            found[f"{library}, one-step gradient"] = Rival(method, config, losses)
    return found


def fastest(out: Path) -> dict[str, tuple[str, int]]:
    """Each peer's solver and its iterations, to a distance of 1e-2, as the section `step` has it.

    Raises UserError if it has not run.
    """
    try:
        rows = pd.read_csv(out / "step.csv")
    except OSError as error:
        raise UserError(f"no step.csv in {out}: run `make bench ARGS='--sections step'` "
                        "first") from error
    rows = rows[(rows["to distance"] == 1e-2) & (rows.reached == "yes")
                & rows.contender.str.endswith("jfb, our map")]
    rows = rows[rows.problem == rows.problem.iloc[0]]
    return {row.contender.split()[0]: (row.solver, int(row["stops at"].split()[0]))
            for _, row in rows.iterrows()}


# --- what is measured ---------------------------------------------------------------------------


def measure(bench: argparse.Namespace) -> None:
    """A row for each training, as soon as it is known."""
    torch.set_num_threads(bench.threads)
    splits = load_splits(bench.data, PAPER.image_size, 8000, 200, 2000)
    problem = validation_problem(PAPER, splits, bench.validation, 0, CPU)
    network = load_denoiser(RELEASED / "denoiser.safetensors").network
    settings = Tuning.load(RELEASED / "tuning.json").settings(JFB)
    file = bench.out / "quality_trainings.csv"
    rows = pd.read_csv(file).to_dict("records") if file.is_file() else []
    done = {(row["rival"], row["budget"]) for row in rows}
    start, _ = prepare(JFB, network, settings, problem.A, LossSettings(PAPER.noise_std))
    before = score(start, problem)["psnr"]
    for budget in bench.budgets:
        for name, rival in rivals(fastest(bench.out)).items():
            if (name, budget) in done:
                continue
            tries = []
            for rate in (factor * rival.config.learning_rate for factor in FACTORS):
                model, card = train_method(
                    rival.method, network, settings, problem,
                    replace(rival.config, epochs=0, budget=budget, learning_rate=rate),
                    rival.losses, Run(CPU, log=lambda line: None))
                history = pd.DataFrame(card["history"])
                tries.append({"rival": name, "budget": budget, "learning_rate": rate,
                              "seconds": history.seconds.sum(), "epochs": history.epoch.iloc[-1],
                              "images": len(problem.x), "before": before,
                              **score(model.on(problem.A), problem)})
            rows.append(max(tries, key=lambda tried: tried["psnr"]))
            save_data(pd.DataFrame(rows), file.with_suffix(""))
            print(name, budget, f"{rows[-1]['seconds']:.0f} s {rows[-1]['psnr']:.2f} dB",
                  flush=True)


# --- the report ---------------------------------------------------------------------------------


def seconds_to(goal: float, own: pd.DataFrame) -> float:
    """Of a rival's schedules, interpolated on a logarithmic axis.

    NaN where none came so far, or the shortest came farther: then it says no more than "at most".
    """
    own = own.sort_values("seconds")
    best = own.psnr.cummax().to_numpy()
    if not best[0] <= goal <= best[-1]:
        return np.nan
    return float(np.exp(np.interp(goal, best, np.log(own.seconds))))


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each rival; ratios are over ours as profile `best` trains."""
    groups = dict(list(rows.groupby("rival", sort=False)))
    found = pd.DataFrame({"training": list(groups), **{
        f"seconds to {goal:g} dB": [seconds_to(goal, own) for own in groups.values()]
        for goal in GOALS}})
    for goal in GOALS:
        seconds = found[f"seconds to {goal:g} dB"]
        ours = seconds[found.training == FASTER].squeeze()
        found[f"times ours, {goal:g} dB"] = seconds / ours
    return found


def curves(rows: pd.DataFrame) -> Figure:
    figure, (ax,) = new_figure(height=4.6)
    for name, own in rows.groupby("rival", sort=False):
        ax.semilogx(own.seconds, own.psnr, "o--" if name == PLAIN else "o-",
                    color=COLOURS[name.split(",")[0]], label=name)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    for goal in GOALS:
        ax.axhline(goal, color="#999999", linewidth=0.8, linestyle=":")
    ax.set(xlabel="seconds of training, each point a whole schedule",
           ylabel="PSNR on validation images (dB)", title="Quality against training time")
    ax.legend(fontsize=9)
    return figure


def report(out: Path) -> None:
    """The table and the figure, of quality_trainings.csv alone."""
    rows = pd.read_csv(out / "quality_trainings.csv")
    save_table(table(rows), out / "quality",
               f"Seconds of training from the same denoiser ({rows.before.mean():.2f} dB) to a "
               f"PSNR on {rows.images.max()} validation images, each at the best of three learning "
               "rates.")
    save_figure(curves(rows), out / "quality", f"CelebA, {rows.images.max()} validation images")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--budgets", nargs="+", type=float, help="applications of the network",
                        default=[4000, 10000, 20000, 40000, 80000])
    parser.add_argument("--validation", type=int, default=24, help="images")
    parser.add_argument("--threads", type=int, default=2)
    return run("quality", parser.parse_args(arguments), measure, report)


if __name__ == "__main__":
    raise SystemExit(main())
