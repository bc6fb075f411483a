"""Kernels estimated from photographs that SciPy blurred, and one that a moving camera took."""

import io

import numpy as np
import pytest
import scenes
import scipy.signal
import skimage.data
import torch
from PIL import Image

import jfbnb
from jfbnb.photo import blind, kernel_option, shake
from jfbnb.run.command import main

SHARP = skimage.data.astronaut()[:300, 60:360] / 255
ROCKET = scenes.middle(skimage.data.rocket() / 255, 256)  # its strongest lines are upright
BOX = torch.ones(7, 7) / 49  # of no family
FEW = (*blind.FAMILIES[:2], blind.Family("motion", jfbnb.motion, 8, 31, 1.4, 30))  # to save time


def picture(d: np.ndarray = SHARP, form: str = "png") -> np.ndarray:
    Image.fromarray(scenes.noisy(d, 0.005)).save(file := io.BytesIO(), form, quality=90)
    return np.asarray(Image.open(file))


def numbers(option: str, family: str) -> list[float]:
    return [float(number) for number in option.removeprefix(f"{family}:").split(",")]


def test_a_gaussian_is_found_without_doubt(monkeypatch):
    monkeypatch.setattr(blind, "FAMILIES", FEW)
    d = torch.from_numpy(picture(scenes.blurred(SHARP, scenes.gaussian(17, 2))) / 255)
    found, rival = blind.estimate(d.permute(2, 0, 1), jfbnb.load("tikhonov"))
    assert numbers(found, "gaussian") == pytest.approx([2], rel=0.1) and rival is None


def test_the_command_finds_a_disk_and_names_the_gaussian_it_can_hardly_exclude(
        capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(blind, "FAMILIES", FEW)
    d = scenes.noisy(scenes.blurred(SHARP, scenes.disk(3)), 0.03)
    Image.fromarray(d).save(file := tmp_path / "photo.png")
    assert main(["deblur", str(file), "--kernel", "auto", "--method", "tikhonov",
                 "--out", str(tmp_path)]) == 0
    note, *_, warning = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {file}: kernel estimated: disk:")
    assert numbers(note.split(": ")[-1], "disk") == pytest.approx([3], rel=0.1)
    assert warning.startswith(f"warning: {file}: another kernel explains the blur nearly as well")
    assert "try --kernel gaussian:" in warning and (tmp_path / "photo-tikhonov.png").is_file()


def test_deblur_finds_a_motion_in_a_jpeg():
    d = picture(scenes.blurred(SHARP, scenes.motion(11, 150)), "jpeg")
    length, angle = numbers(jfbnb.deblur(d, "auto", method="tikhonov").kernel, "motion")
    assert length == pytest.approx(11, rel=0.1) and abs(angle - 150) <= 4


def test_the_command_draws_the_shake_that_it_finds(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(blind, "FAMILIES", FEW)
    true = scenes.shake(13, 1)
    Image.fromarray(picture(scenes.blurred(SHARP, true))).save(file := tmp_path / "photo.png")
    options = ["deblur", str(file), "--method", "tikhonov", "--out", str(tmp_path), "--kernel"]
    assert main([*options, "auto"]) == 0
    (note, *_), drawn = capsys.readouterr().err.splitlines(), tmp_path / "photo-kernel.png"
    assert "kernel estimated: a shake of " in note and note.endswith(f"drawn in {drawn}")
    found = kernel_option.read(drawn).numpy()
    at = scipy.signal.correlate2d(found, true) / np.linalg.norm(found) / np.linalg.norm(true)
    assert at.max() > 0.9
    first = (tmp_path / "photo-tikhonov.png").read_bytes()
    assert main([*options, str(drawn)]) == 0 and "note" not in capsys.readouterr().err
    again = np.asarray(Image.open(tmp_path / "photo-tikhonov.png")).astype(int)
    assert abs(again - np.asarray(Image.open(io.BytesIO(first)))).max() <= 1


@pytest.mark.parametrize(("kernel", "agreement"), [(torch.ones(1, 1), 1), (BOX, 0.5)])
def test_a_shake_is_refused_if_spectrum_or_halves_contradict_it(monkeypatch, kernel, agreement):
    monkeypatch.setattr(blind, "FAMILIES", FEW)
    d = torch.from_numpy(picture(scenes.blurred(SHARP, BOX.numpy())) / 255).permute(2, 0, 1)
    monkeypatch.setattr(shake, "estimate", lambda *_: (BOX, 1))
    assert blind.estimate(d, None) == (BOX, None)
    monkeypatch.setattr(shake, "estimate", lambda *_: (kernel, agreement))
    with pytest.raises(jfbnb.UserError, match="straight motion or shake of up to 30 pixels"):
        blind.estimate(d, None)


@pytest.mark.parametrize(("d", "why"), [
    (picture(), "looks sharp"), (picture()[:100], "too small"),
    (picture(np.full_like(SHARP, 0.5)), "too smooth"),
    (scenes.noisy(scenes.blurred(ROCKET, scenes.disk(3)), 0.01), "lines of the scene pass"),
    (skimage.data.clock(), "parts of the picture")])  # shorter motions in its left half
def test_without_evidence_the_command_says_what_to_do(capsys, monkeypatch, tmp_path, d, why):
    monkeypatch.setattr(blind, "FAMILIES", FEW)
    Image.fromarray(d).save(tmp_path / "photo.png")
    assert main(["deblur", str(tmp_path / "photo.png"), "--kernel", "auto",
                 "--method", "tikhonov", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and line.endswith("give the kernel") and not (tmp_path / "out").exists()
