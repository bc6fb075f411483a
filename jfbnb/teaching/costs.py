"""The cost of a training step by gradient method: seconds and memory (notebook 4b)."""

import os
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from jfbnb.core.diagnostics import parameter_gradient
from jfbnb.core.fixed_point import picard, solve
from jfbnb.core.gradients import implicit, jfb, unrolled
from jfbnb.core.maps import ImplicitMap

Step = Callable[[ImplicitMap, Tensor, Tensor, int], Tensor]


def jfb_step(T: ImplicitMap, d: Tensor, truth: Tensor, K: int) -> Tensor:
    """JFB's gradient after K plain iterations."""
    state, _ = solve(T, d, 0.0, K, picard)
    return parameter_gradient(T, state, d, truth, jfb)


def implicit_step(T: ImplicitMap, d: Tensor, truth: Tensor, K: int) -> Tensor:
    """The exact gradient after K plain iterations, and K of the adjoint equation."""
    state, _ = solve(T, d, 0.0, K, picard)
    return parameter_gradient(T, state, d, truth,
                              partial(implicit, tolerance=0.0, max_iterations=K))


def unrolled_step(T: ImplicitMap, d: Tensor, truth: Tensor, K: int) -> Tensor:
    """The gradient of K tracked applications of T."""
    return parameter_gradient(T, T.start(d), d, truth, partial(unrolled, iterations=K))


def gradient_costs(T: ImplicitMap, d: Tensor, truth: Tensor, iterations: list[int],
                   steps: Mapping[str, Step]) -> list[dict]:
    """Measure time and memory of one training step for each gradient in `steps`, by name.

    Returns:
        A record for each gradient and K: gradient, K, seconds, bytes.
    """
    records = []
    for name, step in steps.items():
        for K in iterations:
            seconds, peak = step_cost(partial(step, T, d, truth, K))
            records.append({"gradient": name, "K": K, "seconds": seconds, "bytes": peak})
    return records


def step_cost(step: Callable[[], object]) -> tuple[float, int]:
    """Measure one call: seconds, and the peak of the memory that it allocates, in bytes.

    On a CPU the peak is computed from PyTorch's record of allocated and freed tensors. The first
    call warms up. The seconds are the least of three more, which a busy machine disturbs least.
    """
    step()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = min(_seconds(step, cuda) for _ in range(3))
    if cuda:
        return seconds, torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    changes = [(event.start_ns(), event.nbytes())
               for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for _, nbytes in sorted(changes):
        total += nbytes
        peak = max(peak, total)
    return seconds, peak


def _seconds(step: Callable[[], object], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - clock
