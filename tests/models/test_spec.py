import json
import math
import re
from dataclasses import replace
from typing import Any, cast

import pytest

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.ops import ConvOp, DepthwiseOp, pads
from mobilenet_jax.models.options import BLOCK_FORMS, OPTIONS, with_activation, with_shallow
from mobilenet_jax.models.spec import (
    Conv,
    FusedInvertedResidual,
    InvertedResidual,
    MultiQueryAttention,
    Residual,
    Separable,
    UniversalInverted,
    make_divisible,
)
from mobilenet_jax.models.spec_json import from_json, to_json
from mobilenet_jax.models.zoo import CONVENTIONS, MODELS, make_spec

INVERTED = [name for name in MODELS if name != "mobilenet_v1"]


def _blocks(spec):
    """Return the inverted residual rows of a spec with their input channels."""
    return [(row, channels) for _, row, channels in spec.rows() if isinstance(row, InvertedResidual)]


def _activations(spec):
    """Return the activation of each row of a spec that has one."""
    return [row.activation for _, row, _ in spec.rows() if not isinstance(row, MultiQueryAttention)]


def _residuals(spec):
    """Return, for each row of a spec, true if it has a residual."""
    return [isinstance(row, Residual) and row.has_residual(channels) for _, row, channels in spec.rows()]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 8),
        (8, 8),
        (11.9, 16),
        (12, 16),
        (20, 24),
        (36, 40),
        (24 * 1.4, 32),
        (96 * 1.4, 136),
        (1280 * 1.4, 1792),
    ],
)
def test_make_divisible(value, expected):
    assert make_divisible(value) == expected


def test_trap_03_rounding_never_falls_below_nine_tenths():
    # The nearest multiple of 8 to 11 is 8, which is less than 9.9.
    assert make_divisible(11) == 16
    assert make_divisible(18 * 1.05) == 24  # nearest: 16 < 17.01
    assert make_divisible(40 * 0.5) == 24
    for value in range(1, 2000):
        rounded = make_divisible(value)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * value
        assert abs(rounded - value) < 8


def test_trap_03_rounding_at_width_1_4():
    widths = [row.filters for row, _ in _blocks(make_spec("mobilenet_v2", width=1.4))]
    assert widths == [24] + 2 * [32] + 3 * [48] + 4 * [88] + 3 * [136] + 3 * [224] + [448]


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 1, 1)])
def test_trap_05_same_and_symmetric_padding(size, kernel, stride, dilation):
    reach = dilation * (kernel - 1)
    before, after = pads(size, kernel, stride, dilation, "same")
    # TensorFlow: ceil(size / stride) outputs, the odd zero behind.
    assert (size + before + after - reach - 1) // stride + 1 == -(-size // stride)
    assert after - before in (0, 1)
    assert pads(size, kernel, stride, dilation, "symmetric") == (reach // 2, reach // 2)
    if stride == 1:
        assert before == after == reach // 2


def test_trap_05_stride_two_pads_by_convention():
    assert pads(224, 3, 2, 1, "same") == (0, 1)
    assert pads(225, 3, 2, 1, "same") == (1, 1)
    assert pads(224, 5, 2, 1, "same") == (1, 2)
    assert pads(224, 3, 2, 1, "symmetric") == (1, 1)
    found = {
        (name, convention): make_spec(name, convention=convention).padding
        for name in MODELS
        for convention in CONVENTIONS
    }
    for (name, convention), padding in found.items():
        same = "keras_v1" if name.startswith("mobilenet_v1") and convention == "keras" else "same"
        assert padding == (same if convention in ("keras", "timm_tf") else "symmetric")
    # Keras' V1 pads (0, 1) before a strided depthwise whatever the parity; its stem pads as TensorFlow.
    spec = make_spec("mobilenet_v1", convention="keras")
    stem, block = spec.stem.ops(3)[0], spec.blocks[1].ops(64)[0]
    assert isinstance(block, DepthwiseOp)
    assert (stem.pads(33, 32, "keras_v1"), block.pads(33, 32, "keras_v1")) == (
        ((1, 1), (0, 1)),
        ((0, 1), (0, 1)),
    )


def test_trap_02_v2_expands_the_scaled_input():
    spec = make_spec("mobilenet_v2", width=1.4)
    assert all(row.expanded == 6 * channels for row, channels in _blocks(spec)[1:])
    assert compute_cost(spec, 224).madds == 582_195_824  # 578 million with absolute widths scaled


def test_trap_02_v2_head_is_never_narrower():
    heads = {width: make_spec("mobilenet_v2", width=width).head for width in (0.35, 0.5, 1.0, 1.3, 1.4)}
    assert {width: head and head.filters for width, head in heads.items()} == {
        0.35: 1280,
        0.5: 1280,
        1.0: 1280,
        1.3: 1664,
        1.4: 1792,
    }


def test_trap_02_v1_truncates_in_keras_and_rounds_in_timm():
    keras, timm = (make_spec("mobilenet_v1", width=0.35, convention=c) for c in ("keras", "timm"))
    assert [row.filters for row in keras.blocks[:4]] == [22, 44, 44, 89]
    assert [row.filters for row in timm.blocks[:4]] == [24, 48, 48, 88]
    assert (keras.stem.filters, timm.stem.filters) == (11, 16)


@pytest.mark.parametrize(
    ("model", "width", "convention", "params"),
    [
        ("mobilenet_v3_large", 0.75, "keras", 3_993_528),
        ("mobilenet_v3_large", 0.75, "timm", 3_993_528),
        ("mobilenet_v3_large", 0.75, "torchvision", 3_377_576),
        ("mobilenet_v3_small", 0.75, "keras", 2_041_872),
        ("mobilenet_v3_small", 0.75, "torchvision", 1_653_920),
    ],
)
def test_trap_02_v3_has_two_width_rules(model, width, convention, params):
    assert compute_cost(make_spec(model, width=width, convention=convention), 224).params == params


def test_trap_02_v3_stem_and_last_layers_by_framework():
    # Keras: 16 at every width; timm: fixed below .75; torchvision: scaled.
    stems = {
        (c, w): make_spec("mobilenet_v3_large", width=w, convention=c).stem.filters
        for c in ("keras", "timm", "torchvision")
        for w in (0.5, 1.5)
    }
    assert stems == {
        ("keras", 0.5): 16,
        ("keras", 1.5): 16,
        ("timm", 0.5): 16,
        ("timm", 1.5): 24,
        ("torchvision", 0.5): 8,
        ("torchvision", 1.5): 24,
    }
    # The last 1x1 off the quarter grid: 6 times the scaled last row, or the scaled 576.
    heads = {
        c: make_spec("mobilenet_v3_small", width=0.35, convention=c).head for c in ("keras", "timm", "torchvision")
    }
    assert {c: head and head.filters for c, head in heads.items()} == {
        "keras": 192,
        "timm": 200,
        "torchvision": 192,
    }


def test_trap_07_v3_width_scales_every_row():
    for convention in CONVENTIONS:
        full = make_spec("mobilenet_v3_large", convention=convention)
        half = make_spec("mobilenet_v3_large", width=0.5, convention=convention)
        for (row, _), (narrow, _) in list(zip(_blocks(full), _blocks(half), strict=True))[1:]:
            assert narrow.filters == make_divisible(row.filters / 2)
            assert 0.4 <= narrow.expanded / row.expanded <= 0.67


def test_trap_04_strides_sit_where_the_papers_put_them():
    """The blocks at stride 2, and the cost of the network at 224 px."""
    strided = {
        name: [i for i, row in enumerate(make_spec(name).blocks) if row.stride == 2]
        for name in ("mobilenet_v1", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")
    }
    assert strided == {
        "mobilenet_v1": [1, 3, 5, 11],
        "mobilenet_v2": [1, 3, 6, 13],
        "mobilenet_v3_large": [1, 3, 6, 12],
        "mobilenet_v3_small": [0, 1, 3, 8],
    }
    spec = make_spec("mobilenet_v2")
    assert compute_cost(spec, 224).madds == 300_774_272
    blocks = list(spec.blocks)  # the slip seen elsewhere: the stride of the 64 in the 96, 430 million
    blocks[6], blocks[10] = replace(blocks[6], stride=1), replace(blocks[10], stride=2)
    assert compute_cost(replace(spec, blocks=tuple(blocks)), 224).madds > 400_000_000


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_trap_06_activations_are_the_papers(convention):
    """V1 and V2: ReLU6. V3: ReLU and hard-swish by the row. Minimalistic: ReLU alone."""
    for name in ("mobilenet_v1", "mobilenet_v2"):
        spec = make_spec(name, convention=convention)
        assert set(_activations(spec)) == {"relu6"}
    tables = {"mobilenet_v3_large": (6, 9), "mobilenet_v3_small": (3, 8)}
    for name, (relu, hard_swish) in tables.items():
        spec = make_spec(name, convention=convention)
        expected = ["hard_swish"] + relu * ["relu"] + (hard_swish + 1) * ["hard_swish"]
        assert _activations(spec) == expected
        assert spec.hidden_activation == "hard_swish"
        small = make_spec(f"{name}_minimalistic", convention=convention)
        assert set(_activations(small)) == {small.hidden_activation} == {"relu"}
        assert all(row.kernel == 3 and row.se is None for row, _ in _blocks(small))


@pytest.mark.parametrize("name", INVERTED)
def test_trap_08_squeeze_excite_is_a_quarter_of_the_expansion(name):
    for row, _ in _blocks(make_spec(name)):
        if row.se:
            assert row.se.channels(row.expanded) == make_divisible(row.expanded / 4)
            assert row.se.gate == "hard_sigmoid"
            assert [op.name for op in row.ops(8)][-3:] == ["depthwise", "se", "project"]
    count = sum(row.se is not None for row, _ in _blocks(make_spec(name)))
    assert count == {"mobilenet_v3_large": 8, "mobilenet_v3_small": 9}.get(name, 0)


@pytest.mark.parametrize(
    ("name", "residuals"), [("mobilenet_v2", 10), ("mobilenet_v3_large", 10), ("mobilenet_v3_small", 6)]
)
def test_trap_11_linear_bottlenecks_and_residuals(name, residuals):
    rows = _blocks(make_spec(name))
    assert {row.projection_activation for row, _ in rows} == {"linear"}
    for row, channels in rows:
        assert row.has_residual(channels) == (row.stride == 1 and channels == row.filters)
    assert sum(row.has_residual(channels) for row, channels in rows) == residuals


@pytest.mark.parametrize(
    ("start", "middle", "stride", "expected"),
    [
        (3, 5, 2, [("start/depthwise", 3, 1), ("expand", 1, 1), ("depthwise", 5, 2), ("project", 1, 1)]),
        (0, 3, 2, [("expand", 1, 1), ("depthwise", 3, 2), ("project", 1, 1)]),
        (5, 0, 2, [("start/depthwise", 5, 2), ("expand", 1, 1), ("project", 1, 1)]),
        (0, 0, 1, [("expand", 1, 1), ("project", 1, 1)]),
    ],
    ids=["extra depthwise", "inverted bottleneck", "ConvNext-like", "feed-forward"],
)
def test_universal_bottleneck_has_four_forms(start, middle, stride, expected):
    row = UniversalInverted(expanded=64, filters=16, start=start, kernel=middle, stride=stride)
    ops = row.ops(16)
    assert [(op.name, op.kernel, op.stride) for op in ops if isinstance(op, ConvOp)] == expected
    assert all(isinstance(op, DepthwiseOp) == op.name.endswith("depthwise") for op in ops)
    # No activation behind the first depthwise and the projection.
    assert {op.name: op.activation for op in ops if isinstance(op, ConvOp) and op.activation != "linear"} == {
        name: "relu" for name, *_ in expected if name in ("expand", "depthwise")
    }
    # Antialiased, the convolution that had the stride leaves it to the filter behind it.
    spread = [[(n, k, 1), "avg"] if s == 2 else [(n, k, s)] for n, k, s in expected]
    antialiased = [
        (op.name, op.kernel, op.stride) if isinstance(op, ConvOp) else getattr(op, "antialias", None)
        for op in replace(row, antialias="avg").ops(16)
    ]
    assert antialiased == [op for ops in spread for op in ops]


def test_v4_forms_are_the_papers():
    """Count the rows: extra depthwise, inverted bottleneck, ConvNext-like, feed-forward, attention."""

    def count(size):
        rows = make_spec(f"mobilenet_v4_{size}").blocks
        forms = [(row.start > 0, row.kernel > 0) for row in rows if isinstance(row, UniversalInverted)]
        counts = [forms.count(form) for form in ((True, True), (False, True), (True, False), (False, False))]
        return [*counts, sum(isinstance(row, MultiQueryAttention) for row in rows)]

    assert {size: count(size) for size in ("conv_small", "conv_medium", "conv_large", "hybrid_medium")} == {
        "conv_small": [3, 8, 1, 0, 0],
        "conv_medium": [13, 0, 4, 4, 0],
        "conv_large": [19, 0, 7, 0, 0],
        "hybrid_medium": [13, 0, 5, 4, 8],
    }
    hybrid = make_spec("mobilenet_v4_hybrid_large")
    assert set(_activations(hybrid)) == {hybrid.hidden_activation} == {"gelu"}
    hybrid = make_spec("mobilenet_v4_hybrid_large", activation="relu6")  # attention has none to change
    assert set(_activations(hybrid)) == {hybrid.hidden_activation} == {"relu6"}
    assert {row.layer_scale for row in hybrid.blocks if isinstance(row, UniversalInverted | MultiQueryAttention)} == {
        1e-5
    }


def test_trap_02_v4_width_spares_stem_and_hidden_layer():
    found = {}
    for width in (0.35, 0.75, 1.0, 1.5):
        spec = make_spec("mobilenet_v4_conv_small", width=width)
        found[width] = (spec.stem.filters, spec.head and spec.head.filters, spec.hidden)
    assert found == {0.35: (32, 336, 1280), 0.75: (32, 720, 1280), 1.0: (32, 960, 1280), 1.5: (48, 1440, 1280)}


def test_activation_everywhere():
    spec = make_spec("mobilenet_v3_large", activation="relu6")
    assert set(_activations(spec)) == {spec.hidden_activation} == {"relu6"}
    assert {row.projection_activation for row, _ in _blocks(spec)} == {"linear"}
    assert with_activation(make_spec("mobilenet_v1"), "relu").hidden_activation == "linear"  # it has no hidden layer


def test_projection_activation():
    spec = make_spec("mobilenet_v2", projection_activation="relu6")
    ops = [op for row, c in _blocks(spec) for op in row.ops(c)]
    assert [op.activation for op in ops if isinstance(op, ConvOp) and op.name == "project"] == 17 * ["relu6"]


def test_sum_activation():
    assert make_spec("mobilenet_v2").sum_activation == "linear"
    assert make_spec("mobilenet_v2", sum_activation="relu6").sum_activation == "relu6"
    old = to_json(make_spec("mobilenet_v2"))
    del old["sum_activation"]  # files written before the field existed lack it
    assert from_json(old) == make_spec("mobilenet_v2")


def test_hard_swish_from_counts_blocks():
    """In V3-Large, 6 is the table and 0 is hard-swish everywhere; stem and last layers always keep it."""
    assert make_spec("mobilenet_v3_large", hard_swish_from=6) == make_spec("mobilenet_v3_large")
    everywhere = make_spec("mobilenet_v3_large", activation="hard_swish")
    assert make_spec("mobilenet_v3_large", hard_swish_from=0) == everywhere
    late = make_spec("mobilenet_v3_large", hard_swish_from=10)
    assert _activations(late) == ["hard_swish", *10 * ["relu"], *6 * ["hard_swish"]]
    assert late.hidden_activation == "hard_swish"


def test_block_forms_are_those_of_figure_2():
    """The forms of 1801.04381 Fig. 2 keep the table's channels, kernels and strides, with other layers between."""
    for name, forms in (("mobilenet_v1", ("regular", "separable")), ("mobilenet_v2", BLOCK_FORMS)):
        for form in forms:
            table, spec = make_spec(name), make_spec(name, block_form=form)
            for row, original in zip(spec.blocks, table.blocks, strict=True):
                fields = ("filters", "kernel", "stride", "dilation", "activation")
                assert [getattr(row, f) for f in fields] == [getattr(original, f) for f in fields]
            assert (spec.stem, spec.head) == (table.stem, table.head)
    kinds = {form: {type(row) for row in make_spec("mobilenet_v2", block_form=form).blocks} for form in BLOCK_FORMS}
    assert list(kinds.values()) == [{Conv}, {Separable}, {InvertedResidual}, {InvertedResidual}]
    assert make_spec("mobilenet_v1", block_form="separable") == make_spec("mobilenet_v1")
    assert make_spec("mobilenet_v2", block_form="inverted_residual") == make_spec("mobilenet_v2")
    # The same layers without residuals; a row that has none does not gain one.
    linear = make_spec("mobilenet_v2", block_form="linear_bottleneck", stride_one=(0, 1, 2, 3, 4))
    assert not any(_residuals(linear))
    assert compute_cost(linear, 32).params == 3_504_872
    small = make_spec("mobilenet_v2", block_form="inverted_residual", stride_one=(0, 2))
    assert sum(_residuals(small)) == 10
    # Dilation and strides come after, because every row has them.
    dilated = make_spec("mobilenet_v2", block_form="regular", output_stride=8)
    assert [row.dilation for row in dilated.blocks][-1] == 4


def test_shallow_leaves_out_the_longest_run_of_equal_blocks():
    full, spec = make_spec("mobilenet_v1"), make_spec("mobilenet_v1", shallow=True)
    assert spec.blocks == full.blocks[:6] + full.blocks[11:]  # 1704.04861 Table 5: five of 14x14x512
    assert {row.filters for row in full.blocks[6:11]} == {512}
    assert make_spec("mobilenet_v1", shallow=False) == full
    assert len(make_spec("mobilenet_v2", shallow=True).blocks) == 17 - 3
    with pytest.raises(ValueError, match="shallow does not apply to mobilenet_v1: it has no two equal blocks in a row"):
        with_shallow(replace(full, blocks=full.blocks[:4]), True)


def test_expansion():
    for factor in (3, 4.5):
        rows = _blocks(make_spec("mobilenet_v2", expansion=factor))
        assert [row.expanded for row, c in rows[1:]] == [make_divisible(factor * c) for _, c in rows[1:]]
        assert not rows[0][0].expands
    one = make_spec("mobilenet_v2", expansion=1)
    assert all(not row.expands and row.expanded == channels for row, channels in _blocks(one))
    assert not any(c.op.name == "expand" for c in compute_cost(one, 64).ops)


def test_squeeze_excite_options():
    def reduced(**options):
        rows = _blocks(make_spec("mobilenet_v3_small", **options))
        return [row.se.channels(row.expanded) for row, _ in rows if row.se]

    expanded = [16, 96, 240, 240, 120, 144, 288, 576, 576]
    assert reduced() == [make_divisible(e / 4) for e in expanded] == [8, 24, 64, 64, 32, 40, 72, 144, 144]
    assert reduced(se_rounding="int") == [e // 4 for e in expanded]
    assert reduced(se_ratio=0.1) == [8, 16, 24, 24, 16, 16, 32, 56, 56]
    assert reduced(se_ratio=0.01, se_rounding="int") == [1, 1, 2, 2, 1, 1, 2, 5, 5]
    assert reduced(se_ratio=0) == []
    assert all(row.se for row, _ in _blocks(make_spec("mobilenet_v2", se_ratio=0.25)))
    gates = [row.se and row.se.gate for row, _ in _blocks(make_spec("mobilenet_v2", se_ratio=1, se_gate="sigmoid"))]
    assert gates == 17 * ["sigmoid"]
    # Squeeze-excite is sized after the expansion.
    assert _blocks(make_spec("mobilenet_v3_small", expansion=2, se_ratio=0.5))[4][0].expanded == 80


def test_head_width():
    assert make_spec("mobilenet_v3_large", head_width=100).hidden == 100
    v2 = make_spec("mobilenet_v2", head_width=100)
    assert v2.head
    assert v2.head.filters == 100
    assert compute_cost(v2, 64).params == 3_504_872 - (1280 - 100) * (320 + 2 + 1000)


def _sizes(spec, size):
    """Return the side of the map behind each row that changes it."""
    sides = [size]
    for cost in compute_cost(spec, size).ops:
        if not cost.op.pooled and cost.height != sides[-1]:
            sides.append(cost.height)
    return sides


def test_stride_one_keeps_useful_maps_of_small_images():
    assert _sizes(make_spec("mobilenet_v1"), 32) == [32, 16, 8, 4, 2, 1]
    spec = make_spec("mobilenet_v1", stride_one=(0,))
    assert _sizes(spec, 32) == [32, 16, 8, 4, 2]
    assert _sizes(make_spec("mobilenet_v2", stride_one=(0, 2)), 32) == [32, 16, 8, 4]
    assert [row.stride for row in make_spec("mobilenet_v2", stride_one=(2,)).blocks][:7] == [
        1,
        2,
        1,
        1,
        1,
        1,
        2,
    ]
    # Weights and residuals are the table's.
    for name in MODELS:
        full, small = make_spec(name), make_spec(name, stride_one=(0, 1, 2, 3, 4))
        assert compute_cost(small, 32).params == compute_cost(full, 32).params
        assert _residuals(small) == _residuals(full)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride_turns_strides_into_dilation(name, output_stride):
    full, spec = make_spec(name), make_spec(name, output_stride=output_stride)
    assert _sizes(spec, 64)[-1] == 64 // output_stride
    assert compute_cost(spec, 64).params == compute_cost(full, 64).params
    # stride x dilation of what lies before a row is the stride there in the table.
    here, table = spec.stem.stride, full.stem.stride
    for row, original in zip(spec.blocks, full.blocks, strict=True):
        assert row.dilation * here == table
        here, table = here * row.stride, table * original.stride
    assert _residuals(spec) == _residuals(full)


def test_feature_names_mark_the_last_row_of_each_stride():
    assert make_spec("mobilenet_v2").taps() == {
        "stem": "stem",
        "stride2": "block_00",
        "stride4": "block_02",
        "stride8": "block_05",
        "stride16": "block_12",
        "stride32": "block_16",
        "final": "head",
    }
    assert make_spec("mobilenet_v3_small").taps()["stride2"] == "stem"
    # timm takes its features from blocks.0.1, blocks.1.1, blocks.2.5, blocks.3.5 and blocks.4.
    assert list(make_spec("mobilenet_v4_conv_small").taps().values())[2:] == [
        "block_01",
        "block_03",
        "block_09",
        "block_15",
        "head",
    ]
    assert make_spec("mobilenet_v1").taps()["final"] == make_spec("mobilenet_v1").taps()["stride32"] == "block_12"


def test_fields_are_set_as_given():
    given: dict[str, Any] = {
        "init": "slim",
        "dropout": 0.5,
        "drop_path": 0.1,
        "drop_path_flat": True,
        "bn_decay": 0.7,
        "bn_epsilon": 1e-4,
    }
    spec = make_spec("mobilenet_v2", **given)
    assert {key: getattr(spec, key) for key in given} == given
    assert make_spec("mobilenet_v2", **cast(Any, dict.fromkeys(OPTIONS))) == make_spec("mobilenet_v2")
    assert {make_spec(name).slim_stddev for name in ("mobilenet_v1", "mobilenet_v2")} == {0.09}
    assert make_spec("mobilenet_v3_small").slim_stddev == 0.008


def test_to_json_tells_specs_apart():
    specs = [make_spec(name, convention=convention) for name in MODELS for convention in ("keras", "torchvision")]
    options: list[dict[str, Any]] = [{"shortcut": "none"}, {"expansion": 5}, {"se_ratio": 0.5}]
    specs += [make_spec("mobilenet_v2", **option) for option in options]
    texts = {json.dumps(to_json(spec)) for spec in specs}
    assert len(texts) == len(specs)
    first = to_json(specs[0])["rows"][1]
    assert first == {
        "name": "block_00",
        "kind": "Separable",
        "filters": 64,
        "kernel": 3,
        "stride": 1,
        "dilation": 1,
        "activation": "relu6",
    }


@pytest.mark.parametrize("name", MODELS)
def test_json_gives_the_spec_back(name):
    spec = make_spec(name, convention="timm", num_classes=3)
    assert from_json(json.loads(json.dumps(to_json(spec)))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 5}, "it has no list of rows"),
        ({"rows": [{"kind": "Conv"}]}, "row 0 has no name"),
        ({"rows": [{"name": "stem", "kind": "Spec"}]}, "kind of row stem is 'Spec'; valid: Conv, Separable"),
        ({"rows": []}, "its rows have no stem"),
        ({"num_classes": "7"}, "spec.num_classes is '7'; valid: int"),
        ({"num_classes": True}, "spec.num_classes is True; valid: int"),
        ({"padding": "circular"}, "padding is 'circular'; valid: same"),
        ({"bn_epsilon": math.nan}, "bn_epsilon is nan"),
        ({"bn_epsilon": None}, "spec.bn_epsilon is None; valid: float"),
    ],
)
def test_json_of_no_spec_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_json({**to_json(make_spec("mobilenet_v3_small")), **change})


def test_json_of_rows_that_are_none_is_refused():
    data = to_json(make_spec("mobilenet_v3_small"))
    for change, message in (
        ({"kernel": "3"}, "row block_01.kernel is '3'; valid: int"),
        ({"kernel": 4}, "impossible row"),
        ({"se": {"ratio": 0.25}}, "row block_01.se.rounding is None; valid: str"),
        ({"se": 1}, "row block_01.se is 1; valid: SqueezeExcite or NoneType"),
        ({"name": "block_99"}, "rows are called stem, block_00, block_99"),
    ):
        rows = [{**row, **change} if row["name"] == "block_01" else row for row in data["rows"]]
        with pytest.raises(ValueError, match=re.escape(message)):
            from_json({**data, "rows": rows})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilenet_v5", {}, f"model name is 'mobilenet_v5'; valid: {', '.join(MODELS)}"),
        (
            "mobilenet_v2",
            {"convention": "torch"},
            "convention is 'torch'; valid: keras, timm, timm_tf, torchvision",
        ),
        ("mobilenet_v2", {"width": 0}, "width is 0; valid: a number, finite and above 0"),
        ("mobilenet_v2", {"width": float("inf")}, "width is inf; valid: a number, finite and above 0"),
        ("mobilenet_v2", {"width": float("nan")}, "width is nan; valid: a number, finite and above 0"),
        (
            "mobilenet_v1",
            {"width": 0.03},
            "width is 0.03: the stem would have no channel; valid: from 0.03125",
        ),
        ("mobilenet_v2", {"drop": 1}, f"model option is 'drop'; valid: {', '.join(OPTIONS)}"),
        (
            "mobilenet_v2",
            {"activation": "elu"},
            "activation is 'elu'; valid: linear, relu, relu6, hard_swish, gelu",
        ),
        (
            "mobilenet_v2",
            {"projection_activation": "elu"},
            "projection_activation is 'elu'; valid: linear, relu,",
        ),
        ("mobilenet_v2", {"shortcut": "dense"}, "shortcut is 'dense'; valid: bottleneck, expansion, none"),
        ("mobilenet_v2", {"init": "xavier"}, "init is 'xavier'; valid: he, slim"),
        ("mobilenet_v2", {"expansion": -1}, "expansion is -1; valid: above 0"),
        ("mobilenet_v2", {"output_stride": 12}, "output_stride is 12; valid: 8, 16, 32"),
        (
            "mobilenet_v2",
            {"stride_one": (5,)},
            "stride_one has 5; mobilenet_v2 has 5 stride-2 rows: 0 to 4 are valid",
        ),
        (
            "mobilenet_v2",
            {"stride_one": (-1,)},
            "stride_one has -1; mobilenet_v2 has 5 stride-2 rows: 0 to 4",
        ),
        ("mobilenet_v2", {"dropout": 1.0}, "dropout is 1.0; valid: from 0 to below 1"),
        ("mobilenet_v2", {"drop_path": -0.1}, "drop_path is -0.1; valid: from 0 to below 1"),
        ("mobilenet_v2", {"bn_decay": 1.0}, "bn_decay is 1.0; valid: from 0 to below 1"),
        ("mobilenet_v2", {"bn_epsilon": 0.0}, "bn_epsilon is 0.0; valid: above 0"),
        ("mobilenet_v2", {"num_classes": -1}, "num_classes is -1; valid: 0 (no classifier) or more"),
        ("mobilenet_v2", {"head_width": 0}, "head_width is 0; valid: 1 or more"),
        ("mobilenet_v1", {"head_width": 8}, "head_width does not apply to mobilenet_v1: its classifier sees"),
        ("mobilenet_v3_small", {"se_ratio": 1.5}, "se_ratio is 1.5; valid: above 0, up to 1"),
        ("mobilenet_v3_small", {"se_rounding": "up"}, "se_rounding is 'up'; valid: div8, int"),
        (
            "mobilenet_v3_small",
            {"se_gate": "relu"},
            "se_gate is 'relu'; valid: hard_sigmoid, sigmoid, hard_swish",
        ),
        (
            "mobilenet_v2",
            {"se_gate": "sigmoid"},
            "se_gate does not apply to mobilenet_v2: it has no squeeze-excite",
        ),
        (
            "mobilenet_v1",
            {"se_ratio": 0.5},
            "se_ratio does not apply to mobilenet_v1: it has no inverted residual",
        ),
        ("mobilenet_v1", {"shortcut": "none"}, "shortcut does not apply to mobilenet_v1"),
        ("mobilenet_v1", {"sum_activation": "relu6"}, "sum_activation does not apply to mobilenet_v1"),
        ("mobilenet_v2", {"sum_activation": "elu"}, "sum_activation is 'elu'; valid: linear, relu,"),
        ("mobilenet_v2", {"hard_swish_from": 18}, "hard_swish_from is 18; mobilenet_v2 has 17 blocks: 0 to that"),
        (
            "mobilenet_v2",
            {"block_form": "dense"},
            "block_form is 'dense'; valid: regular, separable, linear_bottleneck",
        ),
        (
            "mobilenet_v1",
            {"block_form": "inverted_residual"},
            "block_form 'inverted_residual' does not apply to mobilenet_v1: it has Separable blocks",
        ),
        (
            "mobilenet_v3_large",
            {"block_form": "separable"},
            "it has InvertedResidual blocks with squeeze-excite (se_ratio=0 removes it)",
        ),
        ("mobilenet_v4_conv_small", {"block_form": "regular"}, "does not apply to mobilenet_v4_conv_small: it has"),
        ("mobilenet_v1", {"expansion": 4}, "expansion does not apply to mobilenet_v1"),
        (
            "mobilenet_v1",
            {"projection_activation": "relu6"},
            "projection_activation does not apply to mobilenet_v1",
        ),
    ],
)
def test_errors_are_one_sentence_with_the_valid_values(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make_spec(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniversalInverted(expanded=8, filters=8, stride=2), "without a depthwise convolution only stride 1"),
        (lambda: UniversalInverted(expanded=8, filters=8, start=2), "odd kernel"),
        (lambda: UniversalInverted(expanded=8, filters=8, antialias="max"), "antialias is 'max'; valid: , avg, blur"),
        (lambda: MultiQueryAttention(filters=8, heads=0, size=4), "heads and size >= 1, reduction 1 or 2"),
        (lambda: MultiQueryAttention(filters=8, heads=1, size=4, stride=2), "stride 1 are valid"),
        (
            lambda: FusedInvertedResidual(expanded=96, filters=8, group_size=64),
            "group_size is 64; valid: a divisor of the 96 channels",
        ),
        (
            lambda: FusedInvertedResidual(expanded=128, filters=8, group_size=64).ops(9),
            "the 9 input channels of a fused bottleneck do not divide into its 2 groups",
        ),
        (lambda: make_spec("mobilenet_edgetpu_v2_xs", width=0.5), "group_size is 64; valid: a divisor of the 96"),
    ],
)
def test_impossible_rows_of_v4_and_edgetpu(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("row", [Conv, Separable])
@pytest.mark.parametrize("wrong", [{"filters": 0}, {"kernel": 2}, {"stride": 3}, {"dilation": 0}])
def test_a_bad_row_raises_where_it_is_written(row, wrong):
    with pytest.raises(ValueError, match="filters >= 1, odd kernel, stride 1 or 2, dilation >= 1 are valid"):
        row(**{"filters": 8, **wrong})
