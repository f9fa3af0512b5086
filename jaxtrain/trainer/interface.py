"""What ArcticTraining, Forgather and transformers promise of a trainer, and where it stands."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax

from jaxtrain import registry
from jaxtrain.checkpoint.engine import SavePoint, Snapshot
from jaxtrain.data import BatchShape, TrainingData
from jaxtrain.metrics.console import Console
from jaxtrain.model.peft_folder import checksum
from jaxtrain.model_folder import is_complete
from jaxtrain.parallel.layout import BatchLayout, Extras
from jaxtrain.recipe.dump import compatibility, to_dict
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.callbacks import Callbacks, Control
from jaxtrain.trainer.checkpoints import Checkpoints
from jaxtrain.trainer.header import collect_facts
from jaxtrain.trainer.progress import Horizon, Progress
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.run import Run
from jaxtrain.trainer.run_folder import RunFolder, versions
from jaxtrain.trainer.run_state import RunState
from jaxtrain.trainer.state import BASE, TrainState
from jaxtrain.trainer.stop import StopRequests


class Interface:
    """Asks the components of a trainer, and sets none."""

    config: TrainerConfig
    mode: str
    tokenizer: Any
    layout: BatchLayout
    run: Run
    data: TrainingData
    horizon: Horizon
    progress: Progress
    state: TrainState
    checkpoints: Checkpoints
    report: Report
    run_folder: RunFolder
    stop: StopRequests
    console: Console
    _callbacks: Callbacks

    # What is fixed.

    mesh = property(lambda self: self.layout.mesh)
    devices = property(lambda self: list(self.mesh.devices.flat))
    device = property(lambda self: self.mesh.local_devices[0])
    world_size = property(lambda self: jax.process_count())
    global_rank = property(lambda self: jax.process_index())
    language_model = property(lambda self: self.run.model)
    model_config = property(lambda self: self.run.model.spec)
    optimizer = property(lambda self: self.run.optimizer)
    scheduler = property(lambda self: self.run.schedule)
    peak_lr = property(lambda self: self.run.peak_lr)
    planned_updates = property(lambda self: self.horizon.steps)
    training_horizon = property(lambda self: self.horizon.steps - self.progress.schedule_start)
    train_dataloader = property(lambda self: self.data.train)
    eval_dataloader = property(lambda self: self.data.evals)

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return self.config.scheduler.warmup_updates(self.training_horizon)

    @property
    def header(self) -> dict[str, str]:
        """Name → fact that the run begins with."""
        folder = self.run_folder.path
        return collect_facts(self.run, self.data, self.progress, self.horizon, folder)

    @property
    def batch_shape(self) -> BatchShape:
        """How the data cuts the sequences of a step."""
        layout = self.layout
        return BatchShape(
            layout.num_microbatches, layout.microbatch_sequences, layout.process_sequences,
            layout.length_multiple,
        )  # fmt: skip

    @property
    def data_extras(self) -> Extras:
        """What the batches of the recipe's data have besides their tokens."""
        return registry.find("data", self.config.data.type).extras

    # Where the run is.

    global_step = property(lambda self: self.progress.step)
    global_step_this_run = property(lambda self: self.progress.step - self.progress.first_step)
    position = property(lambda self: self.progress.position)
    num_rollbacks = property(lambda self: self.progress.rollbacks)
    eval_metrics = property(lambda self: self.progress.eval_metrics)
    early_stop = property(lambda self: self.progress.is_stopping)
    early_stop_reason = property(lambda self: self.progress.stop_reason)
    last_step = property(lambda self: self.progress.last_step(self.horizon))
    epoch_idx = property(lambda self: self.progress.epoch_index(self.horizon))
    epochs_done = property(lambda self: self.progress.epochs_done(self.horizon))
    epoch_finished = property(lambda self: self.progress.is_epoch_end(self.horizon))
    is_complete = property(lambda self: self.progress.is_complete(self.horizon))
    training_finished = property(lambda self: self.progress.is_finished(self.horizon))
    is_preempted = property(lambda self: self.progress.is_preempted(self.horizon))

    @property
    def train_batch_idx(self) -> int:
        """Microbatches to this position."""
        data = self.data.train
        steps = (self.epoch_idx + 1) * data.steps_per_epoch - data.steps_left(self.position)
        return steps * self.layout.num_microbatches

    @property
    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, from 0, for as long as the run lasts."""
        while not self.training_finished:
            yield self.epoch_idx

    @property
    def must_leave(self) -> bool:
        """Has a signal come that an evaluation gives way to?"""
        return self.stop.signal is not None and not self.is_complete

    @property
    def evaluation_is_due(self) -> bool:
        """After this step, or before the first?"""
        requested, has_eval = self.control.should_evaluate, bool(self.data.evals)
        return self.progress.evaluation_is_due(
            self.config, self.horizon, has_eval=has_eval, requested=requested
        )

    @property
    def save_point(self) -> SavePoint:
        """What decides whether a save is due after this step."""
        return self.progress.save_point(self.horizon, requested=self.control.should_save)

    # Weights, checkpoints, metrics.

    params = property(lambda self: self.state.params)
    model = property(
        lambda self: self.run.model.merge(self.state.params, self.state.frozen.get(BASE))
    )
    model_unwrapped = model
    checkpoint_engines = property(lambda self: self.checkpoints.engines)
    full_state_engines = property(lambda self: self.checkpoints.full_state)
    resume_path = property(lambda self: self.checkpoints.resume_path)
    metrics = property(lambda self: self.report.user_metrics)
    wandb_experiment = property(lambda self: self.run_folder.wandb_run)
    callback_states = property(lambda self: self._callbacks.state_dict())

    @property
    def compatibility(self) -> dict[str, Any]:
        """What a checkpoint and a run that continues it must agree in."""
        found = compatibility(self.config, global_batch=self.layout.global_batch)
        return found | ({"data.digest": self.data.train.digest} if self.mode == "train" else {})

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays, as JSON data."""
        return {
            **self.progress.state_dict(),
            **self.data.train.state_dict(self.progress.position),
            "epoch": self.epochs_done,
            "callbacks": self.callback_states,
            "report": self.report.state_dict(),
            "lineage": self.compatibility,
            "recipe": to_dict(self.config),
            "versions": versions(),
            **({BASE: self.base_checksum} if self.run.model.adapters else {}),
        }

    @cached_property
    def base_checksum(self) -> str:
        """Of the base of adapters, which nothing changes."""
        return checksum(self.state.frozen[BASE])

    @property
    def snapshot(self) -> Snapshot:
        """What an engine saves now."""
        kept = self.state.without_base()
        return Snapshot(self.progress.step, kept, self.metadata, self.save_model)

    def save_checkpoint(self, path: Path | str | None = None) -> Path:
        """Save full state now, whatever is due, and return its folder, `global_step_N`: in `path`,
        else where the recipe's first `orbax` entry saves."""
        engine, step = self.checkpoints.engine_to_save(path), self.progress.step
        if engine.last_saved != step:
            self.report.flush()
            engine.save(self.snapshot)
            engine.last_saved = step
        engine.wait()
        return engine.path(step)

    def save_model(self, output_dir: Path | str | None = None) -> Path:
        """Export the weights to a folder that `transformers` loads; to where the recipe's first
        `huggingface` entry has those of this step when none is named.

        CheckpointError if the folder reads back as something else; it is not there then.
        """
        folder = Path(output_dir or self.checkpoints.export_path(self.progress.step)).absolute()
        config = self.checkpoints.export_config(folder)
        self.run.export(self.state, folder, config, self.tokenizer)
        return folder

    def model_exists(self, output_dir: Path | str) -> bool:
        """Is a whole exported model there?"""
        return is_complete(Path(output_dir), with_weights=True)

    def close(self) -> None:
        """Return when all that was saved is on disk and the files of the run are closed; `with`
        does it too."""
        if self.mode == "process-data":
            return
        try:
            with self.console.timing("save"):
                self.checkpoints.wait()
        finally:
            self.report.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def log(self, logs: Mapping[str, Any]) -> None:
        """Write a metrics row of one's own, and pass it to `on_log`."""
        row = {"iter": self.progress.step, **logs}
        self.report.write(row)
        self.report.tell("on_log", logs=row)

    # Callbacks.

    @classmethod
    def default_callbacks(cls) -> list[Any]:
        """Callbacks, or classes of them, that every run of this trainer has."""
        return []

    def tell(self, event: str, **more: Any) -> None:
        """Call every callback that has a method for this event."""
        self._callbacks.tell(event, RunState(self), **more)

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
