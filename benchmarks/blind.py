"""Kernels that `--kernel auto` estimates: python benchmarks/blind.py

SciPy blurs photographs on which nothing was tuned. blind.csv has a row for each picture, without an
estimate where it is refused, as it should be without blur. Some are restored: by total variation,
or after a shake as by the command.
"""

from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command import Bench, Rows, options, run
from PIL import Image
from scenes import blurred, disk, gaussian, middle, motion, noisy, photograph, shake
from scipy.signal import correlate2d

import jfbnb
from jfbnb.photo import blind
from jfbnb.teaching.figures import save_table

SIDES = (13, 21)  # of the shakes in pixels
KERNELS = {"none": np.ones((1, 1)), "gaussian:1.6": gaussian(13, 1.6), "disk:3": disk(3),
           "motion:9,30": motion(9, 30), "motion:21,120": motion(21, 120),
           **{f"shake:{side}": shake(side, side) for side in SIDES}}
PHOTOGRAPHS = ("camera", "coffee", "stereo_motorcycle", "grass", "moon", "gravel")
FILES = ((0.003, "jpeg"), (0.01, "png"))  # the noise, and how the picture is stored
RESTORED = [(kernel, 0.01) for kernel in ("gaussian:1.6", "disk:3", "motion:9,30")]
RIM = 24  # pixels that are not compared, because an image may be shifted as its kernel is
PSNR = ["picture (dB)", "restored (dB)", "with the right kernel (dB)"]
VERDICTS = ["within 10%", "further off", "named second", "wrong", "refused"]


def measure_blind(bench: Bench) -> None:
    rows = Rows(bench.out / "blind.csv")
    for name, kernel, (noise, form) in product(PHOTOGRAPHS, KERNELS, FILES):
        key = {"photograph": name, "kernel": kernel, "noise": noise, "file": form}
        if not len(rows.where(**key)):
            rows.add(key | measured(name, kernel, noise, form))


def taken(name: str, kernel: str, noise: float, form: str) -> tuple[np.ndarray, np.ndarray]:
    """A scene and its picture."""
    scene = np.atleast_3d(photograph(name))
    x, d = (middle(image, 256) for image in (scene, blurred(scene, KERNELS[kernel])))
    Image.fromarray(noisy(d, noise).squeeze()).save(file := BytesIO(), form, quality=90)
    return x, np.atleast_3d(np.asarray(Image.open(file)) / 255)


def measured(name: str, kernel: str, noise: float, form: str) -> dict[str, object]:
    (x, d), true = taken(name, kernel, noise, form), KERNELS[kernel]
    try:
        found, rival = blind.estimate(torch.from_numpy(d).permute(2, 0, 1), jfbnb.load())
    except jfbnb.UserError:
        return dict.fromkeys(("estimated", "rival", "correlation", *PSNR))
    if isinstance(found, str):
        told = (found, true) if (kernel, noise) in RESTORED else ()
        images = [d, *(jfbnb.deblur(d, k, method="total-variation").image for k in told)]
        return {"estimated": found, "rival": rival, **quality(images, x)}
    correlation, shift = alike(found.numpy(), true)
    images = [d, *(jfbnb.deblur(d, k).image for k in (found, true))]
    images[:2] = (np.roll(image, shift, axis=(0, 1)) for image in images[:2])
    inside = [image[RIM:-RIM, RIM:-RIM] for image in (x, *images)]
    return {"estimated": "shake", "correlation": correlation, **quality(inside[1:], inside[0])}


def quality(images: list[np.ndarray], x: np.ndarray) -> dict[str, float]:
    return {name: -10 * np.log10(np.square(image - x).mean())
            for name, image in zip(PSNR, images, strict=False)}


def alike(found: np.ndarray, true: np.ndarray) -> tuple[float, np.ndarray]:
    """The correlation of two kernels where it is largest, and how far `found` is shifted there."""
    sums = correlate2d(found, true)
    at = np.array(np.unravel_index(sums.argmax(), sums.shape))
    middles = np.array(found.shape) // 2 - np.array(true.shape) // 2
    return (sums.max() / np.linalg.norm(found) / np.linalg.norm(true),
            at - (np.array(true.shape) - 1) - middles)


def judge(kernel: str, estimated: str, rival: str) -> str:
    (family, _, numbers), (own, _, found) = (text.partition(":") for text in (kernel, estimated))
    if own != family:
        return "refused" if not own else "named second" if rival.startswith(family) else "wrong"
    (size, *angle), (length, *turn) = (map(float, text.split(",")) for text in (numbers, found))
    apart = [abs((a - b + 90) % 180 - 90) for a, b in zip(angle, turn, strict=True)]
    return VERDICTS[abs(length / size - 1) > 0.1 or max(apart, default=0) > 5]


def report(out: Path) -> None:
    rows = pd.read_csv(out / "blind.csv").fillna({"estimated": "", "rival": ""})
    rows["blur"] = rows.kernel.str.partition(":")[0]
    shaken = rows.blur == "shake"
    report_shakes(rows[shaken & (rows.estimated == "shake")], shaken.sum(), out)
    rows = rows[~shaken]
    rows["verdict"] = [judge(*row) for row in rows[["kernel", "estimated", "rival"]].to_numpy()]
    for by, kept in (("blur", rows), ("photograph", rows[rows.blur != "none"])):
        counts = pd.crosstab(kept[by], kept.verdict).reindex(kept[by].unique(), columns=VERDICTS,
                                                             fill_value=0)
        table = counts.join(kept.dropna(subset=PSNR).groupby(by)[PSNR].mean()).reset_index()
        save_table(table, out / f"blind_{by}", "Numbers of pictures of 256 x 256 pixels: the right "
                   "family, within 10% and 5 degrees or not; another one, with the right one named "
                   "second or not; refused. The PSNR is the mean over the PNGs with a Gaussian, a "
                   "disk or the shorter motion that were not refused, restored by total variation.")


def report_shakes(rows: pd.DataFrame, pictures: int, out: Path) -> None:
    """Each photograph's pictures; the error ratio (Levin et al. 2009) is that of the squares."""
    ratio = 10 ** ((rows[PSNR[2]] - rows[PSNR[1]]) / 10)
    rows = rows.assign(ratio=ratio)
    groups = [*rows.groupby("photograph", sort=False), ("all", rows)]
    table = pd.DataFrame([{
        "photograph": name, "estimated": len(group),
        "correlation": group.correlation.median(), **group[PSNR].median(),
        "error ratio": group.ratio.median(), "ratio below 3": (group.ratio < 3).sum(),
    } for name, group in groups])
    save_table(table, out / "blind_shakes", f"Shakes of {SIDES[0]} to {SIDES[-1]} pixels, "
               f"{pictures} pictures of 256 x 256 pixels; the others are refused. Medians over "
               "those that are estimated: the kernel's correlation with the right one, and the "
               "PSNR without a rim, restored as by the command. The error ratio is the restored "
               "image's squared error over that with the right kernel.")


if __name__ == "__main__":
    raise SystemExit(run(options(__doc__).parse_args(), {"blind": measure_blind}, report))
