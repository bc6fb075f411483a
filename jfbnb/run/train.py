"""Train a profile's networks by command.

Notebooks 3 to 5 call the same recipes; their parameter `weights` uses the networks stored here.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from jfbnb.common import UserError, describe_device, pick_device, remove_unfinished
from jfbnb.core.denoisers import make_network
from jfbnb.core.protocols import get_protocol
from jfbnb.data import Splits, load_splits
from jfbnb.run.reproduce import Parameters, alone, complete, load_profile, notebooks
from jfbnb.training.degradations import Conditions
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import LossSettings
from jfbnb.training.methods import JFB, METHODS, Method, get_method
from jfbnb.training.recipes import Run, train_denoiser, train_method, validation_problem
from jfbnb.training.tuning import Tuning, tune
from jfbnb.training.weights import load_denoiser

# With any network; notebook 5 does not compare methods that need a smooth one.
TRAINED = [name for name, method in METHODS.items() if method.trainable and not method.smooth]


def network_parameters(profile: str, overrides: Parameters) -> Parameters:
    """The notebooks' parameters in a profile. Raises UserError for unknown ones."""
    found = complete(notebooks(), load_profile(profile) | overrides)
    return {name: value for own in found.values() for name, value in own.items()}


def train_network(name: str, parameters: Parameters, start: Path, out: Path, command: str,
                  conditions: bool = False, log: Callable[[str], None] = print) -> None:
    """Train the denoiser of notebook 3, or a method's network, as notebooks 4 and 5 do.

    Weights and model card go to the folder `out`, checkpoints to out/checkpoints.

    Args:
        name: "denoiser", or that of a method that is trained.
        start: the folder with the denoiser that a method starts from.
        command: the command, for the model card.
        conditions: whether to train a method over random blurs and noise levels, into
            out/conditions.

    Raises:
        UserError: for bad parameters, missing data or weights, or if training fails.
    """
    out = out / "conditions" if conditions else out
    with alone(out):
        remove_unfinished(out)
        _train(name, parameters, start, conditions,
               Run(pick_device(parameters["device"]), out, command, log=log))


def _train(name: str, p: Parameters, start: Path, conditions: bool, run: Run) -> None:
    setup = get_protocol(p["protocol"])
    splits = load_splits(p["data"], setup.image_size, p["n_train"], p["n_validation"],
                         p["n_test"], run.log, p["random_degradations"])
    run.log(f"{len(splits.train)} training images: {splits.source}; device: "
            f"{describe_device(run.device)}")
    if name == "denoiser":
        torch.manual_seed(p["seed"])
        config = TrainingConfig(p["pretrain_epochs"], p["pretrain_batch_size"], p["pretrain_crop"],
                                p["pretrain_learning_rate"], p["seed"])
        network = make_network(p["network"], p["depth"], p["width"])
        if p["random_degradations"]:
            config = config.random_degradations()
        train_denoiser(network, splits, config, p["noise_max"], run)
    else:
        method = get_method(name)
        train_method(method, **prepared(method, p, splits, start, conditions, run.device), run=run)
    run.log(f"written: {run.out / name}.safetensors")


def prepared(method: Method, p: Parameters, splits: Splits, start: Path, conditions: bool,
             device: torch.device) -> dict[str, Any]:
    """The arguments of `train_method` for a method, as in notebooks 4 and 5."""
    network = load_denoiser(start / "denoiser.safetensors").network
    if not method.takes(network):
        raise UserError(f"{method.name} needs a network with a continuous derivative, and "
                        f"{type(network).__name__} has kinks: use network=UNet, as in profile "
                        "best")
    network.to(device)
    problem = validation_problem(get_protocol(p["protocol"]), splits, p["search_images"], p["seed"],
                                 device)
    tuning = Tuning(problem.setup.noise_std, len(problem.x))
    best = tune(method.shares_tuning_with or method, tuning, problem.A, problem.d, problem.x,
                p["candidates"], network)
    losses = LossSettings(problem.setup.noise_std, **{
        k: p[k] for k in ("tolerance", "max_iterations", "power_iterations", "max_growth",
                          "penalty")})
    if conditions:
        losses = replace(losses, conditions=Conditions())
    # For the other methods a table in notebook 5 shows how many converge.
    limit = p["unconverged_limit"] if method is JFB and not conditions else 1.0
    rate = p["learning_rates"].get(method.name, p["learning_rate"])
    config = TrainingConfig(0, p["batch_size"], p["crop"], rate, p["seed"], limit,
                            budget=p["budget"])
    if p["random_degradations"]:
        config, losses = config.random_degradations(), losses.random_degradations()
    return {"network": network, "settings": best, "problem": problem, "config": config,
            "losses": losses}
