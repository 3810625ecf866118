"""Flags that several commands share."""

import argparse
import os


def add_cache_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag --compilation_cache."""
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


def add_weights_flags(parser: argparse.ArgumentParser, argument: str, *, use: str = "", **options) -> None:
    """Add an argument for weights, and --name, --select and --offline: what `load_weights` takes.

    Args:
      parser: the parser of the command.
      argument: the name of the argument, --weights or a positional one.
      use: the start of its help.
      options: of `add_argument`, as required=True.
    """
    parser.add_argument(
        argument,
        help=f"{use}a file or folder of PyTorch, Keras, transformers or TensorFlow-Slim, the workdir of a run, or a "
        "name: torchvision/mobilenet_v2, keras/MobileNetV2, hf:google/mobilenet_v2_1.0_224",
        **options,
    )
    parser.add_argument(
        "--name", help="the model in the weights, as timm/tf_mobilenetv3_large_100, if several have the same tensors"
    )
    parser.add_argument(
        "--select", help="which network of a checkpoint with several, as state_dict; default: averaged weights (EMA)"
    )
    parser.add_argument("--offline", action="store_true", help="use what was downloaded before, without a network")
