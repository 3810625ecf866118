import csv
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import transfer
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.weights.save import save_weights
from tests.cards import make_test_card


@pytest.fixture
def arguments(tmp_path, monkeypatch, one_device) -> list[str]:
    """Arguments for a folder of dark and bright images that any network can tell apart, one with a wrong label."""
    make_config = transfer.make_config

    def make_plain_config(*args, **kwargs):
        config = make_config(*args, **kwargs)
        config.model.lowering = "plain"  # compiles fastest
        return config

    monkeypatch.setattr(transfer, "make_config", make_plain_config)
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for name, low in (("bright", 160), ("dark", 0)):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(low, low + 90, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "images" / "test" / "dark" / "0.png")
    model = create_model("mobilenet_v1", width=0.1, num_classes=5)
    card = make_test_card(model.spec, name="mine", width=0.1)
    save_weights(tmp_path / "w.safetensors", model, init_variables(model, seed=0), card)
    return [str(tmp_path / "images"), f"--init={tmp_path / 'w.safetensors'}", f"--workdir={tmp_path / 'study'}"]


def read_results(workdir: Path) -> list[dict]:
    with (workdir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def list_written(study: Path) -> dict[Path, int]:
    """When each checkpoint and log of the study's runs was written last."""
    files = [*study.glob("*/checkpoints/**/*"), *study.glob("*/metrics.jsonl")]
    return {file: file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.mark.slow
def test_study_has_a_row_for_each_run_and_keeps_finished_runs(arguments, tmp_path, capsys):
    command = [*arguments, "--ways", "probe", "scratch", "--image_size=32", "--epochs=4"]
    assert transfer.main([*command, "--seeds=1"]) == 0
    first = read_results(tmp_path / "study")
    assert [(row["way"], row["seed"], row["count"]) for row in first] == [("probe", "0", "16"), ("scratch", "0", "16")]
    assert int(first[0]["trained"]) < int(first[1]["trained"])
    # A second seed adds rows, and the runs of the first seed are not trained again.
    before = list_written(tmp_path / "study")
    assert {file.relative_to(tmp_path / "study").parts[0] for file in before} == {"probe_0", "scratch_0"}
    assert transfer.main([*command, "--seeds=2"]) == 0
    after = list_written(tmp_path / "study")
    assert {file: after[file] for file in before} == before
    assert len(after) > len(before)
    rows = read_results(tmp_path / "study")
    assert [row for row in rows if row["seed"] == "0"] == first
    tops = [100 * float(row["top1"]) for row in rows if row["way"] == "probe"]
    table = (tmp_path / "study" / "table.md").read_text()
    assert f"| {statistics.mean(tops):.1f} ± {statistics.stdev(tops):.1f}% of 16 |" in table
    assert table in capsys.readouterr().out
    for name in ("curves", "confusion_probe", "confusion_scratch", "mistakes_probe", "mistakes_scratch"):
        with Image.open(tmp_path / "study" / f"{name}.png") as image:
            image.verify()


def test_scratch_differs_from_finetune_only_in_the_weights_and_in_freezing_nothing(arguments):
    class Flags:
        folder, init, image_size, holdout, epochs = Path(arguments[0]), "w", 32, 0.0, None

    card = {"model": "mobilenet_v1", "width": 0.1, "convention": "keras", "preprocessing": {}}
    card["preprocessing"] = {"crop_share": 0.9, "interpolation": "bicubic", "mean": [1.0] * 3, "std": [2.0] * 3}
    card["preprocessing"]["squash"] = False
    made = [transfer.make_config(way, seed=1, flags=Flags, card=card) for way in ("finetune", "scratch")]  # pyright: ignore[reportArgumentType]
    finetune, scratch = map(flatten_config, made)
    different = {key for key in finetune if finetune[key] != scratch[key]}
    assert different == {"name", "init", "optim.freeze", "optim.freeze_epochs", "optim.layer_decay"}
    assert (scratch["init"], scratch["optim.freeze"], scratch["optim.layer_decay"]) == ("", [], 1.0)


@pytest.mark.slow
def test_mistakes_are_the_most_confident_wrong_answers(arguments, tmp_path):
    command = [*arguments, "--ways", "probe", "--image_size=32", "--epochs=400", "--seeds=1"]
    assert transfer.main(command) == 0
    confusion = np.loadtxt(tmp_path / "study" / "probe_0" / "confusion.csv", delimiter=",", dtype=int)
    card = transfer.load_weights(tmp_path / "w.safetensors")[2]

    class Flags:
        folder, init, image_size, holdout, epochs = tmp_path / "images", "w", 32, 0.0, None

    config = transfer.make_config("probe", seed=0, flags=Flags, card=card)  # pyright: ignore[reportArgumentType]
    mistakes = transfer.find_mistakes(tmp_path / "study" / "probe_0", config, count=24)
    assert len(mistakes) == confusion.sum() - np.trace(confusion)
    # The worst mistake is the white image among the dark ones.
    image, label, answer, share = mistakes[0]
    assert (image.min(), label, answer) == (255, 1, 0)
    assert share == max(mistake[3] for mistake in mistakes) > 0.5
