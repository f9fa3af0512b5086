"""What every checkpoint engine does: decide when to save, where, and what to keep."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtrain.checkpoint.retention import ranked, retained
from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.registry import Factory

PREFIX = "global_step_"


class Moment(NamedTuple):
    """Where a run is when a save is considered."""

    step: int
    """updates done"""
    epoch_ended: int
    """number of the epoch that ended with this step, from 1; 0 when none did"""
    training_ended: bool
    requested: bool = False
    """somebody asked for full state here"""


class CheckpointEngine(Factory, kind="checkpoint"):
    """Writes `output_dir/global_step_N/` after N updates. A directory has that name only when
    complete."""

    events = {"load": "load", "save": "save"}
    is_full_state: ClassVar[bool] = False
    """A run can be continued from it."""
    config: CheckpointConfig

    def __init__(self, config: CheckpointConfig, trainer: Any = None):
        super().__init__(config, trainer)
        self.directory = Path(config.output_dir).expanduser().absolute()

    def save(self, model: Any) -> None:
        """Write one checkpoint of the trainer's state at `self.path(step)`, complete or not at
        all."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no save(model)")

    def load(self, model: Any) -> Any:
        """The newest checkpoint's state, placed like `model`, a tree of shapes with shardings."""
        raise CheckpointError(f"checkpoint type {self.name!r} cannot resume a run")

    def about(self, step: int) -> dict[str, Any]:
        """What a full-state checkpoint keeps beside its arrays."""
        raise CheckpointError(f"checkpoint type {self.name!r} keeps nothing beside the weights")

    def wait(self) -> None:
        """Return when everything saved is on disk; raises what went wrong in the background."""

    def is_due(self, moment: Moment) -> bool:
        """Does the recipe ask for a save here? Never twice for one step."""
        config, step = self.config, moment.step
        if not config.enabled or step in self.steps():
            return False
        by_step = config.save_every_n_steps and step % config.save_every_n_steps == 0
        ended = moment.epoch_ended
        by_epoch = ended and config.save_every_n_epochs and ended % config.save_every_n_epochs == 0
        at_end = moment.training_ended and config.save_end_of_training
        return bool(by_step or by_epoch or at_end or (moment.requested and self.is_full_state))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (entry.name for entry in self.directory.iterdir() if entry.is_dir())
        numbers = (name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))
        return sorted(int(number) for number in numbers if number.isdigit())

    def path(self, step: int) -> Path:
        return self.directory / f"{PREFIX}{step}"

    def best(self) -> int | None:
        """The complete checkpoint with the best score, None without scores."""
        order = ranked(self.steps(), self.scores(), self.config.direction or "min")
        return order[0] if order else None

    def scores(self) -> dict[int, float]:
        """Score of each step that was evaluated when it was saved, of deleted ones too."""
        file = self.directory / "scores.json"
        if not file.is_file():
            return {}
        return {int(step): float(score) for step, score in json.loads(file.read_text()).items()}

    def note_score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Remember what the checkpoint of this step is worth; beside the checkpoints, so that it
        outlives a restart."""
        if self.config.metric not in metrics:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        scores = self.scores() | {step: float(metrics[self.config.metric])}
        partial = self.directory / "scores.json.partial"
        partial.write_text(json.dumps(scores))
        os.replace(partial, self.directory / "scores.json")

    def retained(self, steps: list[int]) -> set[int]:
        return retained(
            steps,
            self.scores(),
            keep_last_n=self.config.keep_last_n,
            keep_best_n=self.config.keep_best_n,
            mode=self.config.direction or "min",
        )

    def delete_surplus(self) -> None:
        """Remove what retention does not keep; called when the newest is complete."""
        steps = self.steps()
        for step in set(steps) - self.retained(steps):
            shutil.rmtree(self.path(step))

    def delete_after(self, step: int) -> None:
        """Remove what was saved of updates that a rollback has taken back."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))

    def refuse_foreign(self, *, may_resume: bool) -> None:
        """RecipeError if the folder holds checkpoints and this run does not continue any."""
        if self.config.enabled and self.steps() and not may_resume:
            raise RecipeError(
                f"checkpoint.output_dir: {self.directory} holds {PREFIX}{self.steps()[-1]} of "
                "another run; use another folder, remove it, or set auto_resume on an `orbax` entry"
            )
