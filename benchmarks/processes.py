"""Processes that measure. This module is light, as every one of them imports it."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


class Worker:
    """A process that prepares one thing, and then measures it as often as it is asked."""

    def __init__(self, prepare: Callable[..., Callable], *arguments: object):
        self.pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.pool.submit(_prepare, prepare, arguments).result()

    def measure(self) -> object:
        return self.pool.submit(_measure).result()

    def close(self) -> None:
        self.pool.shutdown()


def _prepare(prepare: Callable[..., Callable], arguments: tuple) -> None:
    global _prepared
    _prepared = prepare(*arguments)


def _measure() -> object:
    return _prepared()


def alone(job: Callable, *arguments: object) -> object:
    """What a job returns that runs in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def in_turns(workers: dict[object, Worker], rounds: int) -> list[tuple[object, object]]:
    """Measure each worker once per round, so that a slow minute of the machine hits all."""
    try:
        return [(key, worker.measure()) for _ in range(rounds) for key, worker in workers.items()]
    finally:
        for worker in workers.values():
            worker.close()
