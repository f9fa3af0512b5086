"""The `checkpoint` section: full state (orbax) and export (huggingface)."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from jaxtrain.recipe.errors import nearest_multiples
from jaxtrain.recipe.guards import Direction, metric_direction
from jaxtrain.recipe.section import InputPath, TypedSection, expand_user

PREFIX = "global_step_"
"""Of the folder of one checkpoint; the number of updates done follows."""

METRIC_NAMES = {"loss/eval": "eval/loss"}
"""Names of the shared format for metrics that have another name here."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B")


def parse_size(size: int | str) -> int:
    """Of a number, or of text such as `4GB`; ValueError where it has no unit."""
    if isinstance(size, int):
        return size
    match = SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"must be a size such as 4GB or 500MiB, found {size!r}")
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])))


def _size(value: Any) -> Any:
    if isinstance(value, int | str) and parse_size(value) < 1:
        raise ValueError(f"must be at least one byte, found {value}")
    return value


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
    metric: Annotated[str, AfterValidator(lambda name: METRIC_NAMES.get(name, name))] = "eval/loss"
    """What `best` is judged by."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Direction of `metric`."""

    def contradictions(self) -> Iterator[str]:
        if self.keeps_best and self.direction is None:
            yield f"cannot tell whether a smaller {self.metric} is better; write `mode`"
        keep, save = self.keep_every_n_steps, self.save_every_n_steps
        if keep and (not save or keep % save):
            use = f"; use {nearest_multiples(keep, save)}" if save else ""
            yield f"keep_every_n_steps {keep} is no multiple of save_every_n_steps {save}{use}"

    @property
    def keeps_best(self) -> bool:
        return self.enabled and self.keep_best_n > 0

    @property
    def direction(self) -> Direction | None:
        return metric_direction(self.metric, self.mode)

    @property
    def folder(self) -> Path:
        return expand_user(self.output_dir).absolute()

    @property
    def start(self) -> Path | None:
        """The checkpoint that the recipe names as its start."""
        return None

    @property
    def is_continued(self) -> bool:
        """Does the run add to what `output_dir` holds?"""
        return self.auto_resume or (self.start is not None and self.start.parent == self.folder)


class OrbaxConfig(CheckpointConfig):
    """The full state, from which a run continues."""

    async_save: bool = True
    """Write while training goes on; the same bytes as a blocking save."""
    save_model_only: bool | Literal["all_but_last"] = False
    """Leave out the optimizer, without which no run resumes: from every checkpoint, or from all but
    the newest."""
    reset: tuple[Literal["optimizer", "scheduler", "data", "callbacks", "early_stopping"], ...] = ()
    """Parts that a resume leaves as they start; a checkpoint that is saved after that has them."""
    on_corrupt: Literal["stop", "previous"] = "stop"
    """What a resume does when the newest checkpoint fails its check."""
    resume_from: Annotated[
        int | InputPath | None,
        BeforeValidator(lambda step: int(step) if str(step).isdecimal() else step),
    ] = None
    """This checkpoint, a step of `output_dir` or a folder, instead of the newest. With
    `auto_resume`, once: later starts continue what came of it."""

    @property
    def start(self) -> Path | None:
        if isinstance(self.resume_from, int):
            return self.folder / f"{PREFIX}{self.resume_from}"
        return expand_user(self.resume_from).absolute() if self.resume_from else None

    def contradictions(self) -> Iterator[str]:
        if self.reset and not self.auto_resume and self.resume_from is None:
            yield "reset: nothing is resumed; write auto_resume or resume_from as well"
        if self.auto_resume and self.save_model_only is True and "optimizer" not in self.reset:
            yield "auto_resume: weights alone cannot resume; write save_model_only: all_but_last"


class HFCheckpointConfig(CheckpointConfig):
    """A folder that `transformers` loads."""

    adapter: Literal["adapter", "merged", "both"] = "adapter"
    """What is written of a model with adapters."""
    verify_export: bool = True
    """Read the folder back and compare tensors, config and the logits of a small batch before it
    counts as saved."""
    max_shard_size: Annotated[int | str, BeforeValidator(_size)] = "4GB"
    """Largest weight file; a larger tensor has a file of its own."""

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    def contradictions(self) -> Iterator[str]:
        if self.auto_resume:
            yield "auto_resume: weights alone cannot resume, set it on an `orbax` entry"
