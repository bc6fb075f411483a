"""How a denoiser and a method's network are trained: once, for notebooks, command and benchmark.

What comes out is stored with a model card, so that anyone can measure it again.
"""

import copy
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from jfbnb import processes
from jfbnb.common import UserError, atomic_path, atomic_write, describe_device
from jfbnb.datasets import ImageSet, Splits, bundled_photos
from jfbnb.methods import METHODS, Method, Settings
from jfbnb.metrics import psnr
from jfbnb.models import Model
from jfbnb.networks import Denoiser, describe, save_weights
from jfbnb.operators import LinearOperator, Protocol, measure
from jfbnb.sources import digest
from jfbnb.training import BatchLoss, DenoiserLoss, LossSettings, TrainingConfig, train

BY_COMMAND = "JFBNB_BY_COMMAND"  # set where `jfbnb reproduce` runs the notebooks
RATES = (0.5, 1.0, 2.0)  # times the learning rate: what a search tries first
TRIES = 5  # of learning rates, at most
SHORT = 1 / 8  # of the minutes: how long each of them is tried
ENOUGH = 50  # steps of such a try, or a third of all where that is less
FIRST = 12  # steps, to see what one takes: the last of them, as the first are slower


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


def by_hand() -> bool:
    """Whether a notebook is run by its reader, and not by a command."""
    return "ipykernel" in sys.modules and BY_COMMAND not in os.environ


@dataclass(frozen=True)
class Run:
    """Where a training runs, and what it leaves.

    Args:
        out: a folder for NAME.safetensors, its model card and history, and the checkpoints; None
            keeps nothing.
        command: what the model card says that made it.
        weights: a folder of finished networks, to take them and not train; "" for none.
        keep: whether weights in `out` that were trained with other parameters stay there, and the
            new ones go to out/other.
    """

    device: torch.device
    out: Path | None = None
    command: str = ""
    weights: str | Path = ""
    log: Callable[[str], None] = print
    keep: bool = field(default_factory=by_hand)


def train_denoiser(network: nn.Module, splits: Splits, config: TrainingConfig, noise_max: float,
                   bf16: bool, run: Run) -> tuple[Denoiser, pd.DataFrame]:
    """Train a network to take noise out of images, told how much of it there is.

    Args:
        noise_max: the strongest noise, on images in [0, 1].

    Returns:
        The denoiser, and the records.
    """
    D = Denoiser(network, 0.0)
    history = _train("denoiser", D, DenoiserLoss(D, noise_max, bf16), splits, config, run, None)
    _store("denoiser", D, history, splits, config, run, {
        "what": f"{type(network).__name__} denoiser, pretrained on Gaussian noise",
        "noise_max": noise_max})
    return D, history


def train_method(method: Method, network: nn.Module, settings: Settings, problem: Problem,
                 config: TrainingConfig, losses: LossSettings, run: Run,
                 watch: Callable[[Model], dict[str, float]] | None = None,
                 minutes: float | None = None) -> tuple[Model, dict]:
    """Train a method's model end to end, from a pretrained denoiser, on crops of training images.

    Its model card says how well it restores the problem's images, and four photographs.

    Args:
        network: the denoiser's; a copy of it is trained.
        settings: the method's, as tuned.
        watch: what else to record on the way.
        minutes: how long to train, whatever a step costs: `search` then says how many epochs that
            is, and at which rate to learn. The search's own time comes on top.

    Returns:
        The model, for crops, and what its model card says of the training; `history` are its
        records.
    """
    tried = None
    if minutes is not None:
        config, tried = search(method, network, settings, problem, config, losses, run, minutes)
    A = problem.setup.operator(config.crop).to(run.device)
    model, loss = prepare(method, network, settings, A, losses)
    history = _train(method.name, model, loss, problem.splits, config, run,
                     watch and (lambda: watch(model)))
    card = {"what": f"{method.label}, trained end to end", "protocol": problem.setup.name,
            "settings": settings, "minutes": minutes, "search": tried,
            "loss": asdict(replace(losses, noise_power=method.noise_power))}
    if run.out and not run.weights:  # those that are taken have been measured
        photographs = bundled_photos("validation", problem.setup.image_size)[:4]
        others = measured(problem, photographs)
        card["measured"] = {
            name: {"images": len(some.x), **score(model.on(some.A), some)} for name, some in (
                ("validation images", problem), ("photographs", others))}
        run.log(f"{method.label}: {card['measured']['validation images']['psnr']:.2f} dB on "
                f"{len(problem.x)} validation images")
    return model, _store(method.name, model, history, problem.splits, config, run, card)


def prepare(method: Method, network: nn.Module, settings: Settings, A: LinearOperator,
            losses: LossSettings) -> tuple[Model, BatchLoss]:
    """A method's model as its training begins, and the loss that trains it."""
    model = method.build(A, copy.deepcopy(network), settings)
    if method.head and losses.heads:
        model.add_head()
    return model, method.loss(model, replace(losses, noise_power=method.noise_power))


def search(method: Method, network: nn.Module, settings: Settings, problem: Problem,
           config: TrainingConfig, losses: LossSettings, run: Run, minutes: float
           ) -> tuple[TrainingConfig, list[dict[str, float]]]:
    """The training that takes so many minutes, at the learning rate that is best on short ones.

    Half the config's rate, the rate itself and twice of it are tried, and further ones, by factors
    of 2, as long as the best so far is at an end. For each a whole schedule of an eighth of the
    time, or of `ENOUGH` steps, is run from the pretrained denoiser. Their seconds say how many
    steps there are in all of it. What has been tried is not tried again after a stop, and with
    weights that are taken their own search is.

    Returns:
        The config with its epochs and its learning rate; for each rate that could be trained, the
        lowest first, learning_rate, epochs, seconds, and psnr in dB on the problem's images.

    Raises:
        UserError: where none could.
    """
    if run.weights:
        return _searched(method.name, Path(run.weights), config, minutes)
    images, device = problem.splits.train.images, run.device
    batches = math.ceil(len(images) / config.batch_size)
    A = problem.setup.operator(config.crop).to(device)
    file = None
    if run.out is not None:
        # How far the minutes reach depends on the machine, and what is best on the problem.
        key = digest(search, *prepare(method, network, settings, A, losses), images, config,
                     minutes, problem.x, problem.d, describe_device(device),
                     processes.world_size())
        file = run.out / "checkpoints" / f"{processes.gather(key)[0][:16]}.json"
    with processes.rank_0_first():
        state = _read_state(file)

    def attempt(learning_rate: float, steps: int) -> tuple[Model, list[dict[str, float]]]:
        own = replace(config, epochs=steps / batches, learning_rate=learning_rate,
                      unconverged_limit=1.0)
        model, loss = prepare(method, network, settings, A, losses)
        return model, train(model.to(device), loss, images, own, device, log=lambda line: None)

    if not state:  # at a rate that changes next to nothing: only the time matters
        _, history = attempt(config.learning_rate / 100, FIRST)
        whole = 60 * minutes * FIRST / (history[-1]["seconds"] * len(history))
        short = max(1, round(max(SHORT * whole, min(ENOUGH, whole / 3))))
        state = {"steps": processes.gather(short)[0], "tries": []}
    while rate := _next_rate(config.learning_rate, state["tries"]):
        tried = {"learning_rate": rate, "epochs": state["steps"] / batches, "seconds": 0.0,
                 "psnr": -math.inf}
        try:
            model, history = attempt(rate, state["steps"])
            quality = score(model.on(problem.A), problem)["psnr"]
            if math.isfinite(quality):  # else its solves have overflowed
                tried |= {"seconds": sum(record["seconds"] for record in history), "psnr": quality}
        except UserError as error:  # such a rate is none
            run.log(f"{method.name}: {error}")
        state["tries"].append(processes.gather(tried)[0])
        if file is not None and processes.rank() == 0:
            atomic_write(file, json.dumps(state, indent=1) + "\n")
    tries = sorted((t for t in state["tries"] if t["seconds"]), key=lambda t: t["learning_rate"])
    if not tries:
        raise UserError(f"{method.name} cannot be trained at any of {TRIES} learning rates from "
                        f"{min(t['learning_rate'] for t in state['tries']):.1e} on")
    best = max(tries, key=lambda tried: tried["psnr"])
    seconds = sum(tried["seconds"] for tried in tries) / (state["steps"] * len(tries))
    steps = max(1, round(60 * minutes / seconds))
    return replace(config, epochs=steps / batches, learning_rate=best["learning_rate"]), tries


def _next_rate(base: float, tries: list[dict[str, float]]) -> float | None:
    """The learning rate to try next; None where the best is between two others, or is given up."""
    found = {tried["learning_rate"]: tried["psnr"] for tried in tries}
    for rate in (factor * base for factor in RATES):
        if rate not in found:
            return rate
    best = max(found, key=found.get)
    if len(found) == TRIES or min(found) < best < max(found):
        return None
    return best / 2 if best == min(found) else best * 2


def _read_state(file: Path | None) -> dict:
    """What a search has noted so far; nothing where the file is missing or damaged."""
    try:
        state = json.loads(file.read_text(encoding="utf-8")) if file else {}
        return state if state.keys() == {"steps", "tries"} else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _searched(name: str, weights: Path, config: TrainingConfig, minutes: float
              ) -> tuple[TrainingConfig, list[dict[str, float]]]:
    """What a search found that is in a model card."""
    card, file = read_cards(weights, [name])[name], weights / f"{name}.json"
    try:
        own, trained, tries = card["training"], card["minutes"], card["search"]
        config = replace(config, epochs=own["epochs"], learning_rate=own["learning_rate"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} has no record of a training by the clock ({error}): leave the "
                        "parameter `weights` empty to train") from error
    if trained != minutes:
        raise UserError(f"{file} is of {trained} minutes of training, not of {minutes}: leave the "
                        "parameter `weights` empty to train")
    return config, tries


def read_cards(weights: Path, names: Sequence[str]) -> dict[str, dict]:
    """The model cards of some methods in a folder. Raises UserError if one is missing."""
    try:
        return {name: json.loads((weights / f"{name}.json").read_text(encoding="utf-8"))
                for name in names}
    except (OSError, ValueError) as error:
        raise UserError(f"no model card in {weights} ({error}): run the earlier notebooks, in "
                        "order, or `jfbnb reproduce`") from error


def trainings(cards: dict[str, dict]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of some methods' model cards: a row for each training, and one for each whole schedule.

    Returns:
        A table to show, and one of method, learning_rate, minutes, psnr (dB, on validation images)
        and chosen: whether it is at the learning rate that was taken.
    """
    rows, schedules = [], []
    for name, card in cards.items():
        own, last = card["training"], card["history"][-1]
        minutes = sum(record["seconds"] for record in card["history"]) / 60
        batches = math.ceil(card["training images"] / own["batch_size"])
        rows.append({"Method": METHODS[name].label, "Learning rate": own["learning_rate"],
                     "Steps": round(own["epochs"] * batches), "Minutes": minutes,
                     "Solves converged": last.get("converged", math.nan),
                     "Adjoint residual": last.get("adjoint_residual", math.nan),
                     "Final loss": last["mse"]})
        schedules += [{"method": name, "learning_rate": tried["learning_rate"],
                       "minutes": tried["seconds"] / 60, "psnr": tried["psnr"],
                       "chosen": tried["learning_rate"] == own["learning_rate"]}
                      for tried in card["search"] or ()]
        schedules.append({"method": name, "learning_rate": own["learning_rate"],
                          "minutes": minutes, "chosen": True,
                          "psnr": card["measured"]["validation images"]["psnr"]})
    return pd.DataFrame(rows), pd.DataFrame(schedules)


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
           config: TrainingConfig, run: Run, card: dict) -> dict:
    """Write a trained network, its card and its history, and return the card."""
    if run.weights:  # another run's, with what it says of them
        card = read_cards(Path(run.weights), [name])[name]
    else:
        card = {**card, "training data": splits.source, "training images": len(splits.train),
                "training": asdict(config), "history": history.to_dict(orient="records"),
                "training seconds": round(history.seconds.sum()),
                "device": describe_device(run.device), "processes": processes.world_size(),
                "command": run.command, "torch": torch.__version__}
    if run.out is None or processes.rank() > 0:
        return card
    place = run.out if run.weights else _place(name, module, card, run)
    atomic_write(place / f"{name}_history.csv", history.to_csv(index=False))
    if not run.weights:
        save_weights(place / f"{name}.safetensors", module, card)
        return card
    for suffix in (".safetensors", ".json"):
        with atomic_path(place / f"{name}{suffix}") as temporary:
            shutil.copyfile(Path(run.weights) / f"{name}{suffix}", temporary)
    return card


def _place(name: str, module: nn.Module, card: dict, run: Run) -> Path:
    """Where a network is stored: `run.out`, or a folder in it. See `Run.keep`."""
    file = run.out / f"{name}.json"
    if not (run.keep and file.is_file()):
        return run.out
    own = {**card, "networks": [describe(D.network) for D in module.modules()
                                if isinstance(D, Denoiser)]}
    try:
        before, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(own))
        changed = [part for part in ("networks", "protocol", "noise_max", "loss", "training data",
                                     "training") if before.get(part) != now.get(part)]
    except (OSError, ValueError, AttributeError):  # damaged: nothing to keep
        return run.out
    if not changed:
        return run.out
    run.log(f"{file.with_suffix('.safetensors')} was trained with other parameters "
            f"({', '.join(changed)}) and is kept: later notebooks read it. This one is in "
            f"{run.out / 'other'}; name another `profile` above to go on with it")
    return run.out / "other"
