"""Protocols of published benchmarks: python benchmarks/published.py --pictures DIR --kernels FILE

Neither the pictures of Set3C nor the camera shakes of Levin et al. (2009, in MATLAB's format 7.3)
are in this repository: github.com/cszn/DPIR has both, in testsets/set3c and kernels/Levin09.mat.
The protocol is that of its main_dpir_deblur.py: the 8-bit picture is blurred with a periodic border
and cut to 8 bits, NumPy's seed 0 draws the noise, and the PSNR is that of the result in 8 bits.
published.csv has a row for each picture, kernel, noise level and method; a stopped run continues.
"""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from command import Bench, Rows, options, run
from PIL import Image
from scipy import ndimage

from jfbnb.common import UserError
from jfbnb.core.operators import Convolution
from jfbnb.teaching.figures import save_table
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import make_methods

LEVELS = (2.55, 7.65, 12.75)  # of the noise, on values from 0 to 255
SIDES = (17, 27)  # of the two kernels that DPIR's table has
SHOWN = ("jfb", "total-variation", "plug-and-play")


def shakes(file: Path) -> dict[int, np.ndarray]:
    """The kernels of `SIDES`, by their side."""
    try:
        with h5py.File(file) as stored:
            found = [stored[place][()].T for place in stored["kernels"][()].flatten()]
    except (OSError, KeyError) as error:
        raise UserError(f"{file} holds no kernels in MATLAB's format 7.3 ({error})") from error
    return {len(kernel): kernel for kernel in found if len(kernel) in SIDES}


def measure_published(bench: Bench) -> None:
    """Add to published.csv what it does not have yet."""
    files = sorted(bench.pictures.glob("*.png"))
    if not files:
        raise UserError(f"no PNG files in {bench.pictures}: fetch Set3C")
    rows, methods = Rows(bench.out / "published.csv"), make_methods(list(SHOWN), None,
                                                                   torch.device("cpu"))
    for side, kernel in shakes(bench.kernels).items():
        for file in files:
            sharp = np.asarray(Image.open(file).convert("RGB"))
            blurred = ndimage.convolve(sharp, kernel[..., None], mode="wrap") / 255.0
            A = Convolution(sharp.shape[:2], kernel / kernel.sum(), "periodic")
            for level in LEVELS:
                noise = np.random.RandomState(0).normal(0, level / 255, blurred.shape)
                d = torch.from_numpy(blurred + noise).float().permute(2, 0, 1)[None]
                for name, method in methods.items():
                    key = {"picture": file.stem, "kernel": side, "noise": level, "method": name}
                    if len(rows.where(**key)):
                        continue
                    y, info = method(A, d, level / 255)
                    rows.add({**key, "input": decibels(d, sharp), "PSNR": decibels(y, sharp),
                              "converged": float(info.converged.all()),
                              "iterations": info.iterations.max().item()})
                    print(key, f"{rows.table.PSNR.iloc[-1]:.2f} dB", flush=True)


def decibels(x: torch.Tensor, sharp: np.ndarray) -> float:
    """The PSNR of an image (1, 3, H, W), rounded to 8 bits, to a sharp one (H, W, 3) uint8."""
    found = (x[0].permute(1, 2, 0).double().numpy() * 255).round().clip(0, 255)
    return 10 * np.log10(255**2 / np.square(found - sharp).mean())


def report(out: Path) -> None:
    rows = pd.read_csv(out / "published.csv")
    table = rows.groupby(["kernel", "noise", "method"], sort=False).agg(
        pictures=("PSNR", "size"), **{"input (dB)": ("input", "mean"), "PSNR (dB)": (
            "PSNR", "mean")}, converged=("converged", "mean")).reset_index()
    table["kernel"] = [f"{side} x {side}" for side in table.kernel]
    table["method"] = [METHODS[name].label for name in table.method]
    save_table(table, out / "published_table",
               "Set3C by DPIR's protocol: two camera shakes of Levin et al. (2009), periodic "
               "border, noise on values from 0 to 255. JFB is the released U-Net, plug-and-play "
               "the released denoiser; total variation has the weight of protocol paper, scaled "
               "with the noise.")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--pictures", type=Path, required=True, help="folder of Set3C's PNG files")
    parser.add_argument("--kernels", type=Path, required=True, help="Levin09.mat")
    return run(parser.parse_args(arguments), {"published": measure_published}, report)


if __name__ == "__main__":
    raise SystemExit(main())
