"""From the `scheduler` section to a schedule."""

from collections.abc import Callable
from typing import Any

from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.scheduler import HFSchedulerConfig, SchedulerConfig, WSDSchedulerConfig
from jaxtrain.registry import Factory
from jaxtrain.scheduler import schedules
from jaxtrain.scheduler.schedules import Schedule as Schedule


class SchedulerFactory(Factory, kind="scheduler"):
    """Makes the schedule; `self.trainer` has `training_horizon` and `warmup_steps`, in updates."""

    events = {"create-scheduler": "create_scheduler"}
    config: SchedulerConfig

    def create_scheduler(self, optimizer: Any) -> Schedule:
        """A function from the update number (from 0) to a share of the optimizer's own rate."""
        raise NotImplementedError(
            f"{type(self).__qualname__} defines no create_scheduler(optimizer)"
        )


class HFSchedulerFactory(SchedulerFactory):
    """The schedules that `transformers` names."""

    name = "huggingface"
    config: HFSchedulerConfig

    def create_scheduler(self, optimizer: Any) -> Schedule:
        return hf_schedule(
            self.config,
            horizon=self.trainer.training_horizon,
            warmup=self.trainer.warmup_steps,
            peak_lr=optimizer.learning_rate,
        )


class WSDSchedulerFactory(SchedulerFactory):
    """Warm up, stay, decay linearly, with the lengths written out."""

    name = "wsd"
    config: WSDSchedulerConfig

    def create_scheduler(self, optimizer: Any) -> Schedule:
        warmup, decay = self.config.num_warmup_steps, self.config.num_decay_steps
        stable = self.trainer.training_horizon - warmup - decay
        if stable < 0:
            raise RecipeError(
                f"scheduler: num_warmup_steps {warmup} and num_decay_steps {decay} are longer than "
                f"the run of {self.trainer.training_horizon} updates"
            )
        return schedules.warmup_stable_decay(
            warmup, stable, decay, floor=self.config.min_lr_ratio, decay_type="linear"
        )


def hf_schedule(
    config: HFSchedulerConfig, *, horizon: int, warmup: int, peak_lr: float
) -> Schedule:
    """The schedule of a recipe over `horizon` updates."""
    shape, floor = config.shape, config.min_lr_ratio
    span = (horizon, warmup)

    def least() -> float:
        if shape.min_lr_rate is not None:
            return shape.min_lr_rate
        return shape.min_lr / peak_lr if peak_lr else 0.0

    def stable_decay() -> Schedule:
        stable = shape.num_stable_steps
        return schedules.warmup_stable_decay(
            warmup,
            max(0, horizon - warmup - shape.num_decay_steps) if stable is None else stable,
            shape.num_decay_steps,
            floor=floor if shape.min_lr_ratio is None else shape.min_lr_ratio,
            warmup_type=shape.warmup_type,
            decay_type=shape.decay_type,
            num_cycles=shape.num_cycles,
        )

    made: dict[str, Callable[[], Schedule]] = {
        "constant": schedules.constant,
        "constant_with_warmup": lambda: schedules.constant_with_warmup(warmup),
        "linear": lambda: schedules.linear(*span, floor=floor),
        "cosine": lambda: schedules.cosine(*span, floor=floor, num_cycles=shape.num_cycles),
        "cosine_with_restarts": lambda: schedules.restarts(*span, num_cycles=shape.num_cycles),
        "polynomial": lambda: schedules.polynomial(
            *span,
            floor=floor or (min(1.0, shape.lr_end / peak_lr) if peak_lr else 0.0),
            power=shape.power,
        ),
        "inverse_sqrt": lambda: schedules.inverse_sqrt(warmup, shape.timescale or warmup or 10_000),
        "cosine_with_min_lr": lambda: schedules.cosine(
            *span, floor=least(), num_cycles=shape.num_cycles
        ),
        "cosine_warmup_with_min_lr": lambda: schedules.cosine_from(
            *span, first=shape.warmup_lr_rate, floor=least(), num_cycles=shape.num_cycles
        ),
        "warmup_stable_decay": stable_decay,
    }
    return made[config.name]()
