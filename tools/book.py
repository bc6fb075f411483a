"""The executed notebooks as a static site that opens from disk: `make book`, into build/book/.

nbconvert makes the pages. Formulas become MathML, which browsers draw by themselves, so that a page
asks nothing of the network. An explorer is shown as its picture, the swipe comparison as it is.
"""

import base64
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
# In the dark all is inverted but pictures, which are inverted twice.
DARK = """@media (prefers-color-scheme: dark) { html { background: #fff; filter: invert(.9)
hue-rotate(180deg); } img, canvas { filter: invert(1) hue-rotate(180deg); } }
nav { font-family: sans-serif; padding: .5em 1em; } table { display: block; overflow-x: auto; }"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; font-family: sans-serif;
line-height: 1.5; }} td, th {{ border-bottom: 1px solid #ccc; padding: 2px 8px; text-align: left; }}
table {{ border-collapse: collapse; }} img {{ max-width: 100%; }}
{dark}</style></head><body>{body}</body></html>
"""
TO_LEARN = ("glossary", "teaching", "photographs")  # of the documents; the others are reports


def main(book: Path = ROOT / "build" / "book") -> int:
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    solutions = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
    documents = sorted((ROOT / "docs").glob("*.md"), key=lambda path: path.stem not in TO_LEARN)
    titles = {}
    for paths in (notebooks, solutions, documents):
        for path in paths:
            target = book / path.relative_to(ROOT).with_suffix(".html")
            target.parent.mkdir(parents=True, exist_ok=True)
            way = navigation(path, paths if path in notebooks else [])
            if path.suffix == ".ipynb":
                notebook = nbformat.read(path, as_version=4)
                titles[path] = title(notebook.cells[0].source)
                page = notebook_page(notebook, path, way)
            else:
                source = path.read_text(encoding="utf-8")
                titles[path] = title(source)
                page = PAGE.format(title=html.escape(titles[path]), dark=DARK,
                                   body=way + text_page(source, path) + way)
            target.write_text(page, encoding="utf-8")
    learn = [path for path in documents if path.stem in TO_LEARN]
    parts = {"The notebooks": notebooks, "Solutions": solutions, "To learn and to teach": learn,
             "Reports": [path for path in documents if path not in learn]}
    lists = "\n\n".join(f"## {name}\n\n" + "\n".join(
        f"- [{titles[path]}]({path.relative_to(ROOT).as_posix()})" for path in paths)
        for name, paths in parts.items())
    body = text_page("# jfbnb\n\nSolving inverse problems with implicit networks, trained by "
                     f"Jacobian-free backpropagation.\n\n{lists}\n", ROOT / "index.md")
    (book / "index.html").write_text(PAGE.format(title="jfbnb", body=body, dark=DARK),
                                     encoding="utf-8")
    print(f"Written: {book / 'index.html'} and {len(titles)} more pages")
    return 0


def navigation(path: Path, among: list[Path]) -> str:
    """To all pages, and to those before and after this one."""
    home = "../" * (len(path.relative_to(ROOT).parts) - 1)
    links = [f'<a href="{home}index.html">All pages</a>']
    if path in among:
        i = among.index(path)
        links += [f'<a href="{among[k].stem}.html">{arrow} {among[k].stem[:2].lstrip("0")}</a>'
                  for k, arrow in ((i - 1, "←"), (i + 1, "→")) if 0 <= k < len(among)]
    return f"<nav>{' · '.join(links)}</nav>"


def title(source: str) -> str:
    """The first heading's text."""
    return re.search(r"^# (.+)$", source, flags=re.M)[1].replace("`", "")


def notebook_page(notebook: nbformat.NotebookNode, path: Path, way: str) -> str:
    """One notebook as an HTML page without a request to anywhere."""
    notebook.cells[0].source = with_the_course(notebook.cells[0].source)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links_to_pages(with_mathml(cell.source), path)
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
    page = page.replace("</head>", f"<style>{DARK}</style></head>", 1)
    page = re.sub(r"(<body[^>]*>)", lambda m: m[1] + way, page, count=1)
    return page.replace("</body>", f"{way}</body>", 1)


def with_the_course(source: str) -> str:
    """The line *Where we are*, whose notebooks are links."""
    stems = {path.stem[1]: path.stem for path in (ROOT / "notebooks").glob("0*.ipynb")}

    def linked(line: re.Match) -> str:
        return re.sub(r"(\d) ([^→*\n]+?)(?= →|\*\*|$)",
                      lambda m: f"[{m[0]}]({stems[m[1]]}.ipynb)", line[0])

    return re.sub(r"^\*\*Where we are\*\*:.*$", linked, source, flags=re.M)


def text_page(source: str, path: Path) -> str:
    return markdown2html_mistune(links_to_pages(with_mathml(source), path))


def with_mathml(source: str) -> str:
    """Markdown whose formulas are MathML."""
    def formula(match: re.Match) -> str:
        kind = match.lastgroup
        mathml = convert(match[kind].strip(), display="block" if kind == "display" else "inline")
        return mathml.replace("\n", " ")

    return "".join(part if part.startswith("`") else FORMULA.sub(formula, part)
                   for part in CODE.split(source))


def links_to_pages(source: str, path: Path) -> str:
    """Links to notebooks and documents lead to their pages, and those to other files nowhere.

    Pictures come along.
    """
    def replaced(match: re.Match) -> str:
        mark, text, link = match.groups()
        target = (path.parent / link).resolve()
        if mark:
            content = base64.b64encode(target.read_bytes()).decode()
            return f"![{text}](data:image/png;base64,{content})"
        if target.suffix in (".ipynb", ".md") and target.relative_to(ROOT).parts[0] in (
                "notebooks", "docs"):
            return f"[{text}]({Path(link).with_suffix('.html').as_posix()})"
        return f"`{text}`" if target.suffix == ".py" else text

    return re.sub(r"(!?)\[([^\]\n]+)\]\((?![\w+-]+:)([^)#\s]+)\)", replaced, source)


if __name__ == "__main__":
    sys.exit(main())
