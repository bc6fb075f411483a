"""Run the notebooks through papermill, in order, and skip those that are done.

A notebook is done if its marker says so: a small file, written last and atomically, with hashes of
everything that the notebook depends on and of every file that it wrote.
"""

import ast
import contextlib
import hashlib
import json
import math
import os
import platform
import reprlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points, version
from pathlib import Path
from time import perf_counter
from typing import Any

import nbformat
import torch
from filelock import FileLock, Timeout

from jfbnb.common import (
    CHECK_FAILED,
    UserError,
    atomic_write,
    describe_device,
    parse_yaml,
    pick_device,
    printable,
    remove_unfinished,
)
from jfbnb.core.denoisers import make_network
from jfbnb.core.protocols import get_protocol
from jfbnb.data import fingerprint
from jfbnb.run import checkout

Parameters = dict[str, Any]  # a notebook's, by name
Log = Callable[[str], None]
PACKAGES = ("jfbnb", "torch", "numpy", "scikit-image", "matplotlib", "papermill", "jupyterlab")
CODE = (".py", ".js", ".csv", ".json", ".safetensors")  # package files that affect results
NOT_RESULTS = ("checkpoints", "markers", "trained")  # folders in a run's folder
# All numbers among the parameters are positive, except:
LEAST = {"depth": 2, "seed": 0, "penalty": 0, "power_iterations": 0, "unconverged_limit": 0}


def notebooks() -> list[Path]:
    """The suite's notebooks, in order."""
    return sorted((checkout.ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"))


def _number(path: Path) -> str:
    return path.stem.split("_")[0]


# --- parameters ---------------------------------------------------------------------------------


def notebook_parameters(path: Path) -> Parameters:
    """The names and literal values in a notebook's cell tagged `parameters`."""
    (cell,) = (c for c in nbformat.read(path, as_version=4).cells
               if "parameters" in c.metadata.get("tags", []))
    return {node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)}


def known_parameters() -> Parameters:
    """All parameters of the suite's notebooks, and a value of each."""
    return {name: value for path in notebooks()
            for name, value in notebook_parameters(path).items()}


def load_profile(name: str) -> Parameters:
    """The parameters in notebooks/profiles/NAME.yaml.

    Raises:
        UserError: for an unknown name, or a file that does not map names to values.
    """
    folder = checkout.ROOT / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(f"unknown profile {name!r}: choose one of {', '.join(known)}")
    path = folder / f"{name}.yaml"
    values = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict | None):
        raise UserError(f"{path} is not a profile: write `NAME: VALUE` for each parameter")
    return {**(values or {}), "profile": name}


def complete(paths: Iterable[Path], given: Parameters) -> dict[Path, Parameters]:
    """Each notebook's parameters, with the given values in place of its own.

    Raises:
        UserError: for errors that can be found before anything runs.
    """
    check_parameters(given, known_parameters())
    get_protocol(given.get("protocol", "paper"))
    make_network(given.get("network", "DnCNN"), 2, 1)
    pick_device(given.get("device", "auto"))
    given = given | {k: checkout.find_path(given[k]) for k in ("data", "weights") if k in given}
    return {path: {k: given.get(k, v) for k, v in notebook_parameters(path).items()}
            for path in paths}


def check_parameters(given: Parameters, known: Parameters) -> None:
    """Raise UserError for a parameter that is unknown, of the wrong type, or out of range."""
    for name, value in given.items():
        if name not in known:
            raise UserError(f"unknown parameter {name!r}: the notebooks have "
                            f"{', '.join(sorted(known))}")
        if not _is_like(value, known[name]):
            raise UserError(f"parameter {name} takes a value like {known[name]!r}, not "
                            f"{reprlib.repr(value)}")
        least = LEAST.get(name, sys.float_info.min)
        for number in value.values() if isinstance(value, dict) else [value]:
            if type(number) in (int, float) and number < least:
                raise UserError(f"parameter {name} must be "
                                f"{f'at least {least}' if name in LEAST else 'positive'}, "
                                f"not {number}")


def _is_like(value: Any, example: Any) -> bool:
    """Whether the value has the example's type; an integer may stand for a float.

    A list may have any number of entries, a dictionary any names, each with a number.
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and all(
            _is_like(k, "") and _is_like(v, 1.0) for k, v in value.items())
    if isinstance(example, list):
        return isinstance(value, list) and all(_is_like(v, example[0]) for v in value)
    if isinstance(example, float):
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is type(example) and (type(value) is not str or value.isprintable())


# --- what a notebook depends on, and what it writes ---------------------------------------------


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_hash(paths: Iterable[Path]) -> str:
    return hashlib.sha256("".join(map(file_hash, sorted(paths))).encode()).hexdigest()


def input_hashes(path: Path, parameters: Parameters) -> dict[str, str]:
    """Hashes of everything that a notebook depends on, except the outputs of earlier notebooks.

    Raises:
        UserError: if there is no such data, or if the weights folder has no networks.
    """
    cells, package = nbformat.read(path, as_version=4).cells, checkout.ROOT / "jfbnb"
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    stored = json.dumps(checkout.without_places(parameters), sort_keys=True)
    hashes = {"notebook": hashlib.sha256(code.encode()).hexdigest(),
              "parameters": hashlib.sha256(stored.encode()).hexdigest(),
              "package": files_hash(file for file in package.rglob("*.*") if file.suffix in CODE
                                    and package / "run" not in file.parents)}
    if plugins := entry_points(group="jfbnb.methods"):
        hashes["methods of others"] = ", ".join(sorted(
            f"{plugin.value} {plugin.dist.version}" for plugin in plugins))
    if parameters.get("data", "bundled") != "bundled":
        hashes["data"] = fingerprint(parameters["data"])
    if weights := parameters.get("weights"):
        networks = [file for pattern in ("*.safetensors", "*/*.safetensors")
                    for file in Path(weights).glob(pattern) if file.parent.name != "checkpoints"]
        if not networks:
            raise UserError(f"no trained networks in the weights folder {weights}: leave the "
                            "parameter `weights` empty to train")
        cards = [card for file in networks if (card := file.with_suffix(".json")).is_file()]
        hashes["weights"] = files_hash([*networks, *cards])
    return hashes


def earlier_hashes(path: Path, runs: Path) -> dict[str, str]:
    """Hashes of the earlier notebooks' outputs. Raises UserError if one is missing."""
    hashes = {}
    for earlier in notebooks()[:notebooks().index(path)]:
        marker = read_marker(runs / "markers" / f"{earlier.stem}.json")
        for name in marker.get("outputs", ["no marker"]):
            if name.startswith("figures") or name.endswith(".ipynb"):
                continue
            if not (checkout.work() / name).is_file():
                raise UserError(f"notebook {_number(path)} needs the results of "
                                f"{_number(earlier)}: run that one first")
            hashes[name] = file_hash(checkout.work() / name)
    return hashes


def read_marker(marker: Path) -> dict[str, Any]:
    """A notebook's marker, or an empty one if it is missing or damaged."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        return found if found.keys() == {"inputs", "outputs", "parameters", "seconds"} else {}
    except (OSError, ValueError, RecursionError, AttributeError):
        return {}


def is_done(marker: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether the marker has these inputs, and every output exists unchanged."""
    return marker.get("inputs") == inputs and all(
        (checkout.work() / name).is_file() and file_hash(checkout.work() / name) == digest
        for name, digest in marker["outputs"].items())


def result_files(folder: str) -> dict[Path, int]:
    """The files of a run except checkpoints, markers and logs, and when each was written."""
    return {file: file.stat().st_mtime_ns
            for place in checkout.run_dirs(folder) for file in place.rglob("[!.]*.*")
            if file.suffix != ".log" and file.is_file()
            and not set(NOT_RESULTS) & set(file.relative_to(place).parts)}


# --- running ------------------------------------------------------------------------------------


def reproduce(profile: str, overrides: Parameters, only: str = "", force: bool = False,
              log: Log = print, folder: str | None = None) -> Path:
    """Run the profile's notebooks; return the folder of figures, tables and provenance.json.

    Args:
        overrides: parameter values that replace the profile's.
        only: the number of the only notebook to run, e.g. "04" or "04b".
        force: run notebooks even if they are done, and train from scratch: the run's checkpoints
            are deleted.
        folder: the folder in runs/ and figures/, by default the profile's name.

    Raises:
        UserError: for bad input, or if a notebook stops with an error.
    """
    paths = [path for path in notebooks() if only in ("", _number(path))]
    if not paths:
        *known, last = map(_number, notebooks())
        raise UserError(f"no notebook {only!r}: choose {', '.join(known)} or {last}")
    if "profile" in overrides:
        raise UserError("the parameter profile cannot be set: name the output folder by --folder")
    folder = folder or profile
    if Path(folder).is_absolute() or folder == "." or ".." in Path(folder).parts \
            or not folder.isprintable():
        raise UserError(f"--folder {printable(folder)}: give the name of a folder inside runs/ "
                        "and figures/")
    given = load_profile(profile) | {"profile": folder} | overrides
    parameters = complete(paths, given)
    setup, scene = get_protocol(given.get("protocol", "paper")), torch.zeros(1, 3, 16, 16)
    if setup.operator(16)(scene).shape != scene.shape:
        raise UserError("the notebooks need measurements of the size of the scene, which the "
                        f"protocol {setup.name} does not give: choose paper or code")
    inputs = {path: input_hashes(path, parameters[path]) for path in paths}
    runs, figures = checkout.run_dirs(folder)
    with alone(runs):
        remove_unfinished(runs)
        remove_unfinished(figures)
        if force:
            for checkpoints in set(runs.rglob("checkpoints")) - {runs / "trained/checkpoints"}:
                shutil.rmtree(checkpoints, ignore_errors=True)
        for number, path in enumerate(paths, 1):
            title = f"[{number}/{len(paths)}] {path.stem}"
            run_step(path, parameters[path], inputs[path], folder, force, title, log)
        write_provenance(folder, given.get("device", "auto"))
    return figures


@contextlib.contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it if the process dies."""
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another run is writing to {runs}: wait until it ends, or choose another "
                        "--folder") from None


def run_step(path: Path, parameters: Parameters, inputs: dict[str, str], folder: str, force: bool,
             title: str, log: Log) -> None:
    """Run one notebook and write its marker, unless it is done."""
    runs, _ = checkout.run_dirs(folder)
    file = runs / "markers" / f"{path.stem}.json"
    marker, inputs = read_marker(file), inputs | earlier_hashes(path, runs)
    if not force and is_done(marker, inputs):
        log(f"{title}: unchanged, skipped")
        return
    log(f"{title}: expected " + (f"{marker['seconds']:.0f} s" if marker else "time unknown"))
    file.unlink(missing_ok=True)
    before = result_files(folder)
    seconds = run_notebook(path, parameters, runs)
    outputs = {file.relative_to(checkout.work()).as_posix(): file_hash(file)
               for file, written in sorted(result_files(folder).items())
               if before.get(file) != written}
    marker = {"inputs": inputs, "outputs": outputs, "parameters": parameters, "seconds": seconds}
    atomic_write(file, json.dumps(marker, indent=2))
    log(f"{title}: took {seconds:.0f} s")
    for line in (runs / f"{path.stem}.log").read_text(encoding="utf-8").splitlines():
        if line.startswith(CHECK_FAILED):
            log(f"    {line}")


def run_notebook(path: Path, parameters: Parameters, runs: Path) -> float:
    """Execute one notebook into `runs`, with a .log of its prints; return the seconds."""
    import papermill  # slow to import, and needed here only
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the kernel warns of frozen modules
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # not a kernel of another environment
    executed, log = runs / path.name, runs / f"{path.stem}.log"
    clock = perf_counter()
    try:
        with open(log, "w", encoding="utf-8") as stream:
            papermill.execute_notebook(
                str(path), str(executed), parameters=parameters, cwd=str(path.parent),
                kernel_name="python3", progress_bar=False, stdout_file=stream, stderr_file=stream,
                # Kernels warn, on our terminal, of connections that are not encrypted.
                config=Config(KernelManager={"transport_encryption": "auto"}))
    except PapermillExecutionError as error:
        raise UserError(f"{path.stem} stopped: {error.ename}: {error.evalue} (see "
                        f"{executed.relative_to(checkout.work())})") from error
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        raise UserError(f"{path.stem} stopped: {error}. It was killed, most often for lack of "
                        "memory (then lower batch_size or n_train), or crashed: see the end of "
                        f"{log.relative_to(checkout.work())}") from error
    return perf_counter() - clock


def write_provenance(folder: str, device: str) -> None:
    """Write figures/FOLDER/provenance.json: how its figures and tables were made."""
    runs, figures = checkout.run_dirs(folder)
    markers = {path.stem: read_marker(runs / "markers" / f"{path.stem}.json")
               for path in notebooks()}
    record = {
        "profile": folder,
        "release": f"v{version('jfbnb')}",
        "device": describe_device(pick_device(device)),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "steps": {name: marker | {"seconds": round(marker["seconds"], 1), "parameters":
                                  checkout.without_places(marker["parameters"])}
                  for name, marker in markers.items() if marker},
    }
    atomic_write(figures / "provenance.json", json.dumps(record, indent=2) + "\n")
