"""Run the suite for every combination of some parameters' values, on dask.distributed.

Each point is one `jfbnb reproduce` in a separate process and folder. It skips finished notebooks.
Dask retries a point if its worker dies.
"""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from jfbnb.common import UserError, parse_yaml
from jfbnb.run import checkout
from jfbnb.run.reproduce import check_parameters, known_parameters, load_profile
from jfbnb.teaching.figures import save_table


def load_sweep(path: Path) -> tuple[str, dict[str, list[Any]]]:
    """Read a sweep: its profile, and its parameters, each with a list of values.

    Raises:
        UserError: if the file is not a sweep, or has a parameter that no notebook has.
    """
    if not path.is_file():
        raise UserError(f"cannot read the sweep {path}: there is no such file")
    sweep = parse_yaml(path.read_bytes(), str(path))
    if (not isinstance(sweep, dict) or set(sweep) != {"profile", "parameters"}
            or not isinstance(sweep["parameters"], dict) or not sweep["parameters"]
            or not all(isinstance(v, list) and v for v in sweep["parameters"].values())):
        raise UserError(f"{path} is not a sweep: give a `profile`, and `parameters`, each with a "
                        "list of values")
    known = known_parameters()
    check_parameters(load_profile(sweep["profile"]), known)
    for values in points(sweep["parameters"]):
        check_parameters(values, known)
    if "profile" in sweep["parameters"]:
        raise UserError(f"{path}: leave `profile` out of the parameters")
    return sweep["profile"], sweep["parameters"]


def points(parameters: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values."""
    return [dict(zip(parameters, values, strict=True))
            for values in itertools.product(*parameters.values())]


def point_name(values: dict[str, Any]) -> str:
    """The folder of a point, e.g. protocol=paper,seed=0."""
    return ",".join(f"{k}={v}" for k, v in sorted(values.items())).replace("/", "_")


def run_point(profile: str, folder: str, values: dict[str, Any], data: str | None) -> str:
    """Reproduce one point in a separate process; return its folder.

    Raises:
        RuntimeError: if that fails, with the last line of its output.
    """
    command = [sys.executable, "-m", "jfbnb", "reproduce", "--profile", profile, "--folder", folder,
               *(["--data", data] if data else [])]
    for name, value in values.items():  # JSON is YAML 1.2 too
        command += ["-p", f"{name}={json.dumps(value, ensure_ascii=False)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def sweep(path: Path, scheduler: str | None, data: str | None,
          log: Callable[[str], None] = print) -> Path:
    """Run all points of the sweep file; return the table of means and standard errors.

    Args:
        scheduler: address of a dask scheduler whose workers share this folder; None starts one
            worker on this machine.

    Raises:
        UserError: for a bad sweep file, if dask is missing, or if points fail.
    """
    profile, parameters = load_sweep(path)
    try:
        from distributed import Client
    except ImportError:
        raise UserError("sweeps need dask: pip install 'jfbnb[sweep]'") from None
    try:
        client = Client(scheduler) if scheduler else Client(n_workers=1, threads_per_worker=1)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot reach the scheduler {scheduler}: {error}") from error
    name, failed = f"sweep-{path.stem}", 0
    with client:
        futures = [client.submit(run_point, profile, f"{name}/{point_name(values)}", values, data,
                                 pure=False) for values in points(parameters)]
        for future in futures:
            error = future.exception()  # waits
            log(f"failed: {error}" if error else f"done: {future.result()}")
            failed += error is not None
    if failed:
        raise UserError(f"{failed} of {len(futures)} points failed; run the same command to try "
                        "them again")
    return summarise(name, parameters)


def summarise(name: str, parameters: dict[str, list[Any]]) -> Path:
    """Write the means over the seeds of every method's PSNR and SSIM, with standard errors."""
    figures = checkout.run_dirs(name)[1]
    together = pd.concat([
        pd.read_csv(figures / point_name(values) / "table2_comparison.csv").assign(**values)
        for values in points(parameters)]).dropna(subset="PSNR (dB)")
    keys = [key for key in parameters if key != "seed"] + ["Method"]
    table = together.groupby(keys, sort=False).agg(**{
        "runs": ("PSNR (dB)", "size"), "PSNR (dB)": ("PSNR (dB)", "mean"),
        "± PSNR": ("PSNR (dB)", "sem"), "SSIM": ("SSIM", "mean"), "± SSIM": ("SSIM", "sem")})
    save_table(table.reset_index(), figures / "summary", f"Means over the seeds of {name}; ± is "
               "the standard error over seeds, so over trainings and noise, and not over images.")
    return figures / "summary.md"
