"""The `jfbnb` command: one function for each of its commands, and what they share."""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import torch
from tqdm import tqdm

from jfbnb import data
from jfbnb.common import UserError, atomic_path, keep_freed_memory, parse_yaml, pick_device
from jfbnb.core import operators, protocols
from jfbnb.photo import files, kernel_option, restore
from jfbnb.run import checkout
from jfbnb.run.doctor import examine
from jfbnb.training import evaluation, methods, restorers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; bad input ends in one line on stderr and exit status 2."""
    args = make_parser().parse_args(_with_negative_numbers(sys.argv[1:] if argv is None else argv))
    with contextlib.suppress(AttributeError):  # a file's name may be no Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args.run(args)
    except UserError as error:
        print(f"jfbnb: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # no permission, disk full: the message names the file
        print(f"jfbnb: error: {error.strerror or error}: {error.filename or 'a file'}; "
              "nothing that was complete has been touched", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError)
                or "DefaultCPUAllocator" in str(error)):  # what PyTorch says of a CPU's
            raise
        print("jfbnb: error: memory ran out: take smaller images, or fewer with --limit",
              file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("", "jfbnb"):
            raise
        print(f"jfbnb: error: {error.name} is not installed, which this command needs: "
              "pip install 'jfbnb[notebooks]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jfbnb: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _with_negative_numbers(words: Sequence[str]) -> list[str]:
    """`--noise-std -1e-2` as `--noise-std=-1e-2`: argparse takes -1e-2 for an option."""
    joined: list[str] = []
    for word in words:
        with contextlib.suppress(ValueError):
            if word.startswith("-") and joined and joined[-1].startswith("--"):
                float(word)
                joined[-1] += f"={word}"
                continue
        joined.append(word)
    return joined


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jfbnb", description="Restore pictures by implicit networks; run the notebooks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sub = commands.add_parser("reproduce", help="run the notebooks; regenerate figures and tables")
    _add_parameters(sub)
    sub.add_argument("--weights", type=checkout.find_path, metavar="DIR",
                     help="take the trained networks in this folder, e.g. data/weights/cpu, and do "
                          "not train")
    sub.add_argument("--frozen", action="store_true",
                     help="redo figures and tables from the networks in runs/PROFILE; do not train")
    sub.add_argument("--folder", help="of runs/ and figures/ to write to, if not PROFILE")
    sub.add_argument("--only", metavar="NN", help="one notebook alone, e.g. 04")
    sub.add_argument("--force", action="store_true", help="redo what is already done")
    sub.set_defaults(run=run_reproduce)

    sub = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    sub.add_argument("options", nargs="*", help="of jupyter lab, after --")
    sub.set_defaults(run=run_lab)

    sub = commands.add_parser("train", help="train one network; under torchrun, by many processes")
    networks = ["denoiser", *(m.name for m in methods.METHODS.values() if m.trainable)]
    sub.add_argument("network", choices=networks, metavar="NETWORK",
                     help=f"{networks[0]}, by notebook 3, or a method's: {', '.join(networks[1:])}")
    _add_parameters(sub)
    sub.add_argument("--from", dest="start", type=Path, metavar="DIR",
                     help="with the denoiser that a method starts from; runs/PROFILE by default")
    sub.add_argument("--conditions", action="store_true",
                     help="train a method over drawn blurs and noise levels")
    sub.add_argument("--out", type=Path, metavar="DIR", help="runs/PROFILE/trained by default")
    sub.set_defaults(run=run_train)

    sub = commands.add_parser("evaluate", help="measure methods on a folder of sharp images")
    _add_data(sub, "folder, tar or zip of images", required=True)
    sub.add_argument("--protocol", default="paper", help=", ".join(protocols.PROTOCOLS))
    _add_method(sub, "append", "may be repeated; all by default")
    sub.add_argument("--limit", type=int, help="use the first N images")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    _add_weights(sub)
    sub.set_defaults(run=run_evaluate)

    sub = commands.add_parser("deblur", help="restore blurred images of any size")
    _add_images(sub)
    sub.add_argument("--noise-std", type=lambda text: text if text == "auto" else float(text),
                     default="auto",
                     help="on pixel values between 0 and 1; by default auto, which estimates it")
    _add_method(sub, "store", "jfb by default")
    _add_weights(sub)
    sub.set_defaults(run=run_deblur)

    sub = commands.add_parser("blur", help="blur images and add noise, to try deblur on")
    _add_images(sub)
    sub.add_argument("--noise-std", type=float, default=0.01,
                     help="on pixel values between 0 and 1; %(default)s by default")
    sub.add_argument("--seed", type=int, default=0, help="of the noise")
    sub.set_defaults(run=run_blur)

    sub = commands.add_parser("data", help="get a data set")
    sub.add_argument("name", choices=["celeba"])
    sub.add_argument("--download", action="store_true", help="try to; else say how by hand")
    sub.add_argument("--out", type=Path, default=Path("data/celeba"),
                     help="where to; data/celeba by default")
    sub.set_defaults(run=run_data)

    sub = commands.add_parser("verify", help="measure a finished run again, and compare")
    sub.add_argument("profile", metavar="PROFILE", help="quick, cpu, paper, best or best-gpu")
    _add_data(sub, "where its images are now")
    sub.add_argument("--limit", type=int, help="measure on the first N test images")
    sub.set_defaults(run=run_verify)

    sub = commands.add_parser("sweep", help="reproduce with every combination of some parameters")
    sub.add_argument("file", type=Path, metavar="SWEEP.yaml", help="profile, and lists of values")
    sub.add_argument("--scheduler", metavar="ADDRESS", help="of a dask cluster; else this machine")
    _add_data(sub, "folder, tar or zip of CelebA JPEGs")
    sub.set_defaults(run=run_sweep)

    sub = commands.add_parser("doctor", help="what is installed and found, and what would not work")
    _add_data(sub, "folder, tar or zip of images", default="data/celeba")
    sub.add_argument("--weights", type=_weights, metavar="DIR")
    sub.set_defaults(run=run_doctor)
    return parser


def _add_data(sub: argparse.ArgumentParser, note: str, **options: object) -> None:
    sub.add_argument("--data", type=checkout.find_path, help=note, **options)


def _add_parameters(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--profile", default="quick", help="quick, cpu, paper, best or best-gpu")
    _add_data(sub, "folder, tar or zip of CelebA JPEGs")
    sub.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE",
                     help="set a notebook parameter; may be repeated")


def _add_method(sub: argparse.ArgumentParser, action: str, note: str) -> None:
    sub.add_argument("--method", action=action, metavar="NAME",
                     help=f"{', '.join(methods.METHODS)}; {note}")


def _add_weights(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--weights", type=_weights, metavar="DIR",
                     help="a folder with tuning.json and the methods' weights, e.g. runs/quick; "
                          "by default the released ones")
    sub.add_argument("--device", default="auto", help="auto, cpu or cuda")


def _weights(text: str) -> Path:
    return Path(checkout.find_path(text))


def _add_images(sub: argparse.ArgumentParser) -> None:
    paper = protocols.get_protocol("paper").make.keywords
    sub.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR")
    sub.add_argument("--kernel", default=f"gaussian:{paper['kernel_std']},{paper['kernel_size']}",
                     help=f"{kernel_option.FORMS}; or a file: a picture, .npy or .txt; by "
                     "default the paper's, %(default)s")
    sub.add_argument("--border", choices=["unknown", "black"], default="unknown",
                     help="what lies beyond the picture: by default a scene that goes on")
    sub.add_argument("--range", metavar="LOW,HIGH",
                     help="the numbers in the file for black and white, if not the usual ones")


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError as error:
        raise UserError(f"--range {text}: give two numbers, e.g. 0,4095") from error
    return low, high


def _check_noise(noise_std: float) -> None:
    # Below 1e-5 it would vanish in float32, of which the methods take the square.
    if not 1e-5 <= noise_std <= 1:
        raise UserError(f"--noise-std {noise_std}: give it on the scale of pixel values in [0, 1], "
                        "e.g. 0.01")


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
    files = reproduce(args.profile, overrides, args.only, args.force,
                      log=_say, folder=args.folder)
    table = next((f for f in files if f.name == "table2_comparison.md"), None)
    if table:
        _say(f"\nTable 2\n\n{table.read_text('utf-8')}")
    _say("\n".join(["Written:", *(f"  {f.relative_to(checkout.work())}" for f in files)]))


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
def run_deblur(args: argparse.Namespace) -> None:
    name = args.method or "jfb"
    keep_freed_memory()
    kernel = kernel_option.parse(args.kernel)
    noise_std = None if args.noise_std == "auto" else args.noise_std
    if noise_std is not None:
        _check_noise(noise_std)
    device = pick_device(args.device)
    restorer = restorers.make_methods([name], args.weights, device)[name]

    def deblur(picture: files.Picture, path: Path, i: int) -> tuple[files.Picture, str]:
        with tqdm(desc=path.name, unit="tile", disable=None, leave=False) as bar:
            def progress(done: int, tiles: int) -> None:
                bar.total, bar.n = tiles, done
                bar.refresh()

            found = restore.restore(restorer, picture.pixels.to(device), kernel,
                                        noise_std, args.border, progress)
        for line in found.warnings:
            _warn(f"warning: {path}: {line}")
        said = f"noise {found.noise_std:.2g}"
        if found.iterations is not None:
            said += (f", {found.iterations} iterations, relative residual "
                     f"{found.residual:.1e}")
        return picture.with_pixels(found.pixels), said

    _each_picture(args, name, deblur)


@torch.no_grad()
def run_blur(args: argparse.Namespace) -> None:
    kernel = kernel_option.parse(args.kernel)
    if args.noise_std:
        _check_noise(args.noise_std)

    def blur(picture: files.Picture, path: Path, i: int) -> tuple[files.Picture, str]:
        x = picture.pixels
        A = operators.Convolution(tuple(x.shape[1:]), kernel, args.border)
        d = protocols.measure(A, x[None], args.noise_std, args.seed, [i])[0]
        return picture.with_pixels(d), f"{d.shape[2]} x {d.shape[1]} pixels"

    _each_picture(args, "blurred", blur)


Work = Callable[[files.Picture, Path, int], tuple[files.Picture, str]]


def _each_picture(args: argparse.Namespace, suffix: str, work: Work) -> None:
    """Do something with every page of every picture, and write it beside the others' as one file.

    A picture with which it cannot be done is named, and the others are done all the same.
    """
    failed, value_range = [], _range(args.range) if args.range else None
    _check_targets(args.images, args.out, suffix)
    for i, path in enumerate(args.images):
        try:
            pages = files.read_pictures(path, value_range)
            for note in dict.fromkeys(page.note for page in pages if page.note):
                _warn(f"note: {path}: {note}")
            done = [work(page, path, i + k * len(args.images)) for k, page in enumerate(pages)]
            target = args.out / f"{path.stem}-{suffix}{pages[0].suffix}"
            files.write_pictures(target, [picture for picture, _ in done])
        except (UserError, OSError) as error:
            if len(args.images) == 1:
                raise
            failed.append(path)
            _warn(f"error: {path}: {error}")
            continue
        for page, (_, said) in enumerate(done, 1):
            _say(f"{target}" + f", page {page} of {len(done)}" * (len(done) > 1) + f" ({said})")
    if failed:
        raise UserError(f"{len(failed)} of {len(args.images)} pictures could not be done: see the "
                        "lines above; the others are written")


def _check_targets(paths: list[Path], out: Path, suffix: str) -> None:
    """Raise UserError where two would become one file, or one is among those still to be read."""
    stems = [path.stem for path in paths]
    read = {path.resolve() for path in paths}
    for path in paths:
        if stems.count(path.stem) > 1:
            raise UserError(f"several pictures are called {path.stem}, and would become one file: "
                            f"{path} needs another --out")
        for kind in (".png", ".tif"):
            if (target := out / f"{path.stem}-{suffix}{kind}").resolve() in read:
                raise UserError(f"{target} is to be read and would be written: choose another "
                                "--out")


def run_data(args: argparse.Namespace) -> None:
    if args.download:
        _say(f"CelebA is in {data.download_celeba(args.out)}")
    else:
        _say(data.MANUAL_STEPS)


def run_verify(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    from jfbnb.run.verify import verify

    _check_limit(args.limit)
    differences = 0
    for line in verify(args.profile, args.data, args.limit):
        _say(line)
        differences += 1
    if differences:
        raise UserError(f"{differences} differences: see the lines above")
    _say(f"the tables of {args.profile} are those of its stored networks")


def run_sweep(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    from jfbnb.run.sweep import sweep

    table = sweep(args.file, args.scheduler, args.data, _say)
    _say(f"\n{table.read_text('utf-8')}")


def run_lab(args: argparse.Namespace) -> None:
    checkout.need_checkout()
    notebooks = sorted(checkout.ROOT.glob("notebooks/**/[0-9]*.ipynb"))
    # Else what is stored with them stays dead until it is run.
    _call("trust", *notebooks)
    first = notebooks[0].relative_to(checkout.ROOT).as_posix()
    _call("lab", "--notebook-dir", checkout.ROOT, f"--LabApp.default_url=/lab/tree/{first}",
          *args.options)


def _call(command: str, *words: object) -> None:
    """A command of Jupyter's, in this environment. Raises UserError where it does not work."""
    done = subprocess.run([sys.executable, "-m", "jupyter", command, *map(str, words)],
                          check=False)
    if done.returncode:
        raise UserError(f"jupyter {command} ended with status {done.returncode}: see above")


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
