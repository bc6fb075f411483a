"""What a second process gains, measured.

Trains the `cpu` profile's JFB network on bundled photographs with `jfbnb train`, in one process and
in two. Writes docs/scaling.json and the table of docs/scaling.md. Needs two idle cores and some
minutes: `python tools/scaling.py`. `--render` writes the table anew from docs/scaling.json.
"""

import io
import json
import os
import platform
import shutil
import subprocess
import sys

import pandas as pd
import torch
from publish import replace_block

from jfbnb.common import atomic_write
from jfbnb.methods import RELEASED
from jfbnb.suite.checkout import ROOT

STORED, PAGE = ROOT / "docs" / "scaling.json", ROOT / "docs" / "scaling.md"
WORK = ROOT / "build" / "scaling"
EPOCHS = 6  # with as many records
# Processes and threads of each; one process with two threads is what two processes compete with.
SETTINGS = ((1, 1), (1, 2), (2, 1))
FULL = 200_000  # about as many images as full CelebA has


def main() -> int:
    if "--render" not in sys.argv:
        shutil.rmtree(WORK, ignore_errors=True)
        stored = {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU "
                             f"cores, torch {torch.__version__}",
                  "runs": [measure_run(*setting) for setting in SETTINGS]}
        atomic_write(STORED, json.dumps(stored, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    for name, text in blocks(json.loads(STORED.read_text(encoding="utf-8"))).items():
        page = replace_block(page, name, text)
    atomic_write(PAGE, page)
    return 0


def measure_run(processes: int, threads: int) -> dict:
    """Seconds of the fastest epoch, and the loss of each."""
    out = WORK / f"{processes}x{threads}"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), "-m", "jfbnb", "train", "jfb",
         "--profile", "cpu", "--data", "bundled", "--from", str(RELEASED), "--out", str(out),
         "-p", f"epochs={EPOCHS}", "-p", "search_images=1", "-p", "candidates=1"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=True)
    card = json.loads((out / "jfb.json").read_text(encoding="utf-8"))
    seconds = min(record["seconds"] for record in card["history"])
    return {"processes": processes, "threads": threads, "images": card["training images"],
            "batch": card["training"]["batch_size"], "seconds": seconds,
            "losses": [record["loss"] for record in card["history"]]}


def blocks(stored: dict) -> dict[str, str]:
    """The table of docs/scaling.md."""
    runs = stored["runs"]
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
    hours = FULL * two["seconds"] / two["images"] / 3600
    table = io.StringIO()
    pd.DataFrame(rows).to_markdown(table, index=False, disable_numparse=True, stralign="right")
    return {"measured": (
        f"{table.getvalue()}\n\n{stored['machine']}; {one['images']} images an epoch in batches of "
        f"{one['batch']}, the fastest epoch of {len(one['losses'])}. Against one process with one "
        f"thread the losses of two threads are within {threads:.1%}, those of two processes within "
        f"{processes:.1%}. An epoch of {FULL:,} images would take two processes here "
        f"{hours:.1f} hours.")}


if __name__ == "__main__":
    sys.exit(main())
