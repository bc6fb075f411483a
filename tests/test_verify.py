"""`jfbnb verify` finds what differs from what a run stored."""

import json
import shutil

import pandas as pd
import pytest
import torch

from jfbnb.common import UserError
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.run import verify
from jfbnb.run.command import main
from jfbnb.run.reproduce import STEPS, file_hash
from jfbnb.teaching import tables
from jfbnb.training import evaluation
from jfbnb.training.restorers import make_methods

PARAMETERS = {"data": "bundled", "protocol": "paper", "seed": 0, "device": "cpu", "n_train": 1,
              "n_validation": 1, "n_test": 1}


@pytest.fixture
def finished(tmp_path, weights, monkeypatch):
    """A run of two methods on the bundled test images, the folder that it is in."""
    figures, runs = tmp_path / "figures" / "quick", tmp_path / "runs" / "quick"
    figures.mkdir(parents=True)
    shutil.copytree(weights, runs)
    setup = get_protocol("paper")
    images = load_splits("bundled", setup.image_size).test
    A, x = setup.operator(), images.as_float()
    d = measure(A, x, setup.noise_std, 0, images.indices)
    table = evaluation.evaluate(make_methods(["tikhonov", "jfb"], runs, torch.device("cpu")), A,
                                x[:2], d[:2], setup.noise_std, images.names[:2])
    table.to_csv(figures / "metrics.csv", index=False)
    tables.table2(evaluation.summarise(table)).to_csv(figures / "table2_comparison.csv",
                                                          index=False)
    outputs = {f"figures/quick/{p.name}": file_hash(p) for p in figures.glob("*.csv")}
    provenance = {"steps": {STEPS[-1].name: {"parameters": PARAMETERS, "outputs": outputs}}}
    (figures / "provenance.json").write_text(json.dumps(provenance))
    monkeypatch.setenv("JFBNB_WORK", str(tmp_path))
    return tmp_path


def findings(limit: int = 2) -> list[str]:
    return list(verify.verify("quick", None, limit))


def test_a_run_as_it_was_left(finished, capsys):
    assert findings() == []
    assert main(["verify", "quick", "--limit", "2"]) == 0
    assert "are those of its stored networks" in capsys.readouterr().out


def test_a_changed_metric_is_found_in_file_table_and_measurement(finished, capsys):
    file = finished / "figures" / "quick" / "metrics.csv"
    table = pd.read_csv(file)
    table.loc[table.method == "jfb", "psnr"] += 0.02
    table.to_csv(file, index=False)
    lines = findings()
    assert any("metrics.csv is not what the run wrote" in line for line in lines)
    assert any(line.startswith("table 2, JFB: PSNR (dB)") for line in lines)
    assert sum("dB stored" in line for line in lines) == 2
    assert main(["verify", "quick", "--limit", "2"]) == 2
    assert "differences" in capsys.readouterr().err


def test_other_weights_are_found(finished):
    shutil.copy(finished / "runs" / "quick" / "deq.safetensors",
                finished / "runs" / "quick" / "jfb.safetensors")
    tuning = json.loads((finished / "runs" / "quick" / "tuning.json").read_text())
    tuning["chosen"]["tikhonov"]["lam"] *= 2
    (finished / "runs" / "quick" / "tuning.json").write_text(json.dumps(tuning))
    assert any(line.startswith("tikhonov") for line in findings())


def test_a_missing_file_and_a_missing_run(finished, capsys):
    (finished / "figures" / "quick" / "table2_comparison.csv").rename(finished / "moved.csv")
    assert next(verify.verify("quick", None, 1)).endswith("table2_comparison.csv is missing")
    (finished / "figures" / "quick" / "provenance.json").unlink()
    assert main(["verify", "quick"]) == 2
    assert "no finished run" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "text"), [
    ("provenance.json", "[]"), ("provenance.json", '{"steps": {}}'), ("provenance.json", "{"),
    ("metrics.csv", "method,psnr\njfb,30\n"), ("metrics.csv", ""),
    ("table2_comparison.csv", "Method\nJFB\n")])
def test_a_damaged_record_is_one_line(finished, capsys, name, text):
    (finished / "figures" / "quick" / name).write_text(text)
    assert main(["verify", "quick", "--limit", "1"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "missing or damaged" in line and "run `jfbnb reproduce --profile quick`" in line


def test_a_method_that_is_no_longer_installed_is_named(finished):
    file = finished / "figures" / "quick" / "metrics.csv"
    file.write_text(file.read_text().replace("jfb,", "mine,"))
    with pytest.raises(UserError, match="unknown method mine"):
        findings()


def test_a_method_missing_in_one_table_is_found(finished):
    file = finished / "figures" / "quick" / "table2_comparison.csv"
    table = pd.read_csv(file)
    table[table.Method != "JFB"].to_csv(file, index=False)
    assert "table 2, JFB: not in both it and metrics.csv" in findings()


def test_frozen_needs_a_finished_run(capsys, tmp_path):
    assert main(["reproduce", "--frozen", "--weights", str(tmp_path)]) == 2
    assert "leave --weights out" in capsys.readouterr().err
