"""Every method by its name: how it restores an image, and the loss that trains it."""

import copy
import json
import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from jfbnb.baselines import (
    direct_inverse,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
)
from jfbnb.common import ROOT, UserError, atomic_write
from jfbnb.explicit import deep_unrolling, feedforward, feedforward_head
from jfbnb.fixed_point import SolveInfo, anderson
from jfbnb.maps import MAPS, ImplicitMap
from jfbnb.networks import Regulariser, load_regulariser
from jfbnb.operators import Blur
from jfbnb.training import EquilibriumLoss, FeedforwardLoss, UnrolledLoss

# The power of the noise level that the weight of the prior goes with. 2 is theory (see
# `matched_sigma`) and best for the equilibria; these two do better with less, which was found on
# validation images at 0.002 to 0.05.
NOISE_POWER = {"feedforward-tikhonov": 1.5, "unrolled": 1.0}
RELEASED = ROOT / "data" / "weights"

Settings = dict[str, float]

LABELS = {
    "measurement": "Noisy blurred",
    "direct-inverse": "Direct inverse",
    "gradient-descent": "Gradient descent",
    "tikhonov": "Tikhonov",
    "total-variation": "Total variation",
    "plug-and-play": "Plug-and-play",
    "feedforward": "DnCNN",
    "feedforward-tikhonov": "Tikhonov + DnCNN",
    "feedforward-tikhonov-head": "Tikhonov + 2 DnCNN",
    "unrolled": "Deep unrolling",
    "de-grad": "DE-GRAD",
    "de-prox": "DE-PROX",
    "de-admm": "DE-ADMM",
    "deq": "Deep equilibrium",
    "deq-head": "Deep equilibrium + head",
    "jfb": "JFB",
    "jfb-head": "JFB + head",
}
# Those that end in a second network, H, and the method whose output it acts on. Both halves are
# trained together and share a file.
HEADS = {"feedforward-tikhonov-head": "feedforward-tikhonov", "deq-head": "deq", "jfb-head": "jfb"}
# The maps and the gradients behind those that are solved for a fixed point. `jfb` and `deq` are
# the same network, trained by JFB and by the exact gradient; de-* are section 3.3's, by JFB.
EQUILIBRIA = {
    "plug-and-play": ("splitting", ""),
    "de-grad": ("gradient", "jfb"),
    "de-prox": ("proximal", "jfb"),
    "de-admm": ("admm", "jfb"),
    "deq": ("splitting", "implicit"),
    "jfb": ("splitting", "jfb"),
}
TRAINED = ("feedforward", "feedforward-tikhonov", "unrolled", "de-grad", "de-prox", "de-admm",
           "deq", "jfb")
# What each method must be told, as chosen on validation images. tau and sigma are a
# regulariser's; trained weights bring their own.
SETTINGS: dict[str, tuple[str, ...]] = {
    "measurement": (),
    "direct-inverse": (),
    "gradient-descent": ("steps", "step_size"),
    "tikhonov": ("lam",),
    "total-variation": ("weight",),
    "plug-and-play": ("tau", "sigma"),
    "feedforward": ("sigma",),
    "feedforward-tikhonov": ("lam", "sigma"),
    "unrolled": ("tau", "sigma", "iterations"),
    "de-grad": ("tau", "sigma", "eta"),
    "de-prox": ("sigma", "eta"),
    "de-admm": ("tau", "sigma"),
    "deq": ("tau", "sigma"),
    "jfb": ("tau", "sigma"),
}


@dataclass(frozen=True)
class Method:
    """A method, ready to use: (A, d, noise_std) -> (image, what its solver says or None).

    One with a head is a method `base` and what the head makes of its image, (A, y, d, noise_std)
    -> image. Whoever has the first's image already need not solve for it again.
    """

    restore: Callable[[Blur, Tensor, float], tuple[Tensor, SolveInfo | None]]
    base: str | None = None
    head: Callable[[Blur, Tensor, Tensor, float], Tensor] | None = None

    def __call__(self, A: Blur, d: Tensor, noise_std: float) -> tuple[Tensor, SolveInfo | None]:
        y, info = self.restore(A, d, noise_std)
        return (y if self.head is None else self.head(A, y, d, noise_std)), info


@dataclass
class Tuning:
    """Each method's settings, chosen on validation images, with the searches that chose them.

    Args:
        noise_std: of the measurements, on images in [0, 1].
        images: how many validation images the searches scored.
        chosen: for each method the settings with the highest mean PSNR.
        searches: for each method what was tried: its settings and their "psnr" in dB.
    """

    noise_std: float
    images: int
    chosen: dict[str, Settings]
    searches: dict[str, list[Settings]]

    def search(self, method: str, candidates: list[Settings],
               score: Callable[[Settings], float]) -> Settings:
        """Score every candidate, keep them all, choose the best."""
        tried = [{**candidate, "psnr": score(candidate)} for candidate in candidates]
        self.searches[method] = tried
        best = max(range(len(tried)), key=lambda i: tried[i]["psnr"])
        self.chosen[method] = candidates[best]
        return candidates[best]

    def settings(self, method: str) -> Settings:
        """Raises UserError where a setting that the method needs is missing."""
        chosen = self.chosen.get(method, {})
        missing = [name for name in SETTINGS[method] if name not in chosen]
        if missing:
            raise UserError(f"the tuning has no {' and no '.join(missing)} for {method}: run the "
                            "earlier notebooks, in order, or `jfbnb reproduce`")
        return chosen

    def save(self, path: Path) -> None:
        atomic_write(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "Tuning":
        """Raises UserError if the file is missing or not a tuning."""
        if not path.is_file():
            raise UserError(f"no tuned parameters at {path}: run the earlier notebooks, in order, "
                            "or `jfbnb reproduce`")
        try:
            tuning = Tuning(**json.loads(path.read_text()))
            values = [v for settings in tuning.chosen.values() for v in settings.values()]
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} holds no tuned parameters ({error})") from error
        for value in (tuning.noise_std, *values):
            if type(value) not in (int, float) or not 0 < value <= 1e5:
                raise UserError(f"{path} holds no tuned parameters ({reprlib.repr(value)} is no "
                                "number between 0 and 1e5)")
        return tuning


# --- restoring ----------------------------------------------------------------------------------


def make_map(name: str, A: nn.Module, S: Regulariser, settings: Settings) -> ImplicitMap:
    """The map T_Theta(.; d) that the method iterates."""
    kind = MAPS[EQUILIBRIA[name][0] if name in EQUILIBRIA else "splitting"]
    return kind(A, S, settings["eta"]) if "eta" in SETTINGS[name] else kind(A, S)


def solve(T: ImplicitMap, d: Tensor, tolerance: float = 1e-4,
          max_iterations: int = 100) -> tuple[Tensor, SolveInfo]:
    """The implicit network N(d) = x* (Eq. 3), by Anderson acceleration."""
    state, info = anderson(T, T.start(d), tolerance, max_iterations, given=d)
    return T.image(state), info


def make_regulariser(network: nn.Module, settings: Settings, head: bool = False) -> Regulariser:
    """S from a network and a method's settings; what a method does not use is 1.

    Args:
        head: add one, which starts as a copy of the network.
    """
    S = Regulariser(network, settings.get("tau", 1.0), settings["sigma"],
                    copy.deepcopy(network) if head else None)
    return S.to(next(network.parameters()).device)


@torch.no_grad()
def restore(name: str, A: Blur, S: Regulariser, d: Tensor, settings: Settings,
            max_iterations: int = 100) -> tuple[Tensor, SolveInfo | None]:
    """Apply a method that has a network and no head, with the weights and the tau of S."""
    if name.startswith("feedforward"):
        return feedforward(A, S, d, settings.get("lam")), None
    T = make_map(name, A, S, settings)
    if name == "unrolled":
        return deep_unrolling(T, d, int(settings["iterations"])), None
    return solve(T, d, max_iterations=max_iterations)


@torch.no_grad()
def apply_head(name: str, A: Blur, S: Regulariser, y: Tensor, d: Tensor) -> Tensor:
    """What the head of S makes of y, the image that the method before it restored from d."""
    if name.startswith("feedforward"):
        return feedforward_head(S, y)
    return make_map(HEADS[name], A, S, {}).predict(y, d)


def make_methods(names: list[str], weights: Path, device: torch.device) -> dict[str, Method]:
    """The named methods, with what a run stored in the folder `weights`.

    That folder holds tuning.json, denoiser.safetensors (plug-and-play), and NAME.safetensors of
    each trained method. At another noise level than the tuned one the weight of the prior goes
    with the noise's variance (but see `NOISE_POWER`), and early stopping with its inverse: the
    direction with squared singular value s^2 is recovered after about 1 / s^2 steps, and lam plays
    the part of the smallest s^2 that is. What has no such weight, DE-PROX and DnCNN alone, stays
    as trained.

    Raises:
        UserError: for an unknown name, or where a file that a method needs is missing.
    """
    for name in names:
        if name not in LABELS:
            raise UserError(f"unknown method {name!r}: choose from {', '.join(LABELS)}")
    tuning = Tuning.load(weights / "tuning.json")
    return {name: _make_method(name, tuning, weights, device) for name in names}


def _make_method(name: str, tuning: Tuning, weights: Path, device: torch.device) -> Method:
    trained = HEADS.get(name, name)
    settings = tuning.settings(trained)
    if name == "plug-and-play":
        S = make_regulariser(load_regulariser(weights / "denoiser.safetensors").network, settings)
    elif trained in TRAINED:
        S = load_regulariser(weights / f"{trained}.safetensors")
    else:
        S = None
    if name in HEADS and S.head is None:
        raise UserError(f"the weights {weights / trained}.safetensors have no head: {name} needs "
                        "one")

    def scale(noise_std: float) -> float:
        return (noise_std / tuning.noise_std) ** NOISE_POWER.get(trained, 2.0)

    def scaled(noise_std: float) -> Regulariser:
        tau = S.tau.item() * scale(noise_std)
        return Regulariser(S.network, tau, S.sigma.item(), S.head).to(device)

    def method(A: Blur, d: Tensor, noise_std: float) -> tuple[Tensor, SolveInfo | None]:
        if S is None:
            return _classical(name, A, d, settings, scale(noise_std))
        own = dict(settings)
        if "lam" in own:
            own["lam"] *= scale(noise_std)
        return restore(trained, A, scaled(noise_std), d, own)

    if name not in HEADS:
        return Method(method)
    return Method(method, trained, lambda A, y, d, noise_std: apply_head(
        name, A, scaled(noise_std), y, d))


@torch.no_grad()
def _classical(name: str, A: Blur, d: Tensor, settings: Settings,
               ratio: float) -> tuple[Tensor, SolveInfo | None]:
    if name == "measurement":
        return d, None
    if name == "direct-inverse":
        return direct_inverse(A, d), None
    if name == "tikhonov":
        return tikhonov(A, d, settings["lam"] * ratio), None
    if name == "total-variation":
        return total_variation(A, d, settings["weight"] * ratio)
    steps = min(round(settings["steps"] / ratio), 100_000)
    return tikhonov_gradient_descent(A, d, 0.0, settings["step_size"], steps), None


# --- training -----------------------------------------------------------------------------------


def make_loss(name: str, A: nn.Module, S: Regulariser, settings: Settings,
              jfb: EquilibriumLoss) -> EquilibriumLoss | FeedforwardLoss | UnrolledLoss:
    """The loss that trains the named method.

    Args:
        A: the blur of the training crops.
        jfb: JFB's own loss, for what all methods have in common: the noise, the precision, the
            solver's and the penalty's settings.
    """
    if name.startswith("feedforward"):
        return FeedforwardLoss(A, S, jfb.noise_std, settings.get("lam"), jfb.bf16)
    T = make_map(name, A, S, settings)
    if name == "unrolled":
        return UnrolledLoss(T, jfb.noise_std, int(settings["iterations"]), jfb.bf16)
    return replace(jfb, T=T, gradient=EQUILIBRIA[name][1])
