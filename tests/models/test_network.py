"""The network against a textbook in NumPy, its lowerings against each other, and the effect of each option."""

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from jax import export

from mobilenet_jax.models import blocks
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.ops import ConvOp, DenseOp
from mobilenet_jax.models.spec import Conv, InvertedResidual, MultiQueryAttention, Separable, Spec
from mobilenet_jax.models.zoo import MODELS, make_spec

# ---- The textbook: NumPy in float64, written from the papers' figures and the paths of the variables.

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
}
GATES = {
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_swish": ACTIVATIONS["hard_swish"],
}


def _flatten(tree) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(tree, sep="/"))


def _unflatten(flat) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep="/")


def _multiply(x, weights, groups):
    """Multiply [..., C] by [C / groups, D] to [..., D], each group of channels by its own columns."""
    pairs = zip(np.split(x, groups, axis=-1), np.split(weights, groups, axis=-1), strict=True)
    return np.concatenate([part @ columns for part, columns in pairs], axis=-1)


def _blur(x):
    """Return every second pixel of the 1-2-1 average along both axes, with zeros outside (1904.11486)."""
    for axis in (1, 2):
        x = np.pad(x, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        x = np.moveaxis(x, axis, 0)
        x = np.moveaxis((x[:-2] + 2 * x[1:-1] + x[2:])[::2] / 4, 0, axis)
    return x


def _average(x):
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


FILTERS = {"": lambda x: x, "avg": _average, "blur": _blur}


class Textbook:
    """A network as the papers draw it; `maps` and `stats` collect each row's output and new statistics."""

    def __init__(self, spec: Spec, variables: dict, *, train: bool):
        self.spec, self.train = spec, train
        self.params = _flatten(variables["params"])
        self.old = _flatten(variables["batch_stats"])
        self.maps, self.stats = {}, {}

    def conv_norm(self, x, path, activation, *, stride=1, dilation=1, norm=True):
        kernel = self.params[f"{path}/conv/kernel"]
        k, groups = kernel.shape[0], x.shape[-1] // kernel.shape[2]
        depthwise = groups == x.shape[-1]
        zeros = [self.zeros(n, k, stride, dilation, depthwise) for n in x.shape[1:3]]
        x = np.pad(x, ((0, 0), *zeros, (0, 0)))
        reach = dilation * (k - 1)
        taps = [
            (
                kernel[i, j],
                x[
                    :,
                    i * dilation : (i * dilation - reach) or None,
                    j * dilation : (j * dilation - reach) or None,
                ],
            )
            for i in range(k)
            for j in range(k)
        ]
        taps = [(w, window[:, ::stride, ::stride]) for w, window in taps]
        x = np.sum([window * w[0] if depthwise else _multiply(window, w, groups) for w, window in taps], axis=0)
        return ACTIVATIONS[activation](self.norm(x, f"{path}/norm")) if norm else x

    def zeros(self, n, k, stride, dilation, depthwise):
        if self.spec.padding == "symmetric":
            return (dilation * (k // 2),) * 2
        if self.spec.padding == "keras_v1" and depthwise and stride == 2:
            return (0, 1)
        total = max((math.ceil(n / stride) - 1) * stride + dilation * (k - 1) + 1 - n, 0)
        return (total // 2, total - total // 2)

    def norm(self, x, path):
        mean, var = self.old[f"{path}/mean"], self.old[f"{path}/var"]
        if self.train:
            keep, batch = self.spec.bn_decay, (x.mean((0, 1, 2)), x.var((0, 1, 2)))
            self.stats[f"{path}/mean"] = keep * mean + (1 - keep) * batch[0]
            self.stats[f"{path}/var"] = keep * var + (1 - keep) * batch[1]
            mean, var = batch
        x = (x - mean) / np.sqrt(var + self.spec.bn_epsilon)
        return x * self.params[f"{path}/scale"] + self.params[f"{path}/bias"]

    def dense(self, x, path):
        return x @ self.params[f"{path}/kernel"] + self.params[f"{path}/bias"]

    def inverted_residual(self, x, wide, row, path):
        """Fig. 4 of 1801.04381 and of 1905.02244, and Fig. 6b's shortcut between expansions."""
        y = x
        if row.expands:
            y = self.conv_norm(x, f"{path}/expand", row.activation)
            if self.spec.shortcut == "expansion" and wide is not None and wide.shape == y.shape:
                y = y + wide
        y = wide = self.conv_norm(y, f"{path}/depthwise", row.activation, stride=row.stride, dilation=row.dilation)
        if row.se:
            squeezed = np.maximum(self.dense(y.mean((1, 2)), f"{path}/se/reduce"), 0)
            y = y * GATES[row.se.gate](self.dense(squeezed, f"{path}/se/expand"))[:, None, None]
        y = self.conv_norm(y, f"{path}/project", row.projection_activation)
        if self.spec.shortcut == "bottleneck" and row.stride == 1 and row.skip and y.shape == x.shape:
            y = ACTIVATIONS[self.spec.sum_activation](x + y)
        return y, wide

    def bottleneck(self, x, row, path):
        """V4's universal block (2404.10518) and the fused one, by the kernels there are."""
        y, stride = x, row.stride
        for name in ("start/depthwise", "expand", "depthwise", "project"):
            kernel = self.params.get(f"{path}/{name}/conv/kernel")
            if kernel is None:
                continue
            linear = name in ("start/depthwise", "project")
            later = name == "start/depthwise" and f"{path}/depthwise/conv/kernel" in self.params
            here = stride if len(kernel) > 1 and not later else 1
            takes = row.antialias if here == 2 else ""
            y = self.conv_norm(
                y,
                f"{path}/{name}",
                "linear" if linear else row.activation,
                stride=1 if takes else here,
                dilation=row.dilation if len(kernel) > 1 else 1,
            )
            y = FILTERS[takes](y)
        return self.add(x, y, row, path)

    def attention(self, x, row, path):
        """2404.10518: softmax(Q K / sqrt(d)) V a head, key and value shared and from a smaller map."""
        z = self.norm(x, f"{path}/norm")
        query = self.conv_norm(z, f"{path}/query/project", "linear", norm=False)
        key, value = (self.reduced(z, row, f"{path}/{name}") for name in ("key", "value"))
        heads = []
        for i in range(row.heads):
            q = query[..., i * row.size : (i + 1) * row.size].reshape(len(x), -1, row.size)
            scores = np.exp(q @ key.transpose(0, 2, 1) / math.sqrt(row.size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value)
        y = np.concatenate(heads, axis=-1).reshape(*x.shape[:3], -1)
        return self.add(x, self.conv_norm(y, f"{path}/output/project", "linear", norm=False), row, path)

    def reduced(self, x, row, path):
        if row.reduction > 1:
            x = self.conv_norm(x, f"{path}/depthwise", "linear", stride=row.reduction, dilation=row.dilation)
        return self.conv_norm(x, f"{path}/project", "linear", norm=False).reshape(len(x), -1, row.size)

    def add(self, x, y, row, path):
        y = y * self.params.get(f"{path}/layer_scale/gamma", 1)
        joins = self.spec.shortcut == "bottleneck" and row.skip and row.stride == 1
        return x + y if joins and y.shape == x.shape else y

    def __call__(self, x):
        spec, wide = self.spec, None
        x = self.maps["stem"] = self.conv_norm(x, "stem", spec.stem.activation, stride=spec.stem.stride)
        for i, row in enumerate(spec.blocks):
            path = f"block_{i:02d}"
            if isinstance(row, Separable):
                x = self.conv_norm(x, f"{path}/depthwise", row.activation, stride=row.stride, dilation=row.dilation)
                x = self.conv_norm(x, f"{path}/pointwise", row.activation)
            elif isinstance(row, Conv):
                x = self.conv_norm(x, path, row.activation, stride=row.stride, dilation=row.dilation)
            elif isinstance(row, MultiQueryAttention):
                x = self.attention(x, row, path)
            elif not isinstance(row, InvertedResidual):
                x = self.bottleneck(x, row, path)
            else:
                x, wide = self.inverted_residual(x, wide, row, path)
            self.maps[path] = x
        if spec.head:
            x = self.maps["head"] = self.conv_norm(x, "head", spec.head.activation)
        x = x.mean((1, 2))
        if spec.hidden_norm:
            x = self.conv_norm(x[:, None, None], "hidden", spec.hidden_activation)[:, 0, 0]
        elif spec.hidden:
            x = ACTIVATIONS[spec.hidden_activation](self.dense(x, "hidden"))
        return self.dense(x, "classifier")


# ---- Small networks and their values.

CLASSES = 7
PAPERS = [
    name for name in MODELS if name.startswith(("mobilenet_v1", "mobilenet_v2", "mobilenet_v3")) and "_x" not in name
]
# The other networks, with the blocks that are enough to have every kind of row.
HYBRID = (0, 1, 3, 4, 7, 8)
CUT = {"mobilenet_v4_conv_small": 10, "mobilenet_v4_hybrid_medium": HYBRID, "mobilenet_edgetpu_v2_xs": 8}


def _images(size, batch=4):
    height, width = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(5).normal(size=(batch, height, width, 3))


def _variables(model, seed=0):
    """Return variables in float64 in which every parameter and statistic matters: none is 0 or 1."""
    generator = np.random.default_rng(seed)

    def draw(path, value):
        low_high = {
            "scale": (0.5, 1.5),
            "bias": (-0.5, 0.5),
            "mean": (-0.3, 0.3),
            "var": (0.5, 1.5),
            "gamma": (0.3, 0.8),
        }
        leaf = path.rsplit("/", 1)[1]
        return np.float64(value) if leaf == "kernel" else generator.uniform(*low_high[leaf], value.shape)

    flat = _flatten(init_variables(model.clone(dtype="float32"), seed=seed))
    return _unflatten({path: draw(path, value) for path, value in flat.items()})


def _jit(function):
    # Tests run each network once: compiling it quickly is worth more than running it fast.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def _small(name, *, keep=None, **options) -> Spec:
    """Return a narrow spec without dropout; `keep` is the number of blocks that stay, or their indices."""
    spec = make_spec(name, **{"width": 0.35, "num_classes": CLASSES, "dropout": 0.0, **options})
    return replace(spec, blocks=tuple(spec.blocks[i] for i in keep) if isinstance(keep, tuple) else spec.blocks[:keep])


def _apply(model, variables, images, **kwargs):
    return _jit(functools.partial(model.apply, **kwargs))(variables, images)


def _loss_and_gradients(model, *, train):
    """Return a function of (variables, images) to ((loss, (logits, new statistics)), gradients)."""

    def loss(params, stats, images):
        logits, updates = model.apply(
            {"params": params, "batch_stats": stats}, images, train=train, mutable=["batch_stats"]
        )
        labels = jax.nn.one_hot(jnp.arange(len(images)) % CLASSES, CLASSES)
        return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)), (
            logits,
            updates["batch_stats"],
        )

    compiled = _jit(jax.value_and_grad(loss, has_aux=True))
    return lambda variables, images: compiled(variables["params"], variables["batch_stats"], images)


def _assert_close(found, expected, tolerance, what=""):
    """Assert that no element differs by more than `tolerance` times the largest one."""
    assert found.shape == expected.shape, what
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=what)


def _assert_trees_close(found, expected, tolerance):
    found, expected = (_flatten(tree) for tree in (found, expected))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        _assert_close(np.asarray(value), np.asarray(expected[path]), tolerance, path)


# ---- The network agrees with the textbook, and both lowerings agree.

# Odd, even and rectangular images under every padding rule; the third is the network of V3 tutorials. Compiling takes
# the time of this test, so blocks that repeat another are left out; every stride stays.
CASES = [
    ("mobilenet_v1", {"convention": "keras", "keep": (0, 1, 2, 3, 5, 11, 12)}, (49, 40)),
    ("mobilenet_v2", {"convention": "torchvision", "keep": (0, 1, 2, 3, 4, 6, 7, 13, 16)}, (47, 50)),
    (
        "mobilenet_v3_small",
        {
            "convention": "timm",
            "se_gate": "hard_swish",
            "se_rounding": "int",
            "activation": "relu6",
            "keep": (0, 1, 2, 3, 4, 8, 9),
        },
        (45, 48),
    ),
    ("mobilenet_v3_large", {"convention": "keras", "keep": (0, 1, 2, 3, 4, 6, 7, 10, 12, 13)}, (50, 39)),
    ("mobilenet_v3_small_minimalistic", {"convention": "timm_tf", "keep": (0, 1, 2, 3, 4, 8, 9)}, (46, 45)),
    ("mobilenet_v2", {"projection_activation": "relu6", "sum_activation": "relu6", "keep": 3}, (34, 31)),
    # Fused, extra depthwise, feed-forward, attention on a smaller map.
    ("mobilenet_v4_hybrid_medium", {"convention": "timm", "keep": HYBRID}, (70, 53)),
]


@pytest.mark.parametrize(("name", "options", "size"), CASES, ids=str)
def test_lowerings_and_textbook_agree_in_float64(name, options, size):
    """Logits, features and statistics agree to 1e-10 of the largest value, in both modes."""
    spec = _small(name, **options)
    auto, plain = (MobileNet(spec, dtype="float64", lowering=lowering) for lowering in ("auto", "plain"))
    variables, images = _variables(auto), _images(size)
    train: dict[str, Any] = {"train": True, "mutable": ["batch_stats"]}
    with jax.enable_x64(True):
        evaluated = _apply(plain, variables, images, features=tuple(spec.taps()))
        auto_logits = _apply(auto, variables, images)
        trained = {model: _apply(model, variables, images, **train) for model in (auto, plain)}
    textbook = Textbook(spec, variables, train=False)
    _assert_close(evaluated[0], textbook(images), 1e-10)
    _assert_close(auto_logits, evaluated[0], 1e-10)
    for feature, row in spec.taps().items():
        _assert_close(evaluated[1][feature], textbook.maps[row], 1e-10, feature)
    textbook = Textbook(spec, variables, train=True)
    expected = textbook(images)
    for logits, updates in trained.values():
        _assert_close(logits, expected, 1e-10)
        _assert_trees_close(updates["batch_stats"], _unflatten(textbook.stats), 1e-10)


# Gradients take most of the time to compile, and test_cpu.py has those of each layer: here is a row of each kind.
GRADIENT_CASES = [
    ("mobilenet_v1", {"convention": "keras", "keep": (0, 1)}, (21, 20)),
    ("mobilenet_v2", {"convention": "torchvision", "keep": (0, 1, 2)}, (23, 22)),  # the third has a shortcut
    ("mobilenet_v3_small", {"convention": "timm", "keep": (0, 3)}, (20, 21)),  # squeeze-excite, 3x3 and 5x5
    ("mobilenet_v4_hybrid_medium", {"convention": "timm", "keep": (3, 7, 8)}, (35, 40)),  # with attention
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "size"), GRADIENT_CASES, ids=str)
def test_gradients_of_both_lowerings_agree_in_float64(name, options, size):
    """Losses, and gradients to 1e-9 of the largest value, in training."""
    spec = _small(name, **options)
    models = [MobileNet(spec, dtype="float64", lowering=lowering) for lowering in ("auto", "plain")]
    variables, images = _variables(models[0]), _images(size)
    with jax.enable_x64(True):
        auto, plain = (_loss_and_gradients(model, train=True)(variables, images) for model in models)
    _assert_close(auto[0][0], plain[0][0], 1e-10)
    _assert_trees_close(_without_zeros(auto[1]), _without_zeros(plain[1]), 1e-9)


def _is_linear_bias(path):
    """Return true for norm offsets that change nothing: before another norm without activation, or before softmax."""
    return path.endswith(("project/norm/bias", "start/depthwise/norm/bias", "key/depthwise/norm/bias"))


def _without_zeros(gradients):
    flat = _flatten(gradients)
    return _unflatten({k: v for k, v in flat.items() if not _is_linear_bias(k)})


def _only(tree, leaf):
    flat = _flatten(tree)
    return _unflatten({path: value for path, value in flat.items() if path.endswith(leaf)})


VARIANTS = [
    ("mobilenet_v2", {"shortcut": "expansion"}),
    ("mobilenet_v2", {"shortcut": "none", "projection_activation": "relu6"}),
    ("mobilenet_v2", {"se_ratio": 0.5, "se_gate": "sigmoid", "convention": "timm"}),
    ("mobilenet_v2", {"expansion": 1, "stride_one": (0, 2)}),
    ("mobilenet_v2", {"block_form": "regular", "output_stride": 8, "keep": 10}),
    ("mobilenet_v2", {"block_form": "linear_bottleneck", "keep": 5}),
    ("mobilenet_v3_large", {"hard_swish_from": 3, "keep": 5}),
    ("mobilenet_v1", {"shallow": True, "keep": None}),
    ("mobilenet_v3_large", {"output_stride": 8}),
    ("mobilenet_v1", {"output_stride": 8, "convention": "timm_tf", "stride_one": (0,)}),
    ("mobilenet_v4_conv_small", {"keep": 12, "stride_one": (0,)}),  # inverted, ConvNext-like, plain convolutions
    ("mobilenet_v4_hybrid_medium", {"keep": HYBRID, "output_stride": 8}),
    ("mobilenet_v4_conv_blur_medium", {"keep": 4}),
    ("mobilenet_v4_conv_aa_medium", {"keep": 4, "convention": "timm"}),
    ("mobilenet_edgetpu_v2_xs", {"width": 0.35, "shortcut": "none"}),  # convolutions in groups
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_options_do_to_the_network_what_they_say(name, options):
    spec = _small(name, **{"keep": 8, "width": 0.25, **options})
    model = MobileNet(spec, dtype="float64", lowering="plain")
    variables, images = _variables(model), _images((33, 40), batch=2)
    with jax.enable_x64(True):
        logits, maps = _apply(model, variables, images, features=tuple(spec.taps()))
    textbook = Textbook(spec, variables, train=False)
    _assert_close(logits, textbook(images), 1e-10)
    for feature, row in spec.taps().items():
        _assert_close(maps[feature], textbook.maps[row], 1e-10, feature)


# ---- Gradients.


@pytest.mark.parametrize(("name", "keep"), [*((name, None) for name in PAPERS), *CUT.items()])
def test_every_parameter_gets_a_gradient(name, keep):
    """With `train=False` every parameter has a gradient, except the offset of the keys, which softmax ignores."""
    # "plain" compiles faster; that "auto" has the same gradients is tested above.
    model = MobileNet(_small(name, keep=keep, **({} if keep else {"shallow": True})), lowering="plain")
    variables = jax.tree.map(np.float32, _variables(model))
    _, gradients = _loss_and_gradients(model, train=False)(variables, np.float32(_images(64)))
    flat = {path: g for path, g in _flatten(gradients).items() if not path.endswith("key/depthwise/norm/bias")}
    largest = {path: float(np.abs(g).max()) for path, g in flat.items()}
    assert min(largest.values()) > 1e-6, min(largest, key=lambda path: largest[path])


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenet_v3_small"])
def test_with_batch_statistics_the_offset_of_a_linear_bottleneck_has_no_gradient(name):
    """A constant on a channel stays a constant through 1x1 convolutions and residuals until a batch mean removes it.

    So the true gradient of these offsets is 0, and of no other parameter. float64 shows it; float32 leaves noise of
    1e-8.
    """
    model = MobileNet(_small(name, keep=5), dtype="float64")
    variables = _variables(model)
    with jax.enable_x64(True):
        _, gradients = _loss_and_gradients(model, train=True)(variables, _images(32))
    zeros = 0
    for path, gradient in _flatten(gradients).items():
        if _is_linear_bias(path):
            assert np.abs(gradient).max() < 1e-14, path
            zeros += 1
        else:
            assert np.abs(gradient).max() > 1e-6, path
    assert zeros == 5


# ---- The trace.


def _primitives(jaxpr):
    """Yield every equation of a jaxpr and of the jaxprs it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)


def _trace(model, *, size=64, train=False):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, size, size, 3))))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    run = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    return list(_primitives(jax.make_jaxpr(run)(variables, images).jaxpr))


@pytest.mark.parametrize(("name", "keep"), [*((name, None) for name in PAPERS), *CUT.items()])
def test_plain_is_textbook_convolutions_only(name, keep):
    spec = _small(name, keep=keep)
    ops = [c.op for c in compute_cost(spec, 64).ops]
    dense = sum(isinstance(op, DenseOp) for op in ops)
    names = [e.primitive.name for e in _trace(MobileNet(spec, lowering="plain"), train=True)]
    attention = sum(isinstance(row, MultiQueryAttention) for row in spec.blocks)
    assert names.count("conv_general_dilated") == sum(isinstance(op, ConvOp) for op in ops)
    assert names.count("dot_general") == dense + 2 * attention
    special = ("custom_vjp", "platform_index", "cond", "slice")
    assert not [n for n in names if n.startswith(special)]
    auto = {e.primitive.name for e in _trace(MobileNet(spec), train=True)}
    assert {"platform_index", "custom_vjp_call"} <= auto  # what the sieve above would catch


def test_ten_joins_wherever_shortcuts_go():
    """V2 adds ten times between bottlenecks, and as often between expansions (1801.04381 Fig. 6b)."""

    def count(shortcut):
        equations = _trace(MobileNet(_small("mobilenet_v2", width=1.0, shortcut=shortcut), lowering="plain"))
        maps = [[v.aval.shape for v in e.invars] for e in equations if e.primitive.name in ("add", "add_any")]
        return sum(len(a) == 4 and a == b for a, b in maps)

    assert {s: count(s) for s in ("bottleneck", "expansion", "none")} == {
        "bottleneck": 10,
        "expansion": 10,
        "none": 0,
    }


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_training_on_accelerators_convolves_in_groups(platform):
    """Exported for one accelerator, forward and backward pass have grouped convolutions and no shifted slices."""
    spec = _small("mobilenet_v2", keep=4)
    model = MobileNet(spec)
    variables = init_variables(model, seed=0)

    def gradients(variables, images):
        apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
        return jax.grad(lambda v: apply(v, images)[0].sum())(variables)

    images = jnp.zeros((2, 32, 32, 3))
    text = export.export(jax.jit(gradients), platforms=[platform])(variables, images).mlir_module()
    for row in spec.blocks:
        assert isinstance(row, InvertedResidual)
        assert f"feature_group_count = {row.expanded} " in text
    assert "stablehlo.slice" not in text
    assert "stablehlo.slice" in export.export(jax.jit(gradients), platforms=["cpu"])(variables, images).mlir_module()


def test_tabulate_prints_shapes_only():
    """A call passes arrays and flags to a module, never a module or a spec, whose fields would fill the table."""
    model = MobileNet(_small("mobilenet_v2", keep=2))
    table = model.tabulate(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), console_kwargs={"width": 200})
    assert "bn_epsilon" not in table
    assert len(table.splitlines()) < 150


# ---- Features, classifier, dilation.


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small"])
def test_vector_features_and_classifier_are_the_logits(name):
    spec = _small(name, keep=3)
    model, headless = MobileNet(spec), MobileNet(replace(spec, num_classes=0))
    variables = jax.tree.map(np.float32, _variables(model))
    images = np.float32(_images(32))
    logits, maps = _apply(model, variables, images, features=("final",))
    last = variables["params"].pop("classifier")
    vector = _apply(headless, variables, images)
    assert vector.dtype == logits.dtype == np.float32
    np.testing.assert_allclose(vector @ last["kernel"] + last["bias"][None], logits, rtol=1e-5, atol=1e-5)
    if not spec.hidden:
        np.testing.assert_allclose(maps["final"].mean((1, 2)), vector, rtol=1e-5, atol=1e-5)


@functools.cache
def _final_map(output_stride):
    spec = _small("mobilenet_v2", convention="torchvision", output_stride=output_stride)
    variables = jax.tree.map(np.float32, _variables(MobileNet(spec)))
    model = MobileNet(spec, lowering="plain")
    _, maps = _apply(model, variables, np.float32(_images(64, batch=1)), features=("final",))
    return np.asarray(maps["final"])


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_dilation_computes_the_strided_map_and_those_between(output_stride):
    """Under symmetric padding, the strided map is every (32 / output_stride)-th pixel of the dilated map."""
    step = 32 // output_stride
    strided, dilated = _final_map(None), _final_map(output_stride)
    assert strided.shape[1:3] == (2, 2)
    assert dilated.shape[1:3] == (2 * step, 2 * step)
    _assert_close(dilated[:, ::step, ::step], strided, 1e-5)


def test_relu6_projections_bound_the_features():
    spec = _small("mobilenet_v2", keep=3, shortcut="none")
    variables = jax.tree.map(np.float32, _variables(MobileNet(spec)))
    images = np.float32(4 * _images(32))
    _, linear = _apply(MobileNet(spec), variables, images, features=("stride4",))
    blocks_ = tuple(replace(row, projection_activation="relu6") for row in spec.blocks)  # pyright: ignore[reportCallIssue]
    _, bounded = _apply(MobileNet(replace(spec, blocks=blocks_)), variables, images, features=("stride4",))
    assert linear["stride4"].min() < 0
    assert bounded["stride4"].min() == 0 < bounded["stride4"].max() <= 6


# ---- Training mode.


def _dropout_model(rate):
    """Return one block with the identity as classifier, so that the logits show which units were dropped."""
    spec = _small("mobilenet_v2", keep=1, head_width=64, num_classes=64, dropout=rate)
    model = MobileNet(spec)
    variables = init_variables(model, seed=0)
    variables["params"]["classifier"] = {
        "kernel": np.eye(64, dtype=np.float32),
        "bias": np.zeros(64, np.float32),
    }
    return model, variables


def test_trap_14_dropout_is_the_share_dropped():
    model, variables = _dropout_model(0.2)
    frozen = model.clone(freeze_stats=True)
    images = np.float32(_images(16, batch=256))
    run = _jit(lambda key: frozen.apply(variables, images, train=True, rngs={"dropout": key}))
    logits, expected = run(jax.random.key(0)), _apply(model, variables, images)
    alive = np.asarray(expected) > 1e-6
    dropped = (np.asarray(logits) == 0) & alive
    n = alive.sum()
    assert n > 4000
    assert dropped.sum() / n == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / n))
    kept = alive & ~dropped
    scaled = np.asarray(expected)[kept] / 0.8
    np.testing.assert_allclose(np.asarray(logits)[kept], scaled, rtol=1e-5, atol=1e-7)
    assert (run(jax.random.key(0)) == logits).all()
    assert (run(jax.random.key(1)) != logits).any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Blocks with a residual, counted from 1, of 17.
        ({"name": "mobilenet_v2", "drop_path": 0.34}, [0.02 * i for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
        ({"name": "mobilenet_v2", "drop_path": 0.2, "drop_path_flat": True}, 10 * [0.2]),
        # Attention too; the blocks without a residual are 1, 2, 4 and 16.
        (
            {"name": "mobilenet_v4_hybrid_medium", "drop_path": 0.32, "keep": 16},
            [0.02 * i for i in (3, *range(5, 16))],
        ),
    ],
    ids=str,
)
def test_drop_path_rises_linearly_to_the_last_block(monkeypatch, options, expected):
    rates = []

    def record(branch, rate, key):
        rates.append(rate)
        return branch

    monkeypatch.setattr(blocks, "drop_path", record)
    model = MobileNet(_small(**options))
    images = jnp.zeros((2, 32, 32, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    run = functools.partial(model.apply, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
    jax.eval_shape(functools.partial(run, train=False), variables, images)
    assert rates == []
    jax.eval_shape(functools.partial(run, train=True), variables, images)
    assert rates == pytest.approx(expected)


def test_remat_recomputes_the_same_numbers():
    spec = _small("mobilenet_v3_small", keep=3, drop_path=0.5, dropout=0.5)
    images = np.float32(_images(32))
    results = []
    for remat in (False, True):
        model = MobileNet(spec, remat=remat)
        variables = init_variables(model, seed=0)

        def loss(params, model=model, stats=variables["batch_stats"]):
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(2)},
            )
            return jnp.sum(jnp.sin(logits)), (logits, updates["batch_stats"])

        results.append(_jit(jax.grad(loss, has_aux=True))(variables["params"]))
        traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(variables["params"])
        assert any(e.primitive.name.startswith("remat") for e in _primitives(traced.jaxpr)) == remat
    (without_gradients, without), (with_gradients, with_remat) = results
    _assert_close(np.asarray(with_remat[0]), np.asarray(without[0]), 1e-5)
    _assert_trees_close(with_remat[1], without[1], 1e-5)
    _assert_trees_close(_without_zeros(with_gradients), _without_zeros(without_gradients), 1e-4)


def test_frozen_statistics_stay_and_are_used():
    spec = _small("mobilenet_v2", keep=2)
    model = MobileNet(spec)
    variables = jax.tree.map(np.float32, _variables(model))
    images = np.float32(_images(16))
    expected = _apply(model, variables, images)
    logits, updates = _apply(model.clone(freeze_stats=True), variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    moving, updates = _apply(model, variables, images, train=True, mutable=["batch_stats"])
    assert np.abs(np.asarray(moving) - np.asarray(expected)).max() > 1e-3
    assert (updates["batch_stats"]["stem"]["norm"]["var"] != variables["batch_stats"]["stem"]["norm"]["var"]).all()


@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_trap_21_bfloat16_keeps_statistics_and_logits_in_float32(lowering):
    spec = _small("mobilenet_v3_small", keep=2, bn_decay=0.5)
    images = np.float32(_images(32, batch=14))
    single, half = (MobileNet(spec, dtype=dtype, lowering=lowering) for dtype in ("float32", "bfloat16"))
    variables = init_variables(single, seed=0)
    (_, (_, expected)), _ = _loss_and_gradients(single, train=True)(variables, images)
    step, losses = _loss_and_gradients(half, train=True), []
    for i in range(20):
        (loss, (logits, stats)), gradients = step(variables, images)
        assert {leaf.dtype for leaf in jax.tree.leaves((logits, stats, gradients))} == {jnp.dtype(jnp.float32)}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, stats, gradients)))
        if i == 0:  # 8 bits of mantissa through the layers
            _assert_trees_close(_only(stats, "var"), _only(expected, "var"), 0.05)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        variables = {"params": params, "batch_stats": stats}
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    _, maps = jax.eval_shape(functools.partial(half.apply, features=("final",)), variables, images)
    assert maps["final"].dtype == jnp.bfloat16


# ---- Networks of the tutorials, by their counts.


def _counts(model, size):
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, size, size, 3))))
    return {
        key: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) for key, tree in variables.items()
    }, variables


def test_v2_with_21_classes():
    model = create_model("mobilenet_v2", num_classes=21)
    counts, variables = _counts(model, 32)
    assert counts == {"params": 2_250_773, "batch_stats": 34_112}
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]["classifier"])) == 26_901


def test_v1_for_32_pixels_arrives_with_a_map_to_pool():
    model = create_model("mobilenet_v1", num_classes=10, stride_one=(0,))
    counts, variables = _counts(model, 32)
    assert counts == {"params": 4_231_976 - 990 * 1025, "batch_stats": 21_888}
    run = functools.partial(model.apply, features=("stem", "final"))
    logits, maps = jax.eval_shape(run, variables, jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)
    assert {name: leaf.shape for name, leaf in maps.items()} == {
        "stem": (2, 32, 32, 32),
        "final": (2, 2, 2, 1024),
    }


def test_v3_small_with_unrounded_squeeze_excite():
    model = create_model("mobilenet_v3_small", se_gate="hard_swish", se_rounding="int", activation="relu6")
    counts, _ = _counts(model, 32)
    # Each channel less of a reduction saves its kernel in and out and one bias.
    expanded = [16, 96, 240, 240, 120, 144, 288, 576, 576]
    rounded = [8, 24, 64, 64, 32, 40, 72, 144, 144]
    less = sum((r - e // 4) * (2 * e + 1) for e, r in zip(expanded, rounded, strict=True))
    assert counts["params"] == 2_542_856 - less


# ---- Bad input.


def test_bad_input_is_one_sentence():
    model = create_model("mobilenet_v2", width=0.35)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    run = functools.partial(jax.eval_shape, model.apply, variables)
    with pytest.raises(ValueError, match=r"images are \(1, 32, 32, 1\); valid: \[batch, height, width, 3\]"):
        run(jnp.zeros((1, 32, 32, 1)))
    with pytest.raises(ValueError, match="feature is 'stride64'; valid: stem, stride2, stride4, stride8, stride16"):
        jax.eval_shape(functools.partial(model.apply, features=("stride64",)), variables, jnp.zeros((1, 32, 32, 3)))
    for shape in ((0, 32, 32, 3), (32, 32, 3)):
        with pytest.raises(
            ValueError, match=r"images are \(.*; valid: \[batch, height, width, 3\] with a batch of 1 or"
        ):
            run(jnp.zeros(shape))
    for dtype in (jnp.uint8, jnp.int32, jnp.bool_):
        with pytest.raises(ValueError, match=rf"images are {jnp.dtype(dtype)}; valid: floats that are normalised as"):
            run(jnp.zeros((1, 32, 32, 3), dtype))
    with pytest.raises(ValueError, match=r"features is 'stride8'; valid: a tuple of names: features=\('stride8',\)"):
        jax.eval_shape(functools.partial(model.apply, features="stride8"), variables, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="map of 0x32 is too small"):
        run(jnp.zeros((1, 0, 32, 3)))
    for key, valid in (("dtype", "float32, bfloat16, float64"), ("lowering", "auto, plain")):
        with pytest.raises(ValueError, match=f"{key} is 'fast'; valid: {valid}"):
            create_model("mobilenet_v2", **{key: "fast"})  # pyright: ignore[reportArgumentType]
    for values, said in (
        ({"width": "0.5"}, "width is '0.5'; valid: a number"),
        ({"num_classes": "5"}, "num_classes is"),
    ):
        with pytest.raises(ValueError, match=said):
            create_model("mobilenet_v2", **values)  # pyright: ignore[reportArgumentType]


def test_a_stem_of_other_channels():
    model = create_model("mobilenet_v2", width=0.1, shallow=True, num_classes=2, in_channels=5)
    variables = init_variables(model, seed=0)
    assert variables["params"]["stem"]["conv"]["kernel"].shape == (3, 3, 5, 8)
    assert jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 5))).shape == (1, 2)
    with pytest.raises(ValueError, match=r"valid: \[batch, height, width, 5\]"):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="in_channels is 0; valid: 1 or more"):
        create_model("mobilenet_v2", in_channels=0)


def test_variables_of_another_network_are_one_sentence():
    narrow, wide = (create_model("mobilenet_v2", width=width, num_classes=4) for width in (0.5, 1.0))
    variables = init_variables(narrow, seed=0)
    images = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(
        ValueError,
        match=r"^the variables have params/stem/conv/kernel of \(3, 3, 3, 16\) where the network has \(3, 3, 3, 32\); "
        "valid: variables of a mobilenet_v2 with the same width, classes and options",
    ):
        wide.apply(variables, images)
    with pytest.raises(ValueError, match="the variables have no params/stem/conv/kernel; valid: "):
        narrow.apply(variables["params"], images)
    del variables["params"]["classifier"]
    with pytest.raises(ValueError, match="the variables have no params/classifier/kernel; valid: "):
        jax.eval_shape(narrow.apply, variables, images)


# ---- Forward mode, second order, NNX.


@pytest.fixture(scope="module")
def plain():
    """(model, variables, images) of a small network in the textbook's form."""
    model = MobileNet(replace(_small("mobilenet_v2", keep=1), num_classes=2), lowering="plain")
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    return model, init_variables(model, seed=0), images


def test_forward_mode_and_second_order_derivatives_agree_with_backward_mode(plain):
    model, variables, images = plain
    direction = jax.random.normal(jax.random.key(2), images.shape)

    def loss(x):
        logits, _ = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        return (logits**2).sum()

    @jax.jit
    def differentiate(x):
        along = jax.jvp(loss, (x,), (direction,))[1]
        forward_of_backward = jax.jvp(jax.grad(loss), (x,), (direction,))[1]
        backward_of_backward = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), direction))(x)
        return along, jnp.vdot(jax.grad(loss)(x), direction), forward_of_backward, backward_of_backward

    along, expected, first, second = differentiate(images)
    np.testing.assert_allclose(along, expected, rtol=1e-4)
    scale = np.abs(second).max()
    assert scale > 0
    np.testing.assert_allclose(first, second, atol=1e-4 * scale)


def test_forward_mode_on_auto_says_that_plain_has_it(plain):
    model, variables, images = plain
    loss = lambda x: model.clone(lowering="auto").apply(variables, x).sum()  # noqa: E731
    with pytest.raises(TypeError, match=r"^forward-mode derivatives .* need lowering='plain'"):
        jax.jvp(loss, (images,), (images,))


def test_an_nnx_module_computes_and_trains_as_the_linen_one(plain):
    """The recipe of docs/backbone.md."""
    linen, variables, images = plain
    model = nnx.eval_shape(lambda: nnx.bridge.ToNNX(linen).lazy_init(images, rngs=jax.random.key(0)))
    leaves = {path[1:]: value for path, value in traverse_util.flatten_dict(variables).items()}
    nnx.update(model, traverse_util.unflatten_dict(leaves))

    def loss(model, images):
        return (model(images, train=True, mutable=["batch_stats"], rngs=nnx.Rngs(dropout=0)) ** 2).mean()

    gradients = nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model, images))
    assert gradients.keys() == variables["params"].keys()
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients["classifier"]))

    @jax.jit
    def update(variables, images):
        key = nnx.Rngs(dropout=0).dropout()
        return linen.apply(variables, images, train=True, mutable=["batch_stats"], rngs={"dropout": key})[1]

    updated = {"params": variables["params"], **update(variables, images)}
    np.testing.assert_allclose(model(images), linen.apply(updated, images), rtol=1e-5)
