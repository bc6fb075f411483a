"""What test_processes.py runs under torchrun: tiny trainings, each in a folder of its own.

Arguments: how rank 1 ends, "well" or "killed" in epoch 2; and a folder for the results.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur
from jfbnb.training import loop, losses, processes
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import (
    BatchLoss,
    DenoiserLoss,
    EquilibriumLoss,
    ImplicitLoss,
    LossSettings,
)

CPU = torch.device("cpu")
# 9 images in batches of 4: the last batch has one, so the second process has none of it.
CONFIG = TrainingConfig(3, batch_size=4, crop=12, learning_rate=1e-3, seed=0, unconverged_limit=1.0)
IMAGES = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LOSSES = ("denoiser", "jfb", "implicit", "jfb in float32")  # float64 but for the last


@dataclass(frozen=True)
class InFloat64:
    """Rounding, which a sum in another order changes, then does not hide a wrong sum."""

    loss: BatchLoss

    def __call__(self, x, keys, indices):
        return self.loss(x.double(), keys, indices)


def make(name: str):
    torch.manual_seed(processes.rank())  # all start from rank 0's weights
    network, head = DnCNN(3, 6), DnCNN(3, 6)
    for part in (network, head):
        torch.nn.init.normal_(part.layers[-1].weight, std=0.05)
    D = Denoiser(network, 0.03)
    if name == "denoiser":
        return D.double(), InFloat64(DenoiserLoss(D, 0.1))
    model = Equilibrium(SplittingMap(Blur(12, 5, 2.0), D, 0.1)).add_head(head)
    # It allows a contraction of 0.1 alone: the penalty is never idle.
    settings = LossSettings(0.01, 1e-3, 8, 1, max_growth=0.1)
    if name == "jfb in float32":
        return model, EquilibriumLoss(model, settings)
    kind = {"jfb": EquilibriumLoss, "implicit": ImplicitLoss}[name]
    return model.double(), InFloat64(kind(model, settings))


def train_in(folder: Path, name: str, log=lambda line: None):
    module, loss = make(name)
    return module, loop.train(module, loss, IMAGES, CONFIG, CPU, folder, log=log)


def train_well(folder: Path) -> None:
    """All losses from the start, and jfb from what a single process has left in `begun`."""
    for place, name in [*((name, name) for name in LOSSES), ("begun", "jfb")]:
        lines = []
        module, history = train_in(folder / place, name, lines.append)
        if processes.rank() == 0:
            weights = torch.cat([value.flatten() for value in module.state_dict().values()])
            record = {"lines": lines, "history": history, "weights": weights.tolist()}
            (folder / f"{place}.json").write_text(json.dumps(record))


def die_in_epoch_2(folder: Path) -> None:
    """As train_in(folder, "jfb"), but process 1 is killed in the second step of epoch 2."""
    measure = losses.draw_measurement

    def dies(A, x, noise_std, keys, indices):
        if keys[1:3] == (2, 1) and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(A, x, noise_std, keys, indices)

    losses.draw_measurement = dies
    train_in(folder, "jfb")


if __name__ == "__main__":
    torch.set_num_threads(1)
    loop.RECORDS = 1  # one for each epoch
    with processes.process_group(CPU):
        {"well": train_well, "killed": die_in_epoch_2}[sys.argv[1]](Path(sys.argv[2]))
