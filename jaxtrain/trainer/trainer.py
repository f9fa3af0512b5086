"""The trainer: builds a run from its recipe, then updates, evaluates and saves in a loop on the
host.

Everything numerical is in two pure, jitted functions: `step(state, batch)` and `loss(state, batch,
key)`. A trainer of your own overrides `loss_fn`; logging, accumulation, masking, sharding and
checkpoints stay.
"""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial, reduce
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Unpack

import jax

from jaxtrain import registry
from jaxtrain.batch import Batch
from jaxtrain.checkpoint import CheckpointEngine, HFCheckpointEngine, OrbaxEngine
from jaxtrain.checkpoint.engine import Moment
from jaxtrain.data import SFTDataFactory, TrainingData
from jaxtrain.metrics.console import Console, duration
from jaxtrain.metrics.flops import counts
from jaxtrain.metrics.meter import Meter
from jaxtrain.model import HFModelFactory
from jaxtrain.optimizer import (
    AdafactorFactory,
    AdamWFactory,
    LionFactory,
    MuonFactory,
    SGDFactory,
)
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.checkpoint import HFCheckpointConfig
from jaxtrain.recipe.errors import AbortedError, RecipeError
from jaxtrain.recipe.logger import is_among
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import HFSchedulerFactory, WSDSchedulerFactory
from jaxtrain.tokenizer import HFTokenizerFactory, save_tokenizer
from jaxtrain.trainer import resume
from jaxtrain.trainer import step as pure
from jaxtrain.trainer.answers import answers
from jaxtrain.trainer.average import Average
from jaxtrain.trainer.callbacks import Callbacks, Control
from jaxtrain.trainer.compiled import Compiled
from jaxtrain.trainer.facts import Facts
from jaxtrain.trainer.guards import NonFinite, guards
from jaxtrain.trainer.header import header
from jaxtrain.trainer.loss import Loss, added, evaluated
from jaxtrain.trainer.parts import Given, known
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.rollback import roll_back
from jaxtrain.trainer.run_folder import RunFolder, named
from jaxtrain.trainer.state import TrainState, new_state, state_shardings, with_shardings
from jaxtrain.trainer.stop import StopRequests, ended_by_signal


class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float
    """of the last update, in nats a trained token"""
    metrics: dict[str, float]
    """of the last evaluation, and `train_runtime` in seconds"""


class Trainer(Facts, registry.Registered, kind="trainer"):
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
        self.config, self.mode, self.given = named(config), mode, known(given)
        self.nonfinite = NonFinite(config.on_nonfinite)
        others = self.default_callbacks() if callbacks is None else callbacks
        self._callbacks = Callbacks([self.nonfinite, *guards(config), *others])
        ranks = config.logger.print_output_ranks
        self.console = Console(prints=is_among(jax.process_index(), ranks))
        self._state: TrainState | None = None
        self._has_begun = False
        if mode == "process-data":
            self.console.line("\n".join(self.data.ledger.lines()))
            return

        _ = self.scheduler  # one that does not fit the run is refused before anything is written
        self.average = Average(self.config.ema)
        self.shardings = state_shardings(
            self.mesh,
            self.model.shapes,
            self.optimizer,
            zero_stage=self.config.deepspeed.zero_stage,
            has_average=self.config.ema is not None,
        )
        self._new_state = partial(new_state, optimizer=self.optimizer, average=self.average.start)
        self.state_shapes = with_shardings(
            jax.eval_shape(self._new_state, self.model.shapes), self.shardings
        )
        self.run_folder = RunFolder(self.config)
        self.stop = StopRequests(self.run_folder.output(config.kill_switch_path, "stop"))
        self.report = Report(
            self.console,
            self.run_folder,
            Meter.of(
                self.model,
                self.mesh.devices,
                update_rows=self.geometry.global_batch,
                row_tokens=self.data.row_tokens,
            ),
            peak_lr=self.peak_lr,
            last_step=self.last_step,
            on_values=lambda values: self._tell("on_train_metrics", metrics=values),
            on_row=lambda row: self._tell("on_log", logs=row),
        )
        self._compile()

    @classmethod
    def default_callbacks(cls) -> list[Any]:
        """Callbacks, or classes of them, that every run of this trainer has."""
        return []

    # The objective: pure functions.

    def loss_fn(self, model: Any, batch: Batch, key: jax.Array) -> Loss:
        """The objective, summed over a batch. Pure; traced; override it.

        `model(batch)` gives logits, `model.hidden(batch)` hidden states,
        `model.token_log_probs(batch)` the log-probability of each token.
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
        return pure.loss(spec, self.average.told(state), batch, key)

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
        self._refuse_foreign_folders()
        if self.config.kill_switch_path is None:
            self.stop.file.unlink(missing_ok=True)  # of a run that ended before it was seen
        self._tell("on_init_end")
        with self.stop.listening():
            self.start()
            how = "already finished"
            if not self.training_finished:
                self._run()
                how = f"ended early, {self.early_stop_reason}" if self.early_stop else "finished"
        runtime = time.perf_counter() - began
        done = f"{self.global_step} updates done, {duration(runtime)}"
        self.console.line(f"{how}: {done}, {self.run_folder.path}")
        return TrainOutput(
            self.global_step, self.report.last_loss, {**self.eval_metrics, "train_runtime": runtime}
        )

    def _run(self) -> None:
        try:
            self.run_folder.open(resumed_at=self.global_step)
            self.report.last_step = self.last_step
            for engine in self.checkpoint_engines:
                engine.begin(self.global_step)
            self.console.header(header(self))
            self._tell("on_train_begin")
            if self.config.eval_at_start and self.global_step == 0:
                self.evaluate()
            self.early_stop = self.need_early_exit()
            for _ in self.epochs:
                self.epoch()
            self.report.flush()
            self._tell("on_train_end")
            for engine in self.checkpoint_engines:
                engine.wait()
        finally:
            self.report.close()
        if self.is_preempted:
            raise ended_by_signal(self)

    def epoch(self) -> None:
        """The updates from here to the end of the epoch, or of the run."""
        self._tell("on_epoch_begin")
        for batch in self.train_batches:
            self._tell("on_step_begin")
            self.state, metrics = self.step(self.state, batch)
            self.position += 1
            if self.nonfinite.takes(metrics, self.control):
                self.global_step += 1
                # The device is busy with this update, so reading the metrics of the one before
                # costs nothing.
                epoch = self.position / self.data.steps_per_epoch
                self.report.update(self.global_step, metrics, epoch=epoch)
                self.eval_metrics = {}
                self._tell("on_optimizer_step")
            self._tell("on_step_end")
            self._obey()
            if self.evaluation_is_due:
                self.evaluate()
                self.early_stop |= self.need_early_exit()
            self.checkpoint()
            if self.training_finished or self.epoch_finished:
                break
        self._tell("on_epoch_end")

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics over all evaluation rows: sums over a whole set, divided once.

        `dataset` is rows or names of sources; its metrics are returned, and neither logged nor told
        to callbacks.
        """
        data = self.data if dataset is None else self.data_of(dataset)
        if not data.evals:
            raise RecipeError(
                "no evaluation data; add `data.eval_sources` or `data.train_eval_split`"
            )
        self.report.flush()
        sums = {name: self._summed(data, name) for name in data.evals}
        if self._must_leave:
            return {}
        unit = self.config.loss_weighting
        metrics = evaluated("eval", reduce(added, sums.values()), unit)
        for name, loss in sums.items() if len(sums) > 1 else ():
            metrics |= evaluated(f"eval/{name}", loss, unit)
        if dataset is None:
            self.eval_metrics = metrics
            self.report.evaluation(self.global_step, metrics)
            self._tell("on_evaluate", metrics=metrics)
            self._sample()
        return metrics

    def checkpoint(self) -> None:
        """Save with every engine that is due after this update."""
        moment = Moment(
            self.global_step,
            epoch_ended=self.epoch_idx if self.epoch_finished else 0,
            training_ended=self.training_finished and not self.is_preempted,
            requested=self.control.taken("should_save"),
        )
        for engine in self.checkpoint_engines:
            engine.note_score(moment.step, self.eval_metrics)
            if engine.is_due(moment):
                self.report.flush()
                if self.control.should_roll_back:
                    return  # the row just told says that this state is none to keep
                path = engine.path(moment.step)
                with self.report.phase(f"saving {path}", key="save_time"):
                    engine.save(self)
                engine.last_saved = moment.step
                self._tell("on_save", engine=engine.name, path=path)

    def add_callback(self, callback: Any) -> None:
        """Add a callback object, or a class that is then made; see `jaxtrain.Callback`."""
        self._callbacks.add(callback)

    def pop_callback(self, callback: Any) -> Any | None:
        """Take out and return the first callback that is this object or of this class."""
        return self._callbacks.pop(callback)

    def remove_callback(self, callback: Any) -> None:
        self._callbacks.pop(callback)

    @property
    def control(self) -> Control:
        """Requests to the loop: stop, save, evaluate."""
        return self._callbacks.control

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

    def save_model(self, output_dir: Path | str | None = None) -> Path:
        """Export the weights to a folder that `transformers` loads; to where the recipe's first
        `huggingface` entry has those of this update when none is named.

        CheckpointError if the folder reads back as something else; it is not there then.
        """
        exports = [e for e in self.checkpoint_engines if isinstance(e, HFCheckpointEngine)]
        if output_dir is None and not exports:
            raise RecipeError(
                "checkpoint: no entry of type huggingface says where to; write save_model(folder)"
            )
        folder = Path(output_dir or exports[0].path(self.global_step)).absolute()
        own = (engine.config for engine in exports if engine.directory == folder.parent)
        config = next(own, HFCheckpointConfig(output_dir=str(folder.parent)))
        self.model.save(
            folder,
            self.average.told(self.state),
            dtype=self.config.model.dtype or self.model.execution.compute_dtype,
            add_files=partial(save_tokenizer, self.tokenizer),
            max_shard_bytes=config.max_shard_bytes,
            verify=config.verify_export,
        )
        return folder

    def start(self) -> None:
        """Read the weights, or restore the checkpoint that the recipe goes on from; once."""
        if self._state is not None:
            return
        resumes = (e for e in self.checkpoint_engines if e.config.auto_resume or e.config.start)
        engine = next(resumes, None)
        if engine is not None and (engine.config.start or engine.steps()):
            self.restore(engine)
            self.first_step = self.global_step
            return
        if engine is not None:
            self.console.line(f"no checkpoint in {engine.directory}: starting fresh")
        with self.console.phase("reading the weights"), jax.set_mesh(self.mesh):
            if (given := self.given.get("model")) is not None:
                params = self.model.copied(given, self.shardings.params)
            else:
                params = self.model.load(self.shardings.params, seed=self.config.seed)
            self._state = self.new_state(params)

    def new_state(self, params: Any) -> TrainState:
        """The state before the first update of these parameters, which are donated."""
        make = jax.jit(self._new_state, donate_argnums=0, out_shardings=self.shardings)
        with jax.set_mesh(self.mesh):
            return make(params)

    def restore(self, engine: CheckpointEngine) -> None:
        """Go on from the engine's checkpoint."""
        resume.restore(self, engine)

    # What the loop asks.

    @property
    def state(self) -> TrainState:
        """Present parameters and optimizer state; read or restored at first use."""
        self.start()
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        self._state = state

    @property
    def train_batches(self) -> Iterator[Batch]:
        """On the devices, from here to the end of the epoch."""
        end = (self.epoch_idx + 1) * self.data.steps_per_epoch
        for batch in self.report.timed(self.data.train_batches(self.position, end)):
            yield self.geometry.on_devices(batch)

    def eval_batches(self, name: str = "eval", data: TrainingData | None = None) -> Iterator[Batch]:
        """On the devices: every row of an evaluation set once, up to `max_eval_batches` batches."""
        batches = (data or self.data).eval_batches(name)
        return map(self.geometry.on_devices, islice(batches, self.config.max_eval_batches or None))

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays."""
        return resume.metadata(self)

    @property
    def callback_states(self) -> dict[str, Any]:
        """State of the callbacks that keep any; part of a checkpoint."""
        return self._callbacks.state_dict()

    def _obey(self) -> None:
        """What is asked for after this update, but for evaluations and saves."""
        control, of_epoch = self.control, self.data.steps_per_epoch
        if control.should_abort_without_save:
            raise AbortedError(
                f"a callback ended the run at update {self.global_step}; nothing was saved of it"
            )
        if control.taken("should_log"):
            self.report.flush(asked=True)
        if control.taken("should_roll_back"):
            roll_back(self)
        if control.taken("should_epoch_stop"):
            self.position = -(-self.position // of_epoch) * of_epoch
        self.early_stop |= self.need_early_exit()

    @property
    def _must_leave(self) -> bool:
        """Has a signal come that an evaluation gives way to?"""
        return self.stop.signal is not None and not self.is_complete

    def _tell(self, event: str, **more: Any) -> None:
        self._callbacks.tell(event, self, **more)

    def _summed(self, data: TrainingData, eval_set: str) -> Loss:
        key = jax.random.key(self.config.seed)
        losses = []
        for batch in self.eval_batches(eval_set, data):
            losses.append(self.loss(self.state, batch, key))
            self._tell("on_prediction_step")
            if self._must_leave:
                break
        return reduce(added, losses)

    def _sample(self) -> None:
        """Answers to the recipe's prompts, with the present weights."""
        wanted = self.config.eval_samples
        if wanted is None or (self.report.num_evaluations - 1) % wanted.every_n_evals:
            return
        with self.report.phase("sampling", key="sample_time"), jax.set_mesh(self.mesh):
            params = self.average.told(self.state)
            found = answers(self.model, params, self.tokenizer, wanted)
        self.report.samples(self.global_step, wanted.prompts, found)

    @cached_property
    def _spec(self) -> pure.StepSpec:
        """Read when `step` and `loss` are traced, so that callbacks are around its functions."""
        stage = self.config.deepspeed.zero_stage
        placed = partial(parameter_shardings, self.mesh, self.model.shapes)
        return pure.StepSpec(
            merge=lambda params: self.model.merge(self.groups.held(params)),
            loss_fn=self.loss_fn,
            on_gradients=self.backward,
            optimizer=self.optimizer,
            schedule=self.scheduler,
            average=self.average.after,
            max_grad_norm=self.config.max_grad_norm,
            seed=self.config.seed,
            counts=partial(counts, windows=self.model.windows),
            compute_shardings=placed(over_data=stage == 3),
            grad_shardings=placed(over_data=stage >= 2),
            whole_batch=self.geometry.whole_batch,
        )

    def _compile(self) -> None:
        """Turn `step` and `loss` into jitted functions on the mesh."""
        placed = (self.shardings, self.geometry.batch_sharding)
        step = jax.jit(
            self.step, donate_argnums=0, in_shardings=placed, out_shardings=(self.shardings, None)
        )
        loss = jax.jit(self.loss, in_shardings=(*placed, None))
        self.step = Compiled("train step", step, self.mesh, self.report)  # type: ignore[method-assign]
        self.loss = Compiled("evaluation", loss, self.mesh, self.report)  # type: ignore[method-assign]

    def _refuse_foreign_folders(self) -> None:
        """RecipeError where this run would write into the files of another."""
        goes_on = any(engine.config.goes_on for engine in self.checkpoint_engines)
        for engine in self.checkpoint_engines:
            engine.refuse_foreign(may_resume=goes_on)
        self.run_folder.refuse_foreign(may_resume=goes_on)
