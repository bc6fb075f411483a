"""Sweeps: what they refuse, that they skip and retry, and what they sum up."""

import os
import sys
from pathlib import Path

import pandas as pd
import pytest

from jfbnb.common import UserError, parse_yaml
from jfbnb.run import sweep as module
from jfbnb.run.command import main

distributed = pytest.importorskip("distributed", reason="pip install 'jfbnb[sweep]'")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "seeds.yaml"
    path.write_text("profile: quick\nparameters:\n  seed: [0, 1]\n  protocol: [paper]\n")
    return path


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "is not a sweep"), ("profile: quick", "is not a sweep"), (": :", "is not YAML"),
    ("profile: quick\nparameters: {seed: 3}", "list of values"),
    ("profile: quick\nparameters: {sede: [3]}", "unknown parameter 'sede'"),
    ("profile: quick\nparameters: {profile: [a]}", "leave `profile` out"),
    ("profile: quick\nparameters: {budget: [1, 0]}", "budget must be positive, not 0")])
def test_bad_sweeps_are_refused_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert main(["sweep", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_every_point_has_a_folder_of_its_own():
    names = [module.point_name(p) for p in module.points({"seed": [0, 1], "crop": [32, 48]})]
    assert names == ["crop=32,seed=0", "crop=48,seed=0", "crop=32,seed=1", "crop=48,seed=1"]


def test_a_worker_that_dies_is_replaced_and_its_point_tried_again(file, tmp_path, monkeypatch):
    """Each point kills its first worker, and is done by the second."""
    base = str(tmp_path)

    def die_once(profile, folder, values, data):
        first = Path(base, f"tried-{values['seed']}")
        if not first.exists():
            first.touch()
            os._exit(1)
        target = Path(base, "figures", folder)
        target.mkdir(parents=True, exist_ok=True)  # a lost result is made again
        seed = values["seed"]
        table = pd.DataFrame({"Method": ["JFB", "Mine"], "PSNR (dB)": [30.0 + seed, 31 + 3 * seed],
                              "SSIM": [0.9, 0.9]})
        table.to_csv(target / "table2_comparison.csv", index=False)
        return folder

    monkeypatch.setattr(module, "run_point", die_once)
    monkeypatch.setenv("JFBNB_WORK", base)
    lines = []
    module.sweep(file, None, None, lines.append)
    assert len(lines) == 2 and all(line.startswith("done: sweep-seeds/") for line in lines)
    summary = pd.read_csv(tmp_path / "figures" / "sweep-seeds" / "summary.csv")
    assert summary["runs"].tolist() == [2, 2]
    assert summary["PSNR (dB)"].tolist() == [30.5, 32.5]
    assert summary["± PSNR"].tolist() == [0.5, 1.5]


def test_points_that_fail_are_named(file, monkeypatch):
    def fail(profile, folder, values, data):
        raise RuntimeError(f"{folder}: no luck")

    monkeypatch.setattr(module, "run_point", fail)
    lines = []
    with pytest.raises(UserError, match="2 of 2 points failed"):
        module.sweep(file, None, None, lines.append)
    assert all("no luck" in line for line in lines)


@pytest.mark.parametrize("value", [1, 1e-5, 1e16, "5e-4", "010", "12:30", "code", "λ 😀", "a: b",
                                   True, "no", "", {"jfb": 1.0}, ["jfb", "deq"], "two\nlines"])
def test_a_point_is_one_reproduce_with_its_values(monkeypatch, value):
    commands = []
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: commands.append(command)
                        or type("Done", (), {"returncode": 0})())
    module.run_point("quick", "sweep-x/p", {"p": value}, None)
    (words,) = commands
    assert words[:-2] == [sys.executable, "-m", "jfbnb", "reproduce", "--profile", "quick",
                          "--folder", "sweep-x/p"]
    name, _, text = words[-1].partition("=")
    found = parse_yaml(text, "it")
    assert name == "p" and found == value and type(found) is type(value)


def test_a_scheduler_that_is_none(file):
    with pytest.raises(UserError, match="cannot reach the scheduler nonsense://x"):
        module.sweep(file, "nonsense://x", None)
