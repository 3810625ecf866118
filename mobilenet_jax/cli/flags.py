"""Flags that several commands share."""

import argparse
import os


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """The flag --compilation_cache."""
    parser.add_argument(
        "--compilation_cache",
        default=os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/mobilenet_jax"),
        help="folder of compiled programs, or off; default: %(default)s",
    )
