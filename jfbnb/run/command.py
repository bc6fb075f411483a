"""The command line `jfbnb`: one function for each of its commands, and their common parts."""

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from jfbnb import data
from jfbnb.common import UserError, atomic_path, keep_freed_memory, parse_yaml, pick_device
from jfbnb.core import operators, protocols
from jfbnb.photo import files, kernel_option, light, restore
from jfbnb.run import checkout
from jfbnb.run.doctor import examine
from jfbnb.training import evaluation, methods, restorers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status.

    Bad input gives one line on stderr and status 2. `deblur` returns 3 if a picture contradicts its
    model, so that a safer method's image was written.
    """
    args = make_parser().parse_args(argv)
    with contextlib.suppress(AttributeError):  # a file's name may not be Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("jfbnb: interrupted; run the same command to continue", file=sys.stderr)
        return 130
    except Exception as error:
        if not (line := _one_line(error)):
            raise
        print(f"jfbnb: error: {line}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """The line to show for an error of the user or the system; "" for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # no permission, disk full: the message names the file
        return (f"{error.strerror or error}: {error.filename or 'a file'}; complete files are "
                "unchanged")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) \
            or "DefaultCPUAllocator" in str(error):  # PyTorch's message on a CPU
        return "memory ran out: use smaller images, or fewer with --limit"
    if isinstance(error, ModuleNotFoundError) and (error.name or "jfbnb").split(".")[0] != "jfbnb":
        return (f"{error.name} is not installed: for this command run pip install "
                "'jfbnb[notebooks]'")
    return ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jfbnb", description="Restore pictures by implicit networks; run the notebooks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable, note: str, *shared: argparse.ArgumentParser) -> Callable:
        sub = commands.add_parser(name, help=note, parents=shared)
        sub.set_defaults(run=run)
        return sub.add_argument

    celeba, parameters, weights, device, pictures = (
        argparse.ArgumentParser(add_help=False) for _ in range(5))
    celeba.add_argument("--data", type=checkout.find_path,
                        help="folder or zip of CelebA JPEGs")
    parameters.add_argument("--profile", default="quick",
                            help="quick, cpu, paper, best or best-gpu; by default quick")
    parameters.add_argument("-p", dest="parameters", action="append", default=[],
                            metavar="NAME=VALUE", help="set a notebook parameter; may be repeated")
    weights.add_argument("--weights", type=lambda text: Path(checkout.find_path(text)),
                         metavar="DIR", help="folder with tuning.json and the methods' weights, "
                         "e.g. runs/quick; by default the released ones")
    device.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_pictures(pictures.add_argument)

    option = add("reproduce", run_reproduce, "run the notebooks; regenerate figures and tables",
                 parameters, celeba)
    option("--weights", type=checkout.find_path, metavar="DIR",
           help="use the trained networks in this folder, e.g. data/weights/cpu; do not train")
    option("--frozen", action="store_true",
           help="make figures and tables from the networks in runs/PROFILE; do not train")
    option("--folder", help="name of the folder in runs/ and figures/; by default PROFILE")
    option("--only", metavar="NN", default="", help="run only this notebook, e.g. 04")
    option("--force", action="store_true", help="run finished notebooks and trainings again, too")

    option = add("lab", run_lab, "open the notebooks in JupyterLab")
    option("options", nargs="*", help="options for jupyter lab, after --")

    option = add("train", run_train, "train one network",
                 parameters, celeba)
    networks = ["denoiser", *(m.name for m in methods.METHODS.values() if m.trainable)]
    option("network", choices=networks, metavar="NETWORK",
           help=f"{networks[0]}, or a method: {', '.join(networks[1:])}")
    option("--from", dest="start", type=Path, metavar="DIR",
           help="folder with the denoiser that a method starts from; by default runs/PROFILE")
    option("--conditions", action="store_true",
           help="train a method over random blurs and noise levels")
    option("--out", type=Path, metavar="DIR", help="by default runs/PROFILE/trained")

    names = ", ".join(methods.METHODS)
    option = add("evaluate", run_evaluate, "measure methods on a folder of sharp images", weights,
                 device)
    option("--data", type=checkout.find_path, required=True, help="folder or zip of images")
    option("--protocol", default="paper", help=", ".join(protocols.PROTOCOLS))
    option("--method", action="append", metavar="NAME",
           help=f"{names}; may be repeated; by default all")
    option("--limit", type=int, metavar="N", help="use the first N images")
    option("--json", type=Path, metavar="FILE", help="write the results to this file")

    option = add("deblur", run_deblur, "restore blurred images of any size", pictures, weights,
                 device)
    option("--noise-std", type=lambda text: text if text == "auto" else float(text),
           default="auto",
           help="for pixel values from 0 to 1; by default auto, which estimates it")
    option("--method", metavar="NAME", help=f"{names}; by default jfb, and total-variation if "
           "jfb's image is out of range: the exit status is then 3")
    option("--gamma", default="auto", help="how the file stores light: linear, srgb or a number; "
           "by default auto: srgb for a camera's picture, by its EXIF; else linear, and srgb if "
           "that explains the picture better")

    option = add("blur", run_blur, "blur images and add noise, to try deblur on", pictures)
    option("--noise-std", type=float, default=0.01,
           help="for pixel values from 0 to 1; by default %(default)s")
    option("--seed", type=int, default=0, help="seed of the noise")

    option = add("sweep", run_sweep, "reproduce with every combination of some parameters", celeba)
    option("file", type=Path, metavar="SWEEP.yaml", help="a profile, and lists of values")
    option("--scheduler", metavar="ADDRESS", help="of a dask cluster; by default this machine")

    option = add("doctor", run_doctor, "list what is installed and what would not work", weights)
    option("--data", type=checkout.find_path, default="data/celeba",
           help="folder or zip of images")
    return parser


def _add_pictures(option: Callable) -> None:
    paper = protocols.get_protocol("paper").make.keywords
    option("images", nargs="+", type=Path, metavar="IMAGE", help="the files to read")
    option("--out", required=True, type=Path, metavar="DIR", help="folder for the results")
    option("--kernel", default=f"gaussian:{paper['kernel_std']},{paper['kernel_size']}",
           help=f"{kernel_option.FORMS}; or a file: a picture, .npy, .npz, .mat, .txt, .csv or "
                ".tsv; deblur also takes auto, which estimates a Gaussian, disk, motion or "
                "shake; by default the paper's, %(default)s")
    option("--border", choices=operators.BORDERS, default="unknown",
           help="beyond the picture: by default unknown, for a scene that continues")
    option("--range", metavar="LOW,HIGH",
           help="the file's numbers for black and white; by default by its type and values")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(f"--range {text}: give two numbers, e.g. 0,4095") from error
    return low, high


def run_reproduce(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    from jfbnb.run.reproduce import reproduce

    overrides = _overrides(args)
    if args.frozen:
        if args.weights:
            raise UserError("--frozen uses the run's own networks: leave out --weights")
        args.weights = str(checkout.run_dirs(args.folder or args.profile)[0])
    if args.weights:
        overrides["weights"] = args.weights
    figures = reproduce(args.profile, overrides, args.only, args.force, _say, args.folder)
    table = figures / "table2_comparison.md"
    if not args.only and table.is_file():
        _say(f"\nTable 2\n\n{table.read_text('utf-8')}")
    _say(f"Figures and tables are in {figures.relative_to(checkout.work())}")


def _overrides(args: argparse.Namespace) -> dict[str, object]:
    """The notebook parameters that -p and --data set."""
    overrides = {}
    for text in args.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"-p {text}: write it as NAME=VALUE")
        overrides[name] = parse_yaml(value or "''", f"-p {name}: its value")
    return overrides | ({"data": args.data} if args.data else {})


def run_train(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    from jfbnb.run.train import network_parameters, train_network

    runs, _ = checkout.run_dirs(args.profile)
    command = " ".join([f"jfbnb train {args.network} --profile {args.profile}",
                        *(f"-p {text}" for text in args.parameters),
                        *(["--conditions"] if args.conditions else [])])
    train_network(args.network, network_parameters(args.profile, _overrides(args)),
                  args.start or runs, args.out or runs / "trained", command, args.conditions,
                  log=_say)


def run_evaluate(args: argparse.Namespace) -> None:
    _check_limit(args.limit)
    # Open the file first: if it cannot be written, fail before the work.
    with atomic_path(args.json) if args.json else contextlib.nullcontext() as file:
        document = _evaluate(args, pick_device(args.device))
        if file:
            file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _evaluate(args: argparse.Namespace, device: torch.device) -> dict:
    """Print the table; return the document for --json."""
    protocol = protocols.get_protocol(args.protocol)
    names = args.method or restorers.expected_methods(args.weights)
    chosen = restorers.make_methods(names, args.weights, device)
    images = data.load_images(args.data, protocol.image_size, args.limit, _warn)
    A = protocol.operator().to(device)
    x = images.as_float().to(device)
    d = protocols.measure(A, x, protocol.noise_std, 0, images.indices)
    table = evaluation.evaluate(chosen, A, x, d, protocol.noise_std, images.names)
    summary = evaluation.summarise(table)
    _say(summary.to_string(index=False, float_format=lambda v: f"{v:.4g}", na_rep="-"))
    for line in evaluation.complaints(table):
        _warn(f"warning: {line}")
    records = summary.set_index("method").to_dict(orient="index")
    results = {name: {k: None if isinstance(v, float) and math.isnan(v) else v
                      for k, v in row.items()} for name, row in records.items()}
    return {"protocol": protocol.name, "images": len(images), "skipped": images.skipped,
            "methods": results}


@torch.no_grad()
def run_deblur(args: argparse.Namespace) -> int:
    name, safer = args.method or restore.METHOD, restore.SAFER
    keep_freed_memory()
    kernel = None if args.kernel == "auto" else _kernel(args.kernel)
    gamma = light.parse(args.gamma)
    noise_std = None if args.noise_std == "auto" else args.noise_std
    if noise_std is not None:
        restore.check_noise(noise_std)
    device = pick_device(args.device)
    names = [name] if args.method else [name, safer]
    method, *other = restorers.make_methods(names, args.weights, device).values()
    doubtful = []

    def drawn(kernel: str | torch.Tensor, path: Path, i: int) -> str:
        """A shake becomes a picture, one for each page."""
        if isinstance(kernel, str):
            return kernel
        page = 1 + i // len(args.images)
        target = args.out / f"{path.stem}-kernel{f'-{page}' if page > 1 else ''}.png"
        kernel_option.write(target, kernel)
        return f"a shake of {kernel.shape[1]} x {kernel.shape[0]} pixels, drawn in {target}"

    def deblur(picture: files.Picture, path: Path, i: int) -> tuple[files.Picture, str, str]:
        if gamma is None and picture.gamma:
            _warn(f"note: {path}: a camera's picture, restored in light; to prevent that, pass "
                  "--gamma linear")
        with tqdm(desc=path.name, unit="tile", disable=None, leave=False) as bar:
            def progress(done: int, tiles: int) -> None:
                bar.total, bar.n = tiles, done
                bar.refresh()

            found = restore.restore(method, picture.pixels.to(device), kernel, noise_std,
                                    args.border, progress, *(other or [None]),
                                    gamma or picture.gamma)
        if found.kernel is not None:
            _warn(f"note: {path}: kernel estimated: {drawn(found.kernel, path, i)}")
        for warning in found.warnings:
            _warn(f"warning: {path}: {warning.line(_as_option)}")
        said = f"noise {found.noise_std:.2g}"
        if found.iterations is not None:
            said += (f", {found.iterations} iterations, relative residual "
                     f"{found.residual:.1e}")
        if found.doubtful and not args.method:
            doubtful.append(path)
            _warn(f"warning: {path}: so the image of {safer} is written; to insist, pass --method "
                  f"{name}")
            return picture.with_pixels(found.image), said, safer
        return picture.with_pixels(found.image), said, name

    _each_picture(args, (name, safer, "kernel"), deblur)
    return 3 if doubtful else 0


def _kernel(text: str) -> torch.Tensor:
    """Parse --kernel, and print how its file was interpreted."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        kernel = kernel_option.parse(text)
    for note in notes:
        _warn(f"note: {note.message}")
    return kernel


def _as_option(parameter: str, value: object) -> str:
    return f"--{parameter.replace('_', '-')} {value}"


@torch.no_grad()
def run_blur(args: argparse.Namespace) -> None:
    kernel = _kernel(args.kernel)
    if args.noise_std:
        restore.check_noise(args.noise_std)

    def blur(picture: files.Picture, path: Path, i: int) -> tuple[files.Picture, str, str]:
        x = picture.pixels
        A = operators.Convolution(tuple(x.shape[1:]), kernel, args.border)
        d = protocols.measure(A, x[None], args.noise_std, args.seed, [i])[0]
        return picture.with_pixels(d), f"{d.shape[2]} x {d.shape[1]} pixels", "blurred"

    _each_picture(args, ("blurred",), blur)


Work = Callable[[files.Picture, Path, int], tuple[files.Picture, str, str]]


def _each_picture(args: argparse.Namespace, suffixes: tuple[str, ...], work: Work) -> None:
    """Apply `work` to every page of every picture, and write one file for each picture.

    `work` returns a page, a text to print, and one of the suffixes; a file's name gets the suffixes
    of its pages. A picture that fails is named, and the others are still processed.
    """
    failed, value_range = [], _range(args.range) if args.range else None
    _check_targets(args.images, args.out, suffixes)
    for i, path in enumerate(args.images):
        try:
            pages = files.read_pictures(path, value_range)
            for note in dict.fromkeys(page.note for page in pages if page.note):
                _warn(f"note: {path}: {note}")
            done = [work(page, path, i + k * len(args.images)) for k, page in enumerate(pages)]
            pictures, lines, used = zip(*done, strict=True)
            target = args.out / "-".join([path.stem, *dict.fromkeys(used)])
            target = target.with_name(target.name + pages[0].suffix)
            files.write_pictures(target, list(pictures))
        except (UserError, OSError) as error:
            if len(args.images) == 1:
                raise
            failed.append(path)
            _warn(f"error: {path}: {error}")
            continue
        for page, said in enumerate(lines, 1):
            _say(f"{target}" + f", page {page} of {len(done)}" * (len(done) > 1) + f" ({said})")
    if failed:
        raise UserError(f"{len(failed)} of {len(args.images)} pictures failed: see the lines "
                        "above; the others are written")


def _check_targets(paths: list[Path], out: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UserError if two outputs would be the same file, or an output is also an input."""
    stems = [path.stem for path in paths]
    read = {path.resolve() for path in paths}
    for path in paths:
        if stems.count(path.stem) > 1:
            raise UserError(f"several pictures are named {path.stem}, and would become one file: "
                            f"run {path} with another --out")
        for suffix, kind in itertools.product(suffixes, (".png", ".tif")):
            if (target := out / f"{path.stem}-{suffix}{kind}").resolve() in read:
                raise UserError(f"{target} is an input and would be overwritten: choose another "
                                "--out")


def run_sweep(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    from jfbnb.run.sweep import sweep

    table = sweep(args.file, args.scheduler, args.data, _say)
    _say(f"\n{table.read_text('utf-8')}")


def run_lab(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    notebooks = sorted(checkout.ROOT.glob("notebooks/**/[0-9]*.ipynb"))
    first = notebooks[0].relative_to(checkout.ROOT).as_posix()
    # Untrusted notebooks do not show their stored widgets and scripts.
    for words in (["trust", *notebooks],
                  ["lab", "--notebook-dir", checkout.ROOT,
                   f"--LabApp.default_url=/lab/tree/{first}", *args.options]):
        done = subprocess.run([sys.executable, "-m", "jupyter", *map(str, words)], check=False)
        if done.returncode:
            raise UserError(f"jupyter {words[0]} failed with status {done.returncode}: see above")


def run_doctor(args: argparse.Namespace) -> None:
    troubles = 0
    for well, line in examine(args.data, args.weights):
        _say(f"{'ok     ' if well else 'TROUBLE'} {line}")
        troubles += not well
    if troubles:
        raise UserError(f"{troubles} of these findings are TROUBLE: see the lines above")


def _say(line: str, stream: TextIO | None = None) -> None:
    """Print a line. If the reader has gone, as with `| head`, continue without printing."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _warn(line: str) -> None:
    _say(line, sys.stderr)


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: give a positive number of images")
