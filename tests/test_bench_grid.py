"""The grid of kernels and noise levels, tiny: what it measures, keeps, counts and refuses."""

import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import grid

from jfbnb.core.denoisers import DnCNN
from jfbnb.core.kernels import motion
from jfbnb.core.maps import EnergyMap
from jfbnb.core.operators import Blur, Convolution
from jfbnb.core.protocols import measure
from jfbnb.data import ImageSet, Splits
from jfbnb.training import equilibria, evaluation
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods
from jfbnb.training.tuning import Tuning
from jfbnb.training.weights import save_weights

COLUMNS = ["method", "kernel", "border", "noise", "kind", "images", "psnr", "converged",
           "most_evaluations", "mean_drift", "worst_drift", "radius_max", "norm_max", "stable"]
TINY = {("Gaussian 3 x 3, std 1", "unknown"): partial(Blur, kernel_size=3, kernel_std=1.0,
                                                      border="unknown"),
        ("protocol paper", "black"): partial(Blur, kernel_size=5, kernel_std=5**0.5)}


@pytest.fixture
def tiny(monkeypatch):
    """Two kernels, one noise level, images of 32 x 32, and no other process."""
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(4, 3, 8, 8), size=32, mode="bilinear")
    images = (255 * smooth).to(torch.uint8)
    whole = ImageSet(images, ["coffee/1", "rocket/1", "retina/1", "rocket/2"], [0, 1, 2, 3])
    monkeypatch.setattr(grid, "KERNELS", TINY)
    monkeypatch.setattr(grid, "NOISES", (0.02,))
    monkeypatch.setattr(grid, "SIDE", 32)
    monkeypatch.setattr(grid, "load_splits", lambda *_: Splits(whole, whole[:2], whole, "noise"))
    monkeypatch.setattr(grid, "bundled_photos", lambda split, size: whole)
    monkeypatch.setattr(grid, "alone", lambda job, *arguments: job(*arguments))
    return whole


def words(weights, out, *more):
    return ["--weights", str(weights), "--out", str(out), "--images", "1", "--further", "60",
            "--certified", "1", "--methods", "jfb", "jfb-energy", *more]


def scale(weights: Path, name: str, share: float, std: float = 0.0) -> None:
    """Have a method's network take that share of x for noise, and something random on top."""
    method, tuning = METHODS[name], Tuning.load(weights / "tuning.json")
    network, same = DnCNN(2, 4), torch.zeros(3, 3, 3, 3)
    same[range(3), range(3), 1, 1] = 1
    torch.nn.init.normal_(network.layers[-1].weight, std=std)
    with torch.no_grad():  # x + 1 is positive, so that no ReLU cuts it
        network.layers[0].weight.zero_()[:3, :3] = same
        network.layers[0].bias.fill_(1)
        network.layers[2].weight[:, :3] += share * same
        network.layers[2].bias.fill_(-share)
    head = DnCNN(2, 4) if method.head else None
    model = method.build(None, network, tuning.settings(method), head)
    save_weights(weights / f"{name}.safetensors", model, {})


def test_a_grid_is_measured_once_and_drawn(weights, tiny, tmp_path, monkeypatch, capsys):
    for name in ("jfb", "jfb-energy"):
        scale(weights, name, 0.5)
    assert grid.main(words(weights, tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()
    rows = pd.read_csv(tmp_path / "grid.csv")
    assert list(rows) == COLUMNS
    assert len(rows) == 2 * 2 * 2 and not rows.duplicated(COLUMNS[:5]).any()
    assert set(rows.method) == {"jfb", "jfb-energy"} and (rows.images == 1).all()
    assert set(zip(rows.kernel, rows.border, strict=True)) == set(TINY)
    assert (rows.converged == 1).all() and rows.most_evaluations.between(2, 100).all()
    assert (rows.worst_drift >= rows.mean_drift).all() and (rows.worst_drift < 0.05).all()
    assert (rows.radius_max < 1).all() and (rows.stable == 1).all()
    assert said[-1].startswith("8 of 8 points converge on every image within 100 evaluations; the "
                               "worst drift is 0.0")
    assert all((tmp_path / f"grid{suffix}").stat().st_size for suffix in (".png", ".pdf"))
    assert said[-1] in (tmp_path / "grid_overview.md").read_text()

    # What is done is not done again; what is missing is, and comes out the same.
    monkeypatch.setattr(grid, "save_figure", lambda *_: None)  # seconds
    point, called = grid.point, []
    monkeypatch.setattr(grid, "point", lambda *a: called.append(a) or point(*a))
    assert grid.main(words(weights, tmp_path)) == 0 and not called
    sorted((tmp_path / "grid").rglob("*.csv"))[0].unlink()
    assert grid.main(words(weights, tmp_path)) == 0 and len(called) == 1
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "grid.csv"), rows)

    # Of other weights all is, of that method alone; of other options all of all.
    scale(weights, "jfb", 0.4)
    assert grid.main(words(weights, tmp_path)) == 0 and len(called) == 1 + 4
    assert grid.main(words(weights, tmp_path, "--further", "61")) == 0 and len(called) == 5 + 8

    monkeypatch.setattr(grid, "measure_grid", None)  # would be called
    assert grid.main(words(weights, tmp_path, "--report")) == 0


def test_a_stopped_grid_keeps_what_is_done(weights, tiny, tmp_path, monkeypatch):
    point = grid.point
    monkeypatch.setattr(grid, "point", lambda *a: {}[0] if rows() else point(*a))

    def rows():
        return list((tmp_path / "grid").rglob("*.csv"))

    with pytest.raises(KeyError):
        grid.main(words(weights, tmp_path, "--methods", "jfb"))
    assert len(rows()) == 1 and len(pd.read_csv(tmp_path / "grid.csv")) == 1
    assert grid.main(["--out", str(tmp_path), "--report"]) == 0  # of one kind alone


def test_a_map_that_does_not_converge_is_counted(weights, tiny, tmp_path, monkeypatch,
                                                   capsys):
    """D(x) = 6 x overflows; the other method arrives."""
    monkeypatch.setattr(grid, "save_figure", lambda *_: None)
    scale(weights, "jfb", -5.0)
    scale(weights, "jfb-energy", 0.5)
    assert grid.main(words(weights, tmp_path)) == 0
    rows = pd.read_csv(tmp_path / "grid.csv").set_index("method")
    assert (rows.converged["jfb"] == 0).all() and (rows.converged["jfb-energy"] == 1).all()
    assert (rows.worst_drift["jfb"] > 10).all() and (rows.stable["jfb"] == 0).all()
    assert "\n4 of 8 points converge on every image" in capsys.readouterr().out


def test_an_overflow_is_an_infinite_drift():
    rows = pd.DataFrame({"drift": [0.1, math.nan, -0.3], "psnr": [30.0, math.nan, 31.0],
                         "converged": [True, False, True], "evaluations": [20, 7, 30],
                         "radius": [0.9, math.nan, math.nan], "norm": [1.2, math.nan, math.nan]})
    found = grid.summary(rows, certified=2)
    assert found["worst_drift"] == found["mean_drift"] == math.inf
    assert math.isnan(found["psnr"]) and math.isnan(found["radius_max"])
    assert found["stable"] == 0.5 and found["converged"] == pytest.approx(2 / 3)
    found = grid.summary(rows[::2], certified=1)
    assert found["worst_drift"] == 0.3 and found["mean_drift"] == pytest.approx(0.2)
    assert found["radius_max"] == 0.9 and found["stable"] == 1


@pytest.mark.parametrize(("name", "A"), [
    ("jfb", Convolution(32, motion(3, 30))),  # no outer product: its inner solves are iterations
    ("jfb-energy", Blur(32, 5, 2.0, "unknown"))])
def test_a_point_is_what_tables_and_certificates_say(weights, tiny, name, A):
    scale(weights, name, 0.5, std=0.02)
    images, noise_std = tiny[:2], 0.02
    x = images.as_float()
    d = measure(A, x, noise_std, 0, images.indices)
    restorer = make_methods([name], weights, torch.device("cpu"))[name]
    rows = grid.point(restorer, A, noise_std, images, 20, 1)
    table = evaluation.evaluate({name: restorer}, A, x, d, noise_std, images.names)
    assert rows.evaluations.tolist() == table.iterations.tolist() and table.converged.all()
    np.testing.assert_allclose(rows.psnr, table.psnr, atol=1e-4)
    T = restorer.model(A, noise_std).T
    first = equilibria.check_equilibrium(T, x[:1], d[:1], images.names[:1], 20).iloc[0]
    for column in ("residual", "psnr_later", "drift", "radius", "norm"):
        assert rows[column][0] == pytest.approx(first[column], rel=2e-2, abs=1e-4), column
    assert rows.radius.notna().tolist() == [True, False]


def test_a_map_goes_on_by_its_own_solver(weights, tiny, monkeypatch):
    """The energy's goes on going down, where T alone need not."""
    called = []

    def recorded(*arguments, **more):
        called.append(arguments[3])
        return descent(*arguments, **more)

    descent = EnergyMap.solver
    monkeypatch.setattr(EnergyMap, "solver", staticmethod(recorded))
    restorer = make_methods(["jfb-energy"], weights, torch.device("cpu"))["jfb-energy"]
    A, x = Blur(32, 5, 2.0), tiny[:1].as_float()
    grid.restored(restorer.model(A, 0.01), x, A(x), 7, 0)
    equilibria.check_equilibrium(restorer.model(A, 0.01).T, x, A(x), ["a"], 7)
    assert called == [100, 7, 100, 7]


def test_photographs_are_spread_over_the_four(monkeypatch):
    found = grid.photographs(20)
    assert found.images.shape == (20, 3, 128, 128) and found.indices == list(range(20))
    assert {name.split("/")[0] for name in found.names} == set(grid.PHOTOGRAPHS)
    assert len(set(found.names)) == 20
    assert len(grid.KERNELS) == 10
    for make in grid.KERNELS.values():
        A = make(32)
        assert A.check_adjoint(3, 32, 32) < 1e-6
        assert (A.border == "black") == (A(torch.ones(1, 3, 32, 32)).shape[-1] == 32)


@pytest.mark.parametrize(("more", "said"), [
    (["--methods", "tikhonov"], "tikhonov has no equilibrium"),
    (["--methods", "unrolled"], "unrolled has no equilibrium"),
    (["--methods", "nothing"], "unknown method 'nothing'"),
    (["--images", "0"], "must be positive"),
    (["--data", "no/such/folder"], "no data at no/such/folder")])
def test_bad_input_is_one_line(weights, tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.setattr(grid, "alone", lambda job, *arguments: job(*arguments))
    assert grid.main([*words(weights, tmp_path), *more]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("grid: error: ") and said in line
    assert not (tmp_path / "grid.csv").exists()


def test_a_bad_weights_folder_is_one_line_from_the_other_process(tmp_path, capsys):
    assert grid.main(words(tmp_path / "nothing", tmp_path)) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("grid: error: no tuned parameters at ")
    assert grid.main(["--out", str(tmp_path), "--report"]) == 1
    assert "no grid.csv in" in capsys.readouterr().out
