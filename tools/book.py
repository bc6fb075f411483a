"""The executed notebooks as a static site that opens from disk: `make book`, into build/book/.

nbconvert makes the pages. Formulas become MathML, which browsers draw by themselves, so that a page
asks nothing of the network. An explorer is shown as its picture, the swipe comparison as it is.
The worked solutions come along only if they are asked for.
"""

import base64
import html
import json
import mimetypes
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html_mistune

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r"\$\$(?P<display>.+?)\$\$|\$(?P<inline>(?:[^$\n]|\n(?!\n))+?)\$", re.S)
SECTION = re.compile(r'<h([12])\b[^>]*?id="(?P<id>[^"]+)"[^>]*>(?P<title>.*?)</h\1>'
                     r"(?P<text>.*?)(?=<h[12]\b|\Z)", re.S)
NUMBERED = re.compile(r"\d\.\d")
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.S)  # dollars in code are dollars
# In the dark all is inverted but pictures, which are inverted twice.
STYLE = """@media (prefers-color-scheme: dark) { html { background: #fff; filter: invert(.9)
hue-rotate(180deg); } img, canvas { filter: invert(1) hue-rotate(180deg); } }
nav, .find { font-family: sans-serif; padding: .5em 1em; line-height: 1.5; }
.find input { font-size: 1em; width: 20em; max-width: 100%; box-sizing: border-box; }
table, math[display="block"] { display: block; overflow-x: auto; }"""
PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body {{ max-width: 46em; margin: 2em auto; padding: 0 1em; font-family: sans-serif;
line-height: 1.5; }} td, th {{ border-bottom: 1px solid #ccc; padding: 2px 8px; text-align: left; }}
table {{ border-collapse: collapse; }} img {{ max-width: 100%; }}
</style></head><body>{body}</body></html>
"""
FIND = """<div class="find"><input type="search" placeholder="Search all pages"
aria-label="Search all pages"><ul aria-live="polite"></ul></div>
<script src="{home}search.js" defer></script>"""
SEARCH = r"""const home = document.currentScript.src, box = document.querySelector(".find input");
box.oninput = () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  const all = text => words.every(word => text.toLowerCase().includes(word));
  const hits = words.length ? SECTIONS.filter(({title, text}) => all(`${title} ${text}`))
    .sort((a, b) => all(b.title) - all(a.title)).slice(0, 20) : [];
  const items = hits.map(({address, title, text}) => {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = new URL(address, home);
    link.textContent = title;
    const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 40);
    item.append(link, ": " + text.slice(at, at + 120));
    return item;
  });
  document.querySelector(".find ul").replaceChildren(
    ...(words.length && !items.length ? ["No section has all these words."] : items));
};
"""
INTRODUCTION = ("<h1>jfbnb</h1><p>Solving inverse problems with implicit networks, trained by "
                "Jacobian-free backpropagation.</p>")
TO_LEARN = ("glossary", "teaching", "photographs")  # of the documents; the others are reports


def main(book: Path = ROOT / "build" / "book", solutions: bool = False) -> int:
    documents = sorted((ROOT / "docs").glob("*.md"))
    parts = {"The notebooks": sorted((ROOT / "notebooks").glob("*.ipynb")),
             "Solutions": sorted((ROOT / "notebooks").glob("solutions/*.ipynb")) * solutions,
             "To learn and to teach": [path for path in documents if path.stem in TO_LEARN],
             "Reports": [path for path in documents if path.stem not in TO_LEARN]}
    paths = [path for part in parts.values() for path in part]
    pages = {path: (notebook_page if path.suffix == ".ipynb" else document_page)(path, paths)
             for path in paths}
    found = {path: list(sections(path, page)) for path, page in pages.items()}
    contents = "".join(f"<h2>{name}</h2><ul>{''.join(listed(found[path]) for path in part)}</ul>"
                       for name, part in parts.items() if part)
    pages[ROOT / "index.md"] = PAGE.format(title="jfbnb", body=INTRODUCTION + contents)
    shutil.rmtree(book, ignore_errors=True)
    for path, page in pages.items():
        target = book / path.relative_to(ROOT).with_suffix(".html")
        target.parent.mkdir(parents=True, exist_ok=True)
        home = "../" * (len(path.relative_to(ROOT).parts) - 1)
        way = navigation(path, parts["The notebooks"], home) if path in paths else ""
        head, start, body = re.split(r"(<body[^>]*>)", page, maxsplit=1)
        head = head.replace("</head>", f"<style>{STYLE}</style></head>")
        body = way + FIND.format(home=home) + body.replace("</body>", f"{way}</body>")
        target.write_text(head + start + body, encoding="utf-8")
    index = json.dumps([section for path in paths for section in found[path]], ensure_ascii=False)
    (book / "search.js").write_text(f"const SECTIONS = {index};\n{SEARCH}", encoding="utf-8")
    print(f"Written: {book / 'index.html'} and {len(paths)} more pages")
    return 0


def sections(path: Path, page: str) -> Iterator[dict[str, str]]:
    """A page's beginning and its sections: address in the book, title and text."""
    address = path.relative_to(ROOT).with_suffix(".html").as_posix()
    body = re.sub(r"<(style|script)\b.*?</\1>", "", page[page.index("<body"):], flags=re.S)
    body = re.sub(r"</?(span|a|code|em|strong|m\w+)\b[^>]*>", "", body)  # within words
    name = ""
    for match in SECTION.finditer(body):
        title, text = (" ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())
                       for part in match.group("title", "text"))
        title = title.removesuffix("¶").strip()
        name = name or title
        yield {"address": f"{address}#{match['id']}", "text": text,
               "title": title if NUMBERED.match(title) or title == name else f"{name}: {title}"}


def listed(found: list[dict[str, str]]) -> str:
    """A page and its numbered sections, as an item of the contents."""
    first, *others = (f'<li><a href="{html.escape(s["address"])}">{html.escape(s["title"])}</a>'
                      for s in found if s is found[0] or NUMBERED.match(s["title"]))
    return f"{first}<ul>{''.join(others)}</ul></li>" if others else f"{first}</li>"


def navigation(path: Path, among: list[Path], home: str) -> str:
    """To all pages, and to those before and after this one."""
    links = [f'<a href="{home}index.html">All pages</a>']
    if path in among:
        i = among.index(path)
        links += [f'<a href="{among[k].stem}.html">{arrow} {number(among[k])}</a>'
                  for k, arrow in ((i - 1, "←"), (i + 1, "→")) if 0 <= k < len(among)]
    return f"<nav>{' · '.join(links)}</nav>"


def number(path: Path) -> str:
    """A notebook's, as its title has it."""
    return path.stem.split("_")[0].lstrip("0")


def title(source: str) -> str:
    """The first heading's text."""
    return re.search(r"^# (.+)$", source, flags=re.M)[1].replace("`", "")


def notebook_page(path: Path, pages: list[Path]) -> str:
    """One notebook as an HTML page without a request to anywhere."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = with_the_course(notebook.cells[0].source)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = links_to_pages(cell.source, path, pages)
    return exported(notebook, title(notebook.cells[0].source))


def exported(notebook: nbformat.NotebookNode, name: str, **options: bool) -> str:
    """A notebook by nbconvert, with formulas as MathML, and without what would ask the network."""
    alts = []  # what pictures show, which nbconvert leaves out
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("application/vnd.jupyter.widget-view+json", None)
            if "text/markdown" in data:
                data["text/markdown"] = with_mathml(data["text/markdown"])
            alts += [output.metadata.get(kind, {}).get("alt", "") for kind in data
                     if kind.startswith("image/")]
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="",
                            **options)
    page, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": name}})
    for alt in alts:
        page = page.replace('alt="No description has been provided for this image"',
                            f'alt="{html.escape(alt)}"', 1)
    # The script for diagrams, which no page has, would fetch its parts from outside.
    return re.sub(r'<script type="module">(?:(?!</script>).)*mermaid.*?</script>', "", page,
                  flags=re.S)


def with_the_course(source: str) -> str:
    """The line *Where we are*, whose notebooks are links."""
    stems = {number(path): path.stem for path in (ROOT / "notebooks").glob("0*.ipynb")}

    def linked(line: re.Match) -> str:
        return re.sub(r"(\d\w?) ([^→*\n]+?)(?= →|\*\*|$)",
                      lambda m: f"[{m[0]}]({stems[m[1]]}.ipynb)", line[0])

    return re.sub(r"^\*\*Where we are\*\*:.*$", linked, source, flags=re.M)


def document_page(path: Path, pages: list[Path]) -> str:
    source = path.read_text(encoding="utf-8")
    body = markdown2html_mistune(with_mathml(links_to_pages(source, path, pages)))
    return PAGE.format(title=html.escape(title(source)), body=body)


def with_mathml(source: str) -> str:
    """Markdown whose formulas are MathML."""
    def formula(match: re.Match) -> str:
        kind = match.lastgroup
        mathml = convert(match[kind].strip(), display="block" if kind == "display" else "inline")
        return mathml.replace("\n", " ")

    return "".join(part if part.startswith("`") else FORMULA.sub(formula, part)
                   for part in CODE.split(source))


def links_to_pages(source: str, path: Path, pages: list[Path]) -> str:
    """Links to notebooks and documents lead to their pages, and those to other files nowhere.

    Pictures come along.
    """
    def replaced(match: re.Match) -> str:
        mark, text, link = match.groups()
        target = (path.parent / link).resolve()
        if mark:
            content = base64.b64encode(target.read_bytes()).decode()
            return f"![{text}](data:{mimetypes.guess_type(target)[0]};base64,{content})"
        if target in pages:
            return f"[{text}]({Path(link).with_suffix('.html').as_posix()})"
        return f"`{text}`" if target.suffix == ".py" else text

    return re.sub(r"(!?)\[([^\[\]\n]+)\]\((?![\w+-]+:)([^)#\s]+)\)", replaced, source)


if __name__ == "__main__":
    sys.exit(main(solutions="--solutions" in sys.argv))
