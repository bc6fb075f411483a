"""Time to quality: that the peers train the same thing, what is kept, and what is counted."""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import contenders
import quality

from jfbnb.data import ImageSet, Splits, bundled_photos
from jfbnb.training.losses import LossSettings
from jfbnb.training.recipes import prepare
from jfbnb.training.restorers import RELEASED
from jfbnb.training.weights import load_denoiser

SOLVERS = {"torchdeq": ("Anderson", 25), "deepinv": ("Anderson", 25)}
STEP = pd.DataFrame({
    "problem": ["16x64", "16x64", "4x128"], "to distance": 1e-2, "reached": "yes",
    "contender": ["torchdeq jfb, our map", "deepinv jfb, our map", "deepinv jfb, our map"],
    "solver": ["Anderson", "Picard", "Anderson"],
    "stops at": [f"{n} iterations" for n in (9, 12, 5)]})


def gradients(loss, model, x):
    errors, _ = loss(x, (0, 1, 0, 1), range(len(x)))
    model.zero_grad()
    errors.mean().backward()
    return torch.cat([p.grad.flatten() for p in model.T.D.network.parameters()])


@pytest.mark.parametrize("library", SOLVERS)
def test_a_peer_trains_the_same_network_by_the_same_gradient(library):
    pytest.importorskip(library)
    settings = {"tau": 0.05, "sigma": 0.04}
    network = load_denoiser(RELEASED / "denoiser.safetensors").network
    A = contenders.PAPER.operator(32)
    x = bundled_photos("test", 32)[:2].as_float()
    losses = LossSettings(0.01, 1e-5, 60, penalty=0.0)
    model, ours = prepare(quality.JFB, network, settings, A, losses)
    wanted = gradients(ours, model, x)
    method = quality.rivals(SOLVERS)[f"{library}, one-step gradient"].method
    model, theirs = prepare(method, network, settings, A, losses)
    found = gradients(theirs, model, x)
    assert torch.cosine_similarity(found, wanted, dim=0) > 0.999
    assert found.norm().item() == pytest.approx(wanted.norm().item(), rel=0.02)


def test_a_peers_solver_is_the_one_that_the_steps_found(tmp_path):
    STEP.to_csv(tmp_path / "step.csv", index=False)
    assert quality.fastest(tmp_path) == {"torchdeq": ("Anderson", 9), "deepinv": ("Picard", 12)}


def test_seconds_to_a_quality_are_between_two_schedules():
    own = pd.DataFrame({"seconds": [40.0, 10.0, 160.0], "psnr": [34.0, 33.0, 33.9]})
    assert quality.seconds_to(33.5, own) == pytest.approx(20.0)
    for never_or_at_once in (34.1, 32.9):
        assert math.isnan(quality.seconds_to(never_or_at_once, own))
    rows = pd.concat([own.assign(rival="jfbnb, as profile best trains"),
                      own.assign(rival="deepinv, one-step gradient", seconds=3 * own.seconds)])
    table = quality.table(rows).set_index("training")
    assert table.loc["deepinv, one-step gradient", "times ours, 33.8 dB"] == pytest.approx(3.0)
    assert np.isnan(quality.table(rows[rows.psnr < 34])["times ours, 34 dB"]).all()


def test_what_is_done_is_kept(tmp_path, monkeypatch, capsys):
    images = torch.randint(256, (60, 3, 128, 128), dtype=torch.uint8)
    whole = ImageSet(images, [str(i) for i in range(60)], list(range(60)))
    monkeypatch.setattr(quality, "load_splits", lambda *_: Splits(whole, whole[:2], whole, "noise"))
    words = ["--out", str(tmp_path), "--budgets", "100", "--validation", "1", "--threads", "1"]
    assert quality.main(words) == 1 and "no step.csv" in capsys.readouterr().out
    STEP.to_csv(tmp_path / "step.csv", index=False)
    few = partial(quality.rivals, {})  # ours alone
    monkeypatch.setattr(quality, "rivals", lambda solvers: few())
    assert quality.main(words) == 0
    rows = pd.read_csv(tmp_path / "quality_trainings.csv")
    assert len(rows) == 2 and (rows.seconds > 0).all() and (rows.psnr > 10).all()
    monkeypatch.setattr(quality, "train_method", None)  # would be called
    assert quality.main(words) == 0 and (tmp_path / "quality.png").stat().st_size > 1000
