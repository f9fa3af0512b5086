"""`model.peft_config`: adapters, with the names of the PEFT package."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jaxtrain.recipe.errors import shown
from jaxtrain.recipe.section import Section, refused_when_on


def _lora(value: Any) -> Any:
    if str(value).lower() != "lora":
        raise ValueError(f"only Lora is built in, found {shown(value)}")
    return "Lora"


def _no_bias(value: Any) -> Any:
    if value != "none":
        raise ValueError(f"only `none` is built in, found {shown(value)}")
    return value


class PeftConfig(Section):
    """Low-rank adapters on some layers; the base weights stay as they are."""

    peft_type: Annotated[str, BeforeValidator(_lora)]
    """`Lora`, in any case."""
    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: int = Field(default=8, ge=1)
    """The adapter's output is scaled by `lora_alpha / r`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str | None = None
    """Layers that get adapters: names, a regex, or `all-linear`; by family when left out."""
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead."""
    bias: Annotated[str, BeforeValidator(_no_bias)] = "none"
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained and saved whole."""
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: tuple[int, ...] | int | None = None
    rank_pattern: dict[str, int] = {}
    """Layer name → rank of its own."""
    alpha_pattern: dict[str, int] = {}
    layers_pattern: Any = None
    fan_in_fan_out: Any = None
    task_type: Any = None
    inference_mode: Any = None
    megatron_config: Any = None
    megatron_core: Any = None
    runtime_config: Any = None
    use_dora: Annotated[Any, refused_when_on("is not supported")] = None
    loftq_config: Annotated[Any, refused_when_on("is not supported")] = None
    layer_replication: Annotated[Any, refused_when_on("is not supported")] = None
