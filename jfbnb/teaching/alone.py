"""Run a notebook alone: get the results of earlier ones; and stop a training cleanly."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jfbnb.common import UserError, atomic_path
from jfbnb.training.tuning import Tuning


def need(runs: Path, stored: str | Path, networks: list[str]) -> None:
    """Make sure that `runs` has some networks of earlier notebooks.

    A missing one is copied from the folder `stored`, and a line says so; running the earlier
    notebooks replaces it.

    Raises:
        UserError: if `stored` lacks the network, too.
    """
    missing = [name for name in networks if not (runs / f"{name}.safetensors").is_file()]
    for file in (f"{name}{suffix}" for name in missing for suffix in (".safetensors", ".json")):
        if not (Path(stored) / file).is_file():
            raise UserError(f"{runs} has no {file}, and nothing is stored for this profile: run "
                            "the earlier notebooks first")
        with atomic_path(runs / file) as temporary:
            shutil.copyfile(Path(stored) / file, temporary)
    if missing:
        print(f"no earlier notebook has run here; using stored networks: {', '.join(missing)}")


def chosen_before(file: Path, empty: Tuning) -> Tuning:
    """The settings that an earlier notebook stored in `file`; `empty` if none has run."""
    return Tuning.load(file) if file.is_file() else empty


def check_parameters(**given: float) -> None:
    """Raise UserError unless `crop` is 8 to 128 pixels, and any other count 1 to 1,000,000."""
    for name, value in given.items():
        least, most = (8, 128) if name == "crop" else (1, 1_000_000)
        if not least <= value <= most:
            raise UserError(f"{name} = {value}: choose {least} to {most}")


@contextmanager
def stoppable() -> Iterator[None]:
    """Show one line, not a traceback, if a training inside is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise UserError("stopped: run this cell again to resume the training from its last "
                        "checkpoint") from None
