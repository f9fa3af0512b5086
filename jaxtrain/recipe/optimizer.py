"""The `optimizer` and `scheduler` sections."""

from typing import Any, Literal

from pydantic import AliasChoices, Field, model_validator

from jaxtrain.recipe.section import TypedSection


class OptimizerConfig(TypedSection):
    learning_rate: float = Field(
        default=5e-4, ge=0, validation_alias=AliasChoices("learning_rate", "lr")
    )
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on norms and biases."""


class AdamWConfig(OptimizerConfig):
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)

    @model_validator(mode="after")
    def _betas_in_range(self) -> "AdamWConfig":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), found {list(self.betas)}")
        return self


class SchedulerConfig(TypedSection):
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of the run's updates over which the rate rises; 0.1 when neither key is written."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """The same in updates."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the rate ends, as a share of the peak."""

    @model_validator(mode="after")
    def _one_warmup_key(self) -> "SchedulerConfig":
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("warmup_ratio and warmup_steps exclude each other; remove one")
        return self


class HFSchedulerConfig(SchedulerConfig):
    name: Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"] = (
        "linear"
    )
    """Shape of the schedule, as `transformers` names it."""
    scheduler_specific_kwargs: dict[str, Any] = {}
    """Further keys of the shape: `num_cycles` of cosine; `num_decay_steps`, `num_stable_steps`,
    `decay_type` of warmup_stable_decay."""


class WSDSchedulerConfig(SchedulerConfig):
    """Warm up, stay, decay."""

    num_warmup_steps: int = Field(ge=0)
    num_decay_steps: int = Field(ge=1)
