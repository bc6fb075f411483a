"""Runs that are killed at moments drawn from a seed, or disturbed otherwise.

They are small runs of `jfbnb train` and `jfbnb reproduce`. The next run must end with the results
of an undisturbed run: the same weights, tables and figures byte for byte, no file half written
and nothing left over. `make faults` tries all kinds, the ordinary tests one kill.

For Linux. A full disk and a read-only one are small file systems in memory, which need root.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from jfbnb.common import UNFINISHED
from jfbnb.core.denoisers import Denoiser, DnCNN
from jfbnb.run.checkout import ROOT
from jfbnb.training.weights import save_weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills the Linux way")
KILLS = int(os.environ.get("JFBNB_KILLS", 0))
SEED = os.environ.get("JFBNB_SEED", "0")
campaign = pytest.mark.skipif(not KILLS, reason="`make faults` tries it")

LIMIT = 300.0  # seconds after which a run counts as hanging
PARTS = 10  # of a training, each with a checkpoint
SMALL = ("--data data -p budget=3000 -p pretrain_epochs=3 -p crop=16 -p pretrain_crop=16 "
         "-p batch_size=4 -p pretrain_batch_size=4 -p depth=2 -p width=4 -p n_train=10 -p n_test=4 "
         "-p n_validation=2 -p search_images=1 -p candidates=1 -p unconverged_limit=1.0")
ENDS = {".png": b"IEND\xae\x42\x60\x82", ".pdf": b"%%EOF"}  # of a whole file
RUNNER, KERNEL = "jfbnb", "ipykernel_launcher"  # words of the processes' command lines


def half_files(folder: Path) -> list[Path]:
    """The files below `folder` that have their final name and cannot be read whole."""
    return [path for path in folder.rglob("[!.]*") if path.is_file() and not is_whole(path)]


def is_whole(path: Path) -> bool:
    read = {".safetensors": load_file, ".json": lambda path: json.loads(path.read_text())}
    with contextlib.suppress(ValueError, SafetensorError):
        read.get(path.suffix, Path.stat)(path)
        return ENDS.get(path.suffix, b"") in path.read_bytes()[-16:]
    return False


def contents(folder: Path) -> dict[str, bytes]:
    """What must come out the same: weights, tables and figures, without the times that they took.

    Checkpoints are among the means, not the ends.
    """
    found = {}
    for path in folder.rglob("*.*"):
        if path.suffix == ".csv":
            table = pd.read_csv(path).drop(columns="seconds", errors="ignore")
            found[str(path.relative_to(folder))] = table.to_csv().encode()
        elif path.suffix in (".safetensors", ".md", ".tex", ".png", ".pdf") \
                and "checkpoints" not in path.parts:
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


class Job:
    """A command and the folder that it writes: as it was before, as it is now, as it must become.

    Args:
        begun, again: what the command prints when its work begins, and when none is left to do.
    """

    def __init__(self, base: Path, command: str, begun: str, again: str):
        self.base, self.command, self.begun, self.again = base, command, begun, again
        self.work, self.log = base / "work", base / "log"
        (base / "data").mkdir()
        photo = Image.fromarray(skimage.data.astronaut())
        for i in range(14):
            photo.crop((20 * i, 20 * i, 20 * i + 128, 20 * i + 128)).save(base / f"data/{i:02}.png")

    def learn(self) -> None:
        """Note what is there before it, and how it ends undisturbed."""
        shutil.copytree(self.work, self.base / "before")
        process, clock = self.begin(), time.monotonic()
        assert process.wait(LIMIT) == 0, self.said
        self.seconds, self.wanted = time.monotonic() - clock, contents(self.work)
        assert self.wanted and not half_files(self.work)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def start(self, command: str | None = None, **fault: object) -> subprocess.Popen:
        """Start it, in a session of its own; the fault travels by the environment."""
        words = f"{command or self.command} {SMALL}".split()
        environment = {"PYTHONPATH": f"{ROOT / 'tests' / 'hook'}{os.pathsep}{ROOT}",
                       "JFBNB_WORK": str(self.work), "XDG_CACHE_HOME": str(self.base / "cache"),
                       "JFBNB_FAULT": json.dumps(fault)}
        with open(self.log, "w") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", RUNNER, *words], env={**os.environ, **environment},
                cwd=self.base, stdout=stream, stderr=stream, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def finish(self, command: str | None = None) -> None:
        status = self.start(command).wait(LIMIT)
        assert status == 0, f"status {status}: {self.said}"

    def begin(self) -> subprocess.Popen:
        process, end = self.start(), time.monotonic() + LIMIT
        while self.begun not in self.said:
            assert time.monotonic() < end and process.poll() is None, self.said
            time.sleep(0.01)
        return process

    def resumes(self) -> None:
        """Run it again, undisturbed, and look at how it ends."""
        assert not half_files(self.work)
        reached = re.findall(r"^(?:epoch|resumed after epoch) (\d+)", self.said, re.M)
        self.finish()
        resumed = re.findall(r"^resumed after epoch (\d+)", self.said, re.M)
        assert int([0, *resumed][-1]) >= int([0, *reached][-1]), "done parts were lost"
        found = contents(self.work)
        assert not [name for name in found.keys() | self.wanted.keys()
                    if found.get(name) != self.wanted.get(name)], "not the same"
        assert not list(self.work.rglob(f"{UNFINISHED}*")), "left over"

    def refused(self, process: subprocess.Popen, says: str) -> None:
        assert process.wait(LIMIT) == 2 and says in self.said, self.said
        assert "Traceback" not in self.said, self.said


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Job:
    job = Job(tmp_path_factory.mktemp("training"), "train jfb --from start", "training images",
              "of 3000 applications")
    torch.manual_seed(0)
    save_weights(job.base / "start/denoiser.safetensors", Denoiser(DnCNN(2, 4), 0.04), {})
    (job.work / "runs").mkdir(parents=True)
    job.learn()
    return job


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory) -> Job:
    """Notebook 3, after notebook 1."""
    job = Job(tmp_path_factory.mktemp("reproduction"), "reproduce --only 03", "expected",
              "unchanged, skipped")
    job.finish("reproduce --only 01")
    marker = job.work / "runs/quick/markers/02_tikhonov_gradient_descent.json"  # as if it had run
    marker.write_text(json.dumps({"inputs": {}, "outputs": {}, "parameters": {}, "seconds": 0}))
    job.learn()
    return job


@pytest.fixture(params=["training", "reproduction"])
def job(request) -> Iterator[Job]:
    job = request.getfixturevalue(request.param)
    shutil.rmtree(job.work)
    shutil.copytree(job.base / "before", job.work)
    yield job
    for left in psutil.Process().children(recursive=True):  # of a test that failed
        left.kill()


@pytest.fixture
def rng(request) -> random.Random:
    return random.Random(SEED + request.node.name)


# --- kills ----------------------------------------------------------------------------------------

TORN, MOVED = ("tempfile.mkstemp", "torn"), ("os.rename", "kill")
BEGUN, ANY_TIME = ("tempfile.mkstemp", "kill"), ("", "kill")
MOMENTS = (  # of which job, which process, what happens to which files, how often at the most
    ("training", RUNNER, TORN, "checkpoints", PARTS),
    ("reproduction", KERNEL, TORN, "checkpoints", 3),
    ("training", RUNNER, MOVED, "checkpoints", 3 * PARTS - 2),
    ("training", RUNNER, ANY_TIME, "", 1),
    ("reproduction", RUNNER, ANY_TIME, "", 1),
    ("reproduction", KERNEL, ANY_TIME, "", 1),
    ("reproduction", KERNEL, TORN, "figures", 6),
    ("reproduction", KERNEL, MOVED, "denoiser", 3),
    ("reproduction", RUNNER, BEGUN, "markers", 1),
    ("reproduction", RUNNER, MOVED, "markers", 1),
)


@pytest.mark.parametrize(("job", "number"), [
    (MOMENTS[i % len(MOMENTS)][0], i) for i in range(KILLS or 1)], indirect=["job"])
def test_kill(job, number, rng):
    _, process, (event, how), part, most = MOMENTS[number % len(MOMENTS)]
    if not event:
        return kill_any_time(job, process, rng)
    parent = process == KERNEL and how == "kill" and rng.random() < 0.5
    run = job.start(process=process, event=event, part=part, count=rng.randint(1, most), how=how,
                    parent=parent, bytes=rng.randrange(1, 3000))
    if process == KERNEL and not parent:
        job.refused(run, "03_dncnn")
    else:
        assert run.wait(LIMIT) in (-signal.SIGKILL, -signal.SIGXFSZ), f"missed: {job.said}"
    job.resumes()


def kill_any_time(job: Job, process: str, rng: random.Random) -> None:
    """Half the time of the runner alone: its kernel is then an orphan as the next run starts."""
    run = job.begin()
    time.sleep(rng.uniform(0, job.seconds))
    victims = kernels(run) if process == KERNEL or rng.random() < 0.5 else []
    if process == RUNNER:
        run.kill()
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    assert run.wait(LIMIT) in (0, 2 if process == KERNEL else -signal.SIGKILL), job.said
    assert "Traceback" not in job.said, job.said
    job.resumes()


def kernels(run: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


# --- other disturbances --------------------------------------------------------------------------


@campaign
@pytest.mark.parametrize("number", range(3))
def test_ctrl_c(job, rng, number):
    run = job.begin()
    time.sleep(rng.uniform(0, 0.8 * job.seconds))
    alive = kernels(run)
    os.killpg(run.pid, signal.SIGINT)
    assert run.wait(LIMIT) in (130, 0 if job.again in job.said else 130), job.said
    # A kernel that is shut down in the middle of a cell may print a traceback of ipykernel's own.
    assert "cli.py" not in job.said and not psutil.wait_procs(alive, timeout=5)[1], job.said
    job.resumes()


@campaign
@pytest.mark.parametrize("room", ["4k", "16k", "read-only"])
def test_bad_disk(job, room):
    with small_disk(job.work / "runs") as remount:
        shutil.copytree(job.base / "before/runs", job.work / "runs", dirs_exist_ok=True)
        used = shutil.disk_usage(job.work / "runs").used // 1024
        remount("ro" if room == "read-only" else f"size={used + int(room[:-1])}k")
        job.refused(job.start(), "ead-only" if room == "read-only" else "pace")
        remount("rw,size=100m")
        job.resumes()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system in memory in the place of a folder; yields what changes its options."""
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder), "-o"]
    if subprocess.run([*mount, "size=100m"], check=False).returncode:
        pytest.skip("may not mount a small disk")
    try:
        yield lambda options: subprocess.run([*mount, f"remount,{options}"], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_it_notices_what_is_broken(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    save_file({"x": torch.zeros(9)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.pdf").write_bytes(b"%PDF %%EOF")
    (tmp_path / "a.csv").write_text("loss,seconds\n12,1\n")
    whole = contents(tmp_path)
    (tmp_path / "a.csv").write_text("loss,seconds\n12,2\n")
    assert half_files(tmp_path) == [] and contents(tmp_path) == whole
    (tmp_path / "a.csv").write_text("loss,seconds\n1,2\n")
    for path in tmp_path.glob("a.[!c]*"):
        path.write_bytes(path.read_bytes()[:-1])
    found = contents(tmp_path)
    assert len(half_files(tmp_path)) == 4 and not any(found[name] == whole[name] for name in whole)
