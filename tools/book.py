"""The executed notebooks as a static site that opens from disk: `make book`, into build/book/.

nbconvert makes the pages. Formulas become MathML, which browsers draw by themselves, so that a page
asks nothing of the network. An explorer is shown as its picture, the swipe comparison as it is.
"""

import html
import re
import sys
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>(?:[^$\n]|\n(?!\n))+?)\$", re.S)
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)  # dollars in code are dollars
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; font-family: sans-serif;
line-height: 1.5; }} td, th {{ border-bottom: 1px solid #ccc; padding: 2px 8px; text-align: left; }}
table {{ border-collapse: collapse; }}</style></head><body>{body}</body></html>
"""


def main(book: Path = ROOT / "build" / "book") -> int:
    names = {}
    for path in (*sorted((ROOT / "notebooks").glob("*.ipynb")),
                 *sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))):
        target = (book / path.relative_to(ROOT)).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        notebook = nbformat.read(path, as_version=4)
        target.write_text(notebook_page(notebook), encoding="utf-8")
        names[target.relative_to(book).as_posix()] = title(notebook.cells[0].source)
    for path in sorted((ROOT / "docs").glob("*.md")):
        target = (book / path.relative_to(ROOT)).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        source = path.read_text(encoding="utf-8")
        target.write_text(PAGE.format(title=html.escape(title(source)), body=text_page(source)),
                          encoding="utf-8")
        names[target.relative_to(book).as_posix()] = title(source)
    links = "\n".join(f"- [{name}]({target})" for target, name in names.items())
    body = text_page(f"# jfbnb\n\nSolving inverse problems with implicit networks, trained by "
                     f"Jacobian-free backpropagation.\n\n{links}\n")
    (book / "index.html").write_text(PAGE.format(title="jfbnb", body=body), encoding="utf-8")
    print(f"Written: {book / 'index.html'} and {len(names)} more pages")
    return 0


def title(source: str) -> str:
    """The first heading's text."""
    return re.search(r"^# (.+)$", source, flags=re.M)[1].replace("`", "")


def notebook_page(notebook: nbformat.NotebookNode) -> str:
    """One notebook as an HTML page without a request to anywhere."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links_to_pages(with_mathml(cell.source))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "text/markdown" in data:
                data["text/markdown"] = with_mathml(data["text/markdown"])
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="")
    page, _ = exporter.from_notebook_node(
        notebook, {"metadata": {"name": title(notebook.cells[0].source)}})
    # The script for diagrams, which no page has, would fetch its parts from outside.
    page = re.sub(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', "", page,
                  flags=re.S)
    home = '<p><a href="{}index.html">All pages</a></p>'
    depth = "../../" if "Solutions" in notebook.cells[0].source else "../"
    return re.sub(r"(<body[^>]*>)", lambda m: m[1] + home.format(depth), page, count=1)


def text_page(source: str) -> str:
    return markdown2html_mistune(links_to_pages(with_mathml(source)))


def with_mathml(source: str) -> str:
    """Markdown whose formulas are MathML."""
    def formula(match: re.Match) -> str:
        kind = match.lastgroup
        mathml = convert(match[kind].strip(), display="block" if kind == "display" else "inline")
        return mathml.replace("\n", " ")

    return "".join(part if part.startswith("`") else FORMULA.sub(formula, part)
                   for part in CODE.split(source))


def links_to_pages(source: str) -> str:
    """Links to notebooks and documents become links to their pages, those to code its name."""
    source = re.sub(r"\[([^]\n]+)\]\((?!\w+:)[^)]+?\.py\)", r"`\1`", source)
    return re.sub(r"\]\((?!\w+:)([^)]+?)\.(ipynb|md)\)", r"](\1.html)", source)


if __name__ == "__main__":
    sys.exit(main())
