"""Callbacks as objects: called when something happens on the host, and able to request more.

Events come in this order: `on_init_end`, `on_train_begin`, then for each epoch `on_epoch_begin`,
for each step `on_step_begin`, `on_substep_end` for each microbatch but the last,
`on_pre_optimizer_step`, `on_optimizer_step` (after the fact, since a step is one compiled
call; one that is not taken has none of the three), `on_step_end`, then, where they are
due, `on_prediction_step` for each batch of an evaluation, `on_evaluate`, `on_save`, and at last
`on_epoch_end` and `on_train_end`. `on_train_metrics`, and around a row of them `on_log_step` and
`on_log`, come when the numbers of a step have arrived, which is while the next one is computed.
`on_predict` comes after an evaluation of other records than the recipe's.
"""

import inspect
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from jaxtrain.recipe.errors import CheckpointError, did_you_mean
from jaxtrain.registry import TrainerView

EVENTS = (
    "on_init_end", "on_train_begin", "on_train_end", "on_epoch_begin", "on_epoch_end",
    "on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end",
    "on_train_metrics", "on_log_step", "on_log", "on_prediction_step", "on_predict", "on_evaluate",
    "on_save",
)  # fmt: skip
ATTRIBUTES = {
    "model": "model", "params": "params", "tokenizer": "tokenizer",
    "processing_class": "tokenizer", "optimizer": "optimizer", "lr_scheduler": "scheduler",
    "train_dataloader": "train_dataloader", "eval_dataloader": "eval_dataloader",
}  # fmt: skip
"""Argument that a callback may name → the trainer's attribute that it gets."""


@dataclass
class Control:
    """What a callback asks for; each request is obeyed within one step and then taken back."""

    should_training_stop: bool = False
    """Finish the step and end the run, saved as at its end."""
    should_epoch_stop: bool = False
    """Continue with the next epoch."""
    should_save: bool = False
    """Save full state at this step."""
    should_evaluate: bool = False
    """Evaluate at this step, before a save."""
    should_log: bool = False
    """Write the metrics of this step now."""
    should_roll_back: bool = False
    """Restore the newest full state and continue after the batches that led here."""
    should_abort_without_save: bool = False
    """Finish the step and end the run with an error; nothing is saved."""

    def consume(self, request: str) -> bool:
        """Was this requested? It no longer is."""
        was_requested = getattr(self, request)
        setattr(self, request, False)
        return was_requested


class Callback:
    """Derive from it and define the events that matter: `on_…(args, state, control, **more)`.

    `args` is the trainer's config, `state` a `RunState`, `control` takes requests. Arguments are
    passed by name, and only those that the method has; so are `logs`, `metrics`, `engine`, `path`,
    `step` and `epoch` of their events and what `ATTRIBUTES` has. A callback with `state_dict()` and
    `load_state_dict(state)` (JSON data) resumes where it was. One with `measure(gradients)`, pure
    and traced, adds what it returns, name → scalar, to the metrics of every step; it receives mean
    gradients before clipping, and has to be added before the first step.
    """

    key: ClassVar[str] = ""
    """of the recipe, where that made the callback"""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for name in vars(cls):
            if name.startswith("on_") and name not in EVENTS:
                raise ValueError(
                    f"{cls.__qualname__}: no event {name!r}{did_you_mean(name, EVENTS)} "
                    f"(events: {', '.join(EVENTS)})"
                )


class Callbacks:
    """The callbacks of a run, in the order in which they were added."""

    def __init__(self, given: Iterable[Any] = ()) -> None:
        self.items: list[Any] = []
        self.control = Control()
        for callback in given:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """An object, or a class that is then made; TypeError for one that listens to nothing."""
        made = callback() if isinstance(callback, type) else callback
        heard = isinstance(made, Callback) or any(hasattr(made, event) for event in EVENTS)
        if not heard:
            raise TypeError(f"{made!r} is no callback: it has none of {', '.join(EVENTS)}")
        self.items.append(made)

    def pop(self, callback: Any) -> Any | None:
        """Take out and return the first one that is this object or of this class."""
        for found in self.items:
            if found is callback or (isinstance(callback, type) and isinstance(found, callback)):
                self.items.remove(found)
                return found
        return None

    def tell(self, event: str, state: TrainerView, **more: Any) -> None:
        """Call everyone who listens to this event; `state` shows the trainer. A callback may return
        a `Control` with requests."""
        assert event in EVENTS, event
        for callback in list(self.items):
            listener = getattr(callback, event, None)
            if listener is None:
                continue
            given = {"args": state.config, "state": state, "control": self.control, **more}
            requested = listener(**_select_arguments(listener, given, state))
            if isinstance(requested, Control):
                for field in fields(Control):
                    value = getattr(self.control, field.name) or getattr(requested, field.name)
                    setattr(self.control, field.name, value)

    def measure(self, gradients: Any) -> dict[str, Any]:
        """What the callbacks report of the mean gradients. Traced."""
        measures = [c.measure for c in self.items if hasattr(c, "measure")]
        return {name: value for measure in measures for name, value in measure(gradients).items()}

    def state_dict(self) -> dict[str, Any]:
        """Name → state, for those that have one."""
        items = self._by_name().items()
        return {name: item.state_dict() for name, item in items if hasattr(item, "state_dict")}

    def load_state_dict(self, saved: dict[str, Any], *, reset: Collection[str] = ()) -> None:
        """Resume, but for the parts that are reset: those of the recipe go by their key, those of
        the user are `callbacks`.

        CheckpointError when a saved state has no callback to take it; that of a key which the
        recipe no longer has is dropped.
        """
        here = self._by_name()
        kept = {n: s for n, s in saved.items() if ("callbacks" if "." in n else n) not in reset}
        if missing := sorted(name for name in kept.keys() - here.keys() if "." in name):
            own = [name for name in here if "." in name]
            raise CheckpointError(
                f"the checkpoint has the state of callback {missing[0]}, and the run has "
                f"{', '.join(own) or 'none'}; add it before training"
            )
        for name in kept.keys() & here.keys():
            here[name].load_state_dict(kept[name])

    def _by_name(self) -> dict[str, Any]:
        """The recipe key of a callback, else its class and its number among those of the class."""
        numbers: Counter[str] = Counter()
        found = {}
        for item in self.items:
            kind = type(item).__name__
            found[getattr(item, "key", "") or f"{kind}.{numbers[kind]}"] = item
            numbers[kind] += 1
        return found


def _select_arguments(listener: Any, given: dict[str, Any], trainer: TrainerView) -> dict[str, Any]:
    """What a callback names of an event's values, or all of them, and of the trainer's parts."""
    parameters = inspect.signature(listener).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parts = {name: getattr(trainer, ATTRIBUTES[name]) for name in parameters if name in ATTRIBUTES}
    return parts | {name: v for name, v in given.items() if takes_all or name in parameters}
