"""Sections of the objectives beyond supervised fine-tuning."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.recipe.section import Own, refused_when_on
from jaxtrain.recipe.trainer import TrainerConfig


class JudgedDataConfig(DataConfig):
    """Replies with a label, good or bad."""

    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {
        "column": "causal", "role_mapping": "sft", "content_key": "sft", "process": "sft",
    }  # fmt: skip

    max_prompt_length: int = Field(default=4096, ge=1)
    """Maximum length of a prompt when prompt and longer reply exceed `max_length`."""
    dpo_prompt_truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """Which end of a truncated prompt is kept; BOS always is."""
    overlong: Own[Literal["drop", "truncate", "error"]] = "truncate"
    """What happens to examples longer than `max_length`; the prompt is truncated before the
    reply."""

    @property
    def limits_prompt(self) -> bool:
        """Whether the limit differs from the default, which the effective recipe has too."""
        return self.max_prompt_length != type(self).model_fields["max_prompt_length"].default

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.limits_prompt and self.max_length and self.max_prompt_length >= self.max_length:
            what = f"leaves no room for a reply in max_length {self.max_length}"
            use = f"use at most {self.max_length - 1}"
            yield "max_prompt_length", f"{self.max_prompt_length} {what}; {use}"


class PreferenceDataConfig(JudgedDataConfig):
    """Pairs of a chosen and a rejected reply."""

    SEQUENCES_PER_SAMPLE: ClassVar[int] = 2


class DPOTrainerConfig(TrainerConfig):
    """Direct preference optimisation."""

    ref_model: ModelConfig | None = None
    """Frozen reference; the start weights when left out."""
    beta: float = Field(default=0.1, gt=0)
    ignore_label_index: int = -100
    label_smoothing: float = Field(default=0.0, ge=0, le=0.5)
    reference_model_deepspeed: Annotated[
        Any, refused_when_on("derived from `deepspeed`, remove it")
    ] = None
    ref_logprobs: Literal["online", "precomputed"] = "online"
    nll_scale: float = Field(default=0.0, ge=0)
    """Weight of the chosen reply's own likelihood."""
    length_normalization: bool = False
    """Mean instead of summed log-probabilities."""


class CPOConfig(TrainerConfig):
    beta: float = Field(default=1.0, gt=0)
    nll_scale: float = Field(default=1.0, ge=0)


class ORPOConfig(TrainerConfig):
    orpo_lambda: float = Field(default=1.0, ge=0)
    nll_scale: float = Field(default=1.0, ge=0)


class SimPOConfig(TrainerConfig):
    beta: float = Field(default=1.0, gt=0)
    gamma: float = 0.5
    nll_scale: float = Field(default=0.0, ge=0)


class RewardConfig(TrainerConfig):
    margin: bool = False


class DistillConfig(TrainerConfig):
    """On-policy distillation."""

    teacher_model: ModelConfig | None = None
    disable_teacher_dropout: bool = True
    num_rollouts_per_prompt: int = Field(default=4, ge=1)
    max_new_tokens: int = Field(default=2048, ge=1)
    generation_temperature: float = Field(default=1.0, ge=0)
    generation_top_p: float = Field(default=1.0, gt=0, le=1)
    generation_top_k: int = Field(default=0, ge=0)
    beta: float = Field(default=1.0, ge=0)
    generation_batch_size: int = Field(default=0, ge=0)


class GRPOConfig(TrainerConfig):
    """Group-relative policy optimisation."""

    group_size: int = Field(default=4, ge=1)
    forward_group_size: int = Field(default=4, ge=1)
    beta: float = Field(default=0.001, ge=0)
    entropy_regularizer_scale: float = 0.0
    length_normalization: bool = True
    adv_std_normalization: bool = True
    loss_token_mean: bool = False
    tis_imp_ratio_cap: float = Field(default=2.0, gt=0)
    reward: str | None = None
    """Registered name or import path."""
