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

from jfbnb import datasets, processes, training
from jfbnb.maps import SplittingMap
from jfbnb.networks import DnCNN, Regulariser
from jfbnb.operators import Blur
from jfbnb.training import WHOLE, BatchLoss, DenoiserLoss, EquilibriumLoss, TrainingConfig

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

    def __call__(self, x, keys, share=WHOLE):
        return self.loss(x.double(), keys, share)


def make(name: str):
    torch.manual_seed(processes.rank())  # all start from rank 0's weights
    S = Regulariser(DnCNN(3, 6), 0.1, 0.03, None if name == "denoiser" else DnCNN(3, 6))
    for network in filter(None, (S.network, S.head)):
        torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
    T = SplittingMap(Blur(12, 5, 2.0), S)
    if name == "jfb in float32":
        return S, equilibrium_loss(T, "jfb")
    S.double()
    if name == "denoiser":
        S.log_tau.requires_grad_(False)
        return S, InFloat64(DenoiserLoss(S, 0.1))
    return S, InFloat64(equilibrium_loss(T, name))


def equilibrium_loss(T: SplittingMap, gradient: str) -> EquilibriumLoss:
    """It allows a contraction of 0.1 alone: the penalty is never idle."""
    return EquilibriumLoss(T, 0.01, 1e-3, 8, 1, 0.1, 0.1, gradient=gradient)


def train_in(folder: Path, name: str, log=lambda line: None):
    S, loss = make(name)
    return S, training.train(S, loss, IMAGES, CONFIG, CPU, folder, log=log)


def train_well(folder: Path) -> None:
    """All losses from the start, and jfb from what a single process has left in `begun`."""
    for place, name in [*((name, name) for name in LOSSES), ("begun", "jfb")]:
        lines = []
        S, history = train_in(folder / place, name, lines.append)
        if processes.rank() == 0:
            weights = torch.cat([value.flatten() for value in S.state_dict().values()])
            record = {"lines": lines, "history": history, "weights": weights.tolist()}
            (folder / f"{place}.json").write_text(json.dumps(record))


def die_in_epoch_2(folder: Path) -> None:
    """As train_in(folder, "jfb"), but process 1 is killed in the second step of epoch 2."""
    def crops(images, size, *keys):
        if keys[1:3] == (2, 1) and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return datasets.random_crops(images, size, *keys)

    training.random_crops = crops
    train_in(folder, "jfb")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with processes.process_group(CPU):
        {"well": train_well, "killed": die_in_epoch_2}[sys.argv[1]](Path(sys.argv[2]))
