"""Kernels estimated from photographs that SciPy blurred, or a moving camera."""

import io

import numpy as np
import pytest
import scenes
import skimage.data
import torch
from PIL import Image
from scipy import ndimage

import jfbnb
from jfbnb.photo import blind
from jfbnb.run.command import main

SHARP = skimage.data.astronaut()[:300, 60:360] / 255
CORNER = (np.pad(scenes.motion(9, 0), ((4, 4), (0, 0)))
          + np.pad(scenes.motion(9, 90), ((0, 0), (4, 4)))) / 2


def picture(d: np.ndarray = SHARP, quality: int | None = None) -> np.ndarray:
    d, file = scenes.noisy(d, 0.005), io.BytesIO()
    Image.fromarray(d).save(file, "jpeg" if quality else "png", quality=quality)
    return np.asarray(Image.open(file))


def test_a_gaussian_is_found():
    d = picture(ndimage.gaussian_filter(SHARP, (2, 2, 0)))
    family, std = blind.estimate(torch.from_numpy(d / 255).permute(2, 0, 1)).split(":")
    assert family == "gaussian" and float(std) == pytest.approx(2, rel=0.1)


def test_the_command_finds_a_lens_out_of_focus_and_says_so(capsys, tmp_path):
    Image.fromarray(picture(scenes.blurred(SHARP, scenes.disk(4)))).save(tmp_path / "photo.png")
    assert main(["deblur", str(tmp_path / "photo.png"), "--kernel", "auto", "--method", "tikhonov",
                 "--out", str(tmp_path)]) == 0
    note = capsys.readouterr().err.splitlines()[0]
    assert note.startswith(f"note: {tmp_path / 'photo.png'}: kernel estimated: disk:")
    assert float(note.split("disk:")[1]) == pytest.approx(4, rel=0.1)
    assert (tmp_path / "photo-tikhonov.png").is_file()


def test_deblur_finds_a_motion_in_a_jpeg():
    d = picture(scenes.blurred(SHARP, scenes.motion(11, 150)), quality=90)
    family, numbers = jfbnb.deblur(d, "auto", method="tikhonov").kernel.split(":")
    length, angle = (float(number) for number in numbers.split(","))
    assert family == "motion" and length == pytest.approx(11, rel=0.1) and abs(angle - 150) <= 4
    assert jfbnb.deblur(d[:64], f"{family}:{numbers}", method="tikhonov").kernel is None


@pytest.mark.parametrize(("d", "why"), [
    (picture(), "looks sharp"), (picture()[:100], "too small"),
    (picture(np.full_like(SHARP, 0.5)), "too smooth"),
    (picture(scenes.blurred(SHARP, CORNER)), "no Gaussian, disk or straight motion")],
    ids=["sharp", "small", "smooth", "corner"])
def test_without_evidence_the_command_says_what_to_do(capsys, monkeypatch, tmp_path, d, why):
    monkeypatch.setattr(blind, "FAMILIES", blind.FAMILIES[:2])  # to save time
    Image.fromarray(d).save(tmp_path / "photo.png")
    assert main(["deblur", str(tmp_path / "photo.png"), "--kernel", "auto",
                 "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert why in line and line.endswith("give --kernel") and not (tmp_path / "out").exists()


def test_a_clock_photographed_by_a_camera_that_moved_sideways():
    """Its kernel is known only from this description."""
    family, numbers = blind.estimate(torch.from_numpy(skimage.data.clock() / 255)[None]).split(":")
    length, angle = (float(number) for number in numbers.split(","))
    assert family == "motion" and length > 15 and abs((angle + 90) % 180 - 90) <= 5
