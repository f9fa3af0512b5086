"""Where a run is, as callbacks, factories and checkpoint engines may read it at any time."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.checkpoint.engine import SavePoint
from jaxtrain.metrics.user_metrics import UserMetrics
from jaxtrain.metrics.wandb_run import Wandb
from jaxtrain.model import Decoder
from jaxtrain.recipe.dump import compatibility
from jaxtrain.trainer.callbacks import Control
from jaxtrain.trainer.parts import Parts
from jaxtrain.trainer.report import Report
from jaxtrain.trainer.run_folder import RunFolder
from jaxtrain.trainer.state import PyTree, TrainState
from jaxtrain.trainer.stop import StopRequests


class Facts(Parts):
    """Of a trainer; numbers count updates, of all microbatches and devices together."""

    global_step: int = 0
    """updates done; the label of every checkpoint and log line"""
    position: int = 0
    """number of the next batch; above the step once batches were skipped, and saved with it"""
    first_step: int = 0
    """updates that were done when this process began"""
    num_rollbacks: int = 0
    """of this process"""
    eval_metrics: Mapping[str, float] = {}
    """of the evaluation after the newest update, empty when there was none"""
    early_stop: bool = False
    """does the run end with this update, though not all is trained?"""
    early_stop_reason: str | None = None
    state: TrainState
    stop: StopRequests
    control: Control
    report: Report
    run_folder: RunFolder

    @property
    def planned_updates(self) -> int:
        """Of the recipe, from the first one on."""
        horizon = self.config.horizon(self.data.steps_per_epoch)
        assert horizon is not None
        return horizon

    @property
    def training_horizon(self) -> int:
        """Length of the schedule: from where it begins to the end that the recipe plans."""
        return self.planned_updates - self.schedule_start

    @property
    def warmup_steps(self) -> int:
        """Updates over which the rate rises."""
        return self.config.scheduler.warmup_updates(self.training_horizon)

    @property
    def last_step(self) -> int:
        """The update after which this run ends."""
        this_run = self.config.exit_iteration_this_run
        limits = (self.config.exit_iteration, this_run and self.first_step + this_run)
        return min(self.planned_updates, *(limit or self.planned_updates for limit in limits))

    @property
    def global_step_this_run(self) -> int:
        """Updates of this process."""
        return self.global_step - self.first_step

    @property
    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, from 0, for as long as the run goes on."""
        while not self.training_finished:
            yield self.epoch_idx

    @property
    def epoch_idx(self) -> int:
        """Epochs done."""
        return self.position // self.data.steps_per_epoch

    @property
    def epochs_done(self) -> float:
        """How often all rows were taken."""
        return self.position / self.data.steps_per_epoch

    @property
    def train_batch_idx(self) -> int:
        """Microbatches taken."""
        return self.position * self.layout.num_microbatches

    @property
    def epoch_finished(self) -> bool:
        """Was the newest batch the last one of an epoch?"""
        return self.position > 0 and self.position % self.data.steps_per_epoch == 0

    @property
    def is_complete(self) -> bool:
        """Was everything trained that the recipe asks of this run?"""
        passes = self.config.passes
        passed = passes is not None and self.epoch_idx >= passes
        return passed or self.global_step >= self.last_step

    @property
    def training_finished(self) -> bool:
        return self.early_stop or self.is_complete

    @property
    def is_preempted(self) -> bool:
        """Does a signal end the run before it is complete?"""
        return self.stop.obeyed is not None and not self.is_complete

    @property
    def evaluation_is_due(self) -> bool:
        """After this update, or before the first, once; a signal that ends the run does not wait
        for it."""
        config, step = self.config, self.global_step
        if self.control.should_evaluate:
            return True
        if not self.data.evals or self.eval_metrics or self.is_preempted:
            return False
        if step == 0:
            return config.eval_at_start
        at_end = self.training_finished and config.eval_at_end is not False
        by_step = config.eval_interval and step % config.eval_interval == 0
        epochs = self.epoch_finished and config.eval_every_n_epochs
        by_epoch = epochs and self.epoch_idx % epochs == 0
        return at_end or bool((by_step or by_epoch) and step >= config.eval_after_step)

    @property
    def must_leave(self) -> bool:
        """Has a signal come that an evaluation gives way to?"""
        return self.stop.signal is not None and not self.is_complete

    @property
    def save_point(self) -> SavePoint:
        """What decides whether a save is due after this update."""
        return SavePoint(
            self.global_step,
            epoch_ended=self.epoch_idx if self.epoch_finished else 0,
            training_ended=self.training_finished and not self.is_preempted,
            requested=self.control.should_save,
        )

    @property
    def full_state_engines(self) -> list[CheckpointEngine]:
        """Those from whose checkpoints a run can go on."""
        return [e for e in self.checkpoint_engines if e.is_full_state and e.config.enabled]

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
    def params(self) -> PyTree:
        """The present weights, sharded as they are trained."""
        return self.state.params

    @property
    def model(self) -> Decoder:
        """The module with the present weights, which the next update replaces."""
        return self.language_model.merge(self.params)

    model_unwrapped = model

    @property
    def metrics(self) -> UserMetrics:
        """For numbers of the user's own, which the row of this update will have."""
        return self.report.recorded

    @property
    def wandb_experiment(self) -> Any:
        """The run of Weights & Biases, None where there is none."""
        runs = (w.run for w in self.run_folder.writers if isinstance(w, Wandb))
        return next(runs, None)

    @property
    def train_dataloader(self) -> Any:
        """The batches of training by their number: `batch(step)`."""
        return self.data.train

    @property
    def eval_dataloader(self) -> Any:
        """The same for each evaluation set, by name."""
        return self.data.evals

    @property
    def compatibility(self) -> dict[str, Any]:
        """What a checkpoint and a run that continues it must agree in."""
        return compatibility(self.config, global_batch=self.layout.global_batch)
