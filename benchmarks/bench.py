"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

What is measured and how to read it: benchmarks/README.md. This file runs the sections one after
the other and writes each one's tables and figures as soon as it is done.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from contenders import CONTENDERS, GRADIENTS, Contender, Size, available, solve_problem
from measurements import (
    Record,
    calibrate,
    prepare_growth,
    prepare_limit,
    prepare_reconstruction,
    prepare_step,
    pretrain,
    train_method,
)

from jfbnb.common import ROOT, UserError, atomic_path, atomic_write
from jfbnb.figures import COLOURS, labelled_line, new_figure, save_figure, save_table
from jfbnb.methods import LABELS

PEERS = ("deepinv", "torchdeq")
BAR_COLOURS = {"jfbnb": COLOURS["jfb"], "torchdeq": COLOURS["gradient-descent"],
               "deepinv": COLOURS["total-variation"]}
RIVALS = ("jfb", "deq", "unrolled", "feedforward-tikhonov")  # in time to quality
GROWTH = {"K": [5, 10, 20, 40], "batch": [1, 2, 4, 8, 16], "side": [64, 128, 256, 512],
          "width": [16, 32, 64, 128]}
SPEED_TARGETS = (1e-2, 1e-3)  # distances to x*


# --- processes ----------------------------------------------------------------------------------


class Worker:
    """A process that prepares one thing, and then measures it as often as it is asked."""

    def __init__(self, prepare: Callable[..., Callable], *arguments: object):
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.pool.submit(_prepare, prepare, arguments).result()

    def measure(self) -> Record | list[Record]:
        return self.pool.submit(_measure).result()

    def close(self) -> None:
        self.pool.shutdown()


def _prepare(prepare: Callable[..., Callable], arguments: tuple) -> None:
    global prepared
    prepared = prepare(*arguments)


def _measure() -> Record | list[Record]:
    return prepared()


def alone(job: Callable, *arguments: object) -> object:
    """What a job returns that runs in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def in_turns(workers: dict[object, Worker], rounds: int) -> list[tuple[object, Record]]:
    """Measure each worker once per round, so that a slow minute of the machine hits all."""
    try:
        return [(key, worker.measure()) for _ in range(rounds) for key, worker in workers.items()]
    finally:
        for worker in workers.values():
            worker.close()


# --- what the sections share --------------------------------------------------------------------


@dataclass
class Bench:
    """The settings of a run, and what its sections hand on to one another."""

    problems: list[Size]
    reconstructions: list[Size]
    limits: list[Size]
    contenders: list[Contender]
    growth: dict[str, list[int]]
    rounds: int
    data: str
    seconds: float
    out: Path
    scratch: Path
    calibrated: dict[tuple, list[Record]] = field(default_factory=dict)

    def solved(self, size: Size) -> Path:
        """The file with the problem's images and equilibrium. The network's size is no matter."""
        file = self.scratch / f"{size.batch}x{size.side}.safetensors"
        if not file.exists():
            alone(solve_problem, file, size.batch, size.side)
        return file

    def settings(self, size: Size, contender: Contender) -> list[Record]:
        """Solver and iterations for each target, for all contenders that solve alike."""
        key = (size.batch, size.side, contender.library, contender.map, contender.solvers)
        if key not in self.calibrated:
            print(f"  how far must {contender.name} iterate?", flush=True)
            self.calibrated[key] = alone(calibrate, self.solved(size), contender, SPEED_TARGETS)
        return self.calibrated[key]


def compare(bench: Bench, size: Size, contenders: list[Contender], target: float,
            prepare: Callable) -> list[Record]:
    """The contenders side by side, to one distance: one record for each."""
    found = {c: next(s for s in bench.settings(size, c) if s["target"] == target)
             for c in contenders}
    workers = {c: Worker(prepare, bench.solved(size), size, c, s["solver"], s["iterations"])
               for c, s in found.items() if s["reached"]}
    runs: dict[Contender, list[Record]] = {c: [] for c in contenders}
    for contender, record in in_turns(workers, bench.rounds):
        runs[contender].append(record)
    return [_row(size, contender, found[contender], runs[contender]) for contender in contenders]


def _row(size: Size, contender: Contender, setting: Record, runs: list[Record]) -> Record:
    """The median and the spread of a contender's runs, or how far it came."""
    row = {"problem": f"{size.batch}x{size.side}-{size.depth}x{size.width}",
           "library": contender.library, "gradient": contender.gradient, "map": contender.map,
           "to distance": f"{setting['target']:.0e}",
           "reached": "yes" if setting["reached"] else "no",
           "solver": setting["solver"], "iterations": setting["iterations"],
           "came to": f"{setting['distance']:.1e}", "runs": len(runs)}
    seconds = [run["seconds"] for run in runs]
    if not runs:  # what it spent without getting there is the least that it would have taken
        nothing = dict.fromkeys(("least seconds", "most seconds", "evaluations", "process MB"))
        return {**row, "seconds": setting["seconds"], **nothing}
    return {**row, "came to": f"{runs[0]['distance']:.1e}", "seconds": np.median(seconds),
            "least seconds": min(seconds), "most seconds": max(seconds),
            "evaluations": runs[0]["evaluations"],
            "process MB": max(run["process MB"] for run in runs)}


# --- the sections -------------------------------------------------------------------------------


def training_steps(bench: Bench) -> None:
    rows: list[Record] = []
    for size in bench.problems:
        for target in SPEED_TARGETS:
            print(f"  {size}, to a distance of {target:.0e}", flush=True)
            rows += compare(bench, size, bench.contenders, target, prepare_step)
            table = with_ratio(pd.DataFrame(rows))
            save_table(table, bench.out / "step", f"One training step; {bench.rounds} runs each.")
            save_figure(bars(table, "seconds per training step"), bench.out / "step")


def reconstructions(bench: Bench) -> None:
    rows = []
    contenders = [c for c in bench.contenders if c.gradient == "jfb"]
    for size in bench.reconstructions:
        rows += compare(bench, size, contenders, min(SPEED_TARGETS), prepare_reconstruction)
    table = with_ratio(pd.DataFrame(rows).drop(columns="gradient"))
    images = table.problem.str.split("x").str[0].astype(int)
    table.insert(len(table.columns), "images per second", images / table.seconds)
    save_table(table, bench.out / "reconstruction",
               f"Reconstruction without a gradient; {bench.rounds} runs each.")
    save_figure(bars(table, "seconds per batch"), bench.out / "reconstruction")


def with_ratio(table: pd.DataFrame) -> pd.DataFrame:
    """Adds the seconds over those of our JFB on the same problem, to the same distance."""
    keys = ["problem", "to distance"]
    ours = table[(table.library == "jfbnb")]
    if "gradient" in table:
        ours = ours[ours.gradient == "jfb"]
    ours = ours.set_index(keys).seconds
    place = table.columns.get_loc("seconds") + 1
    table.insert(place, "times ours", [s / ours[p, t] for s, p, t in
                                       zip(table.seconds, table.problem, table["to distance"],
                                           strict=True)])
    return table


def growth(bench: Bench) -> None:
    workers = {name: Worker(prepare_growth, name, values)
               for name, values in bench.growth.items()}
    runs = pd.DataFrame([record for _, records in in_turns(workers, bench.rounds)
                         for record in records])
    keys = ["series", "value", "gradient"]
    table = runs.groupby(keys, sort=False)[["seconds", "MB"]].median().reset_index()
    save_table(table, bench.out / "growth",
               f"One training step as one thing grows; medians of {bench.rounds} runs.")
    fits = pd.DataFrame([
        {"series": series, "gradient": gradient, "exponent of time": exponent(own, "seconds"),
         "exponent of memory": exponent(own, "MB"), "largest / smallest MB": own.MB.max()
         / own.MB.min()}
        for (series, gradient), own in table.groupby(["series", "gradient"], sort=False)])
    save_table(fits, bench.out / "growth_exponents",
               "y grows like x to the power of the exponent; least squares on logarithms.")
    save_figure(growth_curves(table, fits), bench.out / "growth")


def exponent(table: pd.DataFrame, column: str) -> float:
    """The p of y = c x^p, by least squares on logarithms."""
    return np.polyfit(np.log(table.value), np.log(table[column]), 1)[0]


def limit(bench: Bench) -> None:
    workers = {(size, bf16): Worker(prepare_limit, size, bf16)
               for size in bench.limits for bf16 in (False, True)}
    runs = pd.DataFrame([{"images": f"{size.batch} x {size.side}²",
                          "network": f"{size.depth} x {size.width}",
                          "type": "bfloat16" if bf16 else "float32", **record}
                         for (size, bf16), record in in_turns(workers, bench.rounds)])
    table = runs.groupby(["images", "network", "type"], sort=False).median().reset_index()
    save_table(table, bench.out / "limit",
               f"Convolutions against the best matrix product; medians of {bench.rounds} runs.")
    save_figure(time_parts(table), bench.out / "limit")


def quality(bench: Bench) -> None:
    denoiser = bench.scratch / "denoiser.safetensors"
    spent = alone(pretrain, bench.data, bench.seconds, denoiser)
    curves = []
    for method in RIVALS:
        print(f"  {method}", flush=True)
        try:
            curves += alone(train_method, method, bench.data, bench.seconds, denoiser)
        except UserError as error:
            print(f"{method}: {error}")
            continue
        table = pd.DataFrame(curves)
        table.insert(1, "seconds from scratch", spent + table.pop("seconds"))
        save_table(table, bench.out / "quality", f"Validation PSNR; {spent:.0f} s of pretraining "
                   f"included. Images: {_source(bench.data)}.")
        goal = published_deq()
        save_table(pd.DataFrame([
            {"method": name, "pretraining, seconds": spent,
             f"seconds to {goal} dB": first_at(own, goal), "best PSNR (dB)": own.psnr.max(),
             "at the end (dB)": own.psnr.iloc[-1],
             "seconds in all": own["seconds from scratch"].max()}
            for name, own in table.groupby("method", sort=False)]), bench.out / "time_to_quality",
            f"From scratch. Images: {_source(bench.data)}.")
        save_figure(quality_curves(table, goal), bench.out / "quality", _source(bench.data))


def first_at(curve: pd.DataFrame, goal: float) -> float | None:
    """Seconds from scratch at which the curve is first seen at the goal."""
    there = curve[curve.psnr >= goal]
    return None if there.empty else there["seconds from scratch"].iloc[0]


def published_deq() -> float:
    table = pd.read_csv(ROOT / "data" / "published_table2.csv", comment="#", index_col="method")
    return table.psnr["deq"]


def _source(data: str) -> str:
    return "photographs from scikit-image" if data == "bundled" else Path(data).name


SECTIONS = {"step": training_steps, "reconstruction": reconstructions, "limit": limit,
            "growth": growth, "quality": quality}


# --- figures ------------------------------------------------------------------------------------


def bars(table: pd.DataFrame, label: str):
    """One panel for each problem and distance; pale where a contender did not get there."""
    panels = list(table.groupby(["problem", "to distance"], sort=False))
    most = max(len(part) for _, part in panels)
    figure, axes = new_figure(columns=2, rows=-(-len(panels) // 2), width=12,
                              height=(1.2 + 0.3 * most) * -(-len(panels) // 2))
    for ax in axes[len(panels):]:
        ax.remove()
    for ax, ((problem, distance), part) in zip(axes, panels, strict=False):
        part = part.sort_values("seconds")
        names = [Contender(r.library, getattr(r, "gradient", "jfb"), r.map).name
                 for r in part.itertuples()]
        drawn = ax.barh(names, part.seconds, color=[BAR_COLOURS[n] for n in part.library])
        for bar, reached, ratio in zip(drawn, part.reached, part["times ours"], strict=True):
            bar.set_alpha(1 if reached == "yes" else 0.3)
            text = f"{ratio:.1f}" if reached == "yes" else f"not there at {ratio:.1f}"
            ax.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, f" {text}", va="center",
                    fontsize=9)
        ax.set(xlabel=label, title=f"{problem}, to a distance of {distance}")
        ax.margins(x=0.25)
        ax.invert_yaxis()
        ax.grid(False, axis="y")
    return figure


def growth_curves(table: pd.DataFrame, fits: pd.DataFrame):
    """Time above, memory below; the fitted exponents in the legends."""
    names = list(dict.fromkeys(table.series))
    figure, axes = new_figure(columns=len(names), rows=2, width=3.2 * len(names), height=6.4)
    labels = {"K": "iterations $K$", "batch": "images in a batch", "side": "side in pixels",
              "width": "channels"}
    powers = fits.set_index(["series", "gradient"])
    colours = {"jfb": COLOURS["jfb"], "implicit": COLOURS["deq"], "unrolled": COLOURS["unrolled"]}
    for column, series in enumerate(names):
        for row, (quantity, fitted) in enumerate((("seconds", "exponent of time"),
                                                  ("MB", "exponent of memory"))):
            ax = axes[row * len(names) + column]
            for gradient, own in table[table.series == series].groupby("gradient", sort=False):
                power = powers.loc[(series, gradient), fitted]
                ax.loglog(own.value, own[quantity], "o-", color=colours[gradient],
                          label=f"{gradient}: power {power:.2f}")
            ax.set(xlabel=labels[series], ylabel=quantity if column == 0 else "")
            ax.set_xticks(own.value, own.value)
            ax.minorticks_off()
            ax.legend(fontsize=9)
    return figure


def time_parts(table: pd.DataFrame):
    """Where the time of one evaluation within a solve goes."""
    figure, (ax,) = new_figure(width=9, height=1.2 + 0.5 * len(table))
    names = table.images + ", " + table.network + ", " + table.type
    left = np.zeros(len(table))
    for part, method in (("network", "jfb"), ("data step", "gradient-descent"),
                         ("solver", "measurement")):
        share = 100 * table[f"ms {part}"].clip(lower=0) / table["ms per evaluation"]
        ax.barh(names, share, left=left, color=COLOURS[method], label=part)
        left = left + share.to_numpy()
    ax.set(xlabel="% of the time of an evaluation of $T$")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    return figure


def quality_curves(table: pd.DataFrame, goal: float):
    figure, (ax,) = new_figure()
    for name, own in table.groupby("method", sort=False):
        labelled_line(ax, own["seconds from scratch"], own.psnr, name, marker="o")
    ax.axhline(goal, color=COLOURS["measurement"], linestyle="--")
    ax.text(table["seconds from scratch"].max(), goal, f"{LABELS['deq']}, published: {goal} dB",
            ha="right", va="bottom", fontsize=9)
    ax.set(xlabel="seconds of training, pretraining included", ylabel="validation PSNR (dB)",
           xlim=(0, None))
    ax.legend(loc="lower right")
    return figure


# --- what was promised --------------------------------------------------------------------------


def verdicts(out: Path) -> pd.DataFrame:
    """Each target beside what the tables in `out` say, for those sections that have run."""
    rows = []

    def judge(target: str, measured: float | None, met: bool) -> None:
        rows.append({"target": target, "measured": measured, "met": "yes" if met else "no"})

    if (step := _read(out / "step.csv")) is not None:
        jfb = step[(step.gradient == "jfb") & (step.library != "jfbnb")]
        for name, least in (("Eq. 4", 5.0), ("our map", 1.5)):
            for distance, own in jfb[jfb["map"] == name].groupby("to distance", sort=False):
                ratio = own["times ours"].min()
                judge(f"a peer's JFB step with {name}, over ours, to {distance}: at least {least}",
                      ratio, ratio >= least)
        ours = step[(step.library == "jfbnb") & (step.gradient == "implicit")
                    & (step["to distance"] == "1e-03")]
        if len(ours):
            ratio = ours["times ours"].min()
            judge("our implicit step over our JFB step, to 1e-03: at least 3", ratio, ratio >= 3)
    if (fits := _read(out / "growth_exponents.csv")) is not None:
        flat = fits[(fits.series == "K") & (fits.gradient == "jfb")]
        ratio = flat["largest / smallest MB"].item()
        judge("JFB's memory, largest over smallest K: at most 1.05", ratio, ratio <= 1.05)
    if (limits := _read(out / "limit.csv")) is not None:
        share = limits[limits.type == "float32"]["solve's share"].min()
        judge("the solve's share of the matrix product's rate: at least 0.6", share, share >= 0.6)
    if (image := _read(out / "reconstruction.csv")) is not None:
        single = image[(image.library == "jfbnb") & image.problem.str.startswith("1x128-")]
        if len(single):
            seconds = single.seconds.max()
            judge("seconds for one image of 128 x 128: under 0.15", seconds, seconds < 0.15)
    if (trained := _read(out / "time_to_quality.csv")) is not None:
        column = next(c for c in trained if c.startswith("seconds to"))
        seconds = trained.set_index("method")[column].get("jfb")
        judge(f"JFB's {column}, from scratch: under 300", seconds, seconds < 300)
    return pd.DataFrame(rows, columns=["target", "measured", "met"])


def _read(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path) if path.exists() else None


# --- the command --------------------------------------------------------------------------------


def machine() -> dict:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"system": f"{platform.system()} {platform.machine()}",
            "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", *PEERS) if available(name)}}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def size(name: str) -> Size:
        try:
            return Size.parse(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--problems", nargs="+", type=size, metavar="BATCHxSIDE-DEPTHxWIDTH",
                        default=[Size(16, 64, 8, 32), Size(4, 128, 8, 32)],
                        help="for the training step; 17x64 is the paper's network, ten times "
                             "as dear")
    parser.add_argument("--gradients", nargs="+", default=list(GRADIENTS), choices=GRADIENTS,
                        help="contenders of the training step; jfb is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", default="bundled",
                        help="CelebA's folder, tar or zip for the time to quality; else the "
                             "photographs inside scikit-image")
    parser.add_argument("--seconds", type=float, default=60,
                        help="of pretraining, and of each method's training after it")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true",
                        help="only that everything runs: tiny problems, one round")
    return parser.parse_args(arguments)


def make_bench(args: argparse.Namespace, scratch: Path) -> Bench:
    contenders = [c for c in CONTENDERS if c.gradient in ("jfb", *args.gradients)]
    for peer in PEERS:
        if not available(peer):
            print(f"{peer} is not installed and left out: .venv/bin/python -m pip install "
                  "-e '.[bench]'")
            contenders = [c for c in contenders if c.library != peer]
    bench = Bench(args.problems, [Size(1, 128, 8, 32), Size(16, 128, 8, 32)],
                  [Size(1, 128, 8, 32), Size(4, 128, 17, 64)], contenders, GROWTH, args.rounds,
                  args.data, args.seconds, args.out, scratch)
    if args.quick:
        tiny = [Size(2, 16, 8, 32)]
        bench.problems = bench.reconstructions = bench.limits = tiny
        bench.contenders = [c for c in contenders if c.gradient == "jfb"]
        bench.growth = {"K": [2, 4], "width": [8, 16]}
        bench.rounds, bench.seconds = 1, 0.5
    return bench


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "machine.json", json.dumps(machine(), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(args, Path(scratch))
        for section in args.sections:
            print(section, flush=True)
            SECTIONS[section](bench)
            table = verdicts(args.out)
            save_table(table, args.out / "targets", "What was promised, and what was measured.")
    print(table.to_string(index=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
