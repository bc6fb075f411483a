"""The rules that every notebook keeps."""

import ast
import json
import re
from functools import partial
from itertools import pairwise

import nbformat
import pytest
import torch

from jfbnb.common import UserError
from jfbnb.data import Splits, bundled_photos
from jfbnb.run.reproduce import notebook_parameters, notebooks
from jfbnb.teaching import alone
from jfbnb.training.recipes import Run
from jfbnb.training.restorers import RELEASED
from jfbnb.training.tuning import Tuning
from jfbnb.training.weights import load_denoiser

PATHS = notebooks()
IDS = [path.stem for path in PATHS]


@pytest.fixture(params=PATHS, ids=IDS)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def last_words(notebook) -> str:
    """Before the answers to the exercises."""
    return [c for c in notebook.cells if c.cell_type == "markdown"][-1].source


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_a_notebook_has_all_its_parts(notebook):
    """The first cell says what and how long; the last ones lead on to the next notebook."""
    nbformat.validate(notebook)
    assert 15 <= len(notebook.cells) <= 42
    first = notebook.cells[0].source
    for part in ("# ", "**Covers**", "**You will**", "**Running time**", "**Where we are**"):
        assert part in first
    assert re.search(r"<!-- time -->\d+ s .*<!-- end time -->", first)
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    for part in ("## Check against the paper", "## Takeaways", "## Exercises", "*Hint:"):
        assert part in text
    assert ".ipynb)" in last_words(notebook)


@pytest.mark.parametrize("path", [*PATHS, *sorted(PATHS[0].parent.glob("solutions/*.ipynb"))],
                         ids=lambda path: path.stem)
def test_code_cells_are_short(path):
    """All but those of imports and of parameters, which are collapsed in the notebooks."""
    code = code_cells(nbformat.read(path, 4))
    others = code[1:] if path not in PATHS else code[2:]
    assert max(len(cell.source.splitlines()) for cell in others) <= 15
    if path in PATHS:
        assert all(cell.metadata["jupyter"] == {"source_hidden": True} for cell in code[:2])


def test_parameters_are_literals_with_a_line_and_a_comment_each(path, notebook):
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    statements = ast.parse(cell.source).body
    assert all(isinstance(s, ast.Assign) for s in statements)
    lines = cell.source.splitlines()
    assert len(notebook_parameters(path)) == len(statements) == len(lines)
    assert all(re.fullmatch(r"\w+ = .+  # \S.+", line) for line in lines)


def test_a_parameter_of_several_notebooks_has_one_default():
    """Those of training are in all that train."""
    given = {path.stem.split("_")[0]: notebook_parameters(path) for path in PATHS}
    for name in {name for own in given.values() for name in own}:
        assert len({repr(own[name]) for own in given.values() if name in own}) == 1, name
    for name, places in (("network", "03"), ("random_degradations", "03 04 05")):
        assert [stem for stem, own in given.items() if name in own] == places.split()


def test_stored_outputs_are_those_of_one_clean_run(notebook):
    """All in order, no errors or warnings; checks are met, and what nbval compares is printed."""
    code, stored = code_cells(notebook), outputs(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in stored if o.output_type == "error" or o.get("name") == "stderr"]
    text = "".join(o.get("text", "") for o in stored)
    assert "ok:" in text and "NOT MET" not in text
    tagged = [c for c in code if "nbval-check-output" in c.metadata.get("tags", [])]
    assert len(tagged) >= 2
    for cell in tagged:
        assert "".join(o.get("text", "") for o in cell.outputs).strip(), cell.source


def test_pictures_say_what_they_show(notebook):
    """To those who do not see them."""
    shown = [(o, kind) for o in outputs(notebook) for kind in o.get("data", {})
             if kind.startswith("image/")]
    assert shown
    for output, kind in shown:
        assert len(output.metadata.get(kind, {}).get("alt", "")) > 10


def test_small_and_without_paths_of_a_machine(path):
    text = path.read_text()
    assert len(text.encode()) < 1_000_000
    printed = json.dumps([o.get("text", "") for o in outputs(nbformat.read(path, 4))])
    assert not re.search(r"(^|[\s\"'(])/(home|root|tmp|work|Users|opt|usr)/", printed)
    assert "C:\\" not in printed


def test_every_name_in_order():
    for path, following in pairwise(PATHS):
        assert following.name in last_words(nbformat.read(path, 4))


def test_a_notebook_alone_takes_what_is_stored(tmp_path, capsys):
    runs, empty = tmp_path / "runs", Tuning(0.01, 3)
    with pytest.raises(UserError, match="run the earlier notebooks first"):
        alone.need(runs, tmp_path, ["denoiser"])
    for said in ("using stored networks: denoiser\n", ""):  # it is there the second time
        alone.need(runs, RELEASED, ["denoiser"])
        assert capsys.readouterr().out.endswith(said)
    assert load_denoiser(runs / "denoiser.safetensors").network.depth == 8
    assert alone.chosen_before(runs / "tuning.json", empty) is empty
    empty.save(runs / "tuning.json")
    assert alone.chosen_before(runs / "tuning.json", Tuning(0.02, 1)) == empty


def test_a_stopped_training_is_a_line_and_so_is_a_wrong_parameter():
    with pytest.raises(UserError, match="run this cell again"), alone.stoppable():
        raise KeyboardInterrupt
    for given in ({"crop": 500}, {"batch_size": 0}, {"search_images": 0}):
        with pytest.raises(UserError, match=f"{next(iter(given))} = "):
            alone.check_parameters(**given)
    alone.check_parameters(crop=32, batch_size=8)


def test_notebook_3_goes_on_where_its_training_was_stopped(tmp_path):
    """Its cells, run twice: the second time after a stop, and from the same untrained network."""
    cells = {cell.id: cell.source for cell in nbformat.read(PATHS[2], 4).cells}
    images = bundled_photos("train", 64)[:8]
    lines = []

    def log(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    names: dict[str, object] = {}
    exec(cells["cell-02"], names)
    names |= {"seed": 0, "network": "DnCNN", "depth": 2, "width": 2, "device": torch.device("cpu"),
              "pretrain_epochs": 4, "pretrain_batch_size": 4, "pretrain_crop": 16,
              "pretrain_learning_rate": 1e-3, "random_degradations": False, "runs": tmp_path,
              "profile": "", "weights": "", "noise_max": 0.1,
              "splits": Splits(images, images, images, "8 photographs"),
              "Run": partial(Run, log=log)}
    exec(cells["cell-06"], names)
    with pytest.raises(UserError, match="stopped"):
        exec(cells["cell-10"], names)
    lines.append("stopped")
    exec(cells["cell-10"], names)
    assert any(line.startswith("resumed after") for line in lines)
    assert names["history"].epoch.iloc[-1] == 4
