"""Choose the settings of each method on validation images."""

import json
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_write
from jfbnb.core.operators import LinearOperator
from jfbnb.training.evaluation import quality
from jfbnb.training.methods import Method, Settings


def check_settings(method: Method, settings: object, noise_std: object, source: str) -> Settings:
    """Check that a method has all the settings that it needs, and return them.

    Args:
        noise_std: of the measurements on which they were chosen.
        source: where they were read, for the message.

    Raises:
        UserError: if one is missing, or is not a number above 0 and up to 1e5.
    """
    settings = settings if isinstance(settings, dict) else {}
    missing = [key for key in method.candidates(0.01, 1)[0] if key not in settings]
    if missing:
        raise UserError(f"{source} has no {' and no '.join(missing)} for {method.name}: "
                        "tune it first, or give the folder of a run that did")
    for value in (noise_std, *settings.values()):
        if type(value) not in (int, float) or not 0 < value <= 1e5:
            raise UserError(f"{source} holds no tuned parameters of {method.name} "
                            f"({reprlib.repr(value)} is not a number between 0 and 1e5)")
    return settings


TOLERANCE = 1e-3  # of the solves in a search: as in training, ten times that of the tables


@dataclass
class Tuning:
    """Each method's settings, chosen on validation images, with the searches that chose them.

    Args:
        noise_std: of the measurements, on images in [0, 1].
        images: how many validation images the searches used.
        chosen: for each method the settings with the highest mean PSNR.
        searches: for each method all candidates, each with its scores, such as "psnr" in dB.
    """

    noise_std: float
    images: int
    chosen: dict[str, Settings] = field(default_factory=dict)
    searches: dict[str, list[Settings]] = field(default_factory=dict)

    def search(self, method: str, candidates: list[Settings],
               score: Callable[[Settings], dict[str, float]]) -> Settings:
        """Score and record every candidate; choose the one with the highest "psnr".

        Candidates whose solves all converge are preferred.
        """
        tried = [{**candidate, **score(candidate)} for candidate in candidates]
        self.searches[method] = tried

        def rank(i: int) -> tuple[bool, bool, float]:  # NaN is worst
            known = tried[i]["psnr"] == tried[i]["psnr"]
            return known, tried[i].get("converged", 1.0) == 1.0, tried[i]["psnr"]

        best = max(range(len(tried)), key=rank)
        self.chosen[method] = candidates[best]
        return candidates[best]

    def at_edge(self, method: str) -> list[str]:
        """The settings at the edge of the search: a wider search may help."""
        tried = {key: {candidate[key] for candidate in self.searches[method]}
                 for key in self.chosen[method]}
        return [key for key, value in self.chosen[method].items() if len(tried[key]) > 1
                and value in (min(tried[key]), max(tried[key]))]

    def settings(self, method: Method) -> Settings:
        """A method's chosen settings. Errors as in `check_settings`."""
        chosen = self.chosen.get((method.shares_tuning_with or method).name)
        return check_settings(method, chosen, self.noise_std, "the tuning")

    def save(self, path: Path) -> None:
        atomic_write(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "Tuning":
        """Read a tuning. Raises UserError if the file is missing or not a tuning."""
        if not path.is_file():
            raise UserError(f"no tuned parameters at {path}: tune the methods first, or give the "
                            "folder of a run that did")
        try:
            tuning = Tuning(**json.loads(path.read_text(encoding="utf-8")))
            if not (isinstance(tuning.chosen, dict) and isinstance(tuning.searches, dict)):
                raise ValueError("its settings are not tables")
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} holds no tuned parameters ({error})") from error
        return tuning


@torch.no_grad()
def tune(method: Method, tuning: Tuning, A: LinearOperator, d: Tensor, x: Tensor, n: int,
         network: nn.Module | None = None) -> Settings:
    """Search about n settings of a method, before any training, on images x measured as d.

    An equilibrium is solved to `TOLERANCE`, with at most as many evaluations as for the tables.

    Args:
        network: the pretrained denoiser's, for a method with a network.
    """
    def score(settings: Settings) -> dict[str, float]:
        if method.restore:
            return quality(A, x, method.restore(A, d, settings, 1.0))
        model = method.build(A, network, settings)
        model.tolerance = TOLERANCE
        return quality(A, x, model(d))

    return tuning.search(method.name, method.candidates(tuning.noise_std, n), score)
