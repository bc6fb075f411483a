"""What the benchmark measures of speed and memory. All of it runs in processes of their own.

Those named `prepare` load and warm up, and return what is then measured again and again.
"""

import math
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil
import torch
from contenders import Contender, Problem, load_problem

Record = dict[str, object]
RESIDUALS = tuple(0.03 * 10 ** (-i / 12) for i in range(48))  # at which an image may be done
ITERATIONS = tuple(range(1, 151))  # after which a batch may be
PATIENCE = 10.0  # seconds of a solve, after which a solver need not go further


# --- the solvers: how far they must go ----------------------------------------------------------


def calibrate(file: Path, contender: Contender, target: float) -> Record:
    """Of a contender's solvers the one that is first at a distance to x*, or nearest."""
    problem = load_problem(file)
    return min((least_effort(problem, contender, solver, target) for solver in contender.solvers),
               key=lambda t: (not t["reached"], t["seconds" if t["reached"] else "distance"]))


def least_effort(problem: Problem, contender: Contender, solver: str, target: float) -> Record:
    """How far a solver must go to come to a distance, or how near it came.

    It is told to go twice as far until it arrives; then what lies between is halved.
    """
    efforts = RESIDUALS if contender.by_residual else ITERATIONS
    tried = cache(lambda i: attempt(problem, contender, solver, efforts[i], target))
    i, last = 0, len(efforts) - 1
    while not tried(i)["reached"] and i < last and tried(i)["seconds"] < PATIENCE:
        i = min(2 * i + 1, last)
    if tried(i)["reached"]:
        i = bisect_left(range(i), True, key=lambda k: tried(k)["reached"])
    return tried(i)


@torch.no_grad()
def attempt(problem: Problem, contender: Contender, solver: str, effort: float,
            target: float) -> Record:
    """How near a solver comes, and its seconds: the least of two runs where it arrives."""
    run = contender.make(problem, solver, effort)
    distance, clock = math.inf, time.perf_counter()
    try:
        distance = problem.distance(contender.map, run.image(problem.d))
    except (RuntimeError, ValueError, IndexError) as error:  # a peer's solver gave up
        print(f"{contender.name}, {solver}: {error}", file=sys.stderr)
    seconds = time.perf_counter() - clock
    return {"target": target, "solver": solver, "effort": effort, "reached": distance <= target,
            "distance": distance if math.isfinite(distance) else math.inf,
            "seconds": least(lambda: run.image(problem.d), 2) if distance <= target else seconds}


# --- one training step, one reconstruction ------------------------------------------------------


def prepare(file: Path, contender: Contender, solver: str, effort: float,
            training: bool) -> Callable[[], Record]:
    """A training step, draw, solve, gradient and update; or a reconstruction, without a gradient.

    What is returned says what one took, after another one: the first after a pause is slower. Where
    a batch is met several times in a row, that is the mean over all its visits.
    """
    problem = load_problem(file)
    run = contender.make(problem, solver, effort)
    optimizer = run.optimizer(run.trained.parameters(), lr=0.0)  # moves nothing, costs the same

    def step() -> None:
        for _ in range(run.batch_reuse):
            loss = run.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    reconstruct = torch.no_grad()(lambda: run.image(problem.d))
    action = step if training else reconstruct
    batches: list[int] = []
    handle = run.network.register_forward_hook(lambda _, inputs, noise: batches.append(
        len(inputs[0])))
    action()
    handle.remove()
    distance = problem.distance(contender.map, reconstruct())

    def measured() -> Record:
        action()
        steps = run.batch_reuse if training else 1
        return {"seconds": least(action, 1) / steps, "distance": distance,
                "evaluations": sum(batches) / len(problem.x) / steps, "process MB": peak_memory()}

    return measured


def peak_memory() -> float:
    """The most memory that this process has had, in MB, libraries included."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says has the parent's memory in it, on Linux
        lines = status.read_text("utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 1e6  # the peak on Windows alone


def least(action: Callable[[], object], times: int = 5) -> float:
    """The least seconds of some calls: what the machine can do when nothing disturbs it."""
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)
