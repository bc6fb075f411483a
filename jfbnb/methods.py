"""Every method, one entry each: what it is called, what is tuned, how it restores, what trains it.

All that lists, tunes, trains, evaluates or draws methods goes through `METHODS`. To add one, add an
entry: here, or by `register` in a package of your own. A package that declares the entry point

    [project.entry-points."jfbnb.methods"]
    mine = "my_package"

is imported wherever it is installed, by the command and in notebooks that papermill runs, and may
`register` its methods then.
"""

import contextlib
import itertools
import json
import math
import reprlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import Tensor, nn

from jfbnb.baselines import (
    direct_inverse,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
)
from jfbnb.common import UserError, atomic_write
from jfbnb.maps import ADMMMap, EnergyMap, GradientMap, ProximalMap, SplittingMap
from jfbnb.metrics import psnr
from jfbnb.models import Equilibrium, Feedforward, Model, Result, Unrolled
from jfbnb.networks import Denoiser, load_denoiser, load_weights, matched_sigma
from jfbnb.operators import LinearOperator
from jfbnb.training import (
    EquilibriumLoss,
    ExplicitLoss,
    ImplicitLoss,
    LossSettings,
)

RELEASED = Path(__file__).parent / "weights"  # the paper's networks, which come with the package
BEST = RELEASED / "best"  # those to restore with: profile `best`

Settings = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to restore an image. It has `restore`, or a `model` of a network, or is `behind` one.

    Args:
        name: on the command line and in files; label and colour: in tables and figures.
        restore: (A, d, settings, ratio) -> (image, what its solver says or None). `ratio` is how
            many times as much the prior weighs as at the noise level of the tuning.
        model: (A, D, settings) -> `Model`, for those that have a network. A is None while weights
            are loaded, so nothing may be derived from it here.
        loss: (model, settings) -> the loss that trains the model, as in `jfbnb.training`. Without
            one the method uses the pretrained denoiser as it is.
        head: whether a second network is trained along.
        behind: the method whose second network this one is.
        candidates: (noise level, about how many) -> settings to choose from on validation images.
        tuned_as: another method with the same candidates and, untrained, the same images.
        noise_power: the weight of the prior goes with this power of the noise level. 2 is theory
            (see `matched_sigma`) and best for the equilibria. Other powers fit what was best on
            CelebA's validation images at noise levels of 0.002 to 0.05.
        compared: whether it is in the figures that set methods side by side, image by image and
            under other conditions.
        smooth: whether its network must have a continuous derivative, which ReLUs have not.
    """

    name: str
    label: str
    colour: str
    restore: Callable[[LinearOperator, Tensor, Settings, float], Result] | None = None
    model: Callable[[LinearOperator, Denoiser, Settings], Model] | None = None
    loss: Callable[[Model, LossSettings], Callable] | None = None
    head: bool = False
    behind: "Method | None" = None
    candidates: Callable[[float, int], list[Settings]] = field(default=lambda noise_std, n: [{}])
    tuned_as: "Method | None" = None
    noise_power: float = 2.0
    compared: bool = True
    smooth: bool = False

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.restore, self.model, self.behind)) != 1:
            raise UserError(f"method {self.name!r}: give one of restore, model and behind")
        if self.loss and not self.model:
            raise UserError(f"method {self.name!r} has a loss, but no model to train")
        if self.behind and not self.behind.head:
            raise UserError(f"method {self.name!r} is behind {self.behind.name!r}, which has no "
                            "head")

    @property
    def trainable(self) -> bool:
        """Whether it has weights of its own."""
        return self.loss is not None

    def takes(self, network: nn.Module) -> bool:
        """Whether such a network will do."""
        return getattr(network, "smooth", False) or not self.smooth

    def build(self, A: LinearOperator | None, network: nn.Module, settings: Settings,
              head: nn.Module | None = None) -> Model:
        """Its model, of a network and settings, on the network's device; with a head if given."""
        like = next(network.parameters(), torch.empty(()))
        model = self.model(A, Denoiser(network, settings.get("sigma", 0.0)), settings)
        model.to(like.device)  # not of its type: an operator keeps its float64
        return model if head is None else model.add_head(head)


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known. Raises UserError for a name, label or colour that is taken."""
    if method.name == "denoiser" or not method.name.isprintable() or "/" in method.name:
        raise UserError(f"method {method.name!r}: its name is that of a file; choose another")
    for other in METHODS.values():
        if any(getattr(method, part).lower() == getattr(other, part).lower()
               for part in ("name", "label", "colour")):
            raise UserError(f"method {method.name!r}: {other.name!r} has the same name, label or "
                            "colour")
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Look up a method. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def plugins() -> list[Method]:
    """The methods that were registered from outside the package."""
    return [method for name, method in METHODS.items() if name not in OWN]


# --- the methods --------------------------------------------------------------------------------
# Classical ones, plug-and-play and JFB have Okabe and Ito's colours, safe for colour-blind eyes. An
# equilibrium has its map's colour. jfb and deq are one map, trained by two gradients.


def grid(n: int, **ranges: tuple[float, float]) -> list[Settings]:
    """About n settings, evenly spaced on logarithmic axes from the low to the high end of each."""
    each = max(1, math.floor(n ** (1 / len(ranges)) + 1e-9))
    axes = [torch.logspace(math.log10(low), math.log10(high), each, dtype=torch.float64).tolist()
            for low, high in ranges.values()]
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*axes)]


def prior(noise_std: float, n: int, **more: float) -> list[Settings]:
    """Weights tau, each with the noise level of the denoiser that goes with it."""
    return [{**s, "sigma": matched_sigma(noise_std, s["tau"]), **more}
            for s in grid(n, tau=(1e-2, 10**-0.5))]


def _stopped_descent(A: LinearOperator, d: Tensor, settings: Settings, ratio: float) -> Result:
    # The direction with squared singular value s^2 is recovered after about 1 / s^2 steps, and lam
    # plays the part of the smallest s^2 that is: the steps go with the inverse of the ratio.
    steps = min(round(settings["steps"] / ratio), 100_000)
    return tikhonov_gradient_descent(A, d, 0.0, settings["step_size"], steps), None


register(Method(
    name="measurement", compared=False, label="Noisy blurred", colour="#999999",
    restore=lambda A, d, s, ratio: (A.guess(d), None)))
register(Method(
    name="direct-inverse", compared=False, label="Direct inverse", colour="#CC79A7",
    restore=lambda A, d, s, ratio: (direct_inverse(A, d), None)))
# For white images lam would go with the noise's variance. But less noise lets finer detail through,
# and images have the less of it the finer it is: so the best weights fall more slowly.
register(Method(
    name="gradient-descent", compared=False, label="Gradient descent", colour="#E69F00",
    restore=_stopped_descent, noise_power=1.25,
    candidates=lambda noise_std, n: [{"steps": steps, "step_size": 1.0} for steps in sorted(
        {round(s["steps"]) for s in grid(n, steps=(1, 3 / noise_std))})]))
register(Method(
    name="tikhonov", label="Tikhonov", colour="#D55E00", noise_power=1.0,
    restore=lambda A, d, s, ratio: (tikhonov(A, d, s["lam"] * ratio), None),
    candidates=lambda noise_std, n: grid(n, lam=(0.1 * noise_std, 10 * noise_std))))
register(Method(
    name="total-variation", label="Total variation", colour="#009E73", noise_power=1.5,
    restore=lambda A, d, s, ratio: total_variation(A, d, s["weight"] * ratio),
    candidates=lambda noise_std, n: grid(n, weight=(10**-0.5 * noise_std**1.5,
                                                    10 * noise_std**1.5))))
PLUG_AND_PLAY = register(Method(
    name="plug-and-play", label="Plug-and-play", colour="#56B4E9", candidates=prior,
    model=lambda A, D, s: Equilibrium(SplittingMap(A, D, s["tau"]))))
register(Method(
    name="feedforward", compared=False, label="DnCNN", colour="#B8A000",
    candidates=lambda noise_std, n: grid(n, sigma=(1e-3, 1e-1)),
    model=lambda A, D, s: Feedforward(A, D), loss=ExplicitLoss))
TIKHONOV_NETWORK = register(Method(
    name="feedforward-tikhonov", label="Tikhonov + DnCNN", colour="#8C510A", head=True,
    candidates=lambda noise_std, n: grid(n, lam=(1.5e-3, 6e-3), sigma=(0.03, 0.1)),
    noise_power=1.5,
    model=lambda A, D, s: Feedforward(A, D, s["lam"]), loss=ExplicitLoss))
register(Method(
    name="feedforward-tikhonov-head", label="Tikhonov + 2 DnCNN", colour="#DFC27D",
    behind=TIKHONOV_NETWORK))
register(Method(
    name="unrolled", label="Deep unrolling", colour="#762A83", noise_power=1.0,
    candidates=lambda noise_std, n: prior(noise_std, n, iterations=5),
    model=lambda A, D, s: Unrolled(SplittingMap(A, D, s["tau"]), int(s["iterations"])),
    loss=ExplicitLoss))
register(Method(
    name="de-grad", compared=False, label="DE-GRAD", colour=GradientMap.colour,
    candidates=lambda noise_std, n: prior(noise_std, n, eta=1.0),
    model=lambda A, D, s: Equilibrium(GradientMap(A, D, s["tau"], s["eta"])),
    loss=EquilibriumLoss))
register(Method(
    name="de-prox", compared=False, label="DE-PROX", colour=ProximalMap.colour,
    candidates=lambda noise_std, n: grid(n, eta=(1.0, 1.9), sigma=(0.02, 0.08)),
    model=lambda A, D, s: Equilibrium(ProximalMap(A, D, s["eta"])), loss=EquilibriumLoss))
register(Method(
    name="de-admm", compared=False, label="DE-ADMM", colour=ADMMMap.colour,
    candidates=prior, model=lambda A, D, s: Equilibrium(ADMMMap(A, D, s["tau"])),
    loss=EquilibriumLoss))
DEQ = register(Method(
    name="deq", label="Deep equilibrium", colour="#000000", head=True, candidates=prior,
    tuned_as=PLUG_AND_PLAY, model=PLUG_AND_PLAY.model, loss=ImplicitLoss))
register(Method(name="deq-head", label="Deep equilibrium + head", colour="#777777", behind=DEQ))
JFB = register(Method(
    name="jfb", label="JFB", colour=SplittingMap.colour, head=True, candidates=prior,
    tuned_as=PLUG_AND_PLAY, model=PLUG_AND_PLAY.model, loss=EquilibriumLoss))
register(Method(name="jfb-head", label="JFB + head", colour="#7FB8DE", behind=JFB))
register(Method(
    name="jfb-energy", label="JFB, energy", colour=EnergyMap.colour, compared=False, smooth=True,
    candidates=prior, tuned_as=PLUG_AND_PLAY, loss=EquilibriumLoss,
    model=lambda A, D, s: Equilibrium(EnergyMap(A, D, s["tau"]))))


# --- tuning -------------------------------------------------------------------------------------


@dataclass
class Tuning:
    """Each method's settings, chosen on validation images, with the searches that chose them.

    Args:
        noise_std: of the measurements, on images in [0, 1].
        images: how many validation images the searches scored.
        chosen: for each method the settings with the highest mean PSNR.
        searches: for each method what was tried: its settings, and figures with their "psnr" in dB.
    """

    noise_std: float
    images: int
    chosen: dict[str, Settings] = field(default_factory=dict)
    searches: dict[str, list[Settings]] = field(default_factory=dict)

    def search(self, method: str, candidates: list[Settings],
               score: Callable[[Settings], dict[str, float]]) -> Settings:
        """Score every candidate, keep them all, choose the one with the highest "psnr"."""
        tried = [{**candidate, **score(candidate)} for candidate in candidates]
        self.searches[method] = tried
        best = max(range(len(tried)), key=lambda i: (tried[i]["psnr"] == tried[i]["psnr"],
                                                     tried[i]["psnr"]))  # NaN is worst
        self.chosen[method] = candidates[best]
        return candidates[best]

    def settings(self, method: Method) -> Settings:
        """Raises UserError where a setting that the method needs is missing."""
        chosen = self.chosen.get((method.tuned_as or method).name, {})
        missing = [k for k in method.candidates(self.noise_std, 1)[0] if k not in chosen]
        if missing:
            raise UserError(f"the tuning has no {' and no '.join(missing)} for {method.name}: run "
                            "the earlier notebooks, in order, or `jfbnb reproduce`")
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
            tuning = Tuning(**json.loads(path.read_text(encoding="utf-8")))
            values = [v for settings in tuning.chosen.values() for v in settings.values()]
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} holds no tuned parameters ({error})") from error
        for value in (tuning.noise_std, *values):
            if type(value) not in (int, float) or not 0 < value <= 1e5:
                raise UserError(f"{path} holds no tuned parameters ({reprlib.repr(value)} is no "
                                "number between 0 and 1e5)")
        return tuning


@torch.no_grad()
def tune(method: Method, tuning: Tuning, A: LinearOperator, d: Tensor, x: Tensor, n: int,
         network: nn.Module | None = None, max_iterations: int = 15) -> Settings:
    """Search about n settings of a method, before any training, on images x measured as d.

    Args:
        network: the pretrained denoiser's, for those that have one.
        max_iterations: of a method's fixed-point solver.
    """
    def score(settings: Settings) -> dict[str, float]:
        if method.restore:
            y, info = method.restore(A, d, settings, 1.0)
        else:
            model = method.build(A, network, settings)
            model.max_iterations = max_iterations
            y, info = model(d)
        figures = {"psnr": psnr(A.visible(y), A.visible(x)).mean().item()}
        if info is not None:
            figures["converged"] = info.converged.float().mean().item()
        return figures

    return tuning.search(method.name, method.candidates(tuning.noise_std, n), score)


# --- restoring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Restorer:
    """A method, ready to use: (A, d, noise_std) -> (image, what its solver says or None).

    One with a head is the method `base` and what the head makes of its image, (A, y, d, noise_std)
    -> image. Whoever has the first's image already need not solve for it again. One without a head
    that has a network has its `model` too, (A, noise_std) -> `Model`, to be solved in another way.
    """

    restore: Callable[[LinearOperator, Tensor, float], Result]
    base: str = ""
    head: Callable[[LinearOperator, Tensor, Tensor, float], Tensor] | None = None
    model: Callable[[LinearOperator, float], Model] | None = None

    @torch.no_grad()
    def __call__(self, A: LinearOperator, d: Tensor, noise_std: float) -> Result:
        y, info = self.restore(A, d, noise_std)
        return (y if self.head is None else self.head(A, y, d, noise_std)), info


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
    own = {name: method.behind or method for name, method in METHODS.items()}
    return [name for name, m in own.items()
            if m.name in stored or (not m.trainable and m.candidates(0.01, 1) == [{}])]


def _released(method: Method) -> Path:
    found = method.trainable and (BEST / f"{method.name}.safetensors").is_file()
    return BEST if found else RELEASED


def _make_method(method: Method, weights: Path, device: torch.device) -> Restorer:
    own, tuning = method.behind or method, Tuning.load(weights / "tuning.json")
    settings = tuning.settings(own)

    def ratio(noise_std: float) -> float:
        return (noise_std / tuning.noise_std) ** own.noise_power

    if own.restore:
        return Restorer(lambda A, d, noise_std: own.restore(A, d, settings, ratio(noise_std)))
    model = load_model(own, settings, weights).to(device)
    if method.behind is None:
        return Restorer(lambda A, d, noise_std: model.on(A, ratio(noise_std))(d),
                        model=lambda A, noise_std: model.on(A, ratio(noise_std)))
    if model.H is None:
        raise UserError(f"the weights {weights / own.name}.safetensors have no head: "
                        f"{method.name} needs one")
    return Restorer(lambda A, d, noise_std: model.on(A, ratio(noise_std))(d), own.name,
                    lambda A, y, d, noise_std: model.on(A, ratio(noise_std)).predict(y, d))


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


OWN = frozenset(METHODS)  # the names of those above
for _found in entry_points(group="jfbnb.methods"):
    try:
        _found.load()
    except Exception as _error:  # of somebody else's: the methods here work without it
        warnings.warn(f"the method {_found.value} cannot be used: {_error}", stacklevel=1)
