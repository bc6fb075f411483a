"""Denoiser pretraining and end-to-end training (Algorithm 1), with resumable checkpoints.

Every random draw depends on (seed, epoch, step, place in the batch) alone, so a training that was
stopped and resumed gives the same weights, bit for bit on one machine, as one that was not.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from jfbnb.common import UserError, seeded_generator
from jfbnb.data import random_crops
from jfbnb.training.checkpoints import resume, save_checkpoint, training_key
from jfbnb.training.computation import metered
from jfbnb.training.losses import REUSE_BUFFER, BatchLoss
from jfbnb.training.muon import Muon

RECORDS = 10  # of a training, evenly spread over it; where epochs are given, at least one in each
Record = dict[str, float]


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast: Adam with a cosine schedule from `learning_rate` to 0.

    Args:
        epochs: how often each training image is seen, on average; it need not be whole.
        batch_size: crops in a step.
        crop: side of the crops, in pixels.
        learning_rate: at the start. The schedule follows the share of the training that is done.
        seed: of all random draws.
        unconverged_limit: the share of fixed-point solves, from one record to the next, that may
            end above their tolerance. Above it training stops, above half of it training warns.
        warmup: steps in which the rate rises from 0, as Adam's first estimate of scale is poor.
        clip: the norm to which a longer gradient is cut; 0 leaves it.
        muon: whether `muon.Muon` moves the weights between hidden layers, at the same rate.
        budget: in the place of `epochs`, which is then 0: what the training may spend, in
            applications of the network to a crop (`computation`).

    Raises:
        UserError: unless one of epochs and budget is positive and the other 0.
    """

    epochs: float
    batch_size: int
    crop: int
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

    def random_degradations(self) -> Self:
        """The same, for steps whose degradations, and so whose gradients, differ."""
        return replace(self, warmup=100, clip=0.02, muon=True)


def train(
    module: nn.Module,
    batch_loss: BatchLoss,
    images: Tensor,
    config: TrainingConfig,
    device: torch.device,
    checkpoints: Path | None = None,
    validate: Callable[[], Record] | None = None,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Minimise `batch_loss` over random crops of `images`; return the records of its parts.

    A loss with an attribute `batch_reuse` gets each batch so often. A training has `RECORDS` parts,
    or as many as epochs where those are more. A record has the epochs, steps and applications of
    the network so far, the part's mean loss per image, the means of what the loss reports, its
    seconds, and what `validate` returns.

    Args:
        module: what is trained, in place.
        images: uint8 (N, 3, H, W).
        checkpoints: a folder. The state after each part is stored there; a training that was
            stopped resumes from the last one that is whole, and a complete one is not repeated.

    Raises:
        UserError: if the loss is not finite, if too many solves do not converge, if a checkpoint
            cannot be read, or if there is a budget and no network to count.
    """
    if not 0 < config.crop <= min(images.shape[2:]):
        raise UserError(f"crop={config.crop} does not fit images of {tuple(images.shape[2:])}")
    module.to(device)
    trainer = Trainer(module, batch_loss, images, config, device)
    if checkpoints is not None:
        key = training_key(module, batch_loss, images, config)
        trainer.resume(checkpoints / f"{key[:16]}.safetensors", log)
    while trainer.done < 1:
        start = time.perf_counter()
        record = trainer.part()
        record["seconds"] = time.perf_counter() - start
        record.update(validate() if validate else {})
        trainer.store(record)
        log(trainer.progress())
        if 1 - record.get("converged", 1) > config.unconverged_limit / 2:
            log(f"warning: {1 - record['converged']:.0%} of the solves up to epoch "
                f"{record['epoch']:.4g} did not converge; training stops above "
                f"{config.unconverged_limit:.0%}")
    return trainer.history


class Trainer:
    """The state of a training: weights, optimiser, records, and how much has been done."""

    def __init__(self, module: nn.Module, batch_loss: BatchLoss, images: Tensor,
                 config: TrainingConfig, device: torch.device):
        self.module, self.images, self.config, self.device = module, images, config, device
        self.batch_loss = batch_loss
        self.batch_reuse = getattr(batch_loss, "batch_reuse", 1)
        kind = Muon if config.muon else torch.optim.Adam
        self.optimizer = kind(module.parameters(), lr=config.learning_rate)
        self.batches = math.ceil(len(images) / config.batch_size)  # in an epoch
        self.parts = max(RECORDS, math.ceil(config.epochs))
        self.history: list[Record] = []
        self.steps, self.applications = 0, 0
        self.order = 0, torch.empty(0, dtype=torch.long)  # an epoch, and its order of images
        self.file: Path | None = None

    @property
    def done(self) -> float:
        """The share of the training that is done, 1 at the end."""
        if self.config.budget:
            return self.applications / self.config.budget
        return self.steps / max(1, round(self.config.epochs * self.batches))

    def resume(self, file: Path, log: Callable[[str], None]) -> None:
        """Take up the newest checkpoint that is whole, if there is one; later ones go there."""
        self.file = file
        self.history = resume(file, self.module, self.optimizer, log)
        if self.history:
            self.steps = int(self.history[-1]["steps"])
            self.applications = int(self.history[-1]["applications"])
            log(f"resumed after {self._so_far()}")

    def store(self, record: Record) -> None:
        """Add a record, and store the state."""
        self.history.append(record)
        if self.file is not None:
            save_checkpoint(self.file, self.module, self.optimizer, self.history)

    def part(self) -> Record:
        """Train up to the next of `parts` even shares: Algorithm 1. Returns the means over it."""
        end = (math.floor(self.done * self.parts + 1e-9) + 1) / self.parts - 1e-9
        means, first, before = _Means(), self.steps, self.applications
        with metered(self.module) as meter:
            while self.done < end:
                epoch, step, batch = self.next_batch()
                where = f"epoch {epoch}, step {step}"
                x = random_crops(self.images[batch], self.config.crop, self.config.seed, epoch,
                                 step, 0)
                losses, figures = self.batch_loss(x.to(self.device),
                                                  (self.config.seed, epoch, step, 1))
                length = self.backward(losses.mean())
                latest = means.add({"loss": losses.detach(), "gradient": length, **figures})
                if not math.isfinite(latest["loss"]):
                    raise UserError(f"the loss is {latest['loss']} at {where}, images "
                                    f"{batch.tolist()}: lower the learning rate{self._last_good()}")
                self.optimizer.step()
                self.steps += 1
                if self.config.budget and not meter.applications:
                    raise UserError("a budget counts applications of a Denoiser's network, and "
                                    "this step has made none: give epochs")
                self.applications = before + meter.applications
                if self.steps - first > 20 or self.done >= end:
                    self.check_solves(means, where)
        return {"epoch": self.steps / self.batches, "steps": self.steps,
                "applications": self.applications, **means.all()}

    def next_batch(self) -> tuple[int, int, Tensor]:
        """Epoch, step in it, and the images of the next batch."""
        number, size = batch_number(self.steps, self.batch_reuse), self.config.batch_size
        epoch, step = number // self.batches + 1, number % self.batches
        if self.order[0] != epoch:
            generator = seeded_generator(self.config.seed, epoch)
            self.order = epoch, torch.randperm(len(self.images), generator=generator)
        return epoch, step, self.order[1][step * size:(step + 1) * size]

    def backward(self, loss: Tensor) -> Tensor:
        """The gradient of a batch's mean loss, cut to `clip`, and the step's learning rate.

        Returns the gradient's norm before it is cut, (1,).
        """
        config = self.config
        self.optimizer.zero_grad()
        loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        for group in self.optimizer.param_groups:
            group["lr"] = (config.learning_rate * 0.5 * (1 + math.cos(math.pi * self.done))
                           * min(1.0, (self.steps + 1) / (config.warmup + 1)))
        return nn.utils.clip_grad_norm_(parameters, config.clip or math.inf).expand(1)

    def check_solves(self, means: "_Means", where: str) -> None:
        """Raise UserError where too many solves of this part have not converged."""
        unconverged = 1 - means.of("converged", 1.0)
        if unconverged > self.config.unconverged_limit:
            raise UserError(
                f"{unconverged:.0%} of the solves up to {where} did not converge (mean residual "
                f"{means.of('residual', 0.0):.1e}): the map is not stable; lower the learning "
                "rate, raise penalty or max_iterations, or raise unconverged_limit to go on"
                f"{self._last_good()}")

    def progress(self) -> str:
        """How much is done, the latest loss, PSNR and convergence, and the time that is left."""
        record = self.history[-1]
        found = [self._so_far(), f"loss {record['loss']:.3g}"]
        if record.get("mse", 0.0) > 0:
            found.append(f"{-10 * math.log10(record['mse']):.1f} dB on its crops")
        if record.get("converged", 1.0) < 1:
            found.append(f"{record['converged']:.1%} of the solves converged")
        seconds = sum(r["seconds"] for r in self.history) * (1 / self.done - 1)
        return ", ".join([*found, f"{seconds:.0f} s left" if self.done < 1 else "done"])

    def _so_far(self) -> str:
        record, config = self.history[-1], self.config
        if config.budget:
            return (f"epoch {record['epoch']:.3g}, {record['applications']:.0f} of "
                    f"{config.budget:.0f} applications")
        return f"epoch {record['epoch']:.4g} of {config.epochs:.4g}"

    def _last_good(self) -> str:
        return (f"; the last good checkpoint is {self.file}" if self.file and self.history else "")


def batch_number(step: int, batch_reuse: int) -> int:
    """Which batch a step has: each of `REUSE_BUFFER` in turn, replaced after `batch_reuse` uses.

    They are replaced at different times, so that every round has about as many new batches.
    """
    if batch_reuse == 1:
        return step
    cycle, place = divmod(step, REUSE_BUFFER)
    return (cycle + place % batch_reuse) // batch_reuse * REUSE_BUFFER + place


class _Means:
    """Means of figures over the images and steps so far."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, values: dict[str, Tensor]) -> Record:
        """Take some images' values in; return their own means."""
        latest = {name: (v.double().sum().item(), len(v)) for name, v in values.items()}
        for name, (total, count) in latest.items():
            before = self.totals.get(name, (0.0, 0))
            self.totals[name] = before[0] + total, before[1] + count
        return {name: total / max(count, 1) for name, (total, count) in latest.items()}

    def of(self, name: str, missing: float) -> float:
        total, count = self.totals.get(name, (missing, 1.0))
        return total / max(count, 1.0)

    def all(self) -> Record:
        return {name: self.of(name, 0.0) for name in self.totals}
