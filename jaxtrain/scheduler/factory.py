"""From the `scheduler` section to a schedule."""

from typing import Any

from jaxtrain.recipe.errors import Fault, RecipeError, did_you_mean
from jaxtrain.recipe.optimizer import HFSchedulerConfig, WSDSchedulerConfig
from jaxtrain.registry import Factory
from jaxtrain.scheduler import schedules
from jaxtrain.scheduler.schedules import Schedule as Schedule

SPECIFIC = {
    "cosine": ("num_cycles",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "decay_type", "min_lr_ratio", "num_cycles"
    ),
}  # fmt: skip
"""Keys of `scheduler_specific_kwargs` by schedule name."""


class SchedulerFactory(Factory, kind="scheduler"):
    """Makes the schedule; `self.trainer` has `training_horizon` and `warmup_steps`, in updates."""

    events = {"create-scheduler": "create_scheduler"}

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
            self.config, horizon=self.trainer.training_horizon, warmup=self.trainer.warmup_steps
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


def hf_schedule(config: HFSchedulerConfig, *, horizon: int, warmup: int) -> Schedule:
    """The schedule of a recipe over `horizon` updates; RecipeError for a key that it does not
    have."""
    extra = dict(config.scheduler_specific_kwargs)
    known = SPECIFIC.get(config.name, ())
    if faults := [
        Fault(
            f"scheduler.scheduler_specific_kwargs.{key}",
            f"unknown key of {config.name!r}{did_you_mean(key, known)} (known: {', '.join(known) or 'none'})",
        )
        for key in extra
        if key not in known
    ]:
        raise RecipeError(faults)
    floor = extra.pop("min_lr_ratio", config.min_lr_ratio)
    match config.name:
        case "constant":
            return schedules.constant()
        case "constant_with_warmup":
            return schedules.constant_with_warmup(warmup)
        case "linear":
            return schedules.linear(horizon, warmup, floor=floor)
        case "cosine":
            return schedules.cosine(horizon, warmup, floor=floor, **extra)
        case "warmup_stable_decay":
            if "num_decay_steps" not in extra:
                raise RecipeError(
                    "scheduler.scheduler_specific_kwargs: warmup_stable_decay needs num_decay_steps"
                )
            decay = extra.pop("num_decay_steps")
            stable = extra.pop("num_stable_steps", max(0, horizon - warmup - decay))
            return schedules.warmup_stable_decay(warmup, stable, decay, floor=floor, **extra)
