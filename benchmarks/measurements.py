"""How far a contender must iterate, and how long it then takes."""

import math
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
from contenders import Contender, Problem

Record = dict[str, object]
RESIDUALS = tuple(0.03 * 10 ** (-i / 12) for i in range(48))  # at which an image may be done
ITERATIONS = tuple(range(1, 151))  # after which a batch may be done


def calibrate(problem: Problem, contender: Contender, target: float) -> Record:
    """The fastest of a contender's solvers that come to a distance from x*, or the nearest one."""
    found = [least_effort(problem, contender, solver, target) for solver in contender.solvers]
    return min(found, key=lambda record: (not record["reached"], record[
        "seconds" if record["reached"] else "distance"]))


def least_effort(problem: Problem, contender: Contender, solver: str, target: float) -> Record:
    """The least effort with which a solver comes to a distance, or the greatest there is.

    The effort is doubled until the solver arrives; then bisection finds the least.
    """
    efforts = RESIDUALS if contender.by_residual else ITERATIONS
    tried = cache(lambda i: attempt(problem, contender, solver, efforts[i], target))
    i, last = 0, len(efforts) - 1
    while not tried(i)["reached"] and i < last:
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
        distance = problem.distance(run.image(problem.d))
    except (RuntimeError, ValueError, IndexError) as error:  # a peer's solver gave up
        print(f"{contender.name}, {solver}: {error}", file=sys.stderr)
    seconds = time.perf_counter() - clock
    if distance <= target:
        seconds = min(timed(lambda: run.image(problem.d)) for _ in range(2))
    return {"target": target, "solver": solver, "effort": effort, "reached": distance <= target,
            "distance": distance if math.isfinite(distance) else math.inf, "seconds": seconds}


def prepare(problem: Problem, contender: Contender, solver: str, effort: float,
            training: bool) -> Callable[[], Record]:
    """A training step (draw, solve, gradient, update) or a reconstruction, warmed up.

    The returned function times one of them, after another that is not timed: the first one after a
    pause is slower. With batches that are reused it takes the mean over all steps on a batch.
    """
    run = contender.make(problem, solver, effort)
    optimizer = run.optimizer(run.trained.parameters(), lr=0.0)  # moves nothing, costs the same
    steps = run.batch_reuse if training else 1

    def train() -> None:
        for _ in range(steps):
            loss = run.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    reconstruct = torch.no_grad()(lambda: run.image(problem.d))
    action = train if training else reconstruct
    batches: list[int] = []
    handle = run.network.register_forward_hook(
        lambda _, inputs, noise: batches.append(len(inputs[0])))
    action()
    handle.remove()
    distance = problem.distance(reconstruct())

    def measured() -> Record:
        action()
        return {"seconds": timed(action) / steps, "distance": distance,
                "evaluations": sum(batches) / len(problem.x) / steps}

    return measured


def timed(action: Callable[[], object]) -> float:
    clock = time.perf_counter()
    action()
    return time.perf_counter() - clock
