"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

benchmarks/README.md says what is measured and how to read it.
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from command import ROOT, Bench, options, run
from contenders import PEERS, RECONSTRUCTIONS, STEPS, Contender, Size, make_problem
from measurements import calibrate, prepare
from report import bars, verdicts, with_ratio

from jfbnb.teaching.figures import save_figure, save_table

DISTANCES = (1e-2, 1e-3)  # to x*
IMAGES = (Size(1, 128), Size(16, 64), Size(1, 512, unet=True, camera=True))


def step(bench: Bench) -> None:
    """One training step."""
    rows: list[dict] = []
    for size in bench.problems:
        for target in bench.distances:
            rows += compare(size, STEPS, target, bench.rounds, training=True)
            table = with_ratio(pd.DataFrame(rows))
            save_table(table, bench.out / "step", f"One training step; {bench.rounds} runs each.")
            save_figure(bars(table, "seconds per training step"), bench.out / "step")


def reconstruction(bench: Bench) -> None:
    """The image, without a gradient."""
    rows: list[dict] = []
    for size in bench.images:
        rows += compare(size, RECONSTRUCTIONS, min(bench.distances), bench.rounds, training=False)
        table = with_ratio(pd.DataFrame(rows))
        images = table.problem.str.split("x").str[0].astype(int)
        table["images per second"] = images / table.seconds
        save_table(table, bench.out / "reconstruction",
                   f"Reconstruction, nothing tracked; {bench.rounds} runs each.")
        save_figure(bars(table, "seconds per batch"), bench.out / "reconstruction")


def compare(size: Size, contenders: list[Contender], target: float, rounds: int,
            training: bool) -> list[dict]:
    """The contenders to one distance, one record for each.

    They take turns, so that a slow minute of the machine affects all.
    """
    print(f"  {size}, to a distance of {target:.0e}", flush=True)
    problem = make_problem(size)
    found = {c: calibrate(problem, c, target) for c in contenders if c.available()}
    ready: dict[Contender, Callable[[], dict]] = {
        c: prepare(problem, c, effort["solver"], effort["effort"], training)
        for c, effort in found.items() if effort["reached"]}
    runs = [(c, measure()) for _ in range(rounds) for c, measure in ready.items()]
    return [_row(size, c, found[c], pd.DataFrame([record for who, record in runs if who == c]))
            for c in found]


def _row(size: Size, contender: Contender, effort: dict, runs: pd.DataFrame) -> dict:
    """The median and the spread of a contender's runs, or how near it came."""
    stop = (f"residual {effort['effort']:.1e}" if contender.by_residual
            else f"{effort['effort']} iterations")
    row = {"problem": str(size), "to distance": f"{effort['target']:.0e}",
           "contender": contender.name, "solver": effort["solver"]}
    if runs.empty:  # it would have taken more seconds than it spent
        return {**row, "stops at": f"given up at {stop}", "reached": "no",
                "came to": f"{effort['distance']:.1e}", "seconds": effort["seconds"]}
    return {**row, "stops at": stop, "reached": "yes", "came to": f"{runs.distance[0]:.1e}",
            "seconds": runs.seconds.median(), "least seconds": runs.seconds.min(),
            "most seconds": runs.seconds.max(), "evaluations": runs.evaluations[0]}


def report(out: Path) -> None:
    """The targets beside what has been measured."""
    table = verdicts(out)
    table.measured = table.measured.map("{:.3g}".format)
    save_table(table, out / "targets", "What was promised, and what was measured.")
    print(table.to_string(index=False))


SECTIONS = {"step": step, "reconstruction": reconstruction}


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, SECTIONS)
    parser.add_argument("--problems", nargs="+", type=Size.parse, metavar="BATCHxSIDE",
                        default=[Size(16, 64), Size(4, 128), Size(16, 64, unet=True)],
                        help="of the section step; with -UNet the network of profile best; "
                             "-camera has an unknown border")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--quick", action="store_true",
                        help="tiny problems, one round, into build/bench: to see that all runs")
    if (bench := parser.parse_args(arguments)).quick:
        parser.set_defaults(out=ROOT / "build/bench")
        bench = parser.parse_args(arguments)
        bench.problems, bench.rounds = [Size(2, 32)], 1
    bench.images = bench.problems if bench.quick else IMAGES
    bench.distances = (3e-2,) if bench.quick else DISTANCES
    for peer in PEERS:
        if not peer.available():
            print(f"{peer.library} is not installed and left out; to have it: "
                  ".venv/bin/python -m pip install -e '.[bench]'")
    return run(bench, SECTIONS, report)
