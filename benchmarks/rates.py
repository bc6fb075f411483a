"""The learning rate that is best for each method: python benchmarks/rates.py --profile quick

Each method is trained as the profile says, from its pretrained denoiser, at rates that differ by
factors of 2, until the best is between two worse ones. Quality is the mean PSNR on validation
images. A training here may have a share of the profile's budget. notebooks/profiles/rates has what
was found, and the profiles' `learning_rates` are the best of it. What is there is not done again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from command import run

from jfbnb.common import UserError
from jfbnb.core.protocols import get_protocol
from jfbnb.data import load_splits
from jfbnb.run.train import TRAINED, network_parameters, prepared
from jfbnb.teaching.figures import save_data
from jfbnb.training.methods import METHODS, get_method
from jfbnb.training.recipes import Run, score, train_method, with_images

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FACTORS = (0.5, 1.0, 2.0)  # of the profile's learning rate: what is tried first
TRIES = 7  # of learning rates, at most
LEVEL = 0.01  # dB: less decides nothing, and the lower rate is then the more careful one


def next_rate(base: float, tried: dict[float, float]) -> float | None:
    """The rate to try next; None where the best lies between two others, or is given up."""
    for rate in (factor * base for factor in FACTORS):
        if rate not in tried:
            return rate
    best = max(tried, key=tried.get)
    if len(tried) >= TRIES or min(tried) < best < max(tried):
        return None
    return best / 2 if best == min(tried) else best * 2


def measure(bench: argparse.Namespace) -> None:
    torch.set_num_threads(bench.threads)
    p = network_parameters(bench.profile, {"data": bench.data} if bench.data else {})
    splits = load_splits(p["data"], get_protocol(p["protocol"]).image_size, p["n_train"],
                         p["n_validation"], p["n_test"])
    file = bench.out / f"{bench.profile}.csv"
    for name in bench.methods:
        what = prepared(get_method(name), p, splits, bench.start, False, CPU)
        config = replace(what["config"], budget=bench.share * p["budget"], unconverged_limit=1.0)
        judged = with_images(what["problem"], splits.validation[:bench.images])
        while True:
            rows = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=["method"])
            own = rows[rows.method == name]
            tried = dict(zip(own.get("learning_rate", []), own.get("psnr", []), strict=True))
            rate = next_rate(p["learning_rate"], tried)
            if rate is None:
                break
            psnr = -1000.0  # of a rate at which the training fails
            try:
                model, _ = train_method(METHODS[name], **what | {"config": replace(
                    config, learning_rate=rate)}, run=Run(CPU, log=lambda line: None))
                psnr = score(model.on(judged.A), judged)["psnr"]
            except UserError as error:
                print(f"{name}: {error}")
            # Read again: another process may have written meanwhile.
            rows = pd.read_csv(file) if file.is_file() else pd.DataFrame()
            found = {"method": name, "learning_rate": rate, "budget": config.budget,
                     "images": len(judged.x), "psnr": round(psnr, 4)}
            save_data(pd.concat([rows, pd.DataFrame([found])], ignore_index=True),
                      file.with_suffix(""))
            print(found, flush=True)


def report(out: Path) -> None:
    """The best rates, as profiles have them."""
    for file in sorted(out.glob("*.csv")):
        print(file.stem, best_rates(file))


def best_rates(file: Path) -> dict[str, float]:
    """Of each method in a file the lowest rate that is the best or level with it."""
    rows = pd.read_csv(file)
    level = rows[rows.psnr > rows.groupby("method").psnr.transform("max") - LEVEL]
    return level.groupby("method", sort=False).learning_rate.min().to_dict()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--data", help="in the place of the profile's")
    parser.add_argument("--start", type=Path, help="a folder with denoiser.safetensors; "
                        "runs/PROFILE by default")
    parser.add_argument("--methods", nargs="+", default=TRAINED)
    parser.add_argument("--share", type=float, default=1.0, help="of the profile's budget")
    parser.add_argument("--images", type=int, default=24, help="of validation")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "notebooks" / "profiles" / "rates")
    parser.add_argument("--report", action="store_true", help="only print the best rates")
    bench = parser.parse_args(arguments)
    bench.start = bench.start or ROOT / "runs" / bench.profile
    return run(f"rates_{bench.profile}", bench, measure, report)


if __name__ == "__main__":
    raise SystemExit(main())
