"""Find the checkout, which has the notebooks, and the folders where they read and write."""

import os
from pathlib import Path

from jfbnb.common import UserError

ROOT = Path(__file__).resolve().parents[2]  # the checkout, or for a wheel site-packages


def find_checkout() -> Path | None:
    """The package's own checkout, else the nearest folder from the working directory up."""
    here = Path.cwd()
    return next((folder for folder in (ROOT, here, *here.parents)
                 if (folder / "notebooks" / "profiles").is_dir()), None)


def need_checkout() -> None:
    """Raise UserError if the package is not in a checkout."""
    if not (ROOT / "notebooks" / "profiles").is_dir():
        raise UserError("reproduce, train, sweep and lab need the notebooks, which this "
                        "installation of jfbnb lacks: `git clone` the project's repository and "
                        "run `make reproduce` there")


def work() -> Path:
    """The folder that holds runs/ and figures/: the checkout, or the folder JFBNB_WORK in it."""
    checkout, folder = find_checkout(), os.environ.get("JFBNB_WORK", "")
    if checkout is None and not os.path.isabs(folder):
        raise UserError("there is no checkout of jfbnb here for runs/ and figures/: start in one, "
                        "or set the environment variable JFBNB_WORK to a folder")
    return Path(checkout or "", folder)


def run_dirs(profile: str) -> tuple[Path, Path]:
    """A profile's folders in runs/ and figures/, wherever its notebook is started."""
    return work() / "runs" / profile, work() / "figures" / profile


def find_path(text: str) -> str:
    """The absolute path of a user's path: below the current folder, else below the checkout.

    "bundled" and "" are no paths, and are returned unchanged.
    """
    if text in ("", "bundled"):
        return text
    given = Path(os.path.expanduser(text))
    places = [folder / given for folder in (Path.cwd(), find_checkout()) if folder]
    return os.path.abspath(next(filter(os.path.exists, places), places[-1]))


def without_places(parameters: dict[str, object]) -> dict[str, object]:
    """The parameters without absolute paths: relative to the checkout, or only a name."""
    return {name: _portable(value) if name in ("data", "weights") else value
            for name, value in parameters.items()}


def _portable(path: str) -> str:
    if not os.path.isabs(path):
        return path
    return str(Path(path).relative_to(ROOT) if Path(path).is_relative_to(ROOT) else Path(path).name)
