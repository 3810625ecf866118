import csv
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from benchmarks.mutate import IMAGES, mutate, read_image, try_file, write_image
from mobilenet_jax import predict as predict_module
from mobilenet_jax.data.decode import decode_image
from mobilenet_jax.data.transforms import EvalTransform
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import create_model
from mobilenet_jax.predict import Prediction, list_images, main, predict
from mobilenet_jax.weights.card import HALF, make_card
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.weights.save import save_weights

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def keep_process(monkeypatch):
    """Nothing of what the command sets for its process outlives the test."""
    monkeypatch.setattr(predict_module, "configure_memory", lambda folder: "")
    monkeypatch.setattr(predict_module, "show_own_messages", lambda: None)


@pytest.fixture(scope="module")
def weights():
    """(model, variables, card) of a small network, whatever it says."""
    model = create_model("mobilenet_v1", width=0.1, num_classes=3)
    preprocessing = replace(HALF, image_size=32, crop_share=0.8)
    card = make_card(
        name="tiny",
        model="mobilenet_v1",
        width=0.1,
        convention="keras",
        spec=model.spec,
        preprocessing=preprocessing,
        class_names=NAMES,
        source={"file": "w", "sha256": "0"},
    )
    variables = init_variables(model, seed=0)
    variables["params"]["classifier"]["bias"] = np.array([0.1, 0.2, 0.4], np.float32)
    return model, variables, card


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_weights(path, *weights)
    return path


def write_images(folder: Path, count: int) -> list[Path]:
    """Images of noise of several sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [folder / f"{i:02d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(256, size=(30 + i, 50 - i, 3), dtype=np.uint8)).save(path)
    return paths


def run(capsys, *argv) -> tuple[int, str, str]:
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# What is answered.

# MobileNet_V2_Weights.IMAGENET1K_V1 of torchvision 0.29.1 with its own transforms, Pillow 13.0.
TORCHVISION = {
    "chelsea.png": [
        ("Egyptian cat", 0.716597),
        ("tiger cat", 0.147106),
        ("tabby", 0.129517),
        ("lynx", 0.005035),
        ("plastic bag", 0.001142),
    ],
    "coffee.png": [
        ("espresso", 0.992071),
        ("consomme", 0.004321),
        ("cup", 0.001405),
        ("soup bowl", 0.001334),
        ("coffee mug", 0.000384),
    ],
    "motorcycle_left.png": [
        ("moped", 0.592268),
        ("motor scooter", 0.367443),
        ("disk brake", 0.03771),
        ("Model T", 0.000607),
        ("crash helmet", 0.000318),
    ],
    "rocket.jpg": [
        ("drilling platform", 0.354241),
        ("space shuttle", 0.179858),
        ("obelisk", 0.145934),
        ("missile", 0.073966),
        ("torch", 0.0584),
    ],
    "astronaut.png": [
        ("bobsled", 0.193957),
        ("stethoscope", 0.114945),
        ("Crock Pot", 0.068047),
        ("jersey", 0.051834),
        ("drum", 0.049129),
    ],
}


def test_trap_24_photographs_are_what_torchvision_itself_says_they_are(reference):
    skimage = pytest.importorskip("skimage")
    paths = [Path(skimage.__file__).parent / "data" / name for name in TORCHVISION]
    loaded = load_weights(reference / "weights" / "mobilenet_v2-b0353104.pth")
    for path, answers, error in predict(loaded, paths, batch_size=len(paths)):
        expected = TORCHVISION[path.name]
        assert error is None
        assert [answer.name for answer in answers] == [name for name, _ in expected]
        np.testing.assert_allclose([a.probability for a in answers], [p for _, p in expected], atol=1e-3)


def test_answers_are_the_models_softmax_in_falling_order(weights, tmp_path):
    model, variables, _ = weights
    paths = write_images(tmp_path, 5)
    transform = EvalTransform(32, 0.8, "bilinear", squash=False)
    images = np.stack([transform(decode_image(path, name="")) for path in paths])
    logits = jax.jit(model.apply)(variables, (images.astype(np.float32) - 127.5) / 127.5)
    expected = np.asarray(jax.nn.softmax(logits))
    for path, answers, row in zip(paths, predict(weights, [tmp_path], top=9), expected, strict=True):
        assert (answers.path, answers.error) == (path, None)
        order = np.argsort(-row)
        assert [answer.index for answer in answers.answers] == order.tolist()
        assert [answer.name for answer in answers.answers] == [NAMES[i] for i in order]
        np.testing.assert_allclose([answer.probability for answer in answers.answers], row[order], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_size_of_a_batch_changes_nothing_and_one_program_is_compiled(weights, tmp_path, monkeypatch, batch_size):
    write_images(tmp_path, 7)
    programs = []
    compile_program = predict_module._compile
    monkeypatch.setattr(
        predict_module, "_compile", lambda *a, **k: programs.append(compile_program(*a, **k)) or programs[-1]
    )
    got = list(predict(weights, [tmp_path], batch_size=batch_size))
    assert programs[0]._cache_size() == 1
    want = list(predict(weights, [tmp_path], batch_size=7))
    assert [p.path for p in got] == [p.path for p in want]
    for left, right in zip(got, want, strict=True):
        assert [a.name for a in left.answers] == [a.name for a in right.answers]
        np.testing.assert_allclose([a.probability for a in left.answers], [a.probability for a in right.answers], 1e-5)


def test_without_names_classes_are_numbers(weights, tmp_path):
    paths = write_images(tmp_path, 1)
    model, variables, card = weights
    (prediction,) = predict((model, variables, {**card, "class_names": None}), paths)
    assert [answer.name for answer in prediction.answers] == [str(answer.index) for answer in prediction.answers]


def test_an_answer_that_is_not_finite_is_an_error(weights, tmp_path):
    model, variables, card = weights
    bias = np.array([np.inf, 0, 0], np.float32)
    classifier = {**variables["params"]["classifier"], "bias": bias}
    broken = {**variables, "params": {**variables["params"], "classifier": classifier}}
    (prediction,) = predict((model, broken, card), write_images(tmp_path, 1))
    assert prediction == Prediction(
        tmp_path / "00.png", [], f"{tmp_path / '00.png'}: the network's answer is not finite"
    )


# Which images.


def test_folders_give_their_images_at_any_depth_in_order(tmp_path):
    wanted = [tmp_path / name for name in ("b.JPG", "c.webp", "a/2.png", "a/10.jpeg", "z/y/x.png")]
    for path in [*wanted, tmp_path / "notes.txt", tmp_path / "._b.jpg", tmp_path / "z" / "x.npy"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "z" / "loop").symlink_to(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    expected = ["b.JPG", "c.webp", "loop.png", "a/10.jpeg", "a/2.png", "z/y/x.png"]
    assert list_images([tmp_path]) == [tmp_path / name for name in expected]
    other = tmp_path / "notes.txt"  # given by name, a file is an image whatever it is called
    assert list_images([other, str(tmp_path / "a")]) == [other, *(tmp_path / "a" / n for n in ("10.jpeg", "2.png"))]


def test_bad_images_are_reported_and_the_rest_is_done(capsys, file, tmp_path):
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


def test_photographs_of_several_kinds_of_file_are_read(weights, tmp_path):
    for name in IMAGES:
        write_image(tmp_path / name)
    predictions = list(predict(weights, [tmp_path / name for name in IMAGES]))
    assert [p.path.name for p in predictions if p.error] == ["other.tiff"]


# The command.


def test_text_json_and_csv_say_the_same(capsys, file, tmp_path):
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
def test_a_command_that_cannot_be_obeyed_is_one_sentence(capsys, file, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").mkdir()
    images = write_images(tmp_path / "images", 1)
    code, out, err = run(capsys, f"--weights={file}", *images, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_weights_that_cannot_predict_are_refused_before_an_image_is_read(weights):
    model, variables, card = weights
    headless = create_model("mobilenet_v1", width=0.1, num_classes=0)
    with pytest.raises(ValueError, match="the weights tiny have no classifier"):
        predict((headless, variables, card), ["gone.png"])
    small = {**card, "preprocessing": {**card["preprocessing"], "image_size": 0}}
    with pytest.raises(ValueError, match="the card of the weights tiny: its preprocessing has image_size 0"):
        predict((model, variables, small), ["gone.png"])
    with pytest.raises(ValueError, match="there are no images"):
        predict(weights, [])


def test_interruption_is_no_traceback(capsys, monkeypatch):
    def interrupt(flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_module, "run", interrupt)
    assert run(capsys, "--weights=w", "a.png") == (130, "", "interrupted\n")


def test_names_of_any_bytes_and_a_reader_that_leaves(file, tmp_path):
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


# Damage.


@pytest.mark.parametrize("name", IMAGES)
def test_mutated_images_are_read_or_refused_in_a_sentence(tmp_path, name):
    """A dozen of each; benchmarks/mutate.py makes thousands."""
    source = tmp_path / name
    write_image(source)
    data, before = source.read_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes, path = [], tmp_path / f"mutated{source.suffix}"
    for i in range(12):
        path.write_bytes(mutate(data, random.Random(f"{name} {i}")))
        outcomes.append(try_file(path, read_image))
    assert "refused" in outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kB
