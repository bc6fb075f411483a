"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

What is measured and how to read it: benchmarks/README.md. The sections run one after the other,
and each one's tables and figures are written as soon as it is done.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from command import record
from contenders import MAPS, RECONSTRUCTIONS, ROOT, STEPS, Contender, Size, available, solve_problem
from measurements import calibrate, prepare
from processes import Worker, alone, in_turns
from report import bars, verdicts, with_ratio

from jfbnb.common import UserError
from jfbnb.teaching.figures import save_figure, save_table

PEERS = ("deepinv", "torchdeq")
GRADIENTS = tuple(dict.fromkeys(contender.gradient for contender in STEPS))
Bench = argparse.Namespace  # what a run measures: `parse` has it


def problem(bench: Bench, size: Size) -> Path:
    """The file with the problem's images and equilibrium."""
    file = bench.scratch / f"{size}.safetensors"
    if not file.exists():
        alone(solve_problem, file, size)
    return file


def setting(bench: Bench, size: Size, contender: Contender, target: float) -> dict:
    """`calibrate`, once for all contenders that solve alike."""
    key = size, contender.iterates, target
    if key not in bench.calibrated:
        print(f"  how far must {contender.name} iterate?", flush=True)
        bench.calibrated[key] = alone(calibrate, problem(bench, size), contender, target)
    return bench.calibrated[key]


# --- the sections -------------------------------------------------------------------------------


def step(bench: Bench) -> None:
    """One training step."""
    rows: list[dict] = []
    for size in bench.problems:
        for target in bench.targets:
            rows += compare(bench, size, bench.steps, target, training=True)
            table = with_ratio(pd.DataFrame(rows))
            save_table(table, bench.out / "step", f"One training step; {bench.rounds} runs each.")
            save_figure(bars(table, "seconds per training step"), bench.out / "step")


def reconstruction(bench: Bench) -> None:
    """The image, without a gradient."""
    rows: list[dict] = []
    for size in bench.images:
        rows += compare(bench, size, bench.reconstructions, min(bench.targets), training=False)
        table = with_ratio(pd.DataFrame(rows))
        images = table.problem.str.split("x").str[0].astype(int)
        table["images per second"] = images / table.seconds
        save_table(table, bench.out / "reconstruction",
                   f"Reconstruction, nothing tracked; {bench.rounds} runs each.")
        save_figure(bars(table, "seconds per batch"), bench.out / "reconstruction")


def compare(bench: Bench, size: Size, contenders: list[Contender], target: float,
            training: bool) -> list[dict]:
    """The contenders side by side, to one distance: one record for each."""
    found = {c: setting(bench, size, c, target) for c in contenders}
    print(f"  {size}, to a distance of {target:.0e}", flush=True)
    workers = {}
    for c, s in found.items():
        if s["reached"]:
            try:
                workers[c] = Worker(prepare, problem(bench, size), c, s["solver"], s["effort"],
                                    training)
            except RuntimeError as error:  # a peer's solver, in the backward pass
                print(f"  {c.name} failed: {error}")
                found[c] = {**s, "distance": np.nan, "seconds": np.nan}
    runs = in_turns(workers, bench.rounds)
    return [_row(size, c, found[c], pd.DataFrame([record for who, record in runs if who == c]))
            for c in contenders]


def _row(size: Size, contender: Contender, setting: dict, runs: pd.DataFrame) -> dict:
    """The median and the spread of a contender's runs, or how far it came."""
    stop = (f"residual {setting['effort']:.1e}" if contender.by_residual
            else f"{setting['effort']} iterations")
    row = {"problem": str(size), "to distance": f"{setting['target']:.0e}",
           "contender": contender.name, "solver": setting["solver"]}
    if runs.empty:  # what it spent without arriving is the least that it would have taken
        return {**row, "stops at": f"given up at {stop}", "reached": "no",
                "came to": f"{setting['distance']:.1e}", "seconds": setting["seconds"]}
    return {**row, "stops at": stop, "reached": "yes", "came to": f"{runs.distance[0]:.1e}",
            "seconds": runs.seconds.median(), "least seconds": runs.seconds.min(),
            "most seconds": runs.seconds.max(), "evaluations": runs.evaluations[0],
            "process MB": runs["process MB"].max()}


SECTIONS = {section.__name__: section for section in (step, reconstruction)}


# --- the command --------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    bench = parse(arguments)
    bench.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench.scratch = Path(scratch)
        for name in bench.sections:
            print(name, flush=True)
            try:
                SECTIONS[name](bench)
                record(bench.out, name)
            except UserError as error:
                print(f"{name} is left out: {error}")
            table = verdicts(bench.out)
            table.measured = table.measured.map("{:.3g}".format)
            save_table(table, bench.out / "targets", "What was promised, and what was measured.")
    print(table.to_string(index=False))
    return 0


def parse(arguments: list[str] | None) -> Bench:
    """What to measure: the full benchmark, or less of it."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--problems", nargs="+", type=Size.parse, metavar="BATCHxSIDE",
                        default=[Size(16, 64), Size(4, 128), Size(16, 64, unet=True)],
                        help="of the section step; with -UNet the network of profile best; "
                             "-camera has an unknown border")
    parser.add_argument("--gradients", nargs="+", default=list(GRADIENTS), choices=GRADIENTS,
                        help="in the section step; jfb is always there")
    parser.add_argument("--maps", nargs="+", default=list(MAPS), choices=MAPS,
                        help="that the peers are given; with Eq. 4 they iterate long")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--quick", action="store_true",
                        help="tiny problems, one round, into build/bench: to see that all runs")
    bench = parser.parse_args(arguments, Bench(
        targets=(1e-2, 1e-3),  # distances to x*
        images=[Size(1, 128), Size(16, 64), Size(1, 512, unet=True, camera=True)],
        calibrated={}))  # what `setting` has found
    if bench.quick:
        bench.problems = bench.images = [Size(2, 32)]
        bench.targets, bench.rounds, bench.gradients = (3e-2,), 1, []
    bench.out = bench.out or ROOT / ("build/bench" if bench.quick else "benchmarks/results")
    missing = [peer for peer in PEERS if not available(peer)]
    for peer in missing:
        print(f"{peer} is not installed and left out; to have it: "
              ".venv/bin/python -m pip install -e '.[bench]'")
    bench.steps, bench.reconstructions = (
        [c for c in group if c.library not in missing and c.map in bench.maps]
        for group in (STEPS, RECONSTRUCTIONS))
    bench.steps = [c for c in bench.steps if c.gradient in ("jfb", *bench.gradients)]
    return bench
