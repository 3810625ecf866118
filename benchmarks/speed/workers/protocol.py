"""A worker's half of the conversation: JSON lines in, JSON lines out. It needs only the standard library."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[int], float]  # number of steps -> seconds that they took
Load = Callable[[dict], tuple[Run, dict]]  # a case -> the function that runs steps, and facts about it for the report


class UnsupportedError(Exception):
    """This side does not support the case; the message says why, in one sentence."""


def measure_peak(run: Run) -> dict[str, int]:
    """Run three steps; return {"peak_bytes": the most memory that the process held meanwhile}.

    It is empty where Linux's /proc is missing.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return {}
    run(1)  # the first step may allocate what the others keep
    reset.write_text("5")  # forgets the peak of compilation; man 5 proc
    run(3)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_bytes": 1024 * int(status["VmHWM"].split()[0])}


def serve(load: Load) -> None:
    """Read a case, load it, then run as many steps as each line asks for, until the input ends.

    A framework that is not installed and a case that it does not support are answers. Any other exception ends the
    process with a traceback on stderr.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout, which must not look like a reply

    def reply(**values) -> None:
        print(json.dumps(values), file=replies, flush=True)

    case, start = json.loads(sys.stdin.readline()), time.perf_counter()
    try:
        run, about = load(case)
    except ModuleNotFoundError as error:
        reply(absent=f"{error} in {sys.executable}")
        return
    except UnsupportedError as error:
        reply(absent=str(error))
        return
    reply(about={**about, "load_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        reply(seconds=run(json.loads(line)))
