"""Some of the kills of `make faults`, and that it would notice what a kill had broken."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jfbnb.common import ROOT, UNFINISHED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills the Linux way")


def test_a_training_survives_being_killed(tmp_path):
    """At any time, in the middle of writing a checkpoint, and between moving two."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "faults.py", "--kills", "5",
                           "--reproduce-kills", "0", "--only-kills", "--out", tmp_path],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "report.json").read_text())["results"]
    assert len(results) == 5 and not any(result["wrong"] for result in results)
    assert sum("os.rename" in r["moment"] or "mkstemp" in r["moment"] for r in results) == 3
    assert "| training | SIGKILL |" in (tmp_path / "report.md").read_text()


def test_a_reproduce_run_survives_being_killed(tmp_path):
    """The first of its kills: in the middle of writing a checkpoint."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "faults.py", "--kills", "0",
                           "--reproduce-kills", "1", "--only-kills", "--out", tmp_path],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert "checkpoint torn" in result["moment"] and not result["wrong"]


def test_it_notices_what_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import faults

    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    save_file({"x": torch.zeros(9)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.pdf").write_bytes(b"%PDF %%EOF")
    wanted = faults.contents(tmp_path)
    assert faults.half_files(tmp_path) == [] and faults.difference(wanted, wanted) == ""
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-1])
    assert len(faults.half_files(tmp_path)) == 4
    assert faults.difference(faults.contents(tmp_path), wanted) \
        == "not the same: a.pdf, a.png, a.safetensors"
    (tmp_path / f"{UNFINISHED}b.png").touch()
    assert "b.png" in faults.left_over(tmp_path) and len(faults.half_files(tmp_path)) == 4
