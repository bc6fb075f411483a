import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from jfbnb import checkpoints
from jfbnb.checkpoints import load_checkpoint, previous, resume
from jfbnb.common import UserError
from jfbnb.datasets import bundled_photos
from jfbnb.maps import PreconditionedMap, SplittingMap
from jfbnb.networks import DnCNN, Regulariser, load_regulariser, save_regulariser
from jfbnb.operators import Blur
from jfbnb.training import (
    DenoiserLoss,
    EquilibriumLoss,
    TrainingConfig,
    contraction_estimate,
    train,
)

CPU = torch.device("cpu")
# Networks this small and young rarely converge in the few iterations given here.
CONFIG = TrainingConfig(3, batch_size=4, crop=16, learning_rate=1e-3, seed=0, unconverged_limit=1.0)


@pytest.fixture
def images() -> torch.Tensor:
    return bundled_photos("test", 24).images[:400:40].clone()


def make(loss: str = "jfb"):
    torch.manual_seed(0)
    S = Regulariser(DnCNN(3, 6), 0.1, 0.03)
    if loss == "denoiser":
        return S, DenoiserLoss(S, 0.1)
    T = PreconditionedMap(Blur(16, 5, 2.0), S)
    return S, EquilibriumLoss(T, 0.01, 1e-3, 8, 1, 0.9, 0.1)


def weights_of(S) -> list[torch.Tensor]:
    return [value.clone() for value in S.state_dict().values()]


@pytest.mark.parametrize("kind", ["denoiser", "jfb"])
def test_resumed_training_equals_uninterrupted_bit_for_bit(kind, images, tmp_path):
    S, loss = make(kind)
    whole = train(S, loss, images, CONFIG, CPU, tmp_path / "whole")
    uninterrupted = weights_of(S)

    class Killed(Exception):
        pass

    def die_in_epoch_2(line: str) -> None:
        if line.startswith("epoch 2"):
            raise Killed

    S, loss = make(kind)
    with pytest.raises(Killed):
        train(S, loss, images, CONFIG, CPU, tmp_path / "cut", log=die_in_epoch_2)
    S, loss = make(kind)
    lines = []
    resumed = train(S, loss, images, CONFIG, CPU, tmp_path / "cut", log=lines.append)
    assert lines[0] == "resumed after epoch 2 of 3"
    assert all(torch.equal(a, b) for a, b in zip(weights_of(S), uninterrupted, strict=True))
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]


def test_threads_change_rounding_alone():
    """The same weights bit for bit with as many threads. With another number of them, which sum
    in another order, losses within 1e-4 and weights within 1e-3 of their norm.
    """
    photos = bundled_photos("test", 48).images[:16]

    def trained(threads: int) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)
        S = Regulariser(DnCNN(3, 16), 0.1, 0.03)
        loss = EquilibriumLoss(SplittingMap(Blur(48, 5, 2.0), S), 0.01, 1e-3, 8, 1, 0.9, 0.1)
        torch.set_num_threads(threads)
        try:
            history = train(S, loss, photos, TrainingConfig(2, 8, 48, 1e-3, 0, 1.0), CPU)
        finally:
            torch.set_num_threads(1)
        return torch.cat([w.flatten() for w in weights_of(S)]), [r["loss"] for r in history]

    (one, losses), (two, losses_two), (again, _) = trained(1), trained(2), trained(2)
    assert torch.equal(two, again)
    assert (two - one).norm() < 1e-3 * one.norm()
    assert losses_two == pytest.approx(losses, rel=1e-4)


def test_other_settings_do_not_take_up_a_checkpoint(images, tmp_path):
    S, loss = make()
    train(S, loss, images, CONFIG, CPU, tmp_path)
    S, _ = make()
    other = EquilibriumLoss(PreconditionedMap(Blur(16, 5, 2.0), S), 0.01, 1e-3, 9, 1, 0.9, 0.1)
    lines = []
    train(S, other, images, CONFIG, CPU, tmp_path, log=lines.append)
    assert not any("resumed" in line for line in lines)
    assert len([f for f in tmp_path.iterdir() if "previous" not in f.name]) == 2


def test_training_lowers_the_loss_and_reports_the_solves(images):
    S, loss = make()
    history = train(S, loss, images, TrainingConfig(20, 4, 16, 3e-3, 0, 1.0), CPU)
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"epoch", "loss", "mse", "iterations", "residual", "converged", "contraction",
            "seconds"} == set(history[0])
    assert S.log_tau.item() != pytest.approx(math.log(0.1), abs=1e-4)  # tau is trained too


def test_loss_per_image_weighs_the_last_small_batch_rightly(images):
    # 10 images in batches of 4, 4 and 2: a loss that returns the batch size averages to 3.6.
    S, _ = make()

    def size_as_loss(x, keys):
        return S.log_tau * 0 + len(x), {}

    assert train(S, size_as_loss, images, TrainingConfig(1, 4, 16, 1e-3, 0), CPU
                 )[0]["loss"] == pytest.approx(3.6)


def test_contraction_estimate_finds_the_slowest_mode():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    J = Q @ torch.diag(torch.linspace(0.1, 0.8, 20, dtype=torch.float64)) @ Q.T
    T = lambda x: x @ J + 1  # noqa: E731
    x = torch.zeros(3, 20, dtype=torch.float64)
    for _ in range(10):
        x = T(x)
    estimate = contraction_estimate(T, x, T(x), power_iterations=60)
    torch.testing.assert_close(estimate, torch.full((3,), 0.8, dtype=torch.float64),
                               rtol=1e-2, atol=0)


def test_penalty_lowers_the_contraction():
    """A linear denoiser with factor 1.2 is pushed below the tolerated 0.5."""

    class Gain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(-0.2))

        def forward(self, x, sigma):
            return self.gain * x  # D(x) = (1 - gain) x

    S = Regulariser(Gain(), 5.0, 0.0)
    T = PreconditionedMap(Blur(16, 5, 2.0), S)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    loss = EquilibriumLoss(T, 0.01, 1e-3, 5, 2, contraction=0.5, penalty=100.0)
    config = TrainingConfig(60, 8, 16, 0.05, 0, 1.0)
    history = train(S, loss, images, config, CPU, log=lambda _: None)
    assert history[0]["contraction"] > 1
    assert history[-1]["contraction"] < 0.6


def test_a_loss_that_is_not_finite_stops_with_its_place(images):
    S, _ = make()
    with pytest.raises(UserError, match=r"loss is nan at epoch 1, step 0, images \["):
        train(S, lambda x, keys: (S.log_tau * float("nan"), {}), images, CONFIG, CPU)


def test_nan_after_a_checkpoint_names_it(images, tmp_path):
    S, loss = make()

    def fails_in_epoch_2(x, keys):
        value, figures = loss(x, keys)
        return (value * float("nan") if keys[1:3] == (2, 1) else value), figures

    with pytest.raises(UserError, match=r"epoch 2, step 1, .*good checkpoint is .*\.safetensors"):
        train(S, fails_in_epoch_2, images, CONFIG, CPU, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_solves_that_do_not_converge_warn_and_then_stop(images):
    S, _ = make()

    def converging(share):
        return lambda x, keys: (S.log_tau.square(), {"converged": share, "residual": 0.1})

    lines = []
    config = TrainingConfig(1, 4, 16, 1e-3, 0, unconverged_limit=0.5)
    train(S, converging(0.9), images, config, CPU, log=lines.append)
    assert len(lines) == 1
    train(S, converging(0.6), images, config, CPU, log=lines.append)
    assert lines[-1].startswith("warning: 40% of the solves of epoch 1 did not converge")
    with pytest.raises(UserError, match="80% of the solves up to epoch 1, step 2 did not converge"):
        train(S, converging(0.2), images, config, CPU)


def test_crop_larger_than_the_images(images):
    S, loss = make()
    with pytest.raises(UserError, match="crop=48 does not fit"):
        train(S, loss, images, TrainingConfig(1, 4, 48, 1e-3, 0), CPU)


def flip_a_bit(content: bytes) -> bytes:
    """In the last weight: still a readable file, but for its hash."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b[:-50],
                                    flip_a_bit])
def test_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(images, tmp_path,
                                                                          damage):
    S, loss = make("denoiser")
    whole = train(S, loss, images, CONFIG, CPU, tmp_path)
    wanted = weights_of(S)
    file = next(f for f in tmp_path.iterdir() if f != previous(f) and "previous" not in f.name)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{file.name} is damaged"):
        load_checkpoint(file, S, torch.optim.Adam(S.parameters()))
    S, loss = make("denoiser")
    lines = []
    history = train(S, loss, images, CONFIG, CPU, tmp_path, log=lines.append)
    assert file.name in lines[0] and lines[1] == "resumed after epoch 2 of 3"
    assert [r["loss"] for r in history] == [r["loss"] for r in whole]
    assert all(torch.equal(a, b) for a, b in zip(weights_of(S), wanted, strict=True))


def test_two_damaged_checkpoints_are_an_error_and_none_is_a_start(images, tmp_path):
    S, loss = make("denoiser")
    optimizer = torch.optim.Adam(S.parameters())
    assert resume(tmp_path / "none.safetensors", S, optimizer, print) == []
    train(S, loss, images, CONFIG, CPU, tmp_path)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    S, loss = make("denoiser")
    with pytest.raises(UserError, match="no other one"):
        train(S, loss, images, CONFIG, CPU, tmp_path, log=lambda _: None)


@pytest.mark.parametrize(("name", "shape"), [
    ("module.log_tau", (2,)), ("adam.0.exp_avg", (10**6,)), ("adam.99.step", ()), ("other", (1,))])
def test_a_checkpoint_of_other_shapes_is_refused(tmp_path, name, shape):
    """Though its hash is right: whoever forged the tensors can forge that too."""
    S, _ = make("denoiser")
    optimizer = torch.optim.Adam(S.parameters())
    sum(p.square().sum() for p in S.parameters()).backward()
    optimizer.step()
    file = tmp_path / "k.safetensors"
    checkpoints.save_checkpoint(file, S, optimizer, [{"epoch": 1}])
    tensors = load_file(file) | {name: torch.zeros(shape)}
    save_file(tensors, file, metadata={"history": "[]",
                                       "sha256": checkpoints._digest(tensors, "[]")})
    with pytest.raises(UserError, match="not those of this training"):
        load_checkpoint(file, S, optimizer)


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(images, tmp_path, monkeypatch):
    S, loss = make("denoiser")
    train(S, loss, images, CONFIG, CPU, tmp_path)
    before = sorted(tmp_path.iterdir())

    def refuse(*_args):
        raise PermissionError("no")

    monkeypatch.setattr(checkpoints, "safe_open", refuse)
    S, loss = make("denoiser")
    with pytest.raises(OSError, match=r"cannot read the checkpoint .*safetensors \(no\)"):
        train(S, loss, images, CONFIG, CPU, tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_full_disk_leaves_the_last_checkpoint(images, tmp_path, monkeypatch):
    S, loss = make("denoiser")
    train(S, loss, images, TrainingConfig(1, 4, 16, 1e-3, 0), CPU, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    before = file.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jfbnb.common.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save_checkpoint(file, S, torch.optim.Adam(S.parameters()), [])
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_weights_round_trip(tmp_path):
    S, _ = make()
    save_regulariser(tmp_path / "s.safetensors", S, {"protocol": "paper"})
    loaded = load_regulariser(tmp_path / "s.safetensors")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded(x), S(x))
    assert '"protocol": "paper"' in (tmp_path / "s.json").read_text()


def test_a_finished_training_is_taken_and_another_one_refused(images, tmp_path):
    S, loss = make()
    history = train(S, loss, images, CONFIG, CPU)
    file = tmp_path / "jfb.safetensors"
    save_regulariser(file, S, {"training": asdict(CONFIG), "history": history})
    fresh, loss = make()
    assert train(fresh, loss, images, CONFIG, CPU, finished=file) == history
    assert all(torch.equal(a, b) for a, b in zip(weights_of(fresh), weights_of(S), strict=True))
    longer = replace(CONFIG, epochs=4)
    with pytest.raises(UserError, match=r"was trained with .* leave the parameter `weights` empty"):
        train(fresh, loss, images, longer, CPU, finished=file)
    save_regulariser(file, S, {"training": asdict(CONFIG)})
    with pytest.raises(UserError, match="do not hold this training"):
        train(fresh, loss, images, CONFIG, CPU, finished=file)


def test_bfloat16_changes_the_gradient_little_and_leaves_float32_behind(images):
    x = images.float()[:, :, :16, :16] / 255
    gradients = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        S = Regulariser(DnCNN(3, 6), 0.1, 0.03, DnCNN(3, 6))
        for network in (S.network, S.head):
            torch.nn.init.normal_(network.layers[-1].weight, std=0.05)
        T = SplittingMap(Blur(16, 5, 2.0), S)
        value, _ = EquilibriumLoss(T, 0.01, 3e-3, 12, 4, 0.5, 0.1, bf16=bf16)(x, (0,))
        value.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in S.parameters()]))
        assert not S.network.bf16 and not S.head.bf16
    assert not torch.equal(*gradients)  # the option is not without effect
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95
