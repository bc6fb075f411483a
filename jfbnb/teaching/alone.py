"""A notebook by itself: what the ones before it would have left, and a training that is stopped."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jfbnb.common import UserError, atomic_path
from jfbnb.training.tuning import Tuning


def need(runs: Path, stored: str | Path, networks: list[str]) -> None:
    """See that `runs` has the networks that earlier notebooks train.

    One that is missing is taken from the folder `stored`, and a line says so; running the earlier
    notebooks replaces it.

    Raises:
        UserError: if `stored` lacks a network, too.
    """
    missing = [name for name in networks if not (runs / f"{name}.safetensors").is_file()]
    for file in (f"{name}{suffix}" for name in missing for suffix in (".safetensors", ".json")):
        if not (Path(stored) / file).is_file():
            raise UserError(f"{runs} has no {file}, and nothing is stored for this profile: run "
                            "the earlier notebooks first")
        with atomic_path(runs / file) as temporary:
            shutil.copyfile(Path(stored) / file, temporary)
    if missing:
        print(f"no earlier notebook has run here; stored networks are taken: {', '.join(missing)}")


def chosen_before(file: Path, empty: Tuning) -> Tuning:
    """The settings that an earlier notebook stored in `file`; `empty` if none has run."""
    return Tuning.load(file) if file.is_file() else empty


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
