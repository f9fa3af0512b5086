"""The `checkpoint` section: full state (orbax) and export (huggingface)."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from jaxtrain.recipe.errors import nearest_multiples
from jaxtrain.recipe.guards import Direction, metric_direction
from jaxtrain.recipe.section import InputPath, Own, TypedSection, expand_user

PREFIX = "global_step_"
"""The name of a checkpoint's folder, before the number of its optimizer step."""

METRIC_NAMES = {"loss/eval": "eval/loss"}
"""Metric of the shared format → its name here."""
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B")


def parse_size(size: int | str) -> int:
    """Bytes of a number, or of text such as `4GB`; ValueError for text without a unit."""
    if isinstance(size, int):
        return size
    match = SIZE.fullmatch(size.strip())
    if match is None:
        raise ValueError(f"must be a size such as 4GB or 500MiB, found {size!r}")
    return int(Fraction(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2])))


def _check_size(value: Any) -> Any:
    if isinstance(value, int | str) and parse_size(value) < 1:
        raise ValueError(f"must be at least one byte, found {value}")
    return value


AdapterExport = Literal["adapter", "merged", "both"]
READ_AT_THE_START = ("type", "output_dir", "auto_resume", "resume_from", "reset", "on_corrupt")
"""Keys that a resume reads, also of an entry that saves nothing."""


class CheckpointConfig(TypedSection):
    """When checkpoints are saved, and which are kept."""

    output_dir: str = Field(min_length=1)
    """Folder in which checkpoints are written, as `global_step_N/`."""
    enabled: bool = True
    """Whether this entry saves anything."""
    auto_resume: bool = False
    """Continue from the newest checkpoint in `output_dir`; a fresh start when there is none."""
    save_every_n_steps: int = Field(default=0, ge=0)
    """Optimizer steps between saves; 0 is none."""
    save_every_n_epochs: int = Field(default=0, ge=0)
    """Epochs between saves; 0 is none."""
    save_after_step: Own[int] = Field(default=0, ge=0)
    """First optimizer step with a periodic save."""
    save_end_of_training: bool = False
    """Save after the last optimizer step."""
    keep_last_n: Own[int | None] = Field(default=None, ge=1)
    """Number of newest checkpoints to keep; all when left out."""
    keep_best_n: Own[int] = Field(default=0, ge=0)
    """Number of best checkpoints to keep besides the newest."""
    keep_every_n_steps: Own[int] = Field(default=0, ge=0)
    """Keep the checkpoints of every n-th optimizer step for ever; 0 is none."""
    metric: Own[Annotated[str, AfterValidator(lambda name: METRIC_NAMES.get(name, name))]] = (
        "eval/loss"
    )
    """Metric that `keep_best_n` compares."""
    mode: Own[Literal["auto", "min", "max"]] = "auto"
    """Whether a smaller (`min`) or larger (`max`) `metric` is better; by its name with `auto`."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.keeps_best and self.direction is None:
            yield "mode", f"cannot tell whether a smaller {self.metric} is better; write min or max"
        keep, save = self.keep_every_n_steps, self.save_every_n_steps
        if keep and (not save or keep % save):
            use = f"; use {nearest_multiples(keep, save)}" if save else ""
            yield "keep_every_n_steps", f"{keep} is no multiple of save_every_n_steps {save}{use}"

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.enabled:
            resumes = self.auto_resume or self.start is not None
            used = ("enabled", *(READ_AT_THE_START if resumes else ()))
            for key in type(self).model_fields.keys() - {*used}:
                yield key, "`enabled: false` turns the entry off"
        if not self.keep_best_n:
            yield from ((key, "only `keep_best_n` reads it") for key in ("metric", "mode"))
        if not (self.save_every_n_steps or self.save_every_n_epochs):
            yield "save_after_step", "no save is periodic"

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
        """The checkpoint from which the recipe asks to start."""
        return None

    @property
    def is_continued(self) -> bool:
        """Whether the run adds to the checkpoints in `output_dir`."""
        return self.auto_resume or (self.start is not None and self.start.parent == self.folder)


class OrbaxConfig(CheckpointConfig):
    """The full state, from which a run resumes."""

    async_save: Own[bool] = True
    """Write while training continues; the same bytes as a blocking save."""
    save_model_only: Own[bool | Literal["all_but_last"]] = False
    """Leave out the optimizer, without which no run resumes, of every checkpoint (true) or of all
    but the newest (`all_but_last`)."""
    reset: Own[
        tuple[Literal["optimizer", "scheduler", "data", "callbacks", "early_stopping"], ...]
    ] = ()
    """Parts of the state that a resume does not restore."""
    on_corrupt: Own[Literal["stop", "previous"]] = "stop"
    """What a resume does when the newest checkpoint is damaged: stop, or use the one before."""
    resume_from: Own[
        Annotated[
            int | InputPath | None,
            BeforeValidator(lambda step: int(step) if str(step).isdecimal() else step),
        ]
    ] = None
    """Resume from this checkpoint, a step of `output_dir` or a folder, instead of the newest. With
    `auto_resume` only the first start does so, and later ones resume from the newest."""

    @property
    def start(self) -> Path | None:
        if isinstance(self.resume_from, int):
            return self.folder / f"{PREFIX}{self.resume_from}"
        return expand_user(self.resume_from).absolute() if self.resume_from else None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.reset and not self.auto_resume and self.resume_from is None:
            yield "reset", "nothing is resumed; write auto_resume or resume_from as well"
        if self.auto_resume and self.save_model_only is True and "optimizer" not in self.reset:
            yield "auto_resume", "weights alone cannot resume; write save_model_only: all_but_last"


class HFCheckpointConfig(CheckpointConfig):
    """A folder that `transformers` loads."""

    adapter: Own[AdapterExport] = "adapter"
    """What is written of a model with adapters: `adapter`, a folder of PEFT beside which the base
    stays needed; `merged`, a model as any other; `both`, the latter in `merged/` of the former."""
    verify_export: Own[bool] = True
    """Read the folder back and compare tensors, config and the logits of a small batch before it
    counts as saved."""
    max_shard_size: Own[Annotated[int | str, BeforeValidator(_check_size)]] = "4GB"
    """Maximum size of a weight file; a larger tensor gets its own file."""

    @property
    def max_shard_bytes(self) -> int:
        return parse_size(self.max_shard_size)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.auto_resume:
            yield "auto_resume", "weights alone cannot resume; set it on an `orbax` entry"
