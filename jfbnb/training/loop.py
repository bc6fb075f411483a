"""Denoiser pretraining and end-to-end training (Algorithm 1), with resumable checkpoints.

Every random draw depends only on (seed, epoch, step, place in the batch). So a training that was
stopped and resumed gives the same weights, bit for bit on one machine, as an uninterrupted one.
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

RECORDS = 10  # per training, evenly spaced; at least one per epoch if epochs are given
Record = dict[str, float]


@dataclass(frozen=True)
class TrainingConfig:
    """Length and speed of a training: Adam with a cosine schedule from `learning_rate` to 0.

    Args:
        epochs: how often each training image is used, on average; need not be an integer.
        batch_size: crops per step.
        crop: side of the crops, in pixels.
        learning_rate: at the start. The schedule follows the share of the training that is done.
        seed: of all random draws.
        unconverged_limit: the largest share of fixed-point solves, from one record to the next,
            that may miss their tolerance. Training stops above it, and warns above half of it.
        warmup: steps in which the rate rises from 0, as Adam's first estimate of scale is poor.
        clip: the largest norm of a gradient; longer ones are scaled down. 0 turns this off.
        muon: whether `muon.Muon` updates the weights between hidden layers, at the same rate.
        budget: the length in applications of the network to a crop (see `computation`), instead of
            `epochs`, which is then 0.

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
        """The same, adjusted to random degradations, under which gradients vary more."""
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
    """Minimise `batch_loss` over random crops of `images`; return one record per part.

    A training has `RECORDS` parts, or one per epoch if that is more. A record has the epochs, steps
    and applications of the network so far; the part's mean loss per image, the means of the loss's
    figures, its seconds, and what `validate` returns. If the loss has an attribute `batch_reuse`,
    each batch is used that often.

    Args:
        module: trained in place.
        images: uint8 (N, 3, H, W).
        checkpoints: a folder for the state after each part. A stopped training resumes from the
            last intact one; a complete one is not repeated.

    Raises:
        UserError: if the loss is not finite, if too many solves do not converge, if a checkpoint
            cannot be read, or if there is a budget but no network to count.
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
    """The state of a training: weights, optimiser, records and progress."""

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
        self.order = 0, torch.empty(0, dtype=torch.long)  # an epoch, and the order of its images
        self.file: Path | None = None

    @property
    def done(self) -> float:
        """The share of the training that is done, 1 at the end."""
        if self.config.budget:
            return self.applications / self.config.budget
        return self.steps / max(1, round(self.config.epochs * self.batches))

    def resume(self, file: Path, log: Callable[[str], None]) -> None:
        """Load the newest intact checkpoint, if there is one; store later ones in `file`."""
        self.file = file
        self.history = resume(file, self.module, self.optimizer, log)
        if self.history:
            self.steps = int(self.history[-1]["steps"])
            self.applications = int(self.history[-1]["applications"])
            log(f"resumed after {self._so_far()}")

    def store(self, record: Record) -> None:
        """Append a record, and store the state."""
        self.history.append(record)
        if self.file is not None:
            save_checkpoint(self.file, self.module, self.optimizer, self.history)

    def part(self) -> Record:
        """Train one of `parts` equal parts by Algorithm 1; return its means."""
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
                    raise UserError("a budget counts applications of a Denoiser's network, but "
                                    "this step made none: give epochs instead")
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
        """Compute the gradient of a batch's mean loss, clip it, and set the learning rate.

        Returns the gradient's norm before clipping, (1,).
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
        """Raise UserError if too many solves of this part have not converged."""
        unconverged = 1 - means.of("converged", 1.0)
        if unconverged > self.config.unconverged_limit:
            raise UserError(
                f"{unconverged:.0%} of the solves up to {where} did not converge (mean residual "
                f"{means.of('residual', 0.0):.1e}): the map is not stable; lower the learning "
                "rate, raise penalty or max_iterations, or raise unconverged_limit to continue"
                f"{self._last_good()}")

    def progress(self) -> str:
        """One line: progress, the latest loss, PSNR and convergence, and the time left."""
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
    """Which batch a step uses: `REUSE_BUFFER` in turn, each replaced after `batch_reuse` uses.

    They are replaced at different times, so that every round has about as many new batches.
    """
    if batch_reuse == 1:
        return step
    cycle, place = divmod(step, REUSE_BUFFER)
    return (cycle + place % batch_reuse) // batch_reuse * REUSE_BUFFER + place


class _Means:
    """Running means of figures over images and steps."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, values: dict[str, Tensor]) -> Record:
        """Add some images' values; return the means of these alone."""
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
