"""The runner, on a small suite of its own: three notebooks, each with a parameter and a file."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from filelock import FileLock

from jfbnb.common import CHECK_FAILED, UNFINISHED, UserError, check, parse_yaml
from jfbnb.run import checkout
from jfbnb.run import reproduce as runner
from jfbnb.run.command import main

NOTEBOOK = """
from jfbnb.run.checkout import run_dirs
runs, figures = run_dirs(profile)
for folder in (runs, figures):
    folder.mkdir(parents=True, exist_ok=True)
earlier = "".join(sorted(p.read_text() for p in runs.glob("*.txt") if p.name < "{name}"))
(runs / "{name}.txt").write_text(f"{name} {{size}} after [{{earlier}}]")
(figures / "{name}.png").write_text("png")
"""
PACKAGE = {
    "__init__.py": "", "run/__init__.py": "", "run/doctor.py": "", "core/maps.py": "",
    "weights/jfb.safetensors": "", "run/checkout.py": inspect.getsource(checkout),
    "common.py": f"CHECK_FAILED = {CHECK_FAILED!r}\nclass UserError(Exception): ...\n"
                 f"{inspect.getsource(check)}"}
PARAMETERS = """profile = "quick"
size = 1
data = "bundled"
rate = 0.5
seed = 0
depth = 6
penalty = 0.1
names = {}
weights = ""
"""


@pytest.fixture
def suite(tmp_path, monkeypatch) -> Path:
    """A checkout of its own: three notebooks, and a package that is quick to import."""
    monkeypatch.delenv("JFBNB_WORK", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the kernels
    for name, code in PACKAGE.items():
        (tmp_path / "jfbnb" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "jfbnb" / name).write_text(code)
    profiles = tmp_path / "notebooks" / "profiles"
    profiles.mkdir(parents=True)
    (profiles / "quick.yaml").write_text("size: 1\n")
    for name in ("01_a", "02_b", "03_c"):
        cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(NOTEBOOK.format(name=name))]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {
            "name": "python3", "display_name": "Python 3", "language": "python"}}),
            tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(checkout, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def here(suite, monkeypatch) -> Path:
    """The same, its notebooks run in this process: a kernel takes seconds to start."""
    def run_notebook(path: Path, parameters: dict, runs: Path) -> float:
        names = {}
        for i, cell in enumerate(c for c in nbformat.read(path, 4).cells if c.cell_type == "code"):
            exec(cell.source, names)
            names.update(parameters if i == 0 else {})
        (runs / f"{path.stem}.log").touch()
        (runs / path.name).write_bytes(path.read_bytes())
        return 0.1

    monkeypatch.setattr(runner, "run_notebook", run_notebook)
    return suite


def add_cell(suite: Path, name: str, cell: nbformat.NotebookNode) -> None:
    path = suite / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, 4)
    notebook.cells.append(cell)
    nbformat.write(notebook, path)


def go(**options) -> list[str]:
    """Run the suite; return for each notebook whether it was skipped or took its time."""
    lines = []
    runner.reproduce("quick", options.pop("overrides", {}), log=lines.append, **options)
    return ["skipped" if "skipped" in line else "ran" for line in lines
            if "skipped" in line or "took" in line]


def test_runs_then_skips_then_runs_what_changed(here):
    size = {"size": 2}
    assert go() == ["ran", "ran", "ran"]
    assert go() == ["skipped", "skipped", "skipped"]
    # Another value of a parameter: all three depend on it.
    assert go(overrides=size) == ["ran", "ran", "ran"]
    assert "01_a 2" in (here / "runs/quick/03_c.txt").read_text()
    # Code of the second notebook: the first is untouched, the third sees the same artefact.
    add_cell(here, "02_b", nbformat.v4.new_code_cell("# a comment"))
    assert go(overrides=size) == ["skipped", "ran", "skipped"]
    add_cell(here, "02_b", nbformat.v4.new_markdown_cell("prose"))
    assert go(overrides=size) == ["skipped"] * 3
    # A damaged figure, marker or artefact: only its own notebook. The artefact comes out the same.
    (here / "figures/quick/03_c.png").write_text("damaged")
    (here / "runs/quick/markers/02_b.json").write_text("{")
    assert go(overrides=size) == ["skipped", "ran", "ran"]
    (here / "runs/quick/01_a.txt").write_text("damaged")
    assert go(overrides=size) == ["ran", "skipped", "skipped"]


def test_a_notebook_depends_on_package_data_weights_and_methods_of_others(suite, image_folder,
                                                                          monkeypatch):
    weights = suite / "trained"
    weights.mkdir()

    def inputs() -> dict[str, str]:
        return runner.input_hashes(runner.notebooks()[0], {"weights": str(weights),
                                                           "data": str(image_folder)})

    with pytest.raises(UserError, match=r"no trained networks in the weights folder .* empty"):
        inputs()
    (weights / "jfb.safetensors").write_text("1")
    before = inputs()
    for name in ("core/maps.py", "weights/jfb.safetensors"):
        (suite / "jfbnb" / name).write_text("# other")
        assert inputs()["package"] != before["package"]
        (suite / "jfbnb" / name).write_text("")
    (suite / "jfbnb/run/doctor.py").write_text("# the commands compute nothing")
    assert inputs() == before
    (weights / "jfb.safetensors").write_text("2")
    (image_folder / "000001.jpg").unlink()
    monkeypatch.setattr(runner, "entry_points", lambda group: [SimpleNamespace(
        value="mine:METHOD", dist=SimpleNamespace(version="1.0"))])
    after = inputs()
    assert {name for name in after if after[name] != before.get(name)} \
        == {"weights", "data", "methods of others"}


def test_only_and_force(here):
    with pytest.raises(UserError, match="notebook 02 needs the results of 01: run that one first"):
        go(only="02")
    go()
    checkpoints = [here / "runs/quick" / name for name in ("checkpoints", "trained/checkpoints")]
    for folder in checkpoints:
        folder.mkdir(parents=True)
    assert go(only="02") == ["skipped"]
    assert go(only="02", force=True) == ["ran"]
    assert [folder.exists() for folder in checkpoints] == [False, True]
    with pytest.raises(UserError, match="no notebook '07': choose 01, 02 or 03"):
        go(only="07")


@pytest.mark.parametrize(("text", "message"), [
    ("size", "write it as NAME=VALUE"),
    ("size=[1", "-p size: its value is not YAML"),
    ("size=" + "9" * 5000, "is not YAML"),
    ("sise=3", "unknown parameter 'sise': the notebooks have data, depth, "),
    ("size=big", "parameter size takes a value like 1, not 'big'"),
    ("size=", "takes a value like 1, not ''"),
    ("size=1.5", "takes a value like 1"),
    ("size=true", "takes a value like 1"),
    ("size=&a [*a]", "takes a value like 1"),
    ("rate=nan", "takes a value like 0.5"),
    ("names={deq: much}", "parameter names takes a value like {}"),
    ('data="a\\0b"', "parameter data takes a value like"),
    ("data=nowhere", "no data at"),
    ("profile=../elsewhere", "by --folder"),
    ("size=0", "parameter size must be positive, not 0"),
    ("rate=-0.5", "parameter rate must be positive, not -0.5"),
    ("seed=-1", "parameter seed must be at least 0, not -1"),
    ("depth=1", "parameter depth must be at least 2, not 1"),
    ("names={deq: 0}", "parameter names must be positive"),
])
def test_bad_parameters_are_refused_before_anything_runs(suite, capsys, text, message):
    assert main(["reproduce", "-p", text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jfbnb: error: ") and message in line
    assert not (suite / "runs").exists()


def test_an_integer_will_do_for_a_float_and_some_numbers_may_be_0(suite):
    fine = {"rate": 1, "seed": 0, "penalty": 0, "depth": 2, "names": {"deq": 2, "unrolled": 0.1}}
    (path, *_) = runner.notebooks()
    assert fine.items() <= runner.complete([path], fine)[path].items()


def test_a_profile_is_held_to_the_same_rules(suite, capsys):
    for text, message in (("size: 0\n", "parameter size must be positive, not 0"),
                          ("- size", "quick.yaml is not a profile")):
        (suite / "notebooks/profiles/quick.yaml").write_text(text)
        assert main(["reproduce"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["reproduce", "--profile", "fast"]) == 2
    assert "unknown profile 'fast': choose one of quick" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_one(capsys):
    assert main(["reproduce", "-p", "device=cuda"]) == 2
    assert "PyTorch sees no CUDA device" in capsys.readouterr().err


def test_a_protocol_whose_pictures_are_smaller_than_their_scenes_is_refused():
    with pytest.raises(UserError, match="choose paper or code"):
        runner.reproduce("quick", {"protocol": "camera"})


@pytest.mark.parametrize("folder", ["..", "../x", "/tmp/x", "a/../../b", ".", "a\nb"])
def test_a_folder_elsewhere(suite, folder):
    with pytest.raises(UserError, match="give the name of a folder inside runs/"):
        go(folder=folder)
    assert not (suite / "runs").exists()


@pytest.mark.parametrize(("text", "value"), [
    ("5e-4", 5e-4), ("010", 10), ("12:30", "12:30"), ("no", "no"), ("true", True), ("-3", -3),
    (".5", 0.5), ("1_000", "1_000"), ("2024-01-01", "2024-01-01"), ("1e3", 1000.0),
    ("{a: 1, b: 5e-4}", {"a": 1, "b": 5e-4}), ("weights:", {"weights": ""}), ("'5'", "5")])
def test_values_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text, "it")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["[]", '{"inputs": 3}', "[" * 100_000, "\xff", "{}"])
def test_a_marker_that_is_none(tmp_path, text):
    (tmp_path / "m.json").write_bytes(text.encode("latin1"))
    assert runner.read_marker(tmp_path / "m.json") == {}


def test_what_a_killed_run_left_unfinished_is_removed(here):
    left = here / "runs" / "quick" / "checkpoints" / f"{UNFINISHED}abc.new"
    left.parent.mkdir(parents=True)
    left.touch()
    go(only="01")
    assert not left.exists()


def test_a_failing_notebook_is_named_and_earlier_outputs_stay(suite):
    go()
    before = (suite / "runs/quick/02_b.txt").read_text()
    add_cell(suite, "02_b", nbformat.v4.new_code_cell("raise ValueError('no such luck')"))
    with pytest.raises(UserError, match=r"02_b stopped: ValueError: no such luck \(see runs/quick"):
        go()
    assert (suite / "runs/quick/02_b.txt").read_text() == before
    assert not (suite / "runs/quick/markers/02_b.json").exists()


def test_a_killed_kernel_is_explained(suite):
    add_cell(suite, "01_a", nbformat.v4.new_code_cell("import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(UserError, match=r"01_a stopped: .* lack of memory .* runs/quick/01_a.log"):
        go(only="01")


def test_failed_checks_are_shown(suite):
    add_cell(suite, "01_a", nbformat.v4.new_code_cell(
        "from jfbnb.common import check\ncheck('pigs fly', False)\ncheck('pigs walk', True)"))
    lines = []
    runner.reproduce("quick", {}, only="01", log=lines.append)
    assert [line.strip() for line in lines if "pigs" in line] == ["NOT MET: pigs fly"]


def test_provenance(here, image_folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("elsewhere")
    (outside / "jfb.safetensors").touch()
    go(overrides={"size": 2, "data": str(image_folder), "weights": str(outside)})
    text = (here / "figures/quick/provenance.json").read_text()
    assert str(here) not in text and str(outside) not in text  # no path of the machine
    record = json.loads(text)
    assert record["profile"] == "quick" and "torch" in record["packages"]
    step = record["steps"]["02_b"]
    assert {"profile": "quick", "size": 2, "data": "images", "weights": outside.name}.items() \
        <= step["parameters"].items()
    assert step["seconds"] > 0
    assert {"notebook", "package", "runs/quick/01_a.txt"} <= set(step["inputs"])
    assert set(step["outputs"]) == {"runs/quick/02_b.txt", "runs/quick/02_b.ipynb",
                                    "figures/quick/02_b.png"}


def test_two_runs_in_one_folder(suite):
    runs = suite / "runs" / "quick"
    runs.mkdir(parents=True)
    with FileLock(runs / ".lock"), pytest.raises(UserError, match="another run is writing"):
        go()
    assert not (runs / "markers").exists()


def test_frozen_takes_the_runs_own_networks(suite, capsys):
    assert main(["reproduce", "--frozen", "--weights", "x"]) == 2
    assert "leave out --weights" in capsys.readouterr().err
    assert main(["reproduce", "--frozen"]) == 2
    assert f"no trained networks in the weights folder {suite / 'runs/quick'}" \
        in capsys.readouterr().err


def test_a_users_kernel_of_another_environment_is_not_taken(suite, tmp_path, monkeypatch):
    folder = tmp_path / "kernels/python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(
        {"argv": ["/nowhere/python"], "display_name": "", "language": "python"}))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert go(only="01") == ["ran"]


def test_a_path_is_below_the_current_folder_or_the_checkout(suite, monkeypatch):
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
    monkeypatch.setattr(runner, "input_hashes", lambda path, parameters: {})
    monkeypatch.setattr(runner, "run_step", lambda path, parameters, *_: seen.append(
        (parameters["data"], parameters["weights"])))
    assert main(["reproduce", "--data", "../images", "--weights", "images"]) == 0
    assert main(["reproduce", "-p", "data=images", "-p", "weights=../images"]) == 0
    (suite / "notebooks/profiles/quick.yaml").write_text("data: images\nweights: images\n")
    assert main(["reproduce"]) == 0
    assert set(seen) == {(str(image_folder), str(image_folder))} and len(seen) == 9


def test_notebooks_and_runner_write_into_the_checkout_or_elsewhere(suite, tmp_path_factory,
                                                                   monkeypatch):
    import papermill

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    notebook = str(suite / "notebooks" / "01_a.ipynb")
    papermill.execute_notebook(notebook, "out.ipynb", progress_bar=False)
    assert (suite / "runs/quick/01_a.txt").is_file() and len(list(elsewhere.iterdir())) == 1
    monkeypatch.setenv("JFBNB_WORK", "build/copy")  # below the checkout, not here
    papermill.execute_notebook(notebook, "out.ipynb", progress_bar=False)
    assert (suite / "build/copy/figures/quick/01_a.png").is_file()
    monkeypatch.setenv("JFBNB_WORK", str(elsewhere / "work"))
    assert go(only="01") == ["ran"] and go(only="01") == ["skipped"]
    assert (elsewhere / "work/figures/quick/provenance.json").is_file()


def test_a_clone_opened_with_the_package_of_a_wheel(suite, monkeypatch):
    monkeypatch.setattr(checkout, "ROOT", suite / "site-packages")
    monkeypatch.chdir(suite / "notebooks" / "profiles")
    assert checkout.run_dirs("quick") == (suite / "runs/quick", suite / "figures/quick")
    with pytest.raises(UserError, match="reproduce, train, sweep and lab need the notebooks"):
        checkout.need_checkout()
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="JFBNB_WORK"):
        checkout.run_dirs("quick")
