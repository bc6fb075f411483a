"""What every module needs: errors as notebooks show them, and freed memory."""

import platform
import subprocess
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell

from jfbnb.common import pick_device
from jfbnb.core.protocols import get_protocol


def test_a_setup_cell_may_be_run_again():
    """It puts what a parameter names in the place of the name."""
    for find, name in ((get_protocol, "code"), (pick_device, "cpu")):
        found = find(name)
        assert found != name and find(found) is found


def test_bad_input_is_one_line_in_a_notebook_too(tmp_path, monkeypatch, capsys):
    """As in notebook 5, opened first. Other errors keep their traceback."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    shell = InteractiveShell()
    shell.run_cell("from pathlib import Path\nfrom jfbnb.training.tuning import Tuning")
    assert not shell.run_cell(f"Tuning.load(Path({str(tmp_path / 'tuning_jfb.json')!r}))").success
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("UserError: no tuned parameters at") and "tune the methods first" in line
    shell.run_cell("1 / 0")
    assert "Traceback" in capsys.readouterr().out


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no such setting elsewhere")
def test_freed_memory_is_kept():
    script = """
import resource, torch
from jfbnb.common import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(7_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
faults()
print(faults())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True)
    before, after = map(int, done.stdout.split())
    assert after < 0.1 * before
