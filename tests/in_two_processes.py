"""The trainings of test_processes.py. Under torchrun: `in_two_processes.py FOLDER [die]`."""

import os
import signal
import sys
from pathlib import Path

import torch

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur
from jfbnb.training import loop, processes
from jfbnb.training.losses import EquilibriumLoss, LossSettings
from jfbnb.training.weights import save_weights

# 9 images in batches of 4: the second process has nothing of the last batch.
CONFIG = loop.TrainingConfig(3, batch_size=4, crop=12, learning_rate=1e-3, seed=0, clip=0.1,
                             unconverged_limit=1.0)


def train_in(folder: Path, die: bool = False, log=lambda line: None) -> tuple[Equilibrium, list]:
    """A training in float64: rounding then hides no wrong sum. The penalty is never idle."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    network = DnCNN(3, 6)
    torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
    model = Equilibrium(SplittingMap(Blur(12, 5, 2.0), Denoiser(network, 0.03), 0.1))
    loss = EquilibriumLoss(model.double(), LossSettings(0.01, 1e-3, 8, 1, max_growth=0.1))

    def batch_loss(x, keys, indices):
        if die and keys[1] == 3 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(x.double(), keys, indices)

    return model, loop.train(model, batch_loss, images, CONFIG, torch.device("cpu"), folder,
                             log=log)


if __name__ == "__main__":
    loop.RECORDS = 1  # a record and a checkpoint for each epoch
    torch.set_num_threads(1)
    with processes.process_group(torch.device("cpu")):
        model, history = train_in(Path(sys.argv[1]), "die" in sys.argv)
        if processes.rank() == 0:
            save_weights(Path(sys.argv[1], "end.safetensors"), model, {"history": history})
