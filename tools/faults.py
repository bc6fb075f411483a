"""A fault campaign: `make faults`, with a report in build/faults/.

A small training, and notebooks 1 and 3 with small parameters in a copy of the project, are killed
at moments drawn from a seed, and meet a full disk, a read-only one, too little memory, Ctrl-C, a
second run, wrong file times. Each time the next run must end as one that nothing happened to:
weights, tables and figures alike byte for byte, and nothing half written in their place.

For Linux. A full disk and a read-only one are small file systems in memory, which need root.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import fault_hook
import pandas as pd
import papermill  # noqa: F401  imported once, before the processes fork
import psutil
import torch
from safetensors import safe_open

from jfbnb import cli, datasets, reproduce
from jfbnb.common import UNFINISHED
from jfbnb.figures import save_table
from jfbnb.maps import PreconditionedMap
from jfbnb.networks import DnCNN, Regulariser, save_regulariser
from jfbnb.operators import Blur
from jfbnb.training import EquilibriumLoss, TrainingConfig, train

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300.0  # seconds after which a run counts as hanging
EPOCHS = 12
ENDS = {".png": b"IEND\xae\x42\x60\x82", ".pdf": b"%%EOF"}  # of a whole file
SMALL = ("pretrain_epochs=3", "depth=2", "width=4", "pretrain_crop=16", "pretrain_batch_size=64")


@dataclass
class Result:
    """What was done to which part, when, and what was wrong afterwards ("" if nothing)."""

    part: str
    fault: str
    moment: str
    wrong: str


# --- processes ------------------------------------------------------------------------------------


def fork(run: Callable[[], int], log: Path, fault: dict | None = None) -> int:
    """Start `run` in a process and a session of its own, its prints into `log`."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no run outlives this one
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if fault:
            fault_hook.install(fault)
        status = run()
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        print(f"OSError: {error}", flush=True)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(pid: int, seconds: float = LIMIT) -> int | None:
    """The exit status, negative for a signal; None if it still runs after that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def ended(pid: int) -> int | None:
    """The exit status; None for a run that hangs, which is killed."""
    status = wait(pid)
    if status is None:
        kill(pid)
        os.waitpid(pid, 0)
    return status


def kernels(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def kill(pid: int, with_kernels: bool = True) -> None:
    victims = kernels(pid) if with_kernels else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """A file system of that size at `folder`; yields what changes its options."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ("mount", "-t", "tmpfs", "-o")
    subprocess.run([*mount, f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield lambda options: subprocess.run(
            [*mount, f"remount,{options}", "tmpfs", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


# --- what must not happen -------------------------------------------------------------------------


def half_files(folder: Path) -> list[str]:
    """The files below `folder` that have their final name and cannot be read whole."""
    bad = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as stored:
                    list(map(stored.get_tensor, stored.keys()))
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif (end := ENDS.get(path.suffix)) and end not in path.read_bytes()[-16:]:
                raise ValueError("no end")
        except Exception as error:
            bad.append(f"{path.name} ({error})")
    return bad


def contents(*folders: Path) -> dict[str, bytes]:
    """What must come out the same: weights, tables and figures, without the times that they took.

    Checkpoints are among the means, not the ends.
    """
    ends = (".safetensors", ".csv", ".md", ".tex", ".png", ".pdf")
    return {str(path.relative_to(folder)): path.read_bytes()
            for folder in folders for path in folder.rglob("*")
            if path.suffix in ends and "checkpoints" not in path.parts
            and not path.name.startswith(".")}


def difference(found: dict[str, bytes], wanted: dict[str, bytes]) -> str:
    names = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    return f"not the same: {', '.join(names)}" if names else ""


def left_over(*folders: Path) -> str:
    names = [p.name for folder in folders for p in folder.rglob(f"{UNFINISHED}*")]
    return f"left over: {', '.join(names)}" if names else ""


# --- a training -----------------------------------------------------------------------------------


def training(folder: Path, images: torch.Tensor) -> int:
    """JFB on a few crops: its checkpoints, then its weights and its history as a table."""
    torch.manual_seed(0)
    S = Regulariser(DnCNN(3, 6), 0.1, 0.03)
    loss = EquilibriumLoss(PreconditionedMap(Blur(16, 5, 2.0), S), 0.01, 1e-3, 8, 1, 0.9, 0.1)
    config = TrainingConfig(EPOCHS, 4, 16, 1e-3, 0, unconverged_limit=1.0)
    history = train(S, loss, images, config, torch.device("cpu"), folder / "checkpoints",
                    log=lambda line: print(line, flush=True))
    save_regulariser(folder / "weights.safetensors", S, {})
    save_table(pd.DataFrame(history).drop(columns="seconds"), folder / "table", "History.")
    return 0


class TrainingFaults:
    """Faults of a training. Each method is one; `fresh` is the folder that it happens in."""

    part = "training"

    def __init__(self, base: Path):
        self.base = base
        self.fresh = base / "training"
        self.log = base / "training.log"
        self.images = datasets.bundled_photos("test", 24).images[:400:40].clone()
        clock = time.monotonic()
        status = ended(fork(lambda: training(base / "reference", self.images), self.log))
        if status != 0:
            raise SystemExit(f"the training fails by itself: {self.log.read_text()}")
        self.seconds = time.monotonic() - clock
        self.wanted = contents(base / "reference")
        newest = next(p for p in (base / "reference/checkpoints").iterdir()
                      if "previous" not in p.name)
        self.bytes = newest.stat().st_size

    def start(self, fault: dict | None = None) -> int:
        return fork(lambda: training(self.fresh, self.images), self.log, fault)

    def fault(self, event: str, count: int) -> dict:
        """A kill where that happens to a checkpoint for the `count`-th time."""
        return {"event": event, "part": "checkpoints", "count": count, "how": "kill",
                "parent": False, "hit": str(self.base / "hit")}

    def clear(self) -> None:
        shutil.rmtree(self.fresh, ignore_errors=True)
        (self.base / "hit").unlink(missing_ok=True)

    def goes_on(self, damaged: bool = False) -> str:
        """Run it again, undisturbed; say what is wrong with how it ends.

        Of files that we have damaged ourselves nothing is asked but that they do no harm.
        """
        wrong = [] if damaged else half_files(self.fresh)
        if wrong:
            return f"half files: {', '.join(wrong)}"
        reached = len(re.findall(r"^epoch ", self.log.read_text(), re.M))
        before = re.search(r"^resumed after epoch (\d+)", self.log.read_text(), re.M)
        reached += int(before[1]) if before else 0
        status = ended(self.start())
        text = self.log.read_text()
        if status != 0:
            return f"the next run ends with {status}: {text[-300:]}"
        resumed = re.search(r"^resumed after epoch (\d+)", text, re.M)
        resumed = int(resumed[1]) if resumed else 0
        if resumed < reached and not damaged:
            return f"epoch {reached} was done, and it went on from {resumed}"
        return difference(contents(self.fresh), self.wanted)

    def killed(self, rng: random.Random, number: int) -> Result:
        kind = ("any time", "torn", "any time", "begun", "moved")[number % 5]
        if kind == "any time":
            pid = self.start()
            delay = rng.uniform(0, self.seconds)
            status = wait(pid, delay)
            kill(pid)
            if status is None:
                wait(pid)
            moment = f"{kind}, after {delay / self.seconds:.0%} of its time"
            return Result(self.part, "SIGKILL", moment, self.goes_on())
        if kind == "moved":
            fault = self.fault("os.rename", rng.randint(1, 3 * EPOCHS - 2))
        else:
            fault = self.fault("tempfile.mkstemp", rng.randint(1, EPOCHS))
        if kind == "torn":
            fault |= {"how": "torn", "bytes": rng.randrange(1, self.bytes)}
        status = ended(self.start(fault))
        hit = self.base / "hit"
        if not hit.exists() or status not in (-signal.SIGKILL, -signal.SIGXFSZ):
            return Result(self.part, "SIGKILL", kind, f"missed its moment, status {status}")
        moment = f"checkpoint {kind}: {hit.read_text()}"
        return Result(self.part, "SIGKILL", moment, self.goes_on())

    def full_disk(self, rng: random.Random) -> Iterator[Result]:
        yield from self._disk("full disk", f"size={3 * self.bytes // 1024}k", "size=10m", "left")

    def read_only(self, rng: random.Random) -> Iterator[Result]:
        yield from self._disk("read-only disk", "ro", "rw", "Read-only")

    def _disk(self, fault: str, bad: str, good: str, says: str) -> Iterator[Result]:
        with small_disk(self.fresh, "10m") as remount:
            (self.fresh / "checkpoints").mkdir()
            remount(bad)
            status = ended(self.start())
            said = self.log.read_text().strip().splitlines()[-1:]
            remount(good)
            wrong = "" if status and says in str(said) else f"status {status}, said {said}"
            yield Result(self.part, fault, "a checkpoint", wrong or self.goes_on())

    def interrupted(self, rng: random.Random) -> Iterator[Result]:
        for _ in range(3):
            self.clear()
            pid = self.start()
            fraction = rng.uniform(0.1, 0.9)
            wait(pid, fraction * self.seconds)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT)
            status = wait(pid)
            wrong = "" if status in (0, 130) else f"status {status}"
            yield Result(self.part, "Ctrl-C", f"after {fraction:.0%}", wrong or self.goes_on())

    def wrong_clock(self, rng: random.Random) -> Iterator[Result]:
        for year, then in ((1970, 1.0), (2100, 4.1e9)):
            self.clear()
            ended(self.start(self.fault("os.rename", rng.randint(9, 3 * EPOCHS - 2))))
            for i, path in enumerate(sorted((self.fresh / "checkpoints").iterdir())):
                os.utime(path, (then - i, then - i))
            yield Result(self.part, "wrong clock", f"its files are of {year}", self.goes_on())

    def damaged(self, rng: random.Random) -> Iterator[Result]:
        for kind in ("a bit flipped", "cut short", "emptied"):
            self.clear()
            ended(self.start())
            file = next(p for p in (self.fresh / "checkpoints").iterdir()
                        if "previous" not in p.name)
            content = bytearray(file.read_bytes())
            place = rng.randrange(len(content))
            content[place] ^= 1 << rng.randrange(8)
            file.write_bytes({"a bit flipped": bytes(content), "cut short": content[:place],
                              "emptied": b""}[kind])
            wrong = self.goes_on(damaged=True)
            text = self.log.read_text()
            if f"resumed after epoch {EPOCHS - 1}" not in text or file.name not in text:
                wrong = wrong or f"not refused by name: {text[:200]}"
            yield Result(self.part, "damaged checkpoint", kind, wrong)


# --- a reproduce run ------------------------------------------------------------------------------


class ReproduceFaults:
    """Faults of notebooks 1 and 3, run by the runner in a copy of the project."""

    part = "reproduce"

    def __init__(self, base: Path):
        self.base = base
        self.project = base / "project"
        self.log = base / "reproduce.log"
        self.runs, self.figures = (self.project / n / "quick" for n in ("runs", "figures"))
        copy_project(self.project)
        self._finish("--only", "01")
        self.first = base / "after-01"
        for folder in (self.runs, self.figures):
            shutil.copytree(folder, self.first / folder.parent.name, symlinks=True)
        clock = time.monotonic()
        self._finish()
        self.seconds = time.monotonic() - clock
        self.wanted = contents(self.runs, self.figures)

    def _finish(self, *options: str) -> None:
        status = ended(self.start(options=options))
        if status != 0:
            raise SystemExit(f"reproduce fails by itself: {self.log.read_text()}")

    def start(self, fault: dict | None = None, options: tuple[str, ...] = (),
              log: Path | None = None) -> int:
        """Runner in a process of its own; a fault of a kernel travels by its environment."""
        def run() -> int:
            os.environ["PYTHONPATH"] = str(self.project)
            os.environ["OMP_NUM_THREADS"] = "1"
            if fault and fault["process"] == "kernel":
                os.environ["JFBNB_FAULT"] = json.dumps(fault)
            os.chdir(self.project)
            cli.ROOT = reproduce.ROOT = self.project
            reproduce.NOTEBOOKS = self.project / "notebooks"
            reproduce.PROFILES = reproduce.NOTEBOOKS / "profiles"
            known = reproduce.known_parameters()  # the profile has those of all steps
            reproduce.known_parameters = lambda: known
            reproduce.STEPS = tuple(s for s in reproduce.STEPS if s.name[:2] in ("01", "03"))
            small = [word for text in SMALL for word in ("-p", text)]
            return cli.main(["reproduce", *small, *options])

        own = fault if fault and fault["process"] == "runner" else None
        return fork(run, log or self.log, own)

    def clear(self, keep_first: bool = True) -> None:
        (self.base / "hit").unlink(missing_ok=True)
        for folder in (self.runs, self.figures):
            shutil.rmtree(folder, ignore_errors=True)
            if keep_first:
                shutil.copytree(self.first / folder.parent.name, folder)

    def goes_on(self) -> str:
        wrong = half_files(self.figures) + half_files(self.runs)
        if wrong:
            return f"half files: {', '.join(wrong)}"
        status = ended(self.start())
        if status != 0:
            return f"the next run ends with {status}: {self.log.read_text()[-300:]}"
        return difference(contents(self.runs, self.figures), self.wanted) \
            or left_over(self.runs, self.figures)

    def killed(self, rng: random.Random, number: int) -> Result:
        kinds = (
            ("checkpoint torn", "kernel", "tempfile.mkstemp", "checkpoints", 3, "torn"),
            ("figure torn", "kernel", "tempfile.mkstemp", "figures", 6, "torn"),
            ("marker begun", "runner", "tempfile.mkstemp", "markers", 1, "kill"),
            ("any time", "both", "", "", 1, "kill"),
            ("checkpoint moved", "kernel", "os.rename", "checkpoints", 7, "kill"),
            ("figure moved", "kernel", "os.rename", "figures", 6, "kill"),
            ("marker moved", "runner", "os.rename", "markers", 1, "kill"),
            ("any time", "runner", "", "", 1, "kill"),
            ("weights moved", "kernel", "os.rename", "denoiser", 2, "kill"),
            ("between steps", "runner", "subprocess.Popen", "ipykernel_launcher", 1, "kill"),
            ("any time", "kernel", "", "", 1, "kill"),
            ("provenance moved", "runner", "os.rename", "provenance", 1, "kill"),
        )
        kind, process, event, part, count, how = kinds[number % len(kinds)]
        if kind == "any time":
            return self._killed_any_time(rng, process)
        fault = {"event": event, "part": part, "count": rng.randint(1, count), "how": how,
                 "process": process, "parent": process == "kernel" and rng.random() < 0.5,
                 "hit": str(self.base / "hit"), "bytes": rng.randrange(1, 3000)}
        pid = self.start(fault)
        status = wait(pid)
        hit = self.base / "hit"
        if not hit.exists() or status == 0:
            return Result(self.part, "SIGKILL", kind, f"missed its moment, status {status}")
        moment = f"{kind}, of the {process}{' and its parent' if fault['parent'] else ''}: " \
            f"{hit.read_text()}"
        return Result(self.part, "SIGKILL", moment, self.goes_on())

    def _killed_any_time(self, rng: random.Random, process: str) -> Result:
        """Of the runner alone: its kernel is then an orphan, and the next run starts at once."""
        fraction = rng.uniform(0.05, 0.95)
        pid = self.start()
        status = wait(pid, fraction * self.seconds)
        if process == "kernel":
            for victim in kernels(pid):
                victim.kill()
        else:
            kill(pid, with_kernels=process == "both")
        status = wait(pid) if status is None else status
        moment = f"any time, of {process}, after {fraction:.0%} of its time"
        said = self.log.read_text()
        if (process == "kernel" and status not in (0, 2)) or "Traceback" in said:
            return Result(self.part, "SIGKILL", moment, f"status {status}: {said[-300:]}")
        return Result(self.part, "SIGKILL", moment, self.goes_on())

    def no_memory(self, rng: random.Random) -> Iterator[Result]:
        self.clear()
        fault = {"event": "tempfile.mkstemp", "part": "checkpoints", "count": 1, "how": "memory",
                 "process": "kernel", "parent": False, "hit": str(self.base / "hit"),
                 "bytes": 1 << 20}
        status = ended(self.start(fault))
        said = self.log.read_text()
        wrong = "" if status == 2 and "03_dncnn" in said and "Traceback" not in said else \
            f"status {status}: {said[-300:]}"
        yield Result(self.part, "no memory", "the kernel, from its first checkpoint on",
                     wrong or self.goes_on())

    def full_disk(self, rng: random.Random) -> Iterator[Result]:
        for size in ("16k", "60k"):
            yield from self._disk("full disk", f"size={size}", "size=100m", "pace")

    def read_only(self, rng: random.Random) -> Iterator[Result]:
        yield from self._disk("read-only disk", "ro", "rw", "ead-only")

    def _disk(self, fault: str, bad: str, good: str, says: str) -> Iterator[Result]:
        self.clear(keep_first=False)
        with small_disk(self.runs, "100m") as remount:
            remount(bad)
            status = ended(self.start())
            said = self.log.read_text()
            remount(good)
            wrong = "" if status == 2 and says in said and "Traceback" not in said else \
                f"status {status}: {said[-300:]}"
            yield Result(self.part, fault, f"runs/, {bad}", wrong or self.goes_on())

    def interrupted(self, rng: random.Random) -> Iterator[Result]:
        self.clear()
        pid = self.start()
        fraction = rng.uniform(0.3, 0.8)
        wait(pid, fraction * self.seconds)
        alive = kernels(pid)
        os.killpg(pid, signal.SIGINT)
        status = wait(pid)
        said = self.log.read_text()
        _, orphans = psutil.wait_procs(alive, timeout=5)
        wrong = "" if status == 130 and "Traceback" not in said else f"status {status}: {said}"
        wrong = wrong or (f"a kernel lives on: {orphans}" if orphans else "")
        yield Result(self.part, "Ctrl-C", f"after {fraction:.0%}", wrong or self.goes_on())

    def two_at_once(self, rng: random.Random) -> Iterator[Result]:
        self.clear()
        first = self.start()
        end = time.monotonic() + LIMIT
        while "expected" not in self.log.read_text() and time.monotonic() < end:
            time.sleep(0.05)
        other = self.base / "second.log"
        status, said = ended(self.start(log=other)), other.read_text()
        wrong = "" if status == 2 and "another run is writing" in said else f"{status}: {said}"
        status = ended(first)
        wrong = wrong or (f"the first ends with {status}" if status != 0 else "")
        yield Result(self.part, "two at once", "in one folder", wrong or self.goes_on())

    def wrong_clock(self, rng: random.Random) -> Iterator[Result]:
        self.clear()
        self._finish()
        for year, then in ((1970, 1.0), (2100, 4.1e9)):
            for path in (p for folder in (self.runs, self.figures) for p in folder.rglob("*")):
                os.utime(path, (then, then))
            wrong = self.goes_on()
            if self.log.read_text().count("unchanged, skipped") != 2:
                wrong = wrong or f"done again: {self.log.read_text()[-300:]}"
            yield Result(self.part, "wrong clock", f"its files are of {year}", wrong)


def copy_project(target: Path) -> None:
    """The tracked files that a run needs, and the hook where kernels find it."""
    names = subprocess.run(["git", "ls-files", "-z", "jfbnb", "notebooks", "data"], cwd=ROOT,
                           check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    shutil.copy2(fault_hook.__file__, target / "sitecustomize.py")


# --- the campaign ---------------------------------------------------------------------------------


def campaign(faults: TrainingFaults | ReproduceFaults, kills: int, number: int,
             only_kills: bool) -> Iterator[Result]:
    rng = random.Random(number)
    for i in range(kills):
        faults.clear()
        yield faults.killed(rng, i)
    others = ("interrupted", "wrong_clock", "damaged", "two_at_once", "no_memory", "full_disk",
              "read_only")
    for name in others[:0 if only_kills else None]:
        faults.clear()
        try:
            yield from getattr(faults, name, lambda _: ())(rng)
        except subprocess.CalledProcessError as error:
            print(f"not tried: {faults.part}, {name}: {error.stderr or error}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--kills", type=int, default=50, help="of the training")
    parser.add_argument("--reproduce-kills", type=int, default=30, help="0 leaves reproduce out")
    parser.add_argument("--only-kills", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop beginning new cases after that long")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "faults")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as text:
        for kind, kills in ((TrainingFaults, args.kills), (ReproduceFaults, args.reproduce_kills)):
            if not kills:
                continue
            for result in campaign(kind(Path(text)), kills, args.seed,
                                   args.only_kills):
                results.append(result)
                print(f"{'LOST' if result.wrong else 'ok  '} {result.part}, {result.fault}: "
                      f"{result.moment} {result.wrong}", flush=True)
                write_report(args.out, args.seed, results, time.monotonic() - start)
                if args.minutes and time.monotonic() - start > 60 * args.minutes:
                    break
    print((args.out / "report.md").read_text())
    return 1 if any(result.wrong for result in results) else 0


def write_report(out: Path, number: int, results: list[Result], seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {"seed": number, "seconds": round(seconds, 1), "results": [*map(asdict, results)]}
    (out / "report.json").write_text(json.dumps(record, indent=1) + "\n")
    table = pd.DataFrame(map(asdict, results))
    table["survived"] = table.wrong == ""
    rows = table.groupby(["part", "fault"], sort=False).survived.agg(["size", "sum"]).reset_index()
    rows.columns = ["of", "fault", "tried", "survived"]
    lost = [f"- {r.part}, {r.fault}, {r.moment}: {r.wrong}" for r in results if r.wrong]
    text = "\n".join(("# Fault campaign", "", f"Seed {number}, {seconds:.0f} s.", "",
                      rows.to_markdown(index=False), "", *lost))
    (out / "report.md").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
