"""The setup of a process before JAX computes: log messages, and the cache of compiled programs."""

import argparse
import logging
import os
import sys
from pathlib import Path

from mobilenet_jax.cli.allocator import describe_allocator
from mobilenet_jax.cli.exit_codes import UsageError

# The first flag makes scatters and cuDNN's algorithms deterministic. The second ends the choice of a program by
# measuring, whose result may differ from run to run.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"


def configure_memory(folder: str) -> str:
    """Cache compiled programs in `folder`, unless it is "off"; return a line for the log about the allocator.

    Raises UsageError if JAX cannot start, for example because JAX_PLATFORMS names a device that is not there.
    """
    import jax

    if folder != "off":
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS")
        hint = f"JAX_PLATFORMS is {asked!r}; valid: the platform of a device that is free, or unset" if asked else ""
        raise UsageError(
            "; ".join(filter(None, [f"JAX finds no device: {str(error).splitlines()[0]}", hint]))
        ) from error
    return describe_allocator()


def configure_jax(flags: argparse.Namespace) -> None:
    """Configure XLA, memory and compiled programs, and join the other processes, if the flags name any."""
    if flags.deterministic:  # XLA reads the variable when the first device starts
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    import jax

    if flags.coordinator_address:
        jax.distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
    elif flags.distributed:
        jax.distributed.initialize()
    # After the other processes are joined: this starts the devices.
    print(configure_memory(flags.compilation_cache), file=sys.stderr)


def show_own_messages() -> None:
    """Log to stderr: all messages of this package, and only warnings and errors of other libraries."""
    from absl import logging as absl_logging

    package = str(Path(__file__).parents[1]) + os.sep
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or record.pathname.startswith(package))
    logging.basicConfig(format="%(message)s", handlers=[handler], force=True)
    absl_logging.set_verbosity(absl_logging.INFO)
