"""A few hundred of the cases that `make fuzz` tries by the thousand."""

import importlib.util
import sys
import time

import pytest

from jfbnb.common import ROOT, UserError

spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz"] = fuzz  # dataclasses look their module up
spec.loader.exec_module(fuzz)


@pytest.mark.parametrize("way", fuzz.WAYS_IN, ids=lambda way: way.name)
@pytest.mark.filterwarnings("ignore")
def test_no_surprises(way, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    outcomes = fuzz.campaign(way, 30, 0)
    assert set(outcomes) <= {"ok", "refused"} and outcomes.total() >= 20


def hang(case, folder):
    while True:
        time.sleep(0.01)


def refuse(case, folder):
    raise UserError("no")


@pytest.mark.parametrize(("run", "outcome"), [
    (lambda case, folder: None, "ok"),
    (refuse, "refused"),
    (lambda case, folder: case["x"], "KeyError: \"'x'\""),
    (lambda case, folder: (folder.parent / "evil").write_text("x"), "outside: open of"),
    (lambda case, folder: (folder / "fine").write_text("x"), "ok"),
    (hang, "over 0 s"),
    (lambda case, folder: fuzz.command(["data", "celeba"]), "ok"),
    (lambda case, folder: fuzz.command(["nope"]), "refused"),
])
def test_what_it_takes_for_a_surprise(tmp_path, monkeypatch, run, outcome):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    (tmp_path / "own").mkdir()
    assert fuzz.attempt(run, {}, tmp_path / "own").startswith(outcome)


@pytest.mark.parametrize(("edit", "expected"), [
    ("flip", b"1123456789"), ("cut", b""), ("drop", b"23456789"),
    ("insert", b"\x01\x020123456789"), ("overwrite", b"\x01\x0223456789"),
    ("repeat", b"01234567890123456789")])
def test_edits(edit, expected):
    assert fuzz.mutate(b"0123456789", [(edit, 0.0, 1, b"\x01\x02")]) == expected
