"""Train a profile's networks by command, in one process or, under torchrun, in several.

Notebooks 3 and 4 do the same step by step; they take what this stores by their parameter
`weights`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from jfbnb import diagnostics, processes
from jfbnb.common import atomic_write, describe_device, pick_device
from jfbnb.datasets import Splits, load_splits
from jfbnb.evaluation import psnr
from jfbnb.maps import SplittingMap
from jfbnb.methods import Settings, Tuning, make_regulariser, restore, solve
from jfbnb.networks import (
    DnCNN,
    Regulariser,
    load_regulariser,
    matched_sigma,
    save_regulariser,
)
from jfbnb.operators import Protocol, get_protocol, make_blur, measure
from jfbnb.reproduce import NOTEBOOKS, STEPS, alone, load_profile, step_parameters
from jfbnb.training import BatchLoss, DenoiserLoss, EquilibriumLoss, TrainingConfig, train

Parameters = dict[str, Any]  # those of notebooks 3 and 4, by name


@dataclass(frozen=True)
class Job:
    """What is trained, how, and what the model card says beside it."""

    S: Regulariser
    loss: BatchLoss
    config: TrainingConfig
    validate: Callable[[], dict[str, float]] | None
    card: dict[str, Any]


def network_parameters(profile: str, overrides: Parameters) -> Parameters:
    """What notebooks 3 and 4 are given in a profile. Raises UserError for unknown ones."""
    given = load_profile(profile) | overrides
    if given["data"] != "bundled":
        given["data"] = str((NOTEBOOKS / given["data"]).resolve())
    pretraining, training = step_parameters(STEPS[2:4], given).values()
    return pretraining | training


def train_network(name: str, parameters: Parameters, start: Path, out: Path, command: str,
                  log: Callable[[str], None] = print) -> None:
    """Train the denoiser of notebook 3, or the JFB network of notebook 4.

    Its weights go to out/NAME.safetensors, with a model card that has the history, and the history
    as a table too. The checkpoints are in out/checkpoints.

    Args:
        name: "denoiser" or "jfb".
        start: the folder with the denoiser that "jfb" starts from.
        command: what the model card says that made it.

    Raises:
        UserError: for bad parameters, missing data or weights, or where training fails.
    """
    with processes.process_group(pick_device(parameters["device"])) as device:
        if processes.rank() > 0:
            _train(name, parameters, start, out, command, device, lambda line: None)
            return
        with alone(out):
            _train(name, parameters, start, out, command, device, log)


def _train(name: str, p: Parameters, start: Path, out: Path, command: str, device: torch.device,
           log: Callable[[str], None]) -> None:
    setup = get_protocol(p["protocol"])
    with processes.rank_0_first():  # the others find the decoded images in the cache
        splits = load_splits(p["data"], setup.image_size, p["n_train"], p["n_validation"],
                             p["n_test"], log)
    if name == "denoiser":
        job = _denoiser(p)
    else:
        network = load_regulariser(start / "denoiser.safetensors").network.to(device)
        job = _jfb(p, setup, splits, network, device)
    log(f"{len(splits.train)} training images: {splits.source}; processes: "
        f"{processes.world_size()}; device of the first: {describe_device(device)}")
    history = pd.DataFrame(train(job.S, job.loss, splits.train.images, job.config, device,
                                 out / "checkpoints", job.validate, log))
    weights = out / f"{name}.safetensors"
    if processes.rank() == 0:
        save_regulariser(weights, job.S, {
            **job.card, "training data": splits.source, "training images": len(splits.train),
            "training": asdict(job.config), "history": history.to_dict(orient="records"),
            "training seconds": round(history.seconds.sum()), "device": describe_device(device),
            "processes": processes.world_size(), "command": command, "torch": torch.__version__})
        atomic_write(out / f"{name}_history.csv", history.to_csv(index=False))
    log(f"written: {weights}")


def _denoiser(p: Parameters) -> Job:
    torch.manual_seed(p["seed"])
    S = Regulariser(DnCNN(p["depth"], p["width"], bf16=p["bf16"]), tau=1.0, sigma=0.0)
    S.log_tau.requires_grad_(False)
    config = TrainingConfig(p["pretrain_epochs"], p["pretrain_batch_size"], p["pretrain_crop"],
                            p["pretrain_learning_rate"], p["seed"])
    return Job(S, DenoiserLoss(S, p["noise_max"]), config, None, {
        "what": "DnCNN denoiser, pretrained on Gaussian noise", "noise_max": p["noise_max"]})


def _jfb(p: Parameters, setup: Protocol, splits: Splits, network: DnCNN,
         device: torch.device) -> Job:
    images = splits.validation[:p["search_images"]]
    x = images.as_float().to(device)
    A, A_crop = make_blur(setup).to(device), make_blur(setup, p["crop"]).to(device)
    d = measure(A, x, setup.noise_std, p["seed"], images.indices)
    S = make_regulariser(network, _plug_and_play(p, setup, network, A, x, d), head=True)
    settings = {"noise_std": setup.noise_std,
                **{k: p[k] for k in ("tolerance", "max_iterations", "power_iterations",
                                     "contraction", "penalty", "bf16")}}
    config = TrainingConfig(p["epochs"], p["batch_size"], p["crop"], p["learning_rate"],
                            p["seed"], p["unconverged_limit"])
    lo = (setup.image_size - p["crop"]) // 2
    few = x[:4, :, lo:lo + p["crop"], lo:lo + p["crop"]]
    few_d = measure(A_crop, few, setup.noise_std, p["seed"], images.indices[:4])

    def validate() -> dict[str, float]:
        T = SplittingMap(A, S)
        y, info = solve(T, d)
        with torch.no_grad():
            predicted = T.predict(y, d)
        return {"validation_psnr": psnr(y, x).mean().item(),
                "validation_psnr_head": psnr(predicted, x).mean().item(),
                "validation_converged": info.converged.float().mean().item(),
                **diagnostics.direction(A_crop, S, few_d, few)}

    return Job(S, EquilibriumLoss(SplittingMap(A_crop, S), **settings), config, validate, {
        "what": "implicit deblurring network, trained with JFB", "protocol": p["protocol"],
        "map": "splitting", "loss": settings})


def _plug_and_play(p: Parameters, setup: Protocol, network: DnCNN, A: torch.nn.Module, x: Tensor,
                   d: Tensor) -> Settings:
    """The tau and sigma that JFB starts from: plug-and-play's best on validation images."""
    def score(settings: Settings) -> float:
        y, _ = restore("plug-and-play", A, make_regulariser(network, settings), d, settings,
                       max_iterations=15)
        return psnr(y, x).mean().item()

    grid = [{"tau": tau, "sigma": matched_sigma(setup.noise_std, tau)}
            for tau in torch.logspace(-2, -0.5, p["candidates"]).tolist()]
    return Tuning(setup.noise_std, len(x), {}, {}).search("plug-and-play", grid, score)
