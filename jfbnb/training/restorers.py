"""Methods ready to use, with stored or released weights."""

import contextlib
from pathlib import Path

import torch

from jfbnb.common import UserError
from jfbnb.core.models import Model, Restorer
from jfbnb.training.methods import METHODS, Method, Settings, get_method
from jfbnb.training.tuning import Tuning
from jfbnb.training.weights import load_denoiser, load_weights

RELEASED = Path(__file__).parents[1] / "weights"  # the paper's networks, in the package
BEST = RELEASED / "best"  # those to restore with: profile `best`


def make_methods(names: list[str], weights: Path | None,
                 device: torch.device) -> dict[str, Restorer]:
    """The named methods, with what a run stored in the folder `weights`, or as released.

    Released networks are those of profile `best`, or the paper's where that has none. A folder
    holds tuning.json, denoiser.safetensors (for those that are not trained), and
    NAME.safetensors of each trained method. At another noise level than the tuned one the weight of
    the prior follows the noise, as `Method.noise_power` says. What has no such weight, DE-PROX and
    DnCNN alone, stays as trained.

    Raises:
        UserError: for an unknown name, or where a file that a method needs is missing.
    """
    methods = [get_method(name) for name in names]
    return {method.name: _make_method(method, weights or _released(method), device)
            for method in methods}


def expected_methods(weights: Path | None) -> list[str]:
    """All methods, less those with neither weights nor settings, released or in that folder."""
    stored = set()
    for folder in (RELEASED, weights or BEST):
        stored |= {path.stem for path in folder.glob("*.safetensors")}
        with contextlib.suppress(UserError):
            stored |= Tuning.load(folder / "tuning.json").chosen.keys()
    own = {name: method.head_of or method for name, method in METHODS.items()}
    return [name for name, m in own.items()
            if m.name in stored or (not m.trainable and m.candidates(0.01, 1) == [{}])]


def _released(method: Method) -> Path:
    found = method.trainable and (BEST / f"{method.name}.safetensors").is_file()
    return BEST if found else RELEASED


def _make_method(method: Method, weights: Path, device: torch.device) -> Restorer:
    own, tuning = method.head_of or method, Tuning.load(weights / "tuning.json")
    settings = tuning.settings(own)

    def prior_scale(noise_std: float) -> float:
        return (noise_std / tuning.noise_std) ** own.noise_power

    if own.restore:
        return Restorer(lambda A, d, noise_std: own.restore(A, d, settings, prior_scale(noise_std)))
    model = load_model(own, settings, weights).to(device)
    if method.head_of is None:
        return Restorer(lambda A, d, noise_std: model.on(A, prior_scale(noise_std))(d),
                        model=lambda A, noise_std: model.on(A, prior_scale(noise_std)))
    if model.H is None:
        raise UserError(f"the weights {weights / own.name}.safetensors have no head: "
                        f"{method.name} needs one")
    return Restorer(lambda A, d, noise_std: model.on(A, prior_scale(noise_std))(d), own.name,
                    lambda A, y, d, noise_std: model.on(A, prior_scale(noise_std)).apply_head(y, d))


def load_model(method: Method, settings: Settings, weights: Path) -> Model:
    """A method's model with its weights in a folder; it is `on` no operator yet.

    Raises:
        UserError: if the folder has no such weights, or damaged ones.
    """
    if not method.trainable:
        D = load_denoiser(weights / "denoiser.safetensors")
        return method.build(None, D.network, settings)
    file = weights / f"{method.name}.safetensors"
    model = load_weights(file, lambda network, head=None: method.build(None, network, settings,
                                                                       head))
    if not torch.as_tensor(getattr(model.T, "tau", 1.0)).isfinite():  # its logarithm may be
        raise UserError(f"the weights {file} have a tau that is not finite: fetch them again")
    return model
