"""All commands under one name: mobilenet-jax COMMAND, or python -m mobilenet_jax COMMAND."""

import argparse
import importlib
import sys

from mobilenet_jax import __version__
from mobilenet_jax.cli.allocator import restart_tuned

# {command: (its module, what it does, whether it computes enough for the allocator to matter)}
COMMANDS = {
    "train": ("main", "train or evaluate a network by a recipe or a config file of yours", True),
    "main": ("main", "the same as train", True),
    "ablate": ("ablate", "run a study: compare variants of a network", True),
    "predict": ("predict", "name what is on images", True),
    "diagnose": ("diagnose", "show where a network loses information", True),
    "export": ("export", "write a network for phones, browsers and other runtimes", True),
    "convert": ("convert", "convert weights of any format", False),
    "summary": ("summary", "print the costs of a network", False),
}


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command and its arguments; argparse ends the program if it cannot understand them."""
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{text}" for name, (_, text, _) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="mobilenet-jax",
        description="MobileNet V1 to V4 and EdgeTPU in JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{lines}\n\nmobilenet-jax COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=", ".join(COMMANDS))
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the arguments of the command")
    return parser.parse_args(argv)


def main() -> int:
    """Run the command that the command line names; return its exit code."""
    flags = parse(sys.argv[1:])
    module, _, computes = COMMANDS[flags.command]
    if computes:
        restart_tuned()
    return importlib.import_module(f"mobilenet_jax.{module}").main(flags.arguments)


if __name__ == "__main__":
    sys.exit(main())
