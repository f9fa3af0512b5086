"""What every checkpoint engine does: decide when to save, where, and what to keep."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import jax

from jaxtrain.checkpoint.compatibility import Identity
from jaxtrain.checkpoint.retention import ranked, retained
from jaxtrain.files import discard, write_atomically
from jaxtrain.recipe.checkpoint import PREFIX, CheckpointConfig
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.registry import Factory

METADATA = "metadata.json"
UNFINISHED = f".{PREFIX}"
"""Begins the name of a folder that is being written or removed; never that of a checkpoint."""


class SavePoint(NamedTuple):
    """Where a run is when a save is considered."""

    step: int
    """steps done"""
    epoch_ended: int
    """number of the epoch that ended with this step, from 1; 0 when none did"""
    training_ended: bool
    requested: bool = False
    """somebody asked for full state here"""


class Snapshot(NamedTuple):
    """What an engine saves."""

    step: int
    state: Any
    """the arrays, as a `TrainState`"""
    metadata: dict[str, Any]
    """what is kept beside them; JSON data"""
    export: Callable[[Path], Any]
    """writes the weights to a folder that `transformers` loads"""


class CheckpointEngine(Factory, kind="checkpoint"):
    """Writes `output_dir/global_step_N/` after N steps. A directory has that name only while it
    is complete."""

    events = {"load": "load", "save": "save"}
    is_full_state: bool = False
    """A run can be resumed from it."""
    config: CheckpointConfig
    identify: Callable[[], Identity]
    """What the run is compared by with the one that it resumes."""
    say: Callable[[str], None] = print
    """Prints a line for the person."""

    def __init__(self, config: CheckpointConfig, trainer: Any = None):
        super().__init__(config, trainer)
        self.directory = config.folder
        self.last_saved = -1
        """The step that was saved or restored last: nothing is new in it."""
        self.restored: dict[str, Any] = {}
        """Metadata of the checkpoint that `load` has read."""
        self.resets: tuple[str, ...] = ()
        """Parts of it that are to start anew."""

    def save(self, model: Snapshot) -> None:
        """Write one checkpoint at `self.path(model.step)`, complete or not at all."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no save(model)")

    def load(self, model: Any) -> Any:
        """The newest checkpoint's state, placed like `model`, a tree of shapes with shardings."""
        raise CheckpointError(f"checkpoint type {self.name!r} cannot resume a run")

    def poll(self) -> None:
        """Raises what went wrong in the background so far."""

    def wait(self) -> None:
        """Return when everything saved is on disk; raises what went wrong in the background."""

    def write_error(self, step: int, error: Exception) -> CheckpointError:
        """What is raised for a save that failed; nothing is left of it."""
        for left in self.directory.glob(f"{UNFINISHED}{step}.*"):
            discard(left)
        steps = self.steps()
        kept = f"the newest checkpoint there is {PREFIX}{steps[-1]}" if steps else "none is there"
        return CheckpointError(f"{self.path(step)} cannot be written: {_reason(error)}; {kept}")

    def is_due(self, save_point: SavePoint) -> bool:
        """Does the recipe ask for a save here? Never twice for one step."""
        config, step, ended = self.config, save_point.step, save_point.epoch_ended
        if not config.enabled or step == self.last_saved:
            return False
        by_step = config.save_every_n_steps and step % config.save_every_n_steps == 0
        by_epoch = ended and config.save_every_n_epochs and ended % config.save_every_n_epochs == 0
        periodic = (by_step or by_epoch) and step >= max(config.save_after_step, 1)
        at_end = save_point.training_ended and config.save_end_of_training
        return bool(periodic or at_end or (save_point.requested and self.is_full_state))

    @property
    def do_checkpoint(self) -> bool:
        """Is a save due where the run is? May be overridden."""
        return self.is_due(self.trainer.save_point)

    @property
    def checkpoint_dir(self) -> Path:
        """Where a save at this step goes."""
        return self.path(self.trainer.global_step)

    @property
    def latest_checkpoint_exists(self) -> bool:
        return self.latest() is not None

    @property
    def epoch_finished(self) -> bool:
        return self.trainer.epoch_finished

    @property
    def training_finished(self) -> bool:
        return self.trainer.training_finished

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        found = (re.fullmatch(rf"{PREFIX}(0|[1-9][0-9]*)", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.directory / f"{PREFIX}{step}"

    def latest(self) -> int | None:
        """The newest complete checkpoint by its number, whatever its files' times say."""
        return max(self.steps(), default=None)

    @property
    def start_path(self) -> Path | None:
        """What `load` reads; None when there is nothing."""
        return self.path(self.steps()[-1]) if self.steps() else None

    def best(self) -> int | None:
        """The complete checkpoint with the best score, None without scores."""
        order = ranked(self.steps(), self.scores(), self.config.direction or "min")
        return order[0] if order else None

    def metadata(self, step: int) -> dict[str, Any]:
        """What the trainer's `metadata` was, nothing if the engine keeps none; CheckpointError when
        it cannot be read."""
        return read_metadata(self.path(step))

    def scores(self) -> dict[int, float]:
        """Score of each step that was evaluated, of deleted and unsaved ones too."""
        file = self.directory / "scores.json"
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text())
            return {int(step): float(score) for step, score in found.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); remove it") from None

    def note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember what this step is worth; beside the checkpoints, so that it outlives a
        restart."""
        if self.config.enabled and self.config.metric in metrics:
            self._write_scores(self.scores() | {step: float(metrics[self.config.metric])})

    def _write_scores(self, scores: dict[int, float]) -> None:
        if jax.process_index() > 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / "scores.json", json.dumps(scores))

    def retained(self, steps: list[int]) -> set[int]:
        return retained(
            steps,
            self.scores(),
            keep_last_n=self.config.keep_last_n,
            keep_best_n=self.config.keep_best_n,
            keep_every_n_steps=self.config.keep_every_n_steps,
            mode=self.config.direction or "min",
        )

    def delete_surplus(self, newest: int) -> None:
        """Remove what retention does not keep; called when step `newest` is complete. Later ones
        are not yet overwritten, and stay till then."""
        steps = [step for step in self.steps() if step <= newest]
        for step in set(steps) - self.retained(steps):
            remove(self.path(step))

    def begin(self, step: int) -> None:
        """Called when the run begins, with the step that it starts from. What was due there and is
        not on disk, because the process before was killed, is due again."""
        was_loaded = self.restored.get("step") == step
        self.last_saved = step if was_loaded or step in self.steps() else -1
        if jax.process_index() == 0:
            self.tidy(step)

    def roll_back(self, step: int) -> None:
        """Remove what was saved and scored of steps that are taken back."""
        for later in self.steps() if jax.process_index() == 0 else ():
            if later > step:
                remove(self.path(later))
        self.begin(step)

    def tidy(self, step: int) -> None:
        """What was left half done goes, and what another future scored is forgotten."""
        for left in self.directory.glob(f"{UNFINISHED}*"):
            discard(left)
        if any(scored > step for scored in self.scores()):
            self._write_scores({s: score for s, score in self.scores().items() if s <= step})

    def refuse_foreign(self, *, may_resume: bool) -> None:
        """RecipeError if the folder holds checkpoints and this run does not continue any."""
        if self.config.enabled and self.steps() and not may_resume:
            raise RecipeError(
                f"checkpoint.output_dir: {self.directory} holds {PREFIX}{self.steps()[-1]} of "
                "another run; use another folder, remove it, or set auto_resume on an `orbax` entry"
            )


def _reason(error: Exception) -> str:
    """What the system says of a write that failed."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # of tensorstore
    return os.strerror(int(code[1])) if code else str(error)


def read_metadata(folder: Path) -> dict[str, Any]:
    file = folder / METADATA
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def remove(folder: Path) -> None:
    """Under its name it is gone at once: a removal that is interrupted leaves no half folder."""
    going = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.removed")
    folder.rename(going)
    discard(going)
