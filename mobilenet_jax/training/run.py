"""Build, restore, loop: the one module that knows every other."""

import dataclasses
import functools
import json
import math
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mobilenet_jax import plots
from mobilenet_jax.data.loader import make_eval_batches, make_train_iterator
from mobilenet_jax.data.sources import DataInfo, describe, eval_split
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import check_choice, check_share
from mobilenet_jax.training.config import flatten_config
from mobilenet_jax.training.dead_filters import count_dead_filters
from mobilenet_jax.training.evaluate import evaluate
from mobilenet_jax.training.linear_probe import Features, LinearProbe, compute_features, make_feature_step
from mobilenet_jax.training.optim import find_frozen, make_optimizer, make_schedule
from mobilenet_jax.training.plan import make_plan, warn_of_slow_statistics
from mobilenet_jax.training.progress import Progress
from mobilenet_jax.training.recalibrate import make_stats_step, measure_stats
from mobilenet_jax.training.sharding import (
    AXIS,
    PARALLEL,
    check_batch_size,
    make_key,
    make_mesh,
    put_batch,
    replicate,
    shard_eval_step,
    shard_train_step,
)
from mobilenet_jax.training.signals import StopSignals
from mobilenet_jax.training.steps import StepOptions, TrainState, create_state, eval_step, train_step
from mobilenet_jax.weights.load import load_weights
from mobilenet_jax.workdir.checkpoint import Checkpoints, merge_variables
from mobilenet_jax.workdir.environment import environment
from mobilenet_jax.workdir.files import write_json_atomic
from mobilenet_jax.workdir.metrics import Mean, MetricsWriter, read_metrics


class NonFiniteError(RuntimeError):
    """Training stopped because the loss, its gradient or the state is not finite any more."""


class RefusedError(ValueError):
    """A run that cannot start, because its config, data set or checkpoint does not fit."""


# Keys of a config that may be none, and where the card of the weights that the run starts from has their values.
CARD_KEYS = {
    "model.name": ("model",),
    "model.width": ("width",),
    "model.convention": ("convention",),
    "data.image_size": ("preprocessing", "image_size"),
    "data.crop_share": ("preprocessing", "crop_share"),
    "data.interpolation": ("preprocessing", "interpolation"),
    "data.squash": ("preprocessing", "squash"),
    "data.mean": ("preprocessing", "mean"),
    "data.std": ("preprocessing", "std"),
}


def follow_card(config, read_card: Callable[[], dict]):
    """The config with every key of CARD_KEYS that is none filled from the card of its weights, which is read then.

    Raises ValueError if there is such a key and no `init`.
    """
    flat = flatten_config(config)
    missing = [key for key in CARD_KEYS if flat[key] is None]
    if not missing:
        return config
    if not config.init:
        raise ValueError(f"{', '.join(missing)} are none: as the weights have them; set init to weights, or these keys")
    config, card = config.copy_and_resolve_references(), read_card()
    for key in missing:
        value = functools.reduce(operator.getitem, CARD_KEYS[key], card)
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value})
    return config


def warn_of_other_preprocessing(config, card: dict) -> None:
    """Say which keys of the data section are not as the weights' card has them: another mean costs points."""
    flat = flatten_config(config)
    theirs = {key: card["preprocessing"][path[1]] for key, path in CARD_KEYS.items() if path[0] == "preprocessing"}
    differences = [f"{key} is {flat[key]}, there {value}" for key, value in theirs.items() if flat[key] != value]
    if differences:
        logging.warning("init %s was trained with other preprocessing: %s", config.init, "; ".join(differences))


def build_model(config, info: DataInfo) -> MobileNet:
    """The model of `config.model` for the classes of the data set.

    Raises ValueError for an impossible value, fewer classes than the data has, or images too small for the strides.
    """
    options = config.model.to_dict()
    options["num_classes"] = info.num_classes if options["num_classes"] is None else options["num_classes"]
    if options["num_classes"] < info.num_classes:
        raise ValueError(
            f"model.num_classes is {options['num_classes']}; {config.data.source} has {info.num_classes} classes"
        )
    model = create_model(**options, freeze_stats=config.train.freeze_stats)
    try:
        compute_cost(model.spec, config.data.image_size)
    except ValueError as error:
        raise ValueError(f"data.image_size is {config.data.image_size}: {error}") from error
    return model


def _check(config, mesh: Mesh) -> None:
    """What no other module checks of `config.train` and the top level."""
    if config.train.cache_features:
        _check_cached(config)
    check_choice("parallel", config.parallel, PARALLEL)
    check_choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))  # float64 is for tests: JAX's x64 mode
    check_share("ema.decay", config.ema.decay)
    check_share("train.label_smoothing", config.train.label_smoothing)
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; valid: 0 or more")
    train, data = config.train, config.data
    for key in ("mixup", "cutmix"):
        if data[key] < 0:
            raise ValueError(f"data.{key} is {data[key]}; valid: 0 (off) or more")
    if not 0 <= data.mix_probability <= 1:
        raise ValueError(f"data.mix_probability is {data.mix_probability}; valid: 0 to 1")
    if len(data.mean) != 3 or len(data.std) != 3 or min(data.std) <= 0:
        raise ValueError(f"data.mean is {data.mean}, data.std {data.std}; valid: 3 grey levels each, std above 0")
    for key in ("log_every_steps", "keep_checkpoints", "accumulate"):
        if train[key] < 1:
            raise ValueError(f"train.{key} is {train[key]}; valid: 1 or more")
    if train.diagnose_every_steps < 0:
        raise ValueError(
            f"train.diagnose_every_steps is {train.diagnose_every_steps}; valid: 1 or more, or 0 for never"
        )
    for key in ("eval_every_epochs", "save_every_epochs"):
        if train[key] < 0:
            raise ValueError(f"train.{key} is {train[key]}; valid: above 0, or 0 for the end of the run alone")
    if train.recompute_stats_epochs < 0:
        raise ValueError(f"train.recompute_stats_epochs is {train.recompute_stats_epochs}; valid: 0 (off) or more")
    if (train.epochs if train.steps is None else train.steps) <= 0:
        raise ValueError("train.steps, or train.epochs where steps is none, must be above 0")
    check_batch_size("data.batch_size / train.accumulate", data.batch_size / train.accumulate, mesh)
    check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh)


def _check_cached(config) -> None:
    """That features computed once are all that training could see."""
    data, optim = config.data, config.optim
    random = ("flip", "color_jitter", "randaugment_layers", "erasing", "mixup", "cutmix")
    wrong = [f"data.{key} is {data[key]}" for key in random if data[key]]
    wrong += [f"data.crop is {data.crop!r}"] if data.crop != "resize" else []
    wrong += [f"optim.freeze_epochs is {optim.freeze_epochs}"] if optim.freeze_epochs is not None else []
    wrong += ["train.recompute_stats_epochs is not 0"] if config.train.recompute_stats_epochs else []
    if wrong:
        raise ValueError(
            f"train.cache_features sees each image once, uncropped and unchanged, by a network that stays as it is; "
            f"{', '.join(wrong)}; valid: data.crop='resize', none for freeze_epochs, 0 or False for the others"
        )


class Run:
    """A config and a workdir, checked against data, devices and checkpoints; nothing is compiled before `train`.

    The state is that of the newest checkpoint in the workdir, or a fresh one.

    Raises:
      ValueError, OSError: a config, data set or checkpoint that does not fit, in one sentence.
    """

    def __init__(self, config, workdir: str | Path):
        start = time.perf_counter()
        self._load_init = functools.cache(functools.partial(load_weights, config.init, config.init_name or None))
        config = follow_card(config, lambda: self._load_init()[2])
        self.config, self.workdir, self.mesh = config, Path(workdir), make_mesh()
        _check(config, self.mesh)
        self.info = describe(config.data)
        self.model = build_model(config, self.info)
        self._processes: dict[str, Any] = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._network: MobileNet | LinearProbe = self.model
        self._mean, self._std = config.data.mean, config.data.std
        self._iterator = make_train_iterator(config.data, seed=config.seed, **self._processes)
        self._eval_batches, self._eval_count = make_eval_batches(config.data, **self._processes)
        self.plan = make_plan(config, self.info.train_count)
        self._is_first = jax.process_index() == 0
        if not config.train.freeze_stats and not self.plan.stats_batches:
            warn_of_slow_statistics(config.model.bn_decay, self.plan.total_steps)
        opened = time.perf_counter()
        self._restore()
        self.seconds = {"data": opened - start, "init": time.perf_counter() - opened}

    def _restore(self) -> None:
        config = self.config
        variables = init_variables(self.model, seed=config.seed)
        self.schedule = make_schedule(
            config.optim,
            batch_size=config.data.batch_size,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.plan.total_steps,
        )
        spec, params = self.model.spec, variables["params"]
        self._frozen = find_frozen(config.optim, params) if config.optim.freeze else None
        if config.train.cache_features:
            _check_only_classifier(self._frozen, params)
        self._optimizer = make_optimizer(
            config.optim,
            params,
            schedule=self.schedule,
            frozen=self._frozen,
            freeze_steps=None if config.optim.freeze_epochs is None else self.plan.freeze_steps,
            layers=[*(name for name, _, _ in spec.rows()), *(op.name for op in spec.tail_ops())],
        )
        flat = {
            "model.num_classes": self.model.spec.num_classes,
            "data.train_images": self.info.train_count,
            "processes": self._processes["process_count"],
        }
        self._flat_config = {**flatten_config(config), **flat}
        self._checkpoints = Checkpoints(self.workdir, keep=config.train.keep_checkpoints)
        fresh = functools.partial(create_state, optimizer=self._optimizer, ema=config.ema.decay > 0)
        try:
            restored = self._checkpoints.restore(
                jax.eval_shape(fresh, variables), self._iterator, config=self._flat_config
            )
            if restored is None and config.init:
                variables = self._initialise(variables)
        except (ValueError, OSError):
            self.close()
            raise
        state, meta = restored or (jax.jit(fresh)(variables), {"train": {}, "skipped": 0})
        self.start_step = int(state.step)
        self._state: TrainState = replicate(state, self.mesh)
        self._train_mean = Mean()
        self._train_mean.restore(meta["train"])
        self._skipped: int = meta["skipped"]
        self._evaluation: dict[str, float] | None = None
        self._confusion: np.ndarray | None = None

    def _initialise(self, variables: dict) -> dict:
        """The variables of config.init; ValueError if they were trained for other sums than the model's."""
        config = self.config
        source, loaded, card = self._load_init()
        theirs, ours = source.spec, self.model.spec
        if (theirs.padding, theirs.bn_epsilon) != (ours.padding, ours.bn_epsilon):
            raise ValueError(
                f"init {config.init!r} has padding {theirs.padding} and bn_epsilon {theirs.bn_epsilon}, the model "
                f"{ours.padding} and {ours.bn_epsilon}; set model.convention to {card['convention']}"
            )
        warn_of_other_preprocessing(config, card)
        return merge_variables(variables, loaded, source=config.init)

    def close(self) -> None:
        """Wait for checkpoints being written, end the data threads."""
        self._checkpoints.close()
        self._iterator.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def finished_result(self) -> dict | None:
        """What `train` returned when it reached the last step; None where there is something left to do."""
        path = self.workdir / "result.json"
        if self.start_step < self.plan.total_steps or not path.exists():
            return None
        result = json.loads(path.read_text())
        # A run that was made longer and then killed has the result of its shorter self.
        return result if result["step"] == self.start_step else None

    def train(self) -> dict:
        """Train to the last step, or to a signal; return the result as `result.json` has it.

        The result is that of the last step, of the averaged variables where there are any. A finished run returns
        the result it had; a stopped one {"stopped": the signal, "step": steps done}.

        Raises:
          NonFiniteError: a loss or gradient that is not finite; the checkpoints of the steps before it stay.
          UnreadableImageError: an image that cannot be decoded, unless data.on_error is "skip".
        """
        if self.finished_result:
            return self.finished_result
        if self._is_first:
            write_json_atomic(self.workdir / "config.json", self._flat_config)
            devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
            write_json_atomic(self.workdir / "environment.json", environment(devices))
        progress = Progress(
            self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            batch_size=self.config.data.batch_size,
            start_step=self.start_step,
            active=self._is_first,
        )
        writer = MetricsWriter(self.workdir, start_step=self.start_step, active=self._is_first)
        if self.config.train.cache_features:
            self._cache_features()
        with writer, progress, StopSignals() as signals:
            stopped_at = self._loop(writer, progress, signals)
        if stopped_at:
            return {"stopped": signals.received or "a signal to another process", "step": stopped_at}
        return self._finish()

    def _loop(self, writer: MetricsWriter, progress: Progress, signals: StopSignals) -> int | None:
        """Steps until the plan's end (None) or a signal (the step it stopped at).

        A step's sums are read while the next one runs. They are read at once where something else waits for them: an
        evaluation, or a save, for a step that was not finite is never saved.
        """
        plan, step_fn, pending = self.plan, None, None
        key = make_key(self.config.seed, self.mesh)
        self._waited, self._line_time = 0.0, time.perf_counter()
        for step in range(self.start_step + 1, plan.total_steps + 1):
            batch, skipped = self._next_batch()
            if step_fn is None or step == plan.freeze_steps + 1:
                with progress.paused():
                    step_fn = self._compile(batch, key, frozen=step <= plan.freeze_steps)
            self._state, sums = step_fn(self._state, batch, key)
            if (every := self.config.train.diagnose_every_steps) and plan.is_due(step, every):
                sums |= self._count_dead(self._state.params, self._state.batch_stats)
            if pending:
                self._account(*pending, progress)
                if plan.is_due(step - 1, plan.log_every):
                    self._write(step - 1, writer, progress)
            pending = (step, sums, skipped)
            stops = self._should_stop(step, signals)
            evaluates, saves = plan.is_due(step, plan.eval_every), plan.is_due(step, plan.save_every) or stops
            if evaluates or saves:
                self._account(*pending, progress)
                pending = None
                with progress.paused():
                    if step == plan.total_steps and plan.stats_batches:
                        self._recompute_stats()
                    evaluation = self._evaluate_both() if evaluates else {}
                    if evaluates or plan.is_due(step, plan.log_every):
                        self._write(step, writer, progress, evaluation)
                    if saves:
                        self._save(step, writer)
            if stops:
                self._checkpoints.wait()
                return step
        self._checkpoints.wait()
        return None

    def _next_batch(self) -> tuple[dict[str, jax.Array], int]:
        """The next batch on the devices, and how many unreadable images it passed over."""
        before = time.perf_counter()
        batch = next(self._iterator)
        self._waited += time.perf_counter() - before
        skipped = int(batch.pop("skipped").sum())
        return put_batch(batch, self.mesh), skipped

    def _cache_features(self) -> None:
        """From here on images are what the network makes of them, and the network trained is its classifier."""
        config, start = self.config, time.perf_counter()
        step = make_feature_step(self.model, self.mesh, mean=config.data.mean, std=config.data.std)
        variables = {"params": self._state.params, "batch_stats": self._state.batch_stats}
        found = {}
        for split in ("train", eval_split(config.data)):
            batches, _ = make_eval_batches(config.data, **self._processes, split=split)
            vectors, labels = compute_features(step, variables, batches, mesh=self.mesh)
            found[split] = Features(vectors, labels, name=split, class_names=self.info.class_names)
        state = self._iterator.get_state()
        self._iterator.close()
        train, test = found.values()
        self._iterator = make_train_iterator(config.data, seed=config.seed, **self._processes, features=train)
        self._iterator.set_state(state)
        self._eval_batches, _ = make_eval_batches(config.data, **self._processes, features=test)
        self._network, self._mean, self._std = LinearProbe(self.model.spec), (0.0,), (1.0,)
        self.seconds["features"] = time.perf_counter() - start

    def _compile(self, batch: dict[str, jax.Array], key: jax.Array, *, frozen: bool):
        """The compiled step, of what `optim.freeze` lasts or of what follows; its time is told from that of tracing."""
        config, model = self.config, self._network
        if frozen and config.optim.freeze_epochs is not None:
            model = model.clone(freeze_stats=True)
        options = StepOptions(
            mean=self._mean,
            std=self._std,
            frozen=self._frozen if frozen else None,
            label_smoothing=config.train.label_smoothing,
            mixup=config.data.mixup,
            cutmix=config.data.cutmix,
            mix_probability=config.data.mix_probability,
            accumulate=config.train.accumulate,
            ema_decay=config.ema.decay,
            axis=AXIS if config.parallel == "pmap" else None,
        )
        step = functools.partial(train_step, model=model, optimizer=self._optimizer, options=options)
        start = time.perf_counter()
        lowered = shard_train_step(step, self.mesh, config.parallel).lower(self._state, batch, key)
        traced = time.perf_counter()
        compiled = lowered.compile()
        self.seconds["data"] += self._waited  # for the first batch, and no part of any line's steps
        self.seconds |= {"trace": traced - start, "compile": time.perf_counter() - traced}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        which = "first step" if frozen or config.optim.freeze_epochs is None else "first step of all layers"
        logging.info("%s after %.1f s: %s", which, sum(self.seconds.values()), parts)
        self.seconds = {"data": 0.0}
        self._waited, self._line_time = 0.0, time.perf_counter()
        return compiled

    @functools.cached_property
    def _count_dead(self):
        return jax.jit(functools.partial(count_dead_filters, self.model.spec))

    def _should_stop(self, step: int, signals: StopSignals) -> bool:
        """Whether a signal came, to any process; several processes ask each other when they log."""
        if jax.process_count() == 1:
            return signals.received is not None
        if not self.plan.is_due(step, self.plan.log_every):
            return False
        return bool(np.any(multihost_utils.process_allgather(np.array(signals.received is not None))))

    def _account(self, step: int, sums: dict, skipped: int, progress: Progress) -> None:
        """Add a step's sums to the means and show them; raise NonFiniteError if they are not finite."""
        sums = jax.device_get(sums)
        for name in ("loss", "grad_norm"):
            if not np.isfinite(sums[name][0]):
                raise self._non_finite(f"{name} is {sums[name][0]}", step)
        self._train_mean.update(sums)
        self._skipped += skipped
        progress.update(step, {name: sums[name][0] / sums[name][1] for name in ("loss", "top1")})

    def _write(self, step: int, writer: MetricsWriter, progress: Progress, evaluation: dict | None = None) -> None:
        """A line of metrics.jsonl: means over the steps since the last line, and an evaluation if there was one."""
        means = {f"train/{name}": value for name, value in self._train_mean.compute().items()}
        seconds = time.perf_counter() - self._line_time
        values = {
            "epoch": step / self.plan.steps_per_epoch,
            **means,
            "train/lr": self._learning_rate(step),
            "data/skipped": self._skipped,
            **(evaluation or {}),
            "time/images_per_second": progress.images_per_second,
            "time/data_wait": self._waited / seconds,
        }
        writer.write(step, values)
        if evaluation:
            shown = {name: evaluation[name] for name in evaluation if name.endswith(("loss", "top1"))}
            progress.report(step, {"train/loss": means["train/loss"], **shown})
        self._train_mean.restore({})
        self._waited, self._line_time = 0.0, time.perf_counter()

    def _learning_rate(self, step: int) -> float:
        """That of the update that was the `step`-th."""
        return np.asarray(self.schedule(step - 1)).item()

    def _non_finite(self, what: str, step: int) -> NonFiniteError:
        return NonFiniteError(
            f"{what} at step {step}, learning rate {self._learning_rate(step):.4g}; the checkpoints before it "
            "are kept: a lower optim.lr_per_256, a longer optim.warmup_epochs or optim.clip_norm may help"
        )

    def _save(self, step: int, writer: MetricsWriter) -> None:
        # A finite gradient times the learning rate can still overflow, and so can a variance.
        for path, leaf in jax.tree_util.tree_leaves_with_path(self._state):
            if not np.isfinite(leaf).all():
                raise self._non_finite(f"{jax.tree_util.keystr(path, simple=True, separator='.')} is not finite", step)
        writer.flush()
        meta = {
            "config": self._flat_config,
            "class_names": list(self.info.class_names),
            "train": self._train_mean.state(),
            "skipped": self._skipped,
        }
        self._checkpoints.save(step, self._state, self._iterator, meta)

    def _recompute_stats(self) -> None:
        """Put measured statistics in the running ones' place, of the averages too; the iterator stays where it is."""
        state, saved = self._state, self._iterator.get_state()
        kinds = [{"params": state.params, "batch_stats": state.batch_stats}]
        kinds += [] if state.ema is None else [state.ema]
        self._iterator.set_state({**saved, "next_batch": 0})
        batches = ({"images": next(self._iterator)["images"]} for _ in range(self.plan.stats_batches))
        step = make_stats_step(self.model, self.mesh, mean=self._mean, std=self._std)
        stats, *averaged = replicate(measure_stats(step, kinds, batches, mesh=self.mesh), self.mesh)
        self._iterator.set_state(saved)
        ema = {"params": kinds[-1]["params"], "batch_stats": averaged[0]} if averaged else None
        self._state = dataclasses.replace(state, batch_stats=stats, ema=ema)

    # Evaluation and result.

    @functools.cached_property
    def _eval_step(self):
        step = functools.partial(eval_step, model=self._network, mean=self._mean, std=self._std)
        return shard_eval_step(step, self.mesh)

    def _evaluate_both(self) -> dict[str, float]:
        """{"eval/top1": ...}, and "eval_ema/..." of the averaged variables; keeps the confusion matrix."""
        state, metrics = self._state, {}
        kinds = {"eval": {"params": state.params, "batch_stats": state.batch_stats}}
        if state.ema is not None:
            kinds["eval_ema"] = state.ema
        for prefix, variables in kinds.items():
            values, _, self._confusion = evaluate(
                self._eval_step, variables, self._eval_batches, count=self._eval_count, mesh=self.mesh
            )
            metrics |= {f"{prefix}/{name}": value for name, value in values.items()}
        self._evaluation = metrics
        return metrics

    def evaluate(self) -> dict:
        """Exact metrics of the newest checkpoint, under "eval/" and, averaged, "eval_ema/".

        Raises FileNotFoundError if the workdir has no checkpoint.
        """
        if self.start_step == 0 and not self.config.init:
            raise FileNotFoundError(f"{self.workdir} has no checkpoint to evaluate; train first, or set config.init")
        return {"step": self.start_step, **self._evaluate_both()}

    def _finish(self) -> dict:
        """Write and return the result of the last step, with curves and confusion matrix."""
        evaluation = self._evaluation or self._evaluate_both()
        step = int(self._state.step)
        best = "eval_ema" if self._state.ema is not None else "eval"
        if not math.isfinite(evaluation[f"{best}/loss"]):
            raise self._non_finite(f"{best}/loss is {evaluation[f'{best}/loss']}", step)
        names = ("loss", "top1", "top5", "count")
        result = {
            "step": step,
            "epoch": step / self.plan.steps_per_epoch,
            "variables": "averaged" if best == "eval_ema" else "last",
            **{name: evaluation[f"{best}/{name}"] for name in names},
            "params": sum(leaf.size for leaf in jax.tree.leaves(self._state.params)),
            "trained": self._count_trained(),
            "skipped": self._skipped,
        }
        if self._is_first:
            if self._confusion is not None:
                np.savetxt(self.workdir / "confusion.csv", self._confusion, fmt="%d", delimiter=",")
                names = self.info.class_names
                # A model may have more classes than its data has names.
                names = (*names, *map(str, range(len(names), len(self._confusion))))
                plots.draw_confusion(self._confusion, names, self.workdir / "confusion.png")
            title = f"{self.config.name} on {self.config.data.source}"
            plots.draw_curves(read_metrics(self.workdir), self.workdir / "curves.png", title=title)
            write_json_atomic(self.workdir / "result.json", result)
        return result

    def _count_trained(self) -> int:
        """Parameters that are not frozen all along."""
        params = self._state.params
        if self._frozen is None or self.plan.freeze_steps < self.plan.total_steps:
            return sum(leaf.size for leaf in jax.tree.leaves(params))
        sizes = jax.tree.map(lambda leaf, frozen: 0 if frozen else leaf.size, params, self._frozen)
        return sum(jax.tree.leaves(sizes))


def _check_only_classifier(frozen, params) -> None:
    if frozen is None or {name for name in params if not all(jax.tree.leaves(frozen[name]))} != {"classifier"}:
        raise ValueError("train.cache_features trains the classifier alone; set optim.freeze to ('^(?!classifier/)',)")


def train_and_evaluate(config, workdir: str | Path) -> dict:
    """Train a config in a workdir, or continue there, and return the result (see `Run.train`).

    Raises RefusedError, before anything is written, for a config, data set or checkpoint that does not fit.
    """
    try:
        run = Run(config, workdir)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    with run:
        return run.train()
