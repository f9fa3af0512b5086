"""The sections `early_stopping`, `divergence`, `ema` and `eval_samples`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema

from jaxtrain.recipe.errors import show
from jaxtrain.recipe.section import Section, resolve_input_path

Direction = Literal["min", "max"]
EVAL_METRICS: dict[str, Direction] = {"loss": "min", "perplexity": "min", "token_accuracy": "max"}
"""Metrics of every evaluation of a built-in trainer, with the direction in which they improve."""


def metric_direction(metric: str, mode: Literal["auto", "min", "max"]) -> Direction | None:
    """The direction in which a metric improves; None when neither `mode` nor its name says so."""
    return EVAL_METRICS.get(metric.rsplit("/", 1)[-1]) if mode == "auto" else mode


class EarlyStoppingConfig(Section):
    """End the run when a metric stops improving."""

    metric: str = "eval/loss"
    """Metric of the evaluations."""
    patience: int = Field(ge=1)
    """Evaluations without improvement before the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as an improvement."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether a smaller (`min`) or larger (`max`) `metric` is better; by its name with `auto`."""


class DivergenceConfig(Section):
    """Compare a short with a long exponential average of the loss."""

    short_alpha: float = Field(default=0.1, gt=0, le=1)
    """Weight of the newest value in the short average."""
    long_alpha: float = Field(default=0.01, gt=0, le=1)
    """Weight of the newest value in the long average."""
    threshold: float = Field(default=2.0, gt=0)
    """Ratio of the short to the long average above which the loss diverges."""
    metric: str = "loss"
    """Metric of the training steps."""
    action: Literal["warn", "stop", "rollback"] = "warn"
    """What happens then; `rollback` returns to the newest checkpoint."""


class EmaConfig(Section):
    """Exponential moving average of the weights."""

    decay: float = Field(ge=0, le=1)
    """Weight of the average so far at each step."""
    start_step: int = Field(default=0, ge=0)
    """Optimizer step at which the average begins."""
    eval: bool = True
    """Evaluate and export the average, not the raw weights."""


def _read_lines(value: Any, info: ValidationInfo) -> Any:
    """Replaces a file's name by its non-empty lines."""
    if not isinstance(value, str):
        return value
    file = Path(resolve_input_path(value, info))
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
        raise ValueError(f"must be a list or a text file, found {show(value)}") from None


class SamplesConfig(Section):
    """Replies generated at evaluations."""

    prompts: Annotated[
        tuple[str, ...],
        BeforeValidator(_read_lines),
        WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}}),
    ] = Field(min_length=1)
    """User messages, or a file with one per line."""
    system: str | None = None
    """System message before each prompt."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Maximum length of a reply."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature; 0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together."""
    every_n_evals: int = Field(default=1, ge=1)
    """Evaluations between samples."""

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.temperature:
            yield "top_p", "temperature 0 takes the likeliest token each time"
