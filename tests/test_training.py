import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import Contractive, make_map

from jfbnb.common import UserError
from jfbnb.core.denoisers import Denoiser, DnCNN, UNet
from jfbnb.core.gradients import neumann
from jfbnb.core.maps import PreconditionedMap, SplittingMap
from jfbnb.core.models import Equilibrium, Feedforward, Unrolled
from jfbnb.core.operators import Blur
from jfbnb.core.protocols import get_protocol
from jfbnb.data import OFTEN, bundled_photos
from jfbnb.run import train as command
from jfbnb.run.command import main
from jfbnb.run.reproduce import notebooks
from jfbnb.training import checkpoints, loop, losses
from jfbnb.training.checkpoints import digest, load_checkpoint, previous, resume
from jfbnb.training.computation import metered
from jfbnb.training.degradations import RANDOM_DEGRADATIONS, Conditions
from jfbnb.training.loop import TrainingConfig, train
from jfbnb.training.losses import (
    DenoiserLoss,
    EquilibriumLoss,
    ExplicitLoss,
    LossSettings,
    growth_estimate,
)
from jfbnb.training.methods import METHODS
from jfbnb.training.weights import load_denoiser

CPU = torch.device("cpu")
# Networks this small and young rarely converge in the few iterations given here.
CONFIG = TrainingConfig(3, batch_size=4, crop=16, learning_rate=1e-3, seed=0, unconverged_limit=1.0)
LOSSES = LossSettings(0.01, tolerance=1e-3, max_iterations=8, power_iterations=1)


@pytest.fixture(autouse=True)
def a_record_for_each_epoch(monkeypatch):
    monkeypatch.setattr(loop, "RECORDS", 1)


@pytest.fixture
def images() -> torch.Tensor:
    return bundled_photos("test", 24).images[:400:40].clone()


def make(loss: str = "jfb"):
    torch.manual_seed(0)
    D = Denoiser(DnCNN(3, 6), 0.03)
    if loss == "denoiser":
        return D, DenoiserLoss(D, 0.1)
    model = Equilibrium(PreconditionedMap(Blur(16, 5, 2.0), D, 0.1))
    return model, EquilibriumLoss(model, LOSSES)


def weights_of(module) -> list[torch.Tensor]:
    return [value.clone() for value in module.state_dict().values()]


@pytest.mark.parametrize(("kind", "muon"), [("denoiser", False), ("jfb", False), ("jfb", True)])
def test_resumed_training_equals_uninterrupted_bit_for_bit(kind, muon, images, tmp_path):
    config = replace(CONFIG, muon=muon)
    model, loss = make(kind)
    whole = train(model, loss, images, config, CPU, tmp_path / "whole")
    uninterrupted = weights_of(model)

    class Killed(Exception):
        pass

    def die_in_epoch_2(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Killed

    model, loss = make(kind)
    with pytest.raises(Killed):
        train(model, loss, images, config, CPU, tmp_path / "cut", log=die_in_epoch_2)
    model, loss = make(kind)
    lines = []
    resumed = train(model, loss, images, config, CPU, tmp_path / "cut", log=lines.append)
    assert lines[0] == "resumed after epoch 2 of 3"
    assert re.fullmatch(r"epoch 3 of 3, loss [\d.e-]+, [\d.]+ dB on its crops, "
                        r"(\d.*% of the solves converged, )?done", lines[1]) or kind == "denoiser"
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), uninterrupted, strict=True))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]


@pytest.mark.parametrize("records", [1, 4, 6, 100])
def test_parts_change_no_weight(images, records, monkeypatch):
    """Two and a half epochs, recorded more or less often: the same draws, the same schedule."""
    model, loss = make()
    train(model, loss, images, replace(CONFIG, epochs=7 / 3), CPU)
    monkeypatch.setattr(loop, "RECORDS", records)
    other, loss = make()
    history = train(other, loss, images, replace(CONFIG, epochs=7 / 3), CPU)
    assert len(history) == min(7, max(records, 3))  # of seven steps, three to an epoch
    assert history[-1]["epoch"] == pytest.approx(7 / 3)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))


@pytest.fixture
def steps(monkeypatch) -> list[tuple[float, float]]:
    """Adam's learning rate and the gradient's length, of each step."""
    seen = []

    class Adam(torch.optim.Adam):
        def step(self, *arguments):
            group = self.param_groups[0]
            length = torch.cat([p.grad.flatten() for p in group["params"]]).norm()
            seen.append((group["lr"], length.item()))
            return super().step(*arguments)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    return seen


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_falls_to_0_at_the_end_of_every_schedule(images, warmup, steps):
    """Seven steps, by the cosine's closed form; in the first three it may rise before."""
    model, loss = make("denoiser")
    train(model, loss, images, replace(CONFIG, epochs=7 / 3, warmup=warmup), CPU)
    assert [rate for rate, _ in steps] == pytest.approx([5e-4 * (1 + math.cos(math.pi * k / 7))
                                  * min(1, (k + 1) / (warmup + 1)) for k in range(7)])


def test_a_gradient_is_cut_to_its_length_and_left_alone_by_0(images, steps):
    weights, found = {}, {}
    for clip in (0.0, 1e9, 1e-6):
        model, loss = make("denoiser")
        history = train(model, loss, images, replace(CONFIG, epochs=1, clip=clip), CPU)
        weights[clip], found[clip] = weights_of(model), history[0]["gradient"]
    assert all(torch.equal(a, b) for a, b in zip(weights[0.0], weights[1e9], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0.0], weights[1e-6], strict=True))
    lengths = [length for _, length in steps]
    assert found[0.0] == pytest.approx(sum(lengths[:3]) / 3)  # what is reported is uncut
    assert min(lengths[:3]) > 1e-5 and found[1e-6] > 1e-5
    assert lengths[6:] == pytest.approx(3 * [1e-6], rel=1e-2)


@pytest.mark.parametrize("conditions", [None, Conditions(), RANDOM_DEGRADATIONS])
def test_a_card_gives_back_its_losses(conditions):
    losses = replace(LOSSES, conditions=conditions, stability_every=8)
    card = json.loads(json.dumps({"loss": asdict(losses)}, allow_nan=False))
    read = LossSettings.read(card)
    assert read == losses
    if conditions:
        draws = [given.draw(24, torch.Generator().manual_seed(3)) for given in
                 (read.conditions, conditions)]
        assert draws[0][1] == draws[1][1] and type(draws[0][0]) is type(draws[1][0])


def test_conditions_are_drawn_from_the_whole_of_their_ranges():
    conditions = Conditions((3, 13), (0.6, 5.0), (0.002, 0.05))
    drawn = [conditions.draw(16, torch.Generator().manual_seed(k)) for k in range(200)]
    assert {len(A.K_h[8].nonzero()) for A, _ in drawn} == {3, 5, 7, 9, 11, 13}
    noises = torch.tensor([noise for _, noise in drawn])
    assert 0.002 <= noises.min() < 0.0025 and 0.04 < noises.max() <= 0.05
    assert 0.4 < (noises < 0.01).float().mean() < 0.6  # sqrt(0.002 * 0.05): the middle of the axis


def test_every_drawn_condition_is_met_with_its_own_operator_and_weight(images, monkeypatch):
    """The step over conditions is the plain step under the condition that was drawn."""
    A, noise, x = Blur(16, 7, 1.0), 0.02, images[:8, :, :16, :16].float() / 255
    monkeypatch.setattr(Conditions, "draw", lambda self, size, generator: (A, noise))
    model, _ = make()
    wide = EquilibriumLoss(model, replace(LOSSES, conditions=Conditions(), noise_power=1.5,
                                          penalty=0.0))
    plain = EquilibriumLoss(model.on(A, (noise / LOSSES.noise_std) ** 1.5),
                            replace(LOSSES, noise_std=noise, penalty=0.0))
    value, figures = wide(x, (0, 1))
    errors, expected = plain(x, (0, 1))
    torch.testing.assert_close(figures["mse"], expected["mse"], rtol=0, atol=0)
    weights = list(model.parameters())
    got = torch.autograd.grad(value.sum(), weights)
    wanted = torch.autograd.grad(errors.mean().log() * len(x) * losses.TYPICAL, weights)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_per_image_weighs_the_last_small_batch_rightly(images):
    # 10 images in batches of 4, 4 and 2: a loss that returns the batch size averages to 3.6.
    model, _ = make()

    def size_as_loss(x, keys):
        return (model.T.log_tau * 0 + len(x)).expand(len(x)), {}

    assert train(model, size_as_loss, images, TrainingConfig(1, 4, 16, 1e-3, 0), CPU
                 )[0]["loss"] == pytest.approx(3.6)


def test_penalty_lowers_the_growth():
    """A linear denoiser with factor 1.2 is pushed below the tolerated 0.5."""

    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(-0.2))

        def forward(self, x, sigma):
            return self.gain * x  # D(x) = (1 - gain) x

    model = Equilibrium(PreconditionedMap(Blur(16, 5, 2.0), Denoiser(Gain(), 0.0), 5.0))
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    loss = EquilibriumLoss(model, LossSettings(0.01, 1e-3, 5, 2, max_growth=0.5, penalty=100.0))
    config = TrainingConfig(60, 8, 16, 0.05, 0, 1.0)
    history = train(model, loss, images, config, CPU, log=lambda _: None)
    assert history[0]["growth"] > 1
    assert history[-1]["growth"] < 0.6


def test_a_loss_that_is_not_finite_stops_with_its_place(images):
    model, _ = make()
    with pytest.raises(UserError, match="crop=48 does not fit"):
        train(model, None, images, TrainingConfig(1, 4, 48, 1e-3, 0), CPU)
    with pytest.raises(UserError, match=r"loss is nan at epoch 1, step 0, images \["):
        train(model, lambda x, keys: (model.T.log_tau * x.new_full((len(x),), math.nan),
                                               {}), images, CONFIG, CPU)


def test_solves_that_do_not_converge_warn_and_then_stop(images):
    model, _ = make()

    def converging(share):
        def loss(x, keys):
            one = torch.ones(len(x))
            return model.T.log_tau.square() * one, {"converged": share * one,
                                                    "residual": 0.1 * one}
        return loss

    lines = []
    config = TrainingConfig(1, 4, 16, 1e-3, 0, unconverged_limit=0.5)
    train(model, converging(0.9), images, config, CPU, log=lines.append)
    assert len(lines) == 1
    train(model, converging(0.6), images, config, CPU, log=lines.append)
    assert lines[-1].startswith("warning: 40% of the solves up to epoch 1 did not converge")
    with pytest.raises(UserError, match="80% of the solves up to epoch 1, step 2 did not converge"):
        train(model, converging(0.2), images, config, CPU)


def test_training_lowers_the_loss_and_reports_the_solves(images):
    model, loss = make()
    history = train(model, loss, images, TrainingConfig(20, 4, 16, 3e-3, 0, 1.0), CPU)
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"epoch", "loss", "mse", "iterations", "residual", "converged", "growth",
            "gradient", "seconds", "steps", "applications"} == set(history[0])
    assert model.T.log_tau.item() != pytest.approx(math.log(0.1), abs=1e-4)  # tau is trained too


def test_growth_estimate_finds_the_slowest_mode():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    J = Q @ torch.diag(torch.linspace(0.1, 0.8, 20, dtype=torch.float64)) @ Q.T
    T = lambda x: x @ J + 1  # noqa: E731
    x = torch.zeros(3, 20, dtype=torch.float64)
    for _ in range(10):
        x = T(x)
    estimate, direction = growth_estimate(T, x, power_iterations=60)
    torch.testing.assert_close(estimate, torch.full((3,), 0.8, dtype=torch.float64),
                               rtol=1e-2, atol=0)
    x = torch.randn(3, 20, dtype=torch.float64)  # the direction, not the residual, is gone on from
    again, _ = growth_estimate(T, x, 0, direction)
    torch.testing.assert_close(again, estimate, rtol=1e-3, atol=0)


@pytest.mark.parametrize("damage", [
    lambda b: b[:100], lambda b: b"", lambda b: b[:-50],
    lambda b: b[:-1] + bytes([b[-1] ^ 1])])  # in the last weight: still a readable file
def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(images, tmp_path,
                                                                          damage):
    model, loss = make("denoiser")
    whole = train(model, loss, images, CONFIG, CPU, tmp_path)
    wanted = weights_of(model)
    file = next(f for f in tmp_path.iterdir() if f != previous(f) and "previous" not in f.name)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        load_checkpoint(file, model, torch.optim.Adam(model.parameters()))
    model, loss = make("denoiser")
    lines = []
    history = train(model, loss, images, CONFIG, CPU, tmp_path, log=lines.append)
    assert file.name in lines[0] and lines[1] == "resumed after epoch 2 of 3"
    assert [r["loss"] for r in history] == [r["loss"] for r in whole]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), wanted, strict=True))


def test_two_damaged_checkpoints_are_an_error_and_none_is_a_start(images, tmp_path):
    model, loss = make("denoiser")
    optimizer = torch.optim.Adam(model.parameters())
    assert resume(tmp_path / "none.safetensors", model, optimizer, print) == []
    train(model, loss, images, CONFIG, CPU, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    model, loss = make("denoiser")
    with pytest.raises(UserError, match="no other one"):
        train(model, loss, images, CONFIG, CPU, tmp_path, log=lambda _: None)


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(images, tmp_path, monkeypatch):
    model, loss = make("denoiser")
    train(model, loss, images, CONFIG, CPU, tmp_path)
    before = sorted(tmp_path.iterdir())

    def refuse(*_args):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoints, "safe_open", refuse)
    model, loss = make("denoiser")
    with pytest.raises(OSError, match=r"cannot read the checkpoint .*safetensors \(no\)"):
        train(model, loss, images, CONFIG, CPU, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("profile", ["quick", "cpu", "paper", "best", "best-gpu"])
@pytest.mark.parametrize("name", ["denoiser", "jfb"])
def test_the_command_trains_what_the_notebooks_train(profile, name, monkeypatch, tmp_path):
    """The same images, network, config and losses, from the same parameters."""
    seen, asked = {}, []
    problem = SimpleNamespace(setup=get_protocol("paper"), A=None, x=[0], d=None)
    for part, returned in (
            ("tune", {}), ("validation_problem", problem),
            ("load_splits", SimpleNamespace(train=[], source="")),
            ("load_denoiser", SimpleNamespace(network=torch.nn.Identity()))):
        monkeypatch.setattr(command, part, lambda *a, part=part, returned=returned, **k:
                            (asked.append((part, a)), returned)[1])
    monkeypatch.setattr(command, "train_denoiser", lambda network, splits, config, *rest:
                        seen.update(network=network, config=config))
    monkeypatch.setattr(command, "train_method", lambda method, config, losses, **rest:
                        seen.update(config=config, losses=losses))
    p = command.network_parameters(profile, {"device": "cpu", "data": "bundled"})
    command.train_network(name, p, tmp_path, tmp_path, "", log=lambda line: None)
    assert dict(asked)["load_splits"][-1] is p["random_degradations"]

    path = notebooks()[2 if name == "denoiser" else 3]
    wanted = {**p, "protocol": get_protocol(p["protocol"]), "device": CPU}

    def needed(node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            return getattr(node.targets[0], "id", "") in (
                "config", "untrained" if name == "denoiser" else "losses")
        if isinstance(node, ast.If):
            return getattr(node.test, "id", "") == "random_degradations"
        return isinstance(node, ast.ImportFrom) and node.module.startswith("jfbnb")

    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            nodes = [node for node in ast.parse(cell.source).body if needed(node)]
            exec(compile(ast.Module(nodes, []), path.stem, "exec"), wanted)
    assert seen["config"] == wanted["config"]
    if name == "denoiser":
        assert repr(seen["network"]) == repr(wanted["untrained"])
    else:
        assert seen["losses"] == wanted["losses"]
        assert (seen["losses"].conditions == RANDOM_DEGRADATIONS) is profile.startswith("best")


def test_the_command_trains_a_unet_over_random_degradations(image_folder, tmp_path, monkeypatch):
    """From the denoiser on, on faces and photographs, by the parameters of the profile `best`."""
    photographs = bundled_photos("beside", 128)[::60]
    monkeypatch.setattr("jfbnb.data.bundled_photos", lambda *_: photographs)
    words = ["--profile", "best", "--data", image_folder, "--out", tmp_path]
    for setting in ("n_train=5", "n_validation=1", "n_test=1", "search_images=1", "candidates=1",
                    "depth=2", "width=4", "pretrain_epochs=1", "pretrain_crop=24", "budget=500",
                    "crop=24", "max_iterations=6", "unconverged_limit=1.0"):
        words += ["-p", setting]
    assert main([str(word) for word in ("train", "denoiser", *words)]) == 0
    assert isinstance(load_denoiser(tmp_path / "denoiser.safetensors").network, UNet)
    assert main([str(word) for word in ("train", "jfb", *words, "--from", tmp_path)]) == 0
    card = json.loads((tmp_path / "jfb.json").read_text(), parse_constant=pytest.fail)
    assert card["training images"] == 4 + OFTEN * len(photographs) and "scikit-image" in card[
        "training data"]
    assert card["loss"]["conditions"]["motion_share"] == RANDOM_DEGRADATIONS.motion_share
    assert card["training"]["muon"] and card["loss"]["batch_reuse"] == 8
    assert {n["class"] for n in card["networks"]} == {"UNet"}


def test_images_that_converge_leave_the_batch(images):
    """The network sees each as often as its solve took, and once to be differentiated."""
    x = images[:8, :, :16, :16].float() / 255  # with less and less of their mean to restore
    x = x - torch.linspace(0, 1, 8).view(8, 1, 1, 1) * x.mean(dim=(1, 2, 3), keepdim=True)
    torch.manual_seed(0)
    network = Contractive(3, 6)
    torch.nn.init.normal_(network.layers[-1].weight, std=0.02)
    model = Equilibrium(make_map(SplittingMap, Blur(16, 5, 2.0), Denoiser(network, 0.03), 0.1))
    loss = EquilibriumLoss(model, replace(LOSSES, max_iterations=30, penalty=0.0))
    with metered(model) as meter:
        _, figures = loss(x, (0,))
    assert meter.applications == figures["iterations"].sum() + 8
    assert figures["iterations"].min() < figures["iterations"].max()


def key(loss, images, module=None) -> str:
    return digest(train, module or loss.model, loss, images, CONFIG)


def test_the_key_of_a_training_changes_with_all_that_it_depends_on(images):
    model, loss = make()
    keys = [key(loss, images), key(loss, images[1:]),
            key(replace(loss, settings=replace(LOSSES, noise_std=0.02)), images),
            digest(train, model, loss, images, replace(CONFIG, epochs=4))]
    with torch.no_grad():
        model.T.D.network.layers[0].bias += 1
    keys.append(key(loss, images))
    with torch.no_grad():
        model.T.D.sigma += 0.01
    keys.append(key(loss, images))
    model.T.A.K_h[0, 0] += 0.01  # a buffer that no state_dict has
    keys.append(key(loss, images))
    assert len(set(keys)) == len(keys)
    assert key(loss, images) == keys[-1]


def test_the_key_changes_with_what_a_model_and_a_loss_are_made_of(images):
    model, loss = make()
    T, A, D = model.T, model.T.A, model.T.D
    keys = [key(ExplicitLoss(m, LOSSES), images) for m in (
        Unrolled(T, 3), Unrolled(T, 4), Unrolled(T.on(A, 2.0), 3), Feedforward(A, D),
        Feedforward(A, D, 0.01), Feedforward(A, D, 0.02))]
    keys += [key(EquilibriumLoss(m, LOSSES), images) for m in (
        model, Equilibrium(SplittingMap(A, D, 0.1)))]

    def weighted(weight):
        return lambda x, keys: (loss(x, keys)[0] * weight, {})

    many = torch.zeros(2000)
    keys += [key(given, images, model) for given in (
        replace(loss, gradient=partial(neumann, terms=2)), weighted(1.0), weighted(2.0),
        weighted(many), weighted(many.index_fill(0, torch.tensor([1000]), 1.0)),
        weighted({"b": 1}), weighted({"b": 2}))]
    assert len(set(keys)) == len(keys)
    assert key(weighted(1.0), images, model) in keys


OUTSIDE = """
import torch

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, sigma):
        return {factor} * self.weight * x

class Loss:
    def __init__(self, loss):
        self.loss = loss

    def __call__(self, x, keys):
        return self.loss(x, keys)
"""


@pytest.mark.parametrize("name", ["Network", "Loss"])
def test_the_key_changes_with_the_source_of_a_class_of_others(images, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / f"outside_{name.lower()}.py"
    model, loss = make()
    keys = []
    for factor in ("0.1", "0.25", "0.1"):
        file.write_text(OUTSIDE.format(factor=factor))
        importlib.invalidate_caches()
        module = importlib.import_module(file.stem)
        module = importlib.reload(module)
        if name == "Network":
            model = Equilibrium(PreconditionedMap(Blur(16, 5, 2.0), Denoiser(module.Network(), 0.0),
                                                  0.1))
            keys.append(key(EquilibriumLoss(model, LOSSES), images))
        else:
            keys.append(key(module.Loss(loss), images, model))
    assert keys[0] != keys[1] and keys[0] == keys[2]


def test_the_key_is_the_same_in_every_process(tmp_path):
    """Also for a loss that is an object, or closes over some, whose address would be another."""
    (tmp_path / "outside.py").write_text(OUTSIDE.format(factor="0.1"))
    program = """
import outside
from test_training import *

torch.manual_seed(0)
images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
chosen = {"tau": 0.1, "sigma": 0.1, "lam": 0.1, "eta": 1.0, "iterations": 3}

def noting(loss, names):
    return lambda *words: (names, loss(*words))[1]

for method in METHODS.values():
    if method.trainable:
        model = method.build(None, DnCNN(2, 4), chosen)
        loss = method.loss(model, LOSSES)
        for given in (loss, outside.Loss(loss), noting(loss, {"b", "a", "c"})):
            print(key(given, images, model))
terms = 3
print(key(EquilibriumLoss(model, LOSSES, lambda T, x: neumann(T, x, terms)), images))
"""
    (tmp_path / "program.py").write_text(program)
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))
    found = [subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}).stdout.splitlines()
        for seed in ("1", "2")]
    assert found[0] == found[1]
    assert len(set(found[0])) == 3 * sum(m.trainable for m in METHODS.values()) + 1
