"""Where a run is, under the names that callbacks of other trainers read."""

from typing import Any

import jax

from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.registry import TrainerView


class RunState(TrainerView):
    """A view of the trainer, whose own attributes it has too, but for `epoch`, a method there.
    Only `state`, the weights and the optimizer's state, may be replaced."""

    trainer = property(lambda self: self)
    is_hyper_param_search = False
    is_world_process_zero = is_local_process_zero = property(lambda _: jax.process_index() == 0)
    num_processes = property(lambda _: jax.process_count())
    logging_steps = property(lambda self: self.config.train_log_iter_interval)
    eval_steps = property(lambda self: self.config.eval_interval)
    epoch = property(lambda self: self.epochs_done)
    raw_epoch = property(lambda self: self.epoch_idx)
    epoch_train_steps = property(lambda self: self.data.steps_per_epoch)
    max_steps = property(lambda self: self.last_step)
    stateful_callbacks = property(lambda self: self.callback_states)
    total_flos = property(lambda self: self.report.meter.flops)
    num_input_tokens_seen = property(lambda self: self.report.meter.seen["tokens"])
    max_eval_steps = property(lambda self: self.config.max_eval_batches)
    train_batch_size = property(lambda self: self.config.micro_batch_size)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":
            self._trainer.state = value
        else:
            super().__setattr__(name, value)

    @property
    def save_steps(self) -> int:
        """Of the first checkpoint entry that saves by the step."""
        entries = self.config.checkpoint
        return next((e.save_every_n_steps for e in entries if e.save_every_n_steps), 0)

    @property
    def epoch_start_step(self) -> int:
        """The step after which the epoch began, if no batch was skipped since."""
        return self.global_step + self.data.train.steps_left(self.position) - self.epoch_train_steps

    @property
    def num_train_epochs(self) -> float:
        return self.planned_updates / self.epoch_train_steps

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The newest rows, of training and of evaluations; the metrics file has all."""
        return list(self.report.history)

    @property
    def best_metric(self) -> float | None:
        """Score of the best checkpoint that is kept."""
        engine, step = self._best
        return engine.scores()[step] if engine else None

    @property
    def best_model_checkpoint(self) -> str | None:
        engine, step = self._best
        return str(engine.path(step)) if engine else None

    @property
    def _best(self) -> tuple[CheckpointEngine | None, int]:
        """Of the first checkpoint entry that has one."""
        found = ((engine, engine.best()) for engine in self.checkpoint_engines)
        return next(((engine, step) for engine, step in found if step is not None), (None, 0))
