"""The best learning rate of each method: python benchmarks/rates.py --profile quick

Each method is trained as the profile says, from its pretrained denoiser, at rates that differ by
factors of 2, until the best lies between two worse ones. Quality is the mean PSNR on validation
images. notebooks/profiles/rates has the results, and the profiles' `learning_rates` are the best
of them. A stopped search continues.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from command import ROOT, Bench, Rows, options, run

from jfbnb.common import UserError
from jfbnb.core.protocols import get_protocol
from jfbnb.data import load_splits
from jfbnb.run.train import TRAINED, network_parameters, prepared
from jfbnb.training.methods import get_method
from jfbnb.training.recipes import Run, score, train_method, with_images

CPU = torch.device("cpu")
FACTORS = (0.5, 1.0, 2.0)  # of the profile's learning rate: the first three tries
TRIES = 7  # of learning rates, at most
FAILED = -1000.0  # the PSNR of a rate at which the training fails
LEVEL = 0.01  # dB; of rates that differ by less the lowest is taken


def next_rate(base: float, tried: dict[float, float]) -> float | None:
    """The rate to try next; None where the best lies between two others, or after `TRIES`."""
    for rate in (factor * base for factor in FACTORS):
        if rate not in tried:
            return rate
    best = max(tried, key=tried.get)
    if len(tried) >= TRIES or min(tried) < best < max(tried):
        return None
    return best / 2 if best == min(tried) else best * 2


def search(bench: Bench) -> None:
    """Add the tries to PROFILE.csv that it does not have yet."""
    p = network_parameters(bench.profile, {"data": bench.data} if bench.data else {})
    splits = load_splits(p["data"], get_protocol(p["protocol"]).image_size, p["n_train"],
                         p["n_validation"], p["n_test"])
    rows = Rows(bench.out / f"{bench.profile}.csv")
    for method in map(get_method, bench.methods):
        what = prepared(method, p, splits, bench.start, False, CPU)
        config = replace(what["config"], budget=bench.share * p["budget"], unconverged_limit=1.0)
        judged = with_images(what["problem"], splits.validation[:bench.images])

        def tried(name: str = method.name) -> dict[float, float]:
            own = rows.where(method=name)
            return dict(zip(own.learning_rate, own.psnr, strict=True)) if len(own) else {}

        while rate := next_rate(p["learning_rate"], tried()):
            what["config"] = replace(config, learning_rate=rate)
            try:
                model, _ = train_method(method, **what, run=Run(CPU, log=lambda line: None))
                psnr = score(model.on(judged.A), judged)["psnr"]
            except UserError as error:
                print(f"{method.name}: {error}")
                psnr = FAILED
            rows.add({"method": method.name, "learning_rate": rate, "budget": config.budget,
                      "images": len(judged.x), "psnr": round(psnr, 4)})
            print(f"{method.name}: {psnr:.4f} dB at {rate:g}", flush=True)


def best_rates(file: Path) -> dict[str, float]:
    """For each method in a file the lowest rate that is the best or level with it."""
    rows = pd.read_csv(file)
    level = rows[rows.psnr > rows.groupby("method").psnr.transform("max") - LEVEL]
    return level.groupby("method", sort=False).learning_rate.min().to_dict()


def report(profile: str, out: Path) -> None:
    print(profile, best_rates(out / f"{profile}.csv"))


def main(arguments: list[str] | None = None) -> int:
    parser = options(__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data", help="instead of the profile's")
    parser.add_argument("--start", type=Path, help="a folder with denoiser.safetensors; "
                        "runs/PROFILE by default")
    parser.add_argument("--methods", nargs="+", default=TRAINED)
    parser.add_argument("--share", type=float, default=1.0, help="of the profile's budget")
    parser.add_argument("--images", type=int, default=24, help="of validation")
    parser.set_defaults(out=ROOT / "notebooks" / "profiles" / "rates", threads=1)
    bench = parser.parse_args(arguments)
    bench.start = bench.start or ROOT / "runs" / bench.profile
    return run(bench, {bench.profile: search}, partial(report, bench.profile), prefix="rates_")


if __name__ == "__main__":
    raise SystemExit(main())
