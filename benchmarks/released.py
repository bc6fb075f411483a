"""The released networks on CelebA's test images: python benchmarks/released.py

released_images.csv has a row for each image. A stopped run continues; rows of other weights than
the present ones are not counted.
"""

from pathlib import Path

import pandas as pd
import torch
from command import Bench, Rows, options, run
from safetensors.torch import load_file

from jfbnb.common import UserError, pick_device
from jfbnb.core.protocols import get_protocol, measure
from jfbnb.data import load_splits
from jfbnb.teaching.figures import save_table
from jfbnb.training.checkpoints import digest
from jfbnb.training.evaluation import evaluate
from jfbnb.training.methods import METHODS
from jfbnb.training.restorers import BEST, RELEASED, make_methods

PART = 100  # images between two writes
SETS = {"DnCNN 8 x 32": RELEASED, "U-Net": BEST}
SHOWN = ("jfb", "jfb-energy")


def weights_of(folder: Path, method: str) -> str | None:
    """A hash of a method's weights in a folder, whatever their names; None where it has none."""
    try:
        make_methods([method], folder, torch.device("cpu"))
    except UserError:
        return None
    return digest(sorted(map(digest, load_file(folder / f"{method}.safetensors").values())))[:16]


def measure_released(bench: Bench) -> None:
    """Add the images to released_images.csv that it does not have yet."""
    images = load_splits(bench.data).test[:bench.images]
    rows, device = Rows(bench.out / "released_images.csv"), pick_device(bench.device)
    for name, folder in SETS.items():
        for method in bench.methods:
            weights = weights_of(folder, method)
            for protocol in bench.protocols if weights else ():
                key = {"set": name, "protocol": protocol, "method": method, "weights": weights}
                done = rows.where(**key)
                done = set(done.image) if len(done) else set()
                left = [i for i, image in enumerate(images.names) if image not in done]
                setup = get_protocol(protocol)
                A, restorers = setup.operator().to(device), make_methods([method], folder, device)
                for i in range(0, len(left), PART):
                    part = left[i:i + PART]
                    x = images.as_float()[part].to(device)
                    d = measure(A, x, setup.noise_std, 0, [images.indices[k] for k in part])
                    found = evaluate(restorers, A, x, d, setup.noise_std,
                                     [images.names[k] for k in part]).drop(columns="residual")
                    rows.add(found.round(4).assign(**key))
                    print(name, method, protocol, f"{found.psnr.mean():.3f}", flush=True)


def report(out: Path) -> None:
    """The table, of released_images.csv alone."""
    rows = pd.read_csv(out / "released_images.csv")
    current = {(name, method): weights_of(folder, method)
               for name, folder in SETS.items() for method in SHOWN}
    rows = rows[[current.get((r.set, r.method)) == r.weights for r in rows.itertuples()]]
    # The images that all methods have can be compared.
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
    parser = options(__doc__, images=2000)
    parser.add_argument("--methods", nargs="+", default=list(SHOWN), choices=SHOWN)
    parser.add_argument("--protocols", nargs="+", default=["paper", "code"])
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda")
    return run(parser.parse_args(arguments), {"released": measure_released}, report)


if __name__ == "__main__":
    raise SystemExit(main())
