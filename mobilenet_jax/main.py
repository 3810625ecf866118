"""Train or evaluate a MobileNet: python -m mobilenet_jax.main --config configs/v2.py [--config.KEY=VALUE ...]

The same command continues a run that was stopped, and prints the result of one that is finished.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import apply_preprocessing, load_config, split_overrides
from mobilenet_jax.cli.exit_codes import UsageError, get_exit_code
from mobilenet_jax.cli.flags import add_cache_flag, add_weights_flags
from mobilenet_jax.cli.startup import configure_memory, show_own_messages

_START = time.perf_counter()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags, overrides): the overrides are the --config.KEY=VALUE arguments, wherever they stand."""
    parser = argparse.ArgumentParser(
        prog="python -m mobilenet_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE overrides a key of the config, as --config.train.epochs=5; "
        "configs/base.py lists all keys",
    )
    parser.add_argument("--config", required=True, help="a config file, with an argument as FILE:ARGUMENT")
    parser.add_argument("--workdir", help="where checkpoints, metrics and figures go; default: runs/NAME")
    parser.add_argument("--mode", choices=("train", "eval"), default="train", help="default: train")
    add_weights_flags(parser, "--weights", use="with --mode=eval, evaluate these instead of the run in the workdir: ")
    add_cache_flag(parser)
    parser.add_argument("--distributed", action="store_true", help="find the cluster (TPU pod, SLURM) and join it")
    parser.add_argument("--coordinator_address", help="HOST:PORT of process 0, to join by hand")
    parser.add_argument("--num_processes", type=int, help="with --coordinator_address")
    parser.add_argument("--process_id", type=int, help="with --coordinator_address")
    arguments, overrides = split_overrides(argv)
    return parser.parse_args(arguments), overrides


def configure_jax(flags: argparse.Namespace) -> None:
    """Join the other processes, if any, keep compiled programs on disk, and a CPU's buffers in memory."""
    import jax

    print(configure_memory(flags.compilation_cache), file=sys.stderr)
    if flags.coordinator_address:
        jax.distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)
    elif flags.distributed:
        jax.distributed.initialize()


def run(flags: argparse.Namespace, config) -> int:
    """Train or evaluate; return the exit code."""
    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.training.run import NonFiniteError, Run

    show_own_messages()
    configure_jax(flags)
    workdir = flags.workdir or f"runs/{config.name}"
    if not flags.workdir:
        print(f"workdir: {workdir}", file=sys.stderr)
    imported = time.perf_counter() - _START
    try:
        prepared = Run(config, workdir)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    with prepared:
        prepared.seconds = {"import": imported, **prepared.seconds}
        try:
            if flags.mode == "eval":
                print(json.dumps(prepared.evaluate()))
                return 0
            if prepared.finished_result:
                print(f"{workdir} is finished; more train.epochs or train.steps continue it", file=sys.stderr)
            elif prepared.start_step:
                print(f"continuing {workdir} from step {prepared.start_step:,}", file=sys.stderr)
            result = prepared.train()
        except (NonFiniteError, UnreadableImageError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    if "stopped" in result:
        print(f"{result['stopped']}: saved at step {result['step']:,}; the same command continues", file=sys.stderr)
        return 0
    print(
        f"result of {workdir}: top1 {result['top1']:.4f}, loss {result['loss']:.4f}, on {result['count']} images, "
        f"{result['variables']} variables of step {result['step']:,}",
        file=sys.stderr,
    )
    print(json.dumps(result))
    return 0


def run_weights(flags: argparse.Namespace, config, overrides: list[str]) -> int:
    """Evaluate weights on the config's data, prepared as their card says but for overrides; return the exit code."""
    from mobilenet_jax.data.decode import UnreadableImageError
    from mobilenet_jax.training.evaluate import evaluate_weights
    from mobilenet_jax.weights.load import load_weights
    from mobilenet_jax.workdir.files import write_json_atomic

    if flags.mode != "eval":
        raise UsageError("--weights is for --mode=eval; training starts from --config.init")
    show_own_messages()
    configure_jax(flags)
    path = Path(flags.workdir or f"runs/{config.name}") / "evaluation.json"
    try:
        weights = load_weights(flags.weights, flags.name, offline=flags.offline)
        apply_preprocessing(config, weights[2], overrides)
        result = evaluate_weights(weights, config.data)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, result)
    except UnreadableImageError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"written to {path}", file=sys.stderr)
    print(json.dumps(result))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; return the exit code: 0, 1 for a run that failed, 2 for a command that cannot be obeyed."""
    flags, overrides = parse(sys.argv[1:] if argv is None else argv)

    def obey() -> int:
        config = load_config(flags.config, overrides)
        return run_weights(flags, config, overrides) if flags.weights else run(flags, config)

    return get_exit_code(obey, interrupted="interrupted; the same command continues from the last checkpoint")


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
