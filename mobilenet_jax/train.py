"""Build, restore, loop: the one module that knows every other."""

import functools
import json
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mobilenet_jax import figures
from mobilenet_jax.checkpoint import Checkpoints, merge_variables
from mobilenet_jax.data.loader import make_eval_batches, make_train_iterator
from mobilenet_jax.data.sources import DataInfo, describe
from mobilenet_jax.diagnose.weights import count_dead_filters
from mobilenet_jax.evaluate import evaluate
from mobilenet_jax.metrics import (
    Mean,
    MetricsWriter,
    Progress,
    environment,
    read_metrics,
    write_json_atomic,
)
from mobilenet_jax.models.cost import compute_cost
from mobilenet_jax.models.init import init_variables
from mobilenet_jax.models.network import MobileNet, create_model
from mobilenet_jax.models.spec import check_choice, check_share
from mobilenet_jax.optim import make_optimizer, make_schedule
from mobilenet_jax.sharding import (
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
from mobilenet_jax.steps import StepOptions, TrainState, create_state, eval_step, train_step
from mobilenet_jax.weights.load import load_weights


class NonFiniteError(RuntimeError):
    """Training stopped because the loss, its gradient or the state is not finite any more."""


def flatten_config(config) -> dict:
    """{"optim.name": "sgd", ...} as JSON would give it back."""
    flat = traverse_util.flatten_dict(config.to_dict(), sep=".", keep_empty_nodes=False)
    return json.loads(json.dumps(flat))


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
        raise ValueError(f"train.diagnose_every_steps is {train.diagnose_every_steps}; valid: 1 or more, or 0 for never")
    for key in ("eval_every_epochs", "save_every_epochs"):
        if train[key] < 0:
            raise ValueError(f"train.{key} is {train[key]}; valid: above 0, or 0 for the end of the run alone")
    if (train.epochs if train.steps is None else train.steps) <= 0:
        raise ValueError("train.steps, or train.epochs where steps is none, must be above 0")
    check_batch_size("data.batch_size / train.accumulate", data.batch_size / train.accumulate, mesh)
    check_batch_size("data.eval_batch_size", data.eval_batch_size, mesh)


@dataclass(frozen=True)
class Plan:
    """Lengths in steps, derived once from epochs, images and batch size."""

    total_steps: int
    steps_per_epoch: float
    eval_every: int
    save_every: int
    log_every: int

    def is_due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps, and at the end, is done after `step`."""
        return step == self.total_steps or step % every == 0


def make_plan(config, train_count: int) -> Plan:
    """The plan of a run over `train_count` images."""
    train = config.train
    per_epoch = train_count / config.data.batch_size
    total = train.steps if train.steps is not None else math.ceil(train.epochs * per_epoch)

    def every(epochs: float) -> int:
        return max(1, round(epochs * per_epoch)) if epochs else total

    return Plan(
        total,
        per_epoch,
        every(train.eval_every_epochs),
        every(train.save_every_epochs),
        train.log_every_steps,
    )


def warn_of_slow_statistics(bn_decay: float, total_steps: int) -> None:
    """Say so when over 5% of the initial batch-norm statistics would be left in the running ones at the run's end."""
    left = bn_decay**total_steps
    if left > 0.05:
        fitting = math.floor(0.01 ** (1 / total_steps) * 1000) / 1000
        logging.warning(
            "model.bn_decay = %g leaves %.0f%% of the initial statistics in those of evaluation after %d steps; "
            "%g leaves 1%%",
            bn_decay,
            100 * left,
            total_steps,
            fitting,
        )


class StopSignals:
    """SIGTERM and SIGINT ask for an orderly stop after the step that runs; a second one interrupts at once."""

    def __init__(self):
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _receive(self, number: int, _) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


class Run:
    """A config and a workdir, checked against data, devices and checkpoints; nothing is compiled before `train`.

    The state is that of the newest checkpoint in the workdir, or a fresh one.

    Raises:
      ValueError, OSError: a config, data set or checkpoint that does not fit, in one sentence.
    """

    def __init__(self, config, workdir: str | Path):
        start = time.perf_counter()
        self.config, self.workdir, self.mesh = config, Path(workdir), make_mesh()
        _check(config, self.mesh)
        self.info = describe(config.data)
        self.model = build_model(config, self.info)
        processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        self._iterator = make_train_iterator(config.data, seed=config.seed, **processes)
        self._eval_batches, self._eval_count = make_eval_batches(config.data, **processes)
        self.plan = make_plan(config, self.info.train_count)
        self._is_first = jax.process_index() == 0
        if not config.train.freeze_stats:
            warn_of_slow_statistics(config.model.bn_decay, self.plan.total_steps)
        opened = time.perf_counter()
        self._restore(processes["process_count"])
        self.seconds = {"data": opened - start, "init": time.perf_counter() - opened}

    def _restore(self, process_count: int) -> None:
        config = self.config
        variables = init_variables(self.model, seed=config.seed)
        self.schedule = make_schedule(
            config.optim,
            batch_size=config.data.batch_size,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_steps=self.plan.total_steps,
        )
        self._optimizer = make_optimizer(config.optim, variables["params"], schedule=self.schedule)
        flat = {
            "model.num_classes": self.model.spec.num_classes,
            "data.train_images": self.info.train_count,
            "processes": process_count,
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
        source, loaded, card = load_weights(config.init, config.init_name or None)
        theirs, ours = source.spec, self.model.spec
        if (theirs.padding, theirs.bn_epsilon) != (ours.padding, ours.bn_epsilon):
            raise ValueError(
                f"init {config.init!r} has padding {theirs.padding} and bn_epsilon {theirs.bn_epsilon}, the model "
                f"{ours.padding} and {ours.bn_epsilon}; set model.convention to {card['convention']}"
            )
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
            step_fn = step_fn or self._compile(batch, key)
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

    def _compile(self, batch: dict[str, jax.Array], key: jax.Array):
        """The compiled step; its time is told from that of tracing."""
        config = self.config
        options = StepOptions(
            mean=config.data.mean,
            std=config.data.std,
            label_smoothing=config.train.label_smoothing,
            mixup=config.data.mixup,
            cutmix=config.data.cutmix,
            mix_probability=config.data.mix_probability,
            accumulate=config.train.accumulate,
            ema_decay=config.ema.decay,
            axis=AXIS if config.parallel == "pmap" else None,
        )
        step = functools.partial(train_step, model=self.model, optimizer=self._optimizer, options=options)
        start = time.perf_counter()
        lowered = shard_train_step(step, self.mesh, config.parallel).lower(self._state, batch, key)
        traced = time.perf_counter()
        compiled = lowered.compile()
        self.seconds["data"] += self._waited  # for the first batch, and no part of any line's steps
        self.seconds |= {"trace": traced - start, "compile": time.perf_counter() - traced}
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        logging.info("first step after %.1f s: %s", sum(self.seconds.values()), parts)
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

    # Evaluation and result.

    @functools.cached_property
    def _eval_step(self):
        step = functools.partial(eval_step, model=self.model, mean=self.config.data.mean, std=self.config.data.std)
        return shard_eval_step(step, self.mesh)

    def _evaluate_both(self) -> dict[str, float]:
        """{"eval/top1": ...}, and "eval_ema/..." of the averaged variables; keeps the confusion matrix."""
        state, metrics = self._state, {}
        kinds = {"eval": {"params": state.params, "batch_stats": state.batch_stats}}
        if state.ema is not None:
            kinds["eval_ema"] = state.ema
        for prefix, variables in kinds.items():
            values, self._confusion = evaluate(
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
            "skipped": self._skipped,
        }
        if self._is_first:
            if self._confusion is not None:
                np.savetxt(self.workdir / "confusion.csv", self._confusion, fmt="%d", delimiter=",")
                names = self.info.class_names
                # A model may have more classes than its data has names.
                names = (*names, *map(str, range(len(names), len(self._confusion))))
                figures.draw_confusion(self._confusion, names, self.workdir / "confusion.png")
            title = f"{self.config.name} on {self.config.data.source}"
            figures.draw_curves(read_metrics(self.workdir), self.workdir / "curves.png", title=title)
            write_json_atomic(self.workdir / "result.json", result)
        return result


def train_and_evaluate(config, workdir: str | Path) -> dict:
    """Train a config in a workdir, or continue there, and return the result (see `Run.train`)."""
    with Run(config, workdir) as run:
        return run.train()
