"""Run the six notebooks through papermill, in order, skipping what is already done.

A step is done when its marker says so: a small file, written last and atomically, with the key of
everything the step depends on and the hash of everything it wrote. An output notebook alone
proves nothing: it exists as soon as its run starts.
"""

import ast
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import reprlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import torch
from filelock import FileLock, Timeout
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

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
from jfbnb.core.precision import pick_bf16
from jfbnb.core.protocols import get_protocol
from jfbnb.data import fingerprint
from jfbnb.run import checkout
from jfbnb.training.methods import JFB, METHODS, plugins
from jfbnb.training.sources import digest, imported_files

PACKAGES = ("jfbnb", "torch", "torchvision", "numpy", "scikit-image", "matplotlib", "papermill",
            "jupyterlab")
# By any network; one that needs a smooth one is trained beside them where that is there.
TRAINED = [name for name, method in METHODS.items() if method.trainable and not method.smooth]
RIVALS = [name for name in TRAINED if name != JFB.name]  # notebook 5 trains them
SMALLEST = sys.float_info.min  # all numbers among the parameters are positive, except:
LEAST = {"depth": 2, **dict.fromkeys(("seed", "penalty", "power_iterations",
                                      "unconverged_limit"), 0)}
# Parameters of earlier releases, and what to write now.
GONE = dict.fromkeys(("minutes", "epochs"), "a training's length is its `budget` now, in "
                     "applications of the network to a training crop; see docs/profiles.md")


@dataclass(frozen=True)
class Step:
    """A notebook, the artefacts that later ones read (runs/), its figures, tables and long data.

    `reads`: files in the package, besides code, that its results depend on. `again`: further
    artefacts, where the parameter over_conditions is true.
    """

    name: str
    artefacts: tuple[str, ...]
    figures: tuple[str, ...]
    tables: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    again: tuple[str, ...] = ()

    @property
    def notebook(self) -> Path:
        return checkout.ROOT / "notebooks" / f"{self.name}.ipynb"

    def made(self, parameters: dict[str, Any]) -> tuple[str, ...]:
        """Its artefacts, with these parameters."""
        return self.artefacts + (self.again if parameters.get("over_conditions") else ())

    def outputs(self, folder: str, parameters: dict[str, Any]) -> list[Path]:
        """All files the step writes, relative to the folder of runs/ and figures/."""
        runs, figures = Path("runs", folder), Path("figures", folder)
        return [runs / f"{self.name}.ipynb", *(runs / a for a in self.made(parameters)),
                *(figures / f"{f}{s}" for f in self.figures for s in (".png", ".pdf")),
                *(figures / f"{t}{s}" for t in self.tables for s in (".csv", ".md", ".tex")),
                *(figures / f"{d}.csv" for d in self.data)]


STEPS = (
    Step("01_problem_setup_and_direct_inverse", (),
         ("nb1_spectrum", "blog1_direct_inverse", "nb1_inverse_crime"),
         reads=("weights/best/jfb.json", "weights/best/jfb.safetensors")),
    Step("02_tikhonov_gradient_descent", ("classical.json",),
         ("nb2_semi_convergence", "nb2_lambda_sweep", "nb2_filter_factors",
          "nb2_total_variation", "blog2_gradient_descent")),
    Step("03_dncnn_pretraining", ("denoiser.safetensors", "denoiser.json"),
         ("nb3_training_loss", "nb3_denoised", "nb3_receptive_field")),
    Step("04_jfb_training",
         ("jfb.safetensors", "jfb.json", "tuning_jfb.json", "jfb_history.csv"),
         ("nb4_maps", "nb4_gradient_angle", "nb4_cost", "fig1_training_loss"),
         ("nb4_cost", "nb4_certificate")),
    Step("05_evaluation_and_figures",
         ("tuning.json", *(f"{name}{suffix}" for name in RIVALS
                           for suffix in (".safetensors", ".json"))),
         ("table1_reconstructions", "nb5_per_image", "nb5_training", "nb5_computation",
          "nb5_conditions"),
         ("table2_comparison", "rivals", "conditions", "other_protocol", "psnr_scales",
          "released"),
         ("metrics", "curves", "computation"),
         ("teaching/published_table2.csv", "weights/jfb.json", "weights/jfb.safetensors",
          "weights/best/jfb.json", "weights/best/jfb.safetensors"),
         tuple(f"conditions/{name}{suffix}" for name in TRAINED if METHODS[name].compared
               for suffix in (".safetensors", ".json"))),
    Step("06_your_own_inverse_problem",
         tuple(f"super-resolution/jfb{end}" for end in (".safetensors", ".json", "_history.csv")),
         ("nb6_mosaic", "nb6_problems", "nb6_even_lines", "nb6_own_equilibrium"),
         ("problems", "own_equilibrium"),
         reads=("weights/best/jfb.json", "weights/best/jfb.safetensors", "weights/tuning.json",
                "weights/denoiser.safetensors")),
)


# --- parameters ---------------------------------------------------------------------------------


def notebook_parameters(path: Path) -> dict[str, Any]:
    """The names and literal values in a notebook's cell tagged `parameters`."""
    notebook = nbformat.read(path, as_version=4)
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(cells) != 1:
        raise UserError(f"{path.name} has {len(cells)} cells tagged parameters, not one")
    return {node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse(cells[0].source).body if isinstance(node, ast.Assign)}


def load_profile(name: str) -> dict[str, Any]:
    """The parameters in notebooks/profiles/NAME.yaml.

    Raises:
        UserError: for an unknown name, or a file that does not map names to values.
    """
    folder = checkout.ROOT / "notebooks" / "profiles"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if not known:
        raise UserError(f"no profile {name!r}: {folder} has none")
    if name not in known:
        raise UserError(f"unknown profile {name!r}: choose one of {', '.join(known)}")
    path = folder / f"{name}.yaml"
    values = parse_yaml(path.read_bytes(), str(path))
    if not isinstance(values, dict | None):
        raise UserError(f"{path} is no profile: it maps names of parameters to values")
    return {**(values or {}), "profile": name}


def step_parameters(steps: tuple[Step, ...], given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each step its notebook's parameters, the given ones in the place of its own.

    Raises:
        UserError: for whatever of the given can be seen to be wrong before anything runs.
    """
    check_parameters(given, known_parameters())
    get_protocol(given.get("protocol", "paper"))
    make_network(given.get("network", "DnCNN"), 2, 1)
    pick_bf16(given.get("bf16", "auto"), pick_device(given.get("device", "auto")))
    given = given | {k: checkout.find_path(given[k]) for k in ("data", "weights") if k in given}
    return {step.name: {k: given.get(k, v) for k, v in notebook_parameters(step.notebook).items()}
            for step in steps}


def known_parameters() -> dict[str, Any]:
    """All parameters of the suite's notebooks, and a value of each."""
    return {name: value for step in STEPS
            for name, value in notebook_parameters(step.notebook).items()}


def check_parameters(given: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise UserError for a parameter that is not known, of another type, or out of range."""
    for name, value in given.items():
        if name in GONE:
            raise UserError(f"parameter {name!r} is gone: {GONE[name]}")
        if name not in known:
            raise UserError(f"unknown parameter {name!r}: the notebooks have "
                            f"{', '.join(sorted(known))}")
        if not _is_like(value, known[name]):
            raise UserError(f"parameter {name} takes a value like {known[name]!r}, not "
                            f"{reprlib.repr(value)}")
        for number in value.values() if isinstance(value, dict) else [value]:
            if type(number) in (int, float) and number < LEAST.get(name, SMALLEST):
                raise UserError(f"parameter {name} must be "
                                f"{f'at least {LEAST[name]}' if name in LEAST else 'positive'}, "
                                f"not {number}")


def _is_like(value: Any, example: Any) -> bool:
    """True if the value has the example's type, and can be stored; an integer will do for a float.

    A list has any number of entries, a dictionary any names, each with a number.
    """
    if isinstance(example, dict):
        return isinstance(value, dict) and all(
            _is_like(k, "") and _is_like(v, 1.0) for k, v in value.items())
    if isinstance(example, list):
        return isinstance(value, list) and all(_is_like(v, example[0]) for v in value)
    if type(value) is float:
        return type(example) is float and math.isfinite(value)
    if type(value) is int:
        return type(example) in (int, float)
    return type(value) is type(example) and (type(value) is not str or value.isprintable())


# --- what a step depends on ---------------------------------------------------------------------


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_hashes(step: Step, parameters: dict[str, Any], runs: Path) -> dict[str, str]:
    """Hashes of all that decides a step's result: code, data, and what earlier steps made."""
    notebook = nbformat.read(step.notebook, as_version=4)
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    files = imported_files(code, checkout.ROOT / "jfbnb")
    stored = json.dumps(checkout.without_places(parameters), sort_keys=True)
    hashes = {
        "notebook": hashlib.sha256(code.encode()).hexdigest(),
        "package": hashlib.sha256(b"".join(
            path.read_bytes() for path in files)).hexdigest(),
        "parameters": hashlib.sha256(stored.encode()).hexdigest(),
    }
    if plugins() and any(file.stem == "methods" for file in files):
        hashes["methods of others"] = digest(*plugins())
    if parameters.get("data", "bundled") != "bundled":
        hashes["data"] = fingerprint(parameters["data"])
    hashes |= {name: file_hash(checkout.ROOT / "jfbnb" / name) for name in step.reads}
    hashes |= weights_taken(step, parameters)
    for earlier in STEPS[:STEPS.index(step)]:
        for artefact in earlier.artefacts:
            path = runs / artefact
            if not path.exists():
                raise UserError(f"step {step.name[:2]} needs {artefact} of step "
                                f"{earlier.name[:2]}: run that one first")
            hashes[artefact] = file_hash(path)
    return hashes


def weights_taken(step: Step, parameters: dict[str, Any]) -> dict[str, str]:
    """Hashes of the stored networks that the step takes in the place of training.

    Raises:
        UserError: if one is missing.
    """
    if not parameters.get("weights"):
        return {}
    folder = Path(parameters["weights"])
    hashes = {}
    for name in (a for a in step.made(parameters) if a.endswith(".safetensors")):
        if not (folder / name).is_file():
            raise UserError(f"no {name} in the weights folder {folder}: leave the "
                            "parameter `weights` empty to train")
        hashes[f"weights/{name}"] = file_hash(folder / name)
    return hashes


def read_marker(marker: Path) -> dict[str, Any]:
    """A step's marker, or an empty one where it is missing or damaged."""
    found = _read_dict(marker)
    return found if found.keys() == {"inputs", "outputs", "parameters", "seconds"} else {}


def _read_dict(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_done(marker: dict[str, Any], inputs: dict[str, str], outputs: list[Path],
            base: Path) -> bool:
    """True if the marker's inputs are today's and every output is there, unchanged."""
    return marker.get("inputs") == inputs and all(
        (base / path).is_file() and file_hash(base / path) == marker["outputs"].get(str(path))
        for path in outputs
    )


# --- running ------------------------------------------------------------------------------------


def reproduce(profile: str, overrides: dict[str, Any], only: str | None = None,
              force: bool = False, log: Callable[[str], None] = print,
              folder: str | None = None) -> list[Path]:
    """Run the profile's notebooks; return the figures and tables written, then provenance.json.

    Args:
        overrides: parameter values that replace the profile's.
        only: a notebook's number, e.g. "04": run that step alone.
        force: run steps even if they are done, and train from scratch.
        folder: of runs/ and figures/ to write to, if not the profile's own.

    Raises:
        UserError: for bad input, or where a notebook stops with an error.
    """
    steps = tuple(s for s in STEPS if only is None or s.name.startswith(only))
    if not steps:
        raise UserError(f"no notebook {only!r}: choose 01 to 0{len(STEPS)}")
    if "profile" in overrides:
        raise UserError("the parameter profile names the output folder: use --folder")
    folder = folder or profile
    if Path(folder).is_absolute() or folder == "." or ".." in Path(folder).parts \
            or not folder.isprintable():
        raise UserError(f"--folder {printable(folder)}: give the name of a folder inside runs/ "
                        "and figures/")
    given = load_profile(profile) | {"profile": folder} | overrides
    parameters = step_parameters(steps, given)
    setup, scene = get_protocol(given.get("protocol", "paper")), torch.zeros(1, 3, 16, 16)
    if setup.operator(16)(scene).shape != scene.shape:
        raise UserError("the notebooks compare a picture with its scene, and with the protocol "
                        f"{setup.name} they are of different sizes: choose paper or code")
    data = parameters[steps[0].name].get("data", "bundled")
    if data != "bundled":
        fingerprint(data)  # fails here, before hours of work, if there is no such data
    for step in steps:
        weights_taken(step, parameters[step.name])  # so does this
    runs, figures = checkout.run_dirs(folder)
    with alone(runs):
        for place in (runs, figures):
            remove_unfinished(place)
        if force:
            for place in {(runs / name).parent for step in steps
                          for name in step.made(parameters[step.name])}:
                shutil.rmtree(place / "checkpoints", ignore_errors=True)
        _run_steps(steps, parameters, folder, force, log)
        write_provenance(folder, given.get("device", "auto"))
    written = [checkout.work() / path for step in steps
               for path in step.outputs(folder, parameters[step.name])]
    return [path for path in written if path.parent == figures] + [figures / "provenance.json"]


@contextlib.contextmanager
def alone(runs: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back from a process that dies."""
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another run is writing {runs}: wait until it has ended, or choose "
                        "another --folder") from None


def _run_steps(steps: tuple[Step, ...], parameters: dict[str, dict[str, Any]], folder: str,
               force: bool, log: Callable[[str], None]) -> None:
    base, (runs, figures) = checkout.work(), checkout.run_dirs(folder)
    check_kernel()
    earlier = _read_dict(figures / "provenance.json").get("steps", {})
    clock = time.perf_counter()
    for number, step in enumerate(steps, 1):
        title = f"[{number}/{len(steps)}] {step.name}"
        marker_file = runs / "markers" / f"{step.name}.json"
        outputs = step.outputs(folder, parameters[step.name])
        inputs = input_hashes(step, parameters[step.name], runs)
        if not force and is_done(read_marker(marker_file), inputs, outputs, base):
            log(f"{title}: unchanged, skipped")
            continue
        log(f"{title}: expected " + (f"{earlier[step.name]['seconds']:.0f} s"
                                     if step.name in earlier else "time unknown"))
        marker_file.unlink(missing_ok=True)
        seconds = run_notebook(step, parameters[step.name], runs)
        if missing := [str(path) for path in outputs if not (base / path).is_file()]:
            raise UserError(f"{step.name} finished without writing {', '.join(missing)}")
        marker = {"inputs": inputs, "outputs": {str(p): file_hash(base / p) for p in outputs},
                  "parameters": parameters[step.name], "seconds": seconds}
        atomic_write(marker_file, json.dumps(marker, indent=2))
        log(f"{title}: took {seconds:.0f} s, elapsed {time.perf_counter() - clock:.0f} s")
        for line in (runs / f"{step.name}.log").read_text(encoding="utf-8").splitlines():
            if line.startswith(CHECK_FAILED):
                log(f"    {line}")


def check_kernel() -> Path:
    """The package that notebooks import. Raises UserError if it is not the checkout's own."""
    own = checkout.ROOT / "jfbnb"
    try:
        kernel = KernelSpecManager().get_kernel_spec("python3")
    except NoSuchKernel:
        raise UserError("no Jupyter kernel python3: `make reproduce` installs ipykernel, which "
                        "has one") from None
    # Jupyter takes its own interpreter where the kernel names no certain one.
    bare = re.fullmatch(r"python3?(\.\d+)?", kernel.argv[0])
    python = sys.executable if bare else kernel.argv[0]
    here = own.parent / "notebooks"
    try:
        found = subprocess.run([python, "-c", "import jfbnb; print(jfbnb.__path__[0])"],
                               cwd=here if here.is_dir() else None, text=True, check=False,
                               env={**os.environ, **kernel.env}, capture_output=True).stdout.strip()
    except OSError:  # no such interpreter
        found = ""
    if os.path.realpath(found or os.devnull) != os.path.realpath(own):
        raise UserError(f"the Jupyter kernel python3 ({python}) would run the notebooks with "
                        f"{f'the package in {found}' if found else 'no package jfbnb'}, not with "
                        f"that in {own}: install the latter for it")
    return own


def run_notebook(step: Step, parameters: dict[str, Any], runs: Path) -> float:
    """Execute one notebook into `runs`; return the seconds. Its prints also go to a .log there."""
    import papermill  # slow to import, and needed here only
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    runs.mkdir(parents=True, exist_ok=True)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else the kernel warns of frozen modules
    executed = runs / f"{step.name}.ipynb"
    clock = time.perf_counter()
    try:
        with open(runs / f"{step.name}.log", "w", encoding="utf-8") as stream:
            papermill.execute_notebook(
                str(step.notebook), str(executed), parameters=parameters,
                cwd=str(step.notebook.parent), kernel_name="python3", progress_bar=False,
                stdout_file=stream, stderr_file=stream,
                # Kernels warn, on our terminal, of connections that are not encrypted.
                config=Config(KernelManager={"transport_encryption": "auto"}),
            )
    except PapermillExecutionError as error:
        raise UserError(f"{step.name} stopped: {error.ename}: {error.evalue} (see "
                        f"{executed.relative_to(checkout.work())})") from error
    except RuntimeError as error:  # nbclient's DeadKernelError is one
        log = (runs / f"{step.name}.log").relative_to(checkout.work())
        raise UserError(f"{step.name} stopped: {error}. It was killed, most often for lack of "
                        "memory (then lower batch_size or n_train), or crashed: its last words "
                        f"are in {log}") from error
    return time.perf_counter() - clock


def write_provenance(folder: str, device: str) -> None:
    """figures/FOLDER/provenance.json: how its figures and tables came about."""
    runs, figures = checkout.run_dirs(folder)
    steps = {}
    for step in STEPS:
        if marker := read_marker(runs / "markers" / f"{step.name}.json"):
            steps[step.name] = marker | {
                "seconds": round(marker["seconds"], 1),
                "parameters": checkout.without_places(marker["parameters"])}
    record = {
        "profile": folder,
        "release": f"v{version('jfbnb')}",
        "device": describe_device(pick_device(device)),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "steps": steps,
    }
    atomic_write(figures / "provenance.json", json.dumps(record, indent=2) + "\n")
