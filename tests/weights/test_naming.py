import numpy as np
import pytest

from mobilenet_jax.models.init import variable_shapes
from mobilenet_jax.models.zoo import make_spec
from mobilenet_jax.weights import WeightsError
from mobilenet_jax.weights.keras_names import KERAS
from mobilenet_jax.weights.naming import Slot, align_by_order, compare, identify
from mobilenet_jax.weights.torch_names import TIMM, TORCHVISION

NAMINGS = (TORCHVISION, TIMM, KERAS)
ENTRIES = [
    pytest.param(naming, entry, id=naming.name_entry(entry, 1.0)) for naming in NAMINGS for entry in naming.entries
]


def list_shapes(naming, entry, *, width: float, **options) -> dict[str, tuple[int, ...]]:
    spec = make_spec(entry.model, width=width, convention=entry.convention, **options)
    return {name: slot.shape for name, slot in naming.list_slots(spec).items()}


@pytest.mark.parametrize(("naming", "entry"), ENTRIES)
def test_every_variable_has_a_tensor_of_its_own(naming, entry):
    spec = make_spec(entry.model, width=entry.width or 0.75, convention=entry.convention)
    slots, shapes = naming.list_slots(spec), variable_shapes(spec)
    assert [slot.path for slot in slots.values()] == list(shapes)
    for slot in slots.values():
        tensor = np.empty(slot.shape, np.int8)
        assert slot.to_variable(tensor).shape == shapes[slot.path]
        assert slot.to_tensor(slot.to_variable(tensor)).shape == slot.shape


@pytest.mark.parametrize(("naming", "entry"), ENTRIES)
def test_an_entry_is_found_by_its_tensors_at_any_width(naming, entry):
    for width in (1.0,) if "edgetpu" in entry.name else (entry.width or 1.0, 0.43):
        shapes = list_shapes(naming, entry, width=width, num_classes=3)
        spec = make_spec(entry.model, width=width, num_classes=3, convention=entry.convention)
        same = [
            e
            for e in naming.entries
            if "edgetpu" not in e.name and list_shapes(naming, e, width=width, num_classes=3) == shapes
        ]
        if len(same) > 1:
            with pytest.raises(WeightsError) as caught:
                identify(naming, shapes, name=None, source="it")
            assert all(f"{naming.framework}/{e.name}" in str(caught.value) for e in same)
        else:
            match = identify(naming, shapes, name=None, source="it")
            assert (match.entry, match.spec) == (entry, spec)
            assert match.width == pytest.approx(width, abs=0.035)
        if width == entry.width or naming.percent:
            name = naming.name_entry(entry, width).partition("/")[2]
            assert identify(naming, shapes, name=f"{name}.any_tag", source="it").spec == spec


def test_kernels_keep_their_axes():
    generator = np.random.default_rng(0)
    full, depthwise, dense = (generator.standard_normal(shape) for shape in ((3, 5, 4, 6), (3, 5, 1, 4), (4, 6)))
    for naming in (TORCHVISION, KERAS):
        layout = naming.layout
        for variable, axes in ((full, layout.conv), (depthwise, layout.depthwise), (dense, layout.dense)):
            core = tuple(variable.shape[i] for i in np.argsort(axes))
            slot = Slot((), layout.widen(core) if variable is dense else core, core, axes)
            tensor = slot.to_tensor(variable)
            np.testing.assert_array_equal(slot.to_variable(tensor), variable)
            if naming is KERAS:  # reference: Keras [k, k, I, O], depthwise [k, k, C, 1], dense as 1x1 [1, 1, I, O]
                assert tensor.shape == {4: (*variable.shape[:2], *sorted(variable.shape[2:])), 2: (1, 1, 4, 6)}[
                    variable.ndim
                ] or tensor.shape == (3, 5, 4, 1)
            else:  # PyTorch [O, I, k, k], depthwise [C, 1, k, k], dense as 1x1 [O, I, 1, 1]
                assert tensor.shape == {4: (*variable.shape[:1:-1], 3, 5), 2: (6, 4, 1, 1)}[variable.ndim]


def test_a_tensor_transposed_in_height_and_width_would_be_noticed():
    slot = next(slot for slot in TORCHVISION.list_slots(make_spec("mobilenet_v2", convention="torchvision")).values())
    tensor = np.arange(32 * 3 * 9).reshape(slot.shape)
    assert slot.to_variable(tensor)[1, 2, 0, 5] == tensor[5, 0, 1, 2]


def test_widths_in_names_are_checked():
    shapes = list_shapes(TIMM, TIMM.select("mobilenetv2")[0][0], width=0.5)
    assert identify(TIMM, shapes, name="mobilenetv2_050", source="it").width == 0.5
    assert identify(TIMM, shapes, name="mobilenetv2", source="it").width == 0.5
    with pytest.raises(
        WeightsError, match=r"it does not fit timm/mobilenetv2_100: of another shape are conv_stem\.weight"
    ):
        identify(TIMM, shapes, name="mobilenetv2_100", source="it")
    with pytest.raises(
        WeightsError, match=r"timm has no model 'mobilenetv8'; valid: .*timm/mobilenetv4_conv_small, .*"
    ):
        TIMM.select("mobilenetv8")


def test_a_width_that_no_groups_divide_is_said():
    shapes = list_shapes(TIMM, TIMM.select("mobilenet_edgetpu_v2_m")[0][0], width=1.0)
    with pytest.raises(WeightsError, match="it does not fit timm/mobilenet_edgetpu_v2_m_035"):
        identify(TIMM, shapes, name="mobilenet_edgetpu_v2_m_035", source="it")


def test_comparing_names_the_first_of_each_kind():
    expected = dict.fromkeys("abcdefg", (1,))
    count, text = compare(expected, {"a": (2,), "x": (1,)})
    assert count == 8
    assert text == "it lacks b, c, d, e and 2 more; it has unknown x; of another shape are a [2] (valid: [1])"
    assert compare(expected, expected) == (0, "")


@pytest.mark.parametrize("entry", KERAS.entries, ids=lambda entry: entry.model)
def test_keras_files_of_other_names_are_read_by_order(entry):
    shapes = list_shapes(KERAS, entry, width=0.5, num_classes=11)
    old = {f"layer{i}/weight": shape for i, shape in enumerate(shapes.values())}
    (names,) = align_by_order(KERAS, old)
    assert list(names.values()) == list(shapes)
