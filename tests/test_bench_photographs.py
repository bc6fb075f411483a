"""The benchmark on photographs: its data against the package's operators; its sections, tiny."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import photographs as bench
import pytest
import scenes
import torch

from jfbnb.core import kernels
from jfbnb.core.models import Model
from jfbnb.core.operators import MRI, Convolution, Downsampling, Inpainting


def test_data_are_made_without_the_package():
    code = "import scenes, sys; assert not any(name.startswith('jfbnb') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(scenes.__file__).parent, check=True)


@pytest.mark.parametrize("kernel", [scenes.MOTION.kernel,
                                    np.array([[0.0, 0.1, 0.2], [0.1, 0.1, 0.5]])])
def test_a_picture_is_cut_from_a_blurred_scene_in_eight_bits(tmp_path, kernel):
    """SciPy's blur, against our operator with an unknown border."""
    _, d, x = scenes.Case("", kernel, noise_std=0.0).take("coffee", 48, tmp_path)
    scene = scenes.middle(scenes.photograph("coffee"), 48 + 2 * 12)
    A = Convolution(scene.shape[:2], kernel)
    Ax = A(torch.from_numpy(scene).movedim(2, 0)[None])[0].movedim(0, 2).numpy()
    top, left = (12 - (n - 1) // 2 for n in kernel.shape)
    assert np.abs(d - Ax[top:top + 48, left:left + 48]).max() <= 0.5001 / 255
    assert np.array_equal(x, scene[12:-12, 12:-12])


def test_kernels_are_the_packages_and_closed_forms():
    assert np.allclose(scenes.gaussian(5, 2), kernels.gaussian(2, 5))
    assert np.abs(scenes.disk(3) - kernels.disk(3).numpy()).max() < 1e-3
    kernel = scenes.motion(20, 30)
    rows, columns = np.indices(kernel.shape) - np.array(kernel.shape)[:, None, None] // 2
    # The variance of a line is its length^2 / 12.
    assert kernel.sum() == pytest.approx(1) and (kernel * columns).sum() == pytest.approx(0)
    assert (kernel * (rows**2 + columns**2)).sum() == pytest.approx(20**2 / 12, rel=0.02)
    assert (kernel * rows * columns).sum() == pytest.approx(-20**2 / 12 * 3**0.5 / 4, rel=0.02)


@pytest.mark.parametrize(("make", "operator"), [
    (scenes.inpainting, Inpainting), (scenes.mri, MRI),
    (scenes.super_resolution, lambda size: Downsampling(size, 2))])
def test_other_operators_measure_what_their_model_says(make, operator, monkeypatch):
    scene = scenes.middle(scenes.photograph("coffee"), 48)
    known, d, x = make(scene)
    monkeypatch.setattr(scenes, "NOISE", 0)
    A = operator(known)
    exact, d, Ax = bench.batch(make(scene)[1]), bench.batch(d), A(bench.batch(x).double())
    assert (exact - Ax).abs().max() <= (1e-6 if make is scenes.mri else 0.5001 / 255)
    seen = exact != 0
    assert (d - Ax)[seen].std().item() == pytest.approx(0.01, rel=0.1)


def test_deblur_says_what_the_command_says(tmp_path, monkeypatch):
    file, d, x = scenes.MOTION.take("coffee", 96, tmp_path)
    kernel = scenes.MOTION.right(tmp_path)
    image, said = bench.deblur(file, kernel, "--method", "total-variation")
    assert bench.psnr(image, x) > bench.psnr(d, x) + 1
    assert said["noise taken"] == pytest.approx(0.01, rel=0.2)
    assert said["converged"] and not said["warning"]
    monkeypatch.setattr(Model, "max_iterations", 3)
    _, said = bench.deblur(file, kernel, "--method", "jfb")
    assert not said["converged"] and not said["warning"]
    with pytest.raises(bench.UserError, match="no such file"):
        bench.deblur(file, "nothing")


@pytest.fixture
def few(monkeypatch):
    """Little of everything, and Tikhonov where the command would take its network."""
    real = bench.jfbnb
    monkeypatch.setattr(bench, "jfbnb", lambda words: real(
        [*words, *([] if "--method" in words else ["--method", "tikhonov"])]))
    monkeypatch.setattr(bench, "METHODS", ("tikhonov",))
    monkeypatch.setattr(bench, "WEIGHTS", (0.1, 10))
    monkeypatch.setattr(bench, "MOTION_PIXELS", 0)
    monkeypatch.setattr(scenes, "WRONG", scenes.WRONG[1:3])
    monkeypatch.setattr(scenes, "RIGHT", scenes.RIGHT[2:3])
    monkeypatch.setattr(scenes, "NEARLY", scenes.NEARLY[3:4])
    monkeypatch.setattr(scenes, "STORED", scenes.STORED[:1] + scenes.STORED[-4:])


def test_sections_write_what_pages_read(tmp_path, few, capfd):
    where = ["--side", "48", "--out", str(tmp_path)]
    assert bench.main([*where, "--sections", "operators",
                       "--photographs", "chelsea", "coffee"]) == 0
    assert bench.main([*where, "--sections", *(name for name in bench.SECTIONS
                                               if name != "operators"),
                       "--photographs", "coffee", "--large", "64"]) == 0
    tables = {name: pd.read_csv(tmp_path / f"photographs_{name}.csv") for name in bench.SECTIONS}
    # The columns that tools/publish.py reads.
    for name, columns in {
            "restoration": ["blur", "photograph", "method", "setting", "input", "PSNR",
                            "converged"],
            "operators": ["operator", "photograph", "method", "PSNR", "converged"],
            "mismatches": ["model", "case", "photograph", "warning"],
            "stored": ["stored", "noise", "input", "PSNR", "noise taken", "doubtful"],
            "nearly": ["blur", "told", "way", "input", "PSNR", "lost", "converged"],
            "large": ["blur", "megapixels", "seconds", "converged", "process MB"]}.items():
        assert set(columns) <= set(tables[name])
    assert tables["restoration"].groupby("method").size()["tikhonov"] == 3
    tuned = tables["operators"].query("operator == 'mri' and method == 'tikhonov'")
    best = tuned.loc[tuned[tuned.photograph == "chelsea"].PSNR.idxmax()].weight
    assert list(tuned.photograph) == ["chelsea", "chelsea", "coffee"]
    assert tuned.weight.iloc[-1] == best
    wrong = tables["mismatches"].query("model == 'wrong' and case == 'noise 0.1 told 0.01'")
    assert wrong.warned.all() and (wrong.lost > 1).all()
    assert len(tables["mismatches"]) == 2 + 1 + 1
    assert len(tables["nearly"]) == 3
    large = tables["large"]  # in a process of its own
    assert (large.seconds > 0).all() and not (large["process MB"] < 100).any()
    assert (large.PSNR - large.input > 1).all()
    assert (tmp_path / "photographs.png").exists() and (tmp_path / "photographs_large.png").exists()
    assert (tmp_path / "photographs.md").read_text().count("\n## ") == 2
