"""The training losses of the denoiser, of explicit models and of equilibria."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from jfbnb.common import UserError, seeded_generator
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.fixed_point import SolveInfo, scale_of, solve
from jfbnb.core.gradients import implicit, jfb
from jfbnb.core.models import Model, Unrolled
from jfbnb.core.operators import LinearOperator
from jfbnb.core.protocols import measure
from jfbnb.training.degradations import RANDOM_DEGRADATIONS, Conditions

# (crops x, keys that seed the draws) -> (the loss of each crop (B,), figures of each).
BatchLoss = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, dict[str, Tensor]]]
ADJOINT = 1e-3  # the largest residual to which the exact gradient's equation is solved
TYPICAL = 1e-3  # mean squared error
REUSE_BUFFER = 64  # batches that are used in turn, if batches are reused
MAX_WARM_START_RESIDUAL = 0.1  # a stored state with a larger one is dropped: iteration diverges


@dataclass(frozen=True)
class LossSettings:
    """Settings that the losses of all methods share.

    Args:
        noise_std: of the measurements, on images in [0, 1].
        tolerance, max_iterations: of the solve for x*, by Anderson without gradient.
            `max_iterations` also limits the adjoint equation.
        power_iterations: of the estimate of T's growth factor.
        max_growth, penalty: add `penalty * s * max(0, 1 - max_growth - (1 - growth) / s)^2` to the
            loss, where s is the map's `scale`. With a penalty of 0 the growth is not estimated.
        conditions: draw each step's operator and noise level from these; None keeps the protocol's.
            The loss is then the logarithm of the batch's error, so all batches weigh the same.
        noise_power: how the prior's weight depends on a drawn noise level, as in `methods.Method`.
        stability_every: apply the stability penalty to every n-th crop of a batch, weighted by n.
        batch_reuse: how many steps use a batch, to train an equilibrium. The first solves for x*.
            Each later one, `REUSE_BUFFER` steps on, takes T(x*) of the one before as x*.
    """

    noise_std: float
    tolerance: float = 1e-3
    max_iterations: int = 12
    power_iterations: int = 4
    max_growth: float = 0.9
    penalty: float = 0.1
    conditions: Conditions | None = None
    noise_power: float = 2.0
    stability_every: int = 4
    batch_reuse: int = 1

    def random_degradations(self) -> Self:
        """The same over `RANDOM_DEGRADATIONS`."""
        return replace(self, conditions=RANDOM_DEGRADATIONS, stability_every=8, batch_reuse=8)

    @classmethod
    def read(cls, card: dict) -> Self:
        """The settings in a model card.

        Raises:
            UserError: for a card of another release.
        """
        drawn = card["loss"]["conditions"]
        if drawn is not None:
            drawn = Conditions(**{name: tuple(value) if isinstance(value, list) else value
                                  for name, value in drawn.items()})
        try:
            return cls(**{**card["loss"], "conditions": drawn})
        except TypeError as error:
            raise UserError(f"a model card of another release ({error}): train again") from error


@dataclass(frozen=True)
class DenoiserLoss:
    """|D(x + sigma n; sigma) - x|^2, with sigma uniform in [0, noise_max] for each image."""

    D: Denoiser
    noise_max: float

    def __call__(self, x: Tensor, keys: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        sigma, noise = torch.empty(len(x), 1, 1, 1), torch.empty(x.shape)
        for i in range(len(x)):
            generator = seeded_generator(*keys, i)
            sigma[i] = self.noise_max * torch.rand(1, generator=generator)
            noise[i] = torch.randn(x.shape[1:], generator=generator)
        sigma = sigma.to(x)
        noisy = x + sigma * noise.to(x)
        return _mean_square(noisy - self.D.residual(noisy, sigma) - x), {}


@dataclass(frozen=True)
class ExplicitLoss:
    """|y - x|^2, where y is the image of a model with a fixed number of layers, all tracked."""

    model: Unrolled
    settings: LossSettings

    def __call__(self, x: Tensor, keys: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        model, d = _measured(self.model, self.settings, x, keys)
        return _errors(model, self.settings, x, model(d)[0], d)


@dataclass(frozen=True)
class EquilibriumLoss:
    """Algorithm 1's loss |N(d) - x|^2 at the fixed point, and a penalty that keeps T stable.

    Args:
        model: has the map T(x; d); its A must fit the crops.
        gradient: (T, x*) -> T(x*), tracked, as in `jfbnb.core.gradients`.
        memory: for each of the last `REUSE_BUFFER` batches, by its keys: T(x*), and the direction
            that T amplifies most.
    """

    model: Model
    settings: LossSettings
    gradient: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = jfb
    memory: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False)

    @property
    def batch_reuse(self) -> int:
        return self.settings.batch_reuse

    def __call__(self, x: Tensor, keys: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        model, d = _measured(self.model, s, x, keys)
        T = model.T
        state, direction = self.memory.pop(keys, (None, None))
        Tx, x_star, figures = replace(self, model=model).restored(d, state)
        loss, errors = _errors(model, s, x, T.image(Tx), d)
        figures.update(errors)  # in place: the backward pass may add to figures
        if s.penalty > 0:
            rows = slice(None, None, s.stability_every)
            growth, direction = growth_estimate(lambda z: T(z, d[rows]), x_star[rows],
                                                s.power_iterations, direction)
            excess = torch.zeros_like(loss)
            # A map with small steps has a growth near 1 by construction, and a small gradient of
            # its loss: `scale` is the unit of both.
            scale = scale_of(T)
            above = 1 - s.max_growth - (1 - growth) / scale
            excess[rows] = s.stability_every * above.clamp_min(0).square()
            loss = loss + s.penalty * scale * excess
            figures["growth"] = growth.detach()
        near = figures["residual"] < MAX_WARM_START_RESIDUAL * scale_of(T)
        if s.batch_reuse > 1 and near.all():
            self.memory[keys] = Tx.detach(), direction
            for oldest in list(self.memory)[:-REUSE_BUFFER]:
                del self.memory[oldest]
        return loss, figures

    def restored(self, d: Tensor, state: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """T(x*), tracked, whose image enters the loss; x*; and figures of its solve.

        Args:
            state: used as x*, without a solve.
        """
        s, T = self.settings, self.model.T
        x_star, figures = state, {}
        if x_star is None:
            x_star, info = solve(T, d, s.tolerance, s.max_iterations)
            figures = {"iterations": info.iterations, "residual": info.residual,
                       "converged": info.converged}
        Tx = self.track(lambda z: T(z, d), x_star, figures)
        if state is not None:
            figures["residual"] = (_norm(Tx.detach() - state) / _norm(state)).flatten()
        return Tx, x_star, figures

    def track(self, T: Callable[[Tensor], Tensor], x_star: Tensor,
              figures: dict[str, Tensor]) -> Tensor:
        """T(x*), tracked by `gradient`."""
        return self.gradient(T, x_star)


@dataclass(frozen=True)
class ImplicitLoss(EquilibriumLoss):
    """The same with the exact gradient, Eq. 5, solved to the solve's tolerance, at most 1e-3."""

    def track(self, T: Callable[[Tensor], Tensor], x_star: Tensor,
              figures: dict[str, Tensor]) -> Tensor:
        def report(adjoint: SolveInfo) -> None:  # called in the backward pass
            figures["adjoint_residual"] = adjoint.residual

        return implicit(T, x_star, min(ADJOINT, self.settings.tolerance) * scale_of(self.model.T),
                        self.settings.max_iterations, report)


def _mean_square(error: Tensor) -> Tensor:
    """The mean square of each image, (b,)."""
    return error.square().flatten(1).mean(dim=1)


def _errors(model: Model, settings: LossSettings, x: Tensor, y: Tensor,
            d: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of an image y, on the part that the measurement shows, and its squared error."""
    visible = model.T.A.visible
    loss = _mean_square(visible(y - x))
    figures = {"mse": loss.detach()}
    if settings.conditions is not None:  # the gradient of its logarithm, on the usual scale
        loss = loss * (TYPICAL / loss.detach().mean().clamp_min(1e-30))
    return loss, figures


def _measured(model: Model, settings: LossSettings, x: Tensor,
              keys: tuple[int, ...]) -> tuple[Model, Tensor]:
    """Measure some crops: the model for the operator that is used, and the measurements."""
    noise_std = settings.noise_std
    if settings.conditions is not None:
        A, noise_std = settings.conditions.draw(x.shape[-1], seeded_generator(*keys, 0))
        model = model.on(A.to(x.device), (noise_std / settings.noise_std) ** settings.noise_power)
    return model, draw_measurement(model.T.A, x, noise_std, keys)


def draw_measurement(A: LinearOperator, x: Tensor, noise_std: float,
                     keys: tuple[int, ...]) -> Tensor:
    """A measurement of each crop; its noise depends only on the keys and the crop's index."""
    return measure(A, x, noise_std, seeded_generator(*keys).initial_seed() >> 1, range(len(x)))


def growth_estimate(T: Callable[[Tensor], Tensor], x_star: Tensor, power_iterations: int,
                    direction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """|J v| / |v| at x*, for the direction v that T amplifies most, and v; differentiable in Theta.

    Power iteration with finite differences of 1% of |x*|. It starts from the residual T(x*) - x*,
    which plain iteration turns towards v; a random start would miss modes of a few pixels. It
    measures one direction at one point: a lower bound on T's Lipschitz constant, and no proof that
    T is stable.

    Args:
        power_iterations: applications of T that refine v.
        direction: an earlier v, to start from.

    Returns:
        The factor of each image, (B,), below 1 if v decays; and v, with the shape of x_star.
    """
    size = 0.01 * _norm(x_star)
    Tx = T(x_star)

    def scaled(v: Tensor) -> Tensor:
        return v * (size / _norm(v).clamp_min(1e-12))

    with torch.no_grad():
        v = scaled(Tx - x_star if direction is None else direction)
        for _ in range(power_iterations):
            v = scaled(T(x_star + v) - Tx)
    return (_norm(T(x_star + v) - Tx) / size).flatten(), v


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))
