"""What `jfbnb doctor` says of this installation, and of broken ones."""

import dataclasses
import itertools
import shutil

import pytest

from jfbnb.run import doctor
from jfbnb.run.command import main
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED, expected_methods


def test_a_sound_installation(capsys, image_folder, monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    assert main(["doctor", "--data", str(image_folder)]) == 0
    out = capsys.readouterr().out
    assert "TROUBLE" not in out
    for part in ("Python", "torch ", "threads", "no no-such-library: ", "GB free", "000001.jpg",
                 "jfb"):
        assert part in out


def damage_weights(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(RELEASED, folder)
    (folder / "jfb.safetensors").write_bytes(b"no weights")
    return ["--weights", str(folder)]


def empty_data(tmp_path):
    (tmp_path / "empty").mkdir()
    return ["--data", str(tmp_path / "empty")]


@pytest.mark.parametrize(("make", "message"), [
    (damage_weights, "method jfb: "), (empty_data, "empty"),
    (lambda tmp_path: ["--weights", str(tmp_path / "nowhere")], "no tuned parameters")])
def test_trouble_is_named_and_the_status_is_not_zero(capsys, tmp_path, make, message):
    assert main(["doctor", *make(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert any(line.startswith("TROUBLE") and message in line for line in out.splitlines())
    assert "TROUBLE" in err


def test_gpus_that_are_not_used(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.backends.mps, "is_available", lambda: True)
    found = list(itertools.islice(doctor.examine("", None), 6))
    assert any(not well and line.startswith("there is an NVIDIA driver") for well, line in found)
    assert any(well and line.startswith("Apple's GPU is not used") for well, line in found)


def test_anothers_method_is_no_finding_before_it_is_trained(monkeypatch, tmp_path):
    theirs = dataclasses.replace(METHODS["jfb"], name="theirs")
    monkeypatch.setitem(METHODS, "theirs", theirs)
    assert "jfb" in expected_methods(RELEASED)
    assert "theirs" not in expected_methods(RELEASED)
    (tmp_path / "theirs.safetensors").touch()
    assert "theirs" in expected_methods(tmp_path)
