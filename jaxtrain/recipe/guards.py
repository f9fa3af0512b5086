"""The sections that watch a run, and end, average or sample it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from jaxtrain.recipe.errors import show
from jaxtrain.recipe.section import Section, resolve_input_path

Direction = Literal["min", "max"]
_DIRECTIONS: dict[str, Direction] = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}


def metric_direction(metric: str, mode: Literal["auto", "min", "max"]) -> Direction | None:
    """Which way a metric gets better; None when neither `mode` nor its name says so."""
    return _DIRECTIONS.get(metric.rsplit("/", 1)[-1]) if mode == "auto" else mode


class EarlyStoppingConfig(Section):
    """End the run when a metric stops getting better."""

    metric: str = "eval/loss"
    patience: int = Field(ge=1)
    """Evaluations without a better value."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smaller gains do not count."""
    mode: Literal["auto", "min", "max"] = "auto"


class DivergenceConfig(Section):
    """Compare a short with a long exponential average of the loss."""

    short_alpha: float = Field(default=0.1, gt=0, le=1)
    long_alpha: float = Field(default=0.01, gt=0, le=1)
    threshold: float = Field(default=2.0, gt=0)
    metric: str = "loss"
    action: Literal["warn", "stop", "rollback"] = "warn"


class EmaConfig(Section):
    """Averaged weights."""

    decay: float = Field(ge=0, le=1)
    start_step: int = Field(default=0, ge=0)
    eval: bool = True
    """Evaluate and export the average, not the raw weights."""


def _lines(value: Any, info: ValidationInfo) -> Any:
    """The lines of a file that are not empty, in place of its name."""
    if not isinstance(value, str):
        return value
    file = Path(resolve_input_path(value, info))
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        raise ValueError(f"must be a list or a text file, found {show(value)}") from None


class SamplesConfig(Section):
    """Answers generated at evaluations."""

    prompts: Annotated[
        tuple[str, ...],
        BeforeValidator(_lines),
        WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}}),
    ] = Field(min_length=1)
    """What the user says, or a file with a prompt a line."""
    system: str | None = None
    """System message before each of them."""
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    every_n_evals: int = Field(default=1, ge=1)
