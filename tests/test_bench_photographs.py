"""The benchmark on photographs: its data against the package's operators, its tables, tiny."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import photographs as bench
import scenes

from jfbnb.core import kernels
from jfbnb.core.models import Model
from jfbnb.core.operators import MRI, Convolution, Downsampling, Inpainting


@pytest.fixture
def place(tmp_path):
    return Namespace(scratch=tmp_path, side=48, photographs=["coffee"])


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [scenes.MOTION.kernel, scenes.motion(5, 70),
                                    np.array([[0.0, 0.1, 0.2], [0.1, 0.1, 0.5]])])
def test_a_picture_is_cut_from_a_blurred_scene_in_eight_bits(tmp_path, kernel):
    file, d, x = scenes.Case("", kernel, noise_std=0.0).take("coffee", 48, tmp_path)
    scene = scenes.middle(scenes.photograph("coffee"), 48 + 2 * 12)
    A = Convolution(scene.shape[:2], kernel)
    Ax = A(torch.from_numpy(scene).movedim(2, 0)[None])[0].movedim(0, 2).numpy()
    top, left = (12 - (n - 1) // 2 for n in kernel.shape)
    seen = Ax[top:top + 48, left:left + 48]
    assert np.abs(d - seen).max() <= 0.5001 / 255
    assert np.array_equal(x, scene[12:-12, 12:-12])
    assert np.array_equal(np.asarray(Image.open(file)), np.rint(255 * d))


def test_kernels_are_what_they_are_called():
    assert np.allclose(scenes.gaussian(5, 2), kernels.gaussian(2, 5))
    assert np.abs(scenes.disk(3) - kernels.disk(3).numpy()).max() < 1e-3
    assert np.allclose(scenes.motion(9, 0), np.full((1, 9), 1 / 9), atol=2e-4)
    kernel = scenes.motion(20, 30)
    rows, columns = np.indices(kernel.shape) - np.array(kernel.shape)[:, None, None] // 2
    assert kernel.sum() == pytest.approx(1) and (kernel * columns).sum() == pytest.approx(0)
    # Upwards to the right, as the picture is seen; the variance of a line is its length^2 / 12.
    assert (kernel * (rows**2 + columns**2)).sum() == pytest.approx(20**2 / 12, rel=0.02)
    assert (kernel * rows * columns).sum() == pytest.approx(-20**2 / 12 * 3**0.5 / 4, rel=0.02)


def test_what_is_done_to_a_picture_is_done(tmp_path):
    usual = scenes.GAUSSIAN.take("coffee", 48, tmp_path)[1]
    _, d, x = replace(scenes.GAUSSIAN, frame=5).take("coffee", 48, tmp_path)
    assert not d[:5].any() and not x[:, -5:].any()
    assert np.array_equal(d[5:-5, 5:-5], usual[5:-5, 5:-5])
    _, d, x = replace(scenes.GAUSSIAN, exposure=2.5, noise_std=0.0).take("coffee", 48, tmp_path)
    assert x.max() == d.max() == 1 and d.mean() > 1.3 * usual.mean()
    file, d, _ = replace(scenes.GAUSSIAN, quality=20).take("coffee", 48, tmp_path)
    assert Image.open(file).format == "JPEG" and 0 < np.abs(d - usual).mean() < 0.05


@pytest.mark.parametrize(("make", "operator"), [
    (scenes.inpainting, Inpainting), (scenes.mri, MRI),
    (scenes.super_resolution, lambda size: Downsampling(size, 2))])
def test_other_operators_measure_what_their_model_says(make, operator, monkeypatch):
    known, d, x = make(scenes.middle(scenes.photograph("coffee"), 48))
    monkeypatch.setattr(scenes, "NOISE", 0)
    exact = make(scenes.middle(scenes.photograph("coffee"), 48))[1]
    d, exact, Ax = bench.batch(d), bench.batch(exact), operator(known)(bench.batch(x).double())
    assert (exact - Ax).abs().max() <= (1e-6 if make is scenes.mri else 0.5001 / 255)
    mask = torch.ones(1, dtype=bool) if make is scenes.super_resolution else torch.as_tensor(known)
    seen = (mask[..., None] if make is scenes.mri else mask).expand_as(d)
    assert not d[~seen].any()
    error = (d - Ax)[seen].numpy()
    assert error.std() == pytest.approx(0.01, rel=0.05) and abs(error.mean()) < 1e-3


def test_a_third_of_the_lines_with_the_middle_whole():
    mask, _, _ = scenes.mri(scenes.middle(scenes.photograph("coffee"), 96))
    lines = mask.all(axis=0)
    assert np.array_equal(lines, mask.any(axis=0))
    assert lines.sum() == 32 and lines[45:52].all()


def test_data_are_made_by_others():
    assert "jfbnb" not in Path(scenes.__file__).read_text()


# --- restoring ----------------------------------------------------------------------------------


def test_deblur_says_what_the_command_says(place):
    place.side = 96
    case = replace(scenes.MOTION, noise_std=0.02)
    file, d, x = case.take("coffee", place.side, place.scratch)
    image, said = bench.deblur(file, case.right(place.scratch), "--method", "total-variation")
    assert bench.psnr(image, x) > bench.psnr(d, x) + 1
    assert said["noise taken"] == pytest.approx(0.02, rel=0.15) and not said["warning"]
    assert said["converged"] == (said["residual"] <= 1e-4) and said["iterations"] > 5
    _, said = bench.deblur(file, case.right(place.scratch), "--method", "tikhonov",
                           "--noise-std", "0.002")
    assert "noise" in said["warning"] and said["converged"] is None


def test_a_solve_that_does_not_converge_is_told_apart_from_a_doubt(place, monkeypatch):
    monkeypatch.setattr(Model, "max_iterations", 3)
    _, said = bench.deblur(scenes.GAUSSIAN.take("coffee", 48, place.scratch)[0], scenes.USUAL,
                           "--method", "jfb")
    assert said["iterations"] == 3 and said["residual"] > 1e-4
    assert not said["converged"] and not said["warning"]


def test_a_command_that_fails_is_no_row(place):
    file, _, _ = scenes.GAUSSIAN.take("coffee", place.side, place.scratch)
    with pytest.raises(bench.UserError, match="no file"):
        bench.deblur(file, "nothing")


def test_a_process_is_timed_and_its_memory_taken():
    status, said, found = bench.run([sys.executable, "-c",
                                     "x = bytearray(b'x' * 2 * 10**8); print('done')"])
    assert status == 0 and said == "done\n"
    assert found["process MB"] > 2e8 / 2**20 and found["seconds"] > 0
    assert bench.run([sys.executable, "-c", "raise SystemExit(3)"])[0] != 0


# --- the sections and their tables --------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Of everything little, Tikhonov in place of the command's network, no process of its own."""
    real = bench.jfbnb

    def command(arguments):
        return real([*arguments, *([] if "--method" in arguments else ["--method", "tikhonov"])])

    monkeypatch.setattr(bench, "jfbnb", command)
    monkeypatch.setattr(bench, "alone", lambda job, line: (
        real(line[3:]), "warning: 1 of 1 tiles did not converge", {"seconds": 1.5}))
    monkeypatch.setattr(bench, "METHODS", ("tikhonov",))
    monkeypatch.setattr(bench, "WEIGHTS", (0.1, 10))
    monkeypatch.setattr(scenes, "WRONG", scenes.WRONG[1:3])
    monkeypatch.setattr(scenes, "RIGHT", scenes.RIGHT[2:3])
    monkeypatch.setattr(scenes, "NEARLY", scenes.NEARLY[3:4])
    monkeypatch.setattr(bench, "NOISES", (0.01,))
    monkeypatch.setattr(bench, "BLURS", (scenes.MOTION,))
    monkeypatch.setattr(bench.photographs, "TILE", 96)


def test_sections_write_their_rows_and_one_report(tmp_path, few, capfd):
    where = ["--side", "48", "--out", str(tmp_path)]
    bench.main([*where, "--sections", "operators", "--photographs", "chelsea", "coffee"])
    bench.main([*where, "--sections", *(name for name in bench.SECTIONS if name != "operators"),
                "--photographs", "coffee", "--large", "64", "--part", "120"])
    tables = {name: pd.read_csv(tmp_path / f"photographs_{name}.csv") for name in bench.SECTIONS}
    assert (tables["restoration"].groupby("method").size()["tikhonov"]) == 3
    tuned = tables["operators"].query("operator == 'mri' and method == 'tikhonov'")
    best = tuned.loc[tuned[tuned.photograph == "chelsea"].PSNR.idxmax()].weight
    assert list(tuned.photograph) == ["chelsea", "chelsea", "coffee"]
    assert tuned.weight.iloc[-1] == best
    wrong = tables["mismatches"].query("model == 'wrong' and case == 'noise 0.1 told 0.01'")
    assert wrong.warned.all() and (wrong.lost > 1).all()
    assert len(tables["mismatches"]) == 2 + 1 + 1
    three = tables["nearly"].set_index("way")
    assert three["noise taken"]["jfb, 1.5 times the noise"] == pytest.approx(
        1.5 * three["noise taken"]["jfb"], rel=0.05)
    assert set(three.told) == {"motion:10,30"} and (three.PSNR + three.lost).nunique() == 1
    assert (tmp_path / "photographs_large.png").exists()
    assert tables["noise"]["within 20%"].all() and len(tables["noise"]) == 4 * 3
    assert not tables["large"].converged.any()
    assert tables["large"].PSNR[0] > tables["large"].input[0] + 1
    # Tiles of 96 pixels leave strips, where nothing shows; Tikhonov reaches less far than a prior.
    seams = tables["seams"].iloc[0]
    assert 0 < seams["rms in strips"] < 3e-3 and seams["largest jump in strips"] < 1e-3

    text = (tmp_path / "photographs.md").read_text()
    assert [line[3:] for line in text.splitlines() if line[:3] == "## "] == list(bench.SECTIONS)
    tables["large"]["seconds"] = 12.25
    tables["large"].to_csv(tmp_path / "photographs_large.csv", index=False)
    bench.report(tmp_path)
    assert (tmp_path / "photographs.md").read_text().count("12.2") == 1 > text.count("12.2")


def test_report_shows_the_best_setting_and_leaves_the_tuning_out(tmp_path):
    pd.DataFrame({"blur": "b", "photograph": ["p", "q"] * 2, "method": "m",
                  "setting": [1, 1, 2, 2], "PSNR": [20.0, 22.0, 29.0, 15.0],
                  "converged": [True, False, True, True]}).to_csv(
        tmp_path / "photographs_restoration.csv")
    pd.DataFrame({"operator": "o", "photograph": ["chelsea", "coffee"], "method": "m", "weight": 1,
                  "PSNR": [10.0, 30.0]}).to_csv(tmp_path / "photographs_operators.csv")
    bench.report(tmp_path)
    rows = [[cell.strip() for cell in line.split("|")] for line in
            (tmp_path / "photographs.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) == 4 and "22.00" in rows[1] and "2 of 2" in rows[1]
    assert "30.00" in rows[3]
