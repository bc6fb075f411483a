"""The suite on pictures that it did not make: python benchmarks/restore.py

Nothing of the package makes them, nor what other operators measure of them: see scenes.py. What is
blurred is restored by the command, `jfbnb deblur`, which is told what a user would know.

Each section writes photographs_NAME.csv; restore.md is made of these files alone.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import scenes
import tifffile
import torch
from command import record
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from processes import alone
from scenes import GAUSSIAN, MOTION, NOISE, blurred, middle, mirrored, noisy, photograph, read, rim
from skimage import restoration as skimage_restoration

from jfbnb.common import UserError, atomic_write
from jfbnb.core.operators import MRI, Downsampling, Inpainting
from jfbnb.photo import restore
from jfbnb.photo.model_check import estimate_noise
from jfbnb.run.command import main as jfbnb
from jfbnb.teaching.figures import image_row, new_figure, save_data, save_figure
from jfbnb.training.methods import JFB
from jfbnb.training.restorers import make_methods

METHODS = ("jfb", "jfb-energy", "jfb-head", "tikhonov", "total-variation")
HELD_OUT = "chelsea"  # tunes the other operators' weights, which are measured on the others
NOISES = (0.003, 0.005, 0.01, 0.02, 0.05)
BLURS = (GAUSSIAN, MOTION)  # of large pictures
PATIENCE = 1e6  # pixels up to which a motion is waited for: its solves are long
WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)  # of a prior, over the one tuned for the blur
FRAME = 8  # pixels at the border that are judged apart
SAID = re.compile(r"(.+) \(noise (\S+?)(?:, (\d+) iterations, relative residual (\S+))?\)\n")
Bench = argparse.Namespace  # what a run measures: `parse` has it
Row = dict[str, object]


# --- blurred photographs, by the command --------------------------------------------------------


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((image - truth) ** 2)))


def deblur(file: Path, kernel: str, *options: str) -> tuple[np.ndarray, Row]:
    """What the command writes, and what it says. That a solve did not converge is no doubt."""
    said, warned = io.StringIO(), io.StringIO()
    clock = time.perf_counter()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        status = jfbnb(["deblur", str(file), "--kernel", kernel, "--out",
                        str(file.parent / "restored"), *options])
    seconds = time.perf_counter() - clock
    if status:
        raise UserError(warned.getvalue().strip())
    target, noise_std, iterations, residual = SAID.fullmatch(said.getvalue()).groups()
    lines = [line.split(f"{file}: ", 1)[1] for line in warned.getvalue().splitlines()
             if line.startswith("warning: ")]
    doubts = [line for line in lines if "did not converge" not in line]
    return read(target), {
        "noise taken": float(noise_std), "warning": " | ".join(doubts),
        "iterations": float(iterations or "nan"), "residual": float(residual or "nan"),
        "converged": len(doubts) == len(lines) if residual else None, "seconds": seconds}


def by_scikit_image(d: np.ndarray, kernel: np.ndarray) -> Iterator[tuple[str, float, np.ndarray]]:
    """Its methods, with each of some settings."""
    for name, option, values in (("wiener", "balance", (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
                                 ("richardson_lucy", "num_iter", (2, 4, 8, 16, 30)),
                                 ("unsupervised_wiener", "rng", (0,))):
        for value in values:
            found = [getattr(skimage_restoration, name)(d[..., k], kernel, **{option: value})
                     for k in range(3)]
            found = [x[0] if isinstance(x, tuple) else x for x in found]
            yield f"skimage {name}", value, np.stack(found, axis=2).clip(0, 1)


def restoration(bench: Bench) -> Iterator[Row]:
    """Blurred photographs: noise estimated, kernel told. Scikit-image with its best setting."""
    for case in (GAUSSIAN, MOTION, scenes.DISK):
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side, bench.scratch)
            kernel = case.right(bench.scratch)
            found = [(m, np.nan, *deblur(file, kernel, "--method", m)) for m in METHODS]
            found += [(*result, {}) for result in by_scikit_image(d, case.kernel)]
            near = rim(x, FRAME)
            restored = {method: image for method, _, image, _ in found}
            if name == bench.photographs[0] and case is scenes.DISK:
                draw({"Blurred": d, "Tikhonov": restored.get("tikhonov", d),
                      "JFB": restored.get("jfb", d), "Original": x}, bench.out)
            for method, setting, image, said in found:
                yield {"blur": case.name, "photograph": name, "method": method, "setting": setting,
                       "input": psnr(d, x), "PSNR": psnr(image, x),
                       "input frame": psnr(d[near], x[near]), "frame": psnr(image[near], x[near]),
                       **said}


def draw(pictures: dict[str, np.ndarray], out: Path) -> None:
    """Four pictures in a row, and the blurred one beside JFB's as under a swipe handle."""
    truth = pictures["Original"]
    psnrs = {label: psnr(image, truth) for label, image in pictures.items() if image is not truth}
    swipe, middle = pictures["Blurred"].copy(), truth.shape[1] // 2
    swipe[:, middle:] = pictures["JFB"][:, middle:]
    swipe[:, middle - 1:middle + 1] = 1
    shown = pictures | {"Blurred | JFB": swipe}
    save_figure(image_row({label: batch(image)[0] for label, image in shown.items()}, psnrs),
                out / "photographs")


def mismatches(bench: Bench) -> Iterator[Row]:
    """Wrong models, Gaussian 5 x 5 with noise 0.01, and right ones: which are warned of.

    Lost is what the better of the input and the right model has more.
    """
    for case in (*scenes.WRONG, *scenes.RIGHT):
        models = [("right", case.right(bench.scratch),
                   str(case.noise_std) if case in scenes.RIGHT else "auto")] if case.told else []
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
    """Kernels that are nearly right, and three ways with them. Lost is against the right kernel."""
    for case in dict.fromkeys(case for case, _ in scenes.NEARLY):
        for name in bench.photographs:
            file, d, x = case.take(name, bench.side, bench.scratch)
            image, said = deblur(file, case.right(bench.scratch), "--method", "jfb")
            most, noise_std = psnr(image, x), str(1.5 * said["noise taken"])
            for told in (told for other, told in scenes.NEARLY if other is case):
                for way, *options in (("jfb", "--method", "jfb"), ("jfb, 1.5 times the noise",
                                      "--method", "jfb", "--noise-std", noise_std),
                                      ("jfb-energy", "--method", "jfb-energy")):
                    image, said = deblur(file, told, *options)
                    yield {"blur": case.name, "told": told, "way": way, "photograph": name,
                           "input": psnr(d, x), "PSNR": (own := psnr(image, x)),
                           "lost": most - own, "warned": bool(said["warning"]), **said}


def noise(bench: Bench) -> Iterator[Row]:
    """Estimated noise over the true one, which the rounding to eight bits is part of."""
    for case in (GAUSSIAN, MOTION, scenes.DISK, scenes.WIDE):
        for name in (*bench.photographs, "motorcycle", "camera"):
            for noise_std in NOISES:
                _, d, _ = replace(case, noise_std=noise_std).take(
                    name, bench.side, bench.scratch)
                estimate = estimate_noise(batch(d)[0], torch.from_numpy(case.kernel))
                ratio = estimate / np.hypot(noise_std, 1 / 255 / 12**0.5)
                yield {"blur": case.name, "photograph": name, "noise": noise_std, "ratio": ratio,
                       "within 20%": abs(ratio - 1) <= 0.2}


# --- other operators ----------------------------------------------------------------------------


def batch(image: np.ndarray) -> torch.Tensor:
    """(H, W, C, ...) -> (1, C, H, W, ...), in float32."""
    return torch.from_numpy(np.moveaxis(image, 2, 0).astype(np.float32))[None]


def operators(bench: Bench) -> Iterator[Row]:
    """Other operators: the weight of each prior is tuned on a photograph that is not counted."""
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
                    clock = time.perf_counter()
                    y, info = restorer(A, d, NOISE * weight**0.5)
                    y = y.mean(1, keepdim=True).expand_as(y) if make is scenes.mri else y
                    rows.append({
                        "operator": make.__name__, "photograph": name, "method": method,
                        "weight": weight, "PSNR": psnr(*(A.visible(z).numpy() for z in (y, x))),
                        "iterations": info and info.iterations.item(),
                        "residual": info and info.residual.item(),
                        "converged": info and info.converged.item(),
                        "seconds": time.perf_counter() - clock})
                yield from rows
                chosen[method] = max(rows, key=lambda row: np.nan_to_num(row["PSNR"]))["weight"]


# --- large pictures -----------------------------------------------------------------------------


def run(command: list[str]) -> tuple[int, str, Row]:
    """A command with two threads: its exit status, what it said, its time and peak of memory."""
    clock = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "2"},
                                   stdout=file, stderr=subprocess.STDOUT)
        _, process.returncode, usage = os.wait4(process.pid, 0)
        file.seek(0)
        said = file.read()
    return process.returncode, said, {
        "seconds": time.perf_counter() - clock,
        "process MB": usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)}


def large(bench: Bench) -> Iterator[Row]:
    """The command in a process of its own, with two threads: time, and all of its memory."""
    file = bench.scratch / "large.png"
    for width in bench.large:
        height = 3 * width // 4
        x = mirrored(width, height)
        for case in BLURS if width * height <= PATIENCE else BLURS[:1]:
            Image.fromarray(noisy(blurred(x, case.kernel), NOISE)).save(file)
            # By a fresh process, as Linux counts in what the one had that starts another.
            status, said, found = alone(run, [
                sys.executable, "-m", "jfbnb", "deblur", str(file), "--kernel",
                case.right(bench.scratch), "--out", str(bench.scratch)])
            if status:
                raise UserError(said.strip())
            image = read(bench.scratch / "large-jfb.png")
            yield {"blur": case.name, "pixels": f"{width} x {height}",
                   "megapixels": width * height / 1e6, "input": psnr(read(file), x),
                   "PSNR": psnr(image, x), "converged": "did not converge" not in said, **found}


def rate(table: pd.DataFrame) -> Figure:
    """How many photographs a minute, by their size; hollow where tiles did not converge."""
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


def seams(bench: Bench) -> Iterator[Row]:
    """A part restored by tiles, less the same in one piece, where tiles are blended and elsewhere.

    A jump is how much a row or column of that changes to the next, in the mean over its length.
    """
    x, file = mirrored(bench.part, bench.part), bench.scratch / "part.tif"
    for case in BLURS:
        d = noisy(blurred(x, case.kernel), NOISE) / 255
        # As float, so that what is restored is not rounded.
        tifffile.imwrite(file, d.astype(np.float32), photometric="rgb")
        kernel = case.right(bench.scratch)
        tiled, _ = deblur(file, kernel)
        with mock.patch.object(restore, "TILE", 2 * bench.part):
            error = tiled - deblur(file, kernel)[0]
        reach, blended = max(case.kernel.shape) // 2, np.zeros(bench.part, bool)
        for where, weights in restore._cut(bench.part, restore.TILE + 2 * reach,
                                               restore.THROWN + reach):
            blended[where] |= ((weights > 0) & (weights < 1)).numpy()
        strips, seam = blended[:, None] | blended, blended[1:] | blended[:-1]
        jumps = np.stack([abs(np.diff(error, axis=axis).mean((1 - axis, 2))) for axis in (0, 1)])
        yield {"blur": case.name, "side": bench.part,
               "rms in strips": np.sqrt(np.mean(error[strips] ** 2)),
               "rms elsewhere": np.sqrt(np.mean(error[~strips] ** 2)),
               "largest jump in strips": jumps[:, seam].max(),
               "largest jump elsewhere": jumps[:, ~seam].max()}


# --- the report ---------------------------------------------------------------------------------


def _count(values: pd.Series) -> str:
    values = values.dropna().astype(bool)
    return f"{values.sum()} of {len(values)}" if len(values) else ""


def _first(lines: pd.Series) -> str:
    """The first words of the commonest line."""
    lines = lines.dropna()
    return " ".join(lines.mode()[0].split()[:12]) if len(lines) else ""


KEYS = {"restoration": ["blur", "method", "setting"],
        "operators": ["operator", "method", "weight"], "mismatches": ["model", "case"],
        "nearly": ["blur", "told", "way"], "noise": ["blur", "noise"],
        "large": ["blur", "pixels"], "seams": ["blur", "side"]}
WAYS = {"iterations": ["max"], "residual": ["max"], "ratio": ["min", "max"],
        "converged": [_count], "warned": [_count], "within 20%": [_count], "warning": [_first]}
FORMATS = {"input|PSNR|frame|lost|ratio": ".2f", "residual|rms|largest": ".1e"}  # else .3g


def summary(section: str, table: pd.DataFrame) -> pd.DataFrame:
    """Over photographs: means, extremes, how many of them, the commonest warning."""
    if section == "operators":
        table = table[table.photograph != HELD_OUT]
    if section == "mismatches":
        table = pd.concat([table, table.assign(case="all of them")])
    keys = KEYS[section]
    ways = {c: WAYS.get(c, ["mean"]) for c in table if c not in (*keys, "photograph")}
    table = table.groupby(keys, sort=False, dropna=False).agg(ways)
    table.columns = [f"{c}, {way}" if way in ("min", "max") else c for c, way in table.columns]
    table = table.reset_index()
    if section == "restoration":  # scikit-image's best
        table = table.loc[table.groupby(keys[:2], sort=False).PSNR.idxmax()]
    return table


def report(out: Path) -> None:
    parts = ["# Photographs that the suite did not make"]
    for name, section in SECTIONS.items():
        if (file := out / f"photographs_{name}.csv").exists():
            table = summary(name, pd.read_csv(file))
            for column in table.select_dtypes("float"):
                spec = next((f for words, f in FORMATS.items() if re.match(words, column)), ".3g")
                table[column] = [format(v, spec) if pd.notna(v) else "" for v in table[column]]
            parts += [f"## {name}", " ".join(section.__doc__.split()),
                      table.to_markdown(index=False, disable_numparse=True)]
    atomic_write(out / "restore.md", "\n\n".join(parts) + "\n")


SECTIONS = {section.__name__: section for section in
            (restoration, operators, mismatches, nearly, noise, large, seams)}


def parse(arguments: list[str] | None) -> Bench:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--photographs", nargs="+",
                        default=["coffee", "astronaut", "chelsea", "rocket"])
    parser.add_argument("--side", type=int, default=192, help="of the windows")
    parser.add_argument("--large", type=int, nargs="+", default=[500, 1000, 2000, 4000],
                        help="widths, of which the height is three quarters")
    parser.add_argument("--part", type=int, default=900, help="side of what seams are sought in")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).resolve().parent / "results")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    bench = parse(arguments)
    for name in bench.sections:
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            bench.scratch = Path(scratch)
            table = pd.DataFrame(SECTIONS[name](bench))
        save_data(table, bench.out / f"photographs_{name}")
        record(bench.out, f"photographs_{name}")
        if name == "large":
            save_figure(rate(table), bench.out / "photographs_large")
        report(bench.out)


if __name__ == "__main__":
    main()
