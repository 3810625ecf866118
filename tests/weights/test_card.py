import json

import pytest

from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import HALF, IMAGENET, check_card, hash_file, make_card, read_imagenet_classes

SPEC = make_spec("mobilenet_v3_small", width=0.5, num_classes=2, convention="timm")
CARD = make_card(
    name="timm/mobilenetv3_small_050",
    model="mobilenet_v3_small",
    width=0.5,
    convention="timm",
    spec=SPEC,
    preprocessing=HALF,
    class_names=["cat", "dog"],
    source={"file": "w.pth", "sha256": "00"},
)


def test_a_card_goes_through_json():
    assert json.loads(json.dumps(CARD)) == CARD
    assert check_card(json.loads(json.dumps(CARD)), source="w") == SPEC
    assert CARD["spec"] == to_json(SPEC)
    assert (CARD["metrics"], CARD["notes"]) == ({}, [])


@pytest.mark.parametrize("key", CARD)
def test_every_key_is_needed(key):
    with pytest.raises(WeightsError, match=f"the card of w has no valid '{key}'"):
        check_card({k: v for k, v in CARD.items() if k != key}, source="w")
    with pytest.raises(WeightsError, match=f"the card of w has no valid '{key}'"):
        check_card({**CARD, key: object()}, source="w")
    with pytest.raises(WeightsError, match="no JSON object"):
        check_card([CARD], source="w")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mean", [1, 2]),
        ("mean", [1, 2, float("nan")]),
        ("std", [0, 1, 1]),
        ("std", "abc"),
        ("image_size", 10**9),
        ("image_size", True),
        ("crop_share", 1e-9),
        ("crop_share", "1"),
        ("interpolation", "lanczos"),
        ("squash", 1),
        ("other", 1),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(key, value):
    card = {**CARD, "preprocessing": {**CARD["preprocessing"], key: value}}
    with pytest.raises(WeightsError, match=r"^the card of w: ") as caught:
        check_card(card, source="w")
    assert len(str(caught.value).splitlines()) == 1


def test_class_names_are_text():
    with pytest.raises(WeightsError, match="class names that are no text"):
        check_card({**CARD, "class_names": ["cat", 7]}, source="w")


def test_trap_24_preprocessing_is_in_grey_levels():
    # torchvision: mean .485 .456 .406, std .229 .224 .225 of x / 255; Keras: x / 127.5 - 1
    assert [x / 255 for x in IMAGENET.mean] == pytest.approx([0.485, 0.456, 0.406])
    assert [x / 255 for x in IMAGENET.std] == pytest.approx([0.229, 0.224, 0.225])
    assert [(0 - m) / s for m, s in zip(HALF.mean, HALF.std, strict=True)] == [-1, -1, -1]
    assert [(255 - m) / s for m, s in zip(HALF.mean, HALF.std, strict=True)] == [1, 1, 1]


def test_imagenets_classes():
    names = read_imagenet_classes()
    assert len(names) == 1000
    assert (names[0], names[281], names[285], names[999]) == ("tench", "tabby", "Egyptian cat", "toilet tissue")


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "w").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert hash_file(tmp_path / "w") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
