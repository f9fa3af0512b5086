"""Where a run is: plain numbers, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtrain.checkpoint.engine import SavePoint
from jaxtrain.data.plan import ENDLESS, TrainingBatches
from jaxtrain.recipe.trainer import TrainerConfig


class TrainOutput(NamedTuple):
    global_step: int
    training_loss: float
    """of the last step, in nats per trained token"""
    metrics: dict[str, float]
    """of the last evaluation; `train_runtime` in seconds, and what was done in it"""


class Horizon(NamedTuple):
    """How far a run goes: numbers of its recipe and its data."""

    steps: int
    """that the recipe plans, from the first one"""
    epoch_sequences: int
    epochs: int | None = None
    """passes over the data, if the recipe counts in them"""
    exit_step: int = 0
    """end here, 0 is never; the schedule goes on to `steps`"""
    exit_after: int = 0
    """end after so many steps of one process, 0 is never"""

    @classmethod
    def of(cls, config: TrainerConfig, data: TrainingBatches, more_steps: int = 0) -> "Horizon":
        more_steps += data.count_uneven_steps(config.passes or 0)
        steps = config.horizon(data.steps_per_epoch, more_steps)
        assert steps is not None
        limits = config.exit_iteration, config.exit_iteration_this_run
        return cls(steps, data.epoch_sequences, config.passes, *limits)


@dataclass
class Progress:
    """Counts steps, of all microbatches and devices together."""

    step: int = 0
    """steps done; the label of every checkpoint and log line"""
    position: int = 0
    """sequences that were taken, over all epochs; the next batch begins there"""
    first_step: int = 0
    """steps that were done when this process began"""
    schedule_start: int = 0
    """step from which the schedule counts"""
    more_steps: int = 0
    """that passes take, or fewer below 0, since not all steps were of the present size"""
    rollbacks: int = 0
    """of this process"""
    eval_metrics: Mapping[str, float] = field(default_factory=dict)
    """of the evaluation after the newest step, empty when there was none"""
    stop_reason: str | None = None
    """why the run ends early, if it does"""
    is_stopping: bool = False
    """the run ends after this step, though not all is trained"""
    signal: str | None = None
    """name of the signal for which it ends"""

    def last_step(self, horizon: Horizon) -> int:
        """The step after which this run ends."""
        limits = [horizon.steps, horizon.exit_step or horizon.steps]
        limits += [self.first_step + horizon.exit_after] if horizon.exit_after else []
        return min(limits)

    def epochs_done(self, horizon: Horizon) -> float:
        """Passes over the data so far."""
        return self.position / horizon.epoch_sequences

    def epoch_index(self, horizon: Horizon) -> int:
        """Whole epochs done; the number of the present one, from 0."""
        return self.position // horizon.epoch_sequences

    def is_epoch_end(self, horizon: Horizon) -> bool:
        """Was the newest batch the last one of an epoch?"""
        return self.position > 0 and self.position % horizon.epoch_sequences == 0

    def skip_epoch(self, horizon: Horizon) -> None:
        """Leave out what is left of the epoch, if it has an end."""
        if horizon.epoch_sequences == ENDLESS:
            return
        self.position = -(-self.position // horizon.epoch_sequences) * horizon.epoch_sequences

    def is_complete(self, horizon: Horizon) -> bool:
        """Was everything trained that the recipe asks of this run?"""
        has_passed = horizon.epochs is not None and self.epoch_index(horizon) >= horizon.epochs
        return has_passed or self.step >= self.last_step(horizon)

    def is_finished(self, horizon: Horizon) -> bool:
        return self.is_stopping or self.is_complete(horizon)

    def is_preempted(self, horizon: Horizon) -> bool:
        """Does a signal end the run before it is complete?"""
        return self.signal is not None and not self.is_complete(horizon)

    def evaluation_is_due(
        self, config: TrainerConfig, horizon: Horizon, *, has_eval: bool, requested: bool
    ) -> bool:
        """After this step, or before the first, once; a signal that ends the run does not wait."""
        if requested:
            return True
        if not has_eval or self.eval_metrics or self.is_preempted(horizon):
            return False
        if self.step == 0:
            return config.eval_at_start
        at_end = self.is_finished(horizon) and config.eval_at_end is not False
        by_step = config.eval_interval and self.step % config.eval_interval == 0
        epochs = self.is_epoch_end(horizon) and config.eval_every_n_epochs
        by_epoch = epochs and self.epoch_index(horizon) % epochs == 0
        return at_end or bool((by_step or by_epoch) and self.step >= config.eval_after_step)

    def save_point(self, horizon: Horizon, *, requested: bool) -> SavePoint:
        """What decides whether a save is due after this step."""
        return SavePoint(
            self.step,
            epoch_ended=self.epoch_index(horizon) if self.is_epoch_end(horizon) else 0,
            training_ended=self.is_finished(horizon) and not self.is_preempted(horizon),
            requested=requested,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON data."""
        return {
            "step": self.step,
            "sequences": self.position,
            "more_steps": self.more_steps,
            "schedule_start": self.schedule_start,
            "eval_metrics": dict(self.eval_metrics),
        }

    def load_state_dict(
        self, saved: Mapping[str, Any], data: TrainingBatches, *, reset: tuple[str, ...] = ()
    ) -> None:
        """Resume from what a checkpoint kept, but for the parts that are reset."""
        self.step, self.position, self.more_steps = saved["step"], 0, 0
        if "data" not in reset:
            data.load_state_dict(saved)
            # Earlier checkpoints count batches; an engine of the user's may keep the step alone.
            counted = data.advance(0, saved.get("position", self.step))
            self.position = saved.get("sequences", counted)
            self.more_steps = saved.get("more_steps", 0)
            size = data.shape.step_sequences
            if saved.get("lineage", {}).get("global_batch", size) != size:
                epochs = self.position // data.epoch_sequences + 1
                to_their_end = self.step + data.steps_left(self.position)
                self.more_steps = to_their_end - epochs * data.steps_per_epoch
        self.eval_metrics = saved.get("eval_metrics", {})
        self.schedule_start = saved.get("schedule_start", 0)
        if "scheduler" in reset:
            self.schedule_start = self.step
