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
from contenders import PAPER, Contender, Problem, Size, load_problem

from jfbnb.diagnostics import gradient_costs, implicit_step, jfb_step, unrolled_step
from jfbnb.fixed_point import solve
from jfbnb.maps import SplittingMap
from jfbnb.networks import Denoiser, DnCNN, precision

Record = dict[str, object]
RESIDUALS = tuple(0.03 * 10 ** (-i / 12) for i in range(48))  # at which an image may be done
ITERATIONS = tuple(range(1, 151))  # after which a batch may be
PATIENCE = 10.0  # seconds of a solve, after which a solver need not go further
STEPS = {"jfb": jfb_step, "implicit": implicit_step, "unrolled": unrolled_step}
BASE = {"K": 10, "batch": 2, "side": 64, "width": 32}  # a step, of which one thing then grows


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
        for _ in range(run.visits):
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
        steps = run.visits if training else 1
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


# --- growth -------------------------------------------------------------------------------------


def prepare_growth(series: str, values: list[int]) -> Callable[[], list[Record]]:
    """Seconds and memory of a step as one thing grows: K, batch, side or width."""

    def costs(value: int) -> list[Record]:
        size = {**BASE, series: value}
        T = untrained(size["side"], 8, size["width"])
        x = torch.rand(size["batch"], 3, size["side"], size["side"])
        steps = STEPS if series == "K" else {"jfb": jfb_step}
        return [{"series": series, "value": value, "gradient": cost["gradient"],
                 "seconds": cost["seconds"], "MB": cost["bytes"] / 1e6}
                for cost in gradient_costs(T, T.A(x), x, [size["K"]], steps)]

    return lambda: [record for value in values for record in costs(value)]


def untrained(side: int, depth: int, width: int) -> SplittingMap:
    return SplittingMap(PAPER.operator(side), Denoiser(DnCNN(depth, width), 0.05), tau=0.05)


# --- distance to the limit ----------------------------------------------------------------------


def prepare_limit(size: Size, bf16: bool, iterations: int = 12) -> Callable[[], Record]:
    """A solve's FLOP/s in the convolutions against the best matrix product's; where time goes."""
    T = untrained(size.side, size.depth, size.width)
    d = torch.rand(size.batch, 3, size.side, size.side)
    weights = sum(p.numel() for p in T.D.network.parameters() if p.dim() == 4)
    flops = 2 * weights * size.batch * size.side**2  # of one evaluation; 2: multiply and add

    squares = [torch.rand(n, n).to(torch.bfloat16 if bf16 else torch.float32)
               for n in (1024, 2048)]

    @torch.no_grad()
    def measured() -> Record:
        with precision(T, bf16):
            network = least(lambda: T.D(d))
            data = least(lambda: T.data_step(d, d))
            whole = least(lambda: solve(T, d, 0.0, iterations)) / iterations
        best = max(2 * len(a)**3 / least(lambda a=a: a @ a) for a in squares)
        return {"matrix product GFLOP/s": best / 1e9,
                "convolutions GFLOP/s": flops / network / 1e9,
                "convolutions' share": flops / network / best,
                "solve's share": flops / whole / best,
                "ms per evaluation": 1e3 * whole, "ms network": 1e3 * network,
                "ms data step": 1e3 * data, "ms solver": 1e3 * (whole - network - data)}

    measured()
    return measured


def least(action: Callable[[], object], times: int = 5) -> float:
    """The least seconds of some calls: what the machine can do when nothing disturbs it."""
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)
