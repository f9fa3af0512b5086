"""The `optimizer` section."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field

from jaxtrain.recipe.section import Own, Section, TypedSection, WideDType


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"must be two numbers in [0, 1), found {list(betas)}")
    return betas


def _check_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"is no regular expression ({error}), found {text!r}") from None
    return text


Betas = Annotated[tuple[float, float], AfterValidator(_check_betas)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]


class OptimizerGroup(Section):
    """Settings of the parameters whose path matches; the first matching group applies."""

    match: Pattern
    """Regular expression, searched in a path such as `layers/0/0/attention/qkv`."""
    lr_scale: float = Field(default=1.0, ge=0)
    """Factor on the learning rate."""
    weight_decay: float | None = Field(default=None, ge=0)
    """The optimizer's when left out; never applied to norms and biases."""
    freeze: bool = False
    """Do not train these parameters; they get neither gradient nor optimizer state."""


class OptimizerConfig(TypedSection):
    learning_rate: float = Field(
        default=5e-4, ge=0, validation_alias=AliasChoices("learning_rate", "lr")
    )
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; not applied to norms and biases."""
    groups: Own[tuple[OptimizerGroup, ...]] = ()
    """Other settings for some parameters."""
    state_dtype: Own[WideDType] = "float32"
    """Dtype of the moments."""


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    betas: Betas = (0.9, 0.999)
    """Decay of the first and the second moment."""
    eps: Own[float] = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""


class AdamW8bitConfig(AdamWConfig):
    """Adamw with moments of eight bits in blocks of 256, as bitsandbytes has them; in float32 those
    of embeddings, and of parameters with fewer than 4096 entries a layer."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.state_dtype != "float32":
            found = f"{self.state_dtype} contradicts eight bits"
            yield "state_dtype", f"{found}; remove it, or take the optimizer `adamw`"


class AdafactorConfig(OptimizerConfig):
    """Adam with a factored second moment and no first one."""


class LionConfig(OptimizerConfig):
    """The sign of an average of gradients."""

    betas: Betas = (0.9, 0.99)
    """Weight of the moment in the update, and its decay."""


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent."""

    momentum: Own[float] = Field(default=0.0, ge=0, lt=1)
    """Decay of the accumulated gradient; 0 is none."""
    nesterov: Own[bool] = False
    """Nesterov momentum."""

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.momentum:
            yield "nesterov", "there is no `momentum`"


class MuonConfig(OptimizerConfig):
    """Orthogonalised momentum for matrices; adamw for embeddings, head and vectors."""

    momentum: Own[float] = Field(default=0.95, ge=0, lt=1)
    """Decay of the accumulated gradient of matrices."""
    nesterov: Own[bool] = True
    """Nesterov momentum, for matrices."""
    betas: Betas = (0.9, 0.999)
    """Decay of adamw's moments."""
    eps: Own[float] = Field(default=1e-8, gt=0)
    """Adamw's epsilon."""
