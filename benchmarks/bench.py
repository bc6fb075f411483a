"""`make bench`: this project, deepinv and torchdeq, side by side on the same problem.

Each measurement is a process of its own. Contenders take turns, so that a slow minute of the
machine hits all of them. Results: benchmarks/results/, as CSV, Markdown and figures.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch
from contenders import CONTENDERS, available, make_problem, results_folder

from jfbnb.common import atomic_write
from jfbnb.figures import COLOURS, new_figure, save_figure, save_table
from jfbnb.maps import SplittingMap
from jfbnb.methods import solve

PROBLEMS = {  # batch, side of the crops, depth, width
    "16 x 64², 8 x 32": (16, 64, 8, 32), "4 x 128², 8 x 32": (4, 128, 8, 32),
    "16 x 64², 17 x 64": (16, 64, 17, 64), "4 x 128², 17 x 64": (4, 128, 17, 64)}
TARGETS = (1e-2, 1e-3)
COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
PATIENCE = 120.0  # seconds that one solve may take in calibration


# --- what a process does ------------------------------------------------------------------------


def calibrate(problem_name: str, contender: str) -> list[dict]:
    """The fewest iterations, and the solver, that reach each target; one record per target."""
    make, map_name, gradient, solvers = CONTENDERS[contender]
    problem = make_problem(*PROBLEMS[problem_name])
    tried = []
    for solver in solvers:
        run = make(problem, map_name, gradient, solver)
        for count in COUNTS:
            clock = time.perf_counter()
            try:
                state, _ = run(count)
            except (RuntimeError, ValueError, IndexError) as error:  # a peer's solver gave up
                print(f"{contender}, {solver}: {error}", file=sys.stderr)
                break
            seconds = time.perf_counter() - clock
            distance = problem.distance(map_name, state)
            tried.append({"solver": solver, "iterations": count, "distance": distance,
                          "seconds": seconds})
            if distance <= min(TARGETS) or seconds > PATIENCE or not distance < 1e3:
                break
    records = []
    for target in TARGETS:
        reached = [t for t in tried if t["distance"] <= target]
        best = (min(reached, key=lambda t: t["seconds"]) if reached
                else min(tried, key=lambda t: t["distance"]))
        records.append({"problem": problem_name, "contender": contender, "target": target,
                        "reached": bool(reached), **best})
    return records


def time_step(record: dict) -> dict:
    """One training step with calibrated settings: seconds, and the memory it adds at its peak."""
    make, map_name, gradient, _ = CONTENDERS[record["contender"]]
    problem = make_problem(*PROBLEMS[record["problem"]])
    run = make(problem, map_name, gradient, record["solver"])
    optimizer = torch.optim.Adam(problem.S.parameters(), lr=0.0)  # moves nothing, costs the same

    def step() -> None:
        _, output = run(record["iterations"])
        optimizer.zero_grad()
        (output - problem.x).square().mean().backward()
        optimizer.step()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = repeat(step)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "MB": (after - before) / 1024}


def time_reconstruction(batch: int) -> dict:
    """The released network on 128 x 128 images, to a distance of 1e-3."""
    problem = make_problem(batch, 128, 8, 32)
    T = SplittingMap(problem.A, problem.S)
    for tolerance in (3e-3, 1e-3, 3e-4, 1e-4, 3e-5):
        with torch.no_grad():
            y, info = solve(T, problem.d, tolerance)
        if problem.distance("splitting", y) <= 1e-3:
            break
    with torch.no_grad():
        seconds = repeat(lambda: solve(T, problem.d, tolerance))
    return {"batch": batch, "seconds per image": seconds / batch,
            "evaluations": info.iterations.float().mean().item(),
            "distance": problem.distance("splitting", y)}


def time_limit(channels: int) -> dict:
    """FLOP/s of the network's convolutions, and of the best matrix product of the same type."""
    problem = make_problem(4, 128, 8 if channels == 32 else 17, channels)
    network = problem.S.network
    flops = 2 * problem.x[0, 0].numel() * len(problem.x) * sum(
        p.numel() for p in network.parameters() if p.dim() == 4)
    with torch.no_grad():
        network_seconds = repeat(lambda: network(problem.x, 0.05), 7)
    best = 0.0
    for n in (1024, 2048, 3072):
        a, b = torch.rand(n, n), torch.rand(n, n)
        best = max(best, 2 * n**3 / repeat(lambda a=a, b=b: a @ b, 7))
    return {"channels": channels, "network GFLOP/s": flops / network_seconds / 1e9,
            "matrix product GFLOP/s": best / 1e9, "share": flops / network_seconds / best}


def repeat(action: Callable[[], object], times: int = 3) -> float:
    """Median seconds of `times` calls, after one to warm up."""
    action()
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds)


JOBS: dict[str, Callable] = {"calibrate": calibrate, "step": time_step,
                             "reconstruction": time_reconstruction, "limit": time_limit}


def in_a_process(job: str, *arguments: object) -> object:
    """Run a job alone in a fresh process; its result."""
    command = [sys.executable, __file__, "--job", job, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job} {arguments} failed: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- the sections -------------------------------------------------------------------------------


def training_steps(problems: list[str], rounds: int, out: Path) -> None:
    names = [name for name in CONTENDERS if available(name)]
    for missing in sorted({name.split()[0] for name in CONTENDERS} - {n.split()[0] for n in names}):
        print(f"{missing} is not installed and left out: pip install -e '.[bench]'")
    settings = []
    for problem in problems:
        for name in names:
            print(f"calibrating {name} on {problem}", flush=True)
            settings += in_a_process("calibrate", problem, name)
    runs = []
    for number in range(rounds):
        for record in settings:
            if record["reached"]:
                runs.append({**record, "round": number, **in_a_process("step", record)})
        print(f"round {number + 1} of {rounds} done", flush=True)
    save_table(pd.DataFrame(runs), out / "step_runs", "Every run of a training step.")
    table = pd.DataFrame([_step_row(record, runs) for record in settings])
    save_table(table, out / "step", f"One training step, {rounds} runs, to a distance from x*.")
    _step_figure(table, out)


def _step_row(record: dict, runs: list[dict]) -> dict:
    own = [r for r in runs if all(r[k] == record[k] for k in ("problem", "contender", "target"))]
    seconds = [r["seconds"] for r in own]
    return {"problem": record["problem"], "contender": record["contender"],
            "target": f"{record['target']:.0e}",
            "reached": "yes" if record["reached"] else f"no: {record['distance']:.0e}",
            "solver": record["solver"], "iterations": record["iterations"],
            "seconds, median": statistics.median(seconds) if own else None,
            "seconds, least": min(seconds, default=None),
            "seconds, most": max(seconds, default=None),
            "MB": statistics.median(r["MB"] for r in own) if own else None}


def _step_figure(table: pd.DataFrame, out: Path) -> None:
    timed = table.dropna(subset="seconds, median")
    figure, axes = new_figure(columns=len(TARGETS), width=11, height=7)
    for ax, target in zip(axes, TARGETS, strict=True):
        part = timed[timed.target == f"{target:.0e}"]
        labels = part.problem + ": " + part.contender
        colours = [COLOURS["jfb"] if c.startswith("jfbnb") else COLOURS["measurement"]
                   for c in part.contender]
        ax.barh(labels, part["seconds, median"], color=colours)
        ax.set(xscale="log", xlabel="seconds", title=f"to a distance of {target:.0e}")
        ax.tick_params(axis="y", labelsize=6)
        ax.invert_yaxis()
    save_figure(figure, out / "step")


def simple_section(job: str, values: list[int], rounds: int, out: Path, caption: str) -> None:
    """Medians over rounds of a job that takes one number."""
    runs = [{**in_a_process(job, value), "round": number}
            for number in range(rounds) for value in values]
    table = pd.DataFrame(runs).drop(columns="round").groupby(next(iter(runs[0]))).median()
    save_table(table.reset_index(), out / job, caption)
    print(table.to_string(), flush=True)


def machine() -> dict:
    """What the figures were measured on."""
    versions = {}
    for name in ("torch", "deepinv", "torchdeq"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cpu = next((line.split(":")[1].strip() for line in
                Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return {"machine": f"{platform.system()} {platform.machine()}", "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "cpu capability": torch.backends.cpu.get_cpu_capability(), "versions": versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sections", nargs="+", default=["step", "reconstruction", "limit"],
                        choices=["step", "reconstruction", "limit"])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=results_folder())
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(JOBS[args.job[0]](*json.loads(args.job[1]))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write(args.out / "machine.json", json.dumps(machine(), indent=2) + "\n")
    if "limit" in args.sections:
        simple_section("limit", [32, 64], args.rounds, args.out,
                       "The convolutions' rate against the best matrix product, float32.")
    if "reconstruction" in args.sections:
        simple_section("reconstruction", [1, 16], args.rounds, args.out,
                       "The released network on 128 x 128 images, to a distance of 1e-3 from x*.")
    if "step" in args.sections:
        training_steps(args.problems, args.rounds, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
