import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutate import write_image
from benchmarks.speed.photographs import load_sources
from mobilenet_jax import predict as command
from mobilenet_jax.predict import main, predict
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
    """Nothing of what the command sets for its process outlives the test."""
    monkeypatch.setattr(command, "configure_memory", lambda folder: "")
    monkeypatch.setattr(command, "show_own_messages", lambda: None)


@pytest.fixture(scope="module")
def file(tiny_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, *tiny_weights)
    return path


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_bad_images_are_reported_and_the_rest_is_done(capsys, file, tmp_path, write_images):
    good = write_images(tmp_path / "good", 3)
    pipe, gone, text, loop = (tmp_path / name for name in ("pipe.png", "gone.png", "text.png", "loop.png"))
    os.mkfifo(pipe)
    text.write_text("no image")
    loop.symlink_to(loop)
    tiff = tmp_path / "other.tiff"
    write_image(tiff)
    bad = [pipe, gone, text, loop, tiff]
    code, out, err = run(capsys, f"--weights={file}", good[0], *bad, *good[1:], "--json", "--batch_size=2")
    assert code == 1
    reported = [line for line in err.splitlines() if "cannot be decoded" in line]
    assert [line.split(" cannot be decoded")[0] for line in reported] == [str(path) for path in bad]
    shown = json.loads(out)
    assert [entry["path"] for entry in shown] == [str(path) for path in (good[0], *bad, *good[1:])]
    assert [entry.get("error") for entry in shown] == [None, *reported, None, None]
    # Off a terminal, progress is lines.
    assert re.search(r"^8/8: .*images/s", err, re.MULTILINE)


def test_text_json_and_csv_say_the_same(capsys, file, tmp_path, write_images):
    paths = write_images(tmp_path, 3)
    arguments = [f"--weights={file}", tmp_path, "--top=2"]
    predictions = list(predict(load_weights(file), paths, top=2))
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    first = predictions[0].answers
    assert out.startswith(
        f"{paths[0]}\n{first[0].probability:>9.2%}  {first[0].name}\n{first[1].probability:>9.2%}  {first[1].name}\n"
    )
    shown = json.loads(run(capsys, *arguments, "--json")[1])
    for prediction, entry in zip(predictions, shown, strict=True):
        assert entry["path"] == str(prediction.path)
        assert [(c["class"], c["index"]) for c in entry["classes"]] == [(a.name, a.index) for a in prediction.answers]
    rows = list(csv.DictReader(io.StringIO(run(capsys, *arguments, "--csv")[1])))
    assert list(rows[0]) == ["path", "rank", "class", "probability", "index"]
    flat = [(p.path, i, a) for p in predictions for i, a in enumerate(p.answers, start=1)]
    for row, (path, rank, answer) in zip(rows, flat, strict=True):
        assert (row["path"], row["rank"], row["class"]) == (str(path), str(rank), answer.name)
        assert float(row["probability"]) == pytest.approx(answer.probability, rel=1e-5)


def test_the_flag_decode_is_that_of_python(capsys, file, tmp_path):
    path = tmp_path / "large.jpg"
    next(iter(load_sources().values())).resize((400, 300)).save(path, quality=92)
    shown = {}
    for decode in ("exact", "fast"):
        code, out, _ = run(capsys, f"--weights={file}", path, "--json", f"--decode={decode}")
        (prediction,) = predict(load_weights(file), [path], decode=decode)
        assert code == 0
        shown[decode] = [entry["probability"] for entry in json.loads(out)[0]["classes"]]
        assert shown[decode] == pytest.approx([answer.probability for answer in prediction.answers], rel=1e-5)
    assert (
        json.loads(run(capsys, f"--weights={file}", path, "--json")[1])[0]["classes"][0]["probability"]
        == shown["exact"][0]
    )
    assert shown["exact"] != shown["fast"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top=0"], "top is 0; valid: 1 or more"),
        (["--batch_size=0"], "batch_size is 0; valid: 1 or more"),
        (["--name=slim/v2", "--weights=WRONG"], "there are no weights WRONG"),
        (["EMPTY"], "EMPTY holds no image; valid: files ending in .jpg, .jpeg, .png, .webp"),
        (["--weights=torchvision/resnet50"], "no published weights 'torchvision/resnet50'"),
    ],
)
def test_a_command_that_cannot_be_obeyed_is_one_sentence(
    capsys, file, tmp_path, monkeypatch, arguments, said, write_images
):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    images = write_images(tmp_path / "images", 1)
    code, out, err = run(capsys, f"--weights={file}", *images, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupt(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupt)
    assert run(capsys, "--weights=w", "a.png") == (130, "", "interrupted\n")


def test_names_of_any_bytes_and_a_reader_that_leaves(file, tmp_path, write_images):
    """In processes of their own, for their standard output."""
    (path,) = write_images(tmp_path, 1)
    odd = os.fsencode(tmp_path) + b"/\xff\n.png"
    os.rename(path, odd)
    command = [sys.executable, "-m", "mobilenet_jax.predict", f"--weights={file}", "--top=1", odd]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as left:
        left.stdout.close()  # pyright: ignore[reportOptionalMemberAccess]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False)
        said = left.stderr.read()  # pyright: ignore[reportOptionalMemberAccess]
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff" in done.stdout
    assert (left.returncode, said) == (1, b"")
