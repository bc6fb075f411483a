"""Fuzzing of every way in: `make fuzz`, with a report in build/fuzz/.

hypothesis draws the cases: real files with bytes changed, and files, values and command lines made
to be odd. A case may succeed or end in a `UserError`, for the command in one line and exit status
2. Anything else is a surprise: another exception, more than SECONDS or MEMORY, something written
outside the case's folder, a program started, a pickle opened.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import skimage.data
import torch
import torchvision  # noqa: F401  as `doctor` does; importing it makes a folder
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from jfbnb import checkpoints, cli, datasets, methods, networks, reproduce, sweep, verify
from jfbnb.common import UserError
from jfbnb.operators import Blur

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 20.0  # of one case, on a busy machine; most take milliseconds
MEMORY = 2_000_000_000  # bytes by which one case may raise the process's peak
CASES = 12_000

# --- what happens to a case -----------------------------------------------------------------------


class Hang(BaseException):
    """Raised by the alarm; no handler for errors stops it."""


class Watch:
    """Notes writes outside a folder, and programs started, by Python's audit events."""

    WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    CHANGES = ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir",
               "os.truncate", "os.chmod", "shutil.rmtree")
    PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                "pickle.find_class", "socket.connect")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.found: list[str] = []
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def __call__(self, folder: Path) -> Iterator[list[str]]:
        self.folder, self.found = os.path.realpath(folder), []
        try:
            yield self.found
        finally:
            self.folder = None

    def _hear(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in self.PROGRAMS:
            self.found.append(f"{event} {args[:2]}")
        if event == "open" and isinstance(args[2], int) and args[2] & self.WRITES:
            self._judge(event, args[:1])
        elif event in self.CHANGES:
            self._judge(event, args[1:2] if event in ("os.symlink", "os.link") else args[:2])

    def _judge(self, event: str, paths: tuple) -> None:
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                real = os.path.realpath(os.fsdecode(path))
                if not (real + os.sep).startswith(self.folder + os.sep) and real != os.devnull:
                    self.found.append(f"{event} of {real}")


WATCH = Watch()


def attempt(run: Callable[[Any, Path], None], case: Any, folder: Path) -> str:
    """Run one case; return "ok", "refused" or what surprised."""
    def ring(*_: object) -> None:
        raise Hang

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    signal.signal(signal.SIGALRM, ring)
    outcome = "ok"
    with WATCH(folder) as wrong:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            run(case, folder)
        except UserError:
            outcome = "refused"
        except Hang:
            outcome = f"over {SECONDS:.0f} s"
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__)
                      if Path(f.filename).is_relative_to(ROOT)]
            outcome = (f"{type(error).__name__}: {str(error)[:200]!a} "
                       f"({Path(frames[-1].filename).name}:{frames[-1].lineno})")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if wrong:
        return f"outside: {wrong[0]}"
    if grown > MEMORY:
        return f"over {MEMORY / 1e9:.0f} GB"
    return outcome


def command(argv: list[str]) -> None:
    """Run the command line as a terminal would. Raises UserError where it refuses."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors)
                for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(argv)
        except SystemExit as stop:  # argparse's own refusals
            status = stop.code
        out.flush()
    err.seek(0)
    said = err.read()
    if status == 2 and "error:" in said and "Traceback" not in said:
        raise UserError(said)
    if status != 0:
        raise AssertionError(f"status {status}: {said[-200:]}")


# --- odd values -----------------------------------------------------------------------------------

NUMBERS = ("0", "-1", "1", "3", "1e400", "nan", "-inf", "1e-320", "9" * 30, "0x10", "", "5.0",
           "٣", "1e-5", "8193", "2", "0.01", "0.5", "1e308", "-0.0")
NAMES = ("a.jpg", "../../evil.jpg", "/evil.png", "..\\evil.jpg", "C:\\evil.png", "x\n.jpg", ".jpg",
         "\x1b[31m.png", "é.png", "a/b.jpg", "dir.jpg/", "a.jpg/a.jpg", " .bmp", "n" * 240 + ".jpg",
         "A.JPEG", "a.txt", "\udcff.jpg", "...png", "-p.webp")
YAMLS = ("&a [*a]", "a: &a [1]\nb: *a", "!!python/object/apply:os.system ['true']", "[" * 4000,
         "2024-13-99", "!!int ''", "!!timestamp x", "!!bool x", "? [1]\n: 2", "\0", "\xff", "<<: 3",
         "{1: 2, a: 3}", "- 1", "!!binary x", "1:99:99", "0x" + "f" * 5000, "9" * 5000, ".nan",
         "-.inf", "1e5", "!!set {a}", "2024-01-01", "~", "'", "a: b: c", "%YAML 9.9", "@", "{",
         "!!float x", "--- 1\n--- 2", "\ufeff", "\t", "=", "!!omap [a: 1]", "yes",
         "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]"
                                     for i in range(1, 30))]))
JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                     lambda inner: st.lists(inner, max_size=4)
                     | st.dictionaries(st.text(max_size=9), inner, max_size=4), max_leaves=8)
WORDS = st.sampled_from((*NUMBERS, *NAMES, "nope", "[", "~", "/dev/null", "..", ".", "/", "a" * 300)
                        ) | st.text(st.characters(exclude_characters="\0",
                                                  exclude_categories=("Cs",)), max_size=12)
KINDS = ("flip", "cut", "drop", "insert", "overwrite", "repeat")
EDITS = st.just([]) | st.lists(st.tuples(
    st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.sampled_from((1, 4)),
    st.binary(min_size=1, max_size=12) | st.sampled_from(
        (b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80" + b"\0" * 7))),
    max_size=5)


def mutate(content: bytes, edits: list[tuple[str, float, int, bytes]]) -> bytes:
    """The content after some edits; those with the power 4 are mostly near its head."""
    data = bytearray(content)
    for kind, where, power, payload in edits:
        i = int(where**power * len(data))
        if kind == "flip" and data:
            data[i] ^= payload[0] or 1
        elif kind == "cut":
            del data[i:]
        elif kind == "drop":
            del data[i:i + len(payload)]
        elif kind == "insert":
            data[i:i] = payload
        elif kind == "overwrite":
            data[i:i + len(payload)] = payload
        elif kind == "repeat":
            data[i:i] = data[i:i + 64]
    return bytes(data)


# --- real files to start from ---------------------------------------------------------------------


@functools.cache
def pictures() -> dict[str, bytes]:
    """A small picture in every format and mode that a file may bring."""
    photo = Image.fromarray(skimage.data.astronaut()).resize((24, 20))
    exif = photo.getexif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    grey = photo.convert("L")
    wanted = {
        "a.jpg": (photo, {"exif": exif}), "cmyk.jpg": (photo.convert("CMYK"), {}),
        "a.png": (photo, {}), "grey.png": (grey, {}), "alpha.png": (photo.convert("RGBA"), {}),
        "palette.png": (photo.quantize(8), {"transparency": 0}), "bit.png": (grey.convert("1"), {}),
        "deep.png": (deep, {}), "one.png": (photo.resize((1, 1)), {}), "a.webp": (photo, {}),
        "anim.webp": (photo, {"save_all": True, "append_images": [photo.rotate(9)]}),
        "a.bmp": (photo, {}), "a.tif": (photo, {"compression": "tiff_lzw"}),
        "deep.tif": (deep, {}), "float.tif": (grey.convert("F"), {}), "a.ppm": (photo, {}),
        "lab.tif": (Image.new("LAB", (9, 9)), {}), "a.jp2": (photo, {}), "a.eps": (photo, {}),
        "anim.gif": (photo.quantize(8), {"save_all": True, "append_images": [photo.quantize(4)]}),
        "wide.gif": (Image.new("P", (8200, 8200)), {}), "anim.png": (photo, {
            "save_all": True, "append_images": [photo.rotate(9)]}),
        "bomb.png": (Image.new("1", (20_000, 20_000)), {}),
    }
    files = {}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jp2": "JPEG2000", "jpg": "JPEG", "tif": "TIFF"}.get(
            name[-3:], name.partition(".")[2].upper()), **options)
        files[name] = buffer.getvalue()
    return files


@functools.cache
def bombs() -> dict[str, bytes]:
    """Archives of a few hundred kilobytes that unpack to hundreds of megabytes."""
    zeros = bytes(150_000_000)
    files = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in ("a.jpg", "b.jpg"):
            archive.writestr(name, zeros)
    files["zip"] = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for name in ("a.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(zeros)
            archive.addfile(member, io.BytesIO(zeros))
    files["tar.gz"] = buffer.getvalue()
    return files


def small_network(head: bool = False) -> networks.Regulariser:
    return networks.Regulariser(networks.DnCNN(2, 3), 0.05, 0.04,
                                networks.DnCNN(2, 3) if head else None)


@functools.cache
def stored_weights() -> dict[str, bytes]:
    """A folder of weights like runs/quick, by file."""
    prior = {"tau": 0.05, "sigma": 0.04, "lam": 0.01, "eta": 1.0, "steps": 5, "step_size": 1.0,
             "weight": 1e-3, "iterations": 2}
    chosen = {name: {k: prior[k] for k in needed} for name, needed in methods.SETTINGS.items()}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        for name in ("denoiser", *methods.TRAINED):
            networks.save_regulariser(folder / f"{name}.safetensors",
                                      small_network(name in methods.HEADS.values()), {})
        methods.Tuning(0.01, 1, chosen, {}).save(folder / "tuning.json")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def place(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# --- the ways in ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WayIn:
    """`cases` draws a case, `run` tries it in an empty folder; `share` of the campaign's cases."""

    name: str
    share: float
    cases: st.SearchStrategy
    run: Callable[[Any, Path], None]


IMAGES = st.tuples(st.deferred(lambda: st.sampled_from(sorted(pictures()))), EDITS)


def try_image(case: Any, folder: Path) -> None:
    name, edits = case
    file = folder / name
    file.write_bytes(mutate(pictures()[name], edits))
    try:
        pixels = datasets.decode(file, 16)
    except ValueError as error:  # its contract; who calls it makes a UserError of it
        raise UserError(str(error)) from error
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8


CONTENTS = st.sampled_from(("a.jpg", "grey.png", "bomb.png", "a.eps")) | st.binary(max_size=9)
FOLDERS = st.lists(st.tuples(
    st.sampled_from([n.strip("/") for n in NAMES if ".." not in n and not n.startswith("/")]),
    st.sampled_from(("file", "folder", "pipe", "dangling", "loop", "passwd")), CONTENTS),
    max_size=5)


def content(drawn: str | bytes) -> bytes:
    return pictures()[drawn] if isinstance(drawn, str) else drawn


def try_folder(case: Any, folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    for name, kind, drawn in case:
        path = data / name
        if os.path.lexists(path) or path.parent.is_symlink():
            continue  # to write into a pipe would wait for ever
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            path.parent.mkdir(exist_ok=True)
            if kind == "file":
                path.write_bytes(content(drawn))
            elif kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            else:
                target = {"dangling": "nowhere", "loop": path.name, "passwd": "/etc/passwd"}[kind]
                path.symlink_to(target)
    datasets.load_images(data, 8, warn=str.encode)


ARCHIVES = st.tuples(
    st.sampled_from(("zip", "tar", "tar.gz", "tar.xz")),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(
        (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE,
         tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE)), CONTENTS), max_size=4),
    EDITS, st.sampled_from((False,) * 30 + (True,)))


def try_archive(case: Any, folder: Path) -> None:
    kind, members, edits, bomb = case
    file = folder / f"a.{kind}"
    if bomb:
        file.write_bytes(bombs()["zip" if kind == "zip" else "tar.gz"])
    elif kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, _, drawn in members:
                archive.writestr(name.encode("utf-8", "replace").decode(), content(drawn))
    else:
        with tarfile.open(file, f"w:{kind[4:]}") as archive:
            for name, flag, drawn in members:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = flag, "/etc/passwd"
                member.size = len(content(drawn)) if flag == tarfile.REGTYPE else 0
                archive.addfile(member, io.BytesIO(content(drawn)))
    file.write_bytes(mutate(file.read_bytes(), edits))
    datasets.load_images(file, 8, warn=str.encode)


ARCHITECTURES = st.fixed_dictionaries({
    "depth": st.sampled_from((2, 2, 2, 2.0, True, 0, 64, 10**9, None, "2", [2])),
    "width": st.sampled_from((3, 3, 3, 3.0, -1, 1024, 10**9)),
    "channels": st.sampled_from((3, 3, 3, 1, 3.0, 64)),
    "head": st.sampled_from((False, False, True, 0, 1, None, "no"))}) | JSONS
HEADERS = st.fixed_dictionaries({
    "dtype": st.sampled_from(("F32", "F32", "F64", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X")),
    "shape": st.lists(st.sampled_from((0, 1, 2, 3, 4, 2**31, 2**62)), max_size=5),
    "data_offsets": st.tuples(*[st.sampled_from((0, 4, 8, 300, 2**40, 2**63))] * 2)})
WEIGHTS = st.tuples(
    st.just("mutated"), EDITS) | st.tuples(
    st.just("architecture"), ARCHITECTURES, st.sampled_from((1.0, 1.0, math.nan, math.inf, 300.0))
    ) | st.tuples(
    st.just("header"), st.dictionaries(st.sampled_from(
        ("log_tau", "sigma", "network.layers.0.weight", "network.layers.2.bias", "x")),
        HEADERS | JSONS, max_size=4), ARCHITECTURES, st.sampled_from((None, 0, 5, 2**40, 2**63)))


def raw_safetensors(header: dict, length: int | None, body: bytes = bytes(400)) -> bytes:
    text = json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def try_weights(case: Any, folder: Path) -> None:
    file = folder / "jfb.safetensors"
    if case[0] == "mutated":
        file.write_bytes(mutate(stored_weights()[file.name], case[1]))
    elif case[0] == "architecture":
        tensors = {k: v.contiguous() for k, v in small_network().state_dict().items()}
        tensors["log_tau"] = tensors["log_tau"] * case[2]
        networks.save_file(tensors, file, metadata={"architecture": json.dumps(case[1])})
    else:
        header = {**case[1], "__metadata__": {"architecture": json.dumps(case[2])}}
        file.write_bytes(raw_safetensors(header, case[3]))
    S = networks.load_regulariser(file)
    with torch.no_grad():
        S(torch.zeros(1, 3, 8, 8))


TUNINGS = st.tuples(
    st.sampled_from(("mutated", "value", "json")), EDITS, JSONS,
    st.sampled_from(sorted(methods.LABELS)), st.sampled_from(
        (0, -1, 1e300, math.nan, math.inf, "1", None, True, 10**400, [1], 0.5, 3, 1e-5)))


def try_tuning(case: Any, folder: Path) -> None:
    kind, edits, drawn, name, value = case
    text = stored_weights()["tuning.json"]
    if kind == "mutated":
        text = mutate(text, edits)
    elif kind == "json":
        text = json.dumps(drawn).encode()
    else:
        tuning = json.loads(text)
        for settings_ in tuning["chosen"].values():
            settings_.update(dict.fromkeys([k for k in settings_ if k != "iterations"], value))
        text = json.dumps(tuning).encode()
    place({**stored_weights(), "tuning.json": text}, folder)
    method = methods.make_methods([name], folder, torch.device("cpu"))[name]
    method(Blur(8, 5, 2.0), torch.zeros(1, 3, 8, 8), 0.01)


CHECKPOINTS = st.tuples(
    st.sampled_from(("mutated", "header", "hashed")), EDITS, st.dictionaries(
        st.sampled_from(("module.log_tau", "adam.0.step", "adam.0.exp_avg", "adam.99.step",
                         "adam.x.y", "adam.0", "z")), HEADERS | JSONS, max_size=3),
    JSONS, st.sampled_from(("module.log_tau", "adam.0.exp_avg", "adam.1.step", "adam.9.step",
                            "adam..", "other")), st.sampled_from(((), (2,), (10**6,), (1, 3, 3))))


def try_checkpoint(case: Any, folder: Path) -> None:
    """A damaged newest one, then the good one before it: that one is used."""
    kind, edits, header, history, name, shape = case
    file = folder / "k.safetensors"
    S = small_network()
    optimizer = torch.optim.Adam(S.parameters())
    S(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    checkpoints.save_checkpoint(file, S, optimizer, [{"epoch": 1}])
    checkpoints.save_checkpoint(file, S, optimizer, [{"epoch": 1}, {"epoch": 2}])
    if kind == "mutated":
        file.write_bytes(mutate(file.read_bytes(), edits))
    elif kind == "header":
        file.write_bytes(raw_safetensors(header, None))
    else:  # a well-formed forgery
        with networks.safe_open(file, "pt") as stored:
            tensors = {k: stored.get_tensor(k) for k in stored.keys()}  # noqa: SIM118
        tensors[name] = torch.zeros(shape)
        text = json.dumps(history)
        networks.save_file(tensors, file, metadata={
            "history": text, "sha256": checkpoints._digest(tensors, text)})
    loaded = checkpoints.resume(file, S, optimizer, str.encode)
    assert all(value.isfinite().all() for value in S.state_dict().values())
    assert len(loaded) in (1, 2) or kind == "hashed", loaded
    S(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()


PARAMETERS = ("seed", "data", "effort", "learning_rate", "table1_methods", "bf16", "weights",
              "profile", "depth", "nope", "")
YAML_TEXTS = st.sampled_from(YAMLS) | JSONS.map(
    lambda v: yaml.safe_dump(v, allow_unicode=True)) | WORDS


def try_profile(case: Any, folder: Path) -> None:
    text, edits = case
    (folder / "quick.yaml").write_bytes(mutate(text.encode("utf-8", "replace"), edits))
    with mock.patch.object(reproduce, "PROFILES", folder):
        reproduce.step_parameters(reproduce.STEPS, reproduce.load_profile("quick"))


def try_parameter(case: Any, folder: Path) -> None:
    name, text, equals = case
    run_command(["reproduce", "-p", f"{name}{equals}{text}".replace("\0", "")], folder)


SWEEPS = st.tuples(
    st.just("profile: quick\nparameters:\n  seed: [0, 1]\n  protocol: [paper]\n"), EDITS
    ) | st.tuples(YAML_TEXTS, st.just([])) | st.tuples(st.dictionaries(
        st.sampled_from(PARAMETERS), JSONS | st.lists(JSONS, max_size=3), max_size=3).map(
            lambda v: yaml.safe_dump({"profile": "quick", "parameters": v})), EDITS)


def try_sweep(case: Any, folder: Path) -> None:
    text, edits = case
    file = folder / "s.yaml"
    file.write_bytes(mutate(text.encode("utf-8", "replace"), edits))
    profile, parameters = sweep.load_sweep(file)
    for values in sweep.points(parameters):
        assert (folder / sweep.point_name(values)).parent == folder
        reproduce.load_profile(profile)


FILES = ("a.jpg", "grey.png", "one.png", "bomb.png", "a.eps", "deep.png", "nowhere.png", "text.png",
         "pipe.png", "dir.png", ".", "a.jpg", "a.jpg")
OPTIONS = st.sampled_from(("--kernel-size", "--kernel-std", "--noise-std", "--seed", "--limit",
                           "--profile", "--folder", "--only", "--protocol", "--device", "--method",
                           "--data", "--weights", "-p", "--frozen", "--force", "--help", "-", "--"))
COMMANDS = st.tuples(
    st.sampled_from(("blur", "blur", "deblur", "deblur", "evaluate", "reproduce", "verify", "sweep",
                     "data", "doctor", "nope", "")),
    st.lists(st.sampled_from(FILES), min_size=1, max_size=2),
    st.sampled_from(sorted(methods.LABELS)),
    st.lists(st.tuples(OPTIONS, WORDS), max_size=3))


def try_command(case: Any, folder: Path) -> None:
    name, files, method, options = case
    data = place({**{f: pictures()[f] for f in FILES if f in pictures()}, "text.png": b"text"},
                 folder / "in")
    os.mkfifo(data / "pipe.png")
    (data / "dir.png").mkdir()
    weights = ["--weights", str(place(stored_weights(), folder / "w"))]
    words = {
        "blur": [*(str(data / f) for f in files), "--out", str(folder / "out")],
        "deblur": [*(str(data / f) for f in files), "--out", str(folder / "out"), "--method",
                   method, *weights],
        "evaluate": ["--data", str(data), "--limit", "2", "--method", "tikhonov", "--json",
                     str(folder / "out" / files[0]), *weights],
        "verify": ["quick"], "sweep": [str(data / files[0])], "data": ["celeba"],
        "doctor": ["--data", str(data), *weights],
    }.get(name, [])
    run_command([name, *words, *(word for option in options for word in option)], folder)


def run_command(argv: list[str], folder: Path) -> None:
    """The command with a project of its own, no notebook run, no download and no cluster."""
    table = folder / "table.md"
    table.write_text("| |")

    def only_load(file: Path, *_: object) -> Path:
        sweep.load_sweep(file)
        return table

    with (mock.patch.object(reproduce, "ROOT", folder), mock.patch.object(cli, "ROOT", folder),
          mock.patch.object(verify, "ROOT", folder),
          mock.patch.object(reproduce, "_run_steps"), mock.patch.object(sweep, "sweep", only_load),
          mock.patch.object(datasets, "download_celeba", side_effect=UserError("no download")),
          contextlib.chdir(folder)):
        command(argv)


@functools.cache
def stored_run() -> dict[str, bytes]:
    """A marker, a run's record of itself and its tables, as of a finished run."""
    outputs = {"runs/quick/a.txt": reproduce.hashlib.sha256(b"a").hexdigest()}
    parameters = {"data": "bundled", "protocol": "paper", "seed": 0, "device": "cpu", "n_train": 2,
                  "n_validation": 1, "n_test": 1}
    step = {"inputs": {"a": "b"}, "outputs": outputs, "parameters": parameters, "seconds": 1.5}
    metrics = "method,image,psnr,ssim,iterations,residual,converged,seconds\n" \
        "tikhonov,astronaut/2/0-0,27.2,0.8,,,,0.1\njfb,astronaut/2/0-0,30.1,0.9,3,1e-5,1.0,0.2\n"
    table = "Method,PSNR (dB),± PSNR,SSIM,± SSIM,Converged\nTikhonov,27.2,,0.8,,\n" \
        "JFB,30.1,,0.9,,1.0\n"
    return {"marker": json.dumps(step).encode(), "metrics.csv": metrics.encode(),
            "table2_comparison.csv": table.encode(),
            "provenance.json": json.dumps({"steps": {"05_evaluation": step}}).encode()}


RUNS = st.tuples(st.sampled_from(("marker", "provenance.json", "metrics.csv",
                                  "table2_comparison.csv")), EDITS, st.none() | JSONS)


@functools.cache
def one_test_image(*_: object) -> datasets.Splits:
    photos = datasets.bundled_photos("test")
    return datasets.Splits(photos[:1], photos[:1], photos[:1], "")


def try_stored_run(case: Any, folder: Path) -> None:
    """The runner believes a marker only whole; `jfbnb verify` reads the rest."""
    name, edits, drawn = case
    files = dict(stored_run())
    files[name] = mutate(files[name], edits) if drawn is None else json.dumps(drawn).encode()
    for part in ("runs/quick", "figures/quick"):
        (folder / part).mkdir(parents=True)
    place({"a.txt": b"a", **stored_weights()}, folder / "runs/quick")
    place(files, folder / "figures/quick")
    if name == "marker":
        marker = reproduce.read_marker(folder / "figures/quick/marker")
        reproduce.is_done(marker, {"a": "b"}, [Path("runs/quick/a.txt")], folder)
        reproduce._durations(folder / "figures/quick/marker")
        return
    with (mock.patch.object(verify, "ROOT", folder),
          mock.patch.object(verify, "load_splits", one_test_image)):
        collections.deque(verify.verify("quick", None, 1), maxlen=0)


WAYS_IN = (
    WayIn("image files", 0.24, IMAGES, try_image),
    WayIn("data folders", 0.06, FOLDERS, try_folder),
    WayIn("archives", 0.2, ARCHIVES, try_archive),
    WayIn("weights", 0.12, WEIGHTS, try_weights),
    WayIn("tuned settings", 0.05, TUNINGS, try_tuning),
    WayIn("checkpoints", 0.08, CHECKPOINTS, try_checkpoint),
    WayIn("profiles", 0.05, st.tuples(YAML_TEXTS | st.just("seed: 0\ndata: bundled\nepochs: 3\n"),
                                      EDITS), try_profile),
    WayIn("parameters (-p)", 0.06, st.tuples(st.sampled_from(PARAMETERS), YAML_TEXTS,
                                             st.sampled_from(("=", "=", "=", ""))), try_parameter),
    WayIn("sweep files", 0.05, SWEEPS, try_sweep),
    WayIn("command lines", 0.07, COMMANDS, try_command),
    WayIn("stored runs", 0.02, RUNS, try_stored_run),
)

# --- the campaign ---------------------------------------------------------------------------------


def campaign(way: WayIn, cases: int, number: int) -> collections.Counter:
    """Try that many cases of one way in; count the outcomes."""
    outcomes: collections.Counter[str] = collections.Counter()
    stored_weights(), platform.platform()  # made once, and no case's doing

    @seed(number)
    @settings(max_examples=cases, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(way.cases)
    def one(case: Any) -> None:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            with (mock.patch.object(datasets, "CACHE", folder / "cache"),
                  mock.patch.object(reproduce, "notebook_parameters", read_once)):
                outcome = attempt(way.run, case, folder)
        outcomes[outcome] += 1
        if outcome not in ("ok", "refused") and outcomes[outcome] == 1:
            print(f"{way.name}: {outcome}\n    {ascii(case)[:1500]}", flush=True)

    one()
    return outcomes


read_once = functools.cache(reproduce.notebook_parameters)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one way in, by its name")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    args = parser.parse_args()
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    counts = {}
    for way in WAYS_IN:
        if args.only in (None, way.name):
            counts[way.name] = campaign(way, max(1, round(args.cases * way.share)), args.seed)
            print(f"{way.name}: {counts[way.name].total()} cases", flush=True)
    surprises = write_report(args.out, args.seed, counts, time.monotonic() - start)
    return 1 if surprises else 0


def write_report(out: Path, number: int, counts: dict[str, collections.Counter],
                 seconds: float) -> int:
    """report.json and report.md; returns the number of different surprises."""
    rows, surprises = [], []
    for name, outcomes in counts.items():
        own = {o: n for o, n in outcomes.items() if o not in ("ok", "refused")}
        surprises += [f"- {name}, {n} times: {o}" for o, n in own.items()]
        rows.append(f"| {name} | {outcomes.total()} | {outcomes['ok']} | {outcomes['refused']} | "
                    f"{sum(own.values())} |")
    total = sum(outcomes.total() for outcomes in counts.values())
    out.mkdir(parents=True, exist_ok=True)
    record = {"seed": number, "cases": total, "seconds": round(seconds, 1), "ways in": counts}
    (out / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    text = "\n".join(("# Fuzzing", "", f"{total} cases, seed {number}, {seconds:.0f} s.", "",
                      "| way in | cases | taken | refused in one line | surprises |",
                      "| --- | ---: | ---: | ---: | ---: |", *rows, "", *surprises))
    (out / "report.md").write_text(text + "\n")
    print(text)
    return len(surprises)


if __name__ == "__main__":
    sys.exit(main())
