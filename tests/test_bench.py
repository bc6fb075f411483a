"""The benchmark's driver, tiny and within this process; its workers; what it computes."""

import functools
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from jfbnb.common import ROOT
from jfbnb.datasets import ImageSet, Splits

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench
import measurements
import quality
from contenders import PARTS, Contender, Size, grown, load_problem, make, solve_problem
from processes import Worker, alone, in_turns
from report import exponent, verdicts

from jfbnb.networks import DnCNN


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
    solve_problem(file, 1, 32)
    return file


def test_quick_run_compares_and_writes(tmp_path, monkeypatch, inline, capsys):
    pytest.importorskip("torchdeq")
    monkeypatch.setattr(bench, "CONTENDERS", [
        Contender("jfbnb", "jfb"), Contender("torchdeq", "jfb"),
        Contender("torchdeq", "jfb", "Eq. 4")])
    monkeypatch.setattr(bench, "PARTS", [PARTS[0], Contender("jfbnb", "jfb", change="Picard")])
    monkeypatch.setattr(measurements, "EVALUATIONS", 20)  # too few for Eq. 4
    bench.main(["--quick", "--out", str(tmp_path), "--sections", "step", "parts",
                "reconstruction"])
    for name in ("step", "reconstruction"):
        assert (tmp_path / f"{name}.md").exists() and (tmp_path / f"{name}.png").exists()
        table = pd.read_csv(tmp_path / f"{name}.csv").set_index("contender")
        assert table.reached.to_dict() == {"jfbnb jfb": "yes", "torchdeq jfb, our map": "yes",
                                           "torchdeq jfb, Eq. 4": "no"}
        assert (table["came to"][table.reached == "yes"] <= 1e-2).all()
        assert table["came to"]["torchdeq jfb, Eq. 4"] > 1e-2
        assert (table.seconds > 0).all() and table["times ours"]["jfbnb jfb"] == 1
    changed = pd.read_csv(tmp_path / "parts.csv").set_index("contender")
    assert changed.evaluations["jfbnb jfb, Picard"] > changed.evaluations["jfbnb jfb"]
    assert (tmp_path / "parts.png").exists()
    assert "a peer's JFB step with Eq. 4" in (tmp_path / "targets.md").read_text()
    assert "torchdeq" in (tmp_path / "machine.json").read_text()


def test_quick_run_of_what_needs_no_peer(tmp_path, monkeypatch, inline):
    images = torch.randint(256, (20, 3, 128, 128), dtype=torch.uint8)
    whole = ImageSet(images, list("abcdefghijklmnopqrst"), list(range(20)))
    monkeypatch.setattr(quality, "_splits", lambda data, watched: Splits(
        whole[2:], whole[:1], whole[1:2], "noise"))
    monkeypatch.setattr(bench, "RIVALS", ("unrolled", "feedforward-tikhonov"))
    bench.main(["--quick", "--out", str(tmp_path), "--sections", "limit", "growth", "quality"])
    limit = pd.read_csv(tmp_path / "limit.csv")
    assert set(limit.type) == {"float32", "bfloat16"} and (limit["solve's share"] > 0).all()
    growth = pd.read_csv(tmp_path / "growth.csv")
    assert set(growth.gradient[growth.series == "K"]) == {"jfb", "implicit", "unrolled"}
    fits = pd.read_csv(tmp_path / "growth_exponents.csv").set_index(["series", "gradient"])
    assert fits["most over least MB"]["K", "jfb"] < 1.05 < fits["most over least MB"]["K",
                                                                                     "unrolled"]
    curves = pd.read_csv(tmp_path / "quality.csv")
    assert set(curves.method) == {"unrolled", "feedforward-tikhonov"}
    assert (curves.groupby("method")["time (s)"].diff().dropna() > 0).all()
    for name in ("limit", "growth", "quality"):
        assert (tmp_path / f"{name}.png").exists()


def test_a_missing_peer_is_one_line_and_the_rest_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "available", lambda library: library != "torchdeq")
    made = bench.make_bench(bench.parse(["--quick"]), tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("torchdeq is not installed") and "pip install -e '.[bench]'" in line
    assert {c.library for c in made.contenders} == {"jfbnb", "deepinv"}


@pytest.mark.parametrize("name", ["16x64", "16x64-4x32", "16x64-8x16", "16 64 8 32"])
def test_a_malformed_problem_is_refused(name, capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--problems", name])
    assert "x" in capsys.readouterr().err.splitlines()[-1]
    assert str(Size.parse("16x64-8x32")) == "16x64-8x32"


def test_contenders_meet_at_the_equilibrium(problem_file):
    pytest.importorskip("torchdeq")
    pytest.importorskip("deepinv")
    for contender, solver, effort in (
            *((part, "float32", 1e-5) for part in PARTS if part.map == "our map"),
            (PARTS[0], "bf16 first", 1e-5),
            (Contender("jfbnb", "unrolled"), "Picard", 60),
            (Contender("torchdeq", "jfb"), "Anderson", 25),
            (Contender("deepinv", "jfb"), "Anderson", 25)):
        problem = load_problem(problem_file, 9, 40)  # anew, as a change may stay
        output = make(problem, contender, solver, effort)()
        assert problem.distance("our map", output.detach()) < 1e-3, contender.name
        assert output.requires_grad
    assert problem.distance("our map", problem.d) > 0.1


def test_a_gradient_in_bfloat16_is_near_that_in_float32(problem_file):
    gradients = []
    for solver in ("float32", "bf16 first"):
        problem = load_problem(problem_file)
        output = make(problem, PARTS[0], solver, 1e-5)()
        (output - problem.x).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in problem.S.parameters()]))
    exact, rounded = gradients
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99
    assert rounded.norm() / exact.norm() == pytest.approx(1, abs=0.05)


def test_a_grown_network_computes_the_same():
    torch.manual_seed(0)
    small = DnCNN(3, 4)
    torch.nn.init.normal_(small.layers[-1].weight)
    large = grown(small, 5, 7)
    assert (large.depth, large.width) == (5, 7)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(large(x, 0.1), small(x, 0.1))


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


def test_exponent_of_a_power_law():
    x = pd.Series([1, 2, 4, 16])
    assert exponent(x, 3 * x**1.7) == pytest.approx(1.7)
    assert exponent(x, 0 * x + 5) == pytest.approx(0)


def test_first_time_at_the_goal():
    curve = pd.DataFrame({"time (s)": [1.0, 2.0, 3.0], "psnr": [30.0, 33.0, 32.0]})
    assert bench.first_at(curve, 31.9) == 2.0
    assert np.isnan(bench.first_at(curve, 34.0))


def test_verdicts_are_read_from_the_tables(tmp_path):
    assert verdicts(tmp_path).empty
    pd.DataFrame({"contender": ["jfbnb jfb", "torchdeq jfb, Eq. 4", "deepinv jfb, our map"],
                  "to distance": ["1e-02"] * 3, "times ours": [1.0, 6.0, 1.2]}
                 ).to_csv(tmp_path / "step.csv", index=False)
    table = verdicts(tmp_path)
    assert table.measured.tolist() == [6.0, 1.2] and table.met.tolist() == ["yes", "no"]
