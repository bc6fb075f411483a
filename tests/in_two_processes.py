"""What test_processes.py runs under torchrun: tiny trainings, each in a folder of its own.

Arguments: a folder for the results, and how rank 1 ends: "well", or "killed" in epoch 2.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from jfbnb import processes
from jfbnb.maps import SplittingMap
from jfbnb.networks import DnCNN, Regulariser
from jfbnb.operators import Blur
from jfbnb.training import DenoiserLoss, EquilibriumLoss, TrainingConfig, train

CPU = torch.device("cpu")
# 9 images in batches of 4: the last batch has one, so the second process has none of it.
CONFIG = TrainingConfig(3, batch_size=4, crop=12, learning_rate=1e-3, seed=0, unconverged_limit=1.0)
IMAGES = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LOSSES = ("denoiser", "jfb", "implicit")


def make(name: str):
    torch.manual_seed(processes.rank())  # all start from rank 0's weights
    S = Regulariser(DnCNN(3, 6), 0.1, 0.03, None if name == "denoiser" else DnCNN(3, 6))
    for network in filter(None, (S.network, S.head)):
        torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
    if name == "denoiser":
        S.log_tau.requires_grad_(False)
        return S, DenoiserLoss(S, 0.1)
    T = SplittingMap(Blur(12, 5, 2.0), S)  # contraction 0.1: the penalty is never idle
    return S, EquilibriumLoss(T, 0.01, 1e-3, 8, 1, 0.1, 0.1, gradient=name)


def train_in(folder: Path, name: str, log=lambda line: None):
    S, loss = make(name)
    history = train(S, loss, IMAGES, CONFIG, CPU, folder / name, log=log)
    return S, history


def die(line: str) -> None:
    if line.startswith("epoch 1"):
        Path(os.environ["DYING"]).touch()


def main(folder: Path, end: str) -> None:
    with processes.process_group(CPU):
        if end == "killed":
            S, loss = make("jfb")

            def deadly(x, keys, share):
                if keys[1:3] == (2, 1) and processes.rank() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                return loss(x, keys, share)

            train(S, deadly, IMAGES, CONFIG, CPU, folder, log=print)
            return
        for name in LOSSES:
            lines = []
            S, history = train_in(folder, name, lines.append)
            if processes.rank() == 0:
                record = {"lines": lines, "history": history,
                          "weights": torch.cat([v.flatten() for v in S.state_dict().values()]
                                               ).tolist()}
                (folder / f"{name}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
