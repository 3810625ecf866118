"""Exit codes of commands: 0, 1 for a failure, 2 with one sentence for a mistake of the user, 130 for Ctrl-C."""

import os
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A mistake in a command line, or in a file that it names, in one sentence."""


def get_exit_code(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Return the exit code of `run`.

    For a UsageError, print its sentence and return 2. For Ctrl-C, print `interrupted` and return 130. If the reader of
    stdout has gone, as in `command | head`, return 1.
    """
    try:
        return run()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:
        # At exit, Python flushes stdout once more; that must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
