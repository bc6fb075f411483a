"""The registry of methods: for each its name, its tuning, how it restores, and its training loss.

To add a method, add an entry to `METHODS` here, or call `register` in a package of your own. A
package that declares the entry point

    [project.entry-points."jfbnb.methods"]
    mine = "my_package"

is imported if it is installed, so that it can `register` its methods.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points

import torch
from torch import Tensor, nn

from jfbnb.common import UserError
from jfbnb.core.baselines import (
    direct_inverse,
    tikhonov,
    tikhonov_gradient_descent,
    total_variation,
)
from jfbnb.core.denoisers import Denoiser, matched_sigma
from jfbnb.core.maps import ADMMMap, EnergyMap, GradientMap, ProximalMap, SplittingMap
from jfbnb.core.models import Annealed, Equilibrium, Feedforward, Model, Result, Unrolled
from jfbnb.core.operators import LinearOperator
from jfbnb.training.losses import EquilibriumLoss, ExplicitLoss, ImplicitLoss, LossSettings

Settings = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to restore an image: by `restore`, or by a `model` of a network.

    Args:
        name: on the command line and in files; label and colour: in tables and figures.
        restore: (A, d, settings, prior_scale) -> (image, SolveInfo or None). The weight of the
            prior is multiplied by `prior_scale`, which is 1 at the noise level of the tuning.
        model: (A, D, settings) -> `Model`, for a method with a network. A is None while weights
            are loaded, so nothing may be derived from it.
        loss: (model, settings) -> the loss that trains the model, as in `losses`. Without one the
            method uses the pretrained denoiser unchanged.
        candidates: (noise level, n) -> about n settings to choose from on validation images.
        shares_tuning_with: another method with the same candidates and, untrained, the same images.
        noise_power: the weight of the prior is proportional to this power of the noise level. 2 is
            theory (see `matched_sigma`) and best for the equilibria. Other powers were fitted on
            CelebA's validation images at noise levels of 0.002 to 0.05.
        compared: whether it is in the figures that compare methods image by image and under other
            conditions.
        smooth: whether its network must have a continuous derivative, which ReLU networks lack.
    """

    name: str
    label: str
    colour: str
    restore: Callable[[LinearOperator, Tensor, Settings, float], Result] | None = None
    model: Callable[[LinearOperator, Denoiser, Settings], Model] | None = None
    loss: Callable[[Model, LossSettings], Callable] | None = None
    candidates: Callable[[float, int], list[Settings]] = field(default=lambda noise_std, n: [{}])
    shares_tuning_with: "Method | None" = None
    noise_power: float = 2.0
    compared: bool = True
    smooth: bool = False

    def __post_init__(self) -> None:
        if (self.restore is None) == (self.model is None):
            raise UserError(f"method {self.name!r}: give either restore or model")
        if self.loss and not self.model:
            raise UserError(f"method {self.name!r} has a loss, but no model to train: give one")

    @property
    def trainable(self) -> bool:
        """Whether it is trained, and so has its own weights."""
        return self.loss is not None

    def takes(self, network: nn.Module) -> bool:
        """Whether the method can use such a network."""
        return getattr(network, "smooth", False) or not self.smooth

    def build(self, A: LinearOperator | None, network: nn.Module, settings: Settings) -> Model:
        """Its model, made from a network and settings, on the network's device."""
        like = next(network.parameters(), torch.empty(()))
        model = self.model(A, Denoiser(network, settings.get("sigma", 0.0)), settings)
        model.to(like.device)  # not to its dtype: an operator keeps float64
        return model


METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Add a method to `METHODS`. Raises UserError for a name, label or colour in use."""
    if method.name == "denoiser" or not method.name.isprintable() or "/" in method.name:
        raise UserError(f"method {method.name!r}: its name cannot name a file; choose another")
    for other in METHODS.values():
        if any(getattr(method, part).lower() == getattr(other, part).lower()
               for part in ("name", "label", "colour")):
            raise UserError(f"method {method.name!r}: {other.name!r} has the same name, label or "
                            "colour; choose another")
    METHODS[method.name] = method
    return method


def get_method(name: str) -> Method:
    """Look up a method. Raises UserError for an unknown name."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}: choose from {', '.join(METHODS)}")
    return METHODS[name]


def grid(n: int, **ranges: tuple[float, float]) -> list[Settings]:
    """About n settings on a grid, logarithmically spaced over each range (low, high)."""
    each = max(1, math.floor(n ** (1 / len(ranges)) + 1e-9))
    axes = [torch.logspace(math.log10(low), math.log10(high), each, dtype=torch.float64).tolist()
            for low, high in ranges.values()]
    return [dict(zip(ranges, values, strict=True)) for values in itertools.product(*axes)]


def prior(noise_std: float, n: int, **more: float) -> list[Settings]:
    """Candidates for tau, each with the denoiser's matching noise level."""
    return [{**s, "sigma": matched_sigma(noise_std, s["tau"]), **more}
            for s in grid(n, tau=(1e-2, 10**-0.5))]


def _stopped_descent(A: LinearOperator, d: Tensor, settings: Settings,
                     prior_scale: float) -> Result:
    # A direction with squared singular value s^2 is recovered after about 1 / s^2 steps. lam is the
    # smallest s^2 that is recovered, so the number of steps is inversely proportional to it.
    steps = min(round(settings["steps"] / prior_scale), 100_000)
    return tikhonov_gradient_descent(A, d, 0.0, settings["step_size"], steps), None


# Classical methods, plug-and-play and JFB have Okabe and Ito's colours, safe for colour-blind
# readers; an equilibrium has its map's colour.
register(Method(
    name="measurement", compared=False, label="Noisy blurred", colour="#999999",
    restore=lambda A, d, s, prior_scale: (A.guess(d), None)))
register(Method(
    name="direct-inverse", compared=False, label="Direct inverse", colour="#CC79A7",
    restore=lambda A, d, s, prior_scale: (direct_inverse(A, d), None)))
# For white images lam would be proportional to the noise's variance. Images have less fine detail,
# so the best weights decrease more slowly with the noise.
register(Method(
    name="gradient-descent", compared=False, label="Gradient descent", colour="#E69F00",
    restore=_stopped_descent, noise_power=1.25,
    candidates=lambda noise_std, n: [{"steps": steps, "step_size": 1.0} for steps in sorted(
        {round(s["steps"]) for s in grid(n, steps=(1, 3 / noise_std))})]))
register(Method(
    name="tikhonov", label="Tikhonov", colour="#D55E00", noise_power=1.0,
    restore=lambda A, d, s, prior_scale: (tikhonov(A, d, s["lam"] * prior_scale), None),
    candidates=lambda noise_std, n: grid(n, lam=(0.1 * noise_std, 10 * noise_std))))
register(Method(
    name="total-variation", label="Total variation", colour="#009E73", noise_power=1.5,
    restore=lambda A, d, s, prior_scale: total_variation(A, d, s["weight"] * prior_scale),
    candidates=lambda noise_std, n: grid(n, weight=(10**-0.5 * noise_std**1.5,
                                                    10 * noise_std**1.5))))
PLUG_AND_PLAY = register(Method(
    name="plug-and-play", label="Plug-and-play", colour="#56B4E9", candidates=prior,
    model=lambda A, D, s: Equilibrium(SplittingMap(A, D, s["tau"]))))
PLUG_AND_PLAY_ADMM = register(Method(
    name="plug-and-play-admm", label="Plug-and-play, ADMM", colour="#01665E", candidates=prior,
    model=lambda A, D, s: Equilibrium(ADMMMap(A, D, s["tau"]))))
# The denoisers are not trained for levels above 0.1.
register(Method(
    name="annealed", label="Falling noise level", colour="#9970AB", compared=False,
    candidates=lambda noise_std, n: [{**s, "first": 0.1, "last": noise_std, "iterations": 8}
                                     for s in grid(n, weight=(0.05, 2.0))],
    model=lambda A, D, s: Annealed(A, D, s["weight"], s["first"], s["last"], s["iterations"])))
register(Method(
    name="feedforward", compared=False, label="DnCNN", colour="#B8A000",
    candidates=lambda noise_std, n: grid(n, sigma=(1e-3, 1e-1)),
    model=lambda A, D, s: Feedforward(A, D), loss=ExplicitLoss))
register(Method(
    name="feedforward-tikhonov", label="Tikhonov + DnCNN", colour="#8C510A",
    candidates=lambda noise_std, n: grid(n, lam=(1.5e-3, 6e-3), sigma=(0.03, 0.1)),
    noise_power=1.5,
    model=lambda A, D, s: Feedforward(A, D, s["lam"]), loss=ExplicitLoss))
register(Method(
    name="unrolled", label="Deep unrolling", colour="#762A83", noise_power=1.0,
    candidates=lambda noise_std, n: prior(noise_std, n, iterations=5),
    model=lambda A, D, s: Unrolled(SplittingMap(A, D, s["tau"]), int(s["iterations"])),
    loss=ExplicitLoss))
register(Method(
    name="de-grad", compared=False, label="JFB, DE-GRAD", colour=GradientMap.colour,
    candidates=lambda noise_std, n: prior(noise_std, n, eta=1.0),
    model=lambda A, D, s: Equilibrium(GradientMap(A, D, s["tau"], s["eta"])),
    loss=EquilibriumLoss))
register(Method(
    name="de-prox", compared=False, label="JFB, DE-PROX", colour=ProximalMap.colour,
    candidates=lambda noise_std, n: grid(n, eta=(1.0, 1.9), sigma=(0.005, 0.08)),
    model=lambda A, D, s: Equilibrium(ProximalMap(A, D, s["eta"])), loss=EquilibriumLoss))
register(Method(
    name="de-admm", compared=False, label="JFB, DE-ADMM", colour=ADMMMap.colour,
    candidates=prior, shares_tuning_with=PLUG_AND_PLAY_ADMM, model=PLUG_AND_PLAY_ADMM.model,
    loss=EquilibriumLoss))
register(Method(
    name="deq", label="Exact gradient, splitting", colour="#000000", candidates=prior,
    shares_tuning_with=PLUG_AND_PLAY, model=PLUG_AND_PLAY.model, loss=ImplicitLoss))
JFB = register(Method(
    name="jfb", label="JFB, splitting", colour=SplittingMap.colour, candidates=prior,
    shares_tuning_with=PLUG_AND_PLAY, model=PLUG_AND_PLAY.model, loss=EquilibriumLoss))
register(Method(
    name="jfb-energy", label="JFB, energy", colour=EnergyMap.colour, compared=False, smooth=True,
    candidates=prior, shares_tuning_with=PLUG_AND_PLAY, loss=EquilibriumLoss,
    model=lambda A, D, s: Equilibrium(EnergyMap(A, D, s["tau"]))))
for _found in entry_points(group="jfbnb.methods"):
    try:
        _found.load()
    except Exception as _error:  # the methods here work without it
        warnings.warn(f"the method {_found.value} cannot be loaded: {_error}", stacklevel=1)
