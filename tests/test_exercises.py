"""Answers to exercises: the right ones, typical wrong ones, and what cannot be checked."""

import csv
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from torch import nn

from jfbnb.core.baselines import direct_inverse, tikhonov
from jfbnb.core.denoisers import DnCNN
from jfbnb.core.diagnostics import worst_loss
from jfbnb.core.fixed_point import solve
from jfbnb.core.metrics import psnr
from jfbnb.core.models import Restorer
from jfbnb.core.operators import Blur, Inpainting
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.run.checkout import ROOT
from jfbnb.teaching import exercises
from jfbnb.teaching.exercises import CHECKS, answer, measured
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, load_model
from jfbnb.training.weights import load_denoiser

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
WIDE = pd.DataFrame({"jfb": [30.0, 31.0], "tikhonov": [29.5, 28.0]}, index=["a/1", "b/2"])


def judged(exercise: str, given: object, *context: object) -> str:
    return CHECKS[exercise](given, *context)


def sharpest(x):
    return sum(x.roll(s, dim) - x for s in (-1, 1) for dim in (2, 3))  # wraps around: wrong


def laplacian(x):
    """The gradient of half the squared differences, by hand, without a border's own terms."""
    g = torch.zeros_like(x)
    for dim in (2, 3):
        step = x.diff(dim=dim)
        g.narrow(dim, 1, step.shape[dim]).add_(step)
        g.narrow(dim, 0, step.shape[dim]).sub_(step)
    return g


def methods():
    """Rivals that differ in what is asked: one is told nothing, one leaves the range."""
    return {"tikhonov": Restorer(lambda A, d, noise: (tikhonov(A, d, 100 * noise**2), None)),
            "feedforward": Restorer(lambda A, d, noise: ((noise == 0.01) * 1.1 * d, None)),
            "direct-inverse": Restorer(lambda A, d, noise: (direct_inverse(A, d), None))}


@pytest.fixture(scope="module")
def network():
    return load_denoiser(RELEASED / "denoiser.safetensors").network


@pytest.fixture(scope="module")
def T():
    return load_model(METHODS["jfb"], RELEASED).T


@pytest.mark.parametrize(("exercise", "right", "wrong"), [
    ("1.1", "-13.2 dB", [-23.6, 13.2]), ("1.2", "\N{MINUS SIGN}4.7 dB", [4.7, -23.6]),
    ("1.3", 2.1e-5, [4.4e-10, 6.6e-7]), ("2.1", 28, [3, 300]),
    ("2.2", laplacian, [sharpest, lambda x: x]), ("2.3", (0.018, 0.036), [(0.018, 0.3)]),
    ("4.3", lambda T, z: T(T(z)), [lambda T, z: T(z), lambda T, z: T(T(T(z))), lambda T, z: z,
                                   lambda T, z: T(z + T(z)), lambda T, z: T(T(z)) + 7,
                                   lambda T, z: (T(z) + T(T(z))) / 2]),
    ("6.2", (1.0, 4.0), [(4.0, 1.0)]), ("6.3", ("0.5 dB", 1.0), [(1.0, 0.5)])])
def test_right_and_wrong(exercise, right, wrong):
    assert judged(exercise, right) == ""
    assert all(judged(exercise, given) for given in wrong)


def test_right_by_an_experiment():
    """On images that the checks do not use."""
    x = bundled_photos("test", 128).as_float()[:2]
    A = get_protocol("paper").operator()
    assert not judged("1.2", psnr(direct_inverse(A, (A(x) * 255).round() / 255), x).mean())
    code = get_protocol("code")
    B = code.operator()
    d = measure(B, x, code.noise_std, 0, range(2))
    assert not judged("1.1", psnr(direct_inverse(B, d), x).mean())
    assert "first 3" in judged("4.3", lambda T, z: T(T(T(z))))


def test_denoisers_are_run(network):
    assert "train it" in judged("3.1", DnCNN(3, 4)) and "17 pixels" in judged("3.1", network)

    def once(y, sigma):
        return y - network(y, sigma)

    A, x, _ = measured()
    with torch.no_grad():
        assert not judged("3.2", lambda y, sigma: once(once(y, sigma), sigma), once, x[:1])
        assert judged("3.2", once, once, x[:1])
        share = network(A(x[:1]), 0.05).norm() / (x[:1] - A(x[:1])).norm()
        assert not judged("3.3", share, network) and judged("3.3", 1.0, network)


@torch.no_grad()
def test_maps_are_run(monkeypatch, T):
    x = measured()[1][:1, :, 40:88, 40:88]
    A = get_protocol("paper").operator(48)
    monkeypatch.setattr(exercises, "measured", lambda: (A, x, measure(A, x, 0.01, 0, [0])))
    assert "300" in judged("4.1", T)
    (wild := load_model(METHODS["jfb"], RELEASED).T).D.network.layers[-1].weight.mul_(-3)
    assert not judged("4.1", wild)
    assert not judged("4.2", lambda T, z, d: T.data_step(z, d), T)
    assert judged("4.2", lambda T, z, d: z, T)


def test_terms_are_counted():
    A, x, _ = measured()
    A, x = get_protocol("paper").operator(12), x[:1, :, 50:62, 50:62].double()
    T, d = load_model(METHODS["jfb"], RELEASED).on(A).T.double(), A(x)
    z, _ = solve(T, d, 1e-8, 500)
    v, _, exact = worst_loss(T, z, d)
    downhill = [k for k in range(1, 9) if not judged("4.4", k, T, z, d, v, exact)]
    assert len(downhill) == 1 and downhill[0] > 1
    assert "uphill" in judged("4.4", 1, T, z, d, v, exact)
    assert "fewer" in judged("4.4", downhill[0] + 1, T, z, d, v, exact)


def test_methods_are_run():
    rivals, x = methods(), measured()[1]
    assert not judged("5.1", "feedforward", rivals, x) and not judged("5.1", "dnCNN", rivals, x)
    assert not judged("5.2", METHODS["direct-inverse"].label, rivals, x)
    assert "better than tikhonov" in judged("5.2", "tikhonov", rivals, x)
    assert "is not one of" in judged("5.1", "nothing", rivals, x)
    assert not judged("5.3", "a/1", WIDE) and "2.50 dB" in judged("5.3", "b/2", WIDE)


class Camera(Blur):
    def __init__(self):
        super().__init__(128, 5, 5**0.5, border="unknown")
        filters = torch.zeros(3, 124, 124)
        filters[0, ::2, ::2] = filters[2, 1::2, 1::2] = 1
        filters[1] = 1 - filters.sum(dim=0)
        self.register_buffer("mosaic", filters)

    def forward(self, x):
        return (self.mosaic * super().forward(x)).sum(dim=1, keepdim=True)

    def adjoint(self, d):
        return super().adjoint(self.mosaic * d)


def test_operators_are_run():
    assert not judged("6.1", Camera())
    assert "numbers" in judged("6.1", Inpainting(torch.ones(128, 128)))


def test_answers_are_noted_and_what_raises_is_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answer("1.2")
    answer("1.2", "-4.7 dB")
    answer("1.2", "much")
    answer("4.3", lambda T, z: 1 / 0)
    answer("3.3", 1.0, nn.Linear(2, 2))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["1.2: no answer yet", "1.2: right"] and len(printed) == 5
    assert "ValueError" in printed[2] and "division by zero" in printed[3]
    rows = list(csv.reader(Path("answers.csv").read_text().splitlines()))
    assert [row[1] for row in rows] == ["1.2", "1.2", "4.3", "3.3"] and rows[0][2] == "right"


def test_the_notebooks_ask_for_every_answer():
    """In their last cells, one line an exercise, unanswered, each with what to hand in."""
    asked = []
    for path in NOTEBOOKS:
        cell = nbformat.read(path, 4).cells[-1]
        asked.append(re.findall(r'answer\("([\d.]+)", None(?:, [\w\[\]:]+)*\)  # .+', cell.source))
        assert len(asked[-1]) >= 2 and cell.cell_type == "code"
    assert [name for own in asked for name in own] == list(CHECKS)


def test_one_table_of_all_answers(tmp_path, monkeypatch):
    """By the lines in docs/teaching.md, from what `answer` writes."""
    lines = re.search(r"```python\n(from pathlib.*?)```", (ROOT / "docs/teaching.md").read_text(),
                      re.S)[1]
    monkeypatch.chdir(tmp_path)
    Path("answers").mkdir()
    for name, exercise, *given in (("maria", "6.2", (2, 1), (1, 2), (2, 1)), ("li", "6.2", "x"),
                                   ("maria", "6.3", (1, 2))):
        monkeypatch.setattr(exercises, "RECORD", Path(f"answers/{name}.csv"))
        for numbers in given:
            answer(exercise, numbers)
    exec(lines, names := {})
    table = pd.read_csv("table.csv", dtype={"exercise": str}).set_index(["student", "exercise"])
    assert table[["right", "attempts"]].T.to_dict("list") == {
        ("li", "6.2"): [False, 1], ("maria", "6.2"): [True, 2], ("maria", "6.3"): [True, 1]}
    assert pd.to_datetime(table.when).notna().all() and len(names["table"]) == 3
