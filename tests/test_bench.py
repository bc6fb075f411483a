"""The benchmarks, each once and tiny: they solve one problem, time what ships, and write tables."""

import json
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import bench
import budget
import command
import contenders
import grid
import h5py
import measurements
import numpy as np
import pandas as pd
import published
import pytest
import rates
import released
import scipy.signal
import skimage.data
import skimage.metrics
import spectral
import torch
from contenders import KEYS, RECONSTRUCTIONS, STEPS, Size, make_problem
from PIL import Image
from report import verdicts

from jfbnb.core.denoisers import DnCNN
from jfbnb.core.operators import Blur
from jfbnb.core.protocols import measure
from jfbnb.data import ImageSet, Splits
from jfbnb.training.evaluation import evaluate
from jfbnb.training.losses import LossSettings
from jfbnb.training.methods import METHODS
from jfbnb.training.muon import Muon
from jfbnb.training.recipes import prepare
from jfbnb.training.restorers import make_methods
from jfbnb.training.weights import save_weights

NAMED = {contender.name: contender for contender in (*STEPS, *RECONSTRUCTIONS)}
TINY = Size(1, 32)


def gradient(run) -> torch.Tensor:
    run.loss().backward()
    return torch.cat([p.grad.flatten() for p in run.network.parameters()])


def test_a_quick_run_compares_and_writes(tmp_path, monkeypatch):
    pytest.importorskip("torchdeq")
    pytest.importorskip("deepinv")
    peers = [replace(peer, solvers=("Anderson",)) for peer in contenders.PEERS]
    ours = [NAMED["jfbnb jfb"], NAMED["jfbnb jfb, as shipped"]]
    monkeypatch.setattr(bench, "STEPS", [*ours, *peers])
    monkeypatch.setattr(bench, "RECONSTRUCTIONS", [NAMED["jfbnb"], *peers])
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 0
    for name, own in (("step", bench.STEPS), ("reconstruction", bench.RECONSTRUCTIONS)):
        assert (tmp_path / f"{name}.md").exists() and (tmp_path / f"{name}.png").exists()
        table = pd.read_csv(tmp_path / f"{name}.csv").set_index("contender")
        assert list(table.index) == [c.name for c in own]
        assert (table["came to"] <= table["to distance"]).all()
        assert (table.seconds > 0).all() and table["times ours"][own[0].name] == 1
    assert "that of jfbnb jfb, as shipped or more" in (tmp_path / "targets.md").read_text()
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert set(found) == {"step", "reconstruction"} and "torchdeq" in found["step"]["machine"]
    assert found["step"]["version"] == version("jfbnb") and found["step"]["command"]


@pytest.mark.parametrize("size", [TINY, Size(1, 36, camera=True)])
def test_contenders_meet_at_one_equilibrium(size):
    """With another border, too, whose scene is larger than the picture."""
    pytest.importorskip("torchdeq")
    pytest.importorskip("deepinv")
    problem = make_problem(size)
    for name in ("jfbnb", *(c.name for c in (STEPS if size is TINY else contenders.PEERS))):
        run = NAMED[name].make(problem, "Anderson", 1e-5 if NAMED[name].by_residual else 30)
        assert problem.distance(run.image(problem.d).detach()) < 1e-3, name
    assert problem.distance(problem.x) > 0.01


@pytest.mark.parametrize("peer", contenders.PEERS)
def test_our_gradient_is_the_peers(peer):
    """Without penalty, in float32."""
    pytest.importorskip(peer.library)
    problem = make_problem(TINY)
    ours = gradient(NAMED["jfbnb jfb"].make(problem, "", 1e-5))
    theirs = gradient(peer.make(problem, "Anderson", 30))
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_steps_as_shipped_are_those_of_trainings():
    """The value of the loss for profile cpu; for best one solve, then seven steps without."""
    problem = make_problem(TINY)
    losses = LossSettings(0.01, 3e-3, 50, power_iterations=6, max_growth=0.9, penalty=0.1)
    _, loss = prepare(METHODS["jfb"], problem.network, problem.settings, problem.A, losses)
    step = NAMED["jfbnb jfb, as shipped"].make(problem, "", 3e-3)
    assert step.loss().item() == loss(problem.x, KEYS)[0].mean().item()
    step = NAMED["jfbnb jfb, as best ships"].make(problem, "", 1e-3)
    assert (step.batch_reuse, step.optimizer) == (8, Muon)
    calls: list[int] = []
    step.network.register_forward_hook(lambda *_: calls.append(1))
    each = []
    for _ in range(2 * step.batch_reuse):
        calls.clear()
        step.loss()
        each.append(len(calls))
    for batch in (each[:8], each[8:]):
        assert batch[0] > batch[1] and len(set(batch[1:])) == 1


def test_the_least_effort_is_found():
    pytest.importorskip("torchdeq")
    problem, peer = make_problem(TINY), NAMED["torchdeq jfb, our map"]
    effort = measurements.least_effort(problem, peer, "Picard", 0.01)
    assert measurements.distance(problem, peer, "Picard", effort) <= 0.01
    assert measurements.distance(problem, peer, "Picard", effort - 1) > 0.01


def test_a_contender_that_does_not_arrive_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measurements, "RESIDUALS", (0.5,))
    assert bench.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "error: jfbnb jfb does not come to" in capsys.readouterr().out


def test_targets_are_met_or_missed(tmp_path):
    """By the faster peer, on the worst problem, on the network that a target is for."""
    assert verdicts(tmp_path).empty
    seconds = {"jfbnb jfb": 1.0, "jfbnb jfb, as shipped": 1.5, "jfbnb jfb, as best ships": 0.5,
               "torchdeq jfb, our map": 1.35, "deepinv jfb, our map": 1.4}
    step = pd.DataFrame([(name, 0.01, problem, slower * s) for name, s in seconds.items()
                         for problem, slower in (("16x64-8x32", 1), ("16x64-UNet", 2))],
                        columns=["contender", "to distance", "problem", "seconds"])
    step.to_csv(tmp_path / "step.csv", index=False)
    pd.DataFrame({"megapixels": [3.0, 12.0, 12.0], "seconds": [900, 300, 660],
                  "process MB": [8000, 2048, 3072]}).to_csv(
                      tmp_path / "photographs_large.csv", index=False)
    table = verdicts(tmp_path)
    assert table.measured.tolist() == pytest.approx([1.35, 0.9, 2.7, 11, 3])
    assert table.met.tolist() == ["yes", "no", "yes", "no", "yes"]


@pytest.fixture
def images(monkeypatch):
    """Four smooth images of 32 x 32 in the place of all data sets."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), size=32, mode="bilinear")
    whole = ImageSet((255 * smooth).to(torch.uint8), ["coffee/1", "rocket/1", "eye/1", "rocket/2"],
                     [0, 1, 2, 3])
    splits = Splits(whole, whole[:2], whole, "noise")
    for module in (budget, grid, released):
        monkeypatch.setattr(module, "load_splits", lambda _: splits)
    return whole


def test_a_grid_is_measured_once_and_drawn(images, weights, tmp_path, monkeypatch, capsys):
    kernels = {("Gaussian 3 x 3, std 1", "unknown"): grid.gaussian(3, 1.0),
               ("protocol paper", "black"): partial(Blur, kernel_size=5, kernel_std=5**0.5)}
    monkeypatch.setattr(grid, "KERNELS", kernels)
    monkeypatch.setattr(grid, "NOISES", (0.02,))
    monkeypatch.setattr(grid, "SIDE", 32)
    monkeypatch.setattr(grid, "bundled_photos", lambda split, size: images)
    monkeypatch.setattr(grid, "FURTHER", 30)
    words = ["--weights", str(weights), "--out", str(tmp_path), "--images", "2",
             "--methods", "jfb"]
    assert grid.main(words) == 0
    rows = pd.read_csv(tmp_path / "grid.csv")
    assert len(rows) == 2 * 2 and set(rows.kind) == set(grid.KINDS)
    assert (tmp_path / "grid.png").exists() and (tmp_path / "grid_overview.md").exists()
    # A row is what the tables say of these images.
    own = rows[(rows.border == "black") & (rows.kind == "faces")].iloc[0]
    A, x = Blur(32, 5, 5**0.5), images[:2].as_float()
    table = evaluate(make_methods(["jfb"], weights, x.device), A, x,
                     measure(A, x, 0.02, 0, [0, 1]), 0.02, ["a", "b"])
    assert own.psnr == pytest.approx(table.psnr.mean(), abs=1e-4)
    assert own.most_evaluations == table.iterations.max()
    assert own.converged == table.converged.mean()

    called = []
    monkeypatch.setattr(grid, "save_figure", lambda *_: None)
    monkeypatch.setattr(grid, "point", lambda *_: called.append(1) or {
        "images": 2, "psnr": 1.0, "converged": 1.0, "most_evaluations": 1, "worst_drift": 0.0})
    assert grid.main(words) == 0 and not called
    settings = {"tau": 0.1, "sigma": 0.1}
    save_weights(weights / "jfb.safetensors", METHODS["jfb"].build(
        None, DnCNN(2, 4), settings), {"noise_std": 0.01, "settings": settings})
    assert grid.main(words) == 0 and len(called) == 4  # of other weights all is measured anew
    assert grid.main([*words, "--methods", "unrolled"]) == 1
    assert "error: unrolled has no equilibrium" in capsys.readouterr().out


def test_released_networks_are_measured_once_each(images, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "get_protocol", lambda name: replace(
        contenders.PAPER, image_size=32))
    words = ["--out", str(tmp_path), "--images", "2", "--protocols", "paper"]
    assert released.main([*words, "--methods", "jfb"]) == 0
    rows = pd.read_csv(tmp_path / "released_images.csv")
    assert len(rows) == 2 * 2 and rows.groupby("set").weights.nunique().tolist() == [1, 1]
    monkeypatch.setattr(released, "evaluate", None)  # would be called to measure
    assert released.main([*words, "--methods", "jfb"]) == 0
    assert pd.read_csv(tmp_path / "released.csv").images.tolist() == [2, 2]


def test_networks_of_two_budgets_are_measured_once_each(images, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "get_protocol", lambda name: replace(
        contenders.PAPER, image_size=32))
    for spent in (100.0, 400.0):
        monkeypatch.setattr(budget, "read_card", lambda path, spent=spent: {
            "protocol": "paper", "training": {"budget": spent, "learning_rate": 0.1, "seed": 0}})
        for _ in range(2):
            assert budget.main([str(weights), "--out", str(tmp_path)]) == 0
    rows = pd.read_csv(tmp_path / "budget.csv")
    spent = rows.groupby("method").budget.apply(list)
    assert spent[budget.TRAINED].tolist() == [[100.0, 400.0]] * len(budget.TRAINED)
    assert spent[list(budget.UNTRAINED)].tolist() == [[0.0]] * 3
    assert (tmp_path / "budget.png").exists()


def test_spectral_normalisation_leaves_matrices_of_norm_1():
    torch.manual_seed(0)
    R = spectral.SpectralDnCNN(3, 8)
    for _ in range(100):  # each application refines the norms
        R(torch.rand(1, 3, 8, 8), 0.05)
    norms = [torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() for layer in R.layers[::2]]
    assert norms == pytest.approx(3 * [1], abs=1e-4)


def test_published_protocol_is_dpirs_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "SHOWN", ("total-variation",))
    kernel = np.random.default_rng(0).random((17, 17))
    kernel /= kernel.sum()
    with h5py.File(tmp_path / "k.mat", "w") as file:
        file["a"] = kernel.T  # as MATLAB stores it
        file["kernels"] = np.array([[file["a"].ref]], dtype=h5py.ref_dtype)
    sharp = skimage.data.coffee()[100:140, 100:148]
    Image.fromarray(sharp).save(tmp_path / "a.png")
    given = ["--pictures", str(tmp_path), "--out", str(tmp_path), "--kernels"]
    for _ in range(2):
        assert published.main([*given, str(tmp_path / "k.mat")]) == 0
    rows = pd.read_csv(tmp_path / "published.csv")
    assert rows.noise.tolist() == [2.55, 7.65, 12.75] and (rows.input < rows.PSNR).all()
    d = np.stack([scipy.signal.convolve2d(sharp[..., c], kernel, "same", "wrap")
                  for c in range(3)], axis=-1).astype(np.uint8)  # which cuts
    d = d / 255 + np.random.RandomState(0).normal(0, 0.01, d.shape)
    rounded = (255 * d).round().clip(0, 255).astype(np.uint8)
    assert rows.input[0] == pytest.approx(
        skimage.metrics.peak_signal_noise_ratio(sharp, rounded), abs=0.01)
    assert published.main([*given, str(tmp_path / "a.png")]) == 1
    assert "holds no kernels" in capsys.readouterr().out


def test_stored_images_are_of_the_released_weights():
    """Else the table of docs/results.md would lose its rows when it is made again."""
    rows = pd.read_csv(command.RESULTS / "released_images.csv")
    for (name, method), own in rows.groupby(["set", "method"]):
        assert set(own.weights) == {released.weights_of(released.SETS[name], method)}


def test_learning_rates_are_searched_until_the_best_lies_between_two(tmp_path):
    tried = {1.0: 30.0, 0.5: 29.0, 2.0: 31.0}
    assert rates.next_rate(1.0, {}) == 0.5
    assert rates.next_rate(1.0, tried) == 4.0
    assert rates.next_rate(1.0, tried | {4.0: 30.5}) is None
    assert rates.next_rate(1.0, {2.0**-k: 30.0 + k for k in range(-1, 6)}) is None  # tried enough
    pd.DataFrame({"method": "jfb", "learning_rate": [0.5, 1.0, 2.0],
                  "psnr": [30.0, 30.5, 30.505]}).to_csv(tmp_path / "p.csv")
    assert rates.best_rates(tmp_path / "p.csv") == {"jfb": 1.0}


def test_a_search_trains_once_at_each_rate(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "TRIES", 3)
    words = ["--start", str(weights), "--methods", "feedforward", "--share", "0.002",
             "--images", "1", "--out", str(tmp_path)]
    assert rates.main(words) == 0
    rows = pd.read_csv(tmp_path / "quick.csv")
    assert rows.learning_rate.nunique() == len(rows) == 3 and (rows.psnr > 10).all()
    monkeypatch.setattr(rates, "train_method", None)  # would be called to train
    assert rates.main(words) == 0
    assert set(json.loads((tmp_path / "provenance.json").read_text())) == {"rates_quick"}
