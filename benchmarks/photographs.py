"""Photographs that the package did not make: python benchmarks/photographs.py

scenes.py makes them by SciPy and NumPy, and what other operators measure of them. `jfbnb deblur`
restores the blurred ones; it is given what a user would know. Each section writes
photographs_NAME.csv, and photographs.md is made of these files alone.
"""

import contextlib
import inspect
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import scenes
import torch
from command import Bench, options
from command import run as run_sections
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from scenes import GAUSSIAN, MOTION, NOISE, blurred, middle, mirrored, noisy, photograph, read
from skimage import restoration as skimage_restoration

from jfbnb.common import UserError, atomic_write
from jfbnb.core.operators import MRI, Downsampling, Inpainting
from jfbnb.run.command import main as jfbnb
from jfbnb.teaching.figures import image_row, new_figure, save_data, save_figure
from jfbnb.training.methods import JFB
from jfbnb.training.restorers import make_methods

METHODS = ("jfb", "jfb-energy", "tikhonov", "total-variation")
HELD_OUT = "chelsea"  # tunes the other operators' weights, which are measured on the others
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # of a prior, over the one tuned for the blur
MOTION_PIXELS = 1e6  # above it no motion is restored: its solves take long
SAID = re.compile(r"(.+) \(noise ([^,)]+).*\)\n")  # the file and the noise level
BLURS = {case.option: case.name for case in (GAUSSIAN, MOTION, scenes.DISK)}
Row = dict[str, object]


# --- blurred photographs, by the command --------------------------------------------------------


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image - truth) ** 2)))


def deblur(file: Path, kernel: str, *options: str) -> tuple[np.ndarray, Row]:
    """The picture that the command writes, and what it says.

    The warning that a solve did not converge is in `converged`, all others in `warning`.
    `doubtful` is whether it took the picture for one that contradicts its model.
    """
    said, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        status = jfbnb(["deblur", str(file), "--kernel", kernel, "--out",
                        str(file.parent / "restored"), *options])
    if status not in (0, 3):
        raise UserError(warned.getvalue().strip())
    target, noise_std = SAID.fullmatch(said.getvalue()).groups()
    lines = [line.split(f"{file}: ", 1)[1] for line in warned.getvalue().splitlines()
             if line.startswith("warning: ")]
    others = [line for line in lines if "did not converge" not in line]
    return read(target), {"noise taken": float(noise_std), "warning": " | ".join(others),
                          "converged": others == lines, "doubtful": status == 3}


def by_scikit_image(d: np.ndarray, kernel: np.ndarray) -> Iterator[tuple[str, float, np.ndarray]]:
    """Its deconvolutions, each with some settings."""
    for name, option, values in (("wiener", "balance", (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
                                 ("richardson_lucy", "num_iter", (2, 4, 8, 16, 30))):
        for value in values:
            found = [getattr(skimage_restoration, name)(d[..., k], kernel, **{option: value})
                     for k in range(3)]
            yield f"skimage {name}", value, np.stack(found, axis=2).clip(0, 1)


def restoration(bench: Bench) -> Iterator[Row]:
    """Blurred photographs: kernel given, noise estimated. Scikit-image with its best setting."""
    for case in (GAUSSIAN, MOTION, scenes.DISK):
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side, bench.scratch)
            kernel = case.right(bench.scratch)
            found = [(m, np.nan, *deblur(file, kernel, "--method", m)) for m in METHODS]
            found += [(*result, {}) for result in by_scikit_image(d, case.kernel)]
            restored = {method: image for method, _, image, _ in found}
            if name == bench.photographs[0] and case is scenes.DISK:
                draw({"Blurred": d, "Tikhonov": restored.get("tikhonov", d),
                      "JFB": restored.get("jfb", d), "Original": x}, bench.out)
            for method, setting, image, said in found:
                yield {"blur": case.name, "photograph": name, "method": method, "setting": setting,
                       "input": psnr(d, x), "PSNR": psnr(image, x), **said}


def draw(pictures: dict[str, np.ndarray], out: Path) -> None:
    """Four pictures in a row; a fifth is half blurred, half restored by JFB."""
    truth = pictures["Original"]
    psnrs = {label: psnr(image, truth) for label, image in pictures.items() if image is not truth}
    swipe, middle = pictures["Blurred"].copy(), truth.shape[1] // 2
    swipe[:, middle:] = pictures["JFB"][:, middle:]
    swipe[:, middle - 1:middle + 1] = 1
    shown = pictures | {"Blurred | JFB": swipe}
    save_figure(image_row({label: batch(image)[0] for label, image in shown.items()}, psnrs),
                out / "photographs")


def mismatches(bench: Bench) -> Iterator[Row]:
    """Right models and wrong ones (Gaussian 5 x 5, noise 0.01): what share raises a warning.

    Lost is how much PSNR is below the better of the input's and the right model's.
    """
    for case in (*scenes.WRONG, *scenes.RIGHT):
        models = [("right", case.right(bench.scratch),
                   str(case.noise_std) if case in scenes.RIGHT else "auto")] if case.option else []
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side, bench.scratch)
            best = before = psnr(d, x)
            for model, kernel, noise_std in [*models, ("wrong", scenes.USUAL, str(NOISE))]:
                if model == "right" or case in scenes.WRONG:
                    image, said = deblur(file, kernel, "--noise-std", noise_std)
                    best = max(best, after := psnr(image, x))
                    yield {"model": model, "case": case.name, "photograph": name,
                           "input": before, "PSNR": after, "lost": best - after,
                           "warned": bool(said["warning"]), **said}


def nearly(bench: Bench) -> Iterator[Row]:
    """Kernels that are nearly right, restored in three ways. Lost is against the right kernel."""
    for case in dict.fromkeys(case for case, _ in scenes.NEARLY):
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side, bench.scratch)
            image, said = deblur(file, case.right(bench.scratch), "--method", "jfb")
            most, noise_std = psnr(image, x), str(1.5 * said["noise taken"])
            ways = {"jfb": ("jfb", "auto"), "jfb, 1.5 times the noise": ("jfb", noise_std),
                    "jfb-energy": ("jfb-energy", "auto")}
            for kernel in (option for other, option in scenes.NEARLY if other is case):
                for way, (method, noise) in ways.items():
                    image, said = deblur(file, kernel, "--method", method, "--noise-std", noise)
                    yield {"blur": case.name, "told": kernel, "way": way, "photograph": name,
                           "input": psnr(d, x), "PSNR": (own := psnr(image, x)),
                           "lost": most - own, **said}


def stored(bench: Bench) -> Iterator[Row]:
    """Pictures as people have them, in windows of half the side: the kernel given, nothing else."""
    for case in scenes.STORED:
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side // 2, bench.scratch)
            image, said = deblur(file, case.right(bench.scratch))
            yield {"stored": case.name, "blur": BLURS[case.option], "noise": case.noise_std,
                   "photograph": name, "input": psnr(d, x), "PSNR": psnr(image, x), **said}


# --- other operators ----------------------------------------------------------------------------


def batch(image: np.ndarray) -> torch.Tensor:
    """(H, W, C, ...) -> (1, C, H, W, ...), in float32."""
    return torch.from_numpy(np.moveaxis(image, 2, 0).astype(np.float32))[None]


def operators(bench: Bench) -> Iterator[Row]:
    """Other operators. The weight of each prior is tuned on a photograph that does not count."""
    restorers = make_methods(["measurement", *METHODS], None, torch.device("cpu"))
    for make, operator in ((scenes.inpainting, Inpainting), (scenes.mri, MRI),
                           (scenes.super_resolution, partial(Downsampling, factor=2))):
        chosen = {}
        for name in dict.fromkeys([HELD_OUT, *bench.photographs]):
            known, d, x = make(middle(photograph(name), bench.side))
            A, d, x = operator(known), batch(d), batch(x)
            for method, restorer in restorers.items():
                rows = []
                for weight in [chosen[method]] if method in chosen else WEIGHTS:
                    y, info = restorer(A, d, NOISE * weight**0.5)
                    y = y.mean(1, keepdim=True).expand_as(y) if make is scenes.mri else y
                    rows.append({
                        "operator": make.__name__, "photograph": name, "method": method,
                        "weight": weight, "PSNR": psnr(*(A.visible(z).numpy() for z in (y, x))),
                        "converged": info and info.converged.item()})
                yield from rows
                chosen[method] = max(rows, key=lambda row: np.nan_to_num(row["PSNR"]))["weight"]


# --- large pictures -----------------------------------------------------------------------------


def large(bench: Bench) -> Iterator[Row]:
    """The command in a process of its own, with two threads: time, and all of its memory."""
    file = bench.scratch / "large.png"
    for width in bench.large:
        height = 3 * width // 4
        x = mirrored(width, height)
        for case in (GAUSSIAN, MOTION) if width * height <= MOTION_PIXELS else (GAUSSIAN,):
            Image.fromarray(noisy(blurred(x, case.kernel), NOISE)).save(file)
            said, found = alone(["deblur", str(file), "--kernel", case.right(bench.scratch),
                                 "--out", str(bench.scratch)])
            image = read(bench.scratch / "large-jfb.png")
            yield {"blur": case.name, "pixels": f"{width} x {height}",
                   "megapixels": width * height / 1e6, "input": psnr(read(file), x),
                   "PSNR": psnr(image, x), "converged": "did not converge" not in said, **found}


# The command, and then what Linux says of this process: the size of its largest memory, in kB.
MEASURED = """
import re, sys
from pathlib import Path
from jfbnb.run.command import main
status = main(sys.argv[1:])
peak = Path("/proc/self/status")
print(re.search("VmHWM:\\s*(\\d+)", peak.read_text("utf-8"))[1] if peak.exists() else "nan")
sys.exit(status)
"""


def alone(arguments: list[str]) -> tuple[str, Row]:
    """`jfbnb` in a fresh process: what it said, its seconds, and its peak of memory (on Linux)."""
    clock = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True,
                          text=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    if done.returncode:
        raise UserError(done.stderr.strip())
    return done.stderr, {"seconds": time.perf_counter() - clock,
                         "process MB": float(done.stdout.split()[-1]) / 2**10}


def rate(table: pd.DataFrame) -> Figure:
    """Photographs a minute, by their size; hollow where some tiles did not converge."""
    figure, (ax,) = new_figure()
    for (blur, own), line in zip(table.groupby("blur", sort=False), ("-", "--"), strict=False):
        rates = 60 / own.seconds
        ax.loglog(own.megapixels, rates, line, label=blur, color=JFB.colour)
        ax.scatter(own.megapixels, rates, edgecolors=JFB.colour, zorder=3,
                   facecolors=[JFB.colour if done else "white" for done in own.converged])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="megapixels (hollow: some tiles did not converge)",
           ylabel="photographs a minute")
    ax.legend()
    return figure


# --- the report ---------------------------------------------------------------------------------

def report(out: Path) -> None:
    """The figure of the large pictures, and photographs.md with what no page of docs/ shows."""
    parts = ["# Photographs that the package did not make"]
    if (file := out / "photographs_mismatches.csv").exists():
        rows = pd.read_csv(file)
        rows = pd.concat([rows, rows.assign(case="all of them")]).groupby(
            ["model", "case"], sort=False)
        rows = rows[["noise taken", "input", "PSNR", "lost", "warned"]].mean().reset_index()
        parts += ["## Models that do not fit", mismatches.__doc__, rows.to_markdown(
            index=False, floatfmt=("", "", ".3f", *[".2f"] * 4))]
    if (file := out / "photographs_large.csv").exists():
        rows = pd.read_csv(file)
        save_figure(rate(rows), out / "photographs_large")
        parts += ["## Large pictures", large.__doc__, rows.to_markdown(
            index=False, floatfmt=("", "", ".3g", ".2f", ".2f", "", ".1f", ".0f"))]
    atomic_write(out / "photographs.md", "\n\n".join(map(inspect.cleandoc, parts)) + "\n")


SECTIONS = {section.__name__: section for section in
            (restoration, stored, operators, mismatches, nearly, large)}


def measured(name: str, bench: Bench) -> None:
    """Write a section's rows."""
    with tempfile.TemporaryDirectory() as scratch:
        bench.scratch = Path(scratch)
        save_data(pd.DataFrame(SECTIONS[name](bench)), bench.out / f"photographs_{name}")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__, SECTIONS)
    parser.add_argument("--photographs", nargs="+",
                        default=["coffee", "astronaut", "chelsea", "rocket"])
    parser.add_argument("--side", type=int, default=192, help="of the windows")
    parser.add_argument("--large", type=int, nargs="+", default=[500, 1000, 2000, 4000],
                        help="widths; the height is three quarters")
    return run_sections(parser.parse_args(arguments),
                        {name: partial(measured, name) for name in SECTIONS}, report,
                        prefix="photographs_")


if __name__ == "__main__":
    raise SystemExit(main())
