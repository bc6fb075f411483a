"""What surrounds the code: dependencies, the lock, README's numbers, what may not be committed."""

import importlib.util
import io
import json
import re
import subprocess
import tomllib

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from jfbnb.evaluation import reference_table2
from jfbnb.suite.checkout import ROOT

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
PIP_ONLY = ("deepinv", "latex2mathml", "playwright", "torchdeq")  # by pip alone


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    project = pyproject()
    return [Requirement(text) for text in
            project["dependencies"] + project["optional-dependencies"]["test"]]


def test_environment_asks_for_what_pyproject_asks_for():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [d for d in environment["dependencies"] if isinstance(d, str)]
    expected = {f"{CONDA_NAMES.get(r.name, r.name)}{r.specifier}" for r in requirements()
                if r.name not in PIP_ONLY}
    expected |= {f"python{pyproject()['requires-python']}", "pip"}
    assert set(conda) == expected
    by_pip = [f"{r.name}{r.specifier}" for r in requirements() if r.name in PIP_ONLY]
    assert environment["dependencies"][-1] == {"pip": ["-e .", *by_pip]}


def test_lock_has_every_requirement_pinned_with_hashes():
    text = (ROOT / "requirements.lock").read_text()
    pins: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([\w.+]+)", text, flags=re.M):
        pins.setdefault(name, []).append(version)
    for requirement in requirements():
        versions = pins[requirement.name.lower()]
        assert all(requirement.specifier.contains(v) for v in versions)
    blocks = re.split(r"^(?=[\w.-]+==)", text, flags=re.M)[1:]
    assert len(blocks) > 100 and all("--hash=sha256:" in block for block in blocks)
    assert "://" not in text


def committed(path: str) -> str:
    """The file as staged in git. A later run may have rewritten the one in the folder."""
    result = subprocess.run(["git", "show", f":{path}"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{path} is not in git here")
    return result.stdout


@pytest.fixture(scope="module")
def publish():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "tools" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_numbers_are_those_of_the_stored_runs(publish):
    readme = committed("README.md")
    for name, text in publish.readme_blocks(committed).items():
        assert publish.replace_block(readme, name, text) == readme


def test_what_readme_says_of_the_table_is_so():
    """Its words under the table are typed by hand; the order that they tell is checked here."""
    words = " ".join(committed("README.md").split())
    assert "JFB beats Tikhonov, plug-and-play and the feedforward networks; the exact gradient " \
        "(Deep equilibrium), unrolling and DE-ADMM are level with it, within 0.3 dB; a head does " \
        "not pay yet; and total variation, tuned on the same validation images, stays ahead of " \
        "all networks" in words
    table = pd.read_csv(io.StringIO(committed("figures/quick/table2_comparison.csv")))
    measured = table.set_index("Method")["PSNR (dB)"].dropna()
    assert measured.idxmax() == "Total variation"
    assert measured["JFB"] > measured[["Tikhonov", "Plug-and-play", "DnCNN", "Tikhonov + DnCNN",
                                       "Tikhonov + 2 DnCNN"]].max()
    level = measured[["Deep equilibrium", "Deep unrolling", "DE-ADMM"]]
    assert (level - measured["JFB"]).abs().max() < 0.3
    assert measured["JFB + head"] < measured["JFB"]


def test_what_readme_says_of_the_released_networks_is_so():
    words = " ".join(committed("README.md").split())
    table = pd.read_csv(io.StringIO(committed("figures/cpu/table2_comparison.csv")))
    table = table.set_index("Method")
    measured, seconds = table["PSNR (dB)"].dropna(), table["Seconds per image"]
    two = ["JFB + head", "Deep equilibrium + head", "Tikhonov + 2 DnCNN"]
    assert "Of the methods with one network the equilibrium of JFB is ahead of all, and of those " \
        "with two JFB with its head" in words
    assert measured.drop(two).idxmax() == "JFB" and measured.idxmax() == "JFB + head"
    assert "two plain networks after Tikhonov come within 0.2 dB, in a fraction of the" in words
    assert measured["JFB + head"] - measured["Tikhonov + 2 DnCNN"] < 0.2
    assert seconds["Tikhonov + 2 DnCNN"] < 0.25 * seconds["JFB + head"]
    assert "JFB trained longest" in words and "when unrolling ended it was ahead of what JFB had " \
        "reached by then" in words
    history = pd.read_csv(io.StringIO(committed("figures/cpu/rivals_history.csv")))
    own = dict(list(history.groupby("method")))
    total = {name: part.seconds.max() for name, part in own.items()}
    assert max(total, key=total.get) == "jfb"
    jfb = own["jfb"].validation_psnr[own["jfb"].seconds <= total["unrolled"]]
    assert own["unrolled"].validation_psnr.iloc[-1] > jfb.max()
    assert "The network after Tikhonov had stopped improving" in words
    last = own["feedforward-tikhonov"].validation_psnr.iloc[-3:]
    assert last.max() - last.min() < 0.02


def test_what_readme_says_of_photographs_is_so():
    words = " ".join(committed("README.md").split())
    blurs = pd.read_csv(io.StringIO(committed("benchmarks/results/photographs_restoration.csv")))
    of_jfb = blurs[blurs.method == "jfb-head"]
    assert len(of_jfb) == 12 and (of_jfb.PSNR - of_jfb.input > 2.5).all()
    others = pd.read_csv(io.StringIO(committed("benchmarks/results/photographs_operators.csv")))
    others = others[others.photograph != "chelsea"]
    mean = others.groupby(["operator", "method"])[["PSNR", "converged"]].mean().unstack()
    ahead = mean.PSNR["jfb-head"] - mean.PSNR["total-variation"]
    assert "It is ahead of total variation but for MRI, where its solves do not converge and it " \
        "loses by decibels" in words
    assert set(ahead[ahead > 0].index) == {"inpainting", "super_resolution"} and ahead["mri"] < -2
    assert mean.converged["jfb-head"]["mri"] == 0


def test_what_readme_says_of_speed_is_so():
    words = " ".join(committed("README.md").split())
    step = pd.read_csv(io.StringIO(committed("benchmarks/results/step.csv")))
    keys = ["problem", "to distance"]
    peers = step[step.contender.str.endswith(" jfb, our map")].groupby(keys).seconds.min()
    share = {name: (own.set_index(keys).seconds / peers) for name, own in step.groupby("contender")}
    assert "In float32 our step, the one that the notebooks train with, takes less than theirs; " \
        "where the processor computes in bfloat16 it does so for its first evaluations, and " \
        "takes less again" in words
    assert (share["jfbnb jfb"] < 1).all()
    assert (share["jfbnb jfb, bf16"] < share["jfbnb jfb"]).all()
    assert "a second network and the penalty that watches stability, costs about what that saves" \
        in words
    assert (share["jfbnb jfb, as shipped"] / share["jfbnb jfb"]).between(0.9, 1.15).all()
    trained = pd.read_csv(io.StringIO(committed("benchmarks/results/time_to_quality.csv")))
    trained = trained.set_index("method")["last PSNR (dB)"]
    published = reference_table2().set_index("method").psnr["deq"]
    assert "On a few validation images all four are past the published PSNR then, and the " \
        "network after Tikhonov, which solves nothing, is ahead" in words
    assert trained.idxmax() == "feedforward-tikhonov" and trained.min() > published


def test_notebook_times_are_those_of_the_stored_run(publish):
    provenance = json.loads(committed("figures/quick/provenance.json"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        assert publish.running_time(provenance, path.stem) in first


def test_scaling_page_shows_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import scaling

    page = committed("docs/scaling.md")
    for name, text in scaling.blocks(json.loads(committed("docs/scaling.json"))).items():
        assert scaling.replace_block(page, name, text) == page


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_no_faces_pickles_or_large_files():
    for name in tracked():
        path = ROOT / name
        assert not re.search(r"(^|/)\d{6}\.jpg$", name), name
        assert path.suffix not in (".pt", ".pth", ".pkl", ".pickle"), name
        if path.is_file():
            assert path.stat().st_size < 10_000_000, name
    # Pictures of CelebA's images may not be kept; those of the bundled photographs may.
    pictures = ("table1_reconstructions", "blog1_direct_inverse", "blog2_gradient_descent",
                "nb3_denoised")
    for name in tracked():
        if name.startswith("figures/") and not name.startswith("figures/quick/"):
            assert not any(picture in name for picture in pictures), name
