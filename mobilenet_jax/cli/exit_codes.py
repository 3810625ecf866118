"""How commands end: one sentence for a mistake, and an exit code."""

import os
import sys
from collections.abc import Callable


class UsageError(ValueError):
    """A command line that cannot be obeyed, in one sentence."""


def get_exit_code(run: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """That of `run`; 2, with its sentence, for a UsageError, 130 for Ctrl-C, 1 where nobody reads stdout any more."""
    try:
        return run()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
