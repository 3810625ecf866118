"""What commands set up before JAX computes: messages, and compiled programs on disk."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mobilenet_jax.cli.allocator import describe_allocator


def configure_memory(folder: str) -> str:
    """Keep compiled programs in a folder, unless it is "off"; say how buffers are allocated (`malloc`)."""
    import jax

    if folder != "off":
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return describe_allocator()


def configure_jax(flags: argparse.Namespace) -> None:
    """Configure memory and compiled programs, and join the other processes, if the flags name any."""
    import jax

    print(configure_memory(flags.compilation_cache), file=sys.stderr)
    if flags.coordinator_address:
        jax.distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
    elif flags.distributed:
        jax.distributed.initialize()


def show_own_messages() -> None:
    """Notes of this package on stderr; of the libraries below it, warnings and errors alone."""
    from absl import logging as absl_logging

    package = str(Path(__file__).parents[1]) + os.sep
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(package))
    logging.basicConfig(format="%(message)s", handlers=[handler], force=True)
    absl_logging.set_verbosity(absl_logging.INFO)
