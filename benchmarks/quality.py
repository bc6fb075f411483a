"""Time to quality: trainings from scratch, each in a process of its own."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from jfbnb.common import ROOT
from jfbnb.datasets import Splits, load_splits, random_crops
from jfbnb.evaluation import psnr
from jfbnb.maps import SplittingMap
from jfbnb.methods import RELEASED, Tuning, make_loss, make_regulariser, restore
from jfbnb.networks import DnCNN, Regulariser, load_regulariser, precision, save_regulariser
from jfbnb.operators import get_protocol, make_blur, measure
from jfbnb.training import BatchLoss, DenoiserLoss, EquilibriumLoss, TrainingConfig, train

IMAGES = 2000  # more than a short training can see; those watched are taken from them


def pretrain(data: str, seconds: float, watched: int, file: Path) -> tuple[float, str]:
    """Train a denoiser from scratch and write it; the seconds, and where the images come from."""
    settings = _profile()
    torch.manual_seed(settings["seed"])
    S = Regulariser(DnCNN(settings["depth"], settings["width"]), tau=1.0, sigma=0.0)
    S.log_tau.requires_grad_(False)
    images = _splits(data, watched)
    with precision(S, settings["bf16"]):
        history = _train_for(seconds, 1, S, DenoiserLoss(S, 0.1), images.train.images,
                             settings["pretrain_batch_size"], settings["pretrain_crop"], 1e-3)
    save_regulariser(file, S, {})
    return sum(record["seconds"] for record in history), images.source


def train_method(name: str, data: str, seconds: float, epochs: int, watched: int,
                 denoiser: Path) -> list[dict]:
    """Train a method from the denoiser; validation PSNR against the seconds of its own training.

    The settings are profile cpu's and notebook 4's; tau and sigma are those that were searched
    for the released weights, and the search is not timed.

    Args:
        epochs: how often the PSNR is taken on the way, on `watched` images and off the clock.
    """
    settings, setup = _profile(), get_protocol("paper")
    tuned = Tuning.load(RELEASED / "tuning.json").settings(name)
    S = make_regulariser(load_regulariser(denoiser).network, tuned)
    A_crop, A = make_blur(setup, settings["crop"]), make_blur(setup)
    loss = make_loss(name, A_crop, S, tuned, EquilibriumLoss(
        SplittingMap(A_crop, S), setup.noise_std, settings["tolerance"],
        settings["max_iterations"], settings["power_iterations"], contraction=0.9, penalty=0.1,
        bf16=settings["bf16"]))
    images = _splits(data, watched)
    x = images.validation.as_float()
    d = measure(A, x, setup.noise_std, settings["seed"], images.validation.indices)

    def validate() -> dict[str, float]:
        restored = [restore(name, A, S, one, tuned)[0] for one in d.split(1)]
        return {"validation_psnr": psnr(torch.cat(restored), x).mean().item()}

    start = {"seconds": 0.0, **validate()}
    history = _train_for(seconds, epochs, S, loss, images.train.images, settings["batch_size"],
                         settings["crop"], settings["learning_rate"], validate)
    records, clock = [], 0.0
    for epoch in [start, *history]:
        clock += epoch["seconds"]
        records.append({"method": name, "seconds": clock, "psnr": epoch["validation_psnr"]})
    return records


def _profile() -> dict:
    return yaml.safe_load((ROOT / "notebooks" / "profiles" / "cpu.yaml").read_text())


def _splits(data: str, watched: int) -> Splits:
    images = load_splits(data, 128, n_train=IMAGES, n_validation=watched, n_test=1)
    images.validation = images.validation[:watched]  # bundled photographs have their own split
    return images


def _train_for(seconds: float, epochs: int, S: Regulariser, loss: BatchLoss, images: Tensor,
               batch_size: int, crop: int, learning_rate: float,
               validate: Callable[[], dict[str, float]] | None = None) -> list[dict[str, float]]:
    """`train` for about `seconds`: an epoch has as many images as `epochs` of them allow."""
    x = random_crops(images[:batch_size], crop, 0)
    for _ in range(3):  # the first are slower
        clock = time.perf_counter()
        loss(x, (0,))[0].backward()
        per_batch = time.perf_counter() - clock
    images = images[:batch_size * max(1, round(seconds / epochs / per_batch))]
    epochs = max(1, round(seconds / per_batch * batch_size / len(images)))
    config = TrainingConfig(epochs, batch_size, crop, learning_rate, seed=0, unconverged_limit=1.0)
    return train(S, loss, images, config, torch.device("cpu"), validate=validate,
                 log=lambda line: None)
