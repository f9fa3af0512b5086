"""The sections `logger`, `wandb`, `tensorboard` and `profile`."""

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from jaxtrain.recipe.errors import show
from jaxtrain.recipe.section import Own, Section

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
LEVELS: tuple[str, ...] = get_args(Level)
LEVEL_VARIABLES = ("JAXTRAIN_LOG_LEVEL", "AT_LOG_LEVEL")
Ranks = tuple[int, ...] | Literal["*"]


def _read_folder(value: Any) -> Any:
    return None if value == "/dev/null" else value  # as the shared format writes it


class LoggerConfig(Section):
    """Log files and what the terminal shows."""

    output_dir: Annotated[str | None, BeforeValidator(_read_folder)] = None
    """Folder of the log files; `run_dir` when left out."""
    level: Level | None = None
    """Lowest level that the terminal shows; the environment variable JAXTRAIN_LOG_LEVEL or
    AT_LOG_LEVEL, else WARNING, when left out. The log file always has INFO."""
    print_output_ranks: Ranks = (0,)
    """Ranks of the processes that print; `*` is all."""
    file_output_ranks: Ranks = "*"
    """Ranks of the processes with a log file; `*` is all."""

    def idle(self) -> Iterator[tuple[str, str]]:
        for key in ("print_output_ranks", "file_output_ranks"):
            ranks = getattr(self, key)
            if ranks != "*" and any(ranks):
                yield key, f"{show([*ranks])}: a rank is a process here, and most runs have one"

    def find_level(self) -> tuple[str, str]:
        """Returns where the level is written, and the level; one of a variable may be invalid."""
        variables = ((name, os.environ.get(name, "").upper()) for name in LEVEL_VARIABLES)
        places = (("logger.level", self.level), *variables, ("logger.level", "WARNING"))
        return next((where, level) for where, level in places if level)


def is_among(process: int, ranks: Ranks) -> bool:
    return ranks == "*" or process in ranks


class WandbConfig(Section):
    """Weights & Biases."""

    enable: bool = False
    """Log the run to Weights & Biases."""
    entity: str | None = None
    """User or team; the account's default when left out."""
    project: str = "jaxtrain"
    """Project of the run."""
    name: str | None = None
    """Name of the run; chosen by Weights & Biases when left out."""
    id: Own[str | None] = None
    """Run id; created at the first start and kept on resume when left out."""
    mode: Own[Literal["online", "offline", "disabled"] | None] = None
    """`offline` keeps the run in `run_dir/wandb`, for `wandb sync`; `disabled` is the same as
    `enable: false`."""

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.is_on:
            why = "`mode: disabled` turns it off"
            if not self.enable:
                yield "mode", (why := "only `wandb.enable: true` would use it")
            yield from ((key, why) for key in ("entity", "project", "name", "id"))

    @property
    def is_on(self) -> bool:
        return self.enable and self.mode != "disabled"


class TensorboardConfig(Section):
    """Event files for TensorBoard."""

    enable: bool = True
    """Write event files."""
    dir: str | None = None
    """Folder of the event files; `run_dir/tensorboard` when left out."""

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.enable:
            yield "dir", "only `tensorboard.enable: true` would use it"


def _as_section(value: Any) -> Any:
    return {"enable": value} if isinstance(value, bool) else value


Tensorboard = Annotated[
    TensorboardConfig,
    BeforeValidator(_as_section, json_schema_input_type=TensorboardConfig | bool),
]
"""A section, true or false."""


class ProfileConfig(Section):
    """A profile of some optimizer steps, for TensorBoard's profile page or Perfetto."""

    start_step: int = Field(ge=0)
    """Optimizer steps before the profile begins; with 0 it includes compilation."""
    num_steps: int = Field(default=3, ge=1)
    """Optimizer steps in the profile."""
    dir: str | None = None
    """Folder of the profile; `run_dir/profile` when left out."""
