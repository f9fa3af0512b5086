"""The sections that say what is told of a run, and to whom."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxtrain.recipe.section import Section


def _no_folder(value: Any) -> Any:
    return None if value == "/dev/null" else value  # the shared format's way to say so


class LoggerConfig(Section):
    """Log files and what the screen shows."""

    output_dir: Annotated[str | None, BeforeValidator(_no_folder)] = None
    """Folder of the log files; `run_dir` when left out."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] | None = None
    """What the log shows; JAXTRAIN_LOG_LEVEL goes first, else WARNING."""
    print_output_ranks: tuple[int, ...] | Literal["*"] = (0,)
    """Processes that print."""
    file_output_ranks: tuple[int, ...] | Literal["*"] = "*"
    """Processes with a log file."""


class WandbConfig(Section):
    """Weights & Biases."""

    enable: bool = False
    entity: str | None = None
    project: str = "jaxtrain"
    name: str | None = None
    id: str | None = None
    """Run id; made at the first start and kept on resume when left out."""
    mode: Literal["online", "offline", "disabled"] | None = None


class TensorboardConfig(Section):
    """Event files for TensorBoard."""

    enable: bool = True
    dir: str | None = None
    """`run_dir/tensorboard` when left out."""

    @model_validator(mode="before")
    @classmethod
    def _a_word_is_enough(cls, value):
        return {"enable": value} if isinstance(value, bool) else value


class ProfileConfig(Section):
    """A trace of some updates."""

    start_step: int = Field(ge=0)
    """First update of the trace."""
    num_steps: int = Field(default=3, ge=1)
    dir: str | None = None
    """`run_dir/profile` when left out."""
