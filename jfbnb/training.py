"""Denoiser pretraining and end-to-end training (Algorithm 1), with resumable checkpoints.

Every random draw depends on (seed, epoch, step, place in the batch) alone, so a training that was
stopped and resumed gives the same weights, bit for bit on one machine, as one that was not.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb import kernels, processes
from jfbnb.checkpoints import resume, save_checkpoint
from jfbnb.common import UserError, seeded_generator
from jfbnb.computation import metered
from jfbnb.datasets import random_crops
from jfbnb.fixed_point import SolveInfo, scale_of, solve
from jfbnb.gradients import implicit, jfb
from jfbnb.models import Model, Unrolled
from jfbnb.muon import Muon
from jfbnb.networks import Denoiser, fill, precision
from jfbnb.operators import PROTOCOLS, Blur, Convolution, LinearOperator, measure
from jfbnb.sources import digest

# The loss of each of some crops x, (b,), and figures of each, given the keys that seed the draws
# and the crops' places in their batch: whoever shares a batch out gets the same draws.
BatchLoss = Callable[[Tensor, tuple[int, ...], Sequence[int]], tuple[Tensor, dict[str, Tensor]]]
COARSE = 4  # evaluations of T that a solve makes in bfloat16, where it is allowed
ADJOINT = 1e-3  # the residual to which the exact gradient's equation is solved, at least
TYPICAL = 1e-3  # mean squared error
POOL = 64  # batches that a training comes back to in turn
LOST = 0.1  # the residual of a state that is not gone on from: plain iteration runs away from there
RECORDS = 10  # of a training, evenly spread over it; where epochs are given, at least one in each


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast: Adam with a cosine schedule from `learning_rate` to 0.

    `epochs` is how often each training image is seen, on average; it need not be whole. Where it is
    0, `budget` is what the training may spend, in applications of the network to a crop
    (`computation`): methods with the same budget are trained alike, whatever a step of each costs.
    The schedule follows the share that is done. In the first `warmup` steps the rate rises from 0:
    Adam's own scale is a guess there. A gradient longer than `clip` is cut to it; 0 leaves it. With
    `muon` the weights between hidden layers move by `muon.Muon`, at the same rate.
    `unconverged_limit` is the share of fixed-point solves, from one record to the next, that may
    end above their tolerance: above half of it training warns, above all of it training stops.
    """

    epochs: float
    batch_size: int
    crop: int  # side in pixels
    learning_rate: float
    seed: int
    unconverged_limit: float = 0.5
    warmup: int = 0
    clip: float = 0.0
    muon: bool = False
    budget: float = 0.0

    def __post_init__(self) -> None:
        if (self.epochs > 0) == (self.budget > 0):
            raise UserError(f"epochs={self.epochs} and budget={self.budget}: give one of them, "
                            "positive, and 0 for the other")

    def share(self, steps: float, batches: int, applications: float) -> float:
        """How much of a training is done, of 1, after so many steps and applications."""
        if self.budget:
            return applications / self.budget
        return steps / max(1, round(self.epochs * batches))

    def everywhere(self) -> Self:
        """That of a training whose steps meet something else each: their gradients differ."""
        return replace(self, warmup=100, clip=0.02, muon=True)

    @classmethod
    def read(cls, card: dict) -> Self:
        """That of a model card. What a card of an earlier release lacks is as it was then."""
        return cls(**card["training"])


@dataclass(frozen=True)
class Conditions:
    """What a training may meet in the place of one blur and one noise level: ranges to draw from.

    Gaussian kernels, their side odd, in pixels; the standard deviations of kernel and noise are
    uniform on a logarithmic axis, and the noise's is on images in [0, 1].

    Args:
        unknown: the share of steps whose scene goes on beyond the border; it is black in others.
        moved, unfocused: the shares whose kernel is a motion, 3 pixels long or more, or a disk;
            both are as wide as the Gaussians are.
        home: the shares that have one of the `PROTOCOLS`, as it is, by its name.
    """

    kernel_side: tuple[int, int] = (3, 13)
    kernel_std: tuple[float, float] = (0.6, 5.0)
    noise_std: tuple[float, float] = (0.002, 0.05)
    unknown: float = 0.0
    moved: float = 0.0
    unfocused: float = 0.0
    home: dict[str, float] = field(default_factory=dict)

    def draw(self, image_size: int, generator: torch.Generator) -> tuple[LinearOperator, float]:
        """An operator on images of that size, and a noise level."""
        u = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
        side, kernel, noise = u[:3]
        for name, share in self.home.items():
            if u[3] < share:
                return PROTOCOLS[name].operator(image_size), PROTOCOLS[name].noise_std
            u[3] -= share
        border = "unknown" if u[4] < self.unknown else "black"
        noise_std = _between(self.noise_std, noise)
        low, high = self.kernel_side
        if u[5] < self.moved:
            made = kernels.motion(_between((3.0, float(high)), side), 180 * u[6])
        elif u[5] < self.moved + self.unfocused:
            made = kernels.disk(_between((1.0, high / 2), side))
        else:
            return Blur(image_size, low + 2 * math.floor(side * ((high - low) // 2 + 1)),
                        _between(self.kernel_std, kernel), border), noise_std
        return Convolution(image_size, made, border), noise_std


# Borders, kernels and noise that are met in photographs, and the protocols.
EVERYWHERE = Conditions((3, 15), (0.5, 5.0), unknown=0.6, moved=0.2, unfocused=0.15,
                        home={"paper": 0.36, "code": 0.12, "camera": 0.12})


def _between(ends: tuple[float, float], share: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** share


@dataclass(frozen=True)
class LossSettings:
    """What the losses of all methods have in common.

    Args:
        noise_std: of the measurements, on images in [0, 1].
        tolerance, max_iterations: of the solve for x*, by Anderson without gradient. The adjoint
            equation has as many iterations.
        power_iterations: of the stretch's estimate.
        contraction, penalty: adds `penalty * max(0, estimate - contraction)^2`, both counted from
            1 in units of the map's `scale`; a penalty of 0 leaves the estimate out.
        bf16: for the first evaluations of a solve, the tracked application and the head; of an
            explicit model for all. The rest is in float32: a solve in bfloat16 stalls at a residual
            of about 3e-3, and the estimate's differences would drown in the rounding.
        conditions: what each step's operator and noise level are drawn from; None leaves both as
            they are. Every batch then weighs alike: the loss is the logarithm of its error.
        noise_power: how the prior's weight follows a drawn noise level, as in `methods.Method`.
        watched: of so many crops one has its stretch estimated, and counts so many times.
        heads: whether the methods that have a head train one.
        visits: how often an equilibrium's training comes back to a batch. It solves for x* the
            first time; T(x*), which it tracks anyway, is where it goes on the next time. Between
            two visits lie `POOL` steps.
    """

    noise_std: float
    tolerance: float = 1e-3
    max_iterations: int = 12
    power_iterations: int = 4
    contraction: float = 0.9
    penalty: float = 0.1
    bf16: bool = False
    conditions: Conditions | None = None
    noise_power: float = 2.0
    watched: int = 4
    heads: bool = True
    visits: int = 1

    def everywhere(self) -> Self:
        """Those that meet whatever a user may have; of a step's eight crops one is watched.

        There is no head: the one tried behind the U-Net gained nothing.
        """
        return replace(self, conditions=EVERYWHERE, watched=8, heads=False, visits=8)

    @classmethod
    def read(cls, card: dict) -> Self:
        """Those of a model card. What a card of an earlier release lacks is as it was then."""
        drawn = card["loss"].get("conditions")
        if drawn is not None:  # JSON knows no tuples
            drawn = Conditions(**{name: tuple(value) if isinstance(value, list) else value
                                  for name, value in drawn.items()})
        return cls(**{**card["loss"], "conditions": drawn})


# --- losses -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenoiserLoss:
    """|D(x + sigma n; sigma) - x|^2, with sigma uniform in [0, noise_max] for each image."""

    D: Denoiser
    noise_max: float
    bf16: bool = False

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        sigma, noise = torch.empty(len(x), 1, 1, 1), torch.empty(x.shape)
        for row, index in enumerate(indices):
            generator = seeded_generator(*keys, index)
            sigma[row] = self.noise_max * torch.rand(1, generator=generator)
            noise[row] = torch.randn(x.shape[1:], generator=generator)
        sigma = sigma.to(x)
        noisy = x + sigma * noise.to(x)
        with precision(self.D, self.bf16):
            denoised = noisy - self.D.residual(noisy, sigma)
        return _mean_square(denoised - x), {}


@dataclass(frozen=True)
class ExplicitLoss:
    """|y - x|^2 with y the image of a model with a fixed number of layers, all tracked."""

    model: Unrolled
    settings: LossSettings

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        model, d = _meet(self.model, self.settings, x, keys, indices)
        return _errors(model, self.settings, x, replace(self, model=model).restored(d)[0], d)

    def restored(self, d: Tensor) -> tuple[Tensor, None]:
        """The image that the loss sees, tracked."""
        with precision(self.model, self.settings.bf16):
            return self.model(d)


@dataclass(frozen=True)
class EquilibriumLoss:
    """Algorithm 1's loss |N(d) - x|^2 at the fixed point, and a penalty that keeps T stable.

    Args:
        model: with the map T(x; d); its A must fit the crops.
        gradient: (T, x*) -> T(x*), tracked, as in `jfbnb.gradients`.
        memory: of the last `POOL` batches, by their keys: T(x*), and the direction that dies
            slowest. What is not in it is solved for.
    """

    model: Model
    settings: LossSettings
    gradient: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] = jfb
    memory: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = field(
        default_factory=dict, compare=False, repr=False)

    @property
    def visits(self) -> int:
        return self.settings.visits

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        model, d = _meet(self.model, s, x, keys, indices)
        T = model.T
        state, slowest = self.memory.pop(keys, (None, None))
        Tx, x_star, figures = replace(self, model=model).restored(d, state)
        loss, errors = _errors(model, s, x, T.image(Tx), d)
        figures.update(errors)  # in place: the backward pass may add to it
        if s.penalty > 0:
            watched = [row for row, index in enumerate(indices) if index % s.watched == 0]
            factor, slowest = contraction_estimate(lambda z: T(z, d[watched]), x_star[watched],
                                                   s.power_iterations, slowest)
            excess = torch.zeros_like(loss)
            # A map whose steps are small is near 1 by construction: its scale is the unit.
            past = 1 - s.contraction - (1 - factor) / scale_of(T)
            excess[watched] = s.watched * past.clamp_min(0).square()
            loss = loss + s.penalty * excess
            figures["contraction"] = factor.detach()
        if s.visits > 1 and (figures["residual"] < LOST * scale_of(T)).all():
            self.memory[keys] = Tx.detach(), slowest
            for oldest in list(self.memory)[:-POOL]:
                del self.memory[oldest]
        return loss, figures

    def restored(self, d: Tensor, state: Tensor | None = None
                 ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """T(x*), tracked, whose image the loss sees; x*; and figures of its solve.

        A given state is taken for x*, without a solve.
        """
        s, T = self.settings, self.model.T
        x_star, figures = state, {}
        with precision(self.model, s.bf16) as put:
            if x_star is None:
                x_star, info = solve(T, d, s.tolerance, s.max_iterations,
                                     callback=lambda k, _: put(s.bf16 and k < COARSE))
                figures = {"iterations": info.iterations, "residual": info.residual,
                           "converged": info.converged}
            put(s.bf16)
            Tx = self.track(lambda z: T(z, d), x_star, figures)
        if state is not None:
            figures["residual"] = (_norm(Tx.detach() - state) / _norm(state)).flatten()
        elif s.bf16:  # the value is as exact as the solve, whatever the gradient
            Tx = x_star + (Tx - Tx.detach())
        return Tx, x_star, figures

    def track(self, T: Callable[[Tensor], Tensor], x_star: Tensor,
              figures: dict[str, Tensor]) -> Tensor:
        """T(x*), whose backward pass is the gradient's."""
        return self.gradient(T, x_star)


@dataclass(frozen=True)
class ImplicitLoss(EquilibriumLoss):
    """The same by the exact gradient, Eq. 5.

    Its equation is solved to 1e-3 times the map's scale, if not further.
    """

    def track(self, T: Callable[[Tensor], Tensor], x_star: Tensor,
              figures: dict[str, Tensor]) -> Tensor:
        def report(adjoint: SolveInfo) -> None:  # called in the backward pass
            figures["adjoint_residual"] = adjoint.residual

        with precision(self.model, False):  # its own solve, too, would stall in bfloat16
            return implicit(T, x_star,
                            min(ADJOINT, self.settings.tolerance) * scale_of(self.model.T),
                            self.settings.max_iterations, report)


def _mean_square(error: Tensor) -> Tensor:
    """Of each image, (b,)."""
    return error.square().flatten(1).mean(dim=1)


def _errors(model: Model, settings: LossSettings, x: Tensor, y: Tensor,
            d: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The error of an image y, plus that of its head's: both are to be good; and the two.

    It is that of the part which the measurement shows.
    """
    visible = model.T.A.visible
    loss = _mean_square(visible(y - x))
    figures = {"mse": loss.detach()}
    if model.H is not None:
        with precision(model, settings.bf16):
            head = _mean_square(visible(model.predict(y, d) - x))
        figures["head_mse"] = head.detach()
        loss = loss + head
    if settings.conditions is not None:  # the gradient of its logarithm, on the usual scale
        total, count = processes.add_up([loss.detach().sum().item(), float(len(loss))], x.device)
        loss = loss * (TYPICAL * count / max(total, 1e-30))
    return loss, figures


def _meet(model: Model, settings: LossSettings, x: Tensor, keys: tuple[int, ...],
          indices: Sequence[int]) -> tuple[Model, Tensor]:
    """The model on the operator that measures some crops, and their measurements."""
    noise_std = settings.noise_std
    if settings.conditions is not None:
        A, noise_std = settings.conditions.draw(x.shape[-1], seeded_generator(*keys, 0))
        model = model.on(A.to(x.device), (noise_std / settings.noise_std) ** settings.noise_power)
    return model, draw_measurement(model.T.A, x, noise_std, keys, indices)


def draw_measurement(A: LinearOperator, x: Tensor, noise_std: float, keys: tuple[int, ...],
                     indices: Sequence[int]) -> Tensor:
    """A measurement of each crop; its noise depends on the keys and its index alone."""
    return measure(A, x, noise_std, seeded_generator(*keys).initial_seed() >> 1, indices)


def contraction_estimate(T: Callable[[Tensor], Tensor], x_star: Tensor, power_iterations: int,
                         slowest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How much T stretches the direction that dies slowest at x*, one factor per image (B,).

    Below 1 that direction dies out. It is one direction at one point: no bound on T's Lipschitz
    constant, and no proof that T is stable.

    The solve is itself a power iteration, so what is left of its residual, T(x*) - x*, already
    points along the slowest direction; a random one would miss modes that live in a few pixels.
    `power_iterations` more sharpen it. Finite differences of 1% of |x*|. The factor is
    differentiable in Theta. Returned with it is the direction, to be given as `slowest` where the
    estimate goes on.
    """
    size = 0.01 * _norm(x_star)
    Tx = T(x_star)

    def scaled(v: Tensor) -> Tensor:
        return v * (size / _norm(v).clamp_min(1e-12))

    with torch.no_grad():
        v = scaled(Tx - x_star if slowest is None else slowest)
        for _ in range(power_iterations):
            v = scaled(T(x_star + v) - Tx)
    return (_norm(T(x_star + v) - Tx) / size).flatten(), v


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))


# --- the loop -----------------------------------------------------------------------------------


def train(
    module: nn.Module,
    batch_loss: BatchLoss,
    images: Tensor,
    config: TrainingConfig,
    device: torch.device,
    checkpoints: Path | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    log: Callable[[str], None] = print,
    finished: Path | None = None,
) -> list[dict[str, float]]:
    """Minimise `batch_loss` over random crops of `images`; return the records of its parts.

    A loss with an attribute `visits` comes back to each batch so often. A training has `RECORDS`
    parts, or as many as epochs where those are more. A record has the epochs, steps and
    applications of the network so far, the part's mean loss per image, the means of what the loss
    reports, its seconds, and what `validate` returns. With `checkpoints`, a folder, the state after
    each part is stored and a stopped training goes on from the last one that is whole.

    In a `processes.process_group` all processes train together, on the same batches as one would;
    rank 0 alone logs, validates and stores. The checkpoint of one number of processes serves any
    other.

    Args:
        module: what is trained, in place.
        images: uint8 (N, 3, H, W).
        finished: stored weights whose model card has this training; they are taken, and its
            history returned, in the place of training again.

    Raises:
        UserError: if the loss is not finite, if too many solves do not converge, if a checkpoint
            cannot be read, if `finished` was trained with another `config`, or if there is a
            budget and no network to count.
    """
    if not 0 < config.crop <= min(images.shape[2:]):
        raise UserError(f"crop={config.crop} does not fit images of {tuple(images.shape[2:])}")
    module.to(device)
    if finished is not None:
        return _take(finished, module, config)
    if processes.world_size() > config.batch_size:
        raise UserError(f"batch_size={config.batch_size} for {processes.world_size()} processes: "
                        f"start at most {config.batch_size}")
    if processes.rank() > 0:
        log, validate = _nothing, None
    shared_loss = processes.share_out(module, batch_loss)
    kind = Muon if config.muon else torch.optim.Adam
    optimizer = kind(module.parameters(), lr=config.learning_rate)
    history: list[dict[str, float]] = []
    file = None
    if checkpoints is not None:
        key = processes.gather(digest(train, module, batch_loss, images, config))[0]
        file = checkpoints / f"{key[:16]}.safetensors"
        with processes.rank_0_first():  # the others read the one that it finds whole
            history = resume(file, module, optimizer, log)
        if history:
            log(f"resumed after {_so_far(history, config)}")
    parts = max(RECORDS, math.ceil(config.epochs))
    batches = math.ceil(len(images) / config.batch_size)
    while not history or config.share(history[-1]["steps"], batches,
                                      history[-1]["applications"]) < 1:
        start = time.perf_counter()
        last_good = f"; the last good checkpoint is {file}" if file and history else ""
        record = _train_part(shared_loss, images, config, device, optimizer, module, parts,
                             getattr(batch_loss, "visits", 1), history, last_good)
        record["seconds"] = time.perf_counter() - start
        record.update(validate() if validate else {})
        history.append(record)
        if file is not None and processes.rank() == 0:
            save_checkpoint(file, module, optimizer, history)
        log(_progress(history, config, batches))
        if 1 - record.get("converged", 1) > config.unconverged_limit / 2:
            log(f"warning: {1 - record['converged']:.0%} of the solves up to epoch "
                f"{record['epoch']:.4g} did not converge; training stops above "
                f"{config.unconverged_limit:.0%}")
    return history


def _so_far(history: list[dict[str, float]], config: TrainingConfig) -> str:
    """Where a training is, in the unit in which its length is given."""
    record = history[-1]
    if config.budget:
        return (f"epoch {record['epoch']:.3g}, {record['applications']:.0f} of "
                f"{config.budget:.0f} applications")
    return f"epoch {record['epoch']:.4g} of {config.epochs:.4g}"


def _progress(history: list[dict[str, float]], config: TrainingConfig, batches: int) -> str:
    """How far a training is, how well it does on its crops, and how long it will take."""
    record = history[-1]
    found = [_so_far(history, config), f"loss {record['loss']:.3g}"]
    if record.get("mse", 0.0) > 0:
        found.append(f"{-10 * math.log10(record['mse']):.1f} dB on its crops")
    if record.get("converged", 1.0) < 1:
        found.append(f"{record['converged']:.1%} of the solves converged")
    share = config.share(record["steps"], batches, record["applications"])
    seconds = sum(r["seconds"] for r in history) * (1 / share - 1)
    return ", ".join([*found, f"{seconds:.0f} s left" if share < 1 else "done"])


def _nothing(line: str) -> None:
    """The log of those that have none."""


def _take(finished: Path, module: nn.Module, config: TrainingConfig) -> list[dict[str, float]]:
    """Load a finished training's weights into the module, in place; return its history."""
    try:
        card = json.loads(finished.with_suffix(".json").read_text(encoding="utf-8"))
        history, trained = card["history"], TrainingConfig.read(card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{finished} has no model card with this training ({error}): leave the "
                        "parameter `weights` empty to train") from error
    # When it would have been stopped does not matter any more.
    if replace(trained, unconverged_limit=config.unconverged_limit) != config:
        raise UserError(f"{finished} was trained with {asdict(trained)}, not with "
                        f"{asdict(config)}: leave the parameter `weights` empty to train")
    fill(finished, module)
    return history


def _train_part(batch_loss: BatchLoss, images: Tensor, config: TrainingConfig,
                device: torch.device, optimizer: torch.optim.Optimizer, module: nn.Module,
                parts: int, visits: int, history: list[dict[str, float]],
                last_good: str) -> dict[str, float]:
    """The steps of a training up to the next of so many even shares of it; their record."""
    batches = math.ceil(len(images) / config.batch_size)
    first, before = (int(history[-1][name]) if history else 0 for name in ("steps", "applications"))
    number, spent, done = first, before, config.share(first, batches, before)
    end = (math.floor(done * parts + 1e-9) + 1) / parts - 1e-9
    means, order, shuffled = _Means(device), (), None
    with metered(module) as meter:
        while done < end:
            met = _which(number, visits)
            epoch, step = met // batches + 1, met % batches
            if shuffled != epoch:
                order = torch.randperm(len(images), generator=seeded_generator(config.seed, epoch))
                order, shuffled = order.split(config.batch_size), epoch
            batch = order[step]
            for group in optimizer.param_groups:
                group["lr"] = (config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
                               * min(1.0, (number + 1) / (config.warmup + 1)))
            part = processes.share(len(batch))
            x = random_crops(images[batch], config.crop, config.seed, epoch, step, 0)[part]
            losses, figures = batch_loss(x.to(device), (config.seed, epoch, step, 1),
                                         range(len(batch))[part])
            where = f"epoch {epoch}, step {step}"
            _update(losses, figures, len(batch), config, optimizer, means,
                    f"{where}, images {batch.tolist()}: lower the learning rate{last_good}")
            number += 1
            spent = before + round(processes.add_up([float(meter.applications)], device)[0])
            if config.budget and spent == before:
                raise UserError("a budget counts applications of a Denoiser's network, and this "
                                "step has made none: give epochs")
            done = config.share(number, batches, spent)
            unconverged = 1 - means.of("converged", 1.0)
            if unconverged > config.unconverged_limit and (number - first > 20 or done >= end):
                raise UserError(
                    f"{unconverged:.0%} of the solves up to {where} did not converge (mean "
                    f"residual {means.of('residual', 0.0):.1e}): the map is not stable; lower the "
                    "learning rate, raise penalty or max_iterations, or raise unconverged_limit "
                    f"to go on{last_good}")
    return {"epoch": number / batches, "steps": number, "applications": spent,
            **{name: means.of(name, 0.0) for name in means.totals}}


def _update(losses: Tensor, figures: dict[str, Tensor], batch_size: int, config: TrainingConfig,
            optimizer: torch.optim.Optimizer, means: "_Means", place: str) -> None:
    """One step down the mean loss of a batch, of which this process has a share.

    The backward pass averages over the processes, so a share's sum is multiplied by their number.
    """
    optimizer.zero_grad()
    (losses.sum() * (processes.world_size() / batch_size)).backward()
    length = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip or math.inf)
    latest = means.add({"loss": losses.detach(), "gradient": length.expand(1), **figures})
    if not math.isfinite(latest["loss"]):
        raise UserError(f"the loss is {latest['loss']} at {place}")
    optimizer.step()


def _which(step: int, visits: int) -> int:
    """The number of the batch that a step meets: of `POOL` in turn, each replaced after its visits.

    They are replaced at different times, so that about the same number of solves is due at any.
    """
    cycle, place = divmod(step, POOL)
    return (cycle + place % visits) // visits * POOL + place if visits > 1 else step


class _Means:
    """Means of figures over the images, processes and steps so far."""

    def __init__(self, device: torch.device):
        self.device = device
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Take some images' values in; return their own means."""
        sums = processes.add_up([part for v in values.values()
                                 for part in (v.double().sum().item(), float(len(v)))], self.device)
        latest = dict(zip(values, zip(sums[::2], sums[1::2], strict=True), strict=True))
        for name, (total, count) in latest.items():
            before = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = before[0] + total, before[1] + count
        return {name: total / max(count, 1.0) for name, (total, count) in latest.items()}

    def of(self, name: str, missing: float) -> float:
        total, count = self.totals.get(name, (missing, 1.0))
        return total / max(count, 1.0)
