"""Every architecture by name: the one dict that configs, commands and `create_model` read. No JAX here.

To add a variant, write a table and a function that returns its `Spec` (`v2.py` is the shortest example), and register
the function in `MODELS`.

Two relatives in timm are not built: `mobilenetv3_large_150d` (repeats are scaled by stage, and so is the last 1x1) and
`mobilenetv3_rw` (another squeeze-excite, a head without bias).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from numbers import Integral, Real

from mobilenet_jax.models import edgetpu, v1, v2, v3, v4
from mobilenet_jax.models.options import apply_options
from mobilenet_jax.models.spec import Spec, check_choice

MODELS: dict[str, Callable[..., Spec]] = {
    "mobilenet_v1": v1.mobilenet_v1,
    "mobilenet_v1_headconv": v1.mobilenet_v1_headconv,
    "mobilenet_v2": v2.mobilenet_v2,
    "mobilenet_v2_deep_x1.2": functools.partial(v2.mobilenet_v2, depth=1.2),
    "mobilenet_v2_deep_x1.4": functools.partial(v2.mobilenet_v2, depth=1.4),
    "mobilenet_v3_large": v3.mobilenet_v3_large,
    "mobilenet_v3_small": v3.mobilenet_v3_small,
    "mobilenet_v3_large_minimalistic": v3.mobilenet_v3_large_minimalistic,
    "mobilenet_v3_small_minimalistic": v3.mobilenet_v3_small_minimalistic,
    **{f"mobilenet_v4_{size}": functools.partial(v4.mobilenet_v4, size) for size in v4.TABLES},
    **{f"mobilenet_{size}": functools.partial(edgetpu.mobilenet_edgetpu, size) for size in edgetpu.TABLES},
}
CONVENTIONS = ("keras", "timm", "timm_tf", "torchvision")


def make_spec(
    name: str, *, width: float = 1.0, num_classes: int = 1000, convention: str = "keras", **options: object
) -> Spec:
    """Return the network `name` as the framework of `convention` builds it, with options of `options.OPTIONS`.

    Raises ValueError, in one sentence with the valid values, for an unknown name, convention, option or value.
    """
    check_choice("model name", name, tuple(MODELS))
    check_choice("convention", convention, CONVENTIONS)
    if not (isinstance(width, Real) and 0 < width < math.inf):
        raise ValueError(f"width is {width!r}; valid: a number, finite and above 0")
    if not isinstance(num_classes, Integral):
        raise ValueError(f"num_classes is {num_classes!r}; valid: 0 (no classifier), or the number of classes")
    spec = MODELS[name](width=width, convention=convention)
    return apply_options(replace(spec, num_classes=num_classes), **options)
