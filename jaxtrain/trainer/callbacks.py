"""Callbacks as objects: told what happens on the host, and able to ask for more.

Events come in this order: `on_init_end`, `on_train_begin`, then for each epoch `on_epoch_begin`,
for each update `on_step_begin`, `on_optimizer_step`, `on_step_end`, then, where they are due,
`on_log`, `on_evaluate`, `on_save`, and at last `on_epoch_end` and `on_train_end`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtrain.recipe.errors import CheckpointError

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer

EVENTS = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end",
    "on_step_begin", "on_optimizer_step", "on_step_end", "on_log", "on_evaluate", "on_save",
)  # fmt: skip


@dataclass
class Control:
    """What a callback asks for; each request is obeyed within one update and then taken back."""

    should_training_stop: bool = False
    """Finish the update and end the run, saved as at its end."""
    should_epoch_stop: bool = False
    """Go on with the next epoch."""
    should_save: bool = False
    """Save full state at this update."""
    should_evaluate: bool = False
    """Evaluate at this update, before a save."""
    should_log: bool = False
    """Write the metrics of this update now."""
    should_roll_back: bool = False
    """Restore the newest full state and go on behind the batches that led here."""
    should_abort_without_save: bool = False
    """Finish the update and end the run with an error; nothing is saved."""

    def taken(self, request: str) -> bool:
        """Was this asked for? It no longer is."""
        asked = getattr(self, request)
        setattr(self, request, False)
        return asked


class Callback:
    """Derive from it and define the events that matter: `on_…(args, state, control, **more)`.

    `args` is the trainer's config, `state` the trainer, `control` takes requests. One with
    `state_dict()` and `load_state_dict(state)` (JSON data) goes on where it was after a resume.
    """

    key: ClassVar[str] = ""
    """Of the recipe, where that made the callback."""


class Callbacks:
    """The callbacks of a run, in the order in which they were added."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        self.items = list(items)
        self.control = Control()

    def add(self, callback: Any) -> None:
        """An object, or a class that is then made."""
        self.items.append(callback() if isinstance(callback, type) else callback)

    def pop(self, callback: Any) -> Any | None:
        """Take out and return the first one that is this object or of this class."""
        for found in self.items:
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                self.items.remove(found)
                return found
        return None

    def tell(self, event: str, trainer: "Trainer", **more: Any) -> None:
        """Call everyone who listens to this event. One may return a `Control` with requests."""
        assert event in EVENTS, event
        for callback in list(self.items):
            listener = getattr(callback, event, None)
            if listener is None:
                continue
            asked = listener(trainer.config, trainer, self.control, **more)
            if isinstance(asked, Control):
                for field in fields(Control):
                    wanted = getattr(self.control, field.name) or getattr(asked, field.name)
                    setattr(self.control, field.name, wanted)

    def state_dict(self) -> dict[str, Any]:
        """Name → state, for those that have one."""
        named = self._named().items()
        return {name: item.state_dict() for name, item in named if hasattr(item, "state_dict")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """CheckpointError when a saved state has no callback to take it; that of a key which the
        recipe no longer has is dropped."""
        here = self._named()
        if missing := sorted(name for name in saved.keys() - here.keys() if "." in name):
            own = [name for name in here if "." in name]
            raise CheckpointError(
                f"the checkpoint has the state of callback {missing[0]}, and the run has "
                f"{', '.join(own) or 'none'}; add it before training"
            )
        for name in saved.keys() & here.keys():
            here[name].load_state_dict(saved[name])

    def _named(self) -> dict[str, Any]:
        """The recipe key of a callback, else its class and its number among those of the class."""
        numbers: Counter[str] = Counter()
        named = {}
        for item in self.items:
            kind = type(item).__name__
            named[getattr(item, "key", "") or f"{kind}.{numbers[kind]}"] = item
            numbers[kind] += 1
        return named
