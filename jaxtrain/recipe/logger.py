"""The sections that say what is told of a run, and to whom."""

import os
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from jaxtrain.recipe.section import Section

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LEVELS: tuple[str, ...] = get_args(Level)
LEVEL_VARIABLES = ("JAXTRAIN_LOG_LEVEL", "AT_LOG_LEVEL")
Ranks = tuple[int, ...] | Literal["*"]


def _no_folder(value: Any) -> Any:
    return None if value == "/dev/null" else value  # the shared format's way to say so


class LoggerConfig(Section):
    """Log files and what the screen shows."""

    output_dir: Annotated[str | None, BeforeValidator(_no_folder)] = None
    """Folder of the log files; `run_dir` when left out."""
    level: Level | None = None
    """What the terminal shows of the log; the environment variable JAXTRAIN_LOG_LEVEL, AT_LOG_LEVEL
    or WARNING when left out. The log file has INFO in any case."""
    print_output_ranks: Ranks = (0,)
    """Numbers of the processes that print; `*` is all."""
    file_output_ranks: Ranks = "*"
    """Numbers of the processes with a log file; `*` is all."""

    def find_level(self) -> tuple[str, str]:
        """Where the level is said, and the level, which only a variable can have wrong."""
        said = ((name, os.environ.get(name, "").upper()) for name in LEVEL_VARIABLES)
        places = (("logger.level", self.level), *said, ("logger.level", "WARNING"))
        return next((where, level) for where, level in places if level)


def is_among(process: int, ranks: Ranks) -> bool:
    return ranks == "*" or process in ranks


class WandbConfig(Section):
    """Weights & Biases."""

    enable: bool = False
    entity: str | None = None
    project: str = "jaxtrain"
    name: str | None = None
    id: str | None = None
    """Run id; made at the first start and kept on resume when left out."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """`offline` keeps the run in `run_dir/wandb`, for `wandb sync`; `disabled` is as good as
    `enable: false`."""

    @property
    def is_on(self) -> bool:
        return self.enable and self.mode != "disabled"


class TensorboardConfig(Section):
    """Event files for TensorBoard."""

    enable: bool = True
    dir: str | None = None
    """`run_dir/tensorboard` when left out."""


def _switch(value: Any) -> Any:
    return {"enable": value} if isinstance(value, bool) else value


Tensorboard = Annotated[
    TensorboardConfig, BeforeValidator(_switch, json_schema_input_type=TensorboardConfig | bool)
]
"""The section, or true or false."""


class ProfileConfig(Section):
    """A trace of some updates, for TensorBoard's profile page or Perfetto."""

    start_step: int = Field(ge=0)
    """Updates that are done when the trace begins; 0 has the compilation in it."""
    num_steps: int = Field(default=3, ge=1)
    """Updates in the trace."""
    dir: str | None = None
    """`run_dir/profile` when left out."""
