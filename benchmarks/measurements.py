"""How far a contender must iterate, and how long it then takes."""

import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from functools import cache

import torch
from contenders import Contender, Problem

from jfbnb.common import UserError

Record = dict[str, object]
RESIDUALS = tuple(0.03 * 10 ** (-i / 12) for i in range(48))  # at which an image may be done
ITERATIONS = tuple(range(1, 151))  # after which a batch may be done


def calibrate(problem: Problem, contender: Contender, target: float) -> tuple[str, float]:
    """The fastest of a contender's solvers that come to a distance from x*, and its effort.

    The seconds of a solver are the least of two runs. Raises UserError if no solver arrives.
    """
    efforts = {solver: least_effort(problem, contender, solver, target)
               for solver in contender.solvers}
    seconds = {}
    for solver in [solver for solver, effort in efforts.items() if effort is not None]:
        run = contender.make(problem, solver, efforts[solver])
        reconstruct = torch.no_grad()(lambda run=run: run.image(problem.d))
        seconds[solver] = min(timed(reconstruct) for _ in range(2))
    if not seconds:
        raise UserError(f"{contender.name} does not come to a distance of {target:g} from x*")
    fastest = min(seconds, key=seconds.get)
    return fastest, efforts[fastest]


def least_effort(problem: Problem, contender: Contender, solver: str,
                 target: float) -> float | None:
    """The least effort with which a solver comes to a distance; None where none does.

    The effort is doubled until the solver arrives; then bisection finds the least.
    """
    efforts = RESIDUALS if contender.by_residual else ITERATIONS

    @cache
    def arrives(i: int) -> bool:
        return distance(problem, contender, solver, efforts[i]) <= target

    i, last = 0, len(efforts) - 1
    while not arrives(i):
        if i == last:
            return None
        i = min(2 * i + 1, last)
    return efforts[bisect_left(range(i), True, key=arrives)]


@torch.no_grad()
def distance(problem: Problem, contender: Contender, solver: str, effort: float) -> float:
    """From x*; NaN where a peer's solver gives up."""
    try:
        return problem.distance(contender.make(problem, solver, effort).image(problem.d))
    except (RuntimeError, ValueError, IndexError) as error:
        print(f"{contender.name}, {solver}: {error}", file=sys.stderr)
        return float("nan")


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
    arrived = problem.distance(reconstruct())

    def measured() -> Record:
        action()
        return {"seconds": timed(action) / steps, "distance": arrived,
                "evaluations": sum(batches) / len(problem.x) / steps}

    return measured


def timed(action: Callable[[], object]) -> float:
    clock = time.perf_counter()
    action()
    return time.perf_counter() - clock
