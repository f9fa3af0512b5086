"""The `checkpoint` section: full state (orbax) and export (huggingface)."""

from typing import Literal

from pydantic import Field, model_validator

from jaxtrain.recipe.section import TypedSection


class CheckpointConfig(TypedSection):
    """When an engine writes, and what it keeps."""

    output_dir: str = Field(min_length=1)
    """Folder of `global_step_N/`."""
    enabled: bool = True
    auto_resume: bool = False
    """Continue from the newest checkpoint in `output_dir`; a fresh start when there is none."""
    save_every_n_steps: int = Field(default=0, ge=0)
    save_every_n_epochs: int = Field(default=0, ge=0)
    save_end_of_training: bool = False
    keep_last_n: int | None = Field(default=None, ge=1)
    """Newest ones kept; all when left out."""
    keep_best_n: int = Field(default=0, ge=0)
    """Best ones kept besides the newest."""
    metric: str = "eval/loss"
    """What `best` is judged by."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Direction of `metric`."""

    @model_validator(mode="after")
    def _direction_is_known(self) -> "CheckpointConfig":
        if self.keep_best_n and self.mode == "auto" and self.direction is None:
            raise ValueError(f"cannot tell whether a smaller {self.metric} is better; write `mode`")
        return self

    @property
    def direction(self) -> Literal["min", "max"] | None:
        if self.mode != "auto":
            return self.mode
        known = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}
        return known.get(self.metric.rsplit("/", 1)[-1])  # type: ignore[return-value]


class OrbaxConfig(CheckpointConfig):
    async_save: bool = True
    """Write while training goes on; the same bytes as a blocking save."""


class HFCheckpointConfig(CheckpointConfig):
    @model_validator(mode="after")
    def _weights_cannot_resume(self) -> "HFCheckpointConfig":
        if self.auto_resume:
            raise ValueError("weights alone cannot resume, set auto_resume on an `orbax` entry")
        return self
