"""Train a denoiser or a method's network, and store it with its model card."""

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from jfbnb.common import UserError, atomic_path, describe_device
from jfbnb.core.denoisers import Denoiser
from jfbnb.core.models import Model
from jfbnb.core.operators import LinearOperator
from jfbnb.core.protocols import Protocol, measure
from jfbnb.data import ImageSet, Splits, bundled_photos, random_crops
from jfbnb.training.evaluation import quality
from jfbnb.training.loop import Record, TrainingConfig, train
from jfbnb.training.losses import BatchLoss, DenoiserLoss, LossSettings
from jfbnb.training.methods import METHODS, Method, Settings
from jfbnb.training.weights import describe, fill, read_card, save_weights

FIXED = 16  # how many training crops, always the same, measure every training's progress


@dataclass(frozen=True)
class Problem:
    """Images x and their measurements d by A, on which a method is tuned or evaluated."""

    setup: Protocol
    splits: Splits
    A: LinearOperator
    x: Tensor
    d: Tensor
    seed: int


def validation_problem(setup: Protocol, splits: Splits, images: int, seed: int,
                       device: torch.device) -> Problem:
    """The first `images` validation images, measured by a protocol, on a device."""
    nothing = torch.empty(0, device=device)
    empty = Problem(setup, splits, setup.operator().to(device), nothing, nothing, seed)
    return with_images(empty, splits.validation[:images])


def with_images(problem: Problem, images: ImageSet) -> Problem:
    """The same problem on other images."""
    return _measured(problem, problem.A, images.as_float(), images.indices)


def centre_crops(problem: Problem, crop: int, images: int = 4) -> Problem:
    """The problem on the central crops of its first images, `crop` pixels wide, measured anew."""
    lo = (problem.setup.image_size - crop) // 2
    x = problem.x[:images, :, lo:lo + crop, lo:lo + crop]
    return _measured(problem, problem.setup.operator(crop), x,
                     problem.splits.validation.indices[:len(x)])


def fixed_crops(problem: Problem, crop: int) -> Problem:
    """The problem on `FIXED` crops of training images; crops and noise are always the same."""
    images = problem.splits.train.images
    x = random_crops(images[::math.ceil(len(images) / FIXED)], crop, problem.seed, 0, 0, 0)
    return _measured(problem, problem.setup.operator(crop), x, range(len(x)))


def _measured(problem: Problem, A: LinearOperator, x: Tensor, indices: Sequence[int]) -> Problem:
    A, x = A.to(problem.x.device), x.to(problem.x.device)
    d = measure(A, x, problem.setup.noise_std, problem.seed, indices)
    return replace(problem, A=A, x=x, d=d)


@dataclass(frozen=True)
class Run:
    """Where a training runs, and where its files go.

    Args:
        out: a folder for NAME.safetensors, its model card and the checkpoints; None stores nothing.
            Earlier files of the same name are replaced.
        command: the command that the model card names.
        weights: a folder of trained networks to use instead of training; "" for none.
    """

    device: torch.device
    out: Path | None = None
    command: str = ""
    weights: str | Path = ""
    log: Callable[[str], None] = print


def train_denoiser(network: nn.Module, splits: Splits, config: TrainingConfig, noise_max: float,
                   run: Run) -> tuple[Denoiser, pd.DataFrame]:
    """Train a network to predict the noise in images, given the noise level.

    Args:
        noise_max: the largest noise level, on images in [0, 1].

    Returns:
        The denoiser, and the records.
    """
    D = Denoiser(network, 0.0)
    if run.weights:
        return D, pd.DataFrame(_take("denoiser", D, config, run)["history"])
    history = _train("denoiser", D, DenoiserLoss(D, noise_max), splits, config, run)
    _store("denoiser", D, history, splits, config, run, {
        "what": f"{type(network).__name__} denoiser, pretrained on Gaussian noise",
        "noise_max": noise_max})
    return D, pd.DataFrame(history)


def train_method(method: Method, network: nn.Module, settings: Settings, problem: Problem,
                 config: TrainingConfig, losses: LossSettings, run: Run) -> tuple[Model, dict]:
    """Train a method's model end to end, from a pretrained denoiser, on crops of training images.

    Its records have `fixed_mse`, the mean squared error of the model on `fixed_crops`, solved as
    for the tables. Its model card has the PSNR on the problem's images and on four photographs.

    Args:
        network: the denoiser's; a copy of it is trained.
        settings: the method's, as tuned.

    Returns:
        The model, for crops, and its model card. The card's `history` has the records, and `start`
        the `fixed_mse` before the first step.
    """
    A = problem.setup.operator(config.crop).to(run.device)
    model, loss = prepare(method, network, settings, A, losses)
    if run.weights:
        return model, _take(method.name, model, config, run)
    fixed = fixed_crops(problem, config.crop)
    start = fixed_error(model.to(run.device), fixed)
    history = _train(method.name, model, loss, problem.splits, config, run,
                     lambda: fixed_error(model, fixed))
    card = {"what": f"{method.label}, trained end to end", "protocol": problem.setup.name,
            "noise_std": problem.setup.noise_std, "settings": settings,
            "loss": asdict(replace(losses, noise_power=method.noise_power)), "start": start}
    if run.out:
        photographs = bundled_photos("validation", problem.setup.image_size)[:4]
        card["measured"] = {
            name: {"images": len(some.x), **score(model.on(some.A), some)} for name, some in (
                ("validation images", problem), ("photographs", with_images(problem, photographs)))}
        run.log(f"{method.label}: {card['measured']['validation images']['psnr']:.2f} dB on "
                f"{len(problem.x)} validation images")
    return model, _store(method.name, model, history, problem.splits, config, run, card)


@torch.no_grad()
def fixed_error(model: Model, fixed: Problem) -> dict[str, float]:
    """A model's mean squared error on a problem, and the share of its solves that converged."""
    y, info = model(fixed.d)
    found = {"fixed_mse": fixed.A.visible(y - fixed.x).square().mean().item()}
    if info is not None:
        found["fixed_converged"] = info.converged.float().mean().item()
    return found


def prepare(method: Method, network: nn.Module, settings: Settings, A: LinearOperator,
            losses: LossSettings) -> tuple[Model, BatchLoss]:
    """A method's model before its training, and the loss that trains it."""
    model = method.build(A, copy.deepcopy(network), settings)
    return model, method.loss(model, replace(losses, noise_power=method.noise_power))


def read_cards(weights: Path, names: Sequence[str]) -> dict[str, dict]:
    """The model cards of some methods in a folder. Raises UserError if one is missing."""
    return {name: read_card(weights / f"{name}.safetensors") for name in names}


def trainings(cards: dict[str, dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Summarise the trainings in some methods' model cards.

    Returns:
        A table with a row for each training, and the learning curves: columns method, applications
        (of the network so far) and psnr (dB, on the fixed crops), from before the first step on.
    """
    rows, curves = [], []
    for name, card in cards.items():
        history, last = pd.DataFrame(card["history"]), card["history"][-1]
        errors = [card["start"]["fixed_mse"], *history.fixed_mse]
        rows.append({"Method": METHODS[name].label,
                     "Learning rate": card["training"]["learning_rate"], "Steps": last["steps"],
                     "Applications": last["applications"], "Minutes": history.seconds.sum() / 60,
                     "Solves converged": last.get("converged", math.nan),
                     "Adjoint residual": last.get("adjoint_residual", math.nan),
                     "Loss before": errors[0], "Loss after": errors[-1]})
        curves.append(pd.DataFrame({
            "method": name, "applications": [0, *history.applications],
            "psnr": [-10 * math.log10(error) for error in errors]}))
    return pd.DataFrame(rows), pd.concat(curves, ignore_index=True)


@torch.no_grad()
def score(model: Model, problem: Problem) -> dict[str, float]:
    """A model's mean PSNR in dB on a problem, and the share of its solves that converged."""
    return quality(problem.A, problem.x, model(problem.d))


def _train(name: str, module: nn.Module, loss: BatchLoss, splits: Splits, config: TrainingConfig,
           run: Run, validate: Callable[[], Record] | None = None) -> list[Record]:
    for D in (part for part in module.modules() if isinstance(part, Denoiser)):
        describe(D.network)  # raises now, not after hours, if it cannot be stored
    return train(module, loss, splits.train.images, config, run.device,
                 run.out / "checkpoints" if run.out else None, validate, run.log)


def _store(name: str, module: nn.Module, history: list[Record], splits: Splits,
           config: TrainingConfig, run: Run, card: dict) -> dict:
    """Write a trained network and its card, and return the card."""
    seconds = sum(record["seconds"] for record in history)
    card = {**card, "training data": splits.source, "training images": len(splits.train),
            "training": asdict(config), "history": history, "training seconds": round(seconds),
            "device": describe_device(run.device),
            "command": run.command, "torch": torch.__version__}
    if run.out is not None:
        save_weights(run.out / f"{name}.safetensors", module, card)
    return card


def _take(name: str, module: nn.Module, config: TrainingConfig, run: Run) -> dict:
    """Load a network from the folder `run.weights` instead of training it; return its card.

    Raises:
        UserError: if it is missing, or was trained with another `config`.
    """
    file = Path(run.weights) / f"{name}.safetensors"
    try:
        card = read_card(file)
        trained, _ = TrainingConfig(**card["training"]), card["history"]  # must have both
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{file} has no model card with this training ({error}): leave the "
                        "parameter `weights` empty to train") from error
    # The training has finished, so its limit does not matter.
    if replace(trained, unconverged_limit=config.unconverged_limit) != config:
        raise UserError(f"{file} was trained with {asdict(trained)}, not with {asdict(config)}: "
                        "leave the parameter `weights` empty to train")
    fill(file, module.to(run.device))
    if run.out is not None:
        for suffix in (".safetensors", ".json"):
            with atomic_path(run.out / f"{name}{suffix}") as temporary:
                shutil.copyfile(file.with_suffix(suffix), temporary)
    return card
