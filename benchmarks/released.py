"""The released networks on CelebA's test images: python benchmarks/released.py

The paper's network and that of profile `best`, both of which come with the package, on the same
measurements. Photographs are in photographs.py, other blurs and noise levels in grid.py.

What is in released_images.csv, of the same weights, is not done again: a run that was stopped goes
on.
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from command import options, run

from jfbnb.common import UserError, pick_device
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import ImageSet, load_splits
from jfbnb.teaching.figures import save_data, save_table
from jfbnb.training.checkpoints import digest
from jfbnb.training.evaluation import evaluate
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import BEST, RELEASED, make_methods

PART = 100  # images between two records
SETS = {"DnCNN 8 x 32": RELEASED, "U-Net": BEST}
SHOWN = ("jfb", "jfb-head", "jfb-energy")


def weights_of(folder: Path, method: str) -> str | None:
    """A hash of a method's weights in a folder; None where it has none."""
    own = METHODS[method].head_of or METHODS[method]
    file = folder / f"{own.name}.safetensors"
    try:
        make_methods([method], folder, torch.device("cpu"))
    except UserError:
        return None
    return digest(file.read_bytes())[:16]


def fill(bench: argparse.Namespace) -> None:
    torch.set_num_threads(bench.threads)
    images = load_splits(bench.data, 128, 8000, 200, 2000).test[:bench.images]
    file = bench.out / "released_images.csv"
    done = pd.read_csv(file) if file.is_file() else pd.DataFrame(
        columns=["set", "protocol", "method", "weights", "image"])
    for name, folder in SETS.items():
        for method in bench.methods:
            weights = weights_of(folder, method)
            for protocol in bench.protocols if weights else ():
                before = done[(done.set == name) & (done.protocol == protocol)
                              & (done.method == method) & (done.weights == weights)].image
                left = [i for i in range(len(images)) if images.names[i] not in set(before)]
                for i in range(0, len(left), PART):
                    rows = solved(folder, method, protocol, images, left[i:i + PART],
                                  pick_device(bench.device))
                    done = pd.concat([done, rows.assign(set=name, protocol=protocol,
                                                        weights=weights)])
                    save_data(done, file.with_suffix(""))
                    print(name, method, protocol, f"{rows.psnr.mean():.3f}", flush=True)


def solved(folder: Path, method: str, protocol: str, images: ImageSet,
           places: list[int], device: torch.device) -> pd.DataFrame:
    setup = get_protocol(protocol)
    A, x = setup.operator().to(device), images.as_float()[places].to(device)
    d = measure(A, x, setup.noise_std, 0, [images.indices[i] for i in places])
    return evaluate(make_methods([method], folder, x.device), A, x, d, setup.noise_std,
                    [images.names[i] for i in places]).drop(columns="residual").round(4)


def report(out: Path) -> None:
    """The table, of released_images.csv alone, of the weights as they are."""
    rows = pd.read_csv(out / "released_images.csv")
    current = {(name, method): weights_of(folder, method)
               for name, folder in SETS.items() for method in SHOWN}
    rows = rows[[current.get((r.set, r.method)) == r.weights for r in rows.itertuples()]]
    # Of how many methods an image is done: those of all can be compared.
    count = rows.groupby(["protocol", "image"]).psnr.transform("size")
    shared = rows.psnr.where(count == count.groupby(rows.protocol).transform("max"))
    groups = rows.assign(shared=shared).groupby(["protocol", "set", "method"])
    table = pd.DataFrame({
        "images": groups.size(), "PSNR (dB)": groups.psnr.mean(), "± PSNR": groups.psnr.sem(),
        "on shared images": groups.shared.mean(),
        "SSIM": groups.ssim.mean(), "converged": groups.converged.mean(),
        "evaluations": groups.iterations.mean()}).reset_index()
    table["method"] = [METHODS[name].label for name in table.method]
    save_table(table.rename(columns={"set": "network"}), out / "released",
               "The released networks on CelebA's test images, solved to a relative "
               "residual of 1e-4. ± is the standard error over images. Shared images are those "
               "that every row of a protocol has.")


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=2000, help="the first so many test images")
    parser.add_argument("--methods", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--protocols", nargs="+", default=["paper", "code"])
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    return run("released", parser.parse_args(arguments), fill, report)


if __name__ == "__main__":
    raise SystemExit(main())
