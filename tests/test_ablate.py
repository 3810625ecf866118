"""The command: mistakes refused in one sentence; a study to its end, also killed and continued."""

import csv
import json
import logging
import re
import signal
import sys
from pathlib import Path

import jax
import pytest

from mobilenet_jax import ablate
from mobilenet_jax.ablate import main
from mobilenet_jax.studies import schedule
from mobilenet_jax.studies.records import read_record, write_record
from mobilenet_jax.studies.report import COLUMNS_OF_TIME
from mobilenet_jax.studies.study import RunKey
from mobilenet_jax.workdir.metrics import MetricsWriter

ROOT = Path(__file__).resolve().parents[1]
SHORTCUT = f"--config={ROOT / 'configs' / 'ablations' / 'shortcut.py'}:digits"
FILES = ("results.csv", "table.md", "figure.png")
TINY = """
from configs import v1

def get_config(dataset="digits"):
    config = v1.get_config(dataset)
    config.model.width = 0.1
    config.model.shallow = True
    config.model.block_form = "regular"  # with one convolution a block, compiles in half the time
    config.model.lowering = "plain"  # compiles faster
    config.data.image_size = 16
    config.data.batch_size = 32
    config.train.steps = 6
    config.train.eval_every_epochs = 0.07  # 3 steps
    config.train.save_every_epochs = 0.07
    config.train.log_every_steps = 2
    config.optim.warmup_epochs = 0.0
    return config

def sweep():
    return {
        "baseline": "relu6",
        "variants": {"relu6": {}, "relu": {"model.activation": "relu"}},
        "published": {"relu6": 70.6},
        "source": "nowhere",
        "figure": "points",
        "series": "",
    }
"""


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
    """Show one device to the command, compile fast, and undo what the command sets for its process."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(ablate, "configure_memory", lambda folder: "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers, absl_logger = logging.root.handlers[:], logging.getLogger("absl")
    level = absl_logger.level
    yield
    logging.root.handlers[:] = handlers
    absl_logger.setLevel(level)


@pytest.fixture
def tiny(tmp_path) -> str:
    """A study of two variants whose runs take six steps each."""
    (tmp_path / "tiny.py").write_text(TINY)
    return f"--config={tmp_path / 'tiny.py'}"


def refuse(capsys, *argv: str) -> str:
    """Run a command that is refused; return the one line that it prints, on stderr."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([f"--config={ROOT}/configs/ablations/shortcuts.py"], "is not a file; valid: "),
        ([f"--config={ROOT}/configs/v2.py"], "has no sweep(): it is the config of a run, not of a study"),
        ([f"{SHORTCUT[: -len(':digits')]}:mnist"], "there is no variant 'mnist'; valid: digits, fashion_mnist"),
        ([SHORTCUT, "--config.model.shortcut=none"], "--config.model.shortcut cannot be set: variant expansion of"),
        ([SHORTCUT, "--config.model.width=-1"], "width is -1.0; valid: a number, finite and above 0"),
        ([SHORTCUT, "--config.data.image_size=0"], "too small"),
        ([SHORTCUT.replace("digits", "fashion_mnist"), "--config.data.data_dir=/nowhere"], "tfds build fashion_mnist"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(capsys, argv, said, tmp_path):
    assert said in refuse(capsys, *argv, f"--workdir={tmp_path / 'study'}")
    assert not (tmp_path / "study").exists()


class Killed(BaseException):
    """The death of the process; the command does not handle it."""


def read_files(workdir: Path) -> dict[str, object]:
    """Read the files of a study, without the columns of time."""
    with (workdir / "results.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in COLUMNS_OF_TIME} for row in csv.DictReader(file)]
    return {"results.csv": rows, **{name: (workdir / name).read_bytes() for name in FILES[1:]}}


@pytest.mark.slow
def test_a_study_killed_and_continued_leaves_the_same_files(tiny, tmp_path, capsys, monkeypatch):
    """Compare a study that SIGTERM stops in the first run and death in the second with a study that nothing stops."""
    # A study takes over finished runs from studies beside its workdir, so the two lie in different folders.
    whole, parts = tmp_path / "undisturbed" / "study", tmp_path / "stopped_twice" / "study"
    command = [tiny, "--only=relu6", "--seeds=2", f"--workdir={whole}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (whole / "table.md").read_text() in printed
    expected = read_files(whole)
    rows = expected["results.csv"]
    assert isinstance(rows, list)
    assert [(row["variant"], row["seed"]) for row in rows] == [("relu6", "0"), ("relu6", "1")]
    for row in rows:
        result = json.loads((whole / row["variant"] / f"seed_{row['seed']}" / "result.json").read_text())
        assert {key: str(result[key]) for key in ("top1", "loss", "params", "count")} == {
            key: row[key] for key in ("top1", "loss", "params", "count")
        }
    assert len({row["loss"] for row in rows}) == 2  # seeds are different runs

    write = MetricsWriter.write

    def write_and_stop(self, step, values):
        write(self, step, values)
        started = sorted(path.parent.name for path in (parts / "relu6").glob("seed_*/run.json"))
        if (started, step) == (["seed_0"], 2) and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            signal.raise_signal(signal.SIGTERM)
        if (started, step) == (["seed_0", "seed_1"], 4) and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed

    monkeypatch.setattr(MetricsWriter, "write", write_and_stop)
    command[-1] = f"--workdir={parts}"
    assert main(command) == 0
    assert "SIGTERM: saved; the same command continues" in capsys.readouterr().err
    assert not (parts / "table.md").exists()  # no run has finished
    with pytest.raises(Killed):
        main(command)
    record = read_record(parts / "relu6" / "seed_1")
    assert record is not None
    assert record["status"] == "started"
    assert main(command) == 0
    assert "1 to do" in capsys.readouterr().out
    assert read_files(parts) == expected

    # If all runs are finished, the command changes nothing. It refuses another config.
    before = {name: (parts / name).read_bytes() for name in FILES}
    assert main(command) == 0
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert {name: (parts / name).read_bytes() for name in FILES} == before
    said = refuse(capsys, *command, "--config.train.label_smoothing=0.1")
    assert "relu6/seed_0 was run with another config: train.label_smoothing was 0.0 and is 0.1; restore it" in said
    assert main([*command, "--dry_run", "--config.data.data_dir=/elsewhere", "--seeds=4"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 2 to do" in out
    assert "from 2 finished runs" in out


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_run_and_the_study_goes_on(tmp_path, capsys):
    variants = '{"relu": {"optim.lr_per_256": 1e37}, "relu6": {}}'
    wild = TINY.replace('{"relu6": {}, "relu": {"model.activation": "relu"}}', variants)
    (tmp_path / "wild.py").write_text(wild)
    command = [f"--config={tmp_path / 'wild.py'}", "--seeds=1", f"--workdir={tmp_path / 'study'}"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert re.search(r"relu/seed_0 failed: \w+ is (nan|inf) at step \d", captured.err)
    assert f"failed: {tmp_path / 'study' / 'relu' / 'seed_0'}; remove a folder to run it again" in captured.err
    assert "Failed, not in the means: relu seed 0." in captured.out
    record = read_record(tmp_path / "study" / "relu" / "seed_0")
    assert record is not None
    assert "learning rate" in record["error"]
    with (tmp_path / "study" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["status"], bool(row["top1"])) for row in rows] == [
        ("relu", "failed", False),
        ("relu6", "finished", True),
    ]
    assert main(command) == 1  # the run stays failed and is not repeated
    assert "2 runs, 0 to do" in capsys.readouterr().out


def test_only_one_variant_is_run(tiny, tmp_path, monkeypatch, capsys):
    taken = []

    def run_one(study, key, workdir, num_classes):
        taken.append(key)
        write_record(key.folder(workdir), {"config": {}, "status": "failed", "seconds": 0.0})

    monkeypatch.setattr(schedule, "run_one", run_one)
    monkeypatch.setattr(schedule, "report", lambda study, workdir: None)
    assert main([tiny, "--only=relu", "--seeds=2", f"--workdir={tmp_path / 'study'}"]) == 1
    assert taken == [RunKey(0, "relu"), RunKey(1, "relu")]
    assert "relu6" not in capsys.readouterr().out
