"""Many runs of the suite: every combination of some parameters' values, on dask.distributed.

Each point is one `jfbnb reproduce` in a process of its own and a folder of its own. A point that is
done is skipped, so a sweep that was stopped goes on; a point whose worker dies is tried again.
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
from jfbnb.training.methods import JFB

RETRIES = 3  # after a worker died
APART = f"minus {JFB.label} (dB)"


def load_sweep(path: Path) -> tuple[str, dict[str, list[Any]]]:
    """A sweep's profile and its parameters, each with the values to try.

    Raises:
        UserError: if the file is no such description, or has a parameter that no notebook has.
    """
    if not path.is_file():
        raise UserError(f"cannot read the sweep {path}: there is no such file")
    sweep = parse_yaml(path.read_bytes(), str(path))
    if (not isinstance(sweep, dict) or set(sweep) != {"profile", "parameters"}
            or not isinstance(sweep["parameters"], dict) or not sweep["parameters"]
            or not all(isinstance(v, list) and v for v in sweep["parameters"].values())):
        raise UserError(f"{path} is no sweep: it has a `profile`, and `parameters` that each have "
                        "a list of values")
    profile, parameters = sweep["profile"], sweep["parameters"]
    known = known_parameters()
    check_parameters(load_profile(profile), known)
    for name, values in parameters.items():
        for value in values:
            check_parameters({name: value}, known)
    if "profile" in parameters:
        raise UserError(f"{path}: every point has a folder of its own; leave out `profile` there")
    return profile, parameters


def points(parameters: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values."""
    return [dict(zip(parameters, values, strict=True))
            for values in itertools.product(*parameters.values())]


def point_name(values: dict[str, Any]) -> str:
    """The folder of a point, e.g. protocol=paper,seed=0."""
    return ",".join(f"{k}={v}" for k, v in sorted(values.items())).replace("/", "_")


def run_point(profile: str, folder: str, values: dict[str, Any], data: str | None) -> str:
    """Reproduce one point in a process of its own; what it says when it fails is the error."""
    command = [sys.executable, "-m", "jfbnb", "reproduce", "--profile", profile,
               "--folder", folder]
    command += ["--data", data] if data else []
    for name, value in values.items():
        # JSON is YAML 1.2 too, and says of every value what it is.
        command += ["-p", f"{name}={json.dumps(value, ensure_ascii=False)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{folder}: {done.stderr.strip().splitlines()[-1:]}")
    return folder


def sweep(path: Path, scheduler: str | None, data: str | None,
          log: Callable[[str], None] = print) -> Path:
    """Run all points of the sweep file; return the table of means and standard errors.

    Args:
        scheduler: address of a dask scheduler whose workers share this folder; None starts
            workers on this machine.

    Raises:
        UserError: for a bad sweep file, a missing dask, or points that failed.
    """
    profile, parameters = load_sweep(path)
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError:
        raise UserError("sweeps need dask: pip install 'jfbnb[sweep]'") from None
    name = f"sweep-{path.stem}"
    todo = {f"{name}/{point_name(values)}": values for values in points(parameters)}
    cluster = None if scheduler else LocalCluster(n_workers=1, threads_per_worker=1)
    try:
        client = Client(scheduler or cluster)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot reach the scheduler {scheduler}: {error}") from error
    failed = []
    with client:
        futures = [client.submit(run_point, profile, folder, values, data, retries=RETRIES,
                                 pure=False) for folder, values in todo.items()]
        for future in as_completed(futures):
            if future.status == "error":
                failed.append(str(future.exception()))
                log(f"failed: {failed[-1]}")
            else:
                log(f"done: {future.result()}")
    if cluster:
        cluster.close()
    if failed:
        raise UserError(f"{len(failed)} of {len(todo)} points failed; the same command tries them "
                        "again")
    return summarise(name, parameters)


def summarise(name: str, parameters: dict[str, list[Any]]) -> Path:
    """Means over seeds of every method's PSNR, its distance from JFB's, and SSIM.

    The distance is paired: within a seed all methods saw the same measurements. "±" are standard
    errors over the seeds, so over trainings and noise, and not over images.
    """
    figures, tables = checkout.run_dirs(name)[1], []
    for values in points(parameters):
        table = pd.read_csv(figures / point_name(values) / "table2_comparison.csv")
        jfb = table["PSNR (dB)"][table.Method == JFB.label].item()
        tables.append(table.assign(**values, **{APART: table["PSNR (dB)"] - jfb}))
    together = pd.concat(tables, ignore_index=True).dropna(subset="PSNR (dB)")
    keys = [key for key in parameters if key != "seed"] + ["Method"]
    groups = together.groupby(keys, sort=False)
    table = groups.agg(**{"runs": ("PSNR (dB)", "size"), "PSNR (dB)": ("PSNR (dB)", "mean"),
                          "± PSNR": ("PSNR (dB)", "sem"), APART: (APART, "mean"),
                          "± pairs": (APART, "sem"), "SSIM": ("SSIM", "mean"),
                          "± SSIM": ("SSIM", "sem")}).reset_index()
    target = figures / "summary"
    save_table(table, target, f"Means over the seeds of {name}; ± is the standard error over "
                              "seeds, not over images.")
    return target.with_suffix(".md")
