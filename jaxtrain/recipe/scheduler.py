"""The `scheduler` section."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field, ValidationError, model_validator

from jaxtrain.recipe.load import join_key
from jaxtrain.recipe.messages import explain
from jaxtrain.recipe.section import (
    Own,
    Section,
    TypedSection,
    contradiction,
    refused_when_on,
)


class CosineKeys(Section):
    num_cycles: float = Field(default=0.5, ge=0)


class RestartKeys(Section):
    num_cycles: int = Field(default=1, ge=1)


class PolynomialKeys(Section):
    lr_end: float = Field(default=1e-7, ge=0)
    power: float = Field(default=1.0, gt=0)


class InverseSqrtKeys(Section):
    timescale: int | None = Field(default=None, ge=1)


class CosineMinKeys(CosineKeys):
    min_lr: float | None = Field(default=None, ge=0)
    min_lr_rate: float | None = Field(default=None, ge=0, le=1)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            yield "", "needs one of min_lr and min_lr_rate"


class CosineWarmupMinKeys(CosineMinKeys):
    warmup_lr_rate: float | None = Field(default=None, ge=0, le=1)


class WarmupStableDecayKeys(CosineKeys):
    num_decay_steps: int = Field(ge=1)
    num_stable_steps: int | None = Field(default=None, ge=0)
    warmup_type: Literal["linear", "cosine", "1-sqrt"] = "linear"
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "cosine"
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)


SHAPES: dict[str, type[Section]] = {
    "linear": Section,
    "constant": Section,
    "constant_with_warmup": Section,
    "cosine": CosineKeys,
    "cosine_with_restarts": RestartKeys,
    "polynomial": PolynomialKeys,
    "inverse_sqrt": InverseSqrtKeys,
    "cosine_with_min_lr": CosineMinKeys,
    "cosine_warmup_with_min_lr": CosineWarmupMinKeys,
    "warmup_stable_decay": WarmupStableDecayKeys,
}
"""Schedule name → its keys in `scheduler_specific_kwargs`."""
WITH_FLOOR = ("linear", "cosine", "polynomial", "warmup_stable_decay")
"""Schedules that `min_lr_ratio` applies to."""


class SchedulerConfig(TypedSection):
    learning_rate: Annotated[Any, refused_when_on("use `optimizer.learning_rate`", None)] = Field(
        default=None, validation_alias=AliasChoices("learning_rate", "lr"), exclude=True
    )
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the run over which the learning rate rises; 0.1 when neither it nor
    `warmup_steps` is written."""
    warmup_steps: Own[int | None] = Field(default=None, ge=0)
    """Optimizer steps over which the learning rate rises."""
    min_lr_ratio: Own[float] = Field(default=0.0, ge=0, le=1)
    """Final learning rate, as a fraction of the peak."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            yield "warmup_ratio", "excludes warmup_steps; remove one"

    def warmup_updates(self, horizon: int) -> int:
        """Optimizer steps of warm-up in a run of `horizon` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return int((0.1 if self.warmup_ratio is None else self.warmup_ratio) * horizon)


class HFSchedulerConfig(SchedulerConfig):
    """The schedules of `transformers`."""

    name: Literal[
        "linear", "constant", "constant_with_warmup", "cosine", "cosine_with_restarts",
        "polynomial", "inverse_sqrt", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"  # fmt: skip
    """Shape of the schedule."""
    scheduler_specific_kwargs: dict[str, Any] = {}
    """Further keys of the schedule."""

    @model_validator(mode="before")
    @classmethod
    def _plateau_needs_a_metric(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name") == "reduce_lr_on_plateau":
            what = "reduce_lr_on_plateau needs a metric, which a recipe cannot name"
            raise contradiction("name", f"{what}; use one of {', '.join(SHAPES)}")
        return values

    def contradictions(self) -> Iterator[tuple[str, str]]:
        try:
            shape = self.shape
        except ValidationError as error:
            cls = SHAPES[self.name]
            known = f"; keys of {self.name!r}: {', '.join(cls.model_fields) or 'none'}"
            (loc, what), *_ = explain(error, cls, lambda key: known)
            yield join_key(("scheduler_specific_kwargs", *loc)), what
            return
        if self.min_lr_ratio and self.name not in WITH_FLOOR:
            known = ", ".join(WITH_FLOOR)
            yield "min_lr_ratio", f"has no meaning for {self.name!r}; use one of {known}"
        inner = shape.min_lr_ratio if isinstance(shape, WarmupStableDecayKeys) else None
        if "min_lr_ratio" in self.model_fields_set and inner not in (None, self.min_lr_ratio):
            yield "min_lr_ratio", "is written twice, differently; remove one"

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.name == "constant":
            for key in ("warmup_ratio", "warmup_steps"):
                yield key, "`constant` has no warm-up, as upstream"

    @property
    def shape(self) -> Any:
        """`scheduler_specific_kwargs`, typed."""
        return SHAPES[self.name].model_validate(self.scheduler_specific_kwargs)

    def warmup_updates(self, horizon: int) -> int:
        return 0 if self.name == "constant" else super().warmup_updates(horizon)


class WSDSchedulerConfig(SchedulerConfig):
    """Linear warm-up, constant learning rate, decay by a cosine."""

    num_warmup_steps: int = Field(ge=0)
    """Optimizer steps of warm-up."""
    num_decay_steps: int = Field(ge=1)
    """Optimizer steps of decay, at the end of the run."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for key in ("warmup_steps", "warmup_ratio"):
            if getattr(self, key) is not None:
                yield key, "the warm-up is num_warmup_steps here; remove it"

    def warmup_updates(self, horizon: int) -> int:
        return self.num_warmup_steps
