"""What the benchmarks with commands of their own have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from jfbnb.common import UserError


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
        report(bench.out)
    except UserError as error:
        print(f"{name}: error: {error}")
        return 1
    return 0
