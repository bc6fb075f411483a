"""The static site: all pages, links that lead somewhere, and nothing asked of the outside."""

import importlib
import operator
import re

import book
import pytest

from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.core.maps import SplittingMap
from jfbnb.core.models import Equilibrium
from jfbnb.core.operators import Blur
from jfbnb.run.checkout import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("book")
    book.main(target)
    return target


def test_pages_are_complete_and_offline(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) == 1 + 6 + 6 + len(list((ROOT / "docs").glob("*.md")))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(src|href)="(https?:)?//', text), page
        assert "import(" not in text.replace("await import(\"\")", ""), page
        for link in re.findall(r'<a href="([^"#:]+)"', text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        outside_code = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.S)
        assert "$" not in outside_code, page


def test_formulas_become_mathml():
    made = book.with_mathml("so $x^2$ and `$no$`\n\n$$\\frac{1}{2}$$")
    assert made.count("<math") == 2 and "<msup>" in made and "<mfrac>" in made
    assert "`$no$`" in made


def test_the_way_through_the_course_is_clickable(site):
    """The notebooks before and after, at both ends of a page, and all in *Where we are*."""
    pages = sorted((site / "notebooks").glob("0*.html"))
    for i, page in enumerate(pages):
        text = page.read_text(encoding="utf-8")
        ways = re.findall(r"<nav>.*?</nav>", text)
        assert len(ways) == 2 and ways[0] == ways[1]
        beside = [pages[k].name for k in (i - 1, i + 1) if 0 <= k < len(pages)]
        assert re.findall(r'href="(0[^"]+)"', ways[0]) == beside
        line = re.search(r"Where we are</strong>(.*?)</p>", text, re.S)[1]
        assert re.findall(r'href="([^"]+)"', line) == [other.name for other in pages]
        assert "prefers-color-scheme: dark" in text


def test_pictures_come_along_and_reports_are_apart(site):
    text = (site / "docs" / "results.html").read_text(encoding="utf-8")
    pictures = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").count("![")
    assert text.count('src="data:image/png;base64,') == pictures > 0
    parts = (site / "index.html").read_text(encoding="utf-8").split("<h2")
    assert "glossary" in parts[3] and "results" in parts[4] and "results" not in parts[3]


def test_comparison_is_in_its_page(site):
    text = (site / "notebooks" / "05_evaluation_and_figures.html").read_text(encoding="utf-8")
    assert "jfbnb-compare" in text and "function mount(" in text


def test_names_in_the_glossary_exist():
    """In a module of the package, the blur, the map or a model, or as a word of the code."""
    A = Blur(8, 3, 1.0)
    T = SplittingMap(A, Denoiser(DnCNN(2, 2), 0.0), 1.0)
    known = {"A": A, "T": T, "model": Equilibrium(T)}
    source = "".join(path.read_text(encoding="utf-8") for path in (
        *(ROOT / "jfbnb").rglob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")))
    names = []
    for row in re.findall(r"^\| .*\|$", (ROOT / "docs/glossary.md").read_text(), flags=re.M)[2:]:
        names += re.findall(r"`([\w.]+)[^`]*`", row.split(" | ")[-1])
    assert len(names) > 40
    for name in names:
        first, _, rest = name.partition(".")
        if rest:
            if first not in known:
                (path,) = (ROOT / "jfbnb").rglob(f"{first}.py")
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                known[first] = importlib.import_module(module)
            operator.attrgetter(rest)(known[first])  # raises where there is none
        else:
            assert re.search(rf"\b{name}\b", source), name


def test_sections_in_documents_exist():
    """A section number is one of the notebook with that number."""
    sections = set()
    for path in (ROOT / "notebooks").glob("0*.ipynb"):
        sections |= set(re.findall(r"\"## (\d\.\d+) ", path.read_text(encoding="utf-8")))
    for name in ("glossary.md", "teaching.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?<![\d.])([1-6]\.\d{1,2})(?![\d.]*\d)", text))
        assert named and named <= sections, named - sections
