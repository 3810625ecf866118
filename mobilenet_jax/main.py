"""Train or evaluate a MobileNet: python -m mobilenet_jax.main --config configs/v2.py [--config.KEY=VALUE ...]

The same command continues a run that was stopped, and prints the result of a run that is finished.
"""

import argparse
import io
import itertools
import json
import sys
import time

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import apply_preprocessing, load_config, split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_cluster_flags, add_weights_flags
from mobilenet_jax.cli.startup import configure_jax, show_own_messages

_START = time.perf_counter()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return (flags, overrides): the overrides are the --config.KEY=VALUE arguments, wherever they stand."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides a key of the config, as --config.train.epochs=5; "
        "docs/config.md lists all keys",
    )
    parser.add_argument(
        "--config", required=True, help="a recipe such as v2, or a config file; with an argument as v2:ARGUMENT"
    )
    parser.add_argument(
        "--workdir",
        help="folder of checkpoints, metrics and figures, which may be gs://... or s3://...; default: runs/NAME",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "eval", "check"),
        default="train",
        help="train; eval: evaluate the newest checkpoint; check: read every image of the data once and report the bad "
        "ones; default: train",
    )
    parser.add_argument(
        "--profile",
        type=_parse_steps,
        metavar="START:STOP",
        help="trace these training steps into WORKDIR/profile, for TensorBoard and Perfetto",
    )
    use = "with --mode=eval, evaluate these instead of the run in the workdir: an exported .tflite or .onnx file, or "
    add_weights_flags(parser, "--weights", use=use)
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="use only programs of XLA that give the same bits each time: slower on a GPU, no effect elsewhere",
    )
    add_cache_flag(parser)
    add_cluster_flags(parser)
    arguments, overrides = split_overrides(argv)
    return parser.parse_args(arguments), overrides


def _parse_steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}; valid: START:STOP with 1 <= START <= STOP")
    return int(first), int(last)


def train(flags: argparse.Namespace, config, workdir: str) -> str | None:
    """Train; return the result as JSON, or None if a signal stopped the run."""
    from mobilenet_jax.training.run import train_and_evaluate

    seconds = {"import": time.perf_counter() - _START}
    result = train_and_evaluate(config, workdir, profile=flags.profile, seconds=seconds)
    if "stopped" in result:
        print(f"{result['stopped']}: saved at step {result['step']:,}; the same command continues", file=sys.stderr)
        return None
    print(
        f"result of {workdir}: top1 {result['top1']:.4f}, loss {result['loss']:.4f}, on {result['count']} images, "
        f"{result['variables']} variables of step {result['step']:,}",
        file=sys.stderr,
    )
    return json.dumps(result)


def evaluate_weights(flags: argparse.Namespace, config, workdir: str, overrides: list[str]) -> str:
    """Evaluate --weights on the data of the config; return the metrics as JSON.

    The first process also writes them to evaluation.json.
    Images are prepared as the card of the weights says, except for overrides.
    """
    import jax

    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.exporting.contract import is_exported, read_exported
    from mobilenet_jax.paths import as_path
    from mobilenet_jax.training import evaluate
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.workdir.files import write_json_atomic

    try:
        path = as_path(workdir) / "evaluation.json"
        if is_exported(flags.weights):
            weights = read_exported(flags.weights)
            card = weights.card
        else:
            weights = load_weights(flags.weights, flags.name, offline=flags.offline, select=flags.select)
            card = weights[2]
        apply_preprocessing(config, card, overrides)
        result = evaluate.evaluate_weights(weights, config.data)
        if is_first := jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_atomic(path, result)
    except (UnreadableImageError, ChildProcessError):
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    if is_first:
        print(f"written to {path}", file=sys.stderr)
    return json.dumps(result)


def check_images(config) -> int:
    """Read every image of the config's data once; print the bad ones and their number; return the exit code."""
    from tqdm import tqdm

    from mobilenet_jax.data.check import read_all
    from mobilenet_jax.data.sources import describe_split, open_splits
    from mobilenet_jax.training.progress import Progress

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names are any bytes
    try:
        splits = open_splits(config.data)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    bad, total = 0, sum(map(len, splits))
    for source in splits:
        print(describe_split(source), file=sys.stderr)
    with Progress(total, steps_per_epoch=None, batch_size=1, active=True) as progress:
        for done, problem in enumerate(itertools.chain(*map(read_all, splits)), start=1):
            if problem:
                bad += 1
                tqdm.write(problem, file=sys.stdout)
            progress.update(done, {})
    print(f"{total:,} images were read; {bad:,} of them are bad", flush=True)
    return 1 if bad else 0


def run(flags: argparse.Namespace, overrides: list[str]) -> int:
    """Do what the command line says; return the exit code. Raises UsageError for a command that cannot be obeyed."""
    config = load_config(flags.config, overrides)
    if flags.weights and flags.mode != "eval":
        raise UsageError("--weights is for --mode=eval; training starts from --config.init")
    show_own_messages()
    if flags.mode == "check":
        return check_images(config)
    configure_jax(flags)
    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.training.failures import FailureWatch
    from mobilenet_jax.training.run import NonFiniteError, RefusedError, evaluate_run

    workdir = flags.workdir or f"runs/{config.name}"
    if not (flags.workdir or flags.weights):
        print(f"workdir: {workdir}", file=sys.stderr)
    failures = (NonFiniteError, UnreadableImageError, OSError)
    codes = {RefusedError: 2, UsageError: 2, **dict.fromkeys(failures, 1), KeyboardInterrupt: 130}
    try:
        with FailureWatch(codes):
            if flags.weights:
                text = evaluate_weights(flags, config, workdir, overrides)
            elif flags.mode == "eval":
                text = json.dumps(evaluate_run(config, workdir))
            else:
                text = train(flags, config, workdir)
    except RefusedError as error:
        raise UsageError(str(error)) from error
    except failures as error:
        print(error, file=sys.stderr)
        return 1
    if text:
        print(text)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 for a run that failed, 2 for a command that cannot be obeyed."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)
    again = "interrupted; the same command continues from the last checkpoint"
    return get_exit_code(lambda: run(flags, overrides), interrupted=again)


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
