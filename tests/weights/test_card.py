import json
from pathlib import Path

import jax
import pytest

from mobilenet_jax.models.spec_json import to_json
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.card import (
    HALF,
    IMAGENET,
    check_card,
    format_card,
    hash_file,
    make_card,
    read_imagenet_classes,
)
from mobilenet_jax.weights.load import load_weights

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "x" * 3000, 7])
def test_text_that_a_terminal_would_obey_is_refused(text):
    for changes in ({"class_names": ["cat", text]}, {"notes": [text]}, {"name": text}):
        with pytest.raises(WeightsError, match=r"no text|text with control characters|no valid 'name'"):
            check_card({**CARD, **changes}, source="w")


@pytest.mark.parametrize(
    ("key", "value"), [("expanded", 0), ("expanded", -8), ("filters", 0), ("stride", 0), ("kernel", 2), ("dilation", 0)]
)
def test_rows_that_cannot_be_are_refused(key, value):
    for convention, model in (
        ("timm", "mobilenet_v3_small"),
        ("timm", "mobilenet_edgetpu_v2_xs"),
        ("timm", "mobilenet_v4_conv_small"),
    ):
        spec = to_json(make_spec(model, num_classes=2, convention=convention))
        row = next(row for row in spec["rows"] if key in row and "expanded" in row)
        row[key] = value
        with pytest.raises(WeightsError, match="the card of w holds no network: impossible row"):
            check_card({**CARD, "spec": spec}, source="w")


def test_ends_and_rows_that_cannot_be_are_refused():
    spec = to_json(SPEC)
    fused = to_json(make_spec("mobilenet_edgetpu_v2_xs", num_classes=2, convention="timm"))
    next(row for row in fused["rows"] if row["kind"] == "FusedInvertedResidual")["group_size"] = -8
    for changed, message in (
        ({**spec, "in_channels": 0}, "in_channels is 0"),
        ({**spec, "hidden": -1}, "hidden -1"),
        ({**spec, "rows": spec["rows"] * 100}, "rows; valid: at most 1,000"),
        (fused, "group_size is -8; valid: a divisor"),
    ):
        with pytest.raises(WeightsError, match=f"the card of w holds no network: .*{message}"):
            check_card({**CARD, "spec": changed}, source="w")


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


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "results").glob("*.safetensors")), ids=lambda path: path.stem)
def test_the_page_of_a_shipped_file_says_what_its_card_says(path):
    _, variables, card = load_weights(path)
    page = path.with_suffix(".card.md").read_text()
    assert page.startswith(format_card(card, path=str(path.relative_to(ROOT))))
    assert f"| parameters | {sum(leaf.size for leaf in jax.tree.leaves(variables['params'])):,} |" in page
    assert "## Training and licence" in page
