"""Kernels that `--kernel auto` estimates: python benchmarks/blind.py

SciPy blurs photographs on which no constant of `blind.estimate` was tuned. blind.csv has a row for
each photograph, kernel, noise level and file format, with the estimate, or nothing if it was
refused. No blur, and a motion with a corner, must be refused. The PNG files with a noise of 0.01
are also restored by total variation, with the estimated and with the right kernel. A stopped run
continues.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from command import Bench, Rows, options, run
from PIL import Image
from scenes import blurred, disk, gaussian, middle, motion, noisy, photograph, read

import jfbnb
from jfbnb.photo import blind
from jfbnb.teaching.figures import save_table

PHOTOGRAPHS, SIDE = ("camera", "coffee", "rocket"), 256
CORNER = np.pad(motion(9, 0), ((4, 4), (0, 0))) / 2 + np.pad(motion(9, 90), ((0, 0), (4, 4))) / 2
KERNELS = {"none": np.ones((1, 1)), "corner": CORNER,
           **{f"gaussian:{std}": gaussian(2 * round(4 * std) + 1, std) for std in (1, 1.6, 2.5)},
           **{f"disk:{radius}": disk(radius) for radius in (2, 3, 5)},
           **{f"motion:{length},{angle}": motion(length, angle)
              for length, angle in ((7, 0), (9, 30), (15, 75), (21, 120))}}


def measure_blind(bench: Bench) -> None:
    """Add to blind.csv what it does not have yet."""
    rows = Rows(bench.out / "blind.csv")
    for name in PHOTOGRAPHS:
        for kernel in KERNELS:
            for noise in (0.003, 0.01):
                for form in ("png", "jpg"):
                    key = {"photograph": name, "kernel": kernel, "noise": noise, "file": form}
                    if not len(rows.where(**key)):
                        rows.add({**key, **measured(*key.values())})
                        print(*rows.table.iloc[-1], flush=True)


def measured(name: str, kernel: str, noise: float, form: str) -> dict[str, object]:
    """The estimate, and the PSNR before and after a restoration."""
    scene = np.atleast_3d(photograph(name))
    x, d = (middle(image, SIDE) for image in (scene, blurred(scene, KERNELS[kernel])))
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"picture.{form}"
        Image.fromarray(noisy(d, noise).squeeze()).save(file, quality=90)
        d = read(file)
    try:
        found = blind.estimate(torch.from_numpy(d).permute(2, 0, 1))
    except jfbnb.UserError:
        return {"estimated": "", "input": np.nan, "PSNR": np.nan, "right": np.nan}
    images = [d] + [jfbnb.deblur(d, k, method="total-variation").image for k in (
        found, KERNELS[kernel])] * (form == "png" and noise == 0.01)
    psnr = [-10 * np.log10(np.square(image - x).mean()) for image in images] + [np.nan] * 2
    return {"estimated": found, **dict(zip(("input", "PSNR", "right"), psnr, strict=False))}


def near(kernel: str, estimated: str) -> bool:
    """Whether an estimate of the right family has its size within 10% and its angle within 5°."""
    (size, *angle), (own, *turn) = (
        map(float, text.split(":")[1].split(",")) for text in (kernel, estimated))
    return abs(own / size - 1) <= 0.1 and all(
        abs((a - b + 90) % 180 - 90) <= 5 for a, b in zip(angle, turn, strict=True))


def report(out: Path) -> None:
    rows = pd.read_csv(out / "blind.csv", keep_default_na=False, na_values={
        column: [""] for column in ("input", "PSNR", "right")})
    rows["blur"], rows["family"] = (rows[c].str.split(":").str[0] for c in ("kernel", "estimated"))
    same, refused = rows.family == rows.blur, rows.family == ""
    rows = rows.assign(refused=refused, wrong=~same & ~refused, near=[
        right and near(row.kernel, row.estimated) for right, row in zip(
            same, rows.itertuples(), strict=True)]).assign(**{"right family": same})
    restored = rows.dropna(subset="PSNR").groupby("blur", sort=False)[["input", "PSNR", "right"]]
    table = rows.groupby("blur", sort=False)[["refused", "right family", "near", "wrong"]].sum()
    table.insert(0, "pictures", rows.groupby("blur", sort=False).size())
    table = table.join(restored.mean()).rename(columns={
        "near": "and within 10%", "wrong": "wrong family", "input": "input (dB)",
        "PSNR": "restored (dB)", "right": "with the right kernel (dB)"}).reset_index()
    save_table(table, out / "blind_table", "Kernels estimated from photographs of 256 x 256 pixels "
               "(angles: within 5 degrees), and the PSNR after total variation; a corner is two "
               "straight motions, one after the other.")


def main(arguments: list[str] | None = None) -> int:
    return run(options(__doc__).parse_args(arguments), {"blind": measure_blind}, report)


if __name__ == "__main__":
    raise SystemExit(main())
