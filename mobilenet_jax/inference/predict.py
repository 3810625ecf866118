"""Class names and probabilities of images. This module imports JAX when it predicts, not before."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from mobilenet_jax.data.transforms import EvalTransform
    from mobilenet_jax.exporting.contract import Exported
    from mobilenet_jax.models.network import MobileNet


class Answer(NamedTuple):
    """A class and its probability."""

    name: str  # the class's number if the weights know no names
    probability: float
    index: int


class Prediction(NamedTuple):
    """The answers of the network for one image, or the error that prevented them."""

    path: Path
    answers: list[Answer]  # the most probable first; empty if there is an error
    error: str | None


def predict(
    weights: "tuple[MobileNet, dict, dict] | Exported",
    images: Iterable[str | Path],
    *,
    top: int = 5,
    batch_size: int = 32,
    decode: str = "exact",
) -> Iterator[Prediction]:
    """Yield the most probable classes of each image, in order, with the preprocessing of the weights' card.

    Args:
      weights: (model, variables, card) of `load_weights`, or a file of `read_exported`, which its own runtime computes.
      images: files and folders; of a folder, the images that `list_images` finds.
      top: the number of answers for an image, at most the number of classes.
      batch_size: the number of images computed at once. The last batch is padded, so one program is compiled.
      decode: exact, or fast: decode large JPEGs at a part of their size, as `EvalTransform.least_side` says.

    Raises:
      ValueError: an impossible value, a folder without images, or weights without classes; before any image is read.
    """
    from mobilenet_jax.data import DECODES
    from mobilenet_jax.data.image_files import list_images
    from mobilenet_jax.data.transforms import EvalTransform
    from mobilenet_jax.exporting.contract import Exported
    from mobilenet_jax.models.cost import compute_cost
    from mobilenet_jax.models.spec import check_choice
    from mobilenet_jax.weights.card import read_preprocessing

    card, spec = (weights.card, weights.spec) if isinstance(weights, Exported) else (weights[2], weights[0].spec)
    for key, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{key} is {value}; valid: 1 or more")
    check_choice("decode", decode, DECODES)
    if not spec.num_classes:
        raise ValueError(f"the weights {card['name']} have no classifier, and so no classes")
    if spec.in_channels != 3:
        raise ValueError(f"the weights {card['name']} take {spec.in_channels} channels; images have 3")
    given = read_preprocessing(card, source=f"the weights {card['name']}")
    compute_cost(spec, given.image_size)  # raises if the image is too small
    files, top = list_images(images), min(top, spec.num_classes)
    transform = EvalTransform(given.image_size, given.crop_share, given.interpolation, given.squash, decode)
    if isinstance(weights, Exported):
        classify = _open_file(weights, given.mean, given.std, top=top)
    else:
        classify = _place_variables(compile_classifier(weights[0], given.mean, given.std, top=top), weights[1])
    batch_size = min(batch_size, len(files))
    return _predict(classify, card["class_names"], files, transform=transform, batch_size=batch_size)


def _open_file(exported: "Exported", mean: tuple[float, ...], std: tuple[float, ...], *, top: int) -> Callable:
    """Return the function images uint8 [B, S, S, 3] -> (probabilities [B, top], classes [B, top]) of a file."""
    import numpy as np

    from mobilenet_jax.exporting.runtime import open_classifier

    run = open_classifier(exported)

    def classify(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits = run(images, mean, std)
        shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
        classes = np.argsort(-logits, axis=-1, kind="stable")[:, :top]
        return np.take_along_axis(shares / shares.sum(axis=-1, keepdims=True), classes, axis=-1), classes

    return classify


def _place_variables(program: Callable, variables: dict) -> Callable:
    """Return the function of images that calls (variables, images) with the variables on the device."""
    import functools

    import jax

    return functools.partial(program, jax.device_put(variables))


def compile_classifier(model: "MobileNet", mean: tuple[float, ...], std: tuple[float, ...], *, top: int) -> Callable:
    """Return a program of (variables, images uint8 [B, S, S, 3]) -> (probabilities [B, top], classes [B, top]).

    The answers of float32 weights are the same on every platform, so matrix products have the highest precision.
    """
    import jax

    from mobilenet_jax.models.layers import normalise_images

    model = model.clone(precision="highest")

    @jax.jit
    def classify(variables: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(variables, normalise_images(images, mean, std), train=False)
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), top)
        return probabilities, classes

    return classify


def _predict(
    classify: Callable,
    class_names: list[str] | None,
    files: list[Path],
    *,
    transform: "EvalTransform",
    batch_size: int,
) -> Iterator[Prediction]:
    from mobilenet_jax.data.image_files import read_batches

    for paths, errors, images in read_batches(files, transform, batch_size=batch_size):
        yield from _name(paths, errors, classify(images), class_names)


def _name(paths: list[Path], errors: list[str | None], scores, class_names: list[str] | None) -> Iterator[Prediction]:
    """Yield the predictions of a batch from the program's (probabilities, classes)."""
    import numpy as np

    probabilities, classes = map(np.asarray, scores)
    for i, (path, error) in enumerate(zip(paths, errors, strict=True)):
        if error is None and not np.isfinite(probabilities[i]).all():
            error = f"{path}: the network's answer is not finite"
        pairs = zip(probabilities[i].tolist(), classes[i].tolist(), strict=True) if error is None else ()
        yield Prediction(path, [Answer(class_names[k] if class_names else str(k), p, k) for p, k in pairs], error)
