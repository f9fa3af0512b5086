"""The trainer: builds a run from its recipe, then steps, evaluates and saves in a loop on the host.

Everything numerical is in two pure, jitted functions: `step(state, batch)` and `loss(state, batch,
key)`. A trainer of your own overrides `loss_fn`; logging, accumulation, masking, sharding and
checkpoints stay.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Unpack

import jax

from jaxtrain import registry
from jaxtrain.batch import Batch
from jaxtrain.checkpoint import CheckpointEngine, HFCheckpointEngine, OrbaxEngine
from jaxtrain.checkpoint.compatibility import Identity
from jaxtrain.data import BatchPlan, SFTDataFactory
from jaxtrain.data.factory import (
    build_data_factory,
    prepare_data,
    prepare_evaluation,
    sequence_limit,
)
from jaxtrain.metrics.console import Console, format_duration
from jaxtrain.metrics.log import log
from jaxtrain.metrics.meter import Meter
from jaxtrain.model import HFModelFactory
from jaxtrain.optimizer import AnyOptimizerFactory
from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipe.dump import to_dict
from jaxtrain.recipe.errors import AbortedError, NonFiniteError, RecipeError, pluralize
from jaxtrain.recipe.logger import is_among
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import HFSchedulerFactory, WSDSchedulerFactory
from jaxtrain.tokenizer import HFTokenizerFactory
from jaxtrain.trainer import step as pure
from jaxtrain.trainer.callbacks import Callbacks
from jaxtrain.trainer.checkpoints import Checkpoints
from jaxtrain.trainer.evaluation import answer_prompts, evaluate_sets
from jaxtrain.trainer.found_model import find_model
from jaxtrain.trainer.given import Given, Mode, check_arguments
from jaxtrain.trainer.guards import NonFinite, build_guards
from jaxtrain.trainer.interface import Interface
from jaxtrain.trainer.jit import Compiled
from jaxtrain.trainer.loss import Loss
from jaxtrain.trainer.progress import Horizon, Progress, TrainOutput
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.run import build
from jaxtrain.trainer.run_folder import RunFolder, fill_names
from jaxtrain.trainer.state import BASE, PyTree, TrainState, is_finite
from jaxtrain.trainer.stop import StopRequests, preemption_error

MAX_ROLLBACKS = 3  # of a process


class Trainer(Interface, registry.Registered, kind="trainer"):
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
    optimizer_factory: AnyOptimizerFactory
    scheduler_factory: HFSchedulerFactory | WSDSchedulerFactory
    checkpoint_engine: OrbaxEngine | HFCheckpointEngine

    allowed_changes: Sequence[str] = ()
    """Keys in which the recipe may differ from that of the checkpoint it resumes, though the state
    may not fit."""

    def __init__(
        self,
        config: TrainerConfig,
        mode: Mode = "train",
        *,
        callbacks: Sequence[Any] | None = None,
        **given: Unpack[Given],
    ):
        """`process-data` prepares the data, and nothing that could be trained; `plan` builds the
        run, to compile its step, without data. `callbacks` stand in for the default ones.

        The other arguments are ready-made objects in place of what the recipe names: see `Given`.
        """
        check_arguments(type(self).__qualname__, config, mode, given)
        self.config, self.mode, self.given = fill_names(config), mode, given
        self.progress = Progress()
        self.nonfinite = NonFinite(config.on_nonfinite)
        guards = build_guards(config, given.get("early_stopper"))
        own = self.default_callbacks() if callbacks is None else callbacks
        self._callbacks = Callbacks([self.nonfinite, *guards, *own])
        ranks = config.logger.print_output_ranks
        self.console = Console(prints=is_among(jax.process_index(), ranks), secrets=config.secrets)
        self._state: TrainState | None = None
        self._has_begun = self._is_stepping = False

        view = registry.TrainerView(self)
        devices = given.get("devices") or jax.devices()
        self.layout = BatchLayout.of(self.config, make_mesh(self.config.mesh, devices))
        found = find_model(self.config, given, view, reads_weights=mode == "train")
        self.model_factory, self.tokenizer = found.factory, found.tokenizer  # type: ignore[assignment]
        max_positions = found.spec.config.max_positions
        if mode == "plan":
            lengths = (sequence_limit(self.config.data, max_positions),)
            self.horizon = Horizon(steps=self.config.horizon(None) or 1, epoch_sequences=1)
        else:
            with self.console.timing("data"):
                lengths = self._prepare_data(max_positions, view)
            self.horizon = Horizon.of(self.config, self.data.train)
        if mode == "process-data":
            self.console.line("\n".join(self.data.ledger.lines()))
            return

        self.run = build(
            self.config, self.layout, found,
            steps=self.horizon.steps, sequence_lengths=lengths, given=given,
            init_frozen=self.init_frozen, view=view,
        )  # fmt: skip
        self.checkpoints = Checkpoints(
            self.config, view, identify=self._identify, say=self.console.line
        )
        self.run_folder = RunFolder(self.config)
        self.stop = StopRequests(self.run_folder.output(config.kill_switch_path, "stop"))
        meter = Meter.for_model(self.run.model, devices, step_sequences=self.layout.step_sequences)
        self.report = Report(
            self.console, self.run_folder, meter,
            peak_lr=self.run.peak_lr, last_step=self.last_step, tell=self.tell,
        )  # fmt: skip
        placed, batch = self.run.shardings, self.layout.batch_shardings
        compiled = partial(Compiled, current_run=lambda: self.run, phase=self.report.phase)
        self.step = compiled(  # type: ignore[method-assign]
            "train step", self.step,
            donate_argnums=0, in_shardings=(placed, batch), out_shardings=(placed, None),
        )  # fmt: skip
        self.loss = compiled(  # type: ignore[method-assign]
            "evaluation", self.loss, in_shardings=(placed, batch, None)
        )

    # The objective: pure functions.

    def init_frozen(self, params: PyTree) -> dict[str, PyTree]:
        """Further parameters that `merge` receives and nothing trains, of the first ones: name → a
        tree like the parameters, such as a reference model."""
        return {}

    def merge(self, params: PyTree, frozen: Mapping[str, PyTree]) -> Any:
        """The model that `loss_fn` receives."""
        return self.run.model.merge(params, frozen.get(BASE))

    def loss_fn(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """The objective, summed over a batch. Pure; traced; override it.

        `model(batch)` returns logits, `model.hidden(batch)` hidden states,
        `model.token_log_probs(batch)` the log-probability of each token; `batch.step` is the number
        of the step, from 0, and `batch.is_training` is False in an evaluation.
        """
        raise NotImplementedError(
            f"{type(self).__qualname__} defines no loss_fn(model, batch, key)"
        )

    def eval_fn(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """What an evaluation sums; the objective unless overridden."""
        return self.loss_fn(model, batch, key)

    def survey(self, model: Any, batch: Batch) -> PyTree:
        """What the loss of each microbatch depends on, as sums over all of a step: `batch.whole` of
        `loss_fn`, None where there is only one. Pure; traced."""
        return None

    def backward(self, gradients: PyTree) -> PyTree:
        """The summed gradients of a microbatch, as the optimizer is to receive them. Pure;
        traced."""
        return gradients

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, pure.Metrics]:
        """One optimizer step. Jitted; `state` is donated, use the one that comes back."""
        return pure.step(self.step_spec, state, batch)

    def loss(self, state: TrainState, batch: Batch, key: jax.Array) -> Loss:
        """The summed evaluation loss of a batch. Jitted."""
        params = self.run.average.eval_params(state)
        return pure.loss(self.step_spec, params, state, batch, key)

    @property
    def step_spec(self) -> pure.StepSpec:
        """What the pure step knows; read while it is traced, so that hooks are around its
        functions."""
        functions = self.merge, self.loss_fn, self.eval_fn, self.backward
        return self.run.step_spec(pure.Objective(*functions, self._callbacks.measure, self.survey))

    # The run: a loop on the host.

    def train(self) -> TrainOutput:
        """Run the recipe from its start, or from its newest checkpoint, to its end; once.

        PreemptedError when a signal ended it and full state is saved, AbortedError when nothing is;
        NonFiniteError as the recipe says.
        """
        if self._has_begun:
            raise RuntimeError("this trainer has trained already; make a new one to train again")
        self._has_begun = True
        if self.mode != "train":
            raise RecipeError(f"mode {self.mode!r} does not train; make a trainer without it")
        began, engines = time.perf_counter(), self.checkpoints.engines
        self.run_folder.refuse_foreign(engines)
        claim = self.run_folder.claim(engines, self.console.line, self.stop.note_lost_folder)
        with self.stop.listening():
            self.tell("on_init_end")
            with claim:
                if self.config.kill_switch_path is None:
                    self.stop.clear_file()
                self.start()
                self.progress.first_step = self.progress.step
                seen = dict(self.report.meter.seen)
                for engine in engines:
                    engine.begin(self.progress.step)
                how = "already finished"
                if not self.training_finished or self.checkpoints.due(self.progress.step, {}):
                    self._run()
                    how = "finished"
                    if self.progress.is_stopping:
                        how = f"ended early, {self.progress.stop_reason}"
            runtime = time.perf_counter() - began
            for line in self.data.train.report():
                self.console.line(line)
            done = f"{pluralize(self.progress.step, 'step')} done, {format_duration(runtime)}"
            self.console.line(f"{how}: {done}, {self.run_folder.path}")
            metrics = self.report.summarize(runtime, steps=self.global_step_this_run, before=seen)
            size = self.layout.step_sequences(self.data.sequence_tokens)
            metrics |= {"epoch": self.epochs_done, "effective_batch_size": size}
            metrics = {**self.progress.eval_metrics, **metrics}
            return TrainOutput(self.progress.step, self.report.last_loss, metrics)

    def _run(self) -> None:
        progress = self.progress
        try:
            self.run_folder.open(resumed_at=progress.step)
            self.report.last_step = self.last_step
            self.console.header(self.header)
            self.tell("on_train_begin")
            if self.evaluation_is_due:  # before the first step, or where a signal cut it short
                self.evaluate()
            self.checkpoint()  # what was due at this step when the process before ended
            progress.is_stopping = self.need_early_exit()
            self._is_stepping = True
            for _ in self.epochs:
                self.epoch()
            self._is_stepping = False
            self.report.flush()
            self.tell("on_train_end")
        finally:
            self._is_stepping = False
            self.close()
        if progress.is_preempted(self.horizon):
            raise preemption_error(progress.signal or "", progress.step, self.checkpoints)

    def epoch(self) -> None:
        """The steps from here to the end of the epoch, or of the run."""
        self.tell("on_epoch_begin")
        for batch in self.train_batches:
            self.tell("on_step_begin")
            self.state, metrics = self.step(self.state, batch)
            self.progress.position = self.data.train.advance(self.progress.position)
            if self.nonfinite.accepts(metrics, self.control):
                self._count_step(metrics)
            self.tell("on_step_end")
            self._obey_requests()
            if self.training_finished or self.epoch_finished:
                break
        self.tell("on_epoch_end")
        self.control.should_epoch_stop = False  # it has ended
        self._obey_requests()

    def _count_step(self, metrics: pure.Metrics) -> None:
        """Count the step that was just dispatched."""
        self.progress.step += 1
        # The device is busy with this step, so reading the metrics of the one before costs nothing.
        self.report.update(self.progress.step, metrics, epoch=self.epochs_done)
        self.progress.eval_metrics = {}
        for _ in range(self.layout.num_microbatches - 1):
            self.tell("on_substep_end")
        self.tell("on_pre_optimizer_step")
        self.tell("on_optimizer_step")

    def _obey_requests(self) -> None:
        """Do what is due or requested after this step."""
        self._obey_control()
        if self.evaluation_is_due:
            self.evaluate()
            self._obey_control()
        self.checkpoint()

    def _obey_control(self) -> None:
        """Do what is requested, but for evaluations and saves."""
        control, progress = self.control, self.progress
        if control.should_abort_without_save:
            raise AbortedError(
                f"a callback ended the run at step {progress.step}; nothing was saved of it"
            )
        if lost := self.stop.lost_folder:
            raise AbortedError(f"ended at step {progress.step}: {lost}")
        if control.consume("should_epoch_stop"):
            progress.skip_epoch(self.horizon)
        progress.is_stopping |= self.need_early_exit()
        if not self.data.evals and control.consume("should_evaluate"):
            log.warning("a callback asked for an evaluation, and there is no evaluation data")
        if control.consume("should_log"):
            self.report.flush(requested=True)
        is_due = self.evaluation_is_due or any(e.do_checkpoint for e in self.checkpoints)
        if is_due or progress.is_complete(self.horizon):
            self.report.flush()  # before the state is judged or kept, guards have to see its row
        if control.consume("should_roll_back"):
            self._roll_back()

    def need_early_exit(self) -> bool:
        """Does anything ask that the run ends after this step? Looked at after each step, and after
        an evaluation; may be overridden."""
        if reason := self.stop.poll():
            self.control.should_save = True
            self.progress.signal = self.stop.signal.name if self.stop.signal else None
            self.request_stop(reason)
        elif self.control.should_training_stop:
            self.request_stop("a callback asked to")
        return self.control.should_training_stop

    def request_stop(self, reason: str = "asked to") -> None:
        """Finish the step and end the run, saved as at its end."""
        self.control.should_training_stop = True
        self.progress.stop_reason = self.progress.stop_reason or reason

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics over all evaluation data: sums over a whole set, divided once.

        `dataset` is records or names of sources; its metrics are returned and passed to
        `on_predict`, and not taken for the recipe's.
        """
        plans = self.data.evals
        if dataset is not None:
            given = self.data_factory, dataset, self.batch_shape
            plans = {"eval": prepare_evaluation(*given, lengths=self.data.train.lengths)}
        if not plans:
            raise RecipeError(
                "no evaluation data; add `data.eval_sources` or `data.train_eval_split`"
            )
        self.report.flush()
        key = jax.random.key(self.config.seed)

        def loss_of(batch: Batch) -> Loss:
            loss = self.loss(self.state, batch, key)
            self.tell("on_prediction_step")
            return loss

        sets = {name: self._eval_batches(plan) for name, plan in plans.items()}
        unit, must_leave = self.config.loss_weighting, lambda: self.must_leave
        with self.console.timing("evaluation"):
            metrics = evaluate_sets(loss_of, sets, unit=unit, must_leave=must_leave)
        if dataset is not None:
            self.tell("on_predict", metrics=metrics)
            return metrics
        self.control.should_evaluate = False
        if metrics:
            self.progress.eval_metrics = metrics
            self.report.evaluation(self.progress.step, metrics)
            self.tell("on_evaluate", metrics=metrics)
            self._sample()
        return metrics

    def _sample(self) -> None:
        """Report what the present weights answer, where the recipe asks for it."""
        config, report = self.config.eval_samples, self.report
        if config is None or (report.num_evaluations - 1) % config.every_n_evals:
            return
        with report.phase("sampling", key="sample_time"):
            seed = self.config.seed + self.progress.step
            answers = answer_prompts(self.run, self.state, self.tokenizer, config, seed)
        report.samples(self.progress.step, config.prompts, answers)

    def checkpoint(self) -> None:
        """Save with every engine that is due after this step."""
        step = self.progress.step
        due = self.checkpoints.due(step, self.progress.eval_metrics)
        if due and not is_finite(self.state):
            self.nonfinite.refuse_to_save(step, self.control)
            return self._obey_control()
        for engine in due:
            path = engine.path(step)
            with self.report.phase(f"saving {path}", key="save_time"):
                engine.save(self.snapshot)
            engine.last_saved = step
            where = {"path": path, "step": step, "epoch": self.epochs_done}
            self.tell("on_save", engine=engine.name, **where)
        self.control.should_save = False

    # Data.

    def _prepare_data(self, max_positions: int, view: registry.TrainerView) -> tuple[int, ...]:
        """Records to batches; returns the lengths of their sequences."""
        self.data_factory = build_data_factory(  # type: ignore[assignment]
            self.config, self.tokenizer, max_positions=max_positions, trainer=view
        )
        given = {name: self.given.get(name) for name in ("train_data", "eval_data")}
        self.data = prepare_data(self.config, self.data_factory, self.batch_shape, **given)
        self.layout.refuse_too_few(self.data.train_rows)
        return self.data.train.lengths

    @property
    def train_batches(self) -> Iterator[Batch]:
        """On the devices, from here to the end of the epoch."""
        position = self.progress.position
        steps = self.data.train.steps_left(position)
        for batch in self.report.timed(self.data.train_batches(position, steps)):
            yield self.layout.on_devices(batch)

    @property
    def eval_batches(self) -> Iterator[Batch]:
        """On the devices: every sequence of every evaluation set."""
        for plan in self.data.evals.values():
            yield from self._eval_batches(plan)

    def _eval_batches(self, plan: BatchPlan) -> Iterable[Batch]:
        """Every sequence once, up to `max_eval_batches` batches."""
        batches = islice(self.data.batches_of(plan), self.config.max_eval_batches or None)
        return map(self.layout.on_devices, batches)

    # What is kept on disk and resumed from: full state, and exports.

    @property
    def state(self) -> TrainState:
        """Present parameters and optimizer state; read or restored at first use."""
        self.start()
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    def start(self) -> None:
        """Read the weights, or restore the checkpoint that the recipe resumes from; once."""
        if self._state is not None:
            return
        engine = self.checkpoints.resumed
        if engine is not None and self.resume_path is not None:
            self.restore(engine)
            return
        if engine is not None:
            self.console.line(f"no checkpoint in {engine.directory}: starting fresh")
        given = self.given.get("model")
        how = "initializing" if self.config.model.from_scratch else "reading"
        how = "copying" if given is not None else how
        with self.console.phase(f"{how} the weights", "weights"):
            self._state = self.run.first_state(self.run.first_params(given))

    def restore(self, engine: CheckpointEngine) -> None:
        """Take over the checkpoint that the engine loads, but for the parts that the recipe
        resets."""
        self._state = None  # its memory is needed
        with self.console.phase(f"restoring from {engine.directory}", "weights"):
            given = self.given.get("model")
            self._state, saved, reset = self.checkpoints.restore(engine, self.run, given)
        data, schedule = self.data.train, (self.training_horizon, self.progress.schedule_start)
        self.progress.load_state_dict(saved, data, reset=reset)
        self.horizon = Horizon.of(self.config, data, self.progress.more_steps)
        if (now := (self.training_horizon, self.progress.schedule_start)) != schedule:
            self.run = self.run.restart_schedule(*now)
        self._callbacks.load_state_dict(saved.get("callbacks", {}), reset=reset)
        if "report" in saved:
            self.report.load_state_dict(saved["report"])
        without = f", not restored: {', '.join(reset)}" if reset else ""
        self.console.line(f"continuing after step {self.progress.step}{without}")

    def _roll_back(self) -> None:
        """Restore the newest full state, and leave the data position where it is.

        NonFiniteError at the fourth time, or when no full state was saved yet.
        """
        progress = self.progress
        step, position = progress.step, progress.position
        if progress.rollbacks == MAX_ROLLBACKS:
            raise NonFiniteError(f"step {step + 1}: rolled back {MAX_ROLLBACKS} times already")
        self.checkpoints.wait()
        if (engine := self.checkpoints.newest) is None:
            raise NonFiniteError(f"step {step + 1}: no full state was saved yet to roll back to")
        progress.rollbacks += 1
        self.restore(engine)
        progress.position = position
        for engine in self.checkpoints:
            engine.roll_back(progress.step)
        row = {"rolled_back_from": step, "rollbacks": progress.rollbacks}
        self.report.rolled_back(progress.step, row)

    def _identify(self) -> Identity:
        return Identity(self.compatibility, to_dict(self.config), self.allowed_changes)

    def load_checkpoint(self, path: Path | str | int | None = None) -> None:
        """Resume from a checkpoint: the folder `path`, or this step of the recipe's first `orbax`
        entry, or its newest one. RuntimeError while a run is stepping."""
        if self._is_stepping:
            raise RuntimeError("load_checkpoint: the run is stepping; set control.should_roll_back")
        self.restore(self.checkpoints.engine_to_load(path))

    def load_best_model(self) -> None:
        """Go back to the checkpoint with the best score; for after the training, which leaves the
        last weights."""
        self.load_checkpoint(self.checkpoints.best_path)
