import json
import logging
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from etils import epath

from mobilenet_jax import main as main_module
from mobilenet_jax.cli.config import load_config
from mobilenet_jax.cli.exit_codes import UsageError
from mobilenet_jax.data.loader import TrainIterator
from mobilenet_jax.main import main
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.training import evaluate
from mobilenet_jax.training import run as run_module
from mobilenet_jax.weights.card import HALF
from mobilenet_jax.weights.save import save_weights
from mobilenet_jax.workdir.lock import lock_workdir
from tests.cards import make_test_card

ROOT = Path(__file__).resolve().parents[1]
CONFIG = f"--config={ROOT / 'configs' / 'v1.py'}"
TINY = [
    "--config.model.width=0.1",
    "--config.data.image_size=16",
    "--config.data.batch_size=32",
    "--config.train.steps=4",
    "--config.train.save_every_epochs=0",
    "--config.train.eval_every_epochs=0",
    "--config.optim.warmup_epochs=0",
]


@pytest.fixture(autouse=True)
def keep_process(monkeypatch, one_device):
    """One device, and nothing of what a command sets for its process outlives the test."""
    monkeypatch.setattr(main_module, "configure_jax", lambda flags: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers, absl_logger = logging.root.handlers[:], logging.getLogger("absl")
    level = absl_logger.level
    yield
    logging.root.handlers[:] = handlers
    absl_logger.setLevel(level)


def refuse(capsys, *argv: str) -> str:
    """The last line on stderr of a command that cannot be obeyed, which is all that it says of it."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notes, said = captured.err.splitlines()
    assert all(
        re.match(r"workdir: |optim\.|model\.bn_decay = |ema\.decay = |\S+ (train|test): ", note) for note in notes
    )
    return said


def run(*argv: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mobilenet_jax.main", *argv]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


# Start.


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.model.widht=1", "--config.model has no key 'widht', did you mean width?; valid: activation, "),
        ("--config.modle.width=1", "--config has no key 'modle', did you mean model?; valid: data, ema, "),
        ("--config.model.width.x=1", "--config.model.width has no key 'x'; valid: none, it is a value"),
        ("--config.model=1", "--config.model is a section; set one of its keys: activation, "),
        ("--config.model.width", "--config.model.width has no value; write --config.model.width=VALUE"),
        ("--config.data.batch_size=many", "data.batch_size"),
        ("--config.data.batch_size=1.5", "data.batch_size"),
        ("--config.train.epochs=long", "train.epochs"),
        ("--config.data.flip=maybe", "data.flip"),
    ],
)
@pytest.mark.parametrize("before", [False, True])
def test_trap_35_an_override_that_cannot_be_is_one_sentence(capsys, argument, said, before):
    """Wherever it stands: absl's own flags refuse overrides that come before --config."""
    arguments = [argument, CONFIG] if before else [CONFIG, argument]
    assert said in refuse(capsys, *arguments)


def test_trap_35_overrides_may_stand_before_the_config():
    argv = ["--config.data.batch_size=16", CONFIG, "--config.train.steps=3"]
    flags, overrides = main_module.parse(argv)
    config = load_config(flags.config, overrides)
    assert (config.data.batch_size, config.train.steps) == (16, 3)
    assert config.is_locked


def test_a_workdir_in_use_is_refused(capsys, tmp_path):
    with lock_workdir(epath.Path(tmp_path)):
        said = refuse(capsys, CONFIG, *TINY, f"--workdir={tmp_path}")
    assert re.search(r"is in use: process \d+ on host .* trains there; wait for its end or give another", said)


def test_missing_file_and_variant_list_the_valid_ones(capsys):
    said = refuse(capsys, f"--config={ROOT / 'configs' / 'v9.py'}")
    assert "v9.py is not a file; valid: " in said
    assert all(f"{name}.py" in said for name in ("v1", "v2", "v3_large", "v3_small"))
    assert "base.py" not in said
    said = refuse(capsys, f"{CONFIG}:foo")
    assert "v1.py:foo: there is no variant 'foo'; valid: digits, fashion_mnist, cifar10, uc_merced, folder, " in said


@pytest.mark.parametrize("text", ["def get_config(:\n", "import not_a_module\n", "x = 1\n"])
def test_a_config_file_that_is_none_is_one_sentence(capsys, tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    assert "mine.py" in refuse(capsys, f"--config={tmp_path / 'mine.py'}")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("{}['missing']", "KeyError: 'missing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("open('/nowhere')", "FileNotFoundError: "),
        ("exec('raise RuntimeError')", "RuntimeError: no message"),
    ],
)
def test_a_config_file_that_raises_is_one_sentence(capsys, tmp_path, raised, said):
    (tmp_path / "mine.py").write_text(f"def get_config():\n    return {raised}\n")
    assert f"mine.py: {said}" in refuse(capsys, f"--config={tmp_path / 'mine.py'}")


def test_a_platform_without_a_device_is_one_sentence(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/nowhere/libtpu.so")
    done = run(CONFIG)
    assert done.returncode == 2
    *_, said = done.stderr.splitlines()
    assert "JAX finds no device: Unable to initialize backend 'tpu'" in said
    assert "JAX_PLATFORMS is 'tpu'; valid: " in said
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.model.name=mobilenet_v9", "mobilenet_v3_small"),
        ("--config.data.source=imagenet", "digits"),
        ("--config.data.source=folder", "data.path"),
        ("--config.data.batch_size=-3", "data.batch_size is -3"),
        ("--config.init=nowhere", "there are no weights nowhere"),
        ("--config.data.source=tfds:uc_merced", "tfds build uc_merced"),
    ],
)
def test_impossible_values_are_one_sentence(capsys, tmp_path, argument, said):
    assert said in refuse(capsys, CONFIG, f"--workdir={tmp_path}", "--config.data.data_dir=/nowhere", argument)


def test_a_workdir_that_is_a_file_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refuse(capsys, CONFIG, f"--workdir={tmp_path / 'file'}", *TINY)


def test_no_traceback_reaches_the_terminal(tmp_path):
    done = run(CONFIG, "--config.model.widht=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_interruption_before_the_first_step_is_said(capsys, monkeypatch):
    def interrupt(flags, overrides):
        raise KeyboardInterrupt

    monkeypatch.setattr(main_module, "run", interrupt)
    assert main([CONFIG]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise ValueError("a mistake in the code")

    monkeypatch.setattr(run_module, "train", fail)
    with pytest.raises(ValueError, match="a mistake in the code") as error:
        main([CONFIG, f"--workdir={tmp_path}", *TINY])
    assert not isinstance(error.value, UsageError)


# A check of the images.


def test_every_image_is_read_once_and_the_bad_ones_are_reported(capsys, tmp_path, monkeypatch, write_images):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write_images(tmp_path / split / label, 3)
    command = [CONFIG, "--mode=check", "--config.data.source=folder", "--config.data.path", str(tmp_path)]
    monkeypatch.setattr(main_module, "configure_jax", lambda flags: pytest.fail("JAX is not needed"))
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "12 images were read; 0 of them are bad\n"
    assert f"{tmp_path} train: 6 images in 2 classes, the smallest class is a with 3\n" in captured.err
    (tmp_path / "train" / "b" / "01.png").write_bytes(b"no image")
    cut = tmp_path / "test" / "a" / "02.png"
    cut.write_bytes(cut.read_bytes()[:200])
    assert main(command) == 1
    first, second, last = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "train" / "b" / "01.png") in first
    assert str(cut) in second
    assert last == "12 images were read; 2 of them are bad"
    assert refuse(capsys, *command[:3], "--config.data.path=/nowhere").startswith("data.path is '/nowhere'; valid: ")


# A run from the command line.


def test_a_run_is_stopped_continued_finished_and_evaluated(capsys, tmp_path, monkeypatch):
    """One command four times: SIGTERM at step 2, the rest, its result again; then --mode=eval."""
    monkeypatch.chdir(tmp_path)
    command = [CONFIG, *TINY]
    original = TrainIterator.__next__

    def next_batch(self):
        if self.get_state()["next_batch"] == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", next_batch)
        assert main(command) == 0
    stopped = capsys.readouterr()
    assert "workdir: runs/mobilenet_v1_digits" in stopped.err
    assert "SIGTERM: saved at step 2; the same command continues" in stopped.err
    assert stopped.out == ""
    assert (tmp_path / "runs" / "mobilenet_v1_digits" / "checkpoints" / "2").is_dir()

    assert main(command) == 0
    first = capsys.readouterr()
    assert "continuing runs/mobilenet_v1_digits from step 2" in first.err
    result = json.loads(first.out)
    assert result == json.loads((tmp_path / "runs" / "mobilenet_v1_digits" / "result.json").read_text())
    assert f"top1 {result['top1']:.4f}" in first.err

    assert main(command) == 0
    again = capsys.readouterr()
    assert "runs/mobilenet_v1_digits is finished" in again.err
    assert again.out == first.out

    assert main([*command, "--mode=eval"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["step"] == 4
    assert [evaluated[f"eval_ema/{name}"] for name in ("loss", "top1", "top5", "count")] == [
        result[name] for name in ("loss", "top1", "top5", "count")
    ]

    said = refuse(capsys, *command, "--config.model.width=0.25")
    assert "model.width was 0.1 and is 0.25" in said


def test_evaluation_without_a_checkpoint_is_one_sentence(capsys, tmp_path):
    assert main([CONFIG, f"--workdir={tmp_path}", "--mode=eval", *TINY]) == 1
    captured = capsys.readouterr()
    assert f"{tmp_path} has no checkpoint to evaluate; train first, or set config.init\n" in captured.err
    assert captured.out == ""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a small network for ten classes, with a card that asks for 40 pixels."""
    model = create_model("mobilenet_v1", width=0.1, num_classes=10)
    card = make_test_card(
        model.spec, width=0.1, preprocessing=replace(HALF, image_size=40, crop_share=1.0, interpolation="nearest")
    )
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, model, init_variables(model, seed=0), card)
    return path


def test_trap_24_weights_are_evaluated_as_their_card_says(capsys, tmp_path, monkeypatch, weights):
    seen = []
    evaluate_weights = evaluate.evaluate_weights
    monkeypatch.setattr(evaluate, "evaluate_weights", lambda w, data: seen.append(data) or evaluate_weights(w, data))
    command = [CONFIG, "--mode=eval", f"--weights={weights}", f"--workdir={tmp_path / 'new'}"]
    command += ["--config.data.mean=(1.0,2.0,3.0)"]  # what the command line says comes first
    assert main(command) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert f"written to {tmp_path / 'new' / 'evaluation.json'}" in captured.err
    assert (result["weights"], result["count"]) == ({"name": "tiny", "file": "w", "sha256": "0"}, 360)
    assert list(result["class_accuracy"]) == list("0123456789")
    assert {"loss", "top1", "top5", "ece"} < result.keys()
    data = seen[0]
    assert (data.image_size, data.interpolation, data.mean, data.std) == (40, "nearest", (1, 2, 3), (127.5,) * 3)


def test_only_the_first_process_writes_the_evaluation(capsys, tmp_path, monkeypatch, weights):
    monkeypatch.setattr(evaluate, "evaluate_weights", lambda *_: {"top1": 0.5})
    command = [CONFIG, "--mode=eval", f"--weights={weights}", f"--workdir={tmp_path}"]
    for process, written in ((1, False), (0, True)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out) == {"top1": 0.5}
        assert (tmp_path / "evaluation.json").exists() == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode=train"], "--weights is for --mode=eval; training starts from --config.init"),
        (["--weights=nowhere"], "there are no weights nowhere"),
        (["--config.data.source=fake:8", "--config.data.num_classes=4"], "fake test has 4 classes and the weights 10;"),
        (["--config.data.interpolation=lanczos"], "data.interpolation is 'lanczos'"),
        (["--config.data.image_size=0"], "data.image_size is 0; valid: 1 or more"),
    ],
)
def test_weights_that_cannot_be_evaluated_are_one_sentence(capsys, tmp_path, weights, arguments, said):
    command = [CONFIG, "--mode=eval", f"--weights={weights}", f"--workdir={tmp_path / 'run'}"]
    assert said in refuse(capsys, *command, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_says_why_and_ends_with_1(capsys, tmp_path):
    assert main([CONFIG, f"--workdir={tmp_path / 'run'}", *TINY, "--config.optim.lr_per_256=1e37"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"at step \d+, learning rate [\d.]+e\+3\d; the checkpoints before it are kept", captured.err)
    assert captured.out == ""
