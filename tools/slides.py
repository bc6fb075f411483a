"""One lecture as slides: `make slides` collects what the table in docs/teaching.md shows.

build/slides/lesson.html opens from disk, without a kernel or the network. A section comes with its
text, code and pictures; "the explorer in 1.7" is the last picture there. Arrow keys turn the page.
"""

import re
import sys
from pathlib import Path

import nbformat
from book import ROOT, exported
from nbformat.v4 import new_markdown_cell, new_notebook

LONG, SHORT = 700, 100  # characters of a slide's text
PICTURES = {"image/png", "image/jpeg", "text/html", "text/markdown"}
TURN = """<style>.jp-Cell[hidden] { display: none; } img { max-width: 100%; }
main { padding: 0 3vw !important; } nav { position: fixed; right: .5em; bottom: .3em; }
@media print { .jp-Cell[hidden] { display: block; } nav { display: none; } }</style>
<nav><button onclick="turn(-1)">◀</button> <span></span> <button onclick="turn(1)">▶</button></nav>
<script>const cells = [...document.querySelectorAll(".jp-Cell")], steps = [];
for (const cell of cells) {
  if (cell.querySelector("h1, h2")) steps.push([cell]);
  else if (cell.querySelector(".celltag_answer")) steps.push([...steps.at(-1), cell]);
  else steps.at(-1).push(cell);
}
let at = parseInt(location.hash.slice(1)) - 1 || 0;
function turn(by) {
  at = Math.max(0, Math.min(steps.length - 1, at + by));
  location.hash = at + 1;
  for (const cell of cells) cell.hidden = !steps[at].includes(cell);
  document.querySelector("nav span").textContent = `${at + 1} / ${steps.length}`;
  const boxes = [...document.querySelectorAll("pre, .jp-InputArea-editor")];
  for (let zoom = 2; zoom > 0.5; zoom -= 0.1) {  // as large as fits
    document.querySelector("main").style.zoom = zoom;
    if (document.documentElement.scrollHeight <= innerHeight &&
        boxes.every(box => box.scrollWidth <= box.clientWidth)) break;
  }
}
onkeydown = event => {
  const by = {ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1}[event.key];
  if (by && !event.target.closest("canvas, input")) { event.preventDefault(); turn(by); }
};
onload = onresize = () => turn(0);</script>"""


def main(target: Path = ROOT / "build" / "slides" / "lesson.html") -> int:
    lecture = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8").split(
        "## One lecture of 90 minutes")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in re.findall(r"^\|.*\|$", lecture, re.M)[2:]]
    course, cells = slides(), []
    for minutes, what, show, ask, answer in ([cell.strip() for cell in row] for row in rows):
        cells.append(new_markdown_cell(f"# {what[0].upper()}{what[1:]}\n\nMinutes {minutes}"))
        for item in show.split(", "):
            for text, code in shown(item, course):
                cells += [new_markdown_cell(text), *code]
        cells += [new_markdown_cell(f"# {ask}"),
                  new_markdown_cell(answer, metadata={"tags": ["answer"]})]
    page = exported(new_notebook(cells=cells), "jfbnb", exclude_input_prompt=True,
                    exclude_output_prompt=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page.replace("</body>", f"{TURN}</body>", 1), encoding="utf-8")
    print(f"Written: {target}")
    return 0


def slides() -> list[tuple[str, list[nbformat.NotebookNode]]]:
    """Of the course: text under its section's heading, or one code cell, a picture without code."""
    made, heading = [], ""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                cell.id = f"slide-{len(made)}"
                cell.metadata = {"transient": {"remove_source": is_picture([cell])}}
                made.append((heading, [cell]))
                continue
            text = re.sub(r"\[([^\[\]\n]+)\]\([^)\s]+\)", r"\1", cell.source)  # without links
            for paragraph in text.split("\n\n"):
                if paragraph.startswith("## "):
                    heading = paragraph
                elif made and made[-1][0].startswith(f"{heading}\n\n") and (
                        len(made[-1][0]) + len(paragraph) < LONG
                        or len(made[-1][0]) < SHORT or paragraph.startswith("$$")):
                    made[-1] = (f"{made[-1][0]}\n\n{paragraph}", [])
                else:
                    made.append((f"{heading}\n\n{paragraph}", []))
    return made


def is_picture(code: list[nbformat.NotebookNode]) -> bool:
    return any(PICTURES & output.get("data", {}).keys() for cell in code for output in cell.outputs)


def shown(item: str, course: list) -> list:
    """The slides of "1.2", "4.1 to 4.3", "Table 2" (by a heading), or "the figure in 5.5"."""
    ends = [[i for i, (text, _) in enumerate(course) if re.match(rf"## .*\b{name}\b", text)]
            for name in re.findall(r"\d\.\d+", item) or [item]]
    found = course[ends[0][0]:ends[-1][-1] + 1]
    return [slide for slide in found if is_picture(slide[1])][-1:] if " in " in item else found


if __name__ == "__main__":
    sys.exit(main())
