"""What a second process gains, measured; and what full CelebA would take, reckoned from that.

Trains the `cpu` profile's JFB network on bundled photographs with `jfbnb train`, in one process and
in two. Writes docs/scaling.json and the tables of docs/scaling.md. Needs two idle cores and about
five minutes: `python tools/scaling.py`. `--render` writes the tables anew from docs/scaling.json.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from publish import replace_block
from torch.utils.flop_counter import FlopCounterMode

from jfbnb.common import atomic_write
from jfbnb.datasets import random_crops
from jfbnb.maps import SplittingMap
from jfbnb.networks import DnCNN, Regulariser
from jfbnb.operators import get_protocol, make_blur
from jfbnb.profile_training import network_parameters
from jfbnb.training import EquilibriumLoss, draw_measurement

ROOT = Path(__file__).resolve().parents[1]
STORED, PAGE = ROOT / "docs" / "scaling.json", ROOT / "docs" / "scaling.md"
WORK = ROOT / "build" / "scaling"
EPOCHS = 3
# Processes and threads of each; one process with two threads is what two processes compete with.
SETTINGS = ((1, 1), (1, 2), (2, 1))
# Not measured. An A100's dense bfloat16 peak is its vendor's figure; what share of it narrow
# convolutions reach, and how many crops a GPU takes at once, are guesses.
ASSUMED = {"images": 200_000, "peak FLOP/s": 312e12, "share of peak": [0.05, 0.25],
           "crops per GPU": 64, "bytes/s between GPUs": 12.5e9}


def main() -> int:
    if "--render" not in sys.argv:
        shutil.rmtree(WORK, ignore_errors=True)
        stored = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU "
                             f"cores, torch {torch.__version__}",
                  "runs": [measure_run(*setting) for setting in SETTINGS],
                  "draws": measure_draws(), "assumed": ASSUMED,
                  "profiles": {name: count(name) for name in ("cpu", "paper")}}
        stored["estimates"] = [estimate(stored, "paper", gpus) for gpus in (1, 8, 64)]
        atomic_write(STORED, json.dumps(stored, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks(json.loads(STORED.read_text())).items():
        page = replace_block(page, name, text)
    atomic_write(PAGE, page)
    return 0


# --- measured -----------------------------------------------------------------------------------


def measure_run(processes: int, threads: int) -> dict:
    """Seconds of the fastest epoch, and the loss of each."""
    out = WORK / f"{processes}x{threads}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", "jfbnb.cli", "train", "jfb",
         "--profile", "cpu", "--data", "bundled", "--from", "data/weights", "--out", str(out),
         "-p", f"epochs={EPOCHS}", "-p", "search_images=1", "-p", "candidates=1"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
    card = json.loads((out / "jfb.json").read_text())
    seconds = min(record["seconds"] for record in card["history"])
    return {"processes": processes, "threads": threads, "images": card["training images"],
            "batch": card["training"]["batch_size"], "seconds": seconds,
            "losses": [record["loss"] for record in card["history"]]}


def measure_draws() -> dict[str, float]:
    """Seconds per image of what is drawn on the CPU: every process cuts all crops of a batch, and
    draws the noise of its share of them."""
    torch.set_num_threads(1)
    p = network_parameters("paper", {"data": "bundled"})
    setup, batch = get_protocol(p["protocol"]), 64
    images = torch.zeros(batch, 3, setup.image_size, setup.image_size, dtype=torch.uint8)
    x = random_crops(images, p["crop"], 0)
    A = make_blur(setup, p["crop"])
    return {"crop": _fastest(lambda: random_crops(images, p["crop"], 0)) / batch,
            "measurement": _fastest(lambda: draw_measurement(A, x, 0.01, (0,))) / batch}


def _fastest(call, times: int = 10) -> float:
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - clock)
    return min(seconds)


def count(profile: str) -> dict:
    """The arithmetic of one training image: what PyTorch counts in one evaluation of the network
    on a crop, times the evaluations, if every solve takes all its iterations."""
    p = network_parameters(profile, {"data": "bundled"})
    network = DnCNN(p["depth"], p["width"])
    S = Regulariser(network, 1.0, 0.05, DnCNN(p["depth"], p["width"]))
    T = SplittingMap(make_blur(get_protocol(p["protocol"]), p["crop"]), S)
    loss = EquilibriumLoss(T, 0.01, p["tolerance"], p["max_iterations"], p["power_iterations"],
                           p["contraction"], p["penalty"])
    jfb, denoiser = (_flops(network, p[side]) for side in ("crop", "pretrain_crop"))
    return {"network": f"{p['depth']} x {p['width']}", "crop": p["crop"], "epochs": p["epochs"],
            "evaluations": loss.evaluations, "FLOP per evaluation": jfb,
            "FLOP per image": jfb * loss.evaluations,
            "pretraining epochs": p["pretrain_epochs"],
            "pretraining FLOP per image": 3 * denoiser,  # forward once, backward twice
            "weights": sum(value.numel() for value in S.parameters())}


def _flops(network: DnCNN, side: int) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side), 0.05)
    return counter.get_total_flops()


# --- reckoned -----------------------------------------------------------------------------------


def estimate(stored: dict, profile: str, gpus: int) -> dict:
    """Hours of a profile's two trainings on full CelebA: least and most, and where they go."""
    found, assumed = stored["profiles"][profile], stored["assumed"]
    epochs, before = found["epochs"], found["pretraining epochs"]
    flops = assumed["images"] * (epochs * found["FLOP per image"]
                                 + before * found["pretraining FLOP per image"])
    seen = assumed["images"] * (epochs + before)  # images, over all epochs
    steps = seen / (gpus * assumed["crops per GPU"])
    # A ring moves each gradient twice; nothing of it is hidden behind the arithmetic here.
    sent = 2 * (gpus - 1) / gpus * 4 * found["weights"]  # bytes
    exchange = steps * sent / assumed["bytes/s between GPUs"]
    draws = seen * (stored["draws"]["crop"] + stored["draws"]["measurement"] / gpus)
    most, least = (flops / (gpus * assumed["peak FLOP/s"] * share)
                   for share in assumed["share of peak"])
    return {"gpus": gpus, "FLOP": flops, "steps": steps,
            "arithmetic": [least / 3600, most / 3600],
            "exchange": exchange / 3600, "draws": draws / 3600,
            "hours": [(t + exchange + draws) / 3600 for t in (least, most)]}


# --- shown --------------------------------------------------------------------------------------


def blocks(stored: dict) -> dict[str, str]:
    """The tables of docs/scaling.md."""
    return {"measured": _measured(stored), "counted": _counted(stored),
            "estimated": _estimated(stored)}


def _measured(stored: dict) -> str:
    runs, cpu = stored["runs"], stored["profiles"]["cpu"]
    one, two = runs[0], runs[-1]
    rows = []
    for run in runs:
        gain = one["seconds"] / run["seconds"]
        rows.append({"processes": run["processes"], "threads of each": run["threads"],
                     "seconds per epoch": f"{run['seconds']:.1f}",
                     "images per second": f"{run['images'] / run['seconds']:.1f}",
                     "speed-up": f"{gain:.2f}",
                     "efficiency": f"{gain / (run['processes'] * run['threads']):.0%}"})
    threads, processes = (max(abs(a / b - 1) for a, b in zip(run["losses"], one["losses"],
                                                             strict=True)) for run in runs[1:])
    rate = one["images"] * cpu["FLOP per image"] / one["seconds"]
    full = stored["assumed"]["images"]
    hours = full * cpu["epochs"] * two["seconds"] / two["images"] / 3600
    return (f"{_table(rows)}\n\n{stored['machine']}; {one['images']} images an epoch in batches of "
            f"{one['batch']}, the fastest epoch of {len(one['losses'])}. Against one process with "
            f"one thread the losses of two threads are within {threads:.1%}, those of two "
            f"processes within {processes:.1%}. One thread does at most {rate / 1e9:.0f} GFLOP/s. "
            f"Images x epochs x seconds per image: the `cpu` profile's "
            f"{cpu['epochs']} epochs, with {full:,} images, would take two processes here "
            f"{hours:.0f} hours.")


def _counted(stored: dict) -> str:
    return _table([{"profile": name, "network": row["network"], "crop": row["crop"],
                    "GFLOP per evaluation": f"{row['FLOP per evaluation'] / 1e9:.2f}",
                    "evaluations per image": f"{row['evaluations']:g}",
                    "GFLOP per image": f"{row['FLOP per image'] / 1e9:.0f}",
                    "epochs": row["epochs"],
                    "pretraining, GFLOP per image":
                        f"{row['pretraining FLOP per image'] / 1e9:.1f}",
                    "pretraining epochs": row["pretraining epochs"]}
                   for name, row in stored["profiles"].items()])


def _estimated(stored: dict) -> str:
    def between(pair: list[float]) -> str:
        return f"{pair[0]:.2g} to {pair[1]:.2g}"

    rows = [{"GPUs": row["gpus"], "arithmetic (hours)": between(row["arithmetic"]),
             "exchange of gradients (hours)": f"{row['exchange']:.1g}",
             "crops and noise (hours)": f"{row['draws']:.1g}",
             "in all (hours)": between(row["hours"])} for row in stored["estimates"]]
    assumed, draws = stored["assumed"], stored["draws"]
    low, high = assumed["share of peak"]
    return (f"{_table(rows)}\n\nAssumed, not measured: {assumed['peak FLOP/s'] / 1e12:.0f} TFLOP/s "
            f"at peak, of which {low:.0%} to {high:.0%} are reached; {assumed['crops per GPU']} "
            f"crops per GPU and step; {assumed['bytes/s between GPUs'] / 1e9:g} GB/s between GPUs. "
            f"Measured here: {1e6 * draws['crop']:.0f} µs to cut a crop, "
            f"{1e6 * draws['measurement']:.0f} µs to draw a measurement's noise and blur it.")


def _table(rows: list[dict]) -> str:
    buffer = io.StringIO()
    pd.DataFrame(rows).to_markdown(buffer, index=False, disable_numparse=True, stralign="right")
    return buffer.getvalue()


if __name__ == "__main__":
    sys.exit(main())
