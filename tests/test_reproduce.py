"""The runner, on a small suite of its own: three notebooks, each with a parameter and a file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import nbformat
import pytest
import torch
from filelock import FileLock

from jfbnb import reproduce as runner
from jfbnb.cli import main
from jfbnb.common import ROOT, UNFINISHED, UserError

NOTEBOOK = """
from pathlib import Path
import time
runs, figures = Path("../runs") / profile, Path("../figures") / profile
for folder in (runs, figures):
    folder.mkdir(parents=True, exist_ok=True)
earlier = "".join(sorted(p.read_text() for p in runs.glob("*.txt") if p.name < "{name}"))
time.sleep(delay if "{name}" == "02_b" else 0)
(runs / "{name}.txt").write_text(f"{name} {{size}} after [{{earlier}}]")
(figures / "{name}.png").write_text("png")
(figures / "{name}.pdf").write_text("pdf")
"""
PARAMETERS = 'profile = "quick"\nsize = 1\ndelay = 0.0\ndata = "bundled"\nrate = 0.5'


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    make_suite(tmp_path)
    point_runner_at(tmp_path, monkeypatch.setattr)
    return tmp_path


def make_suite(folder: Path) -> None:
    notebooks = folder / "notebooks"
    (notebooks / "profiles").mkdir(parents=True)
    (folder / "jfbnb").mkdir()
    (folder / "data").mkdir()
    (folder / "data" / "published_table2.csv").write_text("method\n")
    (notebooks / "profiles" / "quick.yaml").write_text("size: 1\n")
    for name in ("01_a", "02_b", "03_c"):
        cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(NOTEBOOK.format(name=name))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
            "name": "python3", "display_name": "Python 3", "language": "python"}}),
            notebooks / f"{name}.ipynb")


def point_runner_at(folder: Path, setattr_=setattr) -> None:
    setattr_(runner, "ROOT", folder)
    setattr_(runner, "NOTEBOOKS", folder / "notebooks")
    setattr_(runner, "PROFILES", folder / "notebooks" / "profiles")
    setattr_(runner, "STEPS", tuple(runner.Step(name, (f"{name}.txt",), (name,))
                                    for name in ("01_a", "02_b", "03_c")))


def go(**options) -> list[str]:
    """Run the suite; return for each step whether it was skipped or took its time."""
    lines = []
    runner.reproduce("quick", options.pop("overrides", {}), log=lines.append, **options)
    return ["skipped" if "skipped" in line else "ran" for line in lines
            if "skipped" in line or "took" in line]


def test_runs_then_skips_then_runs_what_changed(suite):
    assert go() == ["ran", "ran", "ran"]
    assert go() == ["skipped", "skipped", "skipped"]
    # Another value of a parameter: all three depend on it.
    assert go(overrides={"size": 2}) == ["ran", "ran", "ran"]
    assert "01_a 2" in (suite / "runs/quick/03_c.txt").read_text()
    # Code of the second notebook: the first is untouched, the third sees the same artefact.
    path = suite / "notebooks" / "02_b.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells[-1].source += "\n# a comment"
    nbformat.write(notebook, path)
    assert go(overrides={"size": 2}) == ["skipped", "ran", "skipped"]
    # Prose changes nothing.
    notebook.cells.append(nbformat.v4.new_markdown_cell("prose"))
    nbformat.write(notebook, path)
    assert go(overrides={"size": 2}) == ["skipped"] * 3
    # A damaged figure: only its own step; a changed artefact: its step, then all after it skip,
    # because it comes out the same.
    (suite / "figures/quick/03_c.png").write_text("damaged")
    assert go(overrides={"size": 2}) == ["skipped", "skipped", "ran"]
    (suite / "runs/quick/01_a.txt").write_text("damaged")
    assert go(overrides={"size": 2})[0] == "ran"
    # Package code: everything.
    (suite / "jfbnb" / "new.py").write_text("x = 1\n")
    assert go(overrides={"size": 2}) == ["ran"] * 3
    # A damaged marker is no marker.
    (suite / "runs/quick/markers/02_b.json").write_text("{")
    assert go(overrides={"size": 2}) == ["skipped", "ran", "skipped"]


def test_only_and_force(suite):
    with pytest.raises(UserError, match=r"needs 01_a.txt of step 01: run that one first"):
        go(only="02")
    go()
    assert go(only="02") == ["skipped"]
    assert go(only="02", force=True) == ["ran"]
    with pytest.raises(UserError, match="no notebook '07'"):
        go(only="07")


@pytest.mark.parametrize(("overrides", "message"), [
    ({"sise": 3}, "unknown parameter 'sise': the notebooks have data, delay, profile, rate, size"),
    ({"size": "big"}, "parameter size takes a value like 1, not 'big'"),
    ({"size": 1.5}, "takes a value like 1"),
    ({"size": True}, "takes a value like 1"),
    ({"data": "nowhere"}, "no data at"),
    ({"data": "a\0b"}, "parameter data takes a value like"),
    ({"rate": float("nan")}, "parameter rate takes a value like 0.5, not nan"),
    ({"profile": "../elsewhere"}, "use --folder"),
])
def test_bad_parameters_are_refused_before_anything_runs(suite, overrides, message):
    with pytest.raises(UserError, match=message):
        go(overrides=overrides)
    assert not (suite / "runs").exists()


def test_an_integer_will_do_for_a_float(suite):
    assert runner.step_parameters(runner.STEPS, {"rate": 1})["01_a"]["rate"] == 1


def test_unknown_profile(suite, capsys):
    assert main(["reproduce", "--profile", "fast"]) == 2
    assert "unknown profile 'fast': choose one of quick" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(capsys):
    assert main(["reproduce", "-p", "device=cuda"]) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("size", "write it as NAME=VALUE"), ("size=[1", "-p size: its value is no YAML"),
    ("size=2024-13-99", "is no YAML"), ("size=&a [*a]", "is no YAML: an alias"),
    ("size=0x" + "f" * 5000, "is no YAML: an integer is too large")])
def test_malformed_parameter(suite, capsys, text, message):
    assert main(["reproduce", "-p", text]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("folder", ["..", "../x", "/tmp/x", "a/../../b", ".", "a\nb"])
def test_a_folder_elsewhere(suite, folder):
    with pytest.raises(UserError, match="give the name of a folder inside runs/"):
        go(folder=folder)
    assert not (suite / "runs").exists()


def test_a_profile_that_is_none(suite):
    (suite / "notebooks/profiles/quick.yaml").write_text("- size")
    with pytest.raises(UserError, match=r"quick\.yaml is no profile"):
        go()


@pytest.mark.parametrize("text", [
    "[]", "3", '{"inputs": 3}', "[" * 100_000, "\xff", "{}",
    '{"inputs": {}, "outputs": [], "parameters": {}, "seconds": 1.0}'])
def test_a_marker_that_is_none(tmp_path, text):
    (tmp_path / "m.json").write_bytes(text.encode("latin1"))
    assert runner.read_marker(tmp_path / "m.json") == {}
    assert runner._durations(tmp_path / "m.json") == {}


def test_a_marker_must_name_every_output(tmp_path):
    assert not runner.is_done({"inputs": {}, "outputs": {}}, {}, [Path("a")], tmp_path)


def test_what_a_killed_run_left_unfinished_is_removed(suite):
    left = suite / "runs" / "quick" / "checkpoints" / f"{UNFINISHED}abc.new"
    left.parent.mkdir(parents=True)
    left.touch()
    go()
    assert not left.exists()


def test_a_failing_notebook_is_named_and_earlier_outputs_stay(suite):
    go()
    before = (suite / "runs/quick/02_b.txt").read_text()
    path = suite / "notebooks" / "02_b.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(1, nbformat.v4.new_code_cell("raise ValueError('no such luck')"))
    nbformat.write(notebook, path)
    with pytest.raises(UserError, match=r"02_b stopped: ValueError: no such luck \(see runs/quick"):
        go()
    assert (suite / "runs/quick/02_b.txt").read_text() == before
    assert not (suite / "runs/quick/markers/02_b.json").exists()


def test_a_notebook_that_does_not_write_its_outputs(suite, monkeypatch):
    steps = (runner.Step("01_a", ("other.txt",), ()),)
    monkeypatch.setattr(runner, "STEPS", steps)
    with pytest.raises(UserError, match=r"finished without writing runs/quick/other\.txt"):
        go()


def test_failed_checks_are_shown(suite):
    path = suite / "notebooks" / "01_a.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(
        "from jfbnb.common import check\ncheck('pigs fly', False)\ncheck('pigs walk', True)"))
    nbformat.write(notebook, path)
    lines = []
    runner.reproduce("quick", {}, only="01", log=lines.append)
    assert [line.strip() for line in lines if "pigs" in line] == ["NOT MET: pigs fly"]


def test_provenance(suite):
    go(overrides={"size": 2})
    record = json.loads((suite / "figures/quick/provenance.json").read_text())
    assert record["profile"] == "quick" and "torch" in record["packages"]
    step = record["steps"]["02_b"]
    assert step["parameters"] == {"profile": "quick", "size": 2, "delay": 0.0,
                                  "data": "bundled", "rate": 0.5}
    assert step["seconds"] > 0 and {"notebook", "package", "01_a.txt"} <= set(step["inputs"])
    lines = []
    runner.reproduce("quick", {"size": 3}, log=lines.append)
    assert "expected" in lines[0] and "unknown" not in lines[0]


def test_killed_anywhere_the_next_run_goes_on(suite, tmp_path):
    """SIGKILL in the second notebook: the first is skipped, the second runs again, whole."""
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_reproduce import point_runner_at
        from jfbnb.reproduce import reproduce
        point_runner_at(Path({str(suite)!r}))
        reproduce("quick", {{"delay": 60.0}})
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)
    marker = suite / "runs/quick/markers/01_a.json"
    deadline = time.monotonic() + 120
    while not (marker.exists() and (suite / "runs/quick/02_b.ipynb").exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Waiting 60 s again would be too long, and delay is among the marker's inputs.
    quick = runner.step_parameters(runner.STEPS, runner.load_profile("quick"))["01_a"]
    record = json.loads(marker.read_text())
    record["inputs"] = runner.input_hashes(runner.STEPS[0], quick, suite / "runs/quick")
    marker.write_text(json.dumps(record))
    assert go() == ["skipped", "ran", "ran"]
    assert "02_b 1" in (suite / "runs/quick/02_b.txt").read_text()


def test_the_suites_own_steps_and_profiles():
    """Every profile's parameters exist, and plain papermill takes the same files."""
    for profile in ("quick", "cpu", "paper"):
        parameters = runner.step_parameters(runner.STEPS, runner.load_profile(profile))
        assert parameters["04_jfb_training"]["profile"] == profile
    assert [step.name[:2] for step in runner.STEPS] == ["01", "02", "03", "04", "05"]


def test_quick_is_what_the_notebooks_say_themselves():
    quick = runner.load_profile("quick")
    for step in runner.STEPS:
        own = runner.notebook_parameters(runner.NOTEBOOKS / f"{step.name}.ipynb")
        assert {k: quick[k] for k in own if k in quick} == {k: v for k, v in own.items()
                                                          if k in quick}


def test_weights_to_take_must_be_there(tmp_path, capsys):
    assert main(["reproduce", "--weights", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "no denoiser.safetensors in the weights folder" in message and "empty" in message


def test_weights_taken_are_among_what_a_step_depends_on():
    step = next(s for s in runner.STEPS if s.name.startswith("04"))
    released = os.path.relpath(ROOT / "data" / "weights", runner.NOTEBOOKS)
    assert list(runner.weights_taken(step, {"weights": released})) == ["weights/jfb.safetensors"]
    assert runner.weights_taken(step, {"weights": ""}) == {}


def test_two_runs_in_one_folder(suite):
    """The second says so and touches nothing; when the first has ended it may run."""
    runs = suite / "runs" / "quick"
    runs.mkdir(parents=True)
    with FileLock(runs / ".lock"), pytest.raises(UserError, match="another run is writing"):
        go()
    assert not (runs / "markers").exists()
    assert go() == ["ran", "ran", "ran"]
