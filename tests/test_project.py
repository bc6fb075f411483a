"""What surrounds the code: dependencies, the lock, README's numbers, what may not be committed."""

import ast
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from jfbnb.core.denoisers import make_network
from jfbnb.run.checkout import ROOT
from jfbnb.run.command import main
from jfbnb.run.reproduce import STEPS, known_parameters, load_profile, step_parameters
from jfbnb.teaching.tables import SPENT

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
PIP_ONLY = ("deepinv", "latex2mathml", "playwright", "torchdeq")  # by pip alone


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[Requirement]:
    project = pyproject()
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in
            project["dependencies"] + extras["notebooks"] + extras["test"]]


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


PROFILES = sorted(path.stem for path in (ROOT / "notebooks" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_sets_what_the_notebooks_have_and_says_what_it_is(profile):
    given = load_profile(profile)
    assert set(given) <= set(known_parameters())
    for parameters in step_parameters(STEPS, given | {"device": "cpu"}).values():
        assert parameters["profile"] == profile
    asked = known_parameters() | given
    make_network(asked["network"], 2, 1)  # there is one of that name
    assert (ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text().startswith("# ")


def test_the_command_names_every_profile(capsys):
    assert PROFILES == ["best", "best-gpu", "cpu", "paper", "quick"]
    for command in ("reproduce", "train", "verify"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "quick, cpu, paper, best or best-gpu" in " ".join(capsys.readouterr().out.split())


def test_best_is_cpus_data_with_a_unet_everywhere():
    best, cpu = load_profile("best"), load_profile("cpu")
    assert (best["network"], best["random_degradations"]) == ("UNet", True)
    assert all(best[k] == cpu[k] for k in ("data", "n_train", "n_validation", "n_test", "seed"))
    assert best["tolerance"] <= 1e-3  # a looser solve would train on what is no equilibrium yet


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


def test_numbers_on_pages_are_those_of_the_stored_runs(publish):
    for path, text in publish.filled(committed).items():
        assert text == committed(path), path


def test_every_block_on_a_page_is_filled(publish):
    names = {*publish.blocks(committed)}
    for path in publish.PAGES:
        assert set(re.findall(r"<!-- (?!end )(.+?) -->", committed(path))) <= names


def test_readme_is_a_page_whose_links_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert len(pages[0].read_text().splitlines()) <= 150
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+?)\)", prose):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


def stored(spent: dict[str, float]) -> dict[str, str]:
    """A run's tables in which JFB is behind unrolling, and its head ahead of another."""
    psnr = {"tikhonov": [27.0, 29.0], "unrolled": [33.0, 36.0], "deq": [31.0, 33.0],
            "jfb": [32.8, 35.0], "feedforward-tikhonov-head": [34.0, 35.0],
            "jfb-head": [34.5, 35.7], "total-variation": [30.0, 31.0]}
    rows = [{"method": name, "image": f"{i}", "psnr": value}
            for name, values in psnr.items() for i, value in enumerate(values)]
    table = pd.DataFrame({"Method": list(psnr),
                          SPENT: [spent.get(name) for name in psnr]})
    return {"figures/published/mine/metrics.csv": pd.DataFrame(rows).to_csv(index=False),
            "figures/published/mine/table2_comparison.csv": table.to_csv(index=False)}


def test_ranking_names_the_first_of_each_kind_and_where_jfb_is(publish):
    text = publish.ranking(stored({"jfb": 40000, "unrolled": 40300, "deq": 40001}).get, "mine")
    assert "over these 2 images" in text
    assert "- with no network, **Total variation** is first with 30.50 dB; Tikhonov is 2.500 ± " \
        "0.500 dB behind." in text
    # Paired: 0.2 and 1.0 on the two images.
    assert "- with one network, **Deep unrolling** is first with 34.50 dB; JFB is level with " \
        "it, 0.600 ± 0.400 dB behind." in text
    assert "- with two, **JFB + head** is first with 35.10 dB" in text
    assert "paired differences over images" in text
    assert "Each trained method had 40,000 applications of its network" in text


def test_ranking_says_which_differences_the_solves_cannot_tell(publish):
    read = {"figures/published/mine/nb4_certificate.csv": "drift\n-0.1\n0.02\n"}.get
    assert "moves by -0.040 dB (2 validation images)" in publish.undecided(read, "mine")


def test_ranking_says_where_training_was_not_equal(publish):
    words = "this order is one of efforts as well as of methods"
    ranking = publish.ranking(stored({"jfb": 2000.0, "unrolled": 500.0}).get, "mine")
    assert "had 500 to 2,000 applications of their networks" in ranking and words in ranking


def test_equilibrium_says_what_the_certificate_has(publish):
    certificate = pd.DataFrame({
        "evaluations": [10.0, 12.0, float("inf"), 14.0], "residual": [1e-4, 9e-5, 3e-4, 8e-5],
        "distance": [1e-3, 9e-4, 2.7e-2, 8e-4], "further": [50, 60, 1000, 70],
        "residual_later": [5e-7, 5e-7, 2e-6, 5e-7], "drift": [0.01, -0.01, -0.2, 0.0],
        "radius": [0.9, 0.9, 1.01, 0.9], "norm": [0.95, 1.02, 1.1, 0.97]})
    scales = ("JFB,PSNR as published (dB),PSNR with data range 1 (dB)\npublished,26.88,32.90\n"
              "\"this run, protocol code\",30.0,36.0\n")
    text = publish.equilibrium({"figures/published/mine/nb4_certificate.csv": certificate.to_csv(),
                                "figures/published/mine/psnr_scales.csv": scales}.get, "mine")
    for words in ("3 of 4 validation images are solved, to a relative residual of 1e-04",
                  "within 14 evaluations", "up to 90 times the residual", "50 to 1000 times",
                  "by 2e-06 at most", "on 75% of the images, by -0.200 dB at worst",
                  "its mean by -0.050 dB", "at most 1.010: below 1, so locally stable, on 3",
                  "at most 1.100: below 1, so a contraction there, on 2"):
        assert words in text


def test_claims_that_no_table_supports_are_not_made():
    unsupported = ("is ahead of all", "stopped improving", "trained longest", "get the best rule",
                   "A network that ends cannot", "keeps it contracting", "effort that JFB had",
                   "better than its table says", "11iu58b")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("jfbnb/**/*.md"),
                 *ROOT.glob("notebooks/**/*.ipynb"), ROOT / "CITATION.cff"]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        assert not [words for words in unsupported if words in text], path


def test_no_file_needs_a_unix_to_be_imported():
    """Modules that Windows lacks are imported inside of functions alone, which may be skipped."""
    lines = []
    for path in (*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py"),
                 *ROOT.glob("jfbnb/**/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                     else [node.module] if isinstance(node, ast.ImportFrom) else [])
            lines += [f"{path.name}: {name}" for name in names
                      if name in ("resource", "fcntl", "pwd", "grp", "termios")]
    assert not lines


def test_files_are_read_and_written_as_utf_8():
    """Windows has another encoding where none is given."""
    missing = []
    for path in (*ROOT.glob("jfbnb/**/*.py"), *ROOT.glob("tools/*.py"),
                 *ROOT.glob("benchmarks/*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and (
                    call.func.attr in ("read_text", "write_text")):
                given = {keyword.arg for keyword in call.keywords}
                needed = 1 if call.func.attr == "read_text" else 2
                if "encoding" not in given and len(call.args) < needed:
                    missing.append(f"{path.name}: {call.lineno}")
    assert not missing


def test_a_release_has_one_version():
    version = pyproject()["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def test_all_that_is_shown_was_made_by_this_version():
    """And by a command: published runs, benchmarks, and searches of learning rates."""
    version = pyproject()["version"]
    for path in sorted((ROOT / "figures" / "published").glob("*/provenance.json")):
        assert json.loads(path.read_text())["release"] == f"v{version}", path
    results = ROOT / "benchmarks" / "results"
    made = json.loads((results / "provenance.json").read_text())
    made |= json.loads((ROOT / "notebooks" / "profiles" / "rates" / "provenance.json").read_text())
    for name, found in made.items():
        assert found["version"] == version and found["command"].startswith("python"), name
    for path in results.glob("*.csv"):
        owner = {"targets": "step", "grid_overview": "grid", "released_images": "released",
                 "quality_trainings": "quality"}.get(path.stem, path.stem)
        assert owner in made, path
    text = " ".join((ROOT / page).read_text() for page in ("README.md", "docs/speed.md",
                                                           "docs/results.md"))
    assert "earlier version" not in text


@pytest.mark.parametrize("profile", ["quick", "cpu"])
def test_learning_rates_are_the_best_of_the_stored_search(profile, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from rates import best_rates

    found = best_rates(ROOT / "notebooks" / "profiles" / "rates" / f"{profile}.csv")
    own = known_parameters() | load_profile(profile)
    rates = {name: own["learning_rates"].get(name, own["learning_rate"]) for name in found}
    assert rates == found


def test_authors_repository_and_both_papers_are_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert "/lliu58b/" in citation["preferred-citation"]["url"]
    assert "d8e6ada" in citation["preferred-citation"]["notes"]
    assert "2402.02065" in citation["references"][0]["url"]


def test_stored_photographs_are_restored_by_decibels():
    blurs = pd.read_csv(io.StringIO(committed("benchmarks/results/photographs_restoration.csv")))
    of_jfb = blurs[blurs.method == "jfb"]
    assert len(of_jfb) == 12 and (of_jfb.PSNR - of_jfb.input > 2.5).all()


def test_notebook_times_are_those_of_the_stored_run(publish):
    provenance = json.loads(committed("figures/published/quick/provenance.json"))
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        first = nbformat.read(path, as_version=4).cells[0].source
        assert publish.running_time(provenance, path.stem) in first


def tracked() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return result.stdout.splitlines()


def test_no_run_changes_what_git_tracks():
    """Nothing that any notebook writes in any profile is in git, nor would it be added."""
    tracked()  # skips without git
    for profile in (*PROFILES, "mine", "sweep-1/a"):
        written = [path for parameters in ({}, {"over_conditions": True})
                   for step in STEPS for path in step.outputs(profile, parameters)]
        written.append(Path("figures", profile, "provenance.json"))
        found = subprocess.run(["git", "check-ignore", "--no-index", *map(str, written)], cwd=ROOT,
                               capture_output=True, text=True).stdout.splitlines()
        assert set(found) == set(map(str, written))
        assert not {path for path in tracked() if Path(path) in written}


def test_notebook_1_leaves_the_checkout_clean(tmp_path):
    """Run in a checkout of its own, by the command; then git is asked."""
    clone = tmp_path / "clone"
    done = subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, clone],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in tracked():  # as it is now, not as it was committed
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)

    def status() -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=clone, check=True,
                              capture_output=True, text=True).stdout

    before = status()
    environment = {k: v for k, v in os.environ.items() if k != "JFBNB_WORK"}
    done = subprocess.run([sys.executable, "-m", "jfbnb", "reproduce", "--only", "01"], cwd=clone,
                          env={**environment, "PYTHONPATH": str(clone)}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert list((clone / "figures" / "quick").glob("*.png")) and status() == before


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
        if name.startswith("figures/") and not name.startswith("figures/published/quick/"):
            assert not any(picture in name for picture in pictures), name
