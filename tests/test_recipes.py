"""Trainings: of equal computation, the same on a busy machine, and what they leave in a folder."""

import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from jfbnb.common import UserError
from jfbnb.core.denoisers import DnCNN
from jfbnb.core.protocols import get_protocol
from jfbnb.data import ImageSet, Splits, bundled_photos
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import EquilibriumLoss, LossSettings
from jfbnb.training.methods import METHODS, prior
from jfbnb.training.recipes import Run, read_cards, train_method, trainings, validation_problem
from jfbnb.training.restorers import RELEASED
from jfbnb.training.weights import load_denoiser

CPU = torch.device("cpu")
CONFIG = TrainingConfig(1, batch_size=4, crop=16, learning_rate=1e-3, seed=0, unconverged_limit=1.0)
LOSSES = LossSettings(0.01, 1e-2, 4, 1, penalty=0.0)
UNROLLED = METHODS["unrolled"]
SETTINGS = {**prior(0.01, 1)[0], "iterations": 2}
BUSY = "while True: sum(range(1000))"


@pytest.fixture
def problem():
    images = torch.randint(256, (14, 3, 128, 128), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    whole = ImageSet(images, [str(i) for i in range(14)], list(range(14)))
    splits = Splits(whole[4:], whole[:2], whole[2:4], "noise")
    return validation_problem(get_protocol("paper"), splits, 1, 0, CPU)


@pytest.fixture(scope="module")
def photographs():
    train, validation = (bundled_photos(part, 128) for part in ("train", "validation"))
    splits = Splits(train, validation, validation, "photographs")
    return validation_problem(get_protocol("paper"), splits, 1, 0, CPU)


EQUILIBRIA = [method for method in METHODS.values() if not method.smooth
              and isinstance(method.loss, type) and issubclass(method.loss, EquilibriumLoss)]


@pytest.mark.parametrize("method", EQUILIBRIA, ids=lambda method: method.name)
def test_training_lowers_every_maps_loss_at_its_equilibrium(photographs, method):
    """With one threshold of growth for all, in units of a map's steps. DE-GRAD's would rise by 14%
    were it not for the units."""
    denoiser = load_denoiser(RELEASED / "denoiser.safetensors").network
    settings = {"de-grad": {"tau": 0.2, "sigma": 0.022, "eta": 1.0},
                "de-prox": {"eta": 1.9, "sigma": 0.02}}.get(
                    method.name, {"tau": 0.056, "sigma": 0.042})  # as tuned
    config = TrainingConfig(0, 8, 24, 1e-4, 0, 1.0, budget=4000)
    _, card = train_method(method, denoiser, settings, photographs, config,
                           LossSettings(0.01, 1e-3, 100), Run(CPU, log=str.encode))
    history = pd.DataFrame(card["history"])
    assert history.converged.iloc[-1] == 1
    assert history.fixed_mse.iloc[-1] < 0.97 * card["start"]["fixed_mse"]


def test_a_budget_is_spent_alike_and_to_the_digit_on_a_busy_machine(problem):
    config = replace(CONFIG, epochs=0, budget=1500)
    found = {}
    for busy in (False, True):
        torch.manual_seed(0)
        network = DnCNN(2, 4)
        others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 * busy)]
        try:
            for name in ("jfb", "unrolled", "feedforward", "deq"):
                model, card = train_method(METHODS[name], network, SETTINGS, problem, config,
                                           LossSettings(0.01, 1e-3, 30), Run(CPU, log=str.encode))
                found[name, busy] = model, pd.DataFrame(card["history"]).drop(columns="seconds")
        finally:
            for other in others:
                other.kill()
    spent = [history.applications.iloc[-1] for _, history in found.values()]
    assert min(spent) >= 1500 and max(spent) < 1.2 * 1500  # a step or less beyond it
    for name in ("jfb", "unrolled", "feedforward", "deq"):
        (quiet, first), (busy, second) = found[name, False], found[name, True]
        pd.testing.assert_frame_equal(first, second, check_exact=True)
        assert all(torch.equal(a, b) for a, b in zip(
            quiet.state_dict().values(), busy.state_dict().values(), strict=True))


def test_its_training_is_whole_and_its_card_can_be_taken_and_shown(problem, tmp_path):
    torch.manual_seed(0)
    network, config = DnCNN(2, 4), replace(CONFIG, epochs=0, budget=500)
    model, card = train_method(UNROLLED, network, SETTINGS, problem, config, LOSSES,
                               Run(CPU, tmp_path / "a", log=str.encode))
    history = pd.DataFrame(card["history"])
    cards = read_cards(tmp_path / "a", ["unrolled"])
    assert card["history"] == cards["unrolled"]["history"]
    assert card["measured"] == cards["unrolled"]["measured"]
    assert (card["settings"], card["noise_std"]) == (SETTINGS, 0.01)
    table, curves = trainings(cards)
    assert table.Minutes[0] == pytest.approx(history.seconds.sum() / 60)
    assert table.Applications[0] == curves.applications.iloc[-1] >= 500
    assert table.Steps[0] == round(history.epoch.iloc[-1] * 3)
    assert len(curves) == len(history) + 1 == 11  # ten records, and the start
    assert curves.psnr[0] == pytest.approx(-10 * torch.tensor(card["start"]["fixed_mse"]).log10())
    taken, same = train_method(UNROLLED, network, SETTINGS, problem, config, LOSSES,
                               Run(CPU, tmp_path / "b", weights=tmp_path / "a"))
    assert same == cards["unrolled"]
    assert all(torch.equal(a, b) for a, b in zip(
        model.state_dict().values(), taken.state_dict().values(), strict=True))
    with pytest.raises(UserError, match=r"was trained with .* leave the parameter `weights` empty"):
        train_method(UNROLLED, network, SETTINGS, problem, replace(config, budget=600), LOSSES,
                     Run(CPU, weights=tmp_path / "a"))
    for trained in ([], 3, card["training"] | {"later": 1}, {"epochs": 3}):
        (tmp_path / "a/unrolled.json").write_text(json.dumps(card | {"training": trained}))
        with pytest.raises(UserError, match="has no model card with this training"):
            train_method(UNROLLED, network, SETTINGS, problem, config, LOSSES,
                         Run(CPU, weights=tmp_path / "a"))
    with pytest.raises(UserError, match="no model card "):
        read_cards(tmp_path, ["unrolled", "jfb"])


@pytest.mark.parametrize(("epochs", "budget"), [(0, 0), (1, 100), (-1, 0), (0, -5)])
def test_either_epochs_or_a_budget_is_given(epochs, budget):
    with pytest.raises(UserError, match="give one of them, positive"):
        replace(CONFIG, epochs=epochs, budget=budget)


def test_a_folder_has_the_latest_training_and_repeats_none(problem, tmp_path):
    torch.manual_seed(0)
    network, cards, lines = DnCNN(2, 4), [], []
    for rate in (1e-3, 2e-3, 1e-3):
        lines.append([])
        _, card = train_method(UNROLLED, network, SETTINGS, problem,
                               replace(CONFIG, learning_rate=rate), LOSSES,
                               Run(CPU, tmp_path, log=lines[-1].append))
        cards.append(card)
        assert read_cards(tmp_path, ["unrolled"])["unrolled"]["history"] == card["history"]
    assert cards[0]["history"] == cards[2]["history"] != cards[1]["history"]  # its seconds, too
    assert lines[2][0] == "resumed after epoch 1 of 1" and len(lines[2]) == 2 < len(lines[0])
