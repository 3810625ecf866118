import pytest

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.summary import diff_specs, format_diff, format_table, format_totals, make_summary
from mobilenet_jax.models.zoo import make_spec


def diff(left: str, right: str, width: float = 1.0) -> list[dict]:
    """Return the differences between two MODEL:CONVENTION at 224 pixels."""
    a, b = (make_spec(m, width=width, convention=c) for m, c in (name.split(":") for name in (left, right)))
    return diff_specs(a, b, 224)


def test_trap_09_the_summary_states_the_trainable_count():
    channels = [16, 16, 16, 64, 64, 24, 72, 72, 24, 72, 72, 24, 72, 32, 96, 96, 24, 96, 32, 96, 96, 24, 96, 32]
    channels += [192, 192, 64, 160, 160, 64, 144, 144, 64, 144, 144, 64, 384, 384, 96, 384, 88]
    channels += [528, 528, 136, 528, 88, 528, 528, 136, 528, 120] + 2 * [720, 720, 184, 720, 120]
    assert make_summary(make_spec("mobilenet_v3_large", width=0.75), 224) == {
        "model": "mobilenet_v3_large",
        "resolution": 224,
        "num_classes": 1000,
        "params": 3_993_528,
        "batch_stats": 19_088,
        "madds": 154_560_624,
        "attention_madds": 0,
        "channels": [*channels, 720, 1280, 1000],
        # 64 channels of the first expansion and 16 of its input, at 112 px, in float32
        "activation_bytes_inference": 4 * 112 * 112 * (64 + 16),
        "activation_bytes_training": 34_520_928,
        "standard_params": 10_783_000,
        "standard_madds": 872_918_656,
    }


def test_trap_10_table_adds_up_to_the_grouped_count():
    spec = make_spec("mobilenet_v2")
    rows = [line.split() for line in format_table(compute_cost(spec, 224)).splitlines()[1:]]
    assert [row[0] for row in rows] == ["stem", *(f"block_{i:02d}" for i in range(17)), "head", "classifier"]
    assert [rows[i][1] for i in (0, 1, 17, 18, 19)] == [
        "112x112x32",
        "112x112x16",
        "7x7x320",
        "7x7x1280",
        "1x1x1000",
    ]
    numbers = [[int(field.replace(",", "")) for field in row[2:4]] for row in rows]
    assert [sum(column) for column in zip(*numbers, strict=True)] == [3_504_872, 300_774_272]
    assert sum(float(row[4].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.05 * len(rows))
    totals = format_totals(make_summary(spec, 224))
    for text in (
        "trainable parameters        3,504,872",
        "statistics       34,112",
        "multiply-adds               300,774,272",
    ):
        assert text in totals


def test_totals_compare_with_standard_convolutions():
    # 1704.04861, Table 4
    totals = format_totals(make_summary(make_spec("mobilenet_v1"), 224))
    assert "29,294,088 parameters, 4,867,293,184 multiply-adds: 8.56 times as many" in totals


def test_diff_names_what_two_conventions_build_differently():
    found = {
        (d["row"], d["field"]): (d["left"], d["right"]) for d in diff("mobilenet_v2:keras", "mobilenet_v2:torchvision")
    }
    assert found == {
        ("", "padding"): ("same", "symmetric"),
        ("", "bn_epsilon"): (1e-3, 1e-5),
        ("", "bn_decay"): (0.999, 0.9),
    }


def test_trap_02_diff_shows_the_two_width_rules_row_by_row():
    names = ("mobilenet_v3_large:keras", "mobilenet_v3_large:torchvision")
    lines = [line.split() for line in format_diff(diff(*names, width=0.75), names).splitlines()]
    assert lines[0] == ["row", "field", *names]
    assert ["network", "params", "3,993,528", "3,377,576"] in lines
    assert ["block_01", "expanded", "64", "48"] in lines
    # The differences of the rows add up to the difference of the networks.
    rows = [
        [int(cell.replace(",", "")) for cell in line[2:]]
        for line in lines
        if line[1] == "params" and line[0] != "network"
    ]
    assert sum(left - right for left, right in rows) == 3_993_528 - 3_377_576
    assert "stem" not in {line[0] for line in lines}  # 16 channels in both at this width


def test_diff_of_two_models_shows_rows_that_one_lacks():
    differences = diff("mobilenet_v4_conv_small:timm", "mobilenet_v2:timm")
    found = {(d["row"], d["field"]): (d["left"], d["right"]) for d in differences}
    assert found["block_04", "kind"] == ("UniversalInverted", "InvertedResidual")
    assert found["block_04", "start"] == (5, None)
    assert found["block_16", "kind"] == (None, "InvertedResidual")
    assert found["hidden", "params"] == (960 * 1280 + 2 * 1280, None)
    assert ("classifier", "params") not in found  # 1280 x 1000 in both
