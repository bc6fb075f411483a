"""Answers to exercises: the right ones, typical wrong ones, and other words."""

import re
from pathlib import Path

import nbformat
import pytest
import torch

from jfbnb.core.baselines import direct_inverse, tikhonov
from jfbnb.core.metrics import psnr
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import bundled_photos
from jfbnb.run.checkout import ROOT
from jfbnb.teaching.exercises import EXERCISES, RIGHT, Choice, Number, answer

NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.fixture(scope="module")
def x():
    return bundled_photos("test", 128).as_float()[:2]


@pytest.mark.parametrize("name", EXERCISES)
def test_right_and_wrong(name, capsys):
    question = EXERCISES[name]
    wrong = ([*question.wrong] if isinstance(question, Choice)
             else [*question.slips, 12345.0])
    assert question.judge(question.right) == RIGHT
    for given in wrong:
        assert question.judge(given).startswith("not so: ")
    answer(name)
    answer(name, question.right)
    assert capsys.readouterr().out == f"{name}: no answer yet\n{name}: right\n"


def test_other_words_and_spellings():
    assert EXERCISES["1.1"].judge(" Better ") == RIGHT
    assert EXERCISES["1.1"].judge("wider") == "'wider' is none of better, worse"
    assert EXERCISES["1.2"].judge("much") == "'much' is no number"
    assert EXERCISES["3.1"].judge(0.1) == RIGHT
    assert "sign" in EXERCISES["1.2"].judge(-EXERCISES["1.2"].right)
    assert "variance" in EXERCISES["1.3"].judge(EXERCISES["1.3"].right ** 2)


def test_numbers_are_those_of_an_experiment(x):
    A, noise = get_protocol("paper").operator(), get_protocol("paper").noise_std
    rounded = (A(x) * 255).round() / 255
    assert EXERCISES["1.2"].judge(psnr(direct_inverse(A, rounded), x).mean().item()) == RIGHT
    sigma = EXERCISES["1.3"].right
    reached = psnr(direct_inverse(A, measure(A, x, sigma, 0, range(2))), x).mean().item()
    assert reached == pytest.approx(30, abs=1)
    weights = torch.logspace(-3, -0.5, 51).tolist()
    best = []
    for noise_std in (noise, 2 * noise):
        d = measure(A, x, noise_std, 0, range(2))
        best.append(max(weights, key=lambda lam, d=d: psnr(tikhonov(A, d, lam), x).mean().item()))
    assert EXERCISES["2.3"].judge(best[1] / best[0]) == RIGHT


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_each_notebook_asks_for_its_answers(path: Path):
    """In its last cell, one line an exercise, unanswered; all choices are named there."""
    cell = nbformat.read(path, 4).cells[-1]
    asked = re.findall(r'answer\("([\d.]+)", None\)  # (.+)', cell.source)
    own = [name for name in EXERCISES if name.startswith(f"{int(path.stem[:2])}.")]
    assert [name for name, _ in asked] == own and cell.cell_type == "code"
    for name, words in asked:
        if isinstance(EXERCISES[name], Number):
            assert "?" in words
        else:
            for word in (EXERCISES[name].right, *list(EXERCISES[name].wrong)[:1]):
                assert f'"{word}"' in words
