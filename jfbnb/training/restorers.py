"""Methods that are ready to use, with stored or released weights."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jfbnb.common import UserError
from jfbnb.core.models import Model, Restorer, Result
from jfbnb.core.operators import LinearOperator
from jfbnb.training.methods import METHODS, Method, Settings, get_method
from jfbnb.training.tuning import Tuning, check_settings
from jfbnb.training.weights import building, load_denoiser, load_weights, read_card

RELEASED = Path(__file__).parents[1] / "weights"  # networks of the paper's kind, in the package
BEST = RELEASED / "best"  # the networks that restore pictures: profile `best`


def check_noise(noise_std: float) -> None:
    """Raise UserError unless the noise level is plausible for an image in [0, 1]."""
    # Below 1e-5 its square, which the methods use, would vanish in float32.
    try:
        found = 1e-5 <= float(noise_std) <= 1
    except (TypeError, ValueError):
        found = False
    if not found:
        raise UserError(f"noise std {noise_std}: give one from 1e-5 to 1, for pixel values in "
                        "[0, 1], e.g. 0.01")


def make_methods(names: list[str], weights: Path | None,
                 device: torch.device) -> dict[str, Restorer]:
    """The named methods, with the files that a run stored in the folder `weights`, or as released.

    The released networks are those of profile `best`, or the paper's for methods that `best` lacks.
    A trained method needs NAME.safetensors and its model card NAME.json in the folder. The others
    need tuning.json and, if they have a network, denoiser.safetensors. If the noise level is not
    that of the tuning, the weight of the prior is adapted (`Method.noise_power`). DE-PROX and DnCNN
    have no such weight, so they do not adapt.

    Raises:
        UserError: for an unknown name, or if a file that a method needs is missing.
    """
    methods = [get_method(name) for name in names]
    return {method.name: _make_method(method, weights or _released(method), device)
            for method in methods}


def expected_methods(weights: Path | None) -> list[str]:
    """The methods that have weights or settings, released or in that folder, or need none."""
    stored = set()
    for folder in (RELEASED, weights or BEST):
        stored |= {path.stem for path in folder.glob("*.safetensors")}
        with contextlib.suppress(UserError):
            stored |= Tuning.load(folder / "tuning.json").chosen.keys()
    return [name for name, m in METHODS.items()
            if name in stored or (not m.trainable and m.candidates(0.01, 1) == [{}])]


def load_model(method: Method, weights: Path) -> Model:
    """A method's model with the weights in a folder, without an operator: see `Model.on`.

    Raises:
        UserError: if the weights or settings are missing or damaged.
    """
    return _build(method, _settings(method, weights)[0], weights)


def _released(method: Method) -> Path:
    found = method.trainable and (BEST / f"{method.name}.safetensors").is_file()
    return BEST if found else RELEASED


def _settings(method: Method, weights: Path) -> tuple[Settings, float]:
    """A method's settings in a folder, and the noise level for which they were chosen."""
    if not method.trainable:
        tuning = Tuning.load(weights / "tuning.json")
        return tuning.settings(method), tuning.noise_std
    file = weights / f"{method.name}.json"
    card = read_card(file)
    noise_std = card.get("noise_std")
    return check_settings(method, card.get("settings"), noise_std, f"the card {file}"), noise_std


def _build(method: Method, settings: Settings, weights: Path) -> Model:
    with building():
        if not method.trainable:
            D = load_denoiser(weights / "denoiser.safetensors")
            return method.build(None, D.network, settings)
        file = weights / f"{method.name}.safetensors"
        model = load_weights(file, lambda network: method.build(None, network, settings))
    if not torch.as_tensor(getattr(model.T, "tau", 1.0)).isfinite():  # its logarithm may be
        raise UserError(f"the weights {file} have a tau that is not finite: download or train them "
                        "again")
    return model


def _make_method(method: Method, weights: Path, device: torch.device) -> Restorer:
    settings, noise_std = _settings(method, weights)
    model = None if method.restore else _build(method, settings, weights).to(device)
    stored = _Stored(method.name, settings, noise_std, model)
    return Restorer(stored.restore, None if model is None else stored.on)


@dataclass(frozen=True)
class _Stored:
    """A method's name, settings and perhaps its model; unlike a `Method`, it can be pickled."""

    name: str
    settings: Settings
    noise_std: float
    model: Model | None

    def prior_scale(self, noise_std: float) -> float:
        return (noise_std / self.noise_std) ** METHODS[self.name].noise_power

    def on(self, A: LinearOperator, noise_std: float) -> Model:
        return self.model.on(A, self.prior_scale(noise_std))

    def restore(self, A: LinearOperator, d: Tensor, noise_std: float) -> Result:
        check_noise(noise_std)
        if self.model is None:
            return METHODS[self.name].restore(A, d, self.settings, self.prior_scale(noise_std))
        return self.on(A, noise_std)(d)
