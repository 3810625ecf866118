"""Compare a linear probe, a frozen network, fine-tuning and training from scratch on a folder of images.

    python benchmarks/transfer.py DIR --init=WEIGHTS --workdir=runs/transfer --seeds=3

Every run has the config `configs/transfer.py`. `scratch` is `finetune` with random weights: the images, augmentation,
optimizer and epochs are the same, and nothing is frozen. Finished runs are kept and a stopped run continues, so that
the same command with more seeds or ways extends the study. WORKDIR gets results.csv, table.md and curves.png; each way
also gets a confusion matrix over all seeds, and a sheet of the most confident mistakes of the first seed.
"""

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mobilenet_jax.cli.allocator import restart_tuned
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.cli.exit_codes import get_exit_code
from mobilenet_jax.data.loader import make_eval_batches
from mobilenet_jax.data.sources import describe
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.plots import COLORS, draw_confusion, make_figure, save, style_axes
from mobilenet_jax.training.config import follow_card
from mobilenet_jax.training.run import train_and_evaluate
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.metrics import read_metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "transfer.py"
WAYS = {"probe": COLORS[2], "frozen": COLORS[0], "finetune": COLORS[1], "scratch": COLORS[6]}  # and their colours
COLUMNS = ("way", "seed", "top1", "loss", "count", "epochs", "trained", "seconds")


def make_config(way: str, *, seed: int, flags: argparse.Namespace, card: dict) -> Any:
    """Make the config of a run, with the preprocessing and the model of the card filled in."""
    config: Any = load_config(f"{CONFIG}:folder,{'finetune' if way == 'scratch' else way}", [])
    config.data.path, config.init, config.seed = str(flags.folder), str(flags.init), seed
    config.data.image_size = flags.image_size
    config.name = f"{flags.folder.name}_{way}"
    config.data.holdout = flags.holdout
    if flags.epochs:
        config.train.epochs = flags.epochs
    config = follow_card(config, lambda: card)
    if way == "scratch":
        config.init = ""
        config.optim.freeze, config.optim.freeze_epochs, config.optim.layer_decay = (), None, 1.0
    return config


def run(way: str, config: Any, workdir: Path) -> dict:
    """Train in a workdir; return the row of a way's results. Raises KeyboardInterrupt if a signal stopped the run."""
    clock = workdir / "seconds.txt"
    before, start = float(clock.read_text()) if clock.exists() else 0.0, time.perf_counter()
    was_finished = (workdir / "result.json").exists()
    result = train_and_evaluate(config, workdir)
    seconds = before if was_finished else before + time.perf_counter() - start
    clock.write_text(f"{seconds:.1f}")
    if "stopped" in result:
        raise KeyboardInterrupt
    row = {"way": way, "seed": config.seed, "epochs": result["epoch"], "seconds": round(seconds, 1)}
    return row | {name: result[name] for name in COLUMNS if name in result}


def write_results(rows: list[dict], workdir: Path) -> str:
    """Write results.csv and table.md; return the table."""
    with (workdir / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| way | parameters trained | epochs | top-1 | loss | time of a run |", "|---|---:|---:|---:|---:|---:|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        top1, loss = ([row[name] for row in own] for name in ("top1", "loss"))
        spread = f" ± {100 * statistics.stdev(top1):.1f}" if len(own) > 1 else ""
        minutes, seconds = divmod(round(statistics.mean(row["seconds"] for row in own)), 60)
        lines.append(
            f"| {way} | {own[0]['trained']:,} | {own[0]['epochs']:.0f} | {100 * statistics.mean(top1):.1f}{spread}% "
            f"of {own[0]['count']:,} | {statistics.mean(loss):.3f} | {minutes}:{seconds:02} |"
        )
    table = "\n".join(lines) + "\n"
    (workdir / "table.md").write_text(table)
    return table


def draw_curves(rows: list[dict], workdir: Path) -> None:
    """Draw test accuracy against epochs, with a thin line for each seed and a thick line for their mean."""
    figure, axes = make_figure(8, 4.5)
    for way, color in WAYS.items():
        curves = []
        for row in rows:
            if row["way"] == way:
                lines = read_metrics(workdir / f"{way}_{row['seed']}")
                kind = "eval_ema/top1" if "eval_ema/top1" in lines[-1] else "eval/top1"
                curves.append([(line["epoch"], line[kind]) for line in lines if kind in line])
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=color, linewidth=0.8, alpha=0.5)
        if curves:
            points = np.mean(curves, axis=0)
            label = f"{way}: {points[-1, 1]:.1%}"
            axes.plot(points[:, 0], points[:, 1], color=color, linewidth=2, marker="o", markersize=3, label=label)
    style_axes(axes, x_label="epoch", y_label="top-1 accuracy on the test images", percent="y")
    axes.legend(frameon=False)
    save(figure, workdir / "curves.png")


def find_mistakes(workdir: Path, config, *, count: int) -> list[tuple[np.ndarray, int, int, float]]:
    """Return (image, true class, predicted class, its probability) of the most confident wrong answers, worst first."""
    model, variables, _ = load_weights(workdir)
    mean, std = tuple(config.data.mean), tuple(config.data.std)

    @jax.jit
    def predict(images):
        logits: Any = model.apply(variables, normalise_images(images, mean, std))
        return jax.nn.softmax(logits)

    found = []
    for batch in make_eval_batches(config.data, process_index=0, process_count=1)[0]:
        answers = np.asarray(predict(batch["images"]))[batch["mask"]]
        for image, label, shares in zip(batch["images"], batch["labels"], answers, strict=False):
            if shares.argmax() != label:
                found.append((image, int(label), int(shares.argmax()), float(shares.max())))
    return sorted(found, key=lambda mistake: -mistake[3])[:count]


def draw_mistakes(mistakes: list[tuple[np.ndarray, int, int, float]], names: tuple[str, ...], path: Path) -> None:
    """Draw the images as the network saw them, six in a row."""
    rows = max(1, -(-len(mistakes) // 6))
    figure, grid = make_figure(12, 2.4 * rows, nrows=rows, ncols=6, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (image, label, answer, share) in zip(grid.flat, mistakes, strict=False):
        axes.imshow(image)
        axes.set_title(f"{names[label]}\nnot {names[answer]} ({share:.0%})", fontsize=9)
    save(figure, path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path, help="train/CLASS/*.jpg and test/CLASS/*.jpg, or CLASS/*.jpg")
    add("--init", required=True, help="weights that load_weights can load")
    add("--workdir", type=Path, required=True, help="folder of the study; a run is WORKDIR/WAY_SEED")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--seeds", type=int, default=3, help="number of seeds: 0 to N-1; default: %(default)s")
    add("--image_size", type=int, help="pixels; default: the image size of the weights")
    add("--epochs", type=float, help="epochs of every run; default: as configs/transfer.py says")
    add("--holdout", type=float, default=0.0, help="evaluate on this share of train; default: 0, evaluate on test")
    add("--mistakes", type=int, default=24, help="images on a sheet; default: %(default)s")
    return parser.parse_args(argv)


def run_study(flags: argparse.Namespace) -> int:
    """Run what is missing and draw all results; return the exit code."""
    flags.workdir.mkdir(parents=True, exist_ok=True)
    card = load_weights(flags.init)[2]
    rows = []
    # All ways with one seed come before the next seed, so that a stopped study can compare them.
    for seed in range(flags.seeds):
        for way in flags.ways:
            config = make_config(way, seed=seed, flags=flags, card=card)
            rows.append(run(way, config, flags.workdir / f"{way}_{seed}"))
            ordered = sorted(rows, key=lambda row: list(WAYS).index(row["way"]))
            print(write_results(ordered, flags.workdir), flush=True)
    draw_curves(rows, flags.workdir)
    for way in flags.ways:
        config = make_config(way, seed=0, flags=flags, card=card)
        names = describe(config.data).class_names
        folders = [flags.workdir / f"{way}_{seed}" for seed in range(flags.seeds)]
        confusion = sum(np.loadtxt(folder / "confusion.csv", delimiter=",", dtype=int) for folder in folders)
        draw_confusion(np.asarray(confusion), names, flags.workdir / f"confusion_{way}.png")
        mistakes = find_mistakes(folders[0], config, count=flags.mistakes)
        draw_mistakes(mistakes, names, flags.workdir / f"mistakes_{way}.png")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for a command that cannot be run, 130 if a signal stopped it."""
    flags = parse(argv)
    return get_exit_code(lambda: run_study(flags), interrupted="stopped; the same command continues")


if __name__ == "__main__":
    restart_tuned()
    sys.exit(main())
