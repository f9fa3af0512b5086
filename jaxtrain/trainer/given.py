"""Ready-made objects that a trainer may be given in place of what its recipe names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import optax

from jaxtrain.data.factory import GivenRows
from jaxtrain.model import Decoder
from jaxtrain.recipe.errors import did_you_mean
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import Schedule


class Given(TypedDict, total=False):
    """Ready-made objects, each in place of what a section of the recipe builds."""

    model: Decoder | None
    """With the weights to start from, such as the `model` of another trainer."""
    tokenizer: Any
    processing_class: Any
    """Another name for `tokenizer`."""
    train_data: GivenRows | None
    eval_data: GivenRows | Mapping[str, GivenRows] | None
    """Records of one set, or of several by their names."""
    optimizer: optax.GradientTransformation | None
    """At its own peak learning rate."""
    scheduler: Schedule | None
    """Step, from 0 → fraction of that rate."""
    early_stopper: Any
    """`(step, score) → bool`, or an object with such a `should_stop`: whether to end the run. The
    score is the `metric` of the first checkpoint entry, else `eval/loss`."""
    devices: Sequence[Any] | None
    """Of the mesh; to compile the step they need not be present."""


Mode = Literal["train", "process-data", "plan"]
MODES = get_args(Mode)
REQUIREMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, Decoder), "the `model` of another trainer"),
    "optimizer": (
        lambda v: isinstance(v, optax.GradientTransformation), "an optax transformation"
    ),
    "scheduler": (callable, "a function of the step number"),
    "early_stopper": (
        lambda v: callable(getattr(v, "should_stop", v)), "a function of step and score"
    ),
}  # fmt: skip


def check_arguments(trainer: str, config: Any, mode: str, given: Mapping[str, Any]) -> None:
    """TypeError or ValueError for an argument that no trainer has, or that is of the wrong kind."""
    if not isinstance(config, TrainerConfig):
        found = type(config).__name__
        raise TypeError(f"{trainer}(config): found {found}; write {trainer}(get_config(…))")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, found {mode!r}")
    for name, (is_right, right) in REQUIREMENTS.items():
        if given.get(name) is not None and not is_right(given[name]):
            raise TypeError(f"{name} must be {right}, found {given[name]!r}")
    for name in given.keys() - Given.__annotations__.keys():
        names = ["mode", "callbacks", *Given.__annotations__]
        raise TypeError(f"a trainer takes no {name!r}{did_you_mean(name, names)}")
