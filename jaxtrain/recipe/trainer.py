"""The whole recipe: `TrainerConfig`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, SerializeAsAny, SkipValidation

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.deepspeed import DeepSpeedConfig
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
from jaxtrain.recipe.section import InputPath, Section, expand_user


class TrainerConfig(Section):
    """One training run. Subclass it to add keys for a trainer of your own."""

    type: str = "sft"
    """Registered trainer."""
    name: str | None = None
    """Older spelling of `type`."""
    code: InputPath | None = None
    """Python file with the user's own trainers and factories; `train.py` beside the recipe is read
    when a `type` of the recipe is not a known name."""
    skip_validation: bool = False
    """Allow factories that the trainer does not name."""
    base: str | tuple[str, ...] | None = None
    """Recipes that this one is laid over, from left to right."""

    model: SkipValidation[SerializeAsAny[ModelConfig]]
    tokenizer: SkipValidation[SerializeAsAny[TokenizerConfig]] = TokenizerConfig(type="huggingface")
    data: SkipValidation[SerializeAsAny[DataConfig]]
    optimizer: SkipValidation[SerializeAsAny[OptimizerConfig]]
    scheduler: SkipValidation[SerializeAsAny[SchedulerConfig]]
    checkpoint: tuple[SkipValidation[SerializeAsAny[CheckpointConfig]], ...] = ()
    """Full state (`orbax`) and export (`huggingface`), each with its own schedule."""
    logger: LoggerConfig = LoggerConfig()
    wandb: WandbConfig = WandbConfig()
    tensorboard: Tensorboard = TensorboardConfig(enable=False)
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()

    # How long, and on how many rows.

    epochs: int | None = Field(default=None, ge=0)
    """Passes over the training data; 1 when neither it nor `train_iters` is written."""
    train_iters: int = Field(default=0, ge=0)
    """Optimizer updates, 0 is off; with `epochs` written too, the first to be reached ends the
    run."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Rows a batch shard and forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes an update; gradients are summed and divided once by the total weight."""
    sequence_parallel_size: int | None = Field(default=None, ge=1)
    """Devices that share a row."""
    expert_parallel_size: int | None = Field(default=None, ge=1)
    """Devices that share the experts."""
    exit_iteration: int = Field(default=0, ge=0)
    """End the run at this update, with the schedule of the whole run; 0 is off."""
    exit_iteration_this_run: int = Field(default=0, ge=0)
    """End after so many updates of this process; 0 is off."""
    min_iterations: int = Field(default=0, ge=0)
    """Repeat the training rows until they fill so many updates."""
    overfit_first_batch: bool = False
    """Train on the first batch for ever."""

    # The update.

    max_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""
    loss_weighting: Literal["token", "sample"] = "token"
    """What has equal weight in loss and gradient: each trained token, or each document of a packed
    row."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over the vocabulary; not in evaluations. It, `z_loss` and
    `loss_weighting` are of the built-in objectives."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the squared log-partition term, which is logged apart from the loss."""
    seed: int = Field(default=42, ge=0)
    """The one seed: weights and every random number of the step."""
    ema: EmaConfig | None = None
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What happens when the loss or the gradient norm is not finite."""
    divergence: DivergenceConfig | None = None
    replica_check_interval: int = Field(default=0, ge=0)
    """Updates between comparisons of the parameters that devices hold copies of."""
    activation_checkpoint_cpu_offload: bool = False
    """Keep what the backward pass needs in host memory."""
    tiled_mlp_compute: bool = False
    """Run feed-forward layers in pieces along the sequence, each as many tokens as the model is
    wide."""
    arctic_moe: bool | Literal["auto"] = False
    enable_arctic_moe_custom_optimization: bool = False
    enable_routing_replay: bool = False
    """Keep the router's choices across rematerialisation."""

    # Evaluation.

    eval_interval: int = Field(default=0, ge=0)
    """Updates between evaluations."""
    eval_at_start: bool = False
    """Evaluate before the first update."""
    eval_at_end: bool | None = None
    """Evaluate after the last update, unless it was just done; true with evaluation data when
    left out."""
    eval_after_step: int = Field(default=0, ge=0)
    """No periodic evaluation before it."""
    eval_every_n_epochs: int = Field(default=0, ge=0)
    """Epochs between evaluations, besides `eval_interval`."""
    max_eval_batches: int = Field(default=0, ge=0)
    """Limit of batches an evaluation; 0 takes all."""
    early_stopping: EarlyStoppingConfig | None = None
    eval_samples: SamplesConfig | None = None
    """Answers to generate at evaluations."""

    # What is told.

    run_dir: str | None = None
    """Metrics, logs, resolved recipe; `logger.output_dir`, else `runs/<recipe name>-<hash>`, when
    left out. A folder that holds a run is continued by `auto_resume`, else refused. With `{n}` in
    the last part of the name every run gets the next number, unless it continues the newest; write
    `{run_dir}/…` as a checkpoint's `output_dir` to have the checkpoints beside it."""
    train_log_iter_interval: int = Field(default=1, ge=0)
    """Updates between rows of training metrics, shown and written; the first always has one. 0 is
    none."""
    train_log_metrics_path: str | None = None
    """The metrics file; `run_dir/train-log-metrics.jsonl` when left out."""
    loss_log_interval: int = Field(default=1, ge=0)
    """Updates between losses in the log; 0 is none."""
    eval_log_iter_interval: int = Field(default=1, ge=0)
    """Evaluations between those that are printed, 0 prints none; the metrics file has all."""
    kill_switch_path: str | None = None
    """A file that ends the run when it appears; `run_dir/stop` when left out."""
    profile: ProfileConfig | None = None
    mem_profiler: Literal["step", "e2e"] | None = None
    """Device memory profile (pprof) of each logged update, or of the end."""
    mem_profiler_dir: str | None = None
    """`run_dir/mem-prof` when left out."""
    mem_profiler_max_entries: int = Field(default=100_000, ge=1)

    _secrets: Secrets = PrivateAttr(default_factory=dict)

    @property
    def secrets(self) -> Secrets:
        """What came from the environment, which no message and no file may hold."""
        return self._secrets

    @property
    def passes(self) -> int | None:
        """Times that all rows are taken; None for as often as `train_iters` needs."""
        return 1 if self.epochs is None and not self.train_iters else self.epochs

    def output(self, written: str | None, name: str) -> Path:
        """An output path of the recipe, or what it is in the run's folder when left out."""
        return expand_user(written) if written else expand_user(self.run_dir or "") / name

    def horizon(self, updates_per_epoch: int | None) -> int | None:
        """Updates that the recipe plans; None when that takes the unknown length of an epoch."""
        limits = [self.train_iters] if self.train_iters else []
        if self.passes is not None:
            if updates_per_epoch is None:
                return 0 if self.passes == 0 else None
            limits.append(self.passes * updates_per_epoch)
        return min(limits)
