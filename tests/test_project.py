"""What surrounds the code: dependencies, the lock, README's numbers, what may not be committed."""

import io
import json
import re
import subprocess
import tomllib

import address
import nbformat
import pandas as pd
import publish
import pytest
import rates
import skimage.data
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from jfbnb.run.checkout import ROOT
from jfbnb.run.command import main
from jfbnb.run.reproduce import (
    complete,
    known_parameters,
    load_profile,
    notebook_parameters,
    notebooks,
)
from jfbnb.teaching.figures import image_row, new_figure, save_figure

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


def test_binder_has_pyprojects_torch_and_what_students_need():
    python, torch, pip = yaml.safe_load((ROOT / "binder/environment.yml").read_text()
                                        )["dependencies"]
    asked = {f"{r.name}{r.specifier}" for r in requirements()}
    assert torch.replace("pytorch-cpu", "torch") in asked
    assert python.split("=")[1] in SpecifierSet(pyproject()["requires-python"]) and pip == "pip"
    assert "--editable '.[notebooks]'\n" in (ROOT / "binder/postBuild").read_text()


def test_one_address_is_everywhere():
    """In badges, commands and the citation: none stays behind when it changes."""
    owner, name = address.repository()
    for path, text in address.addressed(owner, name).items():
        assert text == path.read_text(), f"{path}: `make address`"
    old = rf"{owner}(/|\.github\.io/){name}"
    moved = address.addressed("someone", "else.where")
    assert not [path for path, text in moved.items() if re.search(old, text)]
    named = subprocess.run(["git", "grep", "-lE", old], cwd=ROOT, capture_output=True, text=True)
    assert {ROOT / path for path in named.stdout.split()} <= {ROOT / "pyproject.toml", *moved}
    for path in notebooks():
        badges = re.findall(r"\]\((https:[^)]+)\)", nbformat.read(path, 4).cells[0].source)[:2]
        assert badges[0].endswith(f"/{owner}/{name}/blob/main/notebooks/{path.name}")
        assert badges[1].endswith(f"/{owner}/{name}/main?labpath=notebooks%2F{path.name}")


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
    for parameters in complete(notebooks(), load_profile(profile) | {"device": "cpu"}).values():
        assert parameters["profile"] == profile
    assert (ROOT / "notebooks" / "profiles" / f"{profile}.yaml").read_text().startswith("# ")


def test_quick_is_what_the_notebooks_say_themselves():
    quick = load_profile("quick")
    for path in notebooks():
        own = notebook_parameters(path)
        assert {k: quick[k] for k in own if k in quick} == {k: v for k, v in own.items()
                                                          if k in quick}


def test_the_command_names_every_profile(capsys):
    assert PROFILES == ["best", "best-gpu", "cpu", "paper", "quick"]
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    assert "quick, cpu, paper, best or best-gpu" in " ".join(capsys.readouterr().out.split())


def test_best_is_cpus_data_with_a_unet_over_random_degradations():
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


def test_numbers_on_pages_are_those_of_the_stored_runs():
    for path, text in publish.filled(committed).items():
        assert text == committed(path), path


def test_readme_is_a_page_whose_links_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    assert len(pages[0].read_text().splitlines()) <= 150
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+?)\)", prose):
            assert "://" in link or (page.parent / link).exists(), (page.name, link)


def test_a_block_is_a_table_of_the_files_it_names(monkeypatch):
    page = ("<!-- runs/a.md -->\nold\n<!-- end runs/a.md -->\nprose\n"
            "<!-- pairs mine -->\n<!-- end pairs mine -->\n")
    metrics = pd.DataFrame({"method": ["jfb", "deq"] * 2, "image": ["a", "a", "b", "b"],
                            "psnr": [30.0, 30.5, 40.0, 39.5]})
    files = {"README.md": page, "runs/a.md": "new\n",
             "figures/published/mine/metrics.csv": metrics.to_csv(index=False)}
    monkeypatch.setattr(publish, "PAGES", ["README.md"])
    monkeypatch.setitem(publish.BLOCKS, "pairs mine", lambda read: publish.pairs(read, "mine"))
    text = publish.filled(files.__getitem__)["README.md"]
    assert text.startswith("<!-- runs/a.md -->\nnew\n<!-- end runs/a.md -->\nprose\n")
    # Paired: +0.5 and -0.5 on the two images, a standard error of 0.5.
    assert re.search(r"\| Exact gradient, splitting \| +\+0\.000 \| 0\.500 \|", text)
    assert publish.filled({**files, "README.md": text}.__getitem__)["README.md"] == text


def test_no_absolute_path_of_a_machine_is_in_git():
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".md", ".json", ".yaml", ".yml", ".toml", ".lock", ".ipynb", ".csv"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.~-])/(home|root|Users|work|tmp)/\w", text), name


def test_a_release_has_one_version_and_cites_both_papers_and_the_authors_repository():
    version = pyproject()["version"]
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    assert "/lliu58b/" in citation["preferred-citation"]["url"]
    assert "d8e6ada" in citation["preferred-citation"]["notes"]
    assert "2402.02065" in citation["references"][0]["url"]


def test_budgets_and_table_2_are_of_the_same_networks():
    rows = pd.read_csv(ROOT / "benchmarks/results/budget.csv").query(
        "budget in (0, 240000) and seed == 0")
    metrics = pd.read_csv(ROOT / "figures/published/cpu/metrics.csv")
    means = metrics.groupby("method").psnr.mean()
    assert set(rows.images) == {metrics.image.nunique()}
    for row in rows.itertuples():
        assert row.psnr == pytest.approx(means[row.method], abs=0.01), row.method


def test_no_image_of_celeba_is_published(tmp_path):
    """Nor would one be: figures that show images go, and drawings stay."""
    for path in (ROOT / "figures" / "published").glob("*/*.png"):
        assert path.parent.name == publish.RUN or publish.is_drawing(Image.open(path)), path
    picture = torch.from_numpy(skimage.data.astronaut()[:128, :128]).movedim(-1, 0) / 255
    curve, (ax,) = new_figure()
    ax.plot([1, 3, 2])
    for name, figure in (("colour", image_row({"a": picture}, {})), ("curve", curve), (
            "grey", image_row({"a": picture.mean(0).expand(3, -1, -1), "b": picture[:1].expand(
                3, -1, -1)}, {"a": 30.0}))):
        save_figure(figure, tmp_path / name)
    publish.remove_photographs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.pdf", "curve.png"]


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
        owner = {"targets": "step", "grid_overview": "grid", "authors_table": "authors",
                 "budget_table": "budget", "released_images": "released",
                 "published_table": "published", "blind_blur": "blind",
                 "blind_photograph": "blind", "blind_shakes": "blind"}.get(path.stem, path.stem)
        assert owner in made, path
    text = " ".join((ROOT / page).read_text() for page in ("README.md", "docs/speed.md",
                                                           "docs/results.md"))
    assert "earlier version" not in text


@pytest.mark.parametrize("profile", ["quick", "cpu"])
def test_learning_rates_are_the_best_of_the_stored_search(profile):
    found = rates.best_rates(ROOT / "notebooks" / "profiles" / "rates" / f"{profile}.csv")
    own = known_parameters() | load_profile(profile)
    assert found == {name: own["learning_rates"].get(name, own["learning_rate"])
                     for name in found}


def test_stored_photographs_are_restored_by_decibels():
    blurs = pd.read_csv(io.StringIO(committed("benchmarks/results/photographs_restoration.csv")))
    of_jfb = blurs[blurs.method == "jfb"]
    assert len(of_jfb) == 12 and (of_jfb.PSNR - of_jfb.input > 2.5).all()


def test_notebook_times_are_those_of_the_stored_run():
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
    places = [f"{top}/{profile}" for profile in (*PROFILES, "mine", "sweep-1/a")
              for top in ("runs", "figures")]
    written = [f"{place}/{name}" for place in places
               for name in ("01_a.ipynb", "jfb.safetensors", "a/b.json", "table.csv", "f.png")]
    found = subprocess.run(["git", "check-ignore", "--no-index", *written], cwd=ROOT,
                           capture_output=True, text=True).stdout.splitlines()
    assert set(found) == set(written)
    assert not [name for name in tracked() if name.startswith(tuple(f"{p}/" for p in places))]


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
