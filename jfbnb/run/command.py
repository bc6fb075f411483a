"""The `jfbnb` command: one function for each of its commands, and what they share."""

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
    """Run the command; returns its exit status.

    Bad input ends in one line on stderr and status 2; `deblur` ends in 3 where a picture
    contradicts its model, and a safer method's is written.
    """
    args = make_parser().parse_args(argv)
    with contextlib.suppress(AttributeError):  # a file's name may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("jfbnb: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not (line := _one_line(error)):
            raise
        print(f"jfbnb: error: {line}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    """What to tell the user of an error that is not ours; nothing of one that is."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # no permission, disk full: the message names the file
        return (f"{error.strerror or error}: {error.filename or 'a file'}; nothing that was "
                "complete has been touched")
    if isinstance(error, MemoryError | torch.OutOfMemoryError) \
            or "DefaultCPUAllocator" in str(error):  # what PyTorch says of a CPU's
        return "memory ran out: take smaller images, or fewer with --limit"
    if isinstance(error, ModuleNotFoundError) and (error.name or "jfbnb").split(".")[0] != "jfbnb":
        return (f"{error.name} is not installed, which this command needs: pip install "
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
                            help="quick, cpu, paper, best or best-gpu")
    parameters.add_argument("-p", dest="parameters", action="append", default=[],
                            metavar="NAME=VALUE", help="set a notebook parameter; may be repeated")
    weights.add_argument("--weights", type=lambda text: Path(checkout.find_path(text)),
                         metavar="DIR", help="a folder with tuning.json and the methods' weights, "
                         "e.g. runs/quick; by default the released ones")
    device.add_argument("--device", default="auto", help="auto, cpu or cuda")
    _add_pictures(pictures.add_argument)

    option = add("reproduce", run_reproduce, "run the notebooks; regenerate figures and tables",
                 parameters, celeba)
    option("--weights", type=checkout.find_path, metavar="DIR",
           help="take the trained networks in this folder, e.g. data/weights/cpu, and do not train")
    option("--frozen", action="store_true",
           help="redo figures and tables from the networks in runs/PROFILE; do not train")
    option("--folder", help="of runs/ and figures/ to write to, if not PROFILE")
    option("--only", metavar="NN", default="", help="one notebook alone, e.g. 04")
    option("--force", action="store_true", help="redo what is already done, trainings too")

    option = add("lab", run_lab, "open the notebooks in JupyterLab")
    option("options", nargs="*", help="of jupyter lab, after --")

    option = add("train", run_train, "train one network",
                 parameters, celeba)
    networks = ["denoiser", *(m.name for m in methods.METHODS.values() if m.trainable)]
    option("network", choices=networks, metavar="NETWORK",
           help=f"{networks[0]}, by notebook 3, or a method's: {', '.join(networks[1:])}")
    option("--from", dest="start", type=Path, metavar="DIR",
           help="with the denoiser that a method starts from; runs/PROFILE by default")
    option("--conditions", action="store_true",
           help="train a method over drawn blurs and noise levels")
    option("--out", type=Path, metavar="DIR", help="runs/PROFILE/trained by default")

    names = ", ".join(methods.METHODS)
    option = add("evaluate", run_evaluate, "measure methods on a folder of sharp images", weights,
                 device)
    option("--data", type=checkout.find_path, required=True, help="folder or zip of images")
    option("--protocol", default="paper", help=", ".join(protocols.PROTOCOLS))
    option("--method", action="append", metavar="NAME",
           help=f"{names}; may be repeated; all by default")
    option("--limit", type=int, help="use the first N images")
    option("--json", type=Path, metavar="FILE", help="write the results there")

    option = add("deblur", run_deblur, "restore blurred images of any size", pictures, weights,
                 device)
    option("--noise-std", type=lambda text: text if text == "auto" else float(text),
           default="auto",
           help="on pixel values between 0 and 1; by default auto, which estimates it")
    option("--method", metavar="NAME", help=f"{names}; by default jfb, and total-variation where "
           "the picture contradicts its kernel or noise: the exit status is 3 then")
    option("--gamma", default="auto", help="how the file stores light: linear, srgb or a number; "
           "by default auto: srgb for a camera's picture, by its EXIF; else linear, and srgb where "
           "that explains the picture better")

    option = add("blur", run_blur, "blur images and add noise, to try deblur on", pictures)
    option("--noise-std", type=float, default=0.01,
           help="on pixel values between 0 and 1; %(default)s by default")
    option("--seed", type=int, default=0, help="of the noise")

    option = add("sweep", run_sweep, "reproduce with every combination of some parameters", celeba)
    option("file", type=Path, metavar="SWEEP.yaml", help="profile, and lists of values")
    option("--scheduler", metavar="ADDRESS", help="of a dask cluster; else this machine")

    option = add("doctor", run_doctor, "what is installed and found, and what would not work",
                 weights)
    option("--data", type=checkout.find_path, default="data/celeba",
           help="folder or zip of images")
    return parser


def _add_pictures(option: Callable) -> None:
    paper = protocols.get_protocol("paper").make.keywords
    option("images", nargs="+", type=Path, metavar="IMAGE")
    option("--out", required=True, type=Path, metavar="DIR")
    option("--kernel", default=f"gaussian:{paper['kernel_std']},{paper['kernel_size']}",
           help=f"{kernel_option.FORMS}; or a file: a picture, .npy or .txt; by default the "
                "paper's, %(default)s")
    option("--border", choices=["unknown", "black"], default="unknown",
           help="what lies beyond the picture: by default a scene that goes on")
    option("--range", metavar="LOW,HIGH",
           help="the numbers in the file for black and white, if not the usual ones")


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
            raise UserError("--frozen takes the networks of the run itself: leave --weights out")
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
    # The file is begun first, so that one that cannot be written is no surprise in the end.
    with atomic_path(args.json) if args.json else contextlib.nullcontext() as file:
        document = _evaluate(args, pick_device(args.device))
        if file:
            file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _evaluate(args: argparse.Namespace, device: torch.device) -> dict:
    """Show the table; return what --json writes."""
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
    kernel, gamma = _kernel(args.kernel), light.parse(args.gamma)
    noise_std = None if args.noise_std == "auto" else args.noise_std
    if noise_std is not None:
        restore.check_noise(noise_std)
    device = pick_device(args.device)
    names = [name] if args.method else [name, safer]
    method, *other = restorers.make_methods(names, args.weights, device).values()
    doubtful = []

    def deblur(picture: files.Picture, path: Path, i: int) -> tuple[files.Picture, str, str]:
        if gamma is None and picture.gamma:
            _warn(f"note: {path}: a camera's picture, restored in light: --gamma linear if not so")
        with tqdm(desc=path.name, unit="tile", disable=None, leave=False) as bar:
            def progress(done: int, tiles: int) -> None:
                bar.total, bar.n = tiles, done
                bar.refresh()

            found = restore.restore(method, picture.pixels.to(device), kernel, noise_std,
                                    args.border, progress, *(other or [None]),
                                    gamma or picture.gamma)
        for warning in found.warnings:
            _warn(f"warning: {path}: {warning.line(_as_option)}")
        said = f"noise {found.noise_std:.2g}"
        if found.iterations is not None:
            said += (f", {found.iterations} iterations, relative residual "
                     f"{found.residual:.1e}")
        if found.doubtful and not args.method:
            doubtful.append(path)
            _warn(f"warning: {path}: so {safer} is written instead; --method {name} insists")
            return picture.with_pixels(found.image), said, safer
        return picture.with_pixels(found.image), said, name

    _each_picture(args, (name, safer), deblur)
    return 3 if doubtful else 0


def _kernel(text: str) -> torch.Tensor:
    """The kernel that an option gives, after a line on what its file was taken for."""
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
    """Do something with every page of every picture, and write it beside the others' as one file.

    `work` returns a page, what to say of it and one of the suffixes; a file's name has those of
    all its pages. A picture with which it cannot be done is named; the others are done all the
    same.
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
        raise UserError(f"{len(failed)} of {len(args.images)} pictures could not be done: see the "
                        "lines above; the others are written")


def _check_targets(paths: list[Path], out: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UserError where two would become one file, or one is among those still to be read."""
    stems = [path.stem for path in paths]
    read = {path.resolve() for path in paths}
    for path in paths:
        if stems.count(path.stem) > 1:
            raise UserError(f"several pictures are called {path.stem}, and would become one file: "
                            f"{path} needs another --out")
        for suffix, kind in itertools.product(suffixes, (".png", ".tif")):
            if (target := out / f"{path.stem}-{suffix}{kind}").resolve() in read:
                raise UserError(f"{target} is to be read and would be written: choose another "
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
    # Else what is stored with them stays dead until it is run.
    for words in (["trust", *notebooks],
                  ["lab", "--notebook-dir", checkout.ROOT,
                   f"--LabApp.default_url=/lab/tree/{first}", *args.options]):
        done = subprocess.run([sys.executable, "-m", "jupyter", *map(str, words)], check=False)
        if done.returncode:
            raise UserError(f"jupyter {words[0]} ended with status {done.returncode}: see above")


def run_doctor(args: argparse.Namespace) -> None:
    troubles = 0
    for well, line in examine(args.data, args.weights):
        _say(f"{'ok     ' if well else 'TROUBLE'} {line}")
        troubles += not well
    if troubles:
        raise UserError(f"{troubles} of these findings are trouble: see the lines above")


def _say(line: str, stream: TextIO | None = None) -> None:
    """Print a line. Where nobody reads on, as with `| head`, the work goes on without."""
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
