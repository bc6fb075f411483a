"""Time to quality: trainings from scratch by the package's recipes, each in its own process."""

import time
from dataclasses import replace
from pathlib import Path

import torch
from contenders import BF16, CPU, PAPER, profile

from jfbnb.datasets import Splits, load_splits, random_crops
from jfbnb.methods import METHODS, RELEASED, Tuning
from jfbnb.networks import Denoiser, DnCNN, load_denoiser, save_weights
from jfbnb.recipes import Run, pose, prepare, score, train_denoiser, train_method
from jfbnb.training import BatchLoss, DenoiserLoss, LossSettings, TrainingConfig

IMAGES = 2000  # more than a short training can see; those watched are taken from them
NOISE_MAX = 0.1  # that the denoiser learns to take out
QUIET = Run(CPU, log=lambda line: None)


def pretrain(data: str, seconds: float, watched: int, file: Path) -> tuple[float, str]:
    """Train a denoiser from scratch and write it; the seconds, and where the images come from."""
    p = profile()
    torch.manual_seed(p["seed"])
    network = DnCNN(p["depth"], p["width"])
    config = TrainingConfig(1, p["pretrain_batch_size"], p["pretrain_crop"], 1e-3, p["seed"])
    loss = DenoiserLoss(Denoiser(network, 0.0), NOISE_MAX, BF16)
    config, splits = for_seconds(seconds, config, loss, data, watched)
    D, history = train_denoiser(network, splits, config, NOISE_MAX, BF16, QUIET)
    save_weights(file, D, {})
    return history.seconds.sum(), splits.source


def train(name: str, data: str, seconds: float, epochs: int, watched: int,
          denoiser: Path) -> list[dict]:
    """Train a method from the denoiser; validation PSNR against the seconds of its own training.

    The settings are profile cpu's and notebook 4's; tau and sigma are those that were searched
    for the released weights, and the search is not timed.

    Args:
        epochs: how often the PSNR is taken on the way, on `watched` images and off the clock.
    """
    p, method, network = profile(), METHODS[name], load_denoiser(denoiser).network
    settings = Tuning.load(RELEASED / "tuning.json").settings(method)
    losses = LossSettings(PAPER.noise_std, p["tolerance"], p["max_iterations"],
                          p["power_iterations"], bf16=BF16)
    config = TrainingConfig(epochs, p["batch_size"], p["crop"], p["learning_rate"], p["seed"],
                            unconverged_limit=1.0)
    model, loss = prepare(method, network, settings, PAPER.operator(config.crop), losses)
    config, splits = for_seconds(seconds, config, loss, data, watched)
    problem = pose(PAPER, splits, watched, config.seed, CPU)
    start = score(model.on(problem.A), problem)["psnr"]
    _, history = train_method(method, network, settings, problem, config, losses, QUIET)
    return [{"method": name, "seconds": clock, "psnr": psnr} for clock, psnr in zip(
        [0.0, *history.seconds.cumsum()], [start, *history.validation_psnr], strict=True)]


def for_seconds(seconds: float, config: TrainingConfig, loss: BatchLoss, data: str,
                watched: int) -> tuple[TrainingConfig, Splits]:
    """The training for about so long: an epoch has as many images as its epochs allow."""
    splits = load_splits(data, PAPER.image_size, n_train=IMAGES, n_validation=watched, n_test=1)
    size = config.batch_size
    x = random_crops(splits.train.images[:size], config.crop, 0)
    for _ in range(3):  # the first are slower
        clock = time.perf_counter()
        loss(x, (0,), range(len(x)))[0].mean().backward()
        per_batch = time.perf_counter() - clock
    train = splits.train[:size * max(1, round(seconds / config.epochs / per_batch))]
    epochs = max(1, round(seconds / per_batch * size / len(train)))
    return replace(config, epochs=epochs), replace(splits, train=train)
