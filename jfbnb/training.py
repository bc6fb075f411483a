"""Denoiser pretraining and equilibrium training by JFB (Algorithm 1), with resumable checkpoints.

Every random draw depends on (seed, epoch, step) alone, so a training that was stopped and resumed
gives the same weights, bit for bit on one machine, as one that was not.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path, seeded_generator
from jfbnb.datasets import random_crops
from jfbnb.fixed_point import SolveInfo, anderson
from jfbnb.gradients import jfb
from jfbnb.maps import ImplicitMap
from jfbnb.networks import Regulariser
from jfbnb.operators import measure

# The modules that a training depends on: when one changes, old checkpoints are not taken up.
CODE = ("common", "datasets", "operators", "networks", "maps", "fixed_point", "gradients",
        "training")

# Loss of a batch of crops x, given the keys that seed its draws: (loss, figures to average).
BatchLoss = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast: Adam with a cosine schedule from `learning_rate` to 0."""

    epochs: int
    batch_size: int
    crop: int  # side in pixels
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class DenoiserLoss:
    """|D(x + sigma n) - x|^2, with sigma uniform in [0, noise_max] for each image."""

    S: Regulariser
    noise_max: float

    def __call__(self, x: Tensor, keys: tuple[int, ...]) -> tuple[Tensor, dict[str, float]]:
        generator = seeded_generator(*keys)
        sigma = self.noise_max * torch.rand(len(x), 1, 1, 1, generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        noisy = x + (sigma * noise).to(x)
        return (self.S.denoise(noisy) - x).square().mean(), {}


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
class JFBLoss:
    """Algorithm 1's loss |N(d) - x|^2, and a penalty that keeps T a contraction.

    Args:
        T: the map T(x; d); its A must fit the crops.
        noise_std: of the measurements, on images in [0, 1].
        tolerance, max_iterations: of the solve for x*, by Anderson without gradient.
        power_iterations: of the contraction estimate, on the first half of the batch.
        contraction, penalty: adds `penalty * max(0, estimate - contraction)^2`.
    """

    T: ImplicitMap
    noise_std: float
    tolerance: float
    max_iterations: int
    power_iterations: int
    contraction: float
    penalty: float

    def __call__(self, x: Tensor, keys: tuple[int, ...]) -> tuple[Tensor, dict[str, float]]:
        T = self.T
        d = measure(T.A, x, self.noise_std, hash_keys(keys), list(range(len(x))))
        x_star, info = anderson(lambda z: T(z, d), T.start(d), self.tolerance,
                                self.max_iterations)
        Tx = jfb(lambda z: T(z, d), x_star)
        error = (T.image(Tx) - x).square().mean()
        half = slice(0, (len(x) + 1) // 2)
        factor = contraction_estimate(lambda z: T(z, d[half]), x_star[half], Tx[half],
                                      self.power_iterations)
        excess = (factor - self.contraction).clamp_min(0).square().mean()
        return error + self.penalty * excess, {"mse": error.item(), **_solve_figures(info),
                                               "contraction": factor.mean().item()}


def _solve_figures(info: SolveInfo) -> dict[str, float]:
    return {"iterations": info.iterations.float().mean().item(),
            "residual": info.residual.mean().item(),
            "converged": info.converged.float().mean().item()}


def hash_keys(keys: tuple[int, ...]) -> int:
    """One integer from several, for functions that take a single seed."""
    return seeded_generator(*keys).initial_seed() >> 1


def train(
    module: nn.Module,
    batch_loss: BatchLoss,
    images: Tensor,
    config: TrainingConfig,
    device: torch.device,
    checkpoints: Path | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    log: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Minimise `batch_loss` over random crops of `images`; return one record per epoch.

    A record has the epoch, the mean loss per image, the means of what the loss reports, what
    `validate` returns, and the seconds. With `checkpoints`, a folder, each epoch is stored and a
    stopped training goes on from the last one.

    Args:
        module: what is trained, in place.
        images: uint8 (N, 3, H, W).

    Raises:
        UserError: if the loss is not finite, or a checkpoint cannot be read.
    """
    if not 0 < config.crop <= min(images.shape[2:]):
        raise UserError(f"crop={config.crop} does not fit images of {tuple(images.shape[2:])}")
    module.to(device)
    optimizer = torch.optim.Adam(module.parameters(), lr=config.learning_rate)
    history: list[dict[str, float]] = []
    file = None
    if checkpoints is not None:
        file = checkpoints / f"{_training_key(module, batch_loss, images, config)}.safetensors"
        if file.exists():
            history = load_checkpoint(file, module, optimizer)
            log(f"resumed after epoch {len(history)} of {config.epochs}")
    steps = math.ceil(len(images) / config.batch_size)
    for epoch in range(len(history) + 1, config.epochs + 1):
        start = time.perf_counter()
        order = torch.randperm(len(images), generator=seeded_generator(config.seed, epoch))
        totals: dict[str, float] = {}
        for step, batch in enumerate(order.split(config.batch_size)):
            progress = ((epoch - 1) * steps + step) / (config.epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
            x = random_crops(images[batch], config.crop, config.seed, epoch, step, 0).to(device)
            loss, figures = batch_loss(x, (config.seed, epoch, step, 1))
            if not loss.isfinite():
                raise UserError(f"the loss is {loss.item()} at epoch {epoch}, step {step}, images "
                                f"{batch.tolist()}: lower the learning rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in {"loss": loss.item(), **figures}.items():
                totals[name] = totals.get(name, 0.0) + value * len(batch)
        record = {"epoch": epoch, **{k: v / len(images) for k, v in totals.items()}}
        record.update(validate() if validate else {})
        record["seconds"] = time.perf_counter() - start
        history.append(record)
        if file is not None:
            save_checkpoint(file, module, optimizer, history)
        log("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
    return history


# --- checkpoints: safetensors, so that loading one runs no code ---------------------------------


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


def save_checkpoint(file: Path, module: nn.Module, optimizer: torch.optim.Optimizer,
                    history: list[dict[str, float]]) -> None:
    """Store weights, Adam's moments and the history, whole or not at all."""
    tensors = {f"module.{k}": v.contiguous() for k, v in module.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": v.contiguous() for k, v in moments.items()}
    with atomic_path(file) as temporary:
        save_file(tensors, temporary, metadata={"history": json.dumps(history)})


def load_checkpoint(file: Path, module: nn.Module,
                    optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Restore what `save_checkpoint` stored, in place; return the history.

    Raises:
        UserError: if the file is damaged.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            history = json.loads(stored.metadata()["history"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, moment = name.split(".")
                state.setdefault(int(i), {})[moment] = value
        module.load_state_dict({name.removeprefix("module."): value
                                for name, value in tensors.items() if name.startswith("module.")})
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    except (SafetensorError, KeyError, RuntimeError, ValueError, OSError) as error:
        raise UserError(f"the checkpoint {file} is damaged ({error}): delete it to start afresh"
                        ) from error
    return history
