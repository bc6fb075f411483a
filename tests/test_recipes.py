"""A training by the clock: which learning rate, how many steps, and what a search leaves behind."""

import json
import math
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from jfbnb import recipes
from jfbnb.common import UserError
from jfbnb.datasets import ImageSet, Splits
from jfbnb.methods import METHODS, prior
from jfbnb.networks import DnCNN
from jfbnb.operators import get_protocol
from jfbnb.recipes import Run, pose, read_cards, search, train_method, trainings
from jfbnb.training import LossSettings, TrainingConfig

CPU = torch.device("cpu")
COST = 0.25  # seconds of a step, on a clock of the test's own
CONFIG = TrainingConfig(1, batch_size=4, crop=16, learning_rate=1e-3, seed=0, unconverged_limit=1.0)
LOSSES = LossSettings(0.01, 1e-2, 4, 1, penalty=0.0)
UNROLLED = METHODS["unrolled"]
SETTINGS = {**prior(0.01, 1)[0], "iterations": 2}


@pytest.fixture
def problem():
    images = torch.randint(256, (14, 3, 128, 128), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    whole = ImageSet(images, [str(i) for i in range(14)], list(range(14)))
    return pose(get_protocol("paper"), Splits(whole[4:], whole[:2], whole[2:4], "noise"), 1, 0, CPU)


@pytest.fixture
def best():
    """The best learning rate, in a list, to be changed."""
    return [4e-3]


@pytest.fixture
def limit():
    """The highest that can be trained."""
    return [1.5e-3]


@pytest.fixture
def clock(monkeypatch, best, limit):
    """Trainings that take `COST` a step, and leave their learning rate where `score` finds it."""
    seen = []

    def train(module, loss, images, config, *arguments, **more):
        steps = round(config.epochs * math.ceil(len(images) / config.batch_size))
        seen.append((config.learning_rate, steps))
        if config.learning_rate > limit[0] and steps != recipes.FIRST:
            seen.pop()
            raise UserError("the loss is nan")
        return [{"epoch": config.epochs, "seconds": COST * steps}]

    monkeypatch.setattr(recipes, "train", train)
    monkeypatch.setattr(recipes, "score", lambda model, problem: {
        "psnr": 30 - abs(math.log2(seen[-1][0] / best[0]))})
    return seen


def find(problem, run, minutes=1.0):
    return search(UNROLLED, DnCNN(2, 4), SETTINGS, problem, CONFIG, LOSSES, run, minutes)


def test_a_search_fills_the_minutes_at_the_best_rate_that_trains(problem, clock):
    lines = []
    config, tried = find(problem, Run(CPU, log=lines.append))
    assert config.learning_rate == 1e-3  # 2e-3 would be better, and does not train
    assert lines == ["unrolled: the loss is nan"]
    assert round(config.epochs * 3) == 60 / COST  # three steps an epoch
    short = 50  # an eighth of the minute would be fewer
    assert [(rate, steps) for rate, steps in clock if steps != recipes.FIRST] == [
        (5e-4, short), (1e-3, short)]
    assert [t["learning_rate"] for t in tried] == [5e-4, 1e-3]
    assert [t["psnr"] for t in tried] == pytest.approx([27, 28])


@pytest.mark.parametrize(("goal", "found", "tries"), [
    (1e-3, 1e-3, [5e-4, 1e-3, 2e-3]),
    (2e-3, 2e-3, [5e-4, 1e-3, 2e-3, 4e-3]),
    (2.6e-4, 2.5e-4, [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3]),
    (1e-9, 1.25e-4, [1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3])])  # five, and no more
def test_a_search_goes_on_while_the_best_is_at_an_end(problem, clock, best, limit, goal, found,
                                                      tries):
    best[0], limit[0] = goal, 1.0
    config, tried = find(problem, Run(CPU, log=lambda line: None))
    assert config.learning_rate == pytest.approx(found)
    assert [t["learning_rate"] for t in tried] == pytest.approx(tries)


def test_no_rate_that_trains_is_an_error_that_says_so(problem, clock, limit):
    limit[0] = 0.0
    with pytest.raises(UserError, match=r"unrolled cannot be trained at any of 5 learning rates"):
        find(problem, Run(CPU, log=lambda line: None))


@pytest.mark.parametrize("damage", [False, True])
def test_a_search_goes_on_where_it_was_stopped(problem, clock, tmp_path, monkeypatch, damage):
    run, network = Run(CPU, tmp_path, log=lambda line: None), DnCNN(2, 4)

    def again(minutes=1.0):
        return search(UNROLLED, network, SETTINGS, problem, CONFIG, LOSSES, run, minutes)

    class Killed(Exception):
        pass

    ours = recipes.score

    def die_in_the_second(model, problem):
        if len(clock) == 3:  # the first steps, and two tries
            raise Killed
        return ours(model, problem)

    monkeypatch.setattr(recipes, "score", die_in_the_second)
    with pytest.raises(Killed):
        again()
    monkeypatch.setattr(recipes, "score", ours)
    (file,) = (tmp_path / "checkpoints").glob("*.json")
    if damage:
        file.write_text("{")
    calls = len(clock)
    first = again()
    rates = [rate for rate, steps in clock[calls:] if steps != recipes.FIRST]
    assert rates == pytest.approx([5e-4, 1e-3] if damage else [1e-3])  # 2e-3 does not train
    calls = len(clock)
    assert again() == first and len(clock) == calls  # done is done
    assert again(2.0)[0].epochs == pytest.approx(2 * first[0].epochs) and len(clock) > calls


def test_its_training_is_whole_and_its_card_can_be_taken_and_shown(problem, tmp_path):
    """No clock of ours: half a second of training, by the real one."""
    torch.manual_seed(0)
    network, lines = DnCNN(2, 4), []
    model, card = train_method(UNROLLED, network, SETTINGS, problem, CONFIG, LOSSES,
                               Run(CPU, tmp_path / "a", log=lines.append), minutes=0.5 / 60)
    history = pd.DataFrame(card["history"])
    assert 0.1 < history.seconds.sum() < 2.5
    cards = read_cards(tmp_path / "a", ["unrolled"])
    assert card["history"] == cards["unrolled"]["history"]
    assert card["measured"] == cards["unrolled"]["measured"]
    assert cards["unrolled"]["minutes"] == 0.5 / 60 and len(cards["unrolled"]["search"]) >= 3
    table, schedules = trainings(cards)
    assert table.Minutes[0] == pytest.approx(history.seconds.sum() / 60)
    assert table.Steps[0] == round(history.epoch.iloc[-1] * 3)
    assert len(schedules) == len(cards["unrolled"]["search"]) + 1 and schedules.chosen.sum() == 2
    taken, same = train_method(UNROLLED, network, SETTINGS, problem, CONFIG, LOSSES,
                               Run(CPU, tmp_path / "b", weights=tmp_path / "a"), minutes=0.5 / 60)
    assert same == cards["unrolled"]
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), taken.state_dict().values(), strict=True))
    for minutes, message in ((1.0, "of training, not of 1.0"), (None, "was trained with")):
        with pytest.raises(UserError, match=message):
            train_method(UNROLLED, network, SETTINGS, problem, CONFIG, LOSSES,
                         Run(CPU, weights=tmp_path / "a"), minutes=minutes)


def test_an_exercise_sees_its_own_training_and_leaves_the_kept_one(problem, tmp_path):
    """Notebook 4 with other numbers: what it shows is of those, what others read is not."""
    torch.manual_seed(0)
    network = DnCNN(2, 4)
    run = Run(CPU, tmp_path, log=str.encode, keep=True)
    first, second = (train_method(UNROLLED, network, SETTINGS, problem,
                                  replace(CONFIG, learning_rate=rate), LOSSES, run)[1]
                     for rate in (1e-3, 2e-3))
    assert first["history"][-1]["loss"] != second["history"][-1]["loss"]
    for folder, card, rate in ((tmp_path, first, 1e-3), (tmp_path / "other", second, 2e-3)):
        assert card["training"]["learning_rate"] == rate
        assert read_cards(folder, ["unrolled"])["unrolled"]["history"] == card["history"]
        written = pd.read_csv(folder / "unrolled_history.csv")
        assert written.loss.tolist() == pytest.approx([part["loss"] for part in card["history"]])


def test_a_card_without_a_search_cannot_be_taken_by_the_clock(problem, tmp_path):
    (tmp_path / "unrolled.json").write_text(json.dumps({"training": asdict(CONFIG)}))
    with pytest.raises(UserError, match="no record of a training by the clock"):
        find(problem, Run(CPU, weights=tmp_path))
    with pytest.raises(UserError, match="no model card in"):
        read_cards(tmp_path, ["unrolled", "jfb"])


def test_a_notebook_keeps_anothers_weights_and_a_command_replaces_them(problem, tmp_path,
                                                                         monkeypatch):
    """An exercise with another depth does not change what later notebooks read."""
    config, lines = TrainingConfig(0.1, 4, 16, 1e-3, 0), []

    def trained(depth: int, keep: bool) -> None:
        run = Run(CPU, tmp_path, log=lines.append, keep=keep)
        recipes.train_denoiser(DnCNN(depth, 4), problem.splits, config, 0.1, False, run)

    def depth(folder) -> int:
        card = json.loads((folder / "denoiser.json").read_text())
        return card["networks"][0]["arguments"]["depth"]

    trained(2, keep=True)
    trained(2, keep=True)  # the same again is no other
    before = (tmp_path / "denoiser_history.csv").read_text()
    assert not any("is kept" in line for line in lines)
    trained(3, keep=True)
    assert (depth(tmp_path), depth(tmp_path / "other")) == (2, 3)
    assert (tmp_path / "denoiser_history.csv").read_text() == before
    assert "other parameters (networks) and is kept" in lines[-1] and "`profile`" in lines[-1]
    trained(3, keep=False)
    assert depth(tmp_path) == 3
    (tmp_path / "denoiser.json").write_text("damaged")
    trained(2, keep=True)
    assert depth(tmp_path) == 2
    monkeypatch.setitem(recipes.sys.modules, "ipykernel", recipes)
    monkeypatch.delenv(recipes.BY_COMMAND, raising=False)
    assert Run(CPU).keep
    monkeypatch.setenv(recipes.BY_COMMAND, "1")
    assert not Run(CPU).keep
