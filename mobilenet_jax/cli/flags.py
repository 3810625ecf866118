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


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags by which several processes find each other (`startup.configure_jax`)."""
    parser.add_argument("--distributed", action="store_true", help="find the cluster (TPU pod, SLURM) and join it")
    parser.add_argument("--coordinator_address", help="HOST:PORT of process 0, to join by hand")
    parser.add_argument("--num_processes", type=int, help="with --coordinator_address")
    parser.add_argument("--process_id", type=int, help="with --coordinator_address")
