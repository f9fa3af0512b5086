"""The `checkpoint` section: full state (orbax) and export (huggingface)."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxtrain.recipe.errors import nearest_multiples
from jaxtrain.recipe.guards import Direction, direction
from jaxtrain.recipe.section import TypedSection

METRIC_NAMES = {"loss/eval": "eval/loss"}
"""Names of the shared format for metrics that have another name here."""


def _metric(value: Any) -> Any:
    return METRIC_NAMES.get(value, value) if isinstance(value, str) else value


def _size(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", value.strip()):
        raise ValueError(f"must be a size such as 4GB or 500MiB, found {value!r}")
    return value


Metric = Annotated[str, BeforeValidator(_metric)]


class CheckpointConfig(TypedSection):
    """When an engine writes, and what it keeps."""

    output_dir: str = Field(min_length=1)
    """Folder of `global_step_N/`."""
    enabled: bool = True
    auto_resume: bool = False
    """Continue from the newest checkpoint in `output_dir`; a fresh start when there is none."""
    save_every_n_steps: int = Field(default=0, ge=0)
    save_every_n_epochs: int = Field(default=0, ge=0)
    save_after_step: int = Field(default=0, ge=0)
    """No periodic save before it."""
    save_end_of_training: bool = False
    keep_last_n: int | None = Field(default=None, ge=1)
    """Newest ones kept; all when left out."""
    keep_best_n: int = Field(default=0, ge=0)
    """Best ones kept besides the newest."""
    keep_every_n_steps: int = Field(default=0, ge=0)
    """These are kept for ever."""
    metric: Metric = "eval/loss"
    """What `best` is judged by."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Direction of `metric`."""

    @model_validator(mode="after")
    def _direction_is_known(self) -> "CheckpointConfig":
        if self.keep_best_n and self.mode == "auto" and self.direction is None:
            raise ValueError(f"cannot tell whether a smaller {self.metric} is better; write `mode`")
        return self

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> "CheckpointConfig":
        keep, save = self.keep_every_n_steps, self.save_every_n_steps
        if keep and (not save or keep % save):
            use = f"; use {nearest_multiples(keep, save)}" if save else ""
            raise ValueError(
                f"keep_every_n_steps {keep} is no multiple of save_every_n_steps {save}{use}"
            )
        return self

    @property
    def direction(self) -> Direction | None:
        return direction(self.metric, self.mode)


class OrbaxConfig(CheckpointConfig):
    """The full state, from which a run continues."""

    async_save: bool = True
    """Write while training goes on; the same bytes as a blocking save."""
    save_model_only: bool | Literal["all_but_last"] = False
    """Leave out what resuming needs, from every checkpoint or from all but the newest."""
    reset: tuple[Literal["optimizer", "scheduler", "data", "callbacks", "early_stopping"], ...] = ()
    """Parts that a resume leaves as they start."""
    on_corrupt: Literal["stop", "previous"] = "stop"
    """What a resume does when the newest checkpoint fails its check."""
    resume_from: int | str | None = None
    """This checkpoint, a step or a folder, instead of the newest."""


class HFCheckpointConfig(CheckpointConfig):
    """A folder that `transformers` loads."""

    adapter: Literal["adapter", "merged", "both"] = "adapter"
    """What is written of a model with adapters."""
    verify_export: bool = False
    """Read the folder back and compare it before it counts as saved."""
    max_shard_size: Annotated[int | str, BeforeValidator(_size)] = "4GB"
    """Largest weight file."""

    @model_validator(mode="after")
    def _weights_cannot_resume(self) -> "HFCheckpointConfig":
        if self.auto_resume:
            raise ValueError("auto_resume: weights alone cannot resume, set it on an `orbax` entry")
        return self
