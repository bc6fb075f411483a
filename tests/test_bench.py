"""The benchmark's driver, tiny and within this process; its workers; what it computes."""

import functools
import json
import os
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench
import contenders
import measurements
import schedules
from contenders import KEYS, RECONSTRUCTIONS, STEPS, load_problem, ours, solve_problem
from processes import Worker, alone, in_turns
from report import verdicts

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.data import ImageSet, Splits
from jfbnb.training.loop import TrainingConfig
from jfbnb.training.losses import EquilibriumLoss, ExplicitLoss, ImplicitLoss, LossSettings
from jfbnb.training.methods import METHODS
from jfbnb.training.muon import Muon
from jfbnb.training.recipes import (
    Run,
    prepare,
    score,
    train_method,
    validation_problem,
    with_images,
)
from jfbnb.training.restorers import load_model
from jfbnb.training.weights import save_weights

NAMED = {contender.name: contender for contender in (*STEPS, *RECONSTRUCTIONS)}


class Inline:
    """A worker without a process."""

    def __init__(self, prepare, *arguments):
        self.measure = prepare(*arguments)

    def close(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(bench, "Worker", Inline)
    monkeypatch.setattr(bench, "alone", lambda job, *arguments: job(*arguments))


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("problem") / "1x32.safetensors"
    solve_problem(file, contenders.Size(1, 32))
    return file


def test_quick_run_compares_and_writes(tmp_path, monkeypatch, inline):
    pytest.importorskip("torchdeq")
    monkeypatch.setattr(bench, "STEPS", [NAMED[name] for name in (
        "jfbnb jfb", "jfbnb jfb, as shipped", "torchdeq jfb, our map", "torchdeq jfb, Eq. 4")])
    monkeypatch.setattr(bench, "RECONSTRUCTIONS", [NAMED[name] for name in (
        "jfbnb", "torchdeq jfb, our map", "torchdeq jfb, Eq. 4")])
    monkeypatch.setattr(measurements, "ITERATIONS", tuple(range(1, 21)))  # too few for Eq. 4
    bench.main(["--quick", "--out", str(tmp_path), "--sections", "step", "reconstruction"])
    for name, own in (("step", bench.STEPS), ("reconstruction", bench.RECONSTRUCTIONS)):
        assert (tmp_path / f"{name}.md").exists() and (tmp_path / f"{name}.png").exists()
        table = pd.read_csv(tmp_path / f"{name}.csv").set_index("contender")
        assert table.reached.to_dict() == {c.name: "no" if c.map == "Eq. 4" else "yes" for c in own}
        assert (table["to distance"] == 3e-2).all()
        assert ((table["came to"] <= 3e-2) == (table.reached == "yes")).all()
        assert (table.seconds > 0).all() and table["times ours"][own[0].name] == 1
    text = (tmp_path / "targets.md").read_text()
    for ours_, name in (("jfbnb jfb", "Eq. 4"), ("jfbnb jfb", "our map"),
                        ("jfbnb jfb, as shipped", "our map")):
        assert any(f"that of {ours_} or more" in line and name in line
                   for line in text.splitlines())
    record = json.loads((tmp_path / "provenance.json").read_text())
    assert set(record) == {"step", "reconstruction"} and "torchdeq" in record["step"]["machine"]
    assert record["step"]["version"] == version("jfbnb") and record["step"]["command"]


def test_a_missing_peer_is_one_line_and_the_rest_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "available", lambda library: library != "torchdeq")
    made = bench.parse(["--quick"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("torchdeq is not installed") and "pip install -e '.[bench]'" in line
    assert {c.library for c in made.steps} == {"jfbnb", "deepinv"}
    assert {c.library for c in made.reconstructions} == {"jfbnb", "deepinv"}


@pytest.mark.parametrize("name", ["16", "16x64-8x32", "16x64x8x32", "16 64"])
def test_a_malformed_problem_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--problems", name])
    assert name in capsys.readouterr().err.splitlines()[-1]
    assert str(contenders.Size.parse("16x64")) == "16x64-8x32"
    assert str(contenders.Size.parse("16x64-UNet")) == "16x64-UNet"
    assert str(contenders.Size.parse("1x512-UNet-camera")) == "1x512-UNet-camera"


# --- what is timed is what ships ----------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch):
    """All that `recipes.prepare` is asked to build for the contenders, and what it returned."""
    calls = []

    def recorded(*arguments):
        calls.append((arguments, prepare(*arguments)))
        return calls[-1][1]

    monkeypatch.setattr(contenders, "prepare", recorded)
    return calls


@pytest.mark.parametrize(("name", "kind"), [
    ("jfb", EquilibriumLoss), ("neumann-5", EquilibriumLoss), ("implicit", ImplicitLoss),
    ("unrolled", ExplicitLoss)])
def test_the_timed_losses_are_the_packages_classes(problem_file, prepared, name, kind):
    NAMED[f"jfbnb {name}"].make(load_problem(problem_file), "", 5)
    ((_, (model, loss)),) = prepared
    assert type(loss) is kind and loss.model is model
    assert model.H is None and loss.settings.penalty == 0 and not loss.settings.bf16
    assert name == "neumann-5" or kind is METHODS[{"implicit": "deq"}.get(name, name)].loss


def test_the_step_as_shipped_is_that_of_a_training(problem_file, prepared):
    """Class, value and gradient of what `recipes.prepare` builds for the method as it is."""
    problem = load_problem(problem_file)
    step = NAMED["jfbnb jfb, as shipped"].make(problem, "", 3e-3)
    ((_, (_, timed)),) = prepared
    losses = LossSettings(0.01, 3e-3, 50, power_iterations=6, max_growth=0.9, penalty=0.1,
                          bf16=contenders.BF16)
    model, loss = prepare(METHODS["jfb"], problem.network, problem.settings, problem.A, losses)
    assert type(timed) is type(loss) is METHODS["jfb"].loss
    assert timed.settings == losses and timed.model.H is not None
    value, mine = loss(problem.x, KEYS, range(1))[0].mean(), step.loss()
    assert value.item() == mine.item()
    value.backward()
    mine.backward()
    for (name, own), other in zip(step.trained.named_parameters(), model.parameters(),
                                  strict=True):
        # At the noise level of the tuning there is nothing to follow.
        assert torch.equal(own.grad, other.grad)
        assert own.grad.abs().sum() > 0 or name.endswith(".follow")


def test_a_step_of_best_is_one_solve_and_then_visits(problem_file, prepared):
    """As a training of that profile has it, but for the drawn conditions."""
    step = NAMED["jfbnb jfb, as best ships"].make(load_problem(problem_file), "", 1e-3)
    ((_, (_, timed)),) = prepared
    assert timed.settings == LossSettings(
        0.01, 1e-3, 50, 2, max_growth=0.93, bf16=contenders.BF16, stability_every=8, heads=False,
        batch_reuse=8)
    assert timed.settings == replace(LossSettings(0.01, 1e-3, 50, 2, 0.93,
                                                  bf16=contenders.BF16).random_degradations(),
                                     conditions=None)
    assert (step.batch_reuse, step.optimizer) == (8, Muon)
    assert step.trained.H is None
    calls = []
    step.network.register_forward_hook(lambda *_: calls.append(1))
    each = []
    for _ in range(2 * step.batch_reuse):
        calls.clear()
        step.loss()
        each.append(len(calls))
    for cycle in (each[:8], each[8:]):  # solved for, then gone on from
        assert cycle[0] > cycle[1] and len(set(cycle[1:])) == 1


@pytest.mark.parametrize("name", [c.name for c in STEPS if c.library == "jfbnb"])
def test_the_judged_image_is_the_one_in_the_timed_loss(problem_file, prepared, name):
    problem = load_problem(problem_file)
    step = NAMED[name].make(problem, "", 1e-3 if NAMED[name].by_residual else 5)
    ((_, (_, loss)),) = prepared
    image = step.image(problem.d)
    assert image.requires_grad
    _, figures = loss(problem.x, KEYS, range(1))
    torch.testing.assert_close(figures["mse"], (image - problem.x).square().mean()[None])
    assert torch.equal(problem.draw(), problem.d)
    if "ship" not in name:
        assert step.loss().item() == pytest.approx(figures["mse"].item(), rel=1e-6)


def test_contenders_meet_at_the_equilibrium(problem_file):
    pytest.importorskip("torchdeq")
    pytest.importorskip("deepinv")
    problem = load_problem(problem_file)
    for name, solver, effort in (
            *((c.name, "Anderson", 1e-5) for c in NAMED.values() if c.by_residual),
            ("jfbnb unrolled", "Picard", 60),
            ("torchdeq jfb, our map", "Anderson", 25), ("deepinv jfb, our map", "Anderson", 25)):
        run = NAMED[name].make(problem, solver, effort)
        assert problem.distance("our map", run.image(problem.d).detach()) < 1e-3, name
    assert problem.distance("our map", problem.d) > 0.1


def test_contenders_meet_where_the_scene_goes_on(tmp_path):
    """The picture is smaller than the scene that all solve for."""
    pytest.importorskip("torchdeq")
    pytest.importorskip("deepinv")
    size = contenders.Size(1, 36, camera=True)
    file = tmp_path / f"{size}.safetensors"
    solve_problem(file, size)
    problem = load_problem(file)
    assert problem.d.shape[-2:] == (32, 32) and problem.x.shape[-2:] == (36, 36)
    for name, effort in (("jfbnb", 1e-5), ("torchdeq jfb, our map", 40),
                         ("deepinv jfb, our map", 40)):
        run = NAMED[name].make(problem, "Anderson", effort)
        assert problem.distance("our map", run.image(problem.d).detach()) < 1e-3, name


def test_gradients_like_for_like_are_the_peers(problem_file):
    """Ours in float32, without head and penalty, against torchdeq's own on the same map."""
    pytest.importorskip("torchdeq")
    problem = load_problem(problem_file)
    for name in ("jfb", "implicit"):
        gradients = []
        for contender, effort in ((NAMED[f"jfbnb {name}"], 1e-5),
                                  (NAMED[f"torchdeq {name}, our map"], 30)):
            run = contender.make(problem, "Anderson", effort)
            run.loss().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in run.trained.parameters()]))
            run.trained.zero_grad()
        mine, theirs = gradients
        assert (mine - theirs).norm() < 0.02 * theirs.norm(), name


def test_a_gradient_in_bfloat16_is_near_that_in_float32(problem_file):
    gradients = []
    for bf16 in (False, True):
        run = ours("jfb", bf16=bf16).make(load_problem(problem_file), "", 1e-5)
        run.loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in run.trained.parameters()]))
    exact, rounded = gradients
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99
    assert rounded.norm() / exact.norm() == pytest.approx(1, abs=0.05)


def test_the_least_effort_is_found(problem_file):
    """One that arrives, while the one before it does not."""
    problem, contender = load_problem(problem_file), NAMED["jfbnb unrolled"]
    found = measurements.least_effort(problem, contender, "Picard", 1e-2)
    before = measurements.attempt(problem, contender, "Picard", found["effort"] - 1, 1e-2)
    assert found["reached"] and found["distance"] <= 1e-2 < before["distance"]
    assert not measurements.least_effort(problem, contender, "Picard", 1e-9)["reached"]


# --- workers, tables ----------------------------------------------------------------------------


def test_a_worker_is_one_process_that_keeps_what_it_prepared():
    worker = Worker(functools.partial, os.getpid)
    first, second = worker.measure(), worker.measure()
    worker.close()
    assert first == second != os.getpid()
    assert alone(os.getpid) not in (first, os.getpid())
    with pytest.raises(TypeError):
        Worker(len)


def test_workers_take_turns_and_are_closed():
    order, closed = [], []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def measure(self):
            order.append(self.name)
            return self.name.upper()

        def close(self):
            closed.append(self.name)

    results = in_turns({name: Recorder(name) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and closed == ["a", "b"]
    assert results == [("a", "A"), ("b", "B"), ("a", "A"), ("b", "B")]


def test_verdicts_are_read_from_the_tables(tmp_path):
    assert verdicts(tmp_path).empty
    step = pd.DataFrame([
        (name, "1e-02", problem, seconds, reached)
        for problem, slow in (("16x64-8x32", 1.0), ("4x128-8x32", 1.2))
        for name, seconds, reached in (
            ("jfbnb jfb", slow, "yes"), ("jfbnb jfb, bf16", 0.7, "yes"),
            ("jfbnb jfb, as shipped", 0.1, "no"), ("torchdeq jfb, Eq. 4", 6.0, "no"),
            ("torchdeq jfb, our map", 1.4, "yes"), ("deepinv jfb, our map", 1.25, "yes"),
            ("deepinv implicit, our map", 0.1, "yes"))],
        columns=["contender", "to distance", "problem", "seconds", "reached"])
    step.to_csv(tmp_path / "step.csv", index=False)
    table = verdicts(tmp_path)
    assert table.with_images.tolist() == pytest.approx(
        [5, 1.25 / 1.2, 1.25 / 0.7, np.nan], nan_ok=True)
    assert table.met.tolist() == ["yes", "no", "yes", "no"]  # who does not arrive has not met it
    other = {"jfbnb jfb, bf16": "jfbnb jfb, as best ships", "4x128-8x32": "16x64-UNet"}
    step.replace(other).to_csv(tmp_path / "step.csv", index=False)
    table = verdicts(tmp_path).set_index("target").with_images
    (best,) = (value for target, value in table.items() if "as best ships" in target)
    assert best == pytest.approx(1.25 / 0.7)  # on its own network
    pd.DataFrame({"training": ["jfbnb, as profile best trains", "deepinv", "torchdeq"],
                  "times ours, 34 dB": [1.0, np.nan, 2.5]}).to_csv(
                      tmp_path / "quality.csv", index=False)
    assert verdicts(tmp_path).with_images.iloc[-1] == 2.5  # who never came is no ratio
    pd.DataFrame({"megapixels": [3.0, 12.0, 12.0], "seconds": [900, 300, 660],
                  "process MB": [8000, 2048, 3072]}).to_csv(
                      tmp_path / "photographs_large.csv", index=False)
    assert verdicts(tmp_path).tail(2)[["measured", "met"]].to_numpy().tolist() == [
        [11, "no"], [3, "yes"]]  # of the largest the slowest


# --- schedules ----------------------------------------------------------------------------------


def test_schedules_are_trained_once_each_and_paired_by_seed(tmp_path, monkeypatch, capsys):
    """Lengths, seeds and images counted; what is done is kept."""
    torch.manual_seed(0)
    images = torch.randint(256, (20, 3, 128, 128), dtype=torch.uint8)
    whole = ImageSet(images, [str(i) for i in range(20)], list(range(20)))
    splits = Splits(whole[8:], whole[:4], whole[4:8], "noise")
    monkeypatch.setattr(schedules, "load_splits", lambda *arguments: splits)
    network, settings = DnCNN(2, 4), {"tau": 0.1, "sigma": 0.03, "iterations": 2}
    weights, run = tmp_path / "weights", Run(contenders.CPU, tmp_path / "weights", log=lambda _: 0)
    save_weights(weights / "denoiser.safetensors", Denoiser(network, 0.0), {})
    problem = validation_problem(contenders.PAPER, splits, 1, 0, contenders.CPU)
    for name in ("jfb", "unrolled"):
        train_method(METHODS[name], network, settings, problem,
                     TrainingConfig(0, 4, 16, 1e-3, 0, 1.0, budget=400),
                     LossSettings(0.01, 1e-2, 4, 1), run)
    words = ["--weights", str(weights), "--out", str(tmp_path), "--methods", "jfb", "unrolled",
             "--lengths", "0.5", "1", "--seeds", "2", "--validation", "2", "--test", "3"]
    assert schedules.main(words) == 0
    rows = pd.read_csv(tmp_path / "schedules.csv")
    assert len(rows) == 2 * (2 * 2 + 1)  # two seeds on both sets, and the half length on one
    assert set(rows["count"][rows.images == "test"]) == {3}
    stored = METHODS["jfb"], json.loads((weights / "jfb.json").read_text())
    model = load_model(stored[0], weights)
    own = score(model.on(problem.A), with_images(problem, splits.test[:3]))
    first = rows[(rows.method == "jfb") & (rows.seed == 0) & (rows.images == "test")]
    assert first.psnr.item() == pytest.approx(own["psnr"], abs=1e-4)  # the stored one, not another
    table = pd.read_csv(tmp_path / "seeds.csv").set_index("Method")
    assert set(table.index) == {"Deep unrolling", "JFB", "JFB + head"}
    assert table.loc["JFB", "minus JFB (dB)"] == table.loc["JFB", "± over pairs"] == 0
    test = rows[(rows.images == "test") & (rows.length == 1)].set_index(["method", "seed"]).psnr
    apart = (test["unrolled"] - test["jfb"]).to_numpy()
    assert table.loc["Deep unrolling", "minus JFB (dB)"] == pytest.approx(apart.mean())
    assert table.loc["Deep unrolling", "± over pairs"] == pytest.approx(
        abs(apart[0] - apart[1]) / 2)
    monkeypatch.setattr(schedules, "trained", None)  # would be called for whatever is not done
    assert schedules.main(words) == 0
    assert (tmp_path / "schedules.png").exists()
    stored[1]["training"]["learning_rate"] *= 2
    (weights / "jfb.json").write_text(json.dumps(stored[1]))
    assert schedules.main(words) == 1 and "other cards" in capsys.readouterr().out


def test_schedules_without_cards_is_one_line(tmp_path, capsys):
    assert schedules.main(["--weights", str(tmp_path), "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("schedules: error: ")
