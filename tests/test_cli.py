"""The command as its user types it: what it prints, its exit status, what it leaves behind."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import numpy as np
import pytest
import scenes
import skimage.data
import tifffile
import torch
from PIL import ExifTags, Image

from jfbnb.photo import restore
from jfbnb.run import checkout, command
from jfbnb.run.command import main
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, make_methods


def run(capsys, *words) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *words) -> str:
    status, _, err = run(capsys, *words)
    assert status == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("jfbnb: error: ")
    return lines[0]


def test_evaluate_writes_json_and_says_what_is_amiss(capsys, image_folder, weights, tmp_path):
    (image_folder / "000002.jpg").write_bytes(b"not a picture")
    file = tmp_path / "results.json"
    status, out, err = run(capsys, "evaluate", "--data", image_folder, "--weights", weights,
                           "--method", "tikhonov", "--method", "jfb", "--limit", 3, "--json", file)
    assert status == 0 and "tikhonov" in out
    results = json.loads(file.read_text())
    assert results["images"] == 2 and results["skipped"] == 1 and results["protocol"] == "paper"
    assert set(results["methods"]) == {"tikhonov", "jfb"}
    assert set(results["methods"]["jfb"]) == {"images", "psnr", "psnr_se", "ssim", "ssim_se",
                                              "converged", "median_iterations", "seconds_per_image"}
    assert results["methods"]["tikhonov"]["median_iterations"] is None
    assert results["methods"]["tikhonov"]["psnr"] > 20
    # The untrained denoiser of the fixture is the identity: the solve heads for A^-1 d, slowly.
    skipped, line = err.strip().splitlines()
    assert "000002.jpg" in skipped
    assert line.startswith("warning: jfb: 2 of 2 images did not converge: 00000")
    assert "(relative residual " in line


def test_blur_then_deblur(capsys, image_folder, weights, tmp_path):
    source = image_folder / "000001.jpg"
    blurred, out = tmp_path / "blurred", tmp_path / "sharp"
    assert run(capsys, "blur", source, "--out", blurred)[0] == 0
    file = blurred / "000001-blurred.png"
    assert Image.open(file).size == (174, 214)  # of a scene of 178 x 218, blurred, then cut
    status, printed, _ = run(capsys, "deblur", file, "--out", out, "--method", "total-variation",
                             "--weights", weights)
    assert status == 0 and "000001-blurred-total-variation.png" in printed

    def error(path) -> float:
        return np.square(np.asarray(Image.open(path), float)
                         - np.asarray(Image.open(source), float)[2:-2, 2:-2]).mean()

    assert error(out / "000001-blurred-total-variation.png") < 0.8 * error(file)


@pytest.mark.parametrize("name", list(METHODS))
def test_deblur_by_every_method(capsys, weights, tmp_path, name):
    file = tmp_path / "small.png"
    Image.fromarray(np.full((20, 24, 3), 128, np.uint8)).save(file)
    status, printed, _ = run(capsys, "deblur", file, "--out", tmp_path, "--method", name,
                             "--weights", weights)
    assert status == 0 and f"small-{name}.png" in printed
    assert Image.open(tmp_path / f"small-{name}.png").size == (24, 20)


def distance(path, sharp: np.ndarray) -> float:
    """PSNR in dB of a file."""
    return -10 * np.log10(np.square(scenes.read(path) - sharp).mean())


def test_a_photograph_from_a_camera_gets_better(capsys, tmp_path):
    kernel = np.eye(5) / 5  # motion, not separable
    np.savetxt(tmp_path / "kernel.txt", kernel)
    file, _, sharp = scenes.Case("", kernel).take("coffee", 72, tmp_path)
    deblur = ("deblur", file, "--out", tmp_path, "--method", "jfb")
    status, out, err = run(capsys, *deblur, "--kernel", tmp_path / "kernel.txt")
    assert status == 0 and not err
    assert float(re.search(r"\(noise ([\d.]+),", out)[1]) == pytest.approx(0.01, rel=0.2)
    blurred = distance(file, sharp)
    assert distance(tmp_path / "coffee-jfb.png", sharp) > blurred + 4
    # A kernel drawn by name, which is not quite that one; the U-Net gains less there.
    named = (*deblur, "--kernel", "motion:7,-45", "--noise-std", "0.01")
    for method, more, gain in (("jfb", ["--weights", RELEASED], 3),
                               ("jfb", [], 2), ("jfb-energy", [], 4)):
        assert run(capsys, *named, "--method", method, *more)[0] == 0
        assert distance(tmp_path / f"coffee-{method}.png", sharp) > blurred + gain
    assert run(capsys, *deblur, "--kernel", tmp_path / "kernel.txt", "--border", "black")[0] == 0
    assert distance(tmp_path / "coffee-jfb.png", sharp) < blurred - 3


def test_a_wrong_kernel_is_doubted(capsys, tmp_path):
    file, *_ = scenes.Case("", np.ones((1, 1))).take("astronaut", 88, tmp_path)
    deblur = ("deblur", file, "--out", tmp_path, "--noise-std")
    status, _, err = run(capsys, *deblur, "0.01")
    assert status == 3 and "far out of [0, 1]" in err.splitlines()[0]
    assert "try a far narrower kernel" in err
    assert (tmp_path / "astronaut-total-variation.png").exists()
    assert all(line.startswith(f"warning: {file}: ") for line in err.splitlines())
    scenes.Case("", np.ones((1, 1))).take("astronaut", 112, tmp_path)  # 88 pixels show too little
    assert "try --noise-std 0.01" in run(capsys, *deblur, "0.1", "--method", "tikhonov",
                                         "--kernel", "gaussian:0.1")[2]


def test_large_pictures_are_restored_by_tiles(tmp_path, monkeypatch):
    """The same picture as in one piece, but for what the solver leaves."""
    _, d, _ = scenes.Case("", np.full((5, 5), 0.04)).take("coffee", 268, tmp_path)
    d = torch.from_numpy(d[:208]).float().permute(2, 0, 1)
    monkeypatch.setattr("jfbnb.core.models.Model.tolerance", 1e-5)
    jfb = make_methods(["jfb"], RELEASED, torch.device("cpu"))["jfb"]
    kernel, seen = torch.full((5, 5), 0.04, dtype=torch.float64), []
    whole = restore.restore(jfb, d, kernel, 0.01)
    monkeypatch.setattr(restore, "TILE", 150)
    tiled = restore.restore(jfb, d, kernel, 0.01,
                                progress=lambda done, tiles: seen.append((done, tiles)))
    assert whole.tiles == 1 and tiled.tiles == 6 and seen == [(i, 6) for i in range(7)]
    apart = (tiled.image - whole.image).abs()
    assert 0 < apart.square().mean().sqrt() < 3e-4 and apart.quantile(0.99) < 1e-3


@pytest.mark.parametrize("n, most", [(1, 100), (100, 100), (101, 100), (555, 100), (90, 60)])
def test_pieces_cover_a_side(n, most):
    total = torch.zeros(n)
    for where, weights in restore._cut(n, most, 16):
        assert len(total[where]) == len(weights) <= most
        total[where] += weights
    assert total.min() > 0.1


def test_nothing_of_a_picture_is_lost(capsys, weights, tmp_path):
    Image.new("L", (30, 40), 128).save(tmp_path / "grey.png")
    Image.new("RGBA", (30, 40), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    tifffile.imwrite(tmp_path / "float.tif", np.full((40, 30), 0.4, np.float32))
    tifffile.imwrite(tmp_path / "stack.tif", np.full((2, 40, 30), 128, np.uint8))
    out = tmp_path / "out"
    files = [tmp_path / name for name in ("grey.png", "clear.png", "float.tif")]
    assert run(capsys, "blur", *files, "--out", out, "--noise-std", 0)[0] == 0
    grey, clear = (Image.open(out / f"{name}-blurred.png") for name in ("grey", "clear"))
    assert grey.mode == "L" and grey.getpixel((15, 20)) == 128 and grey.size == (26, 36)
    assert clear.mode == "RGBA" and clear.getpixel((15, 20)) == (9, 9, 9, 0)
    values = tifffile.imread(out / "float-blurred.tif")
    assert values.dtype == np.float32 and np.allclose(values, 0.4, atol=1e-6)
    assert run(capsys, "blur", tmp_path / "stack.tif", "--out", out)[0] == 0
    first, second = tifffile.imread(out / "stack-blurred.tif")
    assert (first != second).any()  # every page has noise of its own


def test_a_bad_picture_among_good_ones(capsys, image_folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = [image_folder / f"00000{i}.jpg" for i in (1, 2)]
    status, out, err = run(capsys, "blur", good[0], tmp_path / "bad.png", good[1], "--out",
                           tmp_path / "o")
    assert status == 2 and len(out.splitlines()) == len(list((tmp_path / "o").iterdir())) == 2
    first, last = err.splitlines()
    assert first.startswith(f"error: {tmp_path / 'bad.png'}: cannot read") and "1 of 3" in last


def test_a_closed_pipe_costs_no_picture(image_folder, tmp_path):
    files = [str(image_folder / f"00000{i}.jpg") for i in range(1, 5)]
    reader, writer = os.pipe()
    os.close(reader)  # nobody reads, as after `| head`
    done = subprocess.run([sys.executable, "-m", "jfbnb", "blur", *files, "--out", tmp_path / "o"],
                          stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr
    assert len(list((tmp_path / "o").iterdir())) == 4


def test_files_that_would_be_lost(capsys, tmp_path):
    for name in ("a.png", "a-blurred.png", "b/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    before = (tmp_path / "a-blurred.png").read_bytes()
    for other, words in (("a-blurred.png", "is an input and would be overwritten"),
                         ("b/a.png", "would become one file")):
        assert words in refused(capsys, "blur", tmp_path / "a.png", tmp_path / other, "--out",
                                tmp_path)
    assert (tmp_path / "a-blurred.png").read_bytes() == before
    target = tmp_path / "a.png"
    assert str(target) in refused(capsys, "blur", target, "--out", target)  # no folder
    assert target.exists() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("error", "expected", "said"), [
    (MemoryError(), 2, "error: memory ran out"),
    (RuntimeError("DefaultCPUAllocator: can't"), 2, "error: memory ran out"),
    (KeyboardInterrupt(), 130, "to continue")])
def test_too_little_memory_and_ctrl_c(capsys, image_folder, tmp_path, monkeypatch, error, expected,
                                      said):
    def fail(*_args):
        raise error

    monkeypatch.setattr("jfbnb.core.protocols.measure", fail)
    status, _, err = run(capsys, "blur", image_folder / "000001.jpg", "--out", tmp_path)
    assert status == expected and said in err and err.count("\n") == 1


def test_no_image_that_is_not_finite(capsys, image_folder, weights, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    tuning = weights / "tuning.json"
    tuning.write_text(tuning.read_text().replace('"step_size": 1.0', '"step_size": 90000.0'))
    line = refused(capsys, "deblur", tmp_path / "small.png", "--out", tmp_path / "o", "--weights",
                   weights, "--method", "gradient-descent", "--noise-std", 0.01)
    assert "the result is not finite" in line and not (tmp_path / "o").exists()


def test_bad_names_and_numbers_are_refused_before_measuring(capsys, image_folder, weights, tmp_path,
                                                            monkeypatch):
    monkeypatch.setattr("jfbnb.training.evaluation.evaluate", lambda *_: pytest.fail("measured"))
    evaluate = ("evaluate", "--data", image_folder, "--weights", weights)
    assert "unknown protocol 'nope'" in refused(capsys, *evaluate, "--protocol", "nope")
    assert "--limit 0" in refused(capsys, *evaluate, "--limit", "0")
    line = refused(capsys, *evaluate, "--json", image_folder)
    assert "cannot write" in line and "not a file" in line
    blur = ("blur", image_folder / "000001.jpg", "--out", tmp_path / "o")
    assert "--range 5" in refused(capsys, *blur, "--range", "5")
    assert "seed -1" in refused(capsys, *blur, "--seed", "-1")
    # A negative number is a value and not an option.
    assert "noise std -0.01" in refused(capsys, "deblur", *blur[1:], "--noise-std", "-0.01")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   PermissionError(13, "Permission denied")])
def test_full_disk_or_no_permission(capsys, image_folder, tmp_path, monkeypatch, error):
    blur = ("blur", image_folder / "000001.jpg", "--out", tmp_path / "out")
    assert run(capsys, *blur)[0] == 0
    file = tmp_path / "out" / "000001-blurred.png"
    before = file.read_bytes()

    def refuse(*_args):
        raise error

    monkeypatch.setattr("jfbnb.common.os.fsync", refuse)
    assert error.strerror in refused(capsys, *blur, "--seed", 1)
    assert file.read_bytes() == before and len(list(file.parent.iterdir())) == 1


def test_a_wheel_restores_pictures_and_needs_nothing_of_the_notebooks(tmp_path, image_folder):
    """Unpacked, away from any checkout, and with the packages of the extra `notebooks` hidden."""
    source, wheel = tmp_path / "source", tmp_path / "unpacked"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(checkout.ROOT / name, source)
    shutil.copytree(checkout.ROOT / "jfbnb", source / "jfbnb",
                    ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet",
                    "--no-build-isolation", "--wheel-dir", tmp_path], cwd=source, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(wheel)
    files = {path.relative_to(wheel / "jfbnb").as_posix() for path in wheel.rglob("jfbnb/**/*")}
    assert {"teaching/swipe.js", "teaching/published_table2.csv", "weights/tuning.json",
            "weights/jfb.safetensors", "weights/jfb.json", "weights/best/jfb.safetensors",
            "__main__.py", "run/command.py"} <= files
    assert not [name for name in files if name.endswith((".ipynb", ".yaml"))]

    project = tomllib.loads((checkout.ROOT / "pyproject.toml").read_text())["project"]
    hidden = [re.match(r"[\w-]+", text)[0] for text in
              project["optional-dependencies"]["notebooks"]]
    Image.open(image_folder / "000001.jpg").crop((0, 0, 64, 64)).save(tmp_path / "small.png")
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] in {[*hidden, "IPython", "jupyter_client", "nbclient"]}:
            return None
        return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
import jfbnb
from jfbnb.run.command import main
assert jfbnb.__path__ == [{str(wheel / "jfbnb")!r}], jfbnb.__path__
for words in ("reproduce", "train jfb", "sweep seeds.yaml", "lab"):
    assert main(words.split()) == 2, words
for words in ("doctor", "blur images/000001.jpg --out out",
              "deblur small.png --out out --method jfb",
              "evaluate --data images --limit 1 --method jfb --method tikhonov"):
    assert main(words.split()) == 0, words
""")
    environment = {k: v for k, v in os.environ.items() if k != "JFBNB_WORK"}
    done = subprocess.run([sys.executable, "-P", script], cwd=tmp_path, text=True, check=False,
                          capture_output=True, env={**environment, "PYTHONPATH": str(wheel)})
    assert done.returncode == 0, done.stdout + done.stderr
    refused = [line for line in done.stderr.splitlines() if "need the notebooks" in line]
    assert len(refused) == 4 and all("git clone" in line for line in refused)
    assert "TROUBLE" not in done.stdout and not (tmp_path / "runs").exists()
    assert (tmp_path / "out" / "small-jfb.png").is_file()


def test_what_the_notebooks_need_is_named_where_it_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    monkeypatch.delitem(sys.modules, "jfbnb.run.reproduce", raising=False)
    line = refused(capsys, "reproduce")
    assert "nbformat is not installed" in line and "jfbnb[notebooks]" in line


def test_lab_opens_the_first_notebook_trusted_at_the_root_of_the_checkout(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(command.subprocess, "run", lambda words, check: calls.append(words) or
                        subprocess.CompletedProcess(words, int(len(calls) == 3)))
    assert run(capsys, "lab")[0] == 0
    trust, lab = calls
    assert trust[1:4] == ["-m", "jupyter", "trust"] and len(trust) >= 4 + 6
    assert lab[1:6] == ["-m", "jupyter", "lab", "--notebook-dir", str(checkout.ROOT)]
    assert lab[6].endswith("/lab/tree/notebooks/01_problem_setup_and_direct_inverse.ipynb")
    assert "jupyter trust failed with status 1" in refused(capsys, "lab")


def test_a_cameras_picture_is_restored_in_light(capsys, tmp_path):
    """By its EXIF, unless it is said otherwise."""
    pixels, exif = skimage.data.astronaut()[100:164, 100:180], Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95, exif=exif)
    restored, notes = {}, {}
    for gamma in ("auto", "srgb", "linear"):
        notes[gamma] = run(capsys, "deblur", tmp_path / "a.jpg", "--out", tmp_path, "--noise-std",
                           0.02, "--method", "tikhonov", "--gamma", gamma)[2]
        restored[gamma] = np.array(Image.open(tmp_path / "a-tikhonov.png"))
    assert "note" in notes["auto"] and "restored in light" in notes["auto"]
    assert "in light" not in notes["srgb"] + notes["linear"]
    np.testing.assert_array_equal(restored["auto"], restored["srgb"])
    assert (restored["auto"] != restored["linear"]).any()
