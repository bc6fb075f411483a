"""A notebook by itself: what the ones before it would have left, and a training that is stopped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from jfbnb.common import UserError
from jfbnb.training.restorers import RELEASED
from jfbnb.training.tuning import Tuning


def need(runs: Path, networks: list[str], tuning: str, methods: list[str]) -> Tuning:
    """What earlier notebooks have left in `runs`; what is not there is taken as released.

    A line says so. Running the earlier notebooks replaces it.

    Args:
        networks: names of weights files, each with its model card.
        tuning: the file with the settings of `methods`.
    """
    missing = [name for name in networks if not (runs / f"{name}.safetensors").is_file()]
    for name in missing:
        runs.mkdir(parents=True, exist_ok=True)
        for suffix in (".safetensors", ".json"):
            shutil.copyfile(RELEASED / f"{name}{suffix}", runs / f"{name}{suffix}")
    if not (runs / tuning).is_file():
        released = Tuning.load(RELEASED / "tuning.json")
        chosen = {name: released.chosen[name] for name in methods}
        replace(released, chosen=chosen, searches={}).save(runs / tuning)
        missing.append("settings")
    if missing:
        print(f"released with this project, as no earlier notebook has run: {', '.join(missing)}")
    return Tuning.load(runs / tuning)


def check_parameters(**given: float) -> None:
    """Raise UserError for a count, such as `batch_size`, or a side `crop` that no notebook can use.

    A crop is of 8 to 128 pixels, every other one at least 1.
    """
    for name, value in given.items():
        least, most = (8, 128) if name == "crop" else (1, 1_000_000)
        if not least <= value <= most:
            raise UserError(f"{name} = {value}: choose {least} to {most}")


@contextmanager
def stoppable() -> Iterator[None]:
    """A training within that is stopped says so in one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError("stopped: run this cell again, and training goes on after its last "
                        "checkpoint") from None
