"""From the `scheduler` section to a schedule."""

from typing import Any

import jax.numpy as jnp

from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.scheduler import HFSchedulerConfig, SchedulerConfig, WSDSchedulerConfig
from jaxtrain.registry import Factory
from jaxtrain.scheduler import schedules
from jaxtrain.scheduler.schedules import Schedule as Schedule


class SchedulerFactory(Factory, kind="scheduler"):
    events = {"create-scheduler": "create_scheduler"}
    config: SchedulerConfig
    training_horizon: int = 0
    """Steps from the start of the schedule to the end of the run, of which the learning rate rises
    over the first `warmup_steps`."""
    warmup_steps: int = 0

    def create_scheduler(self, optimizer: Any) -> Schedule:
        """A function from the step (from 0) to a fraction of the peak learning rate."""
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
            horizon=self.training_horizon,
            warmup=self.warmup_steps,
            peak_lr=optimizer.learning_rate,
        )


class WSDSchedulerFactory(SchedulerFactory):
    """Warm up, stay, decay by a cosine, with the lengths written out."""

    name = "wsd"
    config: WSDSchedulerConfig

    def create_scheduler(self, optimizer: Any) -> Schedule:
        warmup, decay = self.config.num_warmup_steps, self.config.num_decay_steps
        stable = self.training_horizon - warmup - decay
        if stable < 0:
            raise RecipeError(
                f"scheduler: num_warmup_steps {warmup} and num_decay_steps {decay} are longer than "
                f"the run of {self.training_horizon} steps"
            )
        return schedules.warmup_stable_decay(
            warmup, stable, decay, floor=self.config.min_lr_ratio, decay_type="cosine"
        )


def hf_schedule(
    config: HFSchedulerConfig, *, horizon: int, warmup: int, peak_lr: float
) -> Schedule:
    """The schedule of a recipe over `horizon` steps."""
    shape, floor, span = config.shape, config.min_lr_ratio, (horizon, warmup)
    as_share = lambda rate: rate / peak_lr if peak_lr else 0.0
    if "min_lr_rate" in type(shape).model_fields:
        floor = as_share(shape.min_lr) if shape.min_lr_rate is None else shape.min_lr_rate
    match config.name:
        case "linear":
            return schedules.decay(schedules.polynomial(), *span, floor=floor)
        case "cosine" | "cosine_with_min_lr":
            return schedules.decay(schedules.cosine(shape.num_cycles), *span, floor=floor)
        case "cosine_with_restarts":
            return schedules.decay(schedules.cosine_restarts(shape.num_cycles), *span)
        case "polynomial":
            floor = floor or min(1.0, as_share(shape.lr_end))
            return schedules.decay(schedules.polynomial(shape.power), *span, floor=floor)
        case "inverse_sqrt":
            return schedules.inverse_sqrt(warmup, shape.timescale or warmup or 10_000)
        case "cosine_warmup_with_min_lr":
            return schedules.cosine_from_initial_rate(
                *span, first=shape.warmup_lr_rate, floor=floor, num_cycles=shape.num_cycles
            )
        case "warmup_stable_decay":
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
    return schedules.decay(jnp.ones_like, *span)  # constant, of which one has a warm-up
