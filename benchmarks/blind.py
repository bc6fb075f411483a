"""Kernels that `--kernel auto` estimates: python benchmarks/blind.py

SciPy blurs photographs on which nothing was tuned. blind.csv has a row for each picture, without an
estimate where it is refused, as it should be without blur or with a corner. Some are restored, by
total variation.
"""

from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from command import Bench, Rows, options, run
from PIL import Image
from scenes import blurred, disk, gaussian, middle, motion, noisy, photograph

import jfbnb
from jfbnb.photo import blind
from jfbnb.teaching.figures import save_table

CORNER = np.pad(motion(9, 0), ((4, 4), (0, 0))) / 2 + np.pad(motion(9, 90), ((0, 0), (4, 4))) / 2
KERNELS = {"none": np.ones((1, 1)), "corner": CORNER, "gaussian:1.6": gaussian(13, 1.6),
           "disk:3": disk(3), "motion:9,30": motion(9, 30), "motion:21,120": motion(21, 120)}
PHOTOGRAPHS = ("camera", "coffee", "stereo_motorcycle", "grass", "moon", "gravel")
FILES = ((0.003, "jpeg"), (0.01, "png"))  # the noise, and how the picture is stored
RESTORED = [(kernel, 0.01) for kernel in ("gaussian:1.6", "disk:3", "motion:9,30")]
PSNR = ["picture (dB)", "restored (dB)", "with the right kernel (dB)"]
VERDICTS = ["within 10%", "further off", "named second", "wrong", "refused"]


def measure_blind(bench: Bench) -> None:
    rows = Rows(bench.out / "blind.csv")
    for name, kernel, (noise, form) in product(PHOTOGRAPHS, KERNELS, FILES):
        key = {"photograph": name, "kernel": kernel, "noise": noise, "file": form}
        if not len(rows.where(**key)):
            rows.add(key | measured(name, kernel, noise, form))


def measured(name: str, kernel: str, noise: float, form: str) -> dict[str, object]:
    scene = np.atleast_3d(photograph(name))
    x, d = (middle(image, 256) for image in (scene, blurred(scene, KERNELS[kernel])))
    Image.fromarray(noisy(d, noise).squeeze()).save(file := BytesIO(), form, quality=90)
    d = np.atleast_3d(np.asarray(Image.open(file)) / 255)
    try:
        found, rival = blind.estimate(torch.from_numpy(d).permute(2, 0, 1))
    except jfbnb.UserError:
        return dict.fromkeys(("estimated", "rival", *PSNR))
    told = (found, KERNELS[kernel]) if (kernel, noise) in RESTORED else ()
    images = [d, *(jfbnb.deblur(d, k, method="total-variation").image for k in told)]
    psnr = [-10 * np.log10(np.square(image - x).mean()) for image in images]
    return {"estimated": found, "rival": rival, **dict(zip(PSNR, psnr, strict=False))}


def judge(kernel: str, estimated: str, rival: str) -> str:
    (family, _, numbers), (own, _, found) = (text.partition(":") for text in (kernel, estimated))
    if own != family:
        return "refused" if not own else "named second" if rival.startswith(family) else "wrong"
    (size, *angle), (length, *turn) = (map(float, text.split(",")) for text in (numbers, found))
    apart = [abs((a - b + 90) % 180 - 90) for a, b in zip(angle, turn, strict=True)]
    return VERDICTS[abs(length / size - 1) > 0.1 or max(apart, default=0) > 5]


def report(out: Path) -> None:
    rows = pd.read_csv(out / "blind.csv").fillna({"estimated": "", "rival": ""})
    rows["verdict"] = [judge(*row) for row in rows[["kernel", "estimated", "rival"]].to_numpy()]
    rows["blur"] = rows.kernel.str.partition(":")[0]
    for by, kept in (("blur", rows), ("photograph", rows[~rows.blur.isin(("none", "corner"))])):
        counts = pd.crosstab(kept[by], kept.verdict).reindex(kept[by].unique(), columns=VERDICTS,
                                                             fill_value=0)
        table = counts.join(kept.dropna(subset=PSNR).groupby(by)[PSNR].mean()).reset_index()
        save_table(table, out / f"blind_{by}", "Numbers of pictures of 256 x 256 pixels: the right "
                   "family, within 10% and 5 degrees or not; another one, with the right one named "
                   "second or not; refused. The PSNR is the mean over the PNGs with a Gaussian, a "
                   "disk or the shorter motion that were not refused, restored by total variation.")


if __name__ == "__main__":
    raise SystemExit(run(options(__doc__).parse_args(), {"blind": measure_blind}, report))
