"""Where a run is, as callbacks, factories and checkpoint engines may read it at any time."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxtrain.model import Decoder
from jaxtrain.recipe.dump import lineage
from jaxtrain.trainer.callbacks import Control
from jaxtrain.trainer.parts import Parts
from jaxtrain.trainer.state import PyTree, TrainState


class Facts(Parts):
    """Of a trainer; numbers count updates, of all microbatches and devices together."""

    global_step: int
    """updates done; the label of every checkpoint and log line"""
    state: TrainState
    control: Control

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
        return min(self.training_horizon, self.config.exit_iteration or self.training_horizon)

    @property
    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, from 0, for as long as the run goes on."""
        while not self.training_finished:
            yield self.epoch_idx

    @property
    def epoch_idx(self) -> int:
        """Epochs done."""
        return self.global_step // self.data.steps_per_epoch

    @property
    def train_batch_idx(self) -> int:
        """Microbatches done."""
        return self.global_step * self.geometry.num_microbatches

    @property
    def epoch_finished(self) -> bool:
        """Was the newest update the last one of an epoch?"""
        return self.global_step > 0 and self.global_step % self.data.steps_per_epoch == 0

    @property
    def training_finished(self) -> bool:
        return self.global_step >= self.last_step or self.control.should_training_stop

    @property
    def early_stop(self) -> bool:
        """Did somebody ask for the end of the run?"""
        return self.control.should_training_stop

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
    def model_unwrapped(self) -> Decoder:
        """The module with the present weights, which the next update replaces."""
        return self.model.merge(self.params)

    @property
    def train_dataloader(self) -> Any:
        """The batches of training by their number: `batch(step)`."""
        return self.data.train

    @property
    def eval_dataloader(self) -> Any:
        """The same for each evaluation set, by name."""
        return self.data.evals

    @property
    def lineage(self) -> dict[str, Any]:
        """What a checkpoint and a run that continues it must agree in."""
        return lineage(self.config, global_batch=self.geometry.global_batch)
