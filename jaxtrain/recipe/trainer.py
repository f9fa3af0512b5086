"""The whole recipe: `TrainerConfig`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny, SkipValidation

from jaxtrain import registry
from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.deepspeed import SCALER_KEYS, DeepSpeedConfig, FP16Config
from jaxtrain.recipe.guards import DivergenceConfig, EarlyStoppingConfig, EmaConfig, SamplesConfig
from jaxtrain.recipe.load import Secrets
from jaxtrain.recipe.logger import (
    LoggerConfig,
    ProfileConfig,
    Tensorboard,
    TensorboardConfig,
    WandbConfig,
)
from jaxtrain.recipe.mesh import MeshConfig, PipelineConfig
from jaxtrain.recipe.model import ModelConfig, TokenizerConfig
from jaxtrain.recipe.optimizer import OptimizerConfig
from jaxtrain.recipe.scheduler import SchedulerConfig
from jaxtrain.recipe.section import (
    InputPath,
    Own,
    Section,
    expand_user,
    mapped,
    no_effect,
    sets,
)

_OUR_EXPERTS = no_effect("experts and kernels are our own")


class TrainerConfig(Section):
    """One training run. Subclass it to add keys for your own trainer."""

    type: str = "sft"
    """Registered trainer."""
    name: Annotated[str | None, mapped("type")] = None
    """Older spelling of `type`."""
    code: InputPath | None = None
    """Python file with your own trainers and factories; `train.py` beside the recipe is read when a
    `type` of the recipe is not a known name."""
    skip_validation: bool = False
    """Allow factories that the trainer's annotations do not list."""
    base: Own[str | tuple[str, ...] | None] = None
    """Recipes that this one extends and overrides; later ones override earlier ones."""

    model: SkipValidation[SerializeAsAny[ModelConfig]]
    """The model and its weights."""
    tokenizer: SkipValidation[SerializeAsAny[TokenizerConfig]] = TokenizerConfig(type="huggingface")
    """The tokenizer and its chat template."""
    data: SkipValidation[SerializeAsAny[DataConfig]]
    """Training and evaluation data."""
    optimizer: SkipValidation[SerializeAsAny[OptimizerConfig]]
    """The optimizer; `adamw` when left out."""
    scheduler: SkipValidation[SerializeAsAny[SchedulerConfig]]
    """The learning rate schedule; linear warm-up and decay when left out."""
    checkpoint: tuple[SkipValidation[SerializeAsAny[CheckpointConfig]], ...] = ()
    """Full state (`orbax`) and export (`huggingface`), each with its own schedule; one entry or a
    list."""
    logger: LoggerConfig = LoggerConfig()
    """Log files and log level."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    tensorboard: Own[Tensorboard] = TensorboardConfig(enable=False)
    """TensorBoard; a section, true or false."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """A DeepSpeed config as ArcticTraining takes it."""
    mesh: Own[MeshConfig] = MeshConfig()
    """The device mesh."""
    pipeline: Own[PipelineConfig] = PipelineConfig()
    """Pipeline parallelism, with `mesh.pipeline` > 1."""

    # Length and batch size.

    epochs: int | None = Field(default=None, ge=0)
    """Passes over the training data; 1 when neither it nor `train_iters` is written."""
    train_iters: int = Field(default=0, ge=0)
    """Optimizer steps, 0 is off; with `epochs` written too, the first limit reached ends the
    run."""
    micro_batch_size: Annotated[
        int, mapped("per batch shard (data x fsdp x expert), not per device")
    ] = Field(default=1, ge=1)
    """Sequences per batch shard and forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; gradients are summed and divided once by the total
    weight."""
    sequence_parallel_size: Annotated[int | None, sets("mesh.context")] = Field(default=None, ge=1)
    """Devices that share a sequence."""
    expert_parallel_size: Annotated[int | None, sets("mesh.expert")] = Field(default=None, ge=1)
    """Devices that share the experts."""
    exit_iteration: int = Field(default=0, ge=0)
    """End the run after this optimizer step, with the schedule of the whole run; 0 is off."""
    exit_iteration_this_run: int = Field(default=0, ge=0)
    """End after this many optimizer steps of this process; 0 is off."""
    min_iterations: int = Field(default=0, ge=0)
    """Repeat the training data until it fills this many optimizer steps."""
    overfit_first_batch: bool = False
    """Train on the first batch only."""

    # The optimizer step.

    max_grad_norm: Own[float] = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    loss_weighting: Own[Literal["token", "sample"]] = "token"
    """What has equal weight in loss and gradient: each trained token, or each document of a packed
    sequence."""
    label_smoothing: Own[float] = Field(default=0.0, ge=0, lt=1)
    """Fraction of the target that is spread over the vocabulary; not used in evaluations. Built-in
    objectives read it, `z_loss` and `loss_weighting`."""
    z_loss: Own[float] = Field(default=0.0, ge=0)
    """Coefficient of the squared log-partition term, which is logged apart from the loss."""
    router_z_loss: Own[float] = Field(default=0.0, ge=0)
    """Coefficient of the squared log-partition term of the routers of experts, logged apart from
    the loss. The load-balancing loss is on where config.json, or `model.hf_config_kwargs`, says
    `output_router_logits: true`, with its `router_aux_loss_coef`. Built-in objectives have both."""
    seed: int = Field(default=42, ge=0)
    """Seed of the weights and of every random number of the step."""
    ema: Own[EmaConfig | None] = None
    """Exponential moving average of the weights."""
    on_nonfinite: Own[Literal["stop", "skip", "rollback"]] = "stop"
    """What happens when the loss or the gradient norm is not finite."""
    divergence: Own[DivergenceConfig | None] = None
    """What happens when the loss rises."""
    replica_check_interval: Own[int] = Field(default=0, ge=0)
    """Optimizer steps between comparisons of the copies that devices hold of the same arrays; a
    difference ends the run. 0 is none."""
    activation_checkpoint_cpu_offload: Annotated[
        bool, mapped("layer inputs in host memory; without effect on CPU")
    ] = False
    """Keep the inputs of layers in host memory until the backward pass recomputes these."""
    tiled_mlp_compute: Annotated[bool, mapped("a scan over pieces of the sequence")] = False
    """Run feed-forward layers in pieces along the sequence, each as many tokens long as the model
    is wide."""
    arctic_moe: Annotated[bool | Literal["auto"], _OUR_EXPERTS] = False
    enable_arctic_moe_custom_optimization: Annotated[bool, _OUR_EXPERTS] = False
    enable_routing_replay: Annotated[
        bool,
        mapped("router choices are kept across rematerialisation"),
    ] = False
    """Keep the router's choices across rematerialisation: what is recomputed takes the same
    experts, however its scores are rounded."""

    # Evaluation.

    eval_interval: int = Field(default=0, ge=0)
    """Optimizer steps between evaluations."""
    eval_at_start: Own[bool] = False
    """Evaluate before the first optimizer step."""
    eval_at_end: Own[bool | None] = None
    """Evaluate after the last optimizer step; true with evaluation data when left out."""
    eval_after_step: Own[int] = Field(default=0, ge=0)
    """First optimizer step with a periodic evaluation."""
    eval_every_n_epochs: Own[int] = Field(default=0, ge=0)
    """Epochs between evaluations, besides `eval_interval`."""
    max_eval_batches: Own[int] = Field(default=0, ge=0)
    """Maximum number of batches per evaluation; 0 is all."""
    early_stopping: Own[EarlyStoppingConfig | None] = None
    """End the run when a metric stops improving."""
    eval_samples: Own[SamplesConfig | None] = None
    """Replies to generate at evaluations."""

    # Output.

    run_dir: Own[str | None] = None
    """Folder of metrics, logs and the resolved recipe; `logger.output_dir`, else
    `runs/<recipe name>-<hash>`, when left out. A folder that contains a run is continued with
    `auto_resume` and refused otherwise. With `{n}` in the last part of the name every run gets the
    next number, unless it continues the newest; write `{run_dir}/…` as a checkpoint's `output_dir`
    to put the checkpoints inside it."""
    train_log_iter_interval: int = Field(default=1, ge=0)
    """Optimizer steps between rows of training metrics, printed and written; the first step always
    has one. 0 is none."""
    train_log_metrics_path: str | None = None
    """The metrics file; `run_dir/train-log-metrics.jsonl` when left out."""
    loss_log_interval: int = Field(default=1, ge=0)
    """Optimizer steps between losses in the log; 0 is none."""
    eval_log_iter_interval: int = Field(default=1, ge=0)
    """Evaluations between those that are printed, 0 prints none; the metrics file has all."""
    kill_switch_path: str | None = None
    """A file that ends the run when it appears; `run_dir/stop` when left out."""
    profile: Own[ProfileConfig | None] = None
    """A profile of some optimizer steps."""
    mem_profiler: Annotated[
        Literal["step", "e2e"] | None, mapped("device memory profiles (pprof)")
    ] = None
    """Write a device memory profile (pprof) at each logged step, or at the end."""
    mem_profiler_dir: str | None = None
    """Folder of memory profiles; `run_dir/mem-prof` when left out."""
    mem_profiler_max_entries: Annotated[int, no_effect("JAX profiles have no history limit")] = (
        Field(default=100_000, ge=1)
    )

    _secrets: Secrets = PrivateAttr(default_factory=dict)

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.mem_profiler is None:
            yield "mem_profiler_dir", "only `mem_profiler` writes there"
        if not self.data.has_eval:
            keys = ("eval_at_end", "eval_after_step", "max_eval_batches", "eval_log_iter_interval")
            yield from ((key, "there is no evaluation data") for key in keys)
        if not (self.eval_interval or self.eval_every_n_epochs):
            yield "eval_after_step", "no evaluation is periodic"
        if self.type != "causal" and registry.is_built_in("trainer", self.type):
            yield "tokenizer.tokenize_kwargs", "only causal honours it, as upstream"
        if self.model.remat_policy == "none":
            yield "activation_checkpoint_cpu_offload", "no layer is recomputed"
        if self.deepspeed.fp16 is not None and self.loss_scaling is None:
            for key in SCALER_KEYS:
                yield f"deepspeed.fp16.{key}", "only fp16 has a loss scaler"
        if self.mesh.pipeline == 1:
            for key in ("schedule", "stages_per_device"):
                yield f"pipeline.{key}", "only `mesh.pipeline` > 1 has stages"

    @property
    def loss_scaling(self) -> FP16Config | None:
        """How the loss is scaled; None where products are not in float16."""
        if (self.deepspeed.autocast_dtype or self.model.dtype) != "float16":
            return None
        return (self.deepspeed.fp16 or FP16Config()).model_copy(update={"enabled": None})

    @property
    def secrets(self) -> Secrets:
        """Values from the environment, which no message and no file may contain."""
        return self._secrets

    @property
    def passes(self) -> int | None:
        """Passes over the training data; None for as many as `train_iters` needs."""
        return 1 if self.epochs is None and not self.train_iters else self.epochs

    def output_path(self, written: str | None, name: str) -> Path:
        """An output path of the recipe; `name` in the run's folder when it is left out."""
        return expand_user(written) if written else expand_user(self.run_dir or "") / name

    def horizon(self, steps_per_epoch: int | None, more: int = 0) -> int | None:
        """Optimizer steps of the whole run; None when that takes the unknown length of an epoch.
        Passes take so many `more` steps than they would, all of this length."""
        limits = [self.train_iters] if self.train_iters else []
        if self.passes is not None:
            if steps_per_epoch is None:
                return 0 if self.passes == 0 else None
            limits.append(self.passes * steps_per_epoch + more)
        return min(limits)
