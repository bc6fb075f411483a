"""Denoiser pretraining and end-to-end training (Algorithm 1), with resumable checkpoints.

Every random draw depends on (seed, epoch, step, place in the batch) alone, so a training that was
stopped and resumed gives the same weights, bit for bit on one machine, as one that was not.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, seeded_generator
from jfbnb.data import random_crops
from jfbnb.training import processes
from jfbnb.training.checkpoints import resume, save_checkpoint, training_key
from jfbnb.training.computation import metered
from jfbnb.training.losses import REUSE_BUFFER, BatchLoss
from jfbnb.training.muon import Muon
from jfbnb.training.weights import fill

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

    def random_degradations(self) -> Self:
        """That of a training whose steps meet something else each: their gradients differ."""
        return replace(self, warmup=100, clip=0.02, muon=True)

    @classmethod
    def read(cls, card: dict) -> Self:
        """That of a model card. What a card of an earlier release lacks is as it was then."""
        return cls(**card["training"])


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
    kind = Muon if config.muon else torch.optim.Adam
    optimizer = kind(module.parameters(), lr=config.learning_rate)
    history: list[dict[str, float]] = []
    file = None
    if checkpoints is not None:
        key = training_key(module, batch_loss, images, config)
        file = checkpoints / f"{key[:16]}.safetensors"
        history = resume(file, module, optimizer, log)
        if history:
            log(f"resumed after {_so_far(history, config)}")
    parts = max(RECORDS, math.ceil(config.epochs))
    batches = math.ceil(len(images) / config.batch_size)
    while not history or config.share(history[-1]["steps"], batches,
                                      history[-1]["applications"]) < 1:
        start = time.perf_counter()
        last_good = f"; the last good checkpoint is {file}" if file and history else ""
        record = _train_part(batch_loss, images, config, device, optimizer, module, parts,
                             getattr(batch_loss, "batch_reuse", 1), history, last_good)
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
                parts: int, batch_reuse: int, history: list[dict[str, float]],
                last_good: str) -> dict[str, float]:
    """The steps of a training up to the next of so many even shares of it; their record."""
    batches = math.ceil(len(images) / config.batch_size)
    first, before = (int(history[-1][name]) if history else 0 for name in ("steps", "applications"))
    number, spent, done = first, before, config.share(first, batches, before)
    end = (math.floor(done * parts + 1e-9) + 1) / parts - 1e-9
    means, order, shuffled = _Means(device), (), None
    with metered(module) as meter:
        while done < end:
            met = _which(number, batch_reuse)
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
    """One step down the mean loss of a batch, of which this process has a share."""
    optimizer.zero_grad()
    (losses.sum() * (1 / batch_size)).backward()
    parameters = optimizer.param_groups[0]["params"]
    processes.add_up_gradients(parameters)
    length = nn.utils.clip_grad_norm_(parameters, config.clip or math.inf)
    latest = means.add({"loss": losses.detach(), "gradient": length.expand(1), **figures})
    if not math.isfinite(latest["loss"]):
        raise UserError(f"the loss is {latest['loss']} at {place}")
    optimizer.step()


def _which(step: int, batch_reuse: int) -> int:
    """The number of the batch that a step meets: of `POOL` in turn, each replaced after its visits.

    They are replaced at different times, so that about the same number of solves is due at any.
    """
    if batch_reuse == 1:
        return step
    cycle, place = divmod(step, REUSE_BUFFER)
    return (cycle + place % batch_reuse) // batch_reuse * REUSE_BUFFER + place


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
