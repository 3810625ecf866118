from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.mutate import IMAGES, write_image
from benchmarks.speed.photographs import load_sources
from mobilenet_jax.data.decode import decode_image
from mobilenet_jax.data.transforms import EvalTransform
from mobilenet_jax.inference import predict as predict_module
from mobilenet_jax.inference.predict import Prediction, predict
from mobilenet_jax.models.network import create_model
from mobilenet_jax.weights.load import load_weights

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


def test_answers_are_the_models_softmax_in_falling_order(tiny_weights, tmp_path, write_images):
    model, variables, card = tiny_weights
    paths = write_images(tmp_path, 5)
    transform = EvalTransform(32, 0.8, "bilinear", squash=False)
    images = np.stack([transform(decode_image(path, name="")) for path in paths])
    logits = jax.jit(model.apply)(variables, (images.astype(np.float32) - 127.5) / 127.5)
    expected = np.asarray(jax.nn.softmax(logits))
    for path, answers, row in zip(paths, predict(tiny_weights, [tmp_path], top=9), expected, strict=True):
        assert (answers.path, answers.error) == (path, None)
        order = np.argsort(-row)
        assert [answer.index for answer in answers.answers] == order.tolist()
        assert [answer.name for answer in answers.answers] == [card["class_names"][i] for i in order]
        np.testing.assert_allclose([answer.probability for answer in answers.answers], row[order], atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_size_of_a_batch_changes_nothing_and_one_program_is_compiled(
    tiny_weights, tmp_path, monkeypatch, batch_size, write_images
):
    write_images(tmp_path, 7)
    programs = []
    compile_program = predict_module.compile_classifier
    monkeypatch.setattr(
        predict_module, "compile_classifier", lambda *a, **k: programs.append(compile_program(*a, **k)) or programs[-1]
    )
    got = list(predict(tiny_weights, [tmp_path], batch_size=batch_size))
    assert programs[0]._cache_size() == 1
    want = list(predict(tiny_weights, [tmp_path], batch_size=7))
    assert [p.path for p in got] == [p.path for p in want]
    for left, right in zip(got, want, strict=True):
        assert [a.name for a in left.answers] == [a.name for a in right.answers]
        np.testing.assert_allclose([a.probability for a in left.answers], [a.probability for a in right.answers], 1e-5)


def test_without_names_classes_are_numbers(tiny_weights, tmp_path, write_images):
    paths = write_images(tmp_path, 1)
    model, variables, card = tiny_weights
    (prediction,) = predict((model, variables, {**card, "class_names": None}), paths)
    assert [answer.name for answer in prediction.answers] == [str(answer.index) for answer in prediction.answers]


def test_an_answer_that_is_not_finite_is_an_error(tiny_weights, tmp_path, write_images):
    model, variables, card = tiny_weights
    bias = np.array([np.inf, 0, 0], np.float32)
    classifier = {**variables["params"]["classifier"], "bias": bias}
    broken = {**variables, "params": {**variables["params"], "classifier": classifier}}
    (prediction,) = predict((model, broken, card), write_images(tmp_path, 1))
    assert prediction == Prediction(
        tmp_path / "00.png", [], f"{tmp_path / '00.png'}: the network's answer is not finite"
    )


def test_photographs_of_several_kinds_of_file_are_read(tiny_weights, tmp_path):
    for name in IMAGES:
        write_image(tmp_path / name)
    predictions = list(predict(tiny_weights, [tmp_path / name for name in IMAGES]))
    assert [p.path.name for p in predictions if p.error] == ["other.tiff"]


def test_fast_decoding_changes_large_jpegs_a_little_and_nothing_else(tiny_weights, tmp_path, write_images):
    model, variables, card = tiny_weights
    small, *_ = write_images(tmp_path, 1)
    large = tmp_path / "large.jpg"
    next(iter(load_sources().values())).resize((400, 300)).save(large, quality=92)
    nearest = {**card, "preprocessing": {**card["preprocessing"], "interpolation": "nearest"}}
    found = {}
    for name, own in (("filtered", card), ("nearest", nearest)):
        for decode in ("exact", "fast"):
            predictions = predict((model, variables, own), [small, large], decode=decode)
            found[name, decode] = [[p.answers[i].probability for i in range(3)] for p in predictions]
    np.testing.assert_array_equal(found["nearest", "exact"], found["nearest", "fast"])
    exact, fast = found["filtered", "exact"], found["filtered", "fast"]
    assert exact[0] == fast[0]
    assert exact[1] != fast[1]
    np.testing.assert_allclose(exact[1], fast[1], atol=0.01)
    with pytest.raises(ValueError, match=r"^decode is 'draft'; valid: exact, fast$"):
        predict(tiny_weights, [small], decode="draft")


def test_weights_that_cannot_predict_are_refused_before_an_image_is_read(tiny_weights):
    model, variables, card = tiny_weights
    headless = create_model("mobilenet_v1", width=0.1, num_classes=0)
    with pytest.raises(ValueError, match="the weights tiny have no classifier"):
        predict((headless, variables, card), ["gone.png"])
    small = {**card, "preprocessing": {**card["preprocessing"], "image_size": 0}}
    with pytest.raises(ValueError, match="the card of the weights tiny: its preprocessing has image_size 0"):
        predict((model, variables, small), ["gone.png"])
    with pytest.raises(ValueError, match="there are no images"):
        predict(tiny_weights, [])


def test_weights_for_grey_images_are_refused_before_an_image_is_read(tiny_weights, tmp_path):
    model, variables, card = tiny_weights
    grey = model.clone(spec=replace(model.spec, in_channels=1))
    with pytest.raises(ValueError, match="the weights tiny take 1 channels; images have 3"):
        predict((grey, variables, card), [tmp_path])
