"""Several processes under torchrun do what one does. They talk over the loopback alone."""

import json
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from in_two_processes import CONFIG, IMAGES, LOSSES, make, train_in

from jfbnb.common import UserError
from jfbnb.core.gradients import neumann
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium, Feedforward, Unrolled
from jfbnb.core.operators import Blur
from jfbnb.core.protocols import measure
from jfbnb.run.command import main
from jfbnb.training import loop as training
from jfbnb.training import processes
from jfbnb.training.checkpoints import previous
from jfbnb.training.evaluation import evaluate, join
from jfbnb.training.loop import train
from jfbnb.training.losses import (
    DenoiserLoss,
    EquilibriumLoss,
    ExplicitLoss,
    ImplicitLoss,
    LossSettings,
)
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, load_model, make_methods
from jfbnb.training.weights import fill

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
# Relative, of every epoch's loss. Anderson and Adam amplify rounding, in float32 by a lot.
TOLERANCE = {name: 1e-4 if "float32" in name else 1e-8 for name in LOSSES}


def torchrun(*words, seconds: float = 120) -> subprocess.CompletedProcess:
    """Two processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)


def leave_epoch_2(folder: Path) -> None:
    """Drop the last of three epochs, as if the training had been killed in it."""
    newest = next(f for f in folder.iterdir() if "previous" not in f.name)
    assert previous(newest).exists()
    newest.unlink()


def losses(history: list[dict]) -> list[float]:
    return [record["loss"] for record in history]


# --- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def a_record_for_each_epoch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "RECORDS", 1)
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """Each loss trained in one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {"folder": folder, **{name: train_in(folder / name, name) for name in LOSSES}}


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory) -> Path:
    """The same in two processes; and a training that one began and two have ended."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(alone["folder"] / "jfb", folder / "begun")
    leave_epoch_2(folder / "begun")
    done = torchrun("tests/in_two_processes.py", "well", folder)
    assert done.returncode == 0, done.stderr
    return folder


def result(together: Path, name: str) -> dict:
    return json.loads((together / f"{name}.json").read_text())


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_give_the_loss_curve_of_one(alone, together, name):
    module, history = alone[name]
    found = result(together, name)
    assert len(found["history"]) == 3 and found["lines"][0].startswith("epoch 1")
    assert losses(found["history"]) == pytest.approx(losses(history), rel=TOLERANCE[name])
    for record, wanted in zip(found["history"], history, strict=True):
        assert set(record) == set(wanted)
        assert record.get("iterations") == wanted.get("iterations")
    weights = torch.cat([value.flatten() for value in module.state_dict().values()])
    found_weights = torch.tensor(found["weights"], dtype=weights.dtype)
    assert (found_weights - weights).norm() < TOLERANCE[name] * weights.norm()


def test_one_process_goes_on_where_two_stopped(alone, together, tmp_path):
    shutil.copytree(together / "jfb", tmp_path / "jfb")
    leave_epoch_2(tmp_path / "jfb")
    lines = []
    _, history = train_in(tmp_path / "jfb", "jfb", lines.append)
    assert lines[0] == "resumed after epoch 2 of 3"
    assert losses(history) == pytest.approx(losses(alone["jfb"][1]), rel=TOLERANCE["jfb"])


def test_two_processes_go_on_where_one_stopped(alone, together):
    found, (_, history) = result(together, "begun"), alone["jfb"]
    assert found["lines"][0] == "resumed after epoch 2 of 3"
    assert losses(found["history"])[:2] == losses(history)[:2]
    assert losses(found["history"]) == pytest.approx(losses(history), rel=TOLERANCE["jfb"])


def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(alone, tmp_path):
    done = torchrun("tests/in_two_processes.py", "killed", tmp_path, seconds=60)
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert "training goes on from its last checkpoint" in done.stderr
    lines = []
    _, history = train_in(tmp_path, "jfb", lines.append)
    assert lines[0] == "resumed after epoch 1 of 3"
    assert losses(history) == pytest.approx(losses(alone["jfb"][1]), rel=TOLERANCE["jfb"])


def every_loss(T: SplittingMap) -> list:
    """All with a head, where they can have one, and a penalty that is never idle."""
    settings = LossSettings(0.01, 1e-3, 40, 2, max_growth=0.1, penalty=1.0)
    models = (Feedforward(T.A, T.D, 0.01), Unrolled(T, 3), Equilibrium(T))
    direct, deep, model = (model.add_head() for model in models)
    return [DenoiserLoss(T.D, 0.1), ExplicitLoss(direct, settings), ExplicitLoss(deep, settings),
            EquilibriumLoss(model, settings), ImplicitLoss(model, settings),
            EquilibriumLoss(model, settings, partial(neumann, terms=5))]


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize(("batch", "shares"), [(8, 2), (8, 4), (5, 3), (3, 8)])
def test_the_shares_of_a_batch_add_up_to_it(number, batch, shares):
    """Loss, figures and gradient; also where only some have a part of what is watched, or none
    of the batch at all."""
    model, _ = make("jfb")
    x = IMAGES[:batch, :, :12, :12].double() / 255
    loss = every_loss(model.T)[number]
    parameters = list(getattr(loss, "model", model.T.D).parameters())

    def contribution(share: slice) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
        for parameter in parameters:
            parameter.grad = None
        indices = range(batch)[share]
        values, figures = loss(x[share], (0, 1), indices)
        values.sum().backward()
        stability_every = sum(index % 4 == 0 for index in indices)
        assert len(values) == len(indices)
        for name, value in figures.items():
            number = stability_every if name == "growth" else len(indices)
            assert value.shape == (number,), name
        return values.sum().item(), figures, torch.cat([
            torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.flatten()
            for p in parameters])

    whole, figures, gradient = contribution(slice(None))
    parts = [contribution(slice(i, None, shares)) for i in range(shares)]
    assert sum(part for part, _, _ in parts) == pytest.approx(whole, rel=1e-6)
    for name, value in figures.items():
        assert sum(part[name].sum().item() for _, part, _ in parts) == pytest.approx(
            value.sum().item(), rel=1e-6), name
    together = torch.stack([part for _, _, part in parts]).sum(0)
    assert gradient.norm() > 0 and (together - gradient).norm() < 1e-6 * gradient.norm()


def test_more_processes_than_a_batch_has_images(monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: 5)
    model, loss = make("jfb")
    with pytest.raises(UserError, match="batch_size=4 for 5 processes: start at most 4"):
        train(model, loss, IMAGES, CONFIG, CPU)


# --- the commands -------------------------------------------------------------------------------


def test_train_stores_what_notebook_4_takes(image_folder, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "RECORDS", 10)  # as the command has it
    words = ["train", "jfb", "--data", image_folder, "--from", weights]
    for setting in ("n_train=5", "n_validation=1", "n_test=1", "search_images=1", "candidates=1",
                    "budget=600", "max_iterations=8", "batch_size=3", "crop=12",
                    "unconverged_limit=1.0", "device=cpu"):
        words += ["-p", setting]
    done = torchrun("-m", "jfbnb", *words, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert 1 <= len(re.findall(r"^epoch .* \d+ of 600 applications", done.stdout, re.M)) <= 10
    assert "processes: 2;" in done.stdout
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    cards = [json.loads((tmp_path / n / "jfb.json").read_text()) for n in ("one", "two")]
    assert losses(cards[1]["history"]) == pytest.approx(losses(cards[0]["history"]), rel=1e-2)
    spent = [card["history"][-1]["applications"] for card in cards]
    assert spent[0] == pytest.approx(spent[1], rel=0.1)
    released = json.loads((RELEASED / "jfb.json").read_text())
    assert {"epoch", "steps", "applications", "loss", "mse", "head_mse", "iterations", "residual",
            "converged", "growth", "gradient", "seconds", "fixed_mse", "fixed_converged"} \
        == set(cards[1]["history"][0])
    assert set(cards[1]["loss"]) >= set(released["loss"])
    assert {name: set(found) for name, found in cards[1]["measured"].items()} == {
        name: set(found) for name, found in released["measured"].items()}
    jfb = METHODS["jfb"]
    model = load_model(jfb, tmp_path / "one")
    fill(tmp_path / "two" / "jfb.safetensors", model)


def test_train_refuses_bad_input_in_one_line(image_folder, tmp_path, capsys):
    for words, message in (
            (["--profile", "slow"], "unknown profile 'slow'"),
            (["-p", "epoch=3"], "unknown parameter 'epoch'"),
            (["--data", str(tmp_path / "none")], "no data at"),
            (["--from", str(tmp_path)], "no weights at")):
        assert main(["train", "jfb", "--out", str(tmp_path / "out"), *words]) == 2
        assert message in capsys.readouterr().err


def test_evaluate_in_two_processes_gives_the_figures_of_one(image_folder, weights, tmp_path):
    words = ["evaluate", "--data", image_folder, "--weights", weights, "--limit", "3",
             "--method", "unrolled", "--method", "tikhonov", "--method", "jfb", "--json"]
    done = torchrun("-m", "jfbnb", *words, tmp_path / "two.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tikhonov") == 1
    assert main([*map(str, words), str(tmp_path / "one.json")]) == 0
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert list(two["methods"]) == list(one["methods"]) == ["unrolled", "tikhonov", "jfb"]
    for row in (*one["methods"].values(), *two["methods"].values()):
        del row["seconds_per_image"]
    assert two == one


def test_tables_of_blocks_join_into_the_table_of_all(weights):
    methods = make_methods(["tikhonov", "measurement"], weights, CPU)
    A, x = Blur(12, 5, 2.0), IMAGES[:3, :, :12, :12] / 255
    d, names = measure(A, x, 0.01, 0, [0, 1, 2]), ["a", "b", "c"]
    whole = evaluate(methods, A, x, d, 0.01, names)
    parts = [evaluate(methods, A, x[part], d[part], 0.01, names[part])
             for part in (slice(0, 1), slice(1, 3))]
    columns = ["method", "image", "psnr", "ssim"]
    assert join(parts)[columns].equals(whole[columns])


@pytest.mark.parametrize(("images", "world"), [(7, 3), (4, 4), (200, 64)])
def test_blocks_have_every_image_once_and_are_of_like_size(monkeypatch, images, world):
    monkeypatch.setattr(processes, "world_size", lambda: world)
    found = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        found.append(list(range(images))[processes.block(images)])
    assert list(chain.from_iterable(found)) == list(range(images))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    with pytest.raises(UserError, match=f"{world - 1} images for {world} processes"):
        processes.block(world - 1)
