"""One training step and one evaluation step: pure functions of data that know no config and are not jitted here."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from mobilenet_jax.models.layers import normalise_images
from mobilenet_jax.training.distill import Distillation, ask_teacher, learn_from
from mobilenet_jax.training.ema import update_ema
from mobilenet_jax.training.losses import mix_batch, softmax_cross_entropy

# JAX 0.8.2 renamed `pvary` and 0.10 removed it.
_to_varying = functools.partial(lax.pcast, to="varying") if hasattr(lax, "pcast") else lax.pvary  # pyright: ignore[reportAttributeAccessIssue]

CALIBRATION_BINS = 15
Batch = dict[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class TrainState:
    """The data that a run carries from step to step. Randomness is `fold_in(key, step)`, so there is no key."""

    step: jax.Array  # steps done
    params: Any
    batch_stats: Any
    opt_state: Any
    ema: Any  # the averages of `variables`, or None without averaging
    ranges: Any = None  # of the tensors of an int8 network by name, float32 [2]; None in float

    @property
    def variables(self) -> dict[str, Any]:
        """The collections that the network is applied to."""
        measured = {"batch_stats": self.batch_stats, **({} if self.ranges is None else {"ranges": self.ranges})}
        return {"params": self.params, **measured}


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """The options of a training step beside model and optimizer."""

    mean: tuple[float, ...]  # grey levels
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    accumulate: int = 1  # micro-batches
    ema_decay: float = 0.0
    axis: str | None = None  # the mesh axis of a per-device step under `shard_map`
    frozen: Any = None  # a tree of bools like the parameters: where true, no gradient is computed, and it is 0
    distill: Distillation | None = None  # what is learnt from a teacher, whose variables the step is given


def create_state(variables: dict, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Return the state before the first step. Each leaf is a buffer of its own, because the step donates the state."""
    copy = lambda tree: jax.tree.map(jnp.array, tree)  # noqa: E731
    own = copy(variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=own["params"],
        batch_stats=own["batch_stats"],
        opt_state=optimizer.init(own["params"]),
        ema=copy(variables) if ema else None,
        ranges=own.get("ranges"),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    teacher: Any = None,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    options: StepOptions,
) -> tuple[TrainState, Sums]:
    """Return the state after one update on {"images" uint8 [B, H, W, C], "labels" int [B]}, and metrics.

    The metrics are (sum, count) over the global batch. `grad_norm` is the norm of the gradient of the trained
    parameters before any clipping. `teacher` are the variables of the network of `options.distill`, if there is one;
    `distill_loss` is then its term of the loss before it is weighted, and `teacher_agreement` the share of the images
    for which the two networks give the same class.
    """
    key = jax.random.fold_in(key, state.step)
    variables = state.variables
    if options.axis:
        key = jax.random.fold_in(key, lax.axis_index(options.axis))
        # JAX would sum the gradients of replicated parameters over the devices. Those of varying parameters stay
        # apart, so that the mean below is the only reduction.
        variables, teacher = _to_varying((variables, teacher), options.axis)
    grads, measured, sums = _gradients(variables, batch, key, teacher, model=model, options=options)
    if options.axis:
        grads = lax.pmean(grads, options.axis)
        # A mean of equal values may be off by a rounding. The mean of their changes is exactly 0 for frozen statistics.
        before, own = ({name: tree[name] for name in measured} for tree in (state.variables, variables))
        changes = jax.tree.map(jnp.subtract, measured, own)
        measured = jax.tree.map(jnp.add, before, lax.pmean(changes, options.axis))
        sums = lax.psum(sums, options.axis)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, {"params": params, **measured}, step=state.step, decay=options.ema_decay)
    sums["grad_norm"] = (optax.tree.norm(grads), jnp.ones(()))
    return replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, **measured), sums


def _gradients(variables: dict, batch: Batch, key: jax.Array, teacher: Any, *, model, options: StepOptions):
    """Return (gradients of the mean loss, what the network measured, metric sums) over micro-batches, one by one.

    The network measures every collection but the parameters: batch-norm statistics, and the ranges of int8.
    """
    if options.accumulate == 1:
        return _micro_gradients(variables, batch, key, teacher, model=model, options=options)
    n = options.accumulate

    def run(measured, part):
        index, micro = part
        grads, measured, sums = _micro_gradients(
            {**variables, **measured},
            micro,
            jax.random.fold_in(key, index),
            teacher,
            model=model,
            options=options,
        )
        return measured, (grads, sums)

    # Micro-batch i takes every n-th image, so that each device has a part of each micro-batch.
    parts = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
    before = {name: tree for name, tree in variables.items() if name != "params"}
    measured, (grads, sums) = lax.scan(run, before, (jnp.arange(n), parts))
    mean_grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
    return mean_grads, measured, jax.tree.map(lambda s: jnp.sum(s, axis=0), sums)


def _micro_gradients(variables: dict, batch: Batch, key: jax.Array, teacher: Any, *, model, options: StepOptions):
    mix_key, dropout_key = jax.random.split(key)
    labels = batch["labels"]
    images = normalise_images(batch["images"], options.mean, options.std)
    targets = labels
    if options.mixup or options.cutmix:
        images, targets = mix_batch(
            mix_key,
            images,
            jax.nn.one_hot(labels, model.spec.num_classes),
            mixup=options.mixup,
            cutmix=options.cutmix,
            probability=options.mix_probability,
        )
    answers: Any = ask_teacher(options.distill, teacher, images) if options.distill else None

    def loss_fn(params):
        if options.frozen is not None:
            params = jax.tree.map(lambda p, frozen: lax.stop_gradient(p) if frozen else p, params, options.frozen)
        logits, updated = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=[name for name in variables if name != "params"],
            rngs={"dropout": dropout_key},
        )
        losses = softmax_cross_entropy(logits, targets, label_smoothing=options.label_smoothing)
        terms = {}
        if options.distill:
            losses, terms = learn_from(options.distill, logits, answers, labels_loss=losses)
        return jnp.mean(losses), (losses, logits, updated, terms)

    grads, (losses, logits, measured, terms) = jax.grad(loss_fn, has_aux=True)(variables["params"])
    count = jnp.sum(jnp.ones_like(losses))
    correct = jnp.argmax(logits, axis=-1) == labels
    terms = {"loss": losses, "top1": correct.astype(jnp.float32), **terms}
    return grads, measured, {name: (jnp.sum(values), count) for name, values in terms.items()}


def eval_step(
    variables: dict, batch: Batch, *, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> dict[str, jax.Array]:
    """Return `count_answers` of a network on the images of a batch."""
    images = normalise_images(batch["images"], mean, std)
    logits: Any = model.apply(variables, images, train=False)
    return count_answers(logits, batch["labels"], batch["mask"])


def count_answers(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Return sums over the images that `mask` [B] marks, of logits [B, K] and labels [B].

    The sums are loss, top1, top5, count, classes, calibration and confusion. `classes` [2, K] counts the images of each
    class, and the correct answers among them. `calibration` [2, 15] has, for the answers with a probability in
    ((m - 1)/15, m/15], the sum of the probabilities and the number of correct answers (Guo et al. 2017, arXiv
    1706.04599, section 2). `confusion` [K, K] has true classes in rows and predicted classes in columns; it is left out
    above 100 classes.
    """
    classes = logits.shape[-1]
    losses = softmax_cross_entropy(logits, labels, label_smoothing=0.0)
    _, best = lax.top_k(logits, min(5, classes))
    hits = (best == labels[:, None]) & mask[:, None]
    right, confidence = hits[:, 0], jnp.max(jax.nn.softmax(logits), axis=-1)
    # Equal logits have the probability 1/K, which for some K is the edge of a bin. No rounding may lift them over it.
    bins = jnp.ceil(confidence * CALIBRATION_BINS - 1e-5).astype(jnp.int32) - 1
    bins = jnp.clip(bins, 0, CALIBRATION_BINS - 1)
    of_class = functools.partial(jax.ops.segment_sum, segment_ids=labels, num_segments=classes)
    of_bin = functools.partial(jax.ops.segment_sum, segment_ids=bins, num_segments=CALIBRATION_BINS)
    sums = {
        "loss": jnp.sum(jnp.where(mask, losses, 0)),
        "top1": jnp.sum(right.astype(jnp.int32)),
        "top5": jnp.sum(jnp.any(hits, axis=1).astype(jnp.int32)),
        "count": jnp.sum(mask.astype(jnp.int32)),
        "classes": jnp.stack([of_class(mask.astype(jnp.int32)), of_class(right.astype(jnp.int32))]),
        "calibration": jnp.stack([of_bin(jnp.where(mask, confidence, 0)), of_bin(right.astype(jnp.float32))]),
    }
    if classes <= 100:
        true = jax.nn.one_hot(labels, classes) * mask[:, None]
        sums["confusion"] = (true.T @ jax.nn.one_hot(best[:, 0], classes)).astype(jnp.int32)
    return sums
