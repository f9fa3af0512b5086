"""Where a run is, and whether it ends: what follows from its counts and from what was asked."""

from collections.abc import Mapping
from typing import Any

from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.callbacks import Control
from jaxtrain.trainer.stop import StopRequests


class Progress:
    """The trainer's counts. A trainer makes `config`, `data`, `stop` and `control`."""

    config: TrainerConfig
    data: Any
    stop: StopRequests
    control: Control

    global_step: int = 0
    """Updates done."""
    position: int = 0
    """Number of the next batch; above the step once batches were skipped, and saved with it."""
    first_step: int = 0
    """Updates that were done when this process began."""
    num_rollbacks: int = 0
    """Of this process."""
    eval_metrics: Mapping[str, float] = {}
    """Of the evaluation after the newest update, empty when there was none."""
    early_stop: bool = False
    """Does the run end with this update, though not all is trained?"""
    early_stop_reason: str | None = None

    @property
    def training_horizon(self) -> int:
        """Updates that the recipe plans, which is the length of the schedule."""
        horizon = self.config.horizon(self.data.steps_per_epoch)
        assert horizon is not None
        return horizon

    @property
    def warmup_steps(self) -> int:
        """Updates over which the rate rises."""
        return self.config.scheduler.warmup_updates(self.training_horizon)

    @property
    def last_step(self) -> int:
        """The update after which this run ends."""
        this_run = self.config.exit_iteration_this_run
        limits = (self.config.exit_iteration, this_run and self.first_step + this_run)
        return min(self.training_horizon, *(limit or self.training_horizon for limit in limits))

    @property
    def global_step_this_run(self) -> int:
        """Updates of this process."""
        return self.global_step - self.first_step

    @property
    def epoch_idx(self) -> int:
        """Epochs that are over."""
        return self.position // self.data.steps_per_epoch

    @property
    def epoch_finished(self) -> bool:
        """Does an epoch end with the last batch?"""
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
        """After this update, once; a signal that ends the run does not wait for it."""
        if self.control.taken("should_evaluate"):
            return True
        if not self.data.evals or self.eval_metrics or self.is_preempted:
            return False
        config, step = self.config, self.global_step
        at_end = self.training_finished and config.eval_at_end is not False
        by_step = config.eval_interval and step % config.eval_interval == 0
        epochs = self.epoch_finished and config.eval_every_n_epochs
        by_epoch = epochs and self.epoch_idx % epochs == 0
        return at_end or bool((by_step or by_epoch) and step >= config.eval_after_step)

    def skip_epoch(self) -> None:
        """Go on with the first batch of the next epoch."""
        of_epoch = self.data.steps_per_epoch
        self.position = -(-self.position // of_epoch) * of_epoch

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
