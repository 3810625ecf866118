"""The command: plan, runs in order, killed and continued, refused in one sentence."""

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
from mobilenet_jax.ablate import estimate_time, load_study, main, run_all
from mobilenet_jax.studies.report import COLUMNS_OF_TIME
from mobilenet_jax.studies.study import RunKey, lock, read_record, write_record
from mobilenet_jax.training import run as train
from mobilenet_jax.training.sharding import make_mesh

# ml_collections loads config files by a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
SHORTCUT = f"--config={ROOT / 'configs' / 'ablations' / 'shortcut.py'}:digits"
FILES = ("results.csv", "table.md", "figure.png")
TINY = """
from configs import v1

def get_config(dataset="digits"):
    config = v1.get_config(dataset)
    config.model.width = 0.1
    config.model.shallow = True
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
    """One device, and nothing of what a command sets for its process outlives the test."""
    monkeypatch.setattr(train, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    monkeypatch.setattr(ablate, "configure_memory", lambda folder: "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("config_config", None)  # where ml_collections has the last config file
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
    """What a command that cannot be obeyed says: one line on stderr."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# Before anything runs.


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([f"--config={ROOT}/configs/ablations/shortcuts.py"], "is not a file; valid: "),
        ([f"--config={ROOT}/configs/v2.py"], "has no sweep(): it is the config of a run, not of a study"),
        ([f"{SHORTCUT[: -len(':digits')]}:mnist"], "there is no variant 'mnist'; valid: digits, fashion_mnist"),
        ([SHORTCUT, "--config.model.shortcut=none"], "--config.model.shortcut cannot be set: variant expansion of"),
        ([SHORTCUT, "--config.model.width=-1"], "width is -1.0; valid: finite, above 0"),
        ([SHORTCUT, "--config.data.image_size=0"], "too small"),
        ([SHORTCUT.replace("digits", "fashion_mnist"), "--config.data.data_dir=/nowhere"], "tfds build fashion_mnist"),
    ],
)
def test_impossible_commands_are_one_sentence(capsys, argv, said, tmp_path):
    assert said in refuse(capsys, *argv, f"--workdir={tmp_path / 'study'}")
    assert not (tmp_path / "study").exists()


def test_estimates_are_by_finished_runs_where_there_are_any():
    a, b, c = RunKey(0, "a"), RunKey(1, "a"), RunKey(0, "b")
    work = {a: 30e9, b: 30e9, c: 1200e9}
    assert estimate_time(work, [a, b, c], {}) == (
        "time: about 84 seconds, an estimate at 15 G multiply-adds of training a second"
    )
    # The other run of a variant tells most; else the work of all finished ones in their time.
    assert estimate_time(work, [b, c], {a: 60.0}) == "time: about 41 minutes, an estimate by 1 finished runs"
    assert estimate_time(work, [], {a: 60.0}) == "nothing is left to do"


# Who runs what.


def fake_runs(monkeypatch) -> list[RunKey]:
    """Runs that end at once, written down in order."""
    taken = []

    def run_one(study, key, workdir, num_classes):
        taken.append(key)
        write_record(key.folder(workdir), {"config": {}, "status": "failed", "seconds": 0.0})

    monkeypatch.setattr(ablate, "run_one", run_one)
    monkeypatch.setattr(ablate, "report", lambda study, workdir: None)
    return taken


def test_seeds_are_interleaved_and_what_another_process_has_is_left_to_it(tiny, tmp_path, monkeypatch):
    taken = fake_runs(monkeypatch)
    study = load_study(tiny.removeprefix("--config="), [])
    runs = study.list_runs(2, ["relu6", "relu"])
    write_record(runs[2].folder(tmp_path), {"config": {}, "status": "finished", "seconds": 0.0})
    with lock(runs[0].folder(tmp_path) / "lock", wait=False):
        run_all(study, tmp_path, runs, 10)
        assert taken == [RunKey(0, "relu"), RunKey(1, "relu")]
    run_all(study, tmp_path, runs, 10)  # the other process died
    assert taken[2:] == [RunKey(0, "relu6")]


def test_a_run_that_is_let_go_meanwhile_is_taken_in_the_same_study(tiny, tmp_path, monkeypatch):
    taken = fake_runs(monkeypatch)
    study = load_study(tiny.removeprefix("--config="), [])
    runs = study.list_runs(1, ["relu6", "relu"])
    held = lock(runs[0].folder(tmp_path) / "lock", wait=False)
    held.__enter__()
    monkeypatch.setattr(ablate, "report", lambda study, workdir: held.__exit__(None, None, None))
    run_all(study, tmp_path, runs, 10)
    assert taken == [RunKey(0, "relu"), RunKey(0, "relu6")]


# A study to its end.


class Killed(BaseException):
    """What no handler of the command sees."""


def read_files(workdir: Path) -> dict[str, object]:
    """The files of a study, without the columns of time."""
    with (workdir / "results.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in COLUMNS_OF_TIME} for row in csv.DictReader(file)]
    return {"results.csv": rows, **{name: (workdir / name).read_bytes() for name in FILES[1:]}}


def test_a_study_killed_and_continued_leaves_the_same_files(tiny, tmp_path, capsys, monkeypatch):
    """SIGTERM in the first run, death in the second, the rest; against a study that nothing stopped."""
    command = [tiny, "--only=relu6", "--seeds=2", f"--workdir={tmp_path / 'whole'}"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "whole" / "table.md").read_text() in printed
    whole = read_files(tmp_path / "whole")
    rows = whole["results.csv"]
    assert isinstance(rows, list)
    assert [(row["variant"], row["seed"]) for row in rows] == [("relu6", "0"), ("relu6", "1")]
    for row in rows:
        result = json.loads((tmp_path / "whole" / row["variant"] / f"seed_{row['seed']}" / "result.json").read_text())
        assert {key: str(result[key]) for key in ("top1", "loss", "params", "count")} == {
            key: row[key] for key in ("top1", "loss", "params", "count")
        }
    assert len({row["loss"] for row in rows}) == 2  # seeds are different runs

    original = train.Run._next_batch

    def next_batch(self):
        where = (*self.workdir.parts[-2:], int(self._state.step))
        if where == ("relu6", "seed_0", 2) and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            signal.raise_signal(signal.SIGTERM)
        if where == ("relu6", "seed_1", 4) and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise Killed
        return original(self)

    monkeypatch.setattr(train.Run, "_next_batch", next_batch)
    command[-1] = f"--workdir={tmp_path / 'parts'}"
    assert main(command) == 0
    assert "SIGTERM: saved; the same command continues" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "table.md").exists()  # nothing has finished
    with pytest.raises(Killed):
        main(command)
    record = read_record(tmp_path / "parts" / "relu6" / "seed_1")
    assert record is not None
    assert record["status"] == "started"
    assert main(command) == 0
    assert "1 to do" in capsys.readouterr().out
    assert read_files(tmp_path / "parts") == whole

    # Once more: nothing runs, nothing changes, and another config is refused.
    before = {name: (tmp_path / "parts" / name).read_bytes() for name in FILES}
    assert main(command) == 0
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert {name: (tmp_path / "parts" / name).read_bytes() for name in FILES} == before
    said = refuse(capsys, *command, "--config.train.label_smoothing=0.1")
    assert "relu6/seed_0 was run with another config: train.label_smoothing was 0.0 and is 0.1; restore it" in said
    assert main([*command, "--dry_run", "--config.data.data_dir=/elsewhere", "--seeds=4"]) == 0
    out = capsys.readouterr().out
    assert "4 runs, 2 to do" in out
    assert "by 2 finished runs" in out


def test_a_run_that_is_not_finite_is_recorded_and_the_study_goes_on(tmp_path, capsys):
    variants = '{"relu": {"optim.lr_per_256": 1e37}, "relu6": {}}'
    wild = TINY.replace('{"relu6": {}, "relu": {"model.activation": "relu"}}', variants)
    (tmp_path / "wild.py").write_text(wild.replace("steps = 6", "steps = 3"))
    command = [f"--config={tmp_path / 'wild.py'}", "--seeds=1", f"--workdir={tmp_path / 'study'}"]
    assert main(command) == 1
    captured = capsys.readouterr()
    assert re.search(r"relu/seed_0 failed: \w+ is (nan|inf) at step \d", captured.err)
    assert "failed, and not run again unless removed: " in captured.err
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
    assert main(command) == 1  # it stays failed, and nothing runs
    assert "2 runs, 0 to do" in capsys.readouterr().out


def test_one_variant_alone(tiny, tmp_path, monkeypatch, capsys):
    taken = fake_runs(monkeypatch)
    assert main([tiny, "--only=relu", "--seeds=2", f"--workdir={tmp_path / 'study'}"]) == 1
    assert taken == [RunKey(0, "relu"), RunKey(1, "relu")]
    assert "relu6" not in capsys.readouterr().out
