"""Denoiser pretraining and end-to-end training (Algorithm 1), with resumable checkpoints.

Every random draw depends on (seed, epoch, step) alone, so a training that was stopped and resumed
gives the same weights, bit for bit on one machine, as one that was not.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from jfbnb import processes
from jfbnb.checkpoints import resume, save_checkpoint
from jfbnb.common import UserError, seeded_generator
from jfbnb.datasets import random_crops
from jfbnb.explicit import deep_unrolling, feedforward, feedforward_head
from jfbnb.fixed_point import SolveInfo, anderson
from jfbnb.gradients import implicit, jfb, neumann
from jfbnb.maps import ImplicitMap
from jfbnb.networks import Regulariser, load_regulariser, precision
from jfbnb.operators import measure

# The modules that a training depends on: when one changes, old checkpoints are not taken up.
CODE = ("common", "datasets", "operators", "networks", "maps", "fixed_point", "gradients",
        "baselines", "explicit", "processes", "training")

# Loss of a batch of crops x, given the keys that seed its draws: (loss, figures to average).
# Where several processes train together, a third argument is the share of the batch to compute.
BatchLoss = Callable[..., tuple[Tensor, dict[str, float]]]
WHOLE = slice(None)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast: Adam with a cosine schedule from `learning_rate` to 0.

    `unconverged_limit` is the share of an epoch's fixed-point solves that may end above their
    tolerance: above half of it training warns, above all of it training stops.
    """

    epochs: int
    batch_size: int
    crop: int  # side in pixels
    learning_rate: float
    seed: int
    unconverged_limit: float = 0.5


# --- losses -------------------------------------------------------------------------------------
# `evaluations` is what a loss costs at most: evaluations of the network per image and step. One
# forward counts as one, and so does each of the two halves of a backward pass, the gradient in
# the input and the gradient in the weights.
# Where S has a head, its error is added: both images are to be good.
# `bf16` runs the convolutions in bfloat16, at half the cost where the hardware has it.
# Loss and figures are means over the batch x. Of another `share` than the whole batch, x[share],
# they are its part of these means: over the shares of a batch the parts add up.


@dataclass(frozen=True)
class DenoiserLoss:
    """|D(x + sigma n; sigma) - x|^2, with sigma uniform in [0, noise_max] for each image."""

    S: Regulariser
    noise_max: float

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 share: slice = WHOLE) -> tuple[Tensor, dict[str, float]]:
        generator = seeded_generator(*keys)
        batch = len(x)
        sigma = (self.noise_max * torch.rand(batch, 1, 1, 1, generator=generator)).to(x)
        noisy = x + sigma * torch.randn(x.shape, generator=generator).to(x)
        x, noisy, sigma = x[share], noisy[share], sigma[share]
        return _part((noisy - self.S.network(noisy, sigma) - x).square(), batch), {}


@dataclass(frozen=True)
class FeedforwardLoss:
    """|y - x|^2 with y = D(d), or with `lam` y = D(Tikhonov(d)); A must fit the crops."""

    A: nn.Module
    S: Regulariser
    noise_std: float
    lam: float | None
    bf16: bool = False

    @property
    def evaluations(self) -> float:
        return 3.0 + _head_evaluations(self.S)

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 share: slice = WHOLE) -> tuple[Tensor, dict[str, float]]:
        d = draw_measurement(self.A, x, self.noise_std, keys, share)
        with precision(self.S, self.bf16):
            y = feedforward(self.A, self.S, d, self.lam)
            head = None if self.S.head is None else feedforward_head(self.S, y)
            return _errors(x[share], y, head, len(x))


@dataclass(frozen=True)
class UnrolledLoss:
    """|T^K(d) - x|^2, differentiated through all K = `iterations` applications."""

    T: ImplicitMap
    noise_std: float
    iterations: int
    bf16: bool = False

    @property
    def evaluations(self) -> float:
        return 3.0 * self.iterations

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 share: slice = WHOLE) -> tuple[Tensor, dict[str, float]]:
        d = draw_measurement(self.T.A, x, self.noise_std, keys, share)
        with precision(self.T.S, self.bf16):
            return _errors(x[share], deep_unrolling(self.T, d, self.iterations), None, len(x))


def _part(values: Tensor, batch: int) -> Tensor:
    """What the values of some images, (b, ...), add to the mean over a batch of `batch` images."""
    return values.sum() / (batch * math.prod(values.shape[1:]))


def _errors(x: Tensor, y: Tensor, predicted: Tensor | None,
            batch: int) -> tuple[Tensor, dict[str, float]]:
    """The mean squared error of an image y, plus that of its head's prediction; and the two."""
    loss = _part((y - x).square(), batch)
    figures = {"mse": loss.item()}
    if predicted is not None:
        head = _part((predicted - x).square(), batch)
        figures["head_mse"] = head.item()
        loss = loss + head
    return loss, figures


def _head_evaluations(S: Regulariser) -> float:
    return 0.0 if S.head is None else 3.0


def draw_measurement(A: nn.Module, x: Tensor, noise_std: float, keys: tuple[int, ...],
                     share: slice = WHOLE) -> Tensor:
    """A measurement of each crop in x[share]; its noise depends on keys and place in x alone."""
    seed = seeded_generator(*keys).initial_seed() >> 1
    return measure(A, x[share], noise_std, seed, list(range(len(x)))[share])


def contraction_estimate(T: Callable[[Tensor], Tensor], x_star: Tensor, Tx: Tensor,
                         power_iterations: int) -> Tensor:
    """How much T stretches the direction that dies slowest at x*, one factor per image (B,).

    The solve is itself a power iteration, so what is left of its residual, T(x*) - x*, already
    points along the slowest direction; a random one would miss modes that live in a few pixels.
    `power_iterations` more sharpen it. Finite differences of 1% of |x*|.

    Args:
        Tx: T(x_star), tracked: the factor is differentiable in Theta.
    """
    size = 0.01 * _norm(x_star)

    def scaled(v: Tensor) -> Tensor:
        return v * (size / _norm(v).clamp_min(1e-12))

    with torch.no_grad():
        v = scaled(Tx - x_star)
        for _ in range(power_iterations):
            v = scaled(T(x_star + v) - Tx)
    return (_norm(T(x_star + v) - Tx) / size).flatten()


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, *(1,) * (x.dim() - 1))


@dataclass(frozen=True)
class EquilibriumLoss:
    """Algorithm 1's loss |N(d) - x|^2 at the fixed point, and a penalty that keeps T contracting.

    Args:
        T: the map T(x; d); its A must fit the crops.
        noise_std: of the measurements, on images in [0, 1].
        tolerance, max_iterations: of the solve for x*, by Anderson without gradient, and of the
            adjoint equation's.
        power_iterations: of the contraction estimate, on the first quarter of the batch.
        contraction, penalty: adds `penalty * max(0, estimate - contraction)^2`; a penalty of 0
            leaves the estimate out.
        gradient: "jfb", "neumann" or "implicit".
        terms: of the Neumann series.
        bf16: for all but the contraction estimate, whose differences would drown in the rounding.
            The solve then stalls at a residual of about 3e-3.

    Raises:
        ValueError: for another gradient.
    """

    T: ImplicitMap
    noise_std: float
    tolerance: float
    max_iterations: int
    power_iterations: int
    contraction: float
    penalty: float
    gradient: str = "jfb"
    terms: int = 5
    bf16: bool = False

    def __post_init__(self) -> None:
        if self.gradient not in ("jfb", "neumann", "implicit"):
            raise ValueError(f"gradient is {self.gradient!r}, not jfb, neumann or implicit")

    @property
    def evaluations(self) -> float:
        extra = {"jfb": 0, "neumann": self.terms, "implicit": 1 + self.max_iterations}
        watch = 0.25 * (self.power_iterations + 6) if self.penalty > 0 else 0.0
        return (self.max_iterations + 3 + extra[self.gradient] + watch
                + _head_evaluations(self.T.S))

    def __call__(self, x: Tensor, keys: tuple[int, ...],
                 share: slice = WHOLE) -> tuple[Tensor, dict[str, float]]:
        T, batch = self.T, len(x)
        d = draw_measurement(T.A, x, self.noise_std, keys, share)
        x = x[share]
        with precision(T.S, self.bf16):
            x_star, info = anderson(lambda z: T(z, d), T.start(d), self.tolerance,
                                    self.max_iterations)
            figures = _solve_figures(info, batch)
            Tx = self._track(lambda z: T(z, d), x_star, figures, batch)
            head = None if T.S.head is None else T.predict(Tx, d)
            loss, errors = _errors(x, T.image(Tx), head, batch)
        figures.update(errors)
        if self.penalty > 0:
            quarter = (batch + 3) // 4
            part = slice(0, len(range(quarter)[share]))  # those of it that are in this share
            factor = contraction_estimate(lambda z: T(z, d[part]), x_star[part],
                                          T(x_star[part], d[part]), self.power_iterations)
            figures["contraction"] = _part(factor, quarter).item()
            excess = (factor - self.contraction).clamp_min(0).square()
            loss = loss + self.penalty * _part(excess, quarter)
        return loss, figures

    def _track(self, T: Callable[[Tensor], Tensor], x_star: Tensor,
               figures: dict[str, float], batch: int) -> Tensor:
        """T(x*), whose backward pass is the chosen gradient's."""
        if self.gradient == "jfb":
            return jfb(T, x_star)
        if self.gradient == "neumann":
            return neumann(T, x_star, self.terms)

        def report(adjoint: SolveInfo) -> None:  # called in the backward pass
            figures["adjoint_residual"] = _part(adjoint.residual, batch).item()

        return implicit(T, x_star, self.tolerance, self.max_iterations, report)


def _solve_figures(info: SolveInfo, batch: int) -> dict[str, float]:
    return {"iterations": _part(info.iterations.float(), batch).item(),
            "residual": _part(info.residual, batch).item(),
            "converged": _part(info.converged.float(), batch).item()}


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
    """Minimise `batch_loss` over random crops of `images`; return one record per epoch.

    A record has the epoch, the mean loss per image, the means of what the loss reports, the
    seconds of training, and what `validate` returns. With `checkpoints`, a folder, each epoch is
    stored and a stopped training goes on from the last one that is whole.

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
            cannot be read, or if `finished` was trained with another `config`.
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
    optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    history: list[dict[str, float]] = []
    file = None
    if checkpoints is not None:
        file = checkpoints / f"{_training_key(module, batch_loss, images, config)}.safetensors"
        with processes.rank_0_first():  # the others read the one that it finds whole
            history = resume(file, module, optimizer, log)
        if history:
            log(f"resumed after epoch {len(history)} of {config.epochs}")
    for epoch in range(len(history) + 1, config.epochs + 1):
        start = time.perf_counter()
        last_good = f"; the last good checkpoint is {file}" if file and history else ""
        record = {"epoch": epoch, **_train_epoch(shared_loss, images, config, device, optimizer,
                                                 epoch, last_good)}
        record["seconds"] = time.perf_counter() - start
        record.update(validate() if validate else {})
        history.append(record)
        if file is not None and processes.rank() == 0:
            save_checkpoint(file, module, optimizer, history)
        log("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
        if 1 - record.get("converged", 1) > config.unconverged_limit / 2:
            log(f"warning: {1 - record['converged']:.0%} of the solves of epoch {epoch} did not "
                f"converge; training stops above {config.unconverged_limit:.0%}")
    return history


def _nothing(line: str) -> None:
    """The log of those that have none."""


def _take(finished: Path, module: nn.Module, config: TrainingConfig) -> list[dict[str, float]]:
    """Load a finished training's weights into the module, in place; return its history."""
    S = load_regulariser(finished)
    try:
        card = json.loads(finished.with_suffix(".json").read_text())
        history, trained = card["history"], card["training"]
        module.load_state_dict(S.state_dict())
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{finished} and its model card do not hold this training ({error}): "
                        "leave the parameter `weights` empty to train") from error
    if trained != asdict(config):
        raise UserError(f"{finished} was trained with {trained}, not with {asdict(config)}: leave "
                        "the parameter `weights` empty to train")
    return history


def _train_epoch(batch_loss: BatchLoss, images: Tensor, config: TrainingConfig,
                 device: torch.device, optimizer: torch.optim.Optimizer, epoch: int,
                 last_good: str) -> dict[str, float]:
    """One crop of each image; the means of the loss and of what it reports."""
    order = torch.randperm(len(images), generator=seeded_generator(config.seed, epoch))
    batches = order.split(config.batch_size)
    totals: dict[str, float] = {}
    done = 0
    for step, batch in enumerate(batches):
        progress = ((epoch - 1) * len(batches) + step) / (config.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        x = random_crops(images[batch], config.crop, config.seed, epoch, step, 0).to(device)
        loss, figures = batch_loss(x, (config.seed, epoch, step, 1))
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at epoch {epoch}, step {step}, images "
                            f"{batch.tolist()}: lower the learning rate{last_good}")
        optimizer.zero_grad()
        (loss * processes.world_size()).backward()  # averaged over the processes, it is the sum
        optimizer.step()
        done += len(batch)
        for name, value in processes.add_up({"loss": loss.item(), **figures}, device).items():
            totals[name] = totals.get(name, 0.0) + value * len(batch)
        unconverged = 1 - totals.get("converged", done) / done
        if unconverged > config.unconverged_limit and (step >= 20 or step == len(batches) - 1):
            raise UserError(
                f"{unconverged:.0%} of the solves up to epoch {epoch}, step {step} did not "
                f"converge (mean residual {totals['residual'] / done:.1e}): the map does not "
                "contract; lower the learning rate, raise penalty or max_iterations, or raise "
                f"unconverged_limit to go on{last_good}")
    return {name: total / done for name, total in totals.items()}


def _training_key(module: nn.Module, batch_loss: BatchLoss, images: Tensor,
                  config: TrainingConfig) -> str:
    """A name that changes with the settings, the code, the starting weights and the data."""
    digest = hashlib.sha256(f"{config} {batch_loss}".encode())
    for file in CODE:
        digest.update((Path(__file__).parent / f"{file}.py").read_bytes())
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
    digest.update(images.contiguous().numpy())
    return digest.hexdigest()[:16]
