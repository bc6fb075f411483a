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


def main() -> int:
    for path, text in addressed(*repository()).items():
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


def repository() -> tuple[str, str]:
    """Its owner and its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    if not (match := re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?", address)):
        sys.exit(f"pyproject.toml: Repository is {address}: Colab, Binder and the book's page need "
                 "https://github.com/OWNER/NAME")
    return match[1], match[2]


def addressed(owner: str, name: str) -> dict[str, str]:
    """The files that name the repository, by path, with this owner and name."""
    paths = ["README.md", "CITATION.cff", "docs/teaching.md",
             *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb"))]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    return {path: BOOK.sub(f"https://{owner}.github.io/{name}",
                           NAMED.sub(rf"\g<1>{owner}/{name}", text))
            for path, text in texts.items()}


if __name__ == "__main__":
    sys.exit(main())
