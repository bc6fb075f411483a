"""What the benchmark measures of speed and memory. All of it runs in processes of their own.

Those named `prepare_...` load and warm up, and return what is then measured again and again.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from contenders import Contender, Problem, Size, load_problem, make
from torch import Tensor, nn

from jfbnb.diagnostics import gradient_costs
from jfbnb.fixed_point import anderson
from jfbnb.maps import SplittingMap
from jfbnb.networks import DnCNN, Regulariser, precision
from jfbnb.operators import get_protocol, make_blur

Record = dict[str, object]

RESIDUALS = tuple(0.03 * 10 ** (-i / 12) for i in range(48))  # at which our solver may stop
STALLED = 9  # attempts in a row that come no nearer: the rounding has the last word
EVALUATIONS, PATIENCE = 150, 10.0  # evaluations of T and seconds after which a solver is stopped
BASE = {"K": 10, "batch": 2, "side": 64, "width": 32}  # a step, of which one thing then grows


# --- the solvers: how far they must go ----------------------------------------------------------


class Enough(Exception):
    """The recorded solve need not go on."""


def calibrate(file: Path, contender: Contender, targets: tuple[float, ...]) -> list[Record]:
    """For each distance to x* the solver that is there first, and how far it must be told to go.

    The gradient does not matter here. Where no solver arrives, the one that came nearest.
    """
    problem = load_problem(file)
    tried = [{"solver": solver, **attempt} for solver in contender.solvers
             for attempt in attempts(problem, contender, solver, targets)]
    best = []
    for target in targets:
        arrived = [t for t in tried if t["distance"] <= target and "effort" in t]
        best.append({"target": target, "reached": bool(arrived),
                     **(min(arrived, key=lambda t: t["seconds"]) if arrived
                        else min(tried, key=lambda t: ("effort" in t, t["distance"])))})
    return best


def attempts(problem: Problem, contender: Contender, solver: str,
             targets: tuple[float, ...]) -> Iterator[Record]:
    """Runs of a solver around those that just reach the targets."""
    if contender.by_residual:
        found, left = [], sorted(targets)
        for effort in RESIDUALS:
            yield (attempt := attempted(problem, contender, solver, effort, left[-1]))
            found.append(attempt["distance"])
            left = [target for target in left if target < found[-1]]
            if not left or min(found[-STALLED:]) > min(found):
                return
        return
    distances, seconds = trace(problem, contender, solver, min(targets))
    yield {"distance": min(distances, default=float("inf")), "seconds": seconds,
           "iterations": len(distances)}
    for target in targets:
        first = next((k for k, distance in enumerate(distances, 1) if distance <= target), None)
        if first is not None:  # solvers count their iterations differently
            for effort in range(max(1, first - 2), first + 10):
                yield (attempt := attempted(problem, contender, solver, effort, target))
                if attempt["distance"] <= target:
                    break


@torch.no_grad()
def attempted(problem: Problem, contender: Contender, solver: str, effort: float,
              target: float) -> Record:
    """How near a solver comes, and its seconds: the least of two runs where it is at the target."""
    run = make(problem, contender, solver, effort)
    clock = time.perf_counter()
    distance = problem.distance(contender.map, run())
    seconds = time.perf_counter() - clock
    return {"effort": effort, "distance": distance,
            "seconds": least(run, 2) if distance <= target else seconds}


def trace(problem: Problem, contender: Contender, solver: str,
          enough: float) -> tuple[list[float], float]:
    """The distance to x* at every evaluation of the network, whoever calls it; and the seconds."""
    distances: list[float] = []
    clock = time.perf_counter()

    def record(network: nn.Module, inputs: tuple, noise: Tensor) -> None:
        state = inputs[0] if contender.map == "Eq. 4" else inputs[0] - noise
        distances.append(problem.distance(contender.map, state))
        if not enough < distances[-1] < 1e3 or time.perf_counter() - clock > PATIENCE:
            raise Enough

    handle = problem.S.network.register_forward_hook(record)
    try:
        with torch.no_grad(), suppress(Enough):
            make(problem, contender, solver, EVALUATIONS)()
    except (RuntimeError, ValueError, IndexError) as error:  # a peer's solver gave up
        print(f"{contender.name}, {solver}: {error}", file=sys.stderr)
    finally:
        handle.remove()
    return distances, time.perf_counter() - clock


# --- one training step, one reconstruction ------------------------------------------------------


def prepare_step(file: Path, size: Size, contender: Contender, solver: str,
                 effort: float) -> Callable[[], Record]:
    """Solve, gradient, update."""
    problem = load_problem(file, size.depth, size.width)
    run = make(problem, contender, solver, effort)
    optimizer = torch.optim.Adam(problem.S.parameters(), lr=0.0)  # moves nothing, costs the same

    def step() -> Tensor:
        output = run()
        optimizer.zero_grad()
        (output - problem.x).square().mean().backward()
        optimizer.step()
        return output.detach()

    return _timed(problem, contender, step)


def prepare_reconstruction(file: Path, size: Size, contender: Contender, solver: str,
                           effort: float) -> Callable[[], Record]:
    """The image, without a gradient."""
    problem = load_problem(file, size.depth, size.width)
    return _timed(problem, contender,
                  torch.no_grad()(make(problem, contender, solver, effort)))


def _timed(problem: Problem, contender: Contender,
           action: Callable[[], Tensor]) -> Callable[[], Record]:
    """Warm up once, then say each time what one call took, and how near to x* it came."""
    evaluations = 0.0  # per image

    def count(network: nn.Module, inputs: tuple, noise: Tensor) -> None:
        nonlocal evaluations
        evaluations += len(inputs[0]) / len(problem.x)

    handle = problem.S.network.register_forward_hook(count)
    distance = problem.distance(contender.map, action())
    handle.remove()

    def measured() -> Record:
        clock = time.perf_counter()
        action()
        return {"seconds": time.perf_counter() - clock, "evaluations": evaluations,
                "distance": distance, "process MB": peak_memory()}

    return measured


def peak_memory() -> float:
    """The most memory that this process has had, in MB, libraries included."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says has the parent's memory in it, on Linux
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


# --- growth -------------------------------------------------------------------------------------


def prepare_growth(series: str, values: list[int]) -> Callable[[], list[Record]]:
    """Seconds and memory of a step as one thing grows: K, batch, side or width."""

    def measured() -> list[Record]:
        return [{"series": series, "value": value, "gradient": cost["gradient"],
                 "seconds": cost["seconds"], "MB": cost["bytes"] / 1e6}
                for value in values for cost in _step_costs(series, value)]

    return measured


def _step_costs(series: str, value: int) -> list[dict]:
    size = {**BASE, series: value}
    A = make_blur(get_protocol("paper"), size["side"])
    S = Regulariser(DnCNN(8, size["width"]), tau=0.05, sigma=0.05)
    x = torch.rand(size["batch"], 3, size["side"], size["side"])
    gradients = ("jfb", "implicit", "unrolled") if series == "K" else ("jfb",)
    return gradient_costs(SplittingMap(A, S), A(x), x, [size["K"]], gradients)


# --- distance to the limit ----------------------------------------------------------------------


def prepare_limit(size: Size, bf16: bool, iterations: int = 12) -> Callable[[], Record]:
    """A solve's FLOP/s in the convolutions against the best matrix product's; where time goes."""
    A = make_blur(get_protocol("paper"), size.side)
    S = Regulariser(DnCNN(size.depth, size.width), tau=0.05, sigma=0.05)
    T = SplittingMap(A, S)
    d = torch.rand(size.batch, 3, size.side, size.side)
    weights = sum(p.numel() for p in S.network.parameters() if p.dim() == 4)
    flops = 2 * weights * size.batch * size.side**2  # of one evaluation; 2: multiply and add

    @torch.no_grad()
    def measured() -> Record:
        with precision(S, bf16):
            network = least(lambda: S.denoise(d))
            data = least(lambda: T.data_step(d, d))
            solve = least(lambda: anderson(lambda z: T(z, d), d, 0.0, iterations)) / iterations
        best = best_matrix_product(torch.bfloat16 if bf16 else torch.float32)
        return {"matrix product GFLOP/s": best / 1e9,
                "convolutions GFLOP/s": flops / network / 1e9,
                "convolutions' share": flops / network / best,
                "solve's share": flops / solve / best,
                "ms per evaluation": 1e3 * solve, "ms network": 1e3 * network,
                "ms data step": 1e3 * data, "ms solver": 1e3 * (solve - network - data)}

    measured()
    return measured


def best_matrix_product(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of some square matrix products."""
    best = 0.0
    for n in (1024, 2048):
        a, b = torch.rand(n, n).to(dtype), torch.rand(n, n).to(dtype)
        best = max(best, 2 * n**3 / least(lambda a=a, b=b: a @ b))
    return best


def least(action: Callable[[], object], times: int = 5) -> float:
    """The least seconds of some calls: what the machine can do when nothing disturbs it."""
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)
