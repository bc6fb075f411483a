"""What the benchmarks share: options, sections, the record of what made a result, and tables that
continue where a stopped run left them."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pandas as pd
import torch

from jfbnb.common import UserError, atomic_write
from jfbnb.teaching.figures import save_data

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
Bench = argparse.Namespace  # the options of a run


def options(doc: str, sections: dict[str, Callable] | None = None,
            images: int = 0) -> argparse.ArgumentParser:
    """A parser with what all benchmarks have; with `images`, so many by default, also --data."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    if sections:
        parser.add_argument("--sections", nargs="+", default=list(sections), choices=sections)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--threads", type=int, help="of PyTorch; its own default if left out")
    parser.add_argument("--report", action="store_true",
                        help="measure nothing; draw the figures and tables of stored results")
    if images:
        parser.add_argument("--data", default="data/celeba", help="folder or zip of CelebA JPEGs")
        parser.add_argument("--images", type=int, default=images, help="the first so many")
    return parser


def run(bench: Bench, sections: dict[str, Callable[[Bench], None]],
        report: Callable[[Path], None], prefix: str = "") -> int:
    """Measure the chosen sections, all by default, and report after each. Returns an exit status.

    Args:
        prefix: of a section's name in provenance.json.
    """
    if bench.threads:
        torch.set_num_threads(bench.threads)
    bench.out.mkdir(parents=True, exist_ok=True)
    try:
        for name in () if bench.report else getattr(bench, "sections", sections):
            print(prefix + name, flush=True)
            sections[name](bench)
            record(bench.out, prefix + name)
            report(bench.out)
        if bench.report:
            report(bench.out)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}")
        return 1
    return 0


class Rows:
    """A table in a CSV file, written whenever rows are added: a stopped run continues from it."""

    def __init__(self, file: Path):
        self.file = file
        self.table = pd.read_csv(file) if file.is_file() else pd.DataFrame()

    def where(self, **values: object) -> pd.DataFrame:
        """The rows that have these values in these columns."""
        found = self.table
        for column, value in values.items():
            found = found[found[column] == value] if column in found else found[:0]
        return found

    def add(self, rows: pd.DataFrame | dict) -> None:
        rows = pd.DataFrame([rows]) if isinstance(rows, dict) else rows
        self.table = pd.concat([self.table, rows], ignore_index=True) if len(self.table) else rows
        save_data(self.table, self.file.with_suffix(""))


def record(out: Path, name: str) -> None:
    """Write into provenance.json which version, command and machine made a result."""
    file = out / "provenance.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    words = shlex.join(["python", *sys.argv]).replace(f"{ROOT}{os.sep}", "")
    found[name] = {"version": version("jfbnb"), "command": words, "machine": machine()}
    atomic_write(file, json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def machine() -> dict:
    """The processor and the versions that a result depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = {"system": f"{platform.system()} {platform.machine()}",
             "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(),
             "threads": torch.get_num_threads(),
             "vector instructions": torch.backends.cpu.get_cpu_capability(),
             "python": platform.python_version()}
    for library in ("torch", "deepinv", "torchdeq"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
