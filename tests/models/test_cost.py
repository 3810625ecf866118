import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.ops import ConvOp, DenseOp, DepthwiseOp
from mobilenet_jax.models.options import BLOCK_FORMS
from mobilenet_jax.models.spec import Conv, MultiQueryAttention
from mobilenet_jax.models.zoo import MODELS, make_spec

# Families that the golden table calls by another name, and families that are not built here.
RENAMED = {"edgetpu_v1": "edgetpu_100"}
NOT_BUILT = {"v3_large_deep_x1.2", "v3_large_rw"}


def _read_goldens():
    """Yield the rows of the families built here, each with the (model, width, convention) that builds it.

    They were counted on the module objects of torchvision 0.29.1, timm 1.0.31 and Keras 3.15.1 (1000 classes), never on
    this package: a row changes only when its framework does.
    """
    for name in ("architectures.csv", "architectures_edge.csv"):
        with open(Path(__file__).parent / name, newline="") as file:
            for row in csv.DictReader(file):
                convention = "timm_tf" if row["name"].startswith("tf_") else row["framework"]
                if row["family"] not in NOT_BUILT:
                    model = f"mobilenet_{RENAMED.get(row['family'], row['family'])}"
                    yield row, (model, float(row["width"]), convention)


GOLDENS = list(_read_goldens())
COUNTS = {variant: (int(row["trainable_params"]), int(row["non_trainable_params"])) for row, variant in GOLDENS}
PARTS = {"se": "se", "query": "attn", "key": "attn", "value": "attn", "output": "attn"}


def _kind(cost):
    """Return a convolution in the notation of the golden table's `conv_kinds`."""
    op = cost.op
    part = "head" if cost.row in ("hidden", "classifier") else PARTS.get(op.name.split("/")[0])
    suffix = f":{part}" if part else ""
    if isinstance(op, DenseOp):
        return f"1s1{suffix}"
    groups = "dw" if isinstance(op, DepthwiseOp) else f"g{op.groups}k" if op.groups > 1 else ""
    return f"{groups}{op.kernel}s{op.stride}{suffix}"


def test_the_golden_table_is_whole():
    assert len(GOLDENS) == 223  # of 226 rows


@pytest.mark.parametrize(
    ("row", "variant"), GOLDENS, ids=["-".join([*map(str, v), r["resolution"]]) for r, v in GOLDENS]
)
def test_counts_are_those_of_the_frameworks(row, variant):
    model, width, convention = variant
    spec = make_spec(model, width=width, convention=convention)
    cost = compute_cost(spec, int(row["resolution"]))
    dense = [c for c, conv in (("hidden", spec.hidden_is_conv), ("classifier", spec.classifier_is_conv)) if not conv]
    convs = [c for c in cost.ops if isinstance(c.op, ConvOp | DenseOp) and c.row not in dense]
    norms = [c for c in cost.ops if c.op.statistics]
    found = {
        "trainable_params": cost.params,
        "non_trainable_params": cost.batch_stats,
        "madds": cost.madds,
        "attention_madds": cost.attention_madds,
        "conv_layers": len(convs),
        "channels": ";".join(map(str, cost.channels)),
        "conv_kinds": ";".join(map(_kind, convs)),
        "dense_units": ";".join(str(c.op.filters) for c in cost.ops if c.row in dense),
        "bn_layers": len(norms),
        "bn_outputs": sum(c.outputs for c in norms),
    }
    expected = {key: row[key] for key in found}
    assert {key: str(value) for key, value in found.items()} == expected, "the spec changed, not the frameworks"
    assert spec.bn_epsilon == float(row["bn_eps"])
    assert spec.bn_decay == pytest.approx(1 - float(row["bn_momentum_torch"]), abs=1e-12)


@pytest.mark.parametrize(
    ("model", "width", "convention"),
    [pytest.param(*variant, marks=() if variant[1] == 1 else pytest.mark.slow) for variant in COUNTS],
)
def test_module_holds_what_the_frameworks_hold(model, width, convention):
    """The module creates as many elements of params and batch_stats as the frameworks' modules have."""
    module = MobileNet(make_spec(model, width=width, convention=convention))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), images)
    found = tuple(
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables[collection]))
        for collection in ("params", "batch_stats")
    )
    assert found == COUNTS[model, width, convention]


def _equations(jaxpr):
    """Yield every equation of a jaxpr and of the jaxprs it calls; of a choice of platform, the default branch."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield from _equations(equation.params["branches"][-1].jaxpr)
            continue
        inner = [
            getattr(p, "jaxpr", p)
            for p in jax.tree.leaves(equation.params)
            if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        if inner:
            for sub in inner:
                yield from _equations(sub)
        else:
            yield equation


def _traced_madds(model, size):
    """Return the multiply-adds of the convolutions and matrix products in the trace of one image."""
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
    total = 0
    for equation in _equations(jax.make_jaxpr(model.apply)(variables, images).jaxpr):
        out = math.prod(equation.outvars[0].aval.shape)
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            total += out * math.prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += out * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    return total


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mobilenet_v1", {"block_form": "regular", "width": 0.25}),
        ("mobilenet_v1", {"shallow": True}),
        *(("mobilenet_v2", {"block_form": form}) for form in BLOCK_FORMS[:3]),
    ],
    ids=str,
)
def test_multiply_adds_of_other_forms_are_those_of_the_trace(model, options):
    spec = make_spec(model, **options)
    module = MobileNet(spec, lowering="plain")
    assert _traced_madds(module, 64) == compute_cost(spec, 64).madds


@pytest.mark.parametrize("lowering", ["plain", "auto"])
@pytest.mark.parametrize(
    ("model", "convention", "size"),
    [
        ("mobilenet_v1", "keras", 97),
        ("mobilenet_v1", "timm", 97),
        ("mobilenet_v2", "torchvision", 224),
        ("mobilenet_v3_large", "timm", 97),
        ("mobilenet_v3_small", "keras", 32),
        ("mobilenet_v4_hybrid_medium", "timm", 97),
        ("mobilenet_v4_conv_aa_medium", "keras", 75),
        ("mobilenet_edgetpu_v2_xs", "timm", 64),
    ],
)
def test_trap_10_multiply_adds_of_the_trace_count_groups(model, convention, size, lowering):
    spec = make_spec(model, convention=convention)
    module = MobileNet(spec, lowering=lowering, depthwise_impl="feature_group_count")
    cost = compute_cost(spec, size)
    assert _traced_madds(module, size) == cost.madds + cost.attention_madds


def test_trap_10_grouped_convolutions_have_one_input_channel_a_group():
    cost = compute_cost(make_spec("mobilenet_v2"), 224)
    assert cost.madds == 300_774_272
    depthwise = [c for c in cost.ops if isinstance(c.op, DepthwiseOp)]
    assert all(c.madds == c.outputs * 9 for c in depthwise)
    # Some tools count all input channels of a depthwise convolution, and find many times as much.
    assert sum(c.outputs * 9 * c.op.in_channels for c in depthwise) > 5 * cost.madds


def test_trap_09_trainable_parameters_exclude_statistics():
    cost = compute_cost(make_spec("mobilenet_v2"), 224)
    assert cost.params == 3_504_872
    assert cost.batch_stats == 34_112
    assert cost.params + cost.batch_stats == 3_538_984  # what Keras and nn.tabulate call "total"


def test_v1_with_standard_convolutions():
    # 1704.04861, Table 4: "Conv MobileNet" has 29.3 million parameters and 4866 million multiply-adds.
    assert compute_cost(make_spec("mobilenet_v1"), 224).standard == (29_294_088, 4_867_293_184)


@pytest.mark.parametrize(("width", "size", "convention"), [(1.0, 224, "timm"), (0.5, 97, "timm"), (0.25, 64, "keras")])
def test_standard_twin_is_the_network_of_full_convolutions(width, size, convention):
    spec = make_spec("mobilenet_v1", width=width, convention=convention)
    cost = compute_cost(make_spec("mobilenet_v1", width=width, convention=convention, block_form="regular"), size)
    assert compute_cost(spec, size).standard == (cost.params, cost.madds)


@pytest.mark.parametrize("model", [m for m in MODELS if "_aa_" not in m and "_blur_" not in m])
def test_depthwise_separability_saves_what_the_paper_says(model):
    """Depthwise and pointwise cost 1/N + 1/k^2 of the full convolution in every row (1704.04861 sec. 3.1)."""
    cost = compute_cost(make_spec(model), 224)
    convs = [c for c in cost.ops if isinstance(c.op, ConvOp) and not c.op.pooled]
    saved = 0
    for depthwise, pointwise in itertools.pairwise(convs):
        if not isinstance(depthwise.op, DepthwiseOp):
            continue
        k, m, n = depthwise.op.kernel, depthwise.op.in_channels, pointwise.op.filters
        full = pointwise.height * pointwise.width * k * k * m * n
        assert depthwise.madds + pointwise.madds == pytest.approx(full * (1 / n + 1 / k**2), rel=1e-12)
        saved += full - depthwise.madds - pointwise.madds
    assert cost.standard[1] - cost.madds == saved > 0


def test_activation_memory():
    v2 = compute_cost(make_spec("mobilenet_v2"), 224)
    # The widest moment: the 96 channels of the first expansion on either side of a stride of 2.
    assert v2.inference_elements == 96 * (112 * 112 + 56 * 56)
    # Both sides of each norm (6,678,112 outputs by the frameworks' modules), the image, the logits.
    assert v2.training_elements == 224 * 224 * 3 + 2 * sum(c.outputs for c in v2.ops if c.op.statistics) + 1000
    assert sum(c.outputs for c in v2.ops if c.op.statistics) == 6_678_112


def test_activation_memory_holds_the_residual():
    full = make_spec("mobilenet_v2")
    # One block, 8 -> 48 -> 8 at stride 1: input, and the 48 channels on both sides of the depthwise.
    block = replace(full.blocks[2], expanded=48, filters=8)  # pyright: ignore[reportCallIssue]
    spec = replace(full, stem=Conv(filters=8), blocks=(block,), head=None, num_classes=0)
    assert compute_cost(spec, 10).inference_elements == 100 * (8 + 48 + 48)
    alone = replace(spec, blocks=(replace(block, skip=False),))  # pyright: ignore[reportCallIssue]
    assert compute_cost(alone, 10).inference_elements == 100 * (48 + 48)


def test_activation_memory_of_attention():
    """Alive at once: norm, query, key, value, scores of 3 heads, attended map, and the input for the residual."""
    row = MultiQueryAttention(filters=8, heads=3, size=5, reduction=2, layer_scale=0.1)
    full = make_spec("mobilenet_v4_hybrid_medium")
    spec = replace(full, stem=Conv(filters=8), blocks=(row,), head=None, hidden=0, num_classes=0)
    cost = compute_cost(spec, (10, 6))
    query, key, attended = 60 * 15, 15 * 8 + 15 * 5, 60 * 15
    scores = 3 * 60 * 15
    assert cost.attention_madds == 3 * 60 * 15 * (5 + 5)
    assert cost.inference_elements == 60 * 8 + 60 * 8 + query + 2 * key + scores + attended
    # Both sides of the norms, of the stem and of the two reductions; everything else once.
    norms = 2 * (60 * 8 + 60 * 8 + 15 * 8 + 15 * 8)
    assert cost.training_elements == 60 * 3 + norms + query + 2 * 15 * 5 + scores + attended + 60 * 8
    assert cost.params == 8 * 27 + 16 + 16 + 8 * 15 + 2 * (8 * 9 + 16 + 8 * 5) + 15 * 8 + 8
    assert cost.batch_stats == 2 * (8 + 8 + 8 + 8)


def test_rectangles_and_sizes_that_are_too_small():
    spec = make_spec("mobilenet_v2", num_classes=0)
    assert compute_cost(spec, (64, 128)).madds == 2 * compute_cost(spec, 64).madds
    # Keras' V1 pads no top row at a stride of 2: a map of one pixel has nothing left.
    with pytest.raises(
        ValueError, match="map of 1x1 is too small for a 3x3 convolution of stride 2: use a larger image"
    ):
        compute_cost(make_spec("mobilenet_v1", convention="keras"), 16)
    with pytest.raises(ValueError, match="map of 0x0 is too small"):
        compute_cost(spec, 0)
