"""Strikes its own process at a chosen moment. `faults.py` installs it in what it starts; a kernel
gets it as the `sitecustomize` that Python imports first.

A moment is the n-th time that Python reports an audit event about a file whose path has a certain
part, such as the renaming of something in checkpoints/. So no code of the project knows of it.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path


def install(fault: dict) -> None:
    """Wait for the moment.

    Args:
        fault: `event` and `part` and `count`, the moment; `how`, what happens then: "kill", "torn"
            (killed in the middle of the next file that is longer than `bytes`) or "memory" (no more
            than `bytes` to have); `parent`, to kill the parent too; `hit`, a file that then says
            what was hit.
    """
    left = fault["count"]

    def hear(event: str, args: tuple) -> None:
        nonlocal left
        if left and event == fault["event"] and any(fault["part"] in str(a) for a in args[:2]):
            left -= 1
            if not left:
                names = [Path(str(a)).name for a in args[:2] if isinstance(a, (str, os.PathLike))]
                Path(fault["hit"]).write_text(f"{event} {' to '.join(names)}")
                strike(fault)

    sys.addaudithook(hear)


def strike(fault: dict) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if fault["how"] == "torn":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    elif fault["how"] == "memory":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + fault["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    else:
        if fault["parent"]:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


if "JFBNB_FAULT" in os.environ:
    install(json.loads(os.environ["JFBNB_FAULT"]))
