"""What commands share: messages, compiled programs on disk, and how they end."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mobilenet_jax.malloc import describe_allocator


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


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """The flag --compilation_cache."""
    parser.add_argument(
        "--compilation_cache",
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/mobilenet_jax"),
        help="folder of compiled programs, or off; default: %(default)s",
    )


def configure_memory(folder: str) -> str:
    """Keep compiled programs in a folder, unless it is "off"; say how buffers are allocated (`malloc`)."""
    import jax

    if folder != "off":
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return describe_allocator()


def show_own_messages() -> None:
    """Notes of this package on stderr; of the libraries below it, warnings and errors alone."""
    from absl import logging as absl_logging

    package = str(Path(__file__).parent) + os.sep
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(package))
    logging.basicConfig(format="%(message)s", handlers=[handler], force=True)
    absl_logging.set_verbosity(absl_logging.INFO)
