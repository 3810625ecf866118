"""The precision of convolutions and matrix products in the programs of training and inference."""

import collections
import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilenet_jax.inference.predict import compile_classifier
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.models.network import MobileNet
from mobilenet_jax.models.zoo import make_spec

GREY = (127.5, 127.5, 127.5)
# Squeeze-excite; attention with a blurred or a strided key.
SPECS = {
    "mobilenet_v3_small": (0, 1),
    "mobilenet_v4_hybrid_medium": (0, 11),
}


def _make_model(name, **options) -> MobileNet:
    spec = make_spec(name, width=0.1, num_classes=4, dropout=0.0)
    return MobileNet(replace(spec, blocks=tuple(spec.blocks[i] for i in SPECS[name])), **options)


def _lower(model, *, train: bool, platform: str) -> str:
    """Return the StableHLO of the gradients of all parameters, or of inference."""
    variables = jax.eval_shape(functools.partial(init_variables, model, seed=0))
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)

    def gradients(variables, images):
        def loss(params):
            logits, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits)

        return jax.grad(loss)(variables["params"])

    program = jax.jit(gradients if train else functools.partial(model.apply, train=False))
    return program.trace(variables, images).lower(lowering_platforms=(platform,)).as_text()


def _count_precisions(text: str) -> dict[str, int]:
    """Count the precisions of convolutions and products."""
    found = collections.Counter()
    for line in text.splitlines():
        if re.search(r"stablehlo\.(convolution|dot_general)", line):
            (pair,) = re.findall(r"precision(?:_config)? = \[(.*?)\]", line) or ["DEFAULT"]
            found.update({re.sub(r"#stablehlo<precision (\w+)>", r"\1", pair).split(", ")[0]})
    return dict(found)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lowering", ["auto", "plain"])
def test_a_precision_reaches_every_convolution_and_product(name, train, lowering):
    found = {
        precision: _count_precisions(
            _lower(_make_model(name, lowering=lowering, precision=precision), train=train, platform="tpu")
        )
        for precision in ("default", "high", "highest")
    }
    total = sum(found["default"].values())
    assert total > 10
    assert found == {"default": {"DEFAULT": total}, "high": {"HIGH": total}, "highest": {"HIGHEST": total}}


def test_the_setting_of_jax_holds_under_the_default():
    with jax.default_matmul_precision("highest"):
        found = _count_precisions(_lower(_make_model("mobilenet_v3_small"), train=True, platform="tpu"))
    assert found.keys() == {"HIGHEST"}


def test_a_cpu_computes_the_same_bits_at_every_precision():
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    answers = []
    for precision in ("default", "highest"):
        model = _make_model("mobilenet_v3_small", precision=precision)
        answers.append(np.asarray(jax.jit(model.apply)(init_variables(model, seed=0), images)))
    np.testing.assert_array_equal(*answers)


def test_predictions_have_the_highest_precision():
    model = _make_model("mobilenet_v3_small")
    variables = jax.eval_shape(functools.partial(init_variables, model, seed=0))
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.uint8)
    for classify, expected in (
        (compile_classifier(model, GREY, GREY, top=2), {"HIGHEST"}),
        (jax.jit(lambda v, x: model.apply(v, normalise_images(x, GREY, GREY))), {"DEFAULT"}),
    ):
        text = classify.trace(variables, images).lower(lowering_platforms=("tpu",)).as_text()
        assert _count_precisions(text).keys() == expected


def test_unknown_precision():
    with pytest.raises(ValueError, match="precision is 'exact'; valid: default, high, highest"):
        _make_model("mobilenet_v3_small", precision="exact")
