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
LINK = re.compile(r"\[([^\[\]\n]+)\]\([^)\s]+\)")
PICTURES = {"image/png", "image/jpeg", "text/html", "text/markdown"}
TURN = """<style>.jp-Cell[hidden] { display: none; } img { max-width: 100%; }
main { padding: 0 3vw !important; } nav { position: fixed; right: .5em; bottom: .3em; }
@media print { .jp-Cell[hidden] { display: block; } nav { display: none; } }</style>
<nav><button onclick="turn(-1)">◀</button> <span></span> <button onclick="turn(1)">▶</button></nav>
<script>const cells = [...document.querySelectorAll(".jp-Cell")];
const starts = cells.flatMap((cell, i) => cell.querySelector("h1, h2") ? [i] : []);
const boxes = [...document.querySelectorAll("pre, .jp-InputArea-editor")];
let at = parseInt(location.hash.slice(1)) - 1 || 0;
function turn(by) {
  at = Math.max(0, Math.min(starts.length - 1, at + by));
  location.hash = at + 1;
  cells.forEach((cell, i) => { cell.hidden = i < starts[at] || i >= starts[at + 1]; });
  document.querySelector("nav span").textContent = `${at + 1} / ${starts.length}`;
  for (let zoom = 2, fits = false; zoom > 0.5 && !fits; zoom -= 0.1) {  // as large as fits
    document.querySelector("main").style.zoom = zoom;
    fits = document.documentElement.scrollHeight <= innerHeight &&
      boxes.every(box => box.scrollWidth <= box.clientWidth);
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
    course, made = slides(), []
    for minutes, what, show, ask, answer in ([cell.strip() for cell in row] for row in rows):
        made.append((f"# {what[0].upper()}{what[1:]}\n\nMinutes {minutes}", []))
        made += [slide for item in show.split(", ") for slide in shown(item, course)]
        made += [(f"# {ask}", []), (f"# {ask}\n\n{answer}", [])]
    cells = [cell for text, code in made for cell in (new_markdown_cell(text), *code)]
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
                picture = any(PICTURES & out.get("data", {}).keys() for out in cell.outputs)
                cell.metadata = {"transient": {"remove_source": picture}}
                made.append((heading, [cell]))
                continue
            for paragraph in LINK.sub(r"\1", cell.source).split("\n\n"):
                if paragraph.startswith("## "):
                    heading = paragraph
                elif made and made[-1][0].startswith(f"{heading}\n\n") and (
                        len(made[-1][0]) + len(paragraph) < LONG
                        or len(made[-1][0]) < SHORT or paragraph.startswith("$$")):
                    made[-1] = (f"{made[-1][0]}\n\n{paragraph}", [])
                else:
                    made.append((f"{heading}\n\n{paragraph}", []))
    return made


def shown(item: str, course: list) -> list:
    """The slides of "1.2", "4.1 to 4.3", "Table 2" (by a heading), or "the figure in 5.5"."""
    ends = [[i for i, (text, _) in enumerate(course) if re.match(rf"## .*\b{name}\b", text)]
            for name in re.findall(r"\d\.\d+", item) or [item]]
    found = course[ends[0][0]:ends[-1][-1] + 1]
    pictures = [slide for slide in found for c in slide[1] if c.metadata.transient.remove_source]
    return pictures[-1:] if " in " in item else found


if __name__ == "__main__":
    sys.exit(main())
