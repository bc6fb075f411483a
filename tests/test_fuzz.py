"""Odd input by every way in: files, folders, values and command lines that hypothesis draws.

A case may succeed or end in a `UserError`, for the command in one line and exit status 2. Anything
else fails: another exception, more than SECONDS, so much memory that the system refuses it,
something written outside the case's folder, a program started, a pickle opened. `make fuzz` tries
many cases, the ordinary tests a few.
"""

import contextlib
import functools
import io
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import skimage.data
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

from jfbnb import data
from jfbnb.common import UserError
from jfbnb.core.operators import Blur
from jfbnb.photo import files
from jfbnb.run import reproduce, sweep, train
from jfbnb.run.command import main
from jfbnb.training import methods

resource = pytest.importorskip("resource", reason="measures the way of Unix")
pytestmark = pytest.mark.filterwarnings("ignore")

SECONDS = 20.0  # of one case, on a busy machine; most take milliseconds
MEMORY = 4_000_000_000  # bytes that a case may ask for
CASES = os.environ.get("JFBNB_FUZZ")  # how many of each way in
set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # not in the checkout
fuzz = settings(max_examples=int(CASES or 30), derandomize=CASES is None, deadline=None,
                database=None, print_blob=True, suppress_health_check=list(HealthCheck))

# --- what a case may do ---------------------------------------------------------------------------


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
        self.folder = ""
        self.found: list[str] = []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if not self.folder:
            return
        if event in self.PROGRAMS:
            self.found.append(f"{event} {args[:2]}")
        elif event == "open" and isinstance(args[2], int) and args[2] & self.WRITES:
            self.judge(event, args[:1])
        elif event in self.CHANGES:
            self.judge(event, args[1:2] if event in ("os.symlink", "os.link") else args[:2])

    def judge(self, event: str, paths: tuple) -> None:
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                real = os.path.realpath(os.fsdecode(path))
                if not f"{real}{os.sep}".startswith(self.folder + os.sep) and real != os.devnull:
                    self.found.append(f"{event} of {real}")


WATCH = Watch()


@contextlib.contextmanager
def trial() -> Iterator[Path]:
    """One case, in an empty folder that is all it may write to. It may end in a UserError."""
    def ring(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    with (tempfile.TemporaryDirectory() as text, contextlib.chdir(text),
          mock.patch.object(data, "CACHE", Path(text, "cache")),
          mock.patch.dict(os.environ, JFBNB_WORK=text)):
        most = psutil.Process().memory_info().vms + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        WATCH.folder, WATCH.found = os.path.realpath(text), []
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            yield Path(text)
        except UserError:
            pass
        except Hang:
            raise AssertionError(f"over {SECONDS:.0f} s") from None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            WATCH.folder = ""
    assert not WATCH.found, f"outside: {WATCH.found}"


def command(*argv: str) -> None:
    """Run the command line as a terminal would. Raises UserError where it refuses."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors=errors)
                for errors in ("strict", "backslashreplace"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(argv)
        except SystemExit as stop:  # argparse's own refusals
            status = stop.code
        out.flush()
    err.seek(0)
    said = err.read()
    if status == 2 and "error:" in said and "Traceback" not in said:
        raise UserError(said)
    assert status == 0, f"status {status}: {said[-200:]}"


@pytest.fixture(autouse=True)
def nothing_long(monkeypatch):
    """No notebook is run, nothing trained, and Python itself writes no file."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(reproduce, "notebook_parameters", read_once)
    for module, name in ((reproduce, "run_notebook"), (train, "train_network"), (sweep, "sweep")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=UserError("not here")))
    platform.platform()  # starts a program, once


read_once = functools.cache(reproduce.notebook_parameters)


@pytest.mark.parametrize(("deed", "complaint"), [
    (lambda: {}["x"], "x"),
    (lambda: Path("../evil").touch(), "outside: .*open of"),
    (lambda: os.system("true"), "outside: .*os.system"),
    (lambda: torch.save(Blur(8, 3, 1.0), "a") or torch.load("a", weights_only=False),
     "outside: .*pickle"),
    (lambda: time.sleep(9), "over 0 s"),
])
def test_what_fails(monkeypatch, tmp_path, deed, complaint):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(globals(), "SECONDS", 0.3)
    with pytest.raises((AssertionError, KeyError), match=complaint), trial():
        Path("fine").touch()
        deed()


# --- odd values -----------------------------------------------------------------------------------

NUMBERS = ("0", "-1", "1", "3", "1e400", "nan", "-inf", "1e-320", "0x10", "", "5.0", "٣", "1e-5",
           "8193", "2", "0.01", "0.5", "1e308", "-0.0")
NAMES = ("a.jpg", "../../evil.jpg", "/evil.png", "..\\evil.jpg", "C:\\evil.png", "x\n.jpg", ".jpg",
         "\x1b[31m.png", "é.png", "a/b.jpg", "dir.jpg/", "a.jpg/a.jpg", " .bmp", "n" * 240 + ".jpg",
         "A.JPEG", "a.txt", "\udcff.jpg", "...png", "-p.webp")
YAMLS = ("!!python/object/apply:os.system ['true']", "[" * 4000, "2024-13-99", "!!timestamp x",
         "? [1]\n: 2", "\0", "\xff", "<<: 3", "{1: 2, a: 3}", "- 1", ".nan", "-.inf", "~", "'",
         "a: b: c", "%YAML 9.9", "@", "--- 1\n--- 2", "\ufeff", "\t")
JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                     lambda inner: st.lists(inner, max_size=4)
                     | st.dictionaries(st.text(max_size=9), inner, max_size=4), max_leaves=8)
WORDS = st.sampled_from((*NUMBERS, *NAMES, "nope", "[", "~", "/dev/null", "..", ".", "/", "a" * 300)
                        ) | st.text(st.characters(exclude_characters="\0",
                                                  exclude_categories=("Cs",)), max_size=12)
PARAMETERS = st.sampled_from(("seed", "data", "budget", "learning_rate", "table1_methods", "device",
                              "weights", "profile", "depth", "nope", ""))
TEXTS = st.sampled_from(YAMLS) | WORDS | JSONS.map(lambda v: yaml.safe_dump(v, allow_unicode=True))

FRACTIONS = st.floats(0, 1, exclude_max=True)
EDITS = st.just([]) | st.lists(st.tuples(
    FRACTIONS | FRACTIONS.map(lambda w: w**4), st.sampled_from((0, 1, 4, 12, 10**9)),
    st.binary(max_size=12) | st.sampled_from(
        (b"\xff" * 4, b"\0" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80" + b"\0" * 7))),
    max_size=5)


def damaged(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """The content with some bytes at some places, often near its head, replaced by others."""
    for where, gone, put in edits:
        i = int(where * len(content))
        content = content[:i] + put + content[i + gone:]
    return content


# --- images ---------------------------------------------------------------------------------------


@functools.cache
def pictures() -> dict[str, bytes]:
    """A small picture in every format and mode that a file may bring."""
    photo = Image.fromarray(skimage.data.astronaut()).resize((24, 20))
    exif = photo.getexif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)
    grey, moving = photo.convert("L"), {"save_all": True, "append_images": [photo.rotate(9)]}
    wanted = {
        "a.jpg": (photo, {"exif": exif}), "cmyk.jpg": (photo.convert("CMYK"), {}),
        "a.png": (photo, {}), "grey.png": (grey, {}), "alpha.png": (photo.convert("RGBA"), {}),
        "palette.png": (photo.quantize(8), {"transparency": 0}), "bit.png": (grey.convert("1"), {}),
        "deep.png": (deep, {}), "one.png": (photo.resize((1, 1)), {}), "a.webp": (photo, {}),
        "anim.webp": (photo, moving), "anim.png": (photo, moving),
        "anim.gif": (photo.quantize(8), {**moving, "append_images": [photo.quantize(4)]}),
        "a.bmp": (photo, {}), "a.tif": (photo, {"compression": "tiff_lzw"}),
        "deep.tif": (deep, {}), "float.tif": (grey.convert("F"), {}), "a.ppm": (photo, {}),
        "lab.tif": (Image.new("LAB", (9, 9)), {}), "a.jp2": (photo, {}), "a.eps": (photo, {}),
        "wide.gif": (Image.new("P", (8200, 8200)), {}),
        "bomb.png": (Image.new("1", (20_000, 20_000)), {}),
    }
    kinds, files = Image.registered_extensions(), {}
    for name, (image, options) in wanted.items():
        buffer = io.BytesIO()
        image.save(buffer, kinds[Path(name).suffix], **options)
        files[name] = buffer.getvalue()
    return files


CONTENTS = st.deferred(lambda: st.sampled_from(list(pictures().values()))) | st.binary(max_size=9)


@fuzz
@given(st.deferred(lambda: st.sampled_from(sorted({*pictures()} - {"wide.gif"}))), EDITS)
def test_pictures_to_restore(name, edits):
    with trial() as folder:
        file = folder / name
        file.write_bytes(damaged(pictures()[name], edits))
        pages = files.read_pictures(file)
        assert all(page.pixels.dim() == 3 and page.pixels.isfinite().all() for page in pages)
        again = folder / f"out{pages[0].suffix}"
        files.write_pictures(again, pages)
        for page, other in zip(pages, files.read_pictures(again), strict=True):
            assert torch.equal(page.pixels, other.pixels)


@fuzz
@given(st.lists(st.tuples(
    st.sampled_from([n.strip("/") for n in NAMES if ".." not in n and not n.startswith("/")]),
    st.sampled_from(("file", "folder", "pipe", "nowhere", ".", "/etc/passwd")), CONTENTS),
    max_size=5), EDITS)
def test_data_folders(files, edits):
    with trial() as folder:
        for name, kind, content in files:
            path = folder / "data" / name
            if os.path.lexists(path):
                continue  # to write into a pipe would wait for ever
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                path.parent.mkdir(exist_ok=True, parents=True)
                if kind == "file":
                    path.write_bytes(damaged(content, edits))
                elif kind == "folder":
                    path.mkdir()
                elif kind == "pipe":
                    os.mkfifo(path)
                else:
                    path.symlink_to(path if kind == "." else kind)
        data.load_images(folder / "data", 8, warn=str.encode)


# --- commands -------------------------------------------------------------------------------------


FILES = ("a.jpg", "grey.png", "one.png", "bomb.png", "a.eps", "deep.png", "nowhere.png", "text.png",
         "pipe.png", "dir.png", ".", "a.jpg", "a.jpg")
OPTIONS = st.sampled_from(("--kernel", "--border", "--range", "--noise-std", "--seed", "--limit",
                           "--profile", "--folder", "--only", "--protocol", "--device", "--method",
                           "--data", "--weights", "-p", "--frozen", "--force", "--help", "-", "--"))


@fuzz
@given(name=st.sampled_from(("blur", "blur", "deblur", "deblur", "evaluate", "reproduce", "train",
                             "sweep", "doctor", "nope", "")),
       files=st.lists(st.sampled_from(FILES), min_size=1, max_size=2),
       method=st.sampled_from(sorted(methods.METHODS)),
       parameter=st.builds("{}={}".format, PARAMETERS, TEXTS).map(lambda t: t.replace("\0", "")),
       options=st.lists(st.tuples(OPTIONS, WORDS), max_size=3))
def test_command_lines(weights, name, files, method, parameter, options):
    with trial() as folder:
        data, out = folder / "in", str(folder / "out")
        (data / "dir.png").mkdir(parents=True)
        os.mkfifo(data / "pipe.png")
        for file, content in {**pictures(), "text.png": b"text"}.items():
            if file in FILES or file == "text.png":
                (data / file).write_bytes(content)
        images, own = [str(data / f) for f in files], ["--weights", str(weights)]
        words = {
            "blur": [*images, "--out", out],
            "deblur": [*images, "--out", out, "--method", method, *own],
            "evaluate": ["--data", str(data), "--limit", "2", "--method", "tikhonov", "--json",
                         f"{out}/{files[0]}", *own],
            "train": ["denoiser", "-p", parameter], "reproduce": ["-p", parameter],
            "sweep": [images[0]],
            "doctor": ["--data", str(data), *own],
        }.get(name, [])
        command(name, *words, *(word for option in options for word in option))
