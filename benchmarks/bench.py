"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

benchmarks/README.md says what is measured and how to read it.
"""

from pathlib import Path
from statistics import median

import pandas as pd
from command import RESULTS, ROOT, Bench, options, run
from contenders import PEERS, RECONSTRUCTIONS, STEPS, Contender, Size, make_problem
from measurements import calibrate, prepare
from report import bars, verdicts

from jfbnb.teaching.figures import save_figure, save_table

DISTANCES = (1e-2, 1e-3)  # to x*
PROBLEMS = (Size(16, 64), Size(4, 128), Size(16, 64, unet=True))  # of the section step
IMAGES = (Size(1, 128), Size(16, 64), Size(1, 512, unet=True, camera=True))


def step(bench: Bench) -> None:
    """One training step."""
    rows: list[dict] = []
    for size in bench.problems:
        for target in bench.distances:
            rows += compare(size, STEPS, target, bench.rounds, training=True)
            save("step", rows, "One training step", "seconds per training step", bench)


def reconstruction(bench: Bench) -> None:
    """The image, without a gradient."""
    rows: list[dict] = []
    for size in bench.images:
        rows += compare(size, RECONSTRUCTIONS, min(bench.distances), bench.rounds, training=False)
        save("reconstruction", rows, "Reconstruction, nothing tracked", "seconds per batch", bench)


def save(name: str, rows: list[dict], caption: str, label: str, bench: Bench) -> None:
    table = pd.DataFrame(rows)
    save_table(table, bench.out / name, f"{caption}; {bench.rounds} runs each.")
    save_figure(bars(table, label), bench.out / name)


def compare(size: Size, contenders: list[Contender], target: float, rounds: int,
            training: bool) -> list[dict]:
    """The contenders to one distance: one record for each, with the median of its seconds.

    They take turns, so that a slow minute of the machine affects all.
    """
    print(f"  {size}, to a distance of {target:.0e}", flush=True)
    problem = make_problem(size)
    contenders = [c for c in contenders if c.available()]
    found = [calibrate(problem, c, target) for c in contenders]
    ready = [prepare(problem, c, *how, training) for c, how in zip(contenders, found, strict=True)]
    turns = [[measure() for measure in ready] for _ in range(rounds)]
    rows = []
    for c, (solver, effort), runs in zip(contenders, found, zip(*turns, strict=True), strict=True):
        seconds = [run["seconds"] for run in runs]
        rows.append({
            "problem": str(size), "to distance": f"{target:.0e}", "contender": c.name,
            "solver": solver, "stops at": f"residual {effort:.1e}" if c.by_residual
            else f"{effort} iterations", "came to": f"{runs[0]['distance']:.1e}",
            "seconds": median(seconds), "times ours": 1.0, "least seconds": min(seconds),
            "most seconds": max(seconds), "evaluations": runs[0]["evaluations"]})
        rows[-1]["times ours"] = rows[-1]["seconds"] / rows[0]["seconds"]
    return rows


def report(out: Path) -> None:
    """The targets beside what has been measured."""
    table = verdicts(out)
    table.measured = table.measured.map("{:.3g}".format)
    save_table(table, out / "targets", "What was promised, and what was measured.")
    print(table.to_string(index=False))


SECTIONS = {"step": step, "reconstruction": reconstruction}


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender")
    parser.add_argument("--quick", action="store_true",
                        help="tiny problems, one round, into build/bench: to see that all runs")
    bench = parser.parse_args(arguments)
    bench.problems, bench.images, bench.distances = PROBLEMS, IMAGES, DISTANCES
    if bench.quick:
        bench.problems = bench.images = (Size(2, 32),)
        bench.distances, bench.rounds = (3e-2,), 1
        bench.out = ROOT / "build/bench" if bench.out == RESULTS else bench.out
    for peer in PEERS:
        if not peer.available():
            print(f"{peer.library} is not installed and left out; to have it: "
                  ".venv/bin/python -m pip install -e '.[bench]'")
    return run(bench, SECTIONS, report)
