"""How a denoiser and a method's network are trained: once, for notebooks, command and benchmark.

What comes out is stored with a model card, so that anyone can measure it again.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from jfbnb import processes
from jfbnb.common import atomic_path, atomic_write, describe_device
from jfbnb.datasets import ImageSet, Splits, bundled_photos
from jfbnb.methods import Method, Settings
from jfbnb.metrics import psnr
from jfbnb.models import Model
from jfbnb.networks import Denoiser, describe, save_weights
from jfbnb.operators import LinearOperator, Protocol, measure
from jfbnb.training import BatchLoss, DenoiserLoss, LossSettings, TrainingConfig, train


@dataclass(frozen=True)
class Problem:
    """What a method is tuned and watched on: validation images x, measured by A as d."""

    setup: Protocol
    splits: Splits
    A: LinearOperator
    x: Tensor
    d: Tensor
    seed: int


def pose(setup: Protocol, splits: Splits, images: int, seed: int, device: torch.device) -> Problem:
    """Measure the first so many validation images, on a device."""
    A = setup.operator().to(device)
    x = splits.validation[:images].as_float().to(device)
    d = measure(A, x, setup.noise_std, seed, splits.validation.indices[:images])
    return Problem(setup, splits, A, x, d, seed)


def measured(problem: Problem, images: ImageSet) -> Problem:
    """The same on other images."""
    x = images.as_float().to(problem.x.device)
    d = measure(problem.A, x, problem.setup.noise_std, problem.seed, images.indices)
    return replace(problem, x=x, d=d)


def middle(problem: Problem, crop: int, images: int = 4) -> Problem:
    """The problem on the middle of a few of its images, `crop` pixels wide, measured for itself."""
    lo = (problem.setup.image_size - crop) // 2
    A = problem.setup.operator(crop).to(problem.x.device)
    x = problem.x[:images, :, lo:lo + crop, lo:lo + crop]
    indices = problem.splits.validation.indices[:len(x)]
    d = measure(A, x, problem.setup.noise_std, problem.seed, indices)
    return replace(problem, A=A, x=x, d=d)


@dataclass(frozen=True)
class Run:
    """Where a training runs, and what it leaves.

    Args:
        out: a folder for NAME.safetensors, its model card and history, and the checkpoints; None
            keeps nothing.
        command: what the model card says that made it.
        weights: a folder of finished networks, to take them and not train; "" for none.
    """

    device: torch.device
    out: Path | None = None
    command: str = ""
    weights: str | Path = ""
    log: Callable[[str], None] = print


def train_denoiser(network: nn.Module, splits: Splits, config: TrainingConfig, noise_max: float,
                   bf16: bool, run: Run) -> tuple[Denoiser, pd.DataFrame]:
    """Train a network to take noise out of images, told how much of it there is.

    Args:
        noise_max: the strongest noise, on images in [0, 1].

    Returns:
        The denoiser, and a record for each epoch.
    """
    D = Denoiser(network, 0.0)
    history = _train("denoiser", D, DenoiserLoss(D, noise_max, bf16), splits, config, run, None)
    _store("denoiser", D, history, splits, config, run, {
        "what": f"{type(network).__name__} denoiser, pretrained on Gaussian noise",
        "noise_max": noise_max})
    return D, history


def train_method(method: Method, network: nn.Module, settings: Settings, problem: Problem,
                 config: TrainingConfig, losses: LossSettings, run: Run,
                 watch: Callable[[Model], dict[str, float]] | None = None
                 ) -> tuple[Model, pd.DataFrame]:
    """Train a method's model end to end, from a pretrained denoiser, on crops of training images.

    After each epoch the validation images of the problem are restored.

    Args:
        network: the denoiser's; a copy of it is trained.
        settings: the method's, as tuned.
        watch: what else to record after each epoch.

    Returns:
        The model, for crops, and a record for each epoch.
    """
    A = problem.setup.operator(config.crop).to(run.device)
    model, loss = prepare(method, network, settings, A, losses)

    def validate() -> dict[str, float]:
        found = {f"validation_{k}": v for k, v in score(model.on(problem.A), problem).items()}
        return {**found, **(watch(model) if watch else {})}

    history = _train(method.name, model, loss, problem.splits, config, run, validate)
    card = {"what": f"{method.label}, trained end to end", "protocol": problem.setup.name,
            "settings": settings, "loss": asdict(losses)}
    if run.out and not run.weights:  # those that are taken have been measured
        photographs = bundled_photos("validation", problem.setup.image_size)[:4]
        others = measured(problem, photographs)
        card["measured"] = {
            name: {"images": len(some.x), **score(model.on(some.A), some)} for name, some in (
                ("validation images", problem), ("photographs", others))}
    _store(method.name, model, history, problem.splits, config, run, card)
    return model, history


def prepare(method: Method, network: nn.Module, settings: Settings, A: LinearOperator,
            losses: LossSettings) -> tuple[Model, BatchLoss]:
    """A method's model as its training begins, and the loss that trains it."""
    model = method.build(A, copy.deepcopy(network), settings)
    if method.head:
        model.add_head()
    return model, method.loss(model, losses)


@torch.no_grad()
def score(model: Model, problem: Problem) -> dict[str, float]:
    """Mean PSNR in dB on a problem's images, the head's too, and the share that converged."""
    def quality(y: Tensor) -> float:
        return psnr(problem.A.visible(y), problem.A.visible(problem.x)).mean().item()

    y, info = model(problem.d)
    found = {"psnr": quality(y)}
    if model.H is not None:
        found["psnr_head"] = quality(model.predict(y, problem.d))
    if info is not None:
        found["converged"] = info.converged.float().mean().item()
    return found


def _train(name: str, module: nn.Module, loss: BatchLoss, splits: Splits, config: TrainingConfig,
           run: Run, validate: Callable[[], dict[str, float]] | None) -> pd.DataFrame:
    for D in (part for part in module.modules() if isinstance(part, Denoiser)):
        describe(D.network)  # one that cannot be stored is refused before hours of work
    return pd.DataFrame(train(
        module, loss, splits.train.images, config, run.device,
        run.out / "checkpoints" if run.out else None, validate, run.log,
        Path(run.weights) / f"{name}.safetensors" if run.weights else None))


def _store(name: str, module: nn.Module, history: pd.DataFrame, splits: Splits,
           config: TrainingConfig, run: Run, card: dict) -> None:
    if run.out is None or processes.rank() > 0:
        return
    atomic_write(run.out / f"{name}_history.csv", history.to_csv(index=False))
    if run.weights:  # another run's, with what it says of them
        for suffix in (".safetensors", ".json"):
            with atomic_path(run.out / f"{name}{suffix}") as temporary:
                shutil.copyfile(Path(run.weights) / f"{name}{suffix}", temporary)
        return
    save_weights(run.out / f"{name}.safetensors", module, {
        **card, "training data": splits.source, "training images": len(splits.train),
        "training": asdict(config), "history": history.to_dict(orient="records"),
        "training seconds": round(history.seconds.sum()), "device": describe_device(run.device),
        "processes": processes.world_size(), "command": run.command, "torch": torch.__version__})
