"""What ArcticTraining, Forgather and transformers promise of a trainer, and where it stands."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain import registry
from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.checkpoint.engine import SavePoint
from jaxtrain.data import TrainingData
from jaxtrain.metrics.user_metrics import UserMetrics
from jaxtrain.model import Decoder, LanguageModel
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
from jaxtrain.trainer.state import PyTree, TrainState
from jaxtrain.trainer.stop import StopRequests


class Interface:
    """Reads the components of a trainer, and sets none."""

    config: TrainerConfig
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
    _callbacks: Callbacks

    # What is fixed.

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @property
    def devices(self) -> list[Any]:
        """Of the mesh, over all processes."""
        return list(self.mesh.devices.flat)

    @property
    def device(self) -> Any:
        """The first of this process."""
        return next(d for d in self.devices if d.process_index == jax.process_index())

    @property
    def world_size(self) -> int:
        """Processes, each of which drives all devices of its host."""
        return jax.process_count()

    @property
    def global_rank(self) -> int:
        """Number of this process."""
        return jax.process_index()

    @property
    def language_model(self) -> LanguageModel:
        return self.run.model

    @property
    def optimizer(self) -> Any:
        return self.run.optimizer

    @property
    def scheduler(self) -> Any:
        """Step → fraction of the peak learning rate."""
        return self.run.schedule

    @property
    def peak_lr(self) -> float:
        return self.run.peak_lr

    @property
    def data_extras(self) -> Extras:
        """What the batches of the recipe's data have besides their tokens."""
        return registry.find("data", self.config.data.type).extras

    @property
    def compatibility(self) -> dict[str, Any]:
        """What a checkpoint and a run that continues it must agree in."""
        return compatibility(self.config, global_batch=self.layout.global_batch)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the arrays, as JSON data."""
        return {
            **self.progress.state_dict(),
            "epoch": self.epochs_done,
            "callbacks": self.callback_states,
            "report": self.report.state_dict(),
            "lineage": self.compatibility,
            "recipe": to_dict(self.config),
            "versions": versions(),
        }

    @property
    def header(self) -> dict[str, str]:
        """Name → fact that the run begins with."""
        folder = self.run_folder.path
        return collect_facts(self.run, self.data, self.progress, self.horizon, folder)

    @property
    def planned_updates(self) -> int:
        """Steps of the recipe, from the first one."""
        return self.horizon.steps

    @property
    def training_horizon(self) -> int:
        """Length of the schedule: from where it begins to the end that the recipe plans."""
        return self.horizon.steps - self.progress.schedule_start

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return self.config.scheduler.warmup_updates(self.training_horizon)

    # Where the run is.

    @property
    def global_step(self) -> int:
        """Steps done; the label of every checkpoint and log line."""
        return self.progress.step

    @property
    def position(self) -> int:
        """Number of the next batch."""
        return self.progress.position

    @property
    def global_step_this_run(self) -> int:
        """Steps of this process."""
        return self.progress.step - self.progress.first_step

    @property
    def last_step(self) -> int:
        """The step after which this run ends."""
        return self.progress.last_step(self.horizon)

    @property
    def num_rollbacks(self) -> int:
        return self.progress.rollbacks

    @property
    def eval_metrics(self) -> Any:
        """Of the evaluation after the newest step, empty when there was none."""
        return self.progress.eval_metrics

    @property
    def early_stop(self) -> bool:
        return self.progress.is_stopping

    @property
    def early_stop_reason(self) -> str | None:
        return self.progress.stop_reason

    @property
    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, from 0, for as long as the run lasts."""
        while not self.training_finished:
            yield self.epoch_idx

    @property
    def epoch_idx(self) -> int:
        """Whole epochs done."""
        return self.progress.epoch_index(self.horizon)

    @property
    def epochs_done(self) -> float:
        return self.progress.epochs_done(self.horizon)

    @property
    def epoch_finished(self) -> bool:
        return self.progress.is_epoch_end(self.horizon)

    @property
    def train_batch_idx(self) -> int:
        """Microbatches taken."""
        return self.progress.position * self.layout.num_microbatches

    @property
    def is_complete(self) -> bool:
        return self.progress.is_complete(self.horizon)

    @property
    def training_finished(self) -> bool:
        return self.progress.is_finished(self.horizon)

    @property
    def is_preempted(self) -> bool:
        return self.progress.is_preempted(self.horizon)

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

    # Weights, data, files.

    @property
    def params(self) -> PyTree:
        """The present weights, sharded as they are trained."""
        return self.state.params

    @property
    def model(self) -> Decoder:
        """The module with the present weights, which the next step replaces."""
        return self.run.model.merge(self.state.params)

    model_unwrapped = model

    @property
    def train_dataloader(self) -> Any:
        """The batches of training by their number: `batch(step)`."""
        return self.data.train

    @property
    def eval_dataloader(self) -> Any:
        """The same for each evaluation set, by name."""
        return self.data.evals

    @property
    def checkpoint_engines(self) -> list[CheckpointEngine]:
        return self.checkpoints.engines

    @property
    def full_state_engines(self) -> list[CheckpointEngine]:
        return self.checkpoints.full_state

    @property
    def resume_path(self) -> Path | None:
        """The checkpoint that a start resumes from; None for a fresh start."""
        return self.checkpoints.resume_path

    def model_exists(self, output_dir: Path | str) -> bool:
        """Is a whole exported model there?"""
        return is_complete(Path(output_dir), with_weights=True)

    @property
    def metrics(self) -> UserMetrics:
        """For numbers of the user's own, which the metrics row of this step will have."""
        return self.report.recorded

    @property
    def wandb_experiment(self) -> Any:
        """The run of Weights & Biases, None where there is none."""
        return self.run_folder.wandb_run

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

    @property
    def callback_states(self) -> dict[str, Any]:
        """State of the callbacks that keep any; part of a checkpoint."""
        return self._callbacks.state_dict()
