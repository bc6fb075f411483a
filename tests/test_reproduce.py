"""The runner, on a small suite of its own: three notebooks, each with a parameter and a file."""

import inspect
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from filelock import FileLock

from jfbnb.common import CHECK_FAILED, UNFINISHED, UserError, check, parse_yaml
from jfbnb.run import checkout
from jfbnb.run import reproduce as runner
from jfbnb.run.command import main
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import RELEASED

NOTEBOOK = """
import time
{imports}
from jfbnb.run.checkout import workplace
runs, figures = workplace(profile)
for folder in (runs, figures):
    folder.mkdir(parents=True, exist_ok=True)
earlier = "".join(sorted(p.read_text() for p in runs.glob("*.txt") if p.name < "{name}"))
time.sleep(delay if "{name}" == "02_b" else 0)
(runs / "{name}.txt").write_text(f"{name} {{size}} after [{{earlier}}]")
(figures / "{name}.png").write_text("png")
(figures / "{name}.pdf").write_text("pdf")
"""
PACKAGE = {
    "__init__.py": "", "run/__init__.py": "", "run/doctor.py": "", "methods.py": "",
    "maps.py": "", "kernels.py": "", "operators.py": "def f():\n    import jfbnb.kernels as k\n",
    "run/checkout.py": inspect.getsource(checkout),
    "common.py": f"CHECK_FAILED = {CHECK_FAILED!r}\nclass UserError(Exception): ...\n"
                 f"{inspect.getsource(check)}"}
PARAMETERS = """profile = "quick"
size = 1
delay = 0.1
data = "bundled"
rate = 0.5
seed = 0
depth = 6
penalty = 0.1
names = {}
bf16 = "auto"
weights = ""
"""


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    """A checkout of its own: three notebooks, and a package that is quick to import."""
    monkeypatch.delenv("JFBNB_WORK", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the kernels
    make_suite(tmp_path)
    point_runner_at(tmp_path, monkeypatch.setattr)
    return tmp_path


def make_suite(folder: Path) -> None:
    for name, code in PACKAGE.items():
        (folder / "jfbnb" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "jfbnb" / name).write_text(code)
    notebooks = folder / "notebooks"
    (notebooks / "profiles").mkdir(parents=True)
    (notebooks / "profiles" / "quick.yaml").write_text("size: 1\n")
    for name in ("01_a", "02_b", "03_c"):
        imports = "import jfbnb.operators" if name == "01_a" else ""
        cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(NOTEBOOK.format(name=name, imports=imports))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
            "name": "python3", "display_name": "Python 3", "language": "python"}}),
            notebooks / f"{name}.ipynb")


def point_runner_at(folder: Path, setattr_=setattr) -> None:
    setattr_(checkout, "ROOT", folder)
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
    # Package code: all notebooks, but for what only runs them.
    for name, expected in (("run/doctor.py", ["skipped"] * 3), ("kernels.py", ["ran"] * 3)):
        with open(suite / "jfbnb" / name, "a") as file:
            file.write("\n# a comment\n")
        assert go(overrides={"size": 2}) == expected, name
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
    ({"sise": 3}, "unknown parameter 'sise': the notebooks have bf16, data, delay, depth, "),
    ({"size": "big"}, "parameter size takes a value like 1, not 'big'"),
    ({"size": 1.5}, "takes a value like 1"),
    ({"size": True}, "takes a value like 1"),
    ({"data": "nowhere"}, "no data at"),
    ({"data": "a\0b"}, "parameter data takes a value like"),
    ({"rate": float("nan")}, "parameter rate takes a value like 0.5, not nan"),
    ({"profile": "../elsewhere"}, "use --folder"),
    ({"size": 0}, "parameter size must be positive, not 0"),
    ({"rate": -0.5}, "parameter rate must be positive, not -0.5"),
    ({"rate": 0}, "parameter rate must be positive"),
    ({"seed": -1}, "parameter seed must be at least 0, not -1"),
    ({"depth": 1}, "parameter depth must be at least 2, not 1"),
    ({"names": {"deq": 0}}, "parameter names must be positive"),
    ({"names": {"deq": "much"}}, "parameter names takes a value like {}"),
    ({"names": {1: 2}}, "parameter names takes a value like {}"),
    ({"bf16": "yes"}, "bf16"),
    ({"bf16": True}, "parameter bf16 takes a value like 'auto', not True"),
])
def test_bad_parameters_are_refused_before_anything_runs(suite, overrides, message):
    with pytest.raises(UserError, match=message):
        go(overrides=overrides)
    assert not (suite / "runs").exists()


def test_an_integer_will_do_for_a_float_and_some_numbers_may_be_0(suite):
    fine = {"rate": 1, "seed": 0, "penalty": 0, "depth": 2, "names": {"deq": 2, "unrolled": 0.1}}
    assert fine.items() <= runner.step_parameters(runner.STEPS, fine)["01_a"].items()


def test_a_profile_is_held_to_the_same_rules(suite, capsys):
    (suite / "notebooks/profiles/quick.yaml").write_text("size: 0\n")
    assert main(["reproduce"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("parameter size must be positive, not 0")


def test_unknown_profile(suite, capsys):
    assert main(["reproduce", "--profile", "fast"]) == 2
    assert "unknown profile 'fast': choose one of quick" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(capsys):
    assert main(["reproduce", "-p", "device=cuda"]) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "message"), [
    ("size", "write it as NAME=VALUE"), ("size=[1", "-p size: its value is no YAML"),
    ("size=12:30", "takes a value like 1, not '12:30'"), ("size=&a [*a]", "takes a value like 1"),
    ("size=0x10", "takes a value like 1"), ("size=" + "9" * 5000, "is no YAML"),
    ("size=yes", "not 'yes'"), ("size=", "not ''")])
def test_malformed_parameter(suite, capsys, text, message):
    assert main(["reproduce", "-p", text]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("folder", ["..", "../x", "/tmp/x", "a/../../b", ".", "a\nb"])
def test_a_folder_elsewhere(suite, folder):
    with pytest.raises(UserError, match="give the name of a folder inside runs/"):
        go(folder=folder)
    assert not (suite / "runs").exists()


@pytest.mark.parametrize(("text", "value"), [
    ("5e-4", 5e-4), ("010", 10), ("12:30", "12:30"), ("no", "no"), ("on", "on"), ("true", True),
    ("-3", -3), (".5", 0.5), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("1e3", 1000.0),
    ("{a: 1, b: 5e-4}", {"a": 1, "b": 5e-4}), ("weights:", {"weights": ""}), ("'5'", "5")])
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "it")
    assert found == value and type(found) is type(value)


def test_nothing_is_the_empty_text(suite, monkeypatch):
    given = []
    monkeypatch.setattr(runner, "reproduce", lambda profile, overrides, *_, **__: given.append(
        overrides) or [])
    assert main(["reproduce", "-p", "weights="]) == 0 and given == [{"weights": ""}]


def test_a_profile_that_is_none(suite):
    (suite / "notebooks/profiles/quick.yaml").write_text("- size")
    with pytest.raises(UserError, match=r"quick\.yaml is no profile"):
        go()


@pytest.mark.parametrize("text", [
    "[]", "3", '{"inputs": 3}', "[" * 100_000, "\xff", "{}"])
def test_a_marker_that_is_none(tmp_path, text):
    (tmp_path / "m.json").write_bytes(text.encode("latin1"))
    assert runner.read_marker(tmp_path / "m.json") == {}


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
    assert {"profile": "quick", "size": 2, "data": "bundled", "weights": ""}.items() \
        <= step["parameters"].items()
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
        from jfbnb.run.reproduce import reproduce
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
    for profile in ("quick", "cpu", "paper", "best"):
        given = runner.load_profile(profile) | {"device": "cpu"}
        parameters = runner.step_parameters(runner.STEPS, given)
        assert parameters["04_jfb_training"]["profile"] == profile
    assert [step.name[:2] for step in runner.STEPS] == ["01", "02", "03", "04", "05", "06"]


def test_quick_is_what_the_notebooks_say_themselves():
    quick = runner.load_profile("quick")
    for step in runner.STEPS:
        own = runner.notebook_parameters(step.notebook)
        assert {k: quick[k] for k in own if k in quick} == {k: v for k, v in own.items()
                                                          if k in quick}


def test_weights_to_take_must_be_there(tmp_path, capsys):
    assert main(["reproduce", "--weights", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "no denoiser.safetensors in the weights folder" in message and "empty" in message


def test_weights_taken_are_among_what_a_step_depends_on():
    step = next(s for s in runner.STEPS if s.name.startswith("04"))
    assert list(runner.weights_taken(step, {"weights": str(RELEASED)})) \
        == ["weights/jfb.safetensors"]
    assert runner.weights_taken(step, {"weights": ""}) == {}


def test_two_runs_in_one_folder(suite):
    """The second says so and touches nothing; when the first has ended it may run."""
    runs = suite / "runs" / "quick"
    runs.mkdir(parents=True)
    with FileLock(runs / ".lock"), pytest.raises(UserError, match="another run is writing"):
        go()
    assert not (runs / "markers").exists()
    assert go() == ["ran", "ran", "ran"]


def test_a_protocol_whose_pictures_are_smaller_than_their_scenes_is_refused():
    with pytest.raises(UserError, match="choose paper or code"):
        runner.reproduce("quick", {"protocol": "camera"})


def test_notebook_5_trains_every_method_that_has_a_loss():
    """And those that its figure of other conditions compares a second time."""
    (step,) = (step for step in runner.STEPS if step.name.startswith("05"))
    trained = {name for name, m in METHODS.items() if m.trainable and not m.smooth}
    again = {f"conditions/{name}" for name in trained if METHODS[name].compared}
    for both, expected in ((False, trained - {"jfb"}), (True, (trained - {"jfb"}) | again)):
        artefacts = {name.removesuffix(".safetensors")
                     for name in step.made({"over_conditions": both})
                     if name.endswith(".safetensors")}
        assert artefacts == expected and "conditions/jfb" in again
    assert "teaching/published_table2.csv" in step.reads
    assert all((checkout.ROOT / "jfbnb" / name).is_file() for name in step.reads)


def test_methods_of_others_count(suite, monkeypatch):
    def hashes(**changes) -> dict[str, str]:
        other = replace(METHODS["tikhonov"], name="mine", **changes)
        monkeypatch.setattr(runner, "plugins", lambda: [other])
        return runner.input_hashes(step, {}, suite)

    step = runner.STEPS[0]
    assert hashes() == hashes() != hashes(noise_power=0.5)
    assert hashes() != hashes(restore=lambda A, d, s, prior_scale: (d, None))


@pytest.mark.parametrize("argv", [[sys.executable], ["python"], ["python3"]])
def test_a_kernel_with_another_package_is_refused(suite, monkeypatch, capsys, argv):
    kernel = type("Spec", (), {"argv": argv, "env": {}})
    monkeypatch.setattr(runner.KernelSpecManager, "get_kernel_spec", lambda *_: kernel)
    assert runner.check_kernel() == suite / "jfbnb"
    other = suite / "other" / "jfbnb"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    kernel.env = {"PYTHONPATH": str(other.parent)}
    assert main(["reproduce"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"with the package in {other}, not with that in {suite / 'jfbnb'}" in line
    assert not (suite / "runs/quick/01_a.ipynb").exists()


@pytest.mark.parametrize("argv", [["/nowhere/python"], ["/bin/false"]])
def test_a_kernel_without_the_package_is_refused(suite, monkeypatch, argv):
    kernel = type("Spec", (), {"argv": argv, "env": {}})
    monkeypatch.setattr(runner.KernelSpecManager, "get_kernel_spec", lambda *_: kernel)
    with pytest.raises(UserError, match=f"{argv[0]}.* with no package jfbnb, not with"):
        go()


# --- where things are ---------------------------------------------------------------------------


def test_a_path_is_below_the_current_folder_or_the_checkout(suite, tmp_path, monkeypatch):
    for folder in ("here/images", "data/celeba", "images", "home/images"):
        (suite / folder).mkdir(parents=True)
    monkeypatch.chdir(suite / "here")
    monkeypatch.setenv("HOME", str(suite / "home"))
    assert checkout.find_path("images") == str(suite / "here" / "images")
    assert checkout.find_path("data/celeba") == str(suite / "data" / "celeba")
    assert checkout.find_path("../images") == str(suite / "images")
    assert checkout.find_path("~/images") == str(suite / "home" / "images")
    assert checkout.find_path(str(suite)) == str(suite)
    assert checkout.find_path("") == "" and checkout.find_path("bundled") == "bundled"


def test_every_path_goes_to_the_notebooks_by_that_rule(suite, image_folder, monkeypatch):
    (suite / "here").mkdir()
    monkeypatch.chdir(suite / "here")
    seen = []
    monkeypatch.setattr(runner, "_run_steps", lambda steps, parameters, *_: seen.append(
        (parameters["01_a"]["data"], parameters["01_a"]["weights"])))
    expected = str(image_folder)
    assert Path(expected) == suite / "images"
    assert main(["reproduce", "--data", "../images", "--weights", "images"]) == 0
    assert main(["reproduce", "-p", "data=images", "-p", "weights=../images"]) == 0
    (suite / "notebooks/profiles/quick.yaml").write_text("data: images\nweights: images\n")
    assert main(["reproduce"]) == 0
    assert seen == [(expected, expected)] * 3


def test_no_path_of_the_machine_in_provenance(suite, image_folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere")
    go(overrides={"data": str(image_folder), "weights": str(outside)})
    text = (suite / "figures/quick/provenance.json").read_text()
    assert str(suite) not in text and str(outside) not in text
    own = json.loads(text)["steps"]["01_a"]["parameters"]
    assert (own["data"], own["weights"]) == ("images", outside.name)


def test_papermill_from_anywhere_writes_into_the_checkout(suite, tmp_path_factory, monkeypatch):
    import papermill

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    notebook = str(suite / "notebooks" / "01_a.ipynb")
    papermill.execute_notebook(notebook, "out.ipynb", progress_bar=False)
    assert (suite / "runs/quick/01_a.txt").is_file() and len(list(elsewhere.iterdir())) == 1
    monkeypatch.setenv("JFBNB_WORK", str(elsewhere / "work"))
    papermill.execute_notebook(notebook, "out.ipynb", progress_bar=False)
    assert (elsewhere / "work/figures/quick/01_a.png").is_file()
    monkeypatch.setenv("JFBNB_WORK", "build/copy")  # below the checkout, not here
    papermill.execute_notebook(notebook, "out.ipynb", progress_bar=False)
    assert (suite / "build/copy/figures/quick/01_a.png").is_file()


def test_the_runner_follows_too_where_the_work_is_elsewhere(suite, monkeypatch):
    monkeypatch.setenv("JFBNB_WORK", str(suite / "work"))
    assert go(only="01") == ["ran"] and go(only="01") == ["skipped"]
    assert (suite / "work/figures/quick/provenance.json").is_file()
    assert not (suite / "runs").exists()


def test_a_clone_opened_with_the_package_of_a_wheel(suite, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", suite / "site-packages")
    monkeypatch.chdir(suite / "notebooks" / "profiles")
    assert checkout.run_dirs("quick") == (suite / "runs/quick", suite / "figures/quick")
    with pytest.raises(UserError, match="reproduce, train, sweep and verify need the notebooks"):
        checkout.need_checkout()
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="JFBNB_WORK"):
        checkout.run_dirs("quick")
