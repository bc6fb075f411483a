"""What `jfbnb doctor` says of this installation, and of broken ones."""

import dataclasses
import shutil

import pytest

from jfbnb.run import doctor, reproduce
from jfbnb.run.command import main
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED


def test_a_sound_installation(capsys, image_folder):
    assert main(["doctor", "--data", str(image_folder)]) == 0
    out = capsys.readouterr().out
    assert "TROUBLE" not in out
    for part in ("Python", "torch ", "threads", "GB free", "000001.jpg", "jfb"):
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
    assert "trouble" in err


def test_a_kernel_of_another_package_is_trouble(monkeypatch):
    ((well, line),) = doctor._kernel()
    assert well and "has the package in" in line
    monkeypatch.setattr(reproduce.KernelSpecManager, "get_kernel_spec", lambda *_: type(
        "Spec", (), {"argv": ["/another/bin/python"], "env": {}}))
    ((well, line),) = doctor._kernel()
    assert not well and "/another/bin/python" in line and "no package jfbnb" in line


def test_an_nvidia_gpu_that_pytorch_cannot_use_is_trouble(monkeypatch, image_folder, capsys):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--data", str(image_folder)]) == 2
    assert "TROUBLE an NVIDIA driver is here" in capsys.readouterr().out


def test_apples_gpu_is_said_to_be_unused(monkeypatch, image_folder, capsys):
    monkeypatch.setattr(doctor.torch.backends.mps, "is_available", lambda: True)
    assert main(["doctor", "--data", str(image_folder)]) == 0
    assert "Apple's GPU is not used" in capsys.readouterr().out


def test_anothers_method_is_no_finding_before_it_is_trained(monkeypatch, tmp_path):
    theirs = dataclasses.replace(METHODS["jfb"], name="theirs")
    monkeypatch.setitem(METHODS, "theirs", theirs)
    monkeypatch.setitem(METHODS, "theirs-head", dataclasses.replace(
        METHODS["jfb-head"], name="theirs-head", head_of=theirs))
    ((well, line),) = doctor._weights(RELEASED)
    assert well and "jfb-head" in line and "theirs" not in line
    (tmp_path / "theirs.safetensors").touch()
    assert doctor.expected_methods(tmp_path) == [m.name for m in METHODS.values() if not m.smooth]


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    monkeypatch.setattr(doctor, "FOR_NOTEBOOKS", ("no-such-widgets",))
    found = list(doctor._libraries())
    assert any(well and line.startswith("no no-such-widgets: ") for well, line in found)
    assert (False, "not installed: no-such-library; `make reproduce` installs all") in found
