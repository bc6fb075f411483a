"""Carry finished runs' results into what people read: figures/published, notebooks, pages.

`make publish PROFILE=cpu` copies what a run left in figures/cpu. Of quick, the default, it stores
the outputs in runs/quick with the notebooks too, with each one's running time in its first cell.
Last it fills the marked blocks in README.md and docs/. No number there is typed by hand.
"""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

from jfbnb.teaching.tables import SPENT, trained_for
from jfbnb.training.methods import JFB, METHODS

ROOT = Path(__file__).resolve().parents[1]
RUN = "quick"
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PUBLISHED = "figures/published"  # all else in figures/ is whoever runs the notebooks' own
DRAWING = 8192  # colours, antialiasing included; a photograph has more
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
    if RUN in names:
        provenance = json.loads(read(f"{PUBLISHED}/{RUN}/provenance.json"))
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            publish_notebook(path, ROOT / "runs" / RUN / path.name,
                             running_time(provenance, path.stem))
    for path, text in filled(read).items():
        (ROOT / path).write_text(text, encoding="utf-8")
    return 0


def filled(read: Read) -> dict[str, str]:
    """README.md and the pages in docs/, by path, with their blocks; each is in one of them."""
    pages = {path: read(path) for path in PAGES}
    for name, text in blocks(read).items():
        found = [path for path, page in pages.items() if f"<!-- {name} -->" in page]
        if len(found) != 1:
            sys.exit(f"the block {name} is in {found or 'no page'}, not in one")
        pages[found[0]] = replace_block(pages[found[0]], name, text)
    return pages


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
                output["data"]["image/png"] = with_a_palette(output["data"]["image/png"])
            if "execution_count" in output:
                output["execution_count"] = count
    notebook.cells[0].source = replace_block(notebook.cells[0].source, "time", time, inline=True)
    nbformat.write(notebook, path)


def with_a_palette(png: str) -> str:
    """A drawing in 256 colours, a third of its size; a photograph in its own, packed as well."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if image.getcolors(DRAWING) is not None:
        image = image.quantize(256, dither=Image.Dither.NONE)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


def replace_block(text: str, name: str, new: str, inline: bool = False) -> str:
    """Put `new` between <!-- name --> and <!-- end name -->."""
    gap = "" if inline else "\n"
    pattern = rf"(<!-- {name} -->).*?(<!-- end {name} -->)"
    text, found = re.subn(pattern, lambda m: f"{m[1]}{gap}{new}{gap}{m[2]}", text, flags=re.S)
    if found != 1:
        sys.exit(f"{found} blocks named {name}, not one")
    return text


def blocks(read: Read) -> dict[str, str]:
    """The generated blocks, from the files that runs wrote."""
    blocks = {"times": times_table(read), "front": front(read), "summary": summary(read),
              "warning": warning(read)}
    for profile in profiles():
        markdown = read(f"{PUBLISHED}/{profile}/table2_comparison.md")
        blocks[f"table2 {profile}"] = markdown.strip()
        blocks[f"ranking {profile}"] = f"{ranking(read, profile)} {undecided(read, profile)}"
        if profile != RUN:
            blocks[f"equilibrium {profile}"] = equilibrium(read, profile)
            blocks[f"training {profile}"] = read(f"{PUBLISHED}/{profile}/rivals.md").strip()
    blocks["computation"] = computation(read, "cpu")
    blocks["bench"] = bench(read)
    blocks["speed"] = speed(read)
    blocks["fast"] = fast(read)
    blocks["photographs"] = photographs(read)
    blocks["nearly"] = nearly(read)
    for name in ("released", "grid_overview"):
        blocks[name] = read(f"benchmarks/results/{name}.md").strip()
    return blocks


def profiles() -> list[str]:
    """The profiles whose results are kept in the repository."""
    return [p for p in ("quick", "cpu", "paper", "best")
            if (ROOT / PUBLISHED / p / "table2_comparison.md").exists()]


def load(read: Read, path: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(read(path)))


def ranking(read: Read, profile: str) -> str:
    """Who is first in Table 2 among equals, by how much, and whether they were trained equally."""
    metrics = load(read, f"{PUBLISHED}/{profile}/metrics.csv")
    psnr = metrics.pivot(index="image", columns="method", values="psnr")
    known = [METHODS[name] for name in psnr if name in METHODS]
    kinds = {"no network": [m.name for m in known if m.restore],
             "one network": [m.name for m in known if m.model],
             "two": [m.name for m in known if m.head_of]}
    lines = [f"By mean PSNR over these {len(psnr)} images:", ""]
    for kind, names in kinds.items():
        first, *others = psnr[names].mean().sort_values(ascending=False).index
        best = psnr[first].mean()
        line = f"- with {kind}, **{METHODS[first].label}** is first with {best:.2f} dB"
        head_of = others[:1] + [name for name in others[1:]
                               if (METHODS[name].head_of or METHODS[name]) is JFB]
        for name in head_of:
            gap = psnr[first] - psnr[name]
            level = "level with it, " if gap.mean() < 2 * gap.sem() else ""
            line += (f"; {METHODS[name].label} is {level}{gap.mean():.3f} ± {gap.sem():.3f} dB "
                     "behind")
        lines.append(line + ".")
    errors = ("The errors are those of paired differences over images. They say nothing of other "
              "trainings, with other seeds.")
    spent = load(read, f"{PUBLISHED}/{profile}/table2_comparison.csv")[SPENT]
    return "\n".join([*lines, "", f"{errors} {trained_for(spent.dropna())}"])


def front(read: Read) -> str:
    """What README's picture shows, and how long its first command takes."""
    rows = load(read, "benchmarks/results/photographs_restoration.csv")
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
    table = table[["PSNR (dB)", "± PSNR", "SSIM", "Converged", SPENT]]
    table["Converged"] = [f"{share:.0%}" if share == share else "" for share in table.Converged]
    table[SPENT] = [f"{spent:,.0f}" if spent == spent else "" for spent in table[SPENT]]
    images = len(load(read, f"{PUBLISHED}/cpu/metrics.csv").image.unique())
    text = table.to_markdown(floatfmt=("", ".2f", ".2f", ".3f", "", ""))
    return (f"{text}\n\n{images} test images of CelebA, protocol `paper`; ± is over "
            "images.")


def warning(read: Read) -> str:
    """What `deblur` says of a photograph that it is told a wrong kernel of."""
    rows = load(read, "benchmarks/results/photographs_mismatches.csv")
    row = rows[(rows.model == "wrong") & (rows.case == "disk of radius 4")].iloc[0]
    lines = (f"warning: {row.photograph}.png: {line}" for line in row.warning.split(" | "))
    return "\n".join(("```", *lines, "```"))


def undecided(read: Read, profile: str) -> str:
    """Which differences in Table 2 its solves cannot tell: a sentence."""
    drift = load(read, f"{PUBLISHED}/{profile}/nb4_certificate.csv").drift
    return ("Where its solver stops, JFB is not yet where it ends: solved on, its mean PSNR moves "
            f"by {drift.mean():+.3f} dB ({len(drift)} validation images). Smaller differences "
            "decide nothing.")


def computation(read: Read, profile: str) -> str:
    """What an equilibrium has that unrolling has not, measured: memory and more computation."""
    MB = load(read, f"{PUBLISHED}/{profile}/nb4_cost.csv").pivot(
        index="K", columns="gradient", values="MB")
    growth = MB.loc[MB.index.max()] / MB.loc[MB.index.min()]
    psnr = load(read, f"{PUBLISHED}/{profile}/computation.csv").pivot(
        index="evaluations", columns="method", values="psnr")
    most = psnr.index.max()
    best = psnr["unrolled"].idxmax()
    return (f"From K = {MB.index.min()} to {MB.index.max()} iterations the memory of a training "
            f"step grows by a factor of {growth['JFB']:.2f} with JFB, of {growth['exact']:.2f} "
            f"with the exact gradient and of {growth['unrolled']:.0f} with unrolling. After "
            f"{', '.join(map(str, psnr.index))} evaluations of T the image of JFB has "
            f"{', '.join(f'{p:.2f}' for p in psnr['jfb'])} dB; the unrolled network, which is best "
            f"at {best} with {psnr['unrolled'][best]:.2f} dB, has {psnr['unrolled'][most]:.2f} dB "
            f"at {most}.")


def equilibrium(read: Read, profile: str) -> str:
    """What the certificate of notebook 4 says, and the other protocol's and the published PSNR."""
    found = load(read, f"{PUBLISHED}/{profile}/nb4_certificate.csv")
    drift, far = found.drift, (found.distance / found.residual).max()
    solved = found.evaluations < float("inf")
    scales = load(read, f"{PUBLISHED}/{profile}/psnr_scales.csv").set_index("JFB")
    psnr = scales["PSNR with data range 1 (dB)"]
    return (
        f"Is it an equilibrium? {solved.sum()} of {len(found)} validation images are solved, to a "
        f"relative residual of {found.residual[solved].max():.0e} as in the table, within "
        f"{found.evaluations[solved].max():.0f} evaluations of T (median "
        f"{found.evaluations.median():.0f}). The distance to x* is then up to {far:.0f} times the "
        f"residual. Applying T on, {found.further.min():.0f} to {found.further.max():.0f} times, "
        f"until once moves the image by {found.residual_later.max():.0e} at most, moves the PSNR "
        f"by less than 0.02 dB on {(drift.abs() < 0.02).mean():.0%} of the images, by "
        f"{drift[drift.abs().idxmax()]:+.3f} dB at worst, and its mean by {drift.mean():+.3f} dB. "
        f"The Jacobian's spectral radius at x*, by 30 power iterations, is at most "
        f"{found.radius.max():.3f}: below 1, so locally stable, on {(found.radius < 1).sum()}. "
        f"Its norm, found likewise and so from below, is at most "
        f"{found.norm.max():.3f}: below 1, so a contraction there, on {(found.norm < 1).sum()}."
        "\n\n"
        f"Told the kernel and the noise of the authors' code instead, the same weights reach "
        f"{psnr['this run, protocol code']:.2f} dB. The paper's {scales.iloc[0, 0]:.2f} dB for JFB "
        f"is {psnr['published']:.2f} dB on the usual scale. The scale of its other columns is not "
        "known, so both readings stand in the table, and nothing follows from them.")


def bench(read: Read) -> str:
    """What the benchmark promised and found, and on which machine."""
    found = json.loads(read("benchmarks/results/provenance.json"))["step"]["machine"]
    libraries = ", ".join(f"{name} {found[name]}" for name in ("torch", "deepinv", "torchdeq"))
    return (f"{found['cpu']}, {found['threads']} threads, {found['vector instructions']}; "
            f"{libraries}.\n\n{read('benchmarks/results/targets.md').strip()}")


def speed(read: Read) -> str:
    """A training step beside the peers', with our map."""
    step = load(read, "benchmarks/results/step.csv")
    keys = ["problem", "to distance"]
    peers = step[step.contender.str.endswith(" jfb, our map")].groupby(keys).seconds.min()
    shares = []
    for contender, words in (("jfbnb jfb", "in float32"),
                             ("jfbnb jfb, bf16", "with its first evaluations in bfloat16"),
                             ("jfbnb jfb, as shipped", "with second network and penalty too"),
                             ("jfbnb jfb, as best ships", "as profile `best` trains, where one "
                              "solve serves eight steps")):
        own = step[step.contender == contender]
        if len(own):
            share = own.set_index(keys).seconds / peers
            shares.append(f"{share.min():.2f} to {share.max():.2f} {words}")
    return ("Given our map, the peers solve the same equilibrium with the same network. Our step "
            f"takes these shares of the faster peer's time: {', '.join(shares)}.")


def fast(read: Read) -> str:
    """What README says of speed, a sentence for each of its figures."""
    step, large = (load(read, f"benchmarks/results/{name}.csv")
                   for name in ("step", "photographs_large"))
    own = step[step.problem.str.endswith("UNet") & (step["to distance"] == 0.01)]
    own = own.set_index("contender").seconds
    peer = own[own.index.str.endswith(" jfb, our map")].min()
    most = large.loc[large.megapixels.idxmax()]
    both = large.pivot(index="megapixels", columns="blur", values="seconds").dropna()
    slower = (both.max(axis=1) / both[most.blur]).iloc[-1]
    moved = large[(large.megapixels == both.index[-1]) & (large.blur != most.blur)]
    stalls = "" if moved.converged.all() else ", and some of its tiles do not converge"
    return ("Profile `best` solves once for eight steps. At protocol `paper`, where the peers are "
            "timed, a step of the U-Net, in the mean of the eight, takes "
            f"{own['jfbnb jfb, as best ships'] / peer:.2f} times what the faster of "
            "deepinv and torchdeq takes for one, on two cores. "
            f"A photograph of {most.megapixels:g} megapixels, blurred by a Gaussian, is restored "
            f"in {most.seconds / 60:.1f} minutes on two; where the camera has moved, one of "
            f"{both.index[-1]:g} takes {slower:.1f} times as long{stalls}.")


def photographs(read: Read) -> str:
    """PSNR on pictures that the package did not make: blurred, or measured by other operators."""
    def table(name: str) -> pd.DataFrame:
        return load(read, f"benchmarks/results/photographs_{name}.csv")

    def mean(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
        return rows.groupby(keys, sort=False, dropna=False).PSNR.mean().reset_index()

    blurs = table("restoration")
    best = mean(blurs, ["blur", "method", "setting"]).groupby(["blur", "method"]).PSNR.max()
    best = best.unstack()
    skimage = [name for name in best if name.startswith("skimage")]
    solved = blurs[blurs.method == "jfb"].groupby("blur", sort=False)
    first = pd.DataFrame({"Picture": solved.input.mean(), "Its frame": solved["input frame"].mean(),
                          "JFB": solved.PSNR.mean(), "its frame": solved.frame.mean(),
                          "JFB, energy": best["jfb-energy"],
                          "the DnCNN's": best["jfb-head"],
                          "Total variation": best["total-variation"],
                          "Tikhonov": best["tikhonov"],
                          "scikit-image's best": best[skimage].max(axis=1),
                          "JFB converged": solved.converged.mean().map("{:.0%}".format)})
    others = table("operators")
    others = others[others.photograph != "chelsea"]  # which chose the weights
    means = mean(others, ["operator", "method"]).pivot(index="operator", columns="method",
                                                       values="PSNR")
    solved = others[others.method == "jfb"].groupby("operator", sort=False)
    second = pd.DataFrame({"First guess": means["measurement"], "JFB": means["jfb"],
                           "JFB, energy": means["jfb-energy"],
                           "the DnCNN's": means["jfb-head"],
                           "Total variation": means["total-variation"],
                           "Tikhonov": means["tikhonov"],
                           "JFB converged": solved.converged.mean().map("{:.0%}".format)})
    return "\n\n".join(
        rows.rename_axis(title).to_markdown(floatfmt=".2f")
        for title, rows in (("PSNR (dB), blurred by", first), ("PSNR (dB), measured by", second)))


def nearly(read: Read) -> str:
    """PSNR where the kernel that is told is nearly right, and where it is."""
    rows = load(read, "benchmarks/results/photographs_nearly.csv")
    rows["right"] = rows.PSNR + rows.lost
    by_kernel = rows.groupby(["blur", "told"], sort=False)
    ways = rows.pivot_table("PSNR", ["blur", "told"], "way", sort=False)
    converged = rows[rows.way == "jfb"].groupby(["blur", "told"], sort=False).converged.mean()
    table = pd.DataFrame({"Picture": by_kernel.input.mean(), "JFB, the right kernel":
                          by_kernel.right.mean(), "JFB, this one": ways["jfb"],
                          "and 1.5 times the noise": ways["jfb, 1.5 times the noise"],
                          "JFB, energy, this one": ways["jfb-energy"],
                          "JFB converged": converged.map("{:.0%}".format)}).reset_index()
    return table.rename(columns={"blur": "PSNR (dB), blurred by"}).to_markdown(
        index=False, floatfmt=".2f")


def times_table(read: Read) -> str:
    """Seconds per notebook, one row per profile and machine."""
    rows = []
    for profile in profiles():
        provenance = json.loads(read(f"{PUBLISHED}/{profile}/provenance.json"))
        seconds = {name[:2]: step["seconds"] for name, step in provenance["steps"].items()}
        taken = any(s["parameters"].get("weights") for s in provenance["steps"].values())
        rows.append({"profile": profile + (", nothing trained" if taken else ""),
                     "machine": provenance["machine"],
                     "device": provenance["device"], **seconds, "all": sum(seconds.values())})
    table = pd.DataFrame(rows)
    for column in table.select_dtypes("float"):
        table[column] = [format(seconds, ".0f") if pd.notna(seconds) else ""
                         for seconds in table[column]]
    return table.to_markdown(index=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
