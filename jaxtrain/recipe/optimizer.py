"""The `optimizer` section."""

import re
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field

from jaxtrain.recipe.section import Section, TypedSection, WideDType


def _shares(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"must be two numbers in [0, 1), found {list(betas)}")
    return betas


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error}), found {text!r}") from None
    return text


Betas = Annotated[tuple[float, float], AfterValidator(_shares)]
Pattern = Annotated[str, AfterValidator(_pattern)]


class OptimizerGroup(Section):
    """Settings for the parameters whose path matches; the first match counts."""

    match: Pattern
    """Regular expression, found anywhere in a path such as `layers/0/0/attention/qkv`."""
    lr_scale: float = Field(default=1.0, ge=0)
    weight_decay: float | None = Field(default=None, ge=0)
    """The section's when left out; never on norms and biases."""
    freeze: bool = False
    """Neither gradient nor optimizer state."""


class OptimizerConfig(TypedSection):
    learning_rate: float = Field(
        default=5e-4, ge=0, validation_alias=AliasChoices("learning_rate", "lr")
    )
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; not on norms and biases."""
    groups: tuple[OptimizerGroup, ...] = ()
    """Other settings for some parameters."""
    state_dtype: WideDType = "float32"
    """Dtype of the moments."""


class AdamWConfig(OptimizerConfig):
    betas: Betas = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)


class AdafactorConfig(OptimizerConfig):
    """Adam with a factored second moment and no first one."""


class LionConfig(OptimizerConfig):
    betas: Betas = (0.9, 0.99)
    """Share of the moment in the update, and its decay."""


class SGDConfig(OptimizerConfig):
    momentum: float = Field(default=0.0, ge=0, lt=1)
    nesterov: bool = False


class MuonConfig(OptimizerConfig):
    """Orthogonalised momentum for matrices; adamw for embeddings, head and vectors."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    nesterov: bool = True
    betas: Betas = (0.9, 0.999)
    """Of adamw."""
    eps: float = Field(default=1e-8, gt=0)
    """Of adamw."""
