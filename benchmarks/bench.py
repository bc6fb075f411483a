"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

What is measured and how to read it: benchmarks/README.md. The sections run one after the other,
and each one's tables and figures are written as soon as it is done.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from contenders import (
    CONTENDERS,
    GRADIENTS,
    PARTS,
    SAME_ITERATES,
    Contender,
    Size,
    available,
    solve_problem,
)
from measurements import (
    calibrate,
    prepare_growth,
    prepare_limit,
    prepare_reconstruction,
    prepare_step,
)
from processes import Worker, alone, in_turns
from quality import pretrain, train_method
from report import bars, exponent, growth_curves, quality_curves, time_parts, verdicts, with_ratio

from jfbnb.common import ROOT, UserError, atomic_write
from jfbnb.figures import save_figure, save_table

PEERS = ("deepinv", "torchdeq")
RELEASED_SIZE = (8, 32)  # of the network that calibration uses
RIVALS = ("jfb", "deq", "unrolled", "feedforward-tikhonov")  # in time to quality


@dataclass
class Bench:
    """What a run measures, and what its sections share. The defaults are the full benchmark.

    Args:
        problems, reconstructions, limits: of the sections step, reconstruction and limit.
        targets: distances to x*.
        growth: the values of each series.
        seconds: of pretraining, and of each method's training after it.
        epochs, watched: how often the PSNR is taken, and on how many images.
        calibrated: what `settings` has found.
    """

    contenders: list[Contender]
    problems: list[Size]
    rounds: int
    data: str
    seconds: float
    out: Path
    scratch: Path
    reconstructions: tuple[Size, ...] = (Size(1, 128, 8, 32), Size(16, 64, 8, 32))
    limits: tuple[Size, ...] = (Size(1, 128, 8, 32), Size(4, 128, 17, 64))
    targets: tuple[float, ...] = (1e-2, 1e-3)
    growth: dict[str, tuple[int, ...]] = field(default_factory=lambda: {
        "K": (5, 10, 20, 40), "batch": (1, 2, 4, 8, 16), "side": (64, 128, 256, 512),
        "width": (16, 32, 64, 128)})
    epochs: int = 8
    watched: int = 16
    calibrated: dict[tuple, list[dict]] = field(default_factory=dict)

    def solved(self, size: Size) -> Path:
        """The file with the problem's images and equilibrium; the network's size is no matter."""
        file = self.scratch / f"{size.batch}x{size.side}.safetensors"
        if not file.exists():
            alone(solve_problem, file, size.batch, size.side)
        return file

    def settings(self, size: Size, contender: Contender) -> list[dict]:
        """`calibrate`, once for all contenders that solve alike, with the small network."""
        if contender.change in SAME_ITERATES:
            contender = replace(contender, change="")
        key = (size.batch, size.side, contender.library, contender.map, contender.solvers,
               contender.change)
        if key not in self.calibrated:
            print(f"  how far must {contender.name} iterate?", flush=True)
            self.calibrated[key] = alone(calibrate, self.solved(size), contender, self.targets)
        return self.calibrated[key]


# --- the sections -------------------------------------------------------------------------------


def step(bench: Bench) -> None:
    """One training step."""
    rows: list[dict] = []
    for size in bench.problems:
        for target in bench.targets:
            rows += compare(bench, size, bench.contenders, target, prepare_step)
            table = with_ratio(pd.DataFrame(rows))
            save_table(table, bench.out / "step", f"One training step; {bench.rounds} runs each.")
            save_figure(bars(table, "seconds per training step"), bench.out / "step")


def parts(bench: Bench) -> None:
    """One training step of ours with one thing changed."""
    rows = compare(bench, bench.problems[0], PARTS, min(bench.targets), prepare_step)
    table = with_ratio(pd.DataFrame(rows))
    save_table(table, bench.out / "parts", "One training step of ours, and with one thing "
               f"changed; {bench.rounds} runs each.")
    save_figure(bars(table, "seconds per training step"), bench.out / "parts")


def reconstruction(bench: Bench) -> None:
    """The image, without a gradient."""
    rows = []
    for size in bench.reconstructions:
        rows += compare(bench, size, [c for c in bench.contenders if c.gradient == "jfb"],
                        min(bench.targets), prepare_reconstruction)
    table = with_ratio(pd.DataFrame(rows))
    images = table.problem.str.split("x").str[0].astype(int)
    table["images per second"] = images / table.seconds
    save_table(table, bench.out / "reconstruction",
               f"Reconstruction, nothing tracked; {bench.rounds} runs each.")
    save_figure(bars(table, "seconds per batch"), bench.out / "reconstruction")


def compare(bench: Bench, size: Size, contenders: list[Contender], target: float,
            prepare: Callable) -> list[dict]:
    """The contenders side by side, to one distance: one record for each."""
    found = {c: next(s for s in bench.settings(size, c) if s["target"] == target)
             for c in contenders}
    print(f"  {size}, to a distance of {target:.0e}", flush=True)
    workers = {}
    for c, s in found.items():
        if s["reached"]:
            try:
                workers[c] = Worker(prepare, bench.solved(size), size, c, s["solver"],
                                    s["effort"])
            except RuntimeError as error:  # a peer's solver, in the backward pass
                print(f"  {c.name} failed: {error}")
                found[c] = {**s, "reached": False, "distance": np.nan, "seconds": np.nan}
    runs: dict[Contender, list[dict]] = {c: [] for c in contenders}
    for c, record in in_turns(workers, bench.rounds):
        runs[c].append(record)
    return [_row(size, c, found[c], runs[c]) for c in contenders]


def _row(size: Size, contender: Contender, setting: dict, runs: list[dict]) -> dict:
    """The median and the spread of a contender's runs, or how far it came."""
    stop = (f"residual {setting['effort']:.1e}" if contender.by_residual
            else f"{setting.get('effort', setting.get('iterations'))} iterations")
    row = {"problem": str(size), "to distance": f"{setting['target']:.0e}",
           "contender": contender.name, "solver": setting["solver"]}
    if not runs:  # what it spent without arriving is the least that it would have taken
        known = (size.depth, size.width) == RELEASED_SIZE
        return {**row, "stops at": f"given up at {stop}", "reached": "no",
                "came to": f"{setting['distance']:.1e}",
                "seconds": setting["seconds"] if known else np.nan}
    seconds = [run["seconds"] for run in runs]
    return {**row, "stops at": stop, "reached": "yes", "came to": f"{runs[0]['distance']:.1e}",
            "seconds": np.median(seconds), "least seconds": min(seconds),
            "most seconds": max(seconds), "evaluations": runs[0]["evaluations"],
            "process MB": max(run["process MB"] for run in runs)}


def limit(bench: Bench) -> None:
    """Distance to what the machine can do."""
    workers = {(size, bf16): Worker(prepare_limit, size, bf16)
               for size in bench.limits for bf16 in (False, True)}
    runs = pd.DataFrame([{"problem": str(size), "type": "bfloat16" if bf16 else "float32",
                          **record} for (size, bf16), record in in_turns(workers, bench.rounds)])
    table = runs.groupby(["problem", "type"], sort=False).median().reset_index()
    save_table(table, bench.out / "limit", "The convolutions against the best matrix product; "
               f"medians of {bench.rounds} runs.")
    save_figure(time_parts(table), bench.out / "limit")


def growth(bench: Bench) -> None:
    """Seconds and memory of a step as one thing grows."""
    workers = {name: Worker(prepare_growth, name, values)
               for name, values in bench.growth.items()}
    runs = pd.DataFrame([record for _, records in in_turns(workers, bench.rounds)
                         for record in records])
    table = (runs.groupby(["series", "value", "gradient"], sort=False)[["seconds", "MB"]]
             .median().reset_index())
    save_table(table, bench.out / "growth",
               f"One training step as one thing grows; medians of {bench.rounds} runs.")
    fits = pd.DataFrame([
        {"series": series, "gradient": gradient,
         "exponent of time": exponent(own.value, own.seconds),
         "exponent of memory": exponent(own.value, own.MB), "most over least MB":
         own.MB.max() / own.MB.min()}
        for (series, gradient), own in table.groupby(["series", "gradient"], sort=False)])
    save_table(fits, bench.out / "growth_exponents",
               "y grows like x to the power of the exponent; least squares on logarithms.")
    save_figure(growth_curves(table, fits), bench.out / "growth")


def quality(bench: Bench) -> None:
    """Validation PSNR against the seconds since a random network."""
    denoiser = bench.scratch / "denoiser.safetensors"
    spent, source = alone(pretrain, bench.data, bench.seconds, bench.watched, denoiser)
    curves: list[dict] = []
    for method in RIVALS:
        print(f"  {method}", flush=True)
        curves += alone(train_method, method, bench.data, bench.seconds, bench.epochs,
                        bench.watched, denoiser)
        table = pd.DataFrame(curves)
        table["time (s)"] = spent + table.pop("seconds")
        save_table(table, bench.out / "quality",
                   f"Of validation images, {source}; {spent:.0f} s of pretraining included.")
        goal = published_deq()
        save_table(pd.DataFrame([
            {"method": name, "images": source, "pretraining (s)": spent,
             f"to {goal} dB (s)": first_at(own, goal),
             "best PSNR (dB)": own.psnr.max(), "last PSNR (dB)": own.psnr.iloc[-1],
             "in all (s)": own["time (s)"].max()}
            for name, own in table.groupby("method", sort=False)]),
            bench.out / "time_to_quality",
            "Seconds of training from scratch, and the validation PSNR that they gave.")
        save_figure(quality_curves(table, goal), bench.out / "quality", source)


def first_at(curve: pd.DataFrame, goal: float) -> float:
    """Seconds from scratch at which a PSNR is first seen that is at the goal; NaN if never."""
    return curve["time (s)"][curve.psnr >= goal].min()


def published_deq() -> float:
    """Table 2's PSNR of the deep equilibrium model."""
    table = pd.read_csv(ROOT / "data" / "published_table2.csv", comment="#", index_col="method")
    return float(table.psnr["deq"])


SECTIONS = {section.__name__: section for section in
            (step, parts, reconstruction, limit, growth, quality)}


# --- the command --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "machine.json", json.dumps(machine(), indent=2) + "\n")
    with tempfile.TemporaryDirectory() as scratch:
        bench = make_bench(args, Path(scratch))
        for name in args.sections:
            print(name, flush=True)
            try:
                SECTIONS[name](bench)
            except UserError as error:
                print(f"{name} is left out: {error}")
            table = verdicts(args.out)
            table.measured = table.measured.map("{:.3g}".format)
            save_table(table, args.out / "targets", "What was promised, and what was measured.")
    print(table.to_string(index=False))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def size(name: str) -> Size:
        try:
            return Size.parse(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--problems", nargs="+", type=size, metavar="BATCHxSIDE-DEPTHxWIDTH",
                        default=[Size(16, 64, 8, 32), Size(4, 128, 8, 32)],
                        help="of the section step; the paper's network is 17x64")
    parser.add_argument("--gradients", nargs="+", default=list(GRADIENTS), choices=GRADIENTS,
                        help="in the section step; jfb is always there")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--data", default="bundled",
                        help="of the section quality: CelebA's folder, tar or zip; without it the "
                             "photographs inside scikit-image")
    parser.add_argument("--seconds", type=float, default=60,
                        help="of pretraining, and of each method's training after it")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true",
                        help="tiny problems, one round, into build/bench: to see that all of it "
                             "runs")
    args = parser.parse_args(arguments)
    args.out = args.out or ROOT / ("build/bench" if args.quick else "benchmarks/results")
    return args


def make_bench(args: argparse.Namespace, scratch: Path) -> Bench:
    missing = [peer for peer in PEERS if not available(peer)]
    for peer in missing:
        print(f"{peer} is not installed and left out; to have it: "
              ".venv/bin/python -m pip install -e '.[bench]'")
    contenders = [c for c in CONTENDERS
                  if c.library not in missing and c.gradient in ("jfb", *args.gradients)]
    bench = Bench(contenders, args.problems, args.rounds, args.data, args.seconds, args.out,
                  scratch)
    if args.quick:
        bench.problems = bench.reconstructions = bench.limits = [Size(2, 32, *RELEASED_SIZE)]
        bench.contenders = [c for c in contenders if c.gradient == "jfb"]
        bench.targets, bench.rounds = (1e-2,), 1
        bench.growth = {"K": (2, 4), "width": (8, 16)}
        bench.seconds, bench.epochs, bench.watched = 0.5, 1, 1
    return bench


def machine() -> dict:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"system": f"{platform.system()} {platform.machine()}",
            "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", *PEERS) if available(name)}}
