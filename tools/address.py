"""Write the repository's address wherever a page or a notebook names it: `make address`.

It stands as `Repository` in pyproject.toml, and is changed there alone.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMED = re.compile(  # what comes before owner and name, which no link to another repository has
    r"((?:git clone |git pull -q |repository-code: \")https://github\.com/"
    r"|https://colab\.research\.google\.com/github/|https://mybinder\.org/v2/gh/)[\w.-]+/[\w.-]+")
BOOK = re.compile(r"https://[\w-]+\.github\.io/[\w.-]+")


def repository() -> tuple[str, str]:
    """Its owner and its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    if match := re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?", address):
        return match[1], match[2]
    sys.exit(f"pyproject.toml: Repository is {address}: badges and the book need an address "
             "https://github.com/OWNER/NAME")


def addressed(owner: str, name: str) -> dict[Path, str]:
    """The files that name the repository, by path, with this owner and name."""
    paths = [ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "docs" / "teaching.md",
             *(ROOT / "notebooks").glob("*.ipynb")]
    return {path: BOOK.sub(f"https://{owner}.github.io/{name}", NAMED.sub(
        rf"\g<1>{owner}/{name}", path.read_text(encoding="utf-8"))) for path in paths}


if __name__ == "__main__":
    for path, text in addressed(*repository()).items():
        path.write_text(text, encoding="utf-8")
