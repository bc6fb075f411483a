"""Strikes its own process at a chosen moment. Python imports it before all else, by its name.

A moment is the n-th time that Python reports an audit event about a file whose path has a certain
part, such as the renaming of something in checkpoints/. So no code of the project knows of it.
"""

import json
import os
import resource
import signal
import sys

FAULT = json.loads(os.environ.get("JFBNB_FAULT", "{}"))  # see test_faults.py


def hear(event: str, args: tuple) -> None:
    if (FAULT["count"] and event == FAULT["event"]
            and any(FAULT["part"] in str(a) for a in args[:2])):
        FAULT["count"] -= 1
        if not FAULT["count"]:
            strike()


def strike() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if FAULT["how"] == "torn":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_FSIZE, (FAULT["bytes"], resource.RLIM_INFINITY))
    else:
        for victim in [os.getppid()] * FAULT["parent"] + [os.getpid()]:
            os.kill(victim, signal.SIGKILL)


if FAULT and FAULT["process"] in sys.orig_argv:
    sys.addaudithook(hear)
