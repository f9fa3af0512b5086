"""The trainer: builds a run from its recipe, then updates, evaluates and saves in a loop on the
host.

Everything numerical is in two pure, jitted functions: `step(state, batch)` and `loss(state, batch,
key)`. A trainer of your own overrides `loss_fn`; logging, accumulation, masking, sharding and
checkpoints stay.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, Self, Unpack

import jax

from jaxtrain import registry
from jaxtrain.batch import Batch
from jaxtrain.checkpoint import HFCheckpointEngine, OrbaxEngine
from jaxtrain.data import SFTDataFactory
from jaxtrain.metrics.console import Console, format_duration
from jaxtrain.metrics.meter import Meter
from jaxtrain.model import HFModelFactory
from jaxtrain.optimizer import (
    AdafactorFactory,
    AdamWFactory,
    LionFactory,
    MuonFactory,
    SGDFactory,
)
from jaxtrain.recipe.errors import AbortedError, RecipeError
from jaxtrain.recipe.logger import is_among
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import HFSchedulerFactory, WSDSchedulerFactory
from jaxtrain.tokenizer import HFTokenizerFactory
from jaxtrain.trainer import step as pure
from jaxtrain.trainer.callbacks import Callbacks, Listened
from jaxtrain.trainer.compiled import compiled_loss, compiled_step, step_spec
from jaxtrain.trainer.evaluation import batches_of, metrics_of, sample
from jaxtrain.trainer.guards import NonFinite, guards
from jaxtrain.trainer.header import header
from jaxtrain.trainer.loss import Loss
from jaxtrain.trainer.parts import Given, known
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.rollback import roll_back
from jaxtrain.trainer.run_folder import RunFolder, named
from jaxtrain.trainer.saved import Saved
from jaxtrain.trainer.state import TrainState
from jaxtrain.trainer.stop import StopRequests, ended_by_signal


class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float
    """of the last update, in nats a trained token"""
    metrics: dict[str, float]
    """of the last evaluation; `train_runtime` in seconds, and what was done in it"""


class Trainer(Listened, Saved, registry.Registered, kind="trainer"):
    """One run of one objective. Annotations say which factories a recipe may name; the first is the
    default.

    Raises RecipeError or DataError for what the recipe asks and cannot have. Nothing is written
    before `train`.
    """

    events = {
        **{name: name for name in ("train", "epoch", "step", "evaluate", "checkpoint", "backward")},
        "loss": "loss_fn",
    }
    retired: ClassVar[dict[str, str]] = {
        "loss": "define `loss_fn`; `loss(self, batch)` is the PyTorch hook",
        "step": "define `loss_fn`; `step(self, batch)` is the PyTorch hook",
    }

    config: TrainerConfig
    model_factory: HFModelFactory
    tokenizer_factory: HFTokenizerFactory
    data_factory: SFTDataFactory
    optimizer_factory: AdamWFactory | AdafactorFactory | LionFactory | MuonFactory | SGDFactory
    scheduler_factory: HFSchedulerFactory | WSDSchedulerFactory
    checkpoint_engine: OrbaxEngine | HFCheckpointEngine

    allowed_changes: Sequence[str] = ()
    """Keys in which the recipe may differ from that of the checkpoint it resumes, though the state
    may not fit."""

    def __init__(
        self,
        config: TrainerConfig,
        mode: Literal["train", "process-data"] = "train",
        *,
        callbacks: Sequence[Any] | None = None,
        **given: Unpack[Given],
    ):
        """`process-data` prepares the rows, and nothing that could be trained. `callbacks` stand in
        for the default ones.

        The other arguments are ready-made objects in place of what the recipe names: see `Given`.
        """
        if not isinstance(config, TrainerConfig):
            name, found = type(self).__qualname__, type(config).__name__
            raise TypeError(f"{name}(config): found {found}; write {name}(get_config(…))")
        if mode not in ("train", "process-data"):
            raise ValueError(f"mode must be 'train' or 'process-data', found {mode!r}")
        self.config, self.mode, self.given = named(config), mode, known(given)
        self.nonfinite = NonFinite(config.on_nonfinite)
        others = self.default_callbacks() if callbacks is None else callbacks
        self._callbacks = Callbacks(
            [self.nonfinite, *guards(config, given.get("early_stopper")), *others]
        )
        ranks = config.logger.print_output_ranks
        self.console = Console(prints=is_among(jax.process_index(), ranks), secrets=config.secrets)
        self._has_begun = False
        if mode == "process-data":
            self.console.line("\n".join(self.data.ledger.lines()))
            return

        _ = self.scheduler  # one that does not fit the run is refused before anything is written
        self.run_folder = RunFolder(self.config)
        self.stop = StopRequests(self.run_folder.output(config.kill_switch_path, "stop"))
        rows = self.layout.global_batch
        meter = Meter.for_model(self.language_model, self.mesh.devices, update_rows=rows)
        self.report = Report(
            self.console,
            self.run_folder,
            meter,
            peak_lr=self.peak_lr,
            last_step=self.last_step,
            tell=self.tell,
        )
        self.step = compiled_step(self)  # type: ignore[method-assign]
        self.loss = compiled_loss(self)  # type: ignore[method-assign]

    @classmethod
    def default_callbacks(cls) -> list[Any]:
        """Callbacks, or classes of them, that every run of this trainer has."""
        return []

    # The objective: pure functions.

    def loss_fn(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """The objective, summed over a batch. Pure; traced; override it.

        `model(batch)` gives logits, `model.hidden(batch)` hidden states,
        `model.token_log_probs(batch)` the log-probability of each token; `batch.step` is the number
        of the update, from 0.
        """
        raise NotImplementedError(
            f"{type(self).__qualname__} defines no loss_fn(model, batch, key)"
        )

    def eval_fn(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """What an evaluation sums; the objective unless overridden."""
        return self.loss_fn(model, batch, key)

    def backward(self, gradients: Any) -> Any:
        """The summed gradients of a microbatch, as the optimizer is to get them. Pure; traced."""
        return gradients

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, pure.Metrics]:
        """One update. Jitted; `state` is donated, use the one that comes back."""
        return pure.step(self._spec, state, batch)

    def loss(self, state: TrainState, batch: Batch, key: jax.Array) -> Loss:
        """The summed evaluation loss of a batch. Jitted."""
        spec = self._spec._replace(loss_fn=self.eval_fn)
        return pure.loss(spec, self.average.told(state), batch, key, state.step)

    # The run: a loop on the host.

    def train(self) -> TrainOutput:
        """Run the recipe from its start, or from its newest checkpoint, to its end; once.

        PreemptedError when a signal ended it and full state is saved, AbortedError when nothing is;
        NonFiniteError as the recipe says.
        """
        if self._has_begun:
            raise RuntimeError("this trainer has trained already; make a new one to train again")
        self._has_begun = True
        if self.mode == "process-data":
            raise RecipeError("mode 'process-data' prepares rows alone; make a trainer without it")
        began = time.perf_counter()
        self.run_folder.refuse_foreign(self.checkpoint_engines)
        if self.config.kill_switch_path is None:
            self.stop.file.unlink(missing_ok=True)  # of a run that ended before it was seen
        self.tell("on_init_end")
        with self.stop.listening():
            self.start()
            self.first_step = self.global_step
            seen = dict(self.report.meter.seen)
            how = "already finished"
            if not self.training_finished:
                self._run()
                how = f"ended early, {self.early_stop_reason}" if self.early_stop else "finished"
        runtime = time.perf_counter() - began
        done = f"{self.global_step} updates done, {format_duration(runtime)}"
        self.console.line(f"{how}: {done}, {self.run_folder.path}")
        return TrainOutput(self.global_step, self.report.last_loss, self._told(runtime, seen))

    def _run(self) -> None:
        try:
            self.run_folder.open(resumed_at=self.global_step)
            self.report.last_step = self.last_step
            for engine in self.checkpoint_engines:
                engine.begin(self.global_step)
            self.console.header(header(self))
            self.tell("on_train_begin")
            if self.evaluation_is_due:  # before the first update, or where a signal cut it short
                self.evaluate()
                self.checkpoint()
            self.early_stop = self.need_early_exit()
            for _ in self.epochs:
                self.epoch()
            self.report.flush()
            self.tell("on_train_end")
        finally:
            self.close()
        if self.is_preempted:
            raise ended_by_signal(self)

    def epoch(self) -> None:
        """The updates from here to the end of the epoch, or of the run."""
        self.tell("on_epoch_begin")
        for batch in self.train_batches:
            self.tell("on_step_begin")
            self.state, metrics = self.step(self.state, batch)
            self.position += 1
            if self.nonfinite.takes(metrics, self.control):
                self._take(metrics)
            self.tell("on_step_end")
            self._obey()
            if self.evaluation_is_due:
                self.evaluate()
                self._obey()
            self.checkpoint()
            if self.training_finished or self.epoch_finished:
                break
        self.tell("on_epoch_end")

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics over all evaluation rows: sums over a whole set, divided once.

        `dataset` is rows or names of sources; its metrics are returned and told as `on_predict`,
        and not taken for the recipe's.
        """
        data = self.data if dataset is None else self.data_of(dataset)
        if not data.evals:
            raise RecipeError(
                "no evaluation data; add `data.eval_sources` or `data.train_eval_split`"
            )
        self.report.flush()
        metrics = metrics_of(self, data)
        if dataset is not None:
            self.tell("on_predict", metrics=metrics)
            return metrics
        self.control.should_evaluate = False
        if metrics:
            self.eval_metrics = metrics
            self.report.evaluation(self.global_step, metrics)
            self.tell("on_evaluate", metrics=metrics)
            sample(self)
        return metrics

    def checkpoint(self) -> None:
        """Save with every engine that is due after this update."""
        for engine in self.checkpoint_engines:
            engine.note_score(self.global_step, self.eval_metrics)
            if engine.do_checkpoint:
                path = engine.path(self.global_step)
                with self.report.phase(f"saving {path}", key="save_time"):
                    engine.save(self)
                engine.last_saved = self.global_step
                where = {"path": path, "step": self.global_step, "epoch": self.epochs_done}
                self.tell("on_save", engine=engine.name, **where)
        self.control.should_save = False

    def log(self, logs: Mapping[str, Any]) -> None:
        """Write a row of one's own, and tell it as `on_log`."""
        row = {"iter": self.global_step, **logs}
        self.report.write(row)
        self.tell("on_log", logs=row)

    def close(self) -> None:
        """Return when all that was saved is on disk and the files of the run are closed; `with`
        does it too."""
        try:
            for engine in self.checkpoint_engines:
                engine.wait()
        finally:
            if self.mode == "train":
                self.report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def request_stop(self, reason: str = "asked to") -> None:
        """Finish the update and end the run, saved as at its end."""
        self.control.should_training_stop = True
        self.early_stop_reason = self.early_stop_reason or reason

    def need_early_exit(self) -> bool:
        """Does anything ask that the run ends after this update? Looked at once an update; may be
        overridden."""
        if reason := self.stop.asked():
            self.control.should_save = True
            self.request_stop(reason)
        elif self.control.should_training_stop:
            self.request_stop("a callback asked to")
        return self.control.should_training_stop

    # What the loop asks.

    @property
    def train_batches(self) -> Iterator[Batch]:
        """On the devices, from here to the end of the epoch."""
        end = (self.epoch_idx + 1) * self.data.steps_per_epoch
        for batch in self.report.timed(self.data.train_batches(self.position, end)):
            yield self.layout.on_devices(batch)

    @property
    def eval_batches(self) -> Iterator[Batch]:
        """On the devices: the rows of every evaluation set."""
        for name in self.data.evals:
            yield from batches_of(self, self.data, name)

    def _take(self, metrics: pure.Metrics) -> None:
        """Count the update that was just dispatched."""
        self.global_step += 1
        # The device is busy with this update, so reading the metrics of the one before costs
        # nothing.
        self.report.update(self.global_step, metrics, epoch=self.epochs_done)
        self.eval_metrics = {}
        for _ in range(self.layout.num_microbatches - 1):
            self.tell("on_substep_end")
        self.tell("on_pre_optimizer_step")
        self.tell("on_optimizer_step")

    def _obey(self) -> None:
        """What is asked for after this update, but for evaluations and saves."""
        control, of_epoch = self.control, self.data.steps_per_epoch
        if control.should_abort_without_save:
            raise AbortedError(
                f"a callback ended the run at update {self.global_step}; nothing was saved of it"
            )
        if control.taken("should_epoch_stop"):
            self.position = -(-self.position // of_epoch) * of_epoch
        self.early_stop |= self.need_early_exit()
        if control.taken("should_log"):
            self.report.flush(asked=True)
        is_due = self.evaluation_is_due or any(e.do_checkpoint for e in self.checkpoint_engines)
        if is_due or self.is_complete:
            self.report.flush()  # before the state is judged or kept, guards have to see its row
        if control.taken("should_roll_back"):
            roll_back(self)

    def _told(self, runtime: float, before: Mapping[str, float]) -> dict[str, float]:
        """What `train` returns after so many seconds; `before` was seen by earlier processes."""
        new = {name: count - before[name] for name, count in self.report.meter.seen.items()}
        counts = {"samples": new["rows"], "steps": self.global_step_this_run,
                  "tokens": new["tokens"]}  # fmt: skip
        return {
            **self.eval_metrics,
            "train_runtime": runtime,
            "train_samples": new["rows"],
            **{f"train_{name}_per_second": n / runtime for name, n in counts.items()},
            "epoch": self.epochs_done,
            "effective_batch_size": self.layout.global_batch,
        }

    @cached_property
    def _spec(self) -> pure.StepSpec:
        """Read when `step` and `loss` are traced, so that callbacks are around its functions."""
        return step_spec(self)
