"""The whole recipe: `TrainerConfig`, and the checks that need more than one section."""

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import Field, SerializeAsAny, SkipValidation

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.errors import Fault
from jaxtrain.recipe.mesh import MeshConfig, PipelineConfig
from jaxtrain.recipe.model import LoggerConfig, ModelConfig, TokenizerConfig
from jaxtrain.recipe.optimizer import OptimizerConfig, SchedulerConfig
from jaxtrain.recipe.section import InputPath, Section


class SamplesConfig(Section):
    """Answers generated at evaluations."""

    prompts: tuple[str, ...] = Field(min_length=1)
    """What the user says."""
    system: str | None = None
    """System message before each of them."""
    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    every_n_evals: int = Field(default=1, ge=1)


class TrainerConfig(Section):
    """One training run. Subclass it to add keys for a trainer of your own."""

    type: str = "sft"
    """Registered trainer."""
    code: InputPath | None = None
    """Python file with the user's own trainers and factories; `train.py` beside the recipe is read
    when a `type` of the recipe is not a known name."""
    model: SkipValidation[SerializeAsAny[ModelConfig]]
    tokenizer: SkipValidation[SerializeAsAny[TokenizerConfig]] = TokenizerConfig(type="huggingface")
    data: SkipValidation[SerializeAsAny[DataConfig]]
    optimizer: SkipValidation[SerializeAsAny[OptimizerConfig]]
    scheduler: SkipValidation[SerializeAsAny[SchedulerConfig]]
    checkpoint: tuple[SkipValidation[SerializeAsAny[CheckpointConfig]], ...] = ()
    """Full state (`orbax`) and export (`huggingface`), each with its own schedule."""
    logger: LoggerConfig = LoggerConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    epochs: int | None = Field(default=None, ge=0)
    """Passes over the training data; 1 when neither it nor `train_iters` is written."""
    train_iters: int = Field(default=0, ge=0)
    """Optimizer updates, 0 is off; with `epochs` written too, the first to be reached ends the
    run."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows a batch shard and forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes an update; gradients are summed and divided once by the total weight."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    seed: int = Field(default=42, ge=0)
    """The one seed: weights and every random number of the step."""
    eval_interval: int = Field(default=0, ge=0)
    """Updates between evaluations."""
    eval_at_start: bool = False
    """Evaluate before the first update."""
    eval_at_end: bool | None = None
    """Evaluate after the last update, unless it was just done; true with evaluation data when
    left out."""
    max_eval_batches: int = Field(default=0, ge=0)
    """Limit of batches an evaluation; 0 takes all."""
    eval_samples: SamplesConfig | None = None
    """Answers to generate at evaluations."""
    exit_iteration: int = Field(default=0, ge=0)
    """End the run at this update, with the schedule of the whole run; 0 is off."""
    run_dir: str | None = None
    """Metrics, logs, resolved recipe; `runs/<recipe name>-<hash>` when left out."""


def _eval_data_and_interval(config: TrainerConfig) -> Iterator[Fault]:
    other = config.eval_at_start or config.eval_at_end is not None
    if config.data.has_eval and not config.eval_interval and not other:
        yield Fault("eval_interval", "must be > 0 with evaluation data, found 0")
    if not config.data.has_eval and (config.eval_interval or config.eval_at_start):
        key = "eval_interval" if config.eval_interval else "eval_at_start"
        yield Fault(key, "needs eval data; add `data.eval_sources` or `data.train_eval_split`")


def _one_resume_each_folder_once(config: TrainerConfig) -> Iterator[Fault]:
    resumes = [i for i, entry in enumerate(config.checkpoint) if entry.auto_resume]
    if len(resumes) > 1:
        both = " and ".join(f"checkpoint.{i}" for i in resumes)
        yield Fault(
            f"checkpoint.{resumes[1]}.auto_resume", f"only one entry may resume, found {both}"
        )
    folders: dict[str, int] = {}
    for i, entry in enumerate(config.checkpoint):
        first = folders.setdefault(entry.output_dir, i)
        if first != i:
            yield Fault(
                f"checkpoint.{i}.output_dir",
                f"{entry.output_dir!r} is checkpoint.{first}'s too; use another",
            )


def _best_needs_scores(config: TrainerConfig) -> Iterator[Fault]:
    for i, entry in enumerate(config.checkpoint):
        if not entry.keep_best_n:
            continue
        key = f"checkpoint.{i}.keep_best_n"
        if not config.data.has_eval:
            yield Fault(key, "needs eval data; add `data.eval_sources` or `data.train_eval_split`")
        elif entry.save_every_n_steps and config.eval_interval:
            every = entry.save_every_n_steps
            if every % config.eval_interval:
                below = max(every // config.eval_interval, 1) * config.eval_interval
                yield Fault(
                    key,
                    f"needs saves that fall on evaluations: save_every_n_steps {every} is no multiple "
                    f"of eval_interval {config.eval_interval}; use {below}",
                )


def _microbatches_have_stages(config: TrainerConfig) -> Iterator[Fault]:
    if config.pipeline.microbatches and config.mesh.pipeline == 1:
        yield Fault("pipeline.microbatches", "has no effect with mesh.pipeline 1; remove it")


Check = Callable[[Any], Iterator[Fault]]
CHECKS: tuple[tuple[tuple[str, ...], Check], ...] = (
    (("data", "eval_interval", "eval_at_start", "eval_at_end"), _eval_data_and_interval),
    (("checkpoint",), _one_resume_each_folder_once),
    (("checkpoint", "data", "eval_interval"), _best_needs_scores),
    (("mesh", "pipeline"), _microbatches_have_stages),
)
"""Checks across keys, each with the keys that must be sound before it can be asked."""
