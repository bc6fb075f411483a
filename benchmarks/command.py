"""What the benchmarks have in common: their options, and the record of what made a result."""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from jfbnb.common import UserError, atomic_write

ROOT = Path(__file__).resolve().parents[1]


def options(doc: str) -> argparse.ArgumentParser:
    """A command that does what the first line of `doc` says, on CelebA; the caller adds to it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", default="data/celeba", help="folder, tar or zip of CelebA JPEGs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--report", action="store_true",
                        help="the figures and tables alone, of what has been measured")
    return parser


def run(name: str, bench: argparse.Namespace, measure: Callable[[argparse.Namespace], None],
        report: Callable[[Path], None]) -> int:
    """Measure, unless only the report is asked for, and report; what is wrong is one line."""
    try:
        if not bench.report:
            measure(bench)
            record(bench.out, name)
        report(bench.out)
    except UserError as error:
        print(f"{name}: error: {error}")
        return 1
    return 0


def record(out: Path, name: str) -> None:
    """Write into provenance.json by which version and command, and on what, a result was made."""
    file = out / "provenance.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    words = shlex.join(["python", *sys.argv]).replace(f"{ROOT}{os.sep}", "")
    found[name] = {"version": version("jfbnb"), "command": words, "machine": machine()}
    atomic_write(file, json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def machine() -> dict:
    """What figures are measured on."""
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
