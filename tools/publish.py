"""Carry finished runs' results into what people read: figures/published, notebooks, pages.

`make publish PROFILE=cpu` copies what a run left in figures/cpu. For quick, the default, it also
stores the outputs in runs/quick with the notebooks, each one's running time in its first cell, and
the trained networks in data/weights/quick, with which `make test` runs the notebooks.
Then it fills the marked blocks in README.md and docs/ with tables and figures from runs' files.
"""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
from PIL import Image

from jfbnb.teaching.tables import SPENT
from jfbnb.training.methods import JFB, METHODS

ROOT = Path(__file__).resolve().parents[1]
RUN = "quick"
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PUBLISHED = "figures/published"  # all else in figures/ is whoever runs the notebooks' own
PROFILES = ("quick", "cpu")  # those whose results are published
RESULTS = "benchmarks/results"
LABELS = {"measurement": "First guess", "jfb": "JFB", "jfb-energy": "JFB, energy",
          "total-variation": "Total variation", "tikhonov": "Tikhonov",
          "skimage": "scikit-image's best"}
Read = Callable[[str], str]  # a project file's text, by its path


def main(names: list[str]) -> int:
    def read(path: str) -> str:
        return (ROOT / path).read_text(encoding="utf-8")

    names = names or [RUN]
    for name in names:
        if not (ROOT / "figures" / name / "provenance.json").is_file():
            sys.exit(f"no finished run in figures/{name}: start `jfbnb reproduce` first")
        shutil.rmtree(ROOT / PUBLISHED / name, ignore_errors=True)
        shutil.copytree(ROOT / "figures" / name, ROOT / PUBLISHED / name)
        if name != RUN:  # pictures of CelebA's images may not be passed on
            remove_photographs(ROOT / PUBLISHED / name)
    if RUN in names:
        provenance = json.loads(read(f"{PUBLISHED}/{RUN}/provenance.json"))
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            publish_notebook(path, ROOT / "runs" / RUN / path.name,
                             running_time(provenance, path.stem))
        for path in sorted((ROOT / "runs" / RUN).glob("*.safetensors")):
            for file in (path, path.with_suffix(".json")):
                shutil.copy(file, ROOT / "data" / "weights" / RUN)
    for path, text in filled(read).items():
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


def remove_photographs(folder: Path) -> None:
    """Delete all figures that show images, and their PDFs; drawings stay."""
    for path in folder.rglob("*.png"):
        if not is_drawing(Image.open(path)):
            path.unlink()
            path.with_suffix(".pdf").unlink()


def is_drawing(image: Image.Image) -> bool:
    """True if most pixels equal their right neighbour: 87% in drawings, 73% in grey images."""
    pixels = np.asarray(image.convert("RGB"))
    return (pixels[:, 1:] == pixels[:, :-1]).all(axis=-1).mean() > 0.8


def filled(read: Read) -> dict[str, str]:
    """README.md and the pages in docs/, by path, with their blocks filled.

    A block's name is that of one of `BLOCKS`, or the path of a Markdown file that a run wrote.
    """
    def fill(match: re.Match) -> str:
        name = match[1]
        text = BLOCKS[name](read) if name in BLOCKS else read(name).strip()
        return f"<!-- {name} -->\n{text}\n<!-- end {name} -->"

    return {path: re.sub(r"<!-- (?!end )(.+?) -->.*?<!-- end \1 -->", fill, read(path), flags=re.S)
            for path in PAGES}


def running_time(provenance: dict, name: str) -> str:
    """What a notebook's first cell says."""
    seconds = provenance["steps"][name]["seconds"]
    return f"{seconds:.0f} s for profile `{RUN}` on {provenance['machine']}"


def publish_notebook(path: Path, executed_path: Path, time: str) -> None:
    """Store the executed notebook's outputs, cell by cell, and the running time."""
    notebook = nbformat.read(path, as_version=4)
    executed = {c.id: c for c in nbformat.read(executed_path, as_version=4).cells}
    count = 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if executed[cell.id].source != cell.source:
            sys.exit(f"{path.name}: {cell.id} has changed since the run; run it again")
        count += 1
        cell.outputs = executed[cell.id].outputs
        cell.execution_count = count
        for output in cell.outputs:
            # A widget without its kernel is an error message; its picture stays.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if "image/png" in output.get("data", {}):
                kind, content = packed(output["data"].pop("image/png"))
                output["data"][kind] = content
                output["metadata"][kind] = output["metadata"].pop("image/png", {})
            if "execution_count" in output:
                output["execution_count"] = count
    first = notebook.cells[0]
    first.source = re.sub("(<!-- time -->).*?(<!-- end time -->)", rf"\g<1>{time}\2", first.source)
    nbformat.write(notebook, path)


def packed(png: str) -> tuple[str, str]:
    """A picture's type and content: a drawing as a PNG of 256 colours, a photograph as a JPEG."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    kind, options = "jpeg", {"quality": 90}
    if is_drawing(image):
        image, kind, options = image.quantize(256, dither=Image.Dither.NONE), "png", {}
    file = io.BytesIO()
    image.save(file, kind, optimize=True, **options)
    return f"image/{kind}", base64.b64encode(file.getvalue()).decode() + "\n"


# --- blocks -------------------------------------------------------------------------------------


def load(read: Read, path: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(read(path)))


def front(read: Read) -> str:
    """What README's picture shows, and how long its first command takes."""
    rows = load(read, f"{RESULTS}/photographs_restoration.csv")
    rows = rows[rows.blur.str.startswith("disk") & (rows.photograph == rows.photograph[0])]
    psnr = rows.groupby("method").PSNR.max()
    provenance = json.loads(read(f"{PUBLISHED}/{RUN}/provenance.json"))
    minutes = sum(step["seconds"] for step in provenance["steps"].values()) / 60
    return (f"*{rows.photograph.iloc[0].capitalize()}, out of focus by a {rows.blur.iloc[0]}: "
            f"{rows.input.iloc[0]:.1f} dB; by Tikhonov's regulariser {psnr['tikhonov']:.1f} dB, by "
            f"JFB {psnr['jfb']:.1f} dB. `make reproduce` took {minutes:.0f} minutes on "
            f"{provenance['machine']}, once installed.*")


def summary(read: Read) -> str:
    """Table 2 of CelebA, in short."""
    table = load(read, f"{PUBLISHED}/cpu/table2_comparison.csv").set_index("Method")
    table = table[["PSNR (dB)", "± PSNR", "SSIM", "Converged", SPENT]].dropna(subset="PSNR (dB)")
    table["Converged"] = [f"{share:.0%}" if share == share else "" for share in table.Converged]
    table[SPENT] = [f"{spent:,.0f}" if spent == spent else "" for spent in table[SPENT]]
    images = len(load(read, f"{PUBLISHED}/cpu/metrics.csv").image.unique())
    text = table.to_markdown(floatfmt=("", ".2f", ".2f", ".3f", "", ""))
    return (f"{text}\n\n{images} test images of CelebA, protocol `paper`; ± is over "
            "images.")


def pairs(read: Read, profile: str) -> str:
    """How far each method's PSNR is from JFB's on the same images, with its standard error."""
    metrics = load(read, f"{PUBLISHED}/{profile}/metrics.csv")
    psnr = metrics.pivot(index="image", columns="method", values="psnr")
    apart = psnr.sub(psnr[JFB.name], axis=0).drop(columns=JFB.name)
    table = pd.DataFrame({"minus JFB, splitting (dB)": apart.mean(), "±": apart.sem()})
    table.index = pd.Index([METHODS[name].label for name in table.index], name="Method")
    return table.sort_values("minus JFB, splitting (dB)", ascending=False).to_markdown(
        floatfmt=("", "+.3f", ".3f"))


def warning(read: Read) -> str:
    """What `deblur` says of a photograph with a wrong kernel."""
    rows = load(read, f"{RESULTS}/photographs_mismatches.csv")
    row = rows[(rows.model == "wrong") & (rows.case == "disk of radius 4")].iloc[0]
    lines = (f"warning: {row.photograph}.png: {line}" for line in row.warning.split(" | "))
    return "\n".join(("```", *lines, "```"))


def machine(read: Read) -> str:
    """Where the benchmark ran."""
    found = json.loads(read(f"{RESULTS}/provenance.json"))["step"]["machine"]
    libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "deepinv", "torchdeq"))
    return (f"{found['cpu']}, {found['threads']} threads, {found['vector instructions']}; "
            f"{libraries}.")


def fast(read: Read) -> str:
    """What README says of speed, a sentence for each of its figures."""
    large = load(read, f"{RESULTS}/photographs_large.csv")
    most = large.loc[large.megapixels.idxmax()]
    both = large.pivot(index="megapixels", columns="blur", values="seconds").dropna()
    slower = (both.max(axis=1) / both[most.blur]).iloc[-1]
    moved = large[(large.megapixels == both.index[-1]) & (large.blur != most.blur)]
    stalls = "" if moved.converged.all() else ", and some of its tiles do not converge"
    return (f"A photograph of {most.megapixels:g} megapixels, blurred by a Gaussian, is restored "
            f"in {most.seconds / 60:.1f} minutes on two cores; where the camera has moved, one of "
            f"{both.index[-1]:g} takes {slower:.1f} times as long{stalls}.")


def photographs(read: Read) -> str:
    """Mean PSNR on photographs, blurred and measured otherwise, each method at its best setting."""
    blurs = load(read, f"{RESULTS}/photographs_restoration.csv")
    others = load(read, f"{RESULTS}/photographs_operators.csv")
    others = others[others.photograph != "chelsea"]  # which chose the weights
    tables = []
    for key, setting, rows in (("blur", "setting", blurs), ("operator", "weight", others)):
        psnr = rows.groupby([key, "method", setting], dropna=False).PSNR.mean()
        best = psnr.groupby(level=[0, 1]).max().unstack()
        if key == "blur":
            best["measurement"] = rows.groupby(key).input.mean()
            best["skimage"] = best.filter(like="skimage").max(axis=1)
        table = best[[name for name in LABELS if name in best]].rename(columns=LABELS)
        converged = rows[rows.method == "jfb"].groupby(key).converged.mean()
        table["JFB converged"] = converged.map("{:.0%}".format)
        tables.append(table.rename_axis("PSNR (dB)").to_markdown(floatfmt=".2f"))
    return "\n\n".join(tables)


def nearly(read: Read) -> str:
    """Mean PSNR where the given kernel is nearly right, and where it is right."""
    rows = load(read, f"{RESULTS}/photographs_nearly.csv")
    rows["right"] = rows.PSNR + rows.lost
    keys = ["blur", "told"]
    ways = rows.pivot_table("PSNR", keys, "way", sort=False)
    means = rows.groupby(keys, sort=False)[["input", "right"]].mean()
    converged = rows[rows.way == "jfb"].groupby(keys, sort=False).converged.mean()
    return pd.DataFrame({
        "Picture": means.input, "JFB, the right kernel": means.right, "JFB, this one": ways["jfb"],
        "and 1.5 times the noise": ways["jfb, 1.5 times the noise"],
        "JFB, energy, this one": ways["jfb-energy"],
        "JFB converged": converged.map("{:.0%}".format),
    }).reset_index().rename(columns={"blur": "PSNR (dB), blurred by", "told": "kernel given"}
                            ).to_markdown(index=False, floatfmt=".2f")


def stored(read: Read) -> str:
    """Mean PSNR of pictures as people have them, and the least that one gains."""
    rows = load(read, f"{RESULTS}/photographs_stored.csv")
    rows["gain"] = rows.PSNR - rows.input
    groups = rows.groupby(["stored", "noise"], sort=False)
    return pd.DataFrame({
        "Picture": groups.input.mean(), "JFB": groups.PSNR.mean(), "least gain": groups.gain.min(),
        "noise taken": groups["noise taken"].mean(),
        "doubted": groups.doubtful.mean().map("{:.0%}".format),
    }).reset_index().rename(columns={"stored": "PSNR (dB)"}).to_markdown(
        index=False, floatfmt=("", "g", ".2f", ".2f", "+.2f", ".3f", ""))


def times(read: Read) -> str:
    """Seconds per notebook, one row per profile and machine."""
    rows = []
    for profile in PROFILES:
        provenance = json.loads(read(f"{PUBLISHED}/{profile}/provenance.json"))
        steps = provenance["steps"].values()
        taken = any(step["parameters"].get("weights") for step in steps)
        rows.append({"profile": profile + (", nothing trained" if taken else ""),
                     "machine": provenance["machine"], "device": provenance["device"],
                     **{name[:2]: f"{step['seconds']:.0f}"
                        for name, step in provenance["steps"].items()},
                     "all": f"{sum(step['seconds'] for step in steps):.0f}"})
    return pd.DataFrame(rows).fillna("").to_markdown(index=False)


BLOCKS = {"front": front, "summary": summary, "warning": warning, "machine": machine, "fast": fast,
          "photographs": photographs, "nearly": nearly, "stored": stored,
          "times": times,
          **{f"pairs {profile}": partial(pairs, profile=profile) for profile in PROFILES}}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
