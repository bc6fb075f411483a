"""Kernels that `--kernel auto` estimates: python benchmarks/blind.py

SciPy blurs photographs on which nothing in the estimate was tuned. blind.csv has a row for each
picture, with the estimate, or nothing where it is refused, as it should be where nothing or a
corner blurs. Some are also restored, by total variation, with the estimated and the right kernel.
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
MOTIONS = ((7, 0), (9, 30), (15, 75), (21, 120))
KERNELS = {"none": np.ones((1, 1)), "corner": CORNER,
           **{f"gaussian:{std}": gaussian(2 * round(4 * std) + 1, std) for std in (1, 1.6, 2.5)},
           **{f"disk:{radius}": disk(radius) for radius in (2, 3, 5)},
           **{f"motion:{n},{angle}": motion(n, angle) for n, angle in MOTIONS}}
CASES = {"photograph": ("camera", "coffee", "rocket"), "kernel": KERNELS, "noise": (0.003, 0.01),
         "file": ("png", "jpeg")}
RESTORED = [(kernel, 0.01, "png") for kernel in ("gaussian:1.6", "disk:3", "motion:9,30")]
VERDICTS = ["within 10%", "right family, further off", "wrong family", "refused"]


def measure_blind(bench: Bench) -> None:
    """Add to blind.csv what it does not have yet."""
    rows = Rows(bench.out / "blind.csv")
    for case in product(*CASES.values()):
        key = dict(zip(CASES, case, strict=True))
        if not len(rows.where(**key)):
            rows.add(key | measured(*case))
            print(*rows.table.iloc[-1], flush=True)


def measured(name: str, kernel: str, noise: float, form: str) -> dict[str, object]:
    """The estimate; the PSNR of the picture, and restored with the estimated and right kernel."""
    scene = np.atleast_3d(photograph(name))
    x, d = (middle(image, 256) for image in (scene, blurred(scene, KERNELS[kernel])))
    Image.fromarray(noisy(d, noise).squeeze()).save(file := BytesIO(), form, quality=90)
    d = np.atleast_3d(np.asarray(Image.open(file)) / 255)
    try:
        found = blind.estimate(torch.from_numpy(d).permute(2, 0, 1))
    except jfbnb.UserError:
        return dict.fromkeys(("estimated", "input", "PSNR", "right"))
    told = (found, KERNELS[kernel]) if (kernel, noise, form) in RESTORED else ()
    restored = [jfbnb.deblur(d, k, method="total-variation").image for k in told]
    psnr = (-10 * np.log10(np.square(image - x).mean()) for image in (d, *restored))
    return {"estimated": found, **dict(zip(("input", "PSNR", "right"), psnr, strict=False))}


def judge(kernel: str, estimated: str) -> str:
    (family, _, numbers), (own, _, found) = (text.partition(":") for text in (kernel, estimated))
    if own != family:
        return "wrong family" if own else "refused"
    (size, *angle), (length, *turn) = (map(float, text.split(",")) for text in (numbers, found))
    apart = [abs((a - b + 90) % 180 - 90) for a, b in zip(angle, turn, strict=True)]
    return VERDICTS[abs(length / size - 1) > 0.1 or max(apart, default=0) > 5]


def report(out: Path) -> None:
    rows = pd.read_csv(out / "blind.csv").fillna({"estimated": ""})
    blur, pairs = rows.kernel.str.split(":").str[0], zip(rows.kernel, rows.estimated, strict=True)
    counts = pd.crosstab(blur, pd.Series([judge(*pair) for pair in pairs], name="verdict"))
    psnr = rows.dropna(subset="PSNR").groupby(blur)[["input", "PSNR", "right"]].mean().set_axis(
        ["picture (dB)", "restored (dB)", "with the right kernel (dB)"], axis=1)
    table = counts.reindex(blur.unique())[[v for v in VERDICTS if v in counts]].join(psnr)
    save_table(table.reset_index(), out / "blind_table", "Pictures of 256 x 256 pixels by what is "
               "estimated (within 10% in size and 5 degrees in angle), and the PSNR of those that "
               "total variation restored. A corner is two straight motions, one after the other.")


def main(arguments: list[str] | None = None) -> int:
    return run(options(__doc__).parse_args(arguments), {"blind": measure_blind}, report)


if __name__ == "__main__":
    raise SystemExit(main())
