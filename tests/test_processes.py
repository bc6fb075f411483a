"""Two processes under torchrun do what one does. They talk over the loopback alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from in_two_processes import train_in
from safetensors.torch import load_file

from jfbnb.training import loop


def torchrun(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         Path(__file__).with_name("in_two_processes.py"), *map(str, words)],
        capture_output=True, text=True, timeout=120, check=False)


def test_two_processes_give_the_weights_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "RECORDS", 1)
    model, history = train_in(tmp_path / "one")
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "end.safetensors")
    for name, value in model.state_dict().items():
        assert (found[name] - value).norm() <= 1e-8 * value.norm(), name
    card = json.loads((tmp_path / "end.json").read_text())
    for record, wanted in zip(card["history"], history, strict=True):
        del record["seconds"], wanted["seconds"]
        assert record == pytest.approx(wanted, rel=1e-8)


def test_a_dead_process_ends_the_other_and_leaves_a_checkpoint(tmp_path, monkeypatch):
    done = torchrun(tmp_path, "die")
    assert done.returncode != 0
    assert "process 0 stopped" in done.stderr and "start the same command again" in done.stderr
    monkeypatch.setattr(loop, "RECORDS", 1)
    lines = []
    train_in(tmp_path, True, lines.append)  # the key has the flag in it, and no process 1 to die
    assert lines[0] == "resumed after epoch 2 of 3"
