"""A run: everything that is fixed while a recipe trains, built once, without weights and data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxtrain import registry
from jaxtrain.data.render import find_stop_tokens
from jaxtrain.metrics.flops import count_tokens
from jaxtrain.model import Decoder, LanguageModel
from jaxtrain.model.factory import Placement
from jaxtrain.model.lora import join
from jaxtrain.model.routing import refuse_idle_experts
from jaxtrain.optimizer import Groups, with_moments
from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.checkpoint import HFCheckpointConfig
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import Schedule
from jaxtrain.tokenizer import save_tokenizer
from jaxtrain.trainer.average import Average
from jaxtrain.trainer.found_model import FoundModel
from jaxtrain.trainer.given import Given
from jaxtrain.trainer.loss_scale import Scaling
from jaxtrain.trainer.pieces import choose_apply_if
from jaxtrain.trainer.placement import place_state
from jaxtrain.trainer.state import BASE, PyTree, TrainState, with_shardings
from jaxtrain.trainer.step import Objective, StepSpec


@dataclass(frozen=True, eq=False)
class Run:
    """What is fixed while a recipe trains; holds no arrays."""

    config: TrainerConfig
    layout: BatchLayout
    model: LanguageModel
    """as the mesh computes it, without its weights"""
    groups: Groups
    optimizer: optax.GradientTransformation
    """of what is trained; its updates are at the peak learning rate"""
    peak_lr: float
    """1 for a given optimizer, whose rate nobody knows"""
    schedule: Schedule
    """step → fraction of the peak learning rate"""
    average: Average
    scaling: Scaling
    init_frozen: Callable[[PyTree], PyTree]
    shardings: TrainState
    """where each array of the state lives"""
    given_scheduler: Schedule | None
    is_optimizer_given: bool
    is_separable: bool
    """every layer is updated as if it were alone"""
    view: Any
    """the trainer as factories of the user see it"""

    @property
    def mesh(self) -> Mesh:
        return self.layout.mesh

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and shardings of the state: what a checkpoint is restored to."""
        shapes = jax.eval_shape(self._first_state, self.model.all_shapes)
        return with_shardings(shapes, self.shardings)

    def first_state(self, params: PyTree) -> TrainState:
        """The state before the first step of these parameters of the whole model, which are
        donated."""
        build = jax.jit(self._first_state, donate_argnums=0, out_shardings=self.shardings)
        with jax.set_mesh(self.mesh):
            return build(params)

    def _first_state(self, params: PyTree) -> TrainState:
        params, base = self.model.split(params)
        opt_state = self.optimizer.init(self.groups.trained(fetch(params)))
        frozen, average = self.init_frozen(fetch(params)), self.average.start(params)
        frozen = frozen | ({BASE: base} if base else {})
        scale = self.scaling.start()
        return TrainState(jax.numpy.int32(0), params, frozen, opt_state, average, scale)

    def first_params(self, given: Decoder | None, *, base_only: bool = False) -> PyTree:
        """The weights to start from, of the whole model or of the base of adapters: copied from a
        model, read, or made at random, each where it lives."""
        first_params = self.model.first_base if base_only else self.model.first_params
        shardings = join(self.shardings.params, self.shardings.frozen.get(BASE, {}))
        with jax.set_mesh(self.mesh):
            return first_params(shardings, seed=self.config.seed, given=given)

    def eval_params(self, state: TrainState) -> PyTree:
        """The parameters of the whole model that are evaluated, sampled from and exported."""
        return join(self.average.eval_params(state), state.frozen.get(BASE, {}))

    def export(
        self, state: TrainState, folder: Path, config: HFCheckpointConfig, tokenizer: Any
    ) -> None:
        """Write a folder that `transformers` loads; CheckpointError, and no folder, if it reads
        back as something else."""
        self.model.save(
            folder,
            self.eval_params(state),
            dtype=self.config.model.dtype or self.model.compute.compute_dtype,
            add_files=partial(save_tokenizer, tokenizer),
            stop_tokens=find_stop_tokens(tokenizer) if self.config.type != "causal" else (),
            max_shard_bytes=config.max_shard_bytes,
            verify=config.verify_export,
            adapter=config.adapter,
            base_name=self.config.model.name_or_path,
        )

    def restart_schedule(self, steps: int, start: int) -> "Run":
        """The same run with a schedule over so many steps, counted from step `start`."""
        given, view = self.given_scheduler, self.view
        schedule = build_schedule(self.config, steps, start, given=given, view=view)
        return replace(self, schedule=schedule)

    def step_spec(self, objective: Objective) -> StepSpec:
        """What the pure step needs."""
        stage, groups = self.config.deepspeed.zero_stage, self.groups
        place = partial(parameter_shardings, self.mesh, self.model.shapes)
        updated = self.state_shapes.params, self.state_shapes.opt_state
        return StepSpec(
            objective=objective,
            optimizer=self.optimizer,
            schedule=self.schedule,
            average=self.average.update,
            select_trained=groups.trained,
            replace_trained=groups.merge,
            max_grad_norm=self.config.max_grad_norm,
            seed=self.config.seed,
            count=partial(count_tokens, windows=self.model.windows),
            compute_shardings=self.shardings.params if stage == 3 else place(over_data=False),
            grad_shardings=groups.trained(place(over_data=stage >= 2)),
            whole_batch=self.layout.stages > 1,
            scaling=self.scaling,
            apply_if=choose_apply_if(updated, self.optimizer, self.is_separable),
            sequences_per_sample=self.layout.sequences_per_sample,
        )


def build(
    config: TrainerConfig,
    layout: BatchLayout,
    model: FoundModel,
    *,
    steps: int,
    sequence_lengths: Iterable[int],
    given: Given | None = None,
    init_frozen: Callable[[PyTree], PyTree] = lambda params: {},
    view: Any = None,
) -> Run:
    """The run of a recipe, of so many steps on sequences of these lengths. RecipeError for what the
    mesh, the model or the schedule cannot do."""
    given = given or {}
    refuse_idle_experts(config, model.spec.config)
    layout.refuse_uneven(sequence_lengths)
    placement = Placement(
        layout, max(sequence_lengths), config.tiled_mlp_compute, config.enable_routing_replay,
        config.deepspeed.autocast_dtype, config.activation_checkpoint_cpu_offload,
        config.deepspeed.zero_stage >= 2,
    )  # fmt: skip
    language_model = model.factory.create_model(replace(model.spec, placement=placement))
    shapes = language_model.shapes

    groups, peak_lr = Groups.of(config.optimizer, shapes), config.optimizer.learning_rate
    optimizer, scheduler = given.get("optimizer"), given.get("scheduler")
    is_optimizer_given = optimizer is not None
    if optimizer is None:
        cls = registry.find("optimizer", config.optimizer.type)
        optimizer = groups.optimizer(cls(config.optimizer, trainer=view))
    elif config.optimizer.groups:
        raise RecipeError("optimizer.groups: excludes a given optimizer; remove one")
    else:
        optimizer, peak_lr = with_moments(optimizer, None), 1.0
    schedule = build_schedule(config, steps, 0, given=scheduler, view=view)

    shardings = place_state(
        config, layout.mesh, model=language_model, groups=groups, optimizer=optimizer,
        init_frozen=init_frozen,
    )  # fmt: skip
    return Run(
        config, layout, language_model, groups, optimizer, peak_lr, schedule, Average(config.ema),
        Scaling(config.loss_scaling), init_frozen, shardings, scheduler, is_optimizer_given,
        groups.is_separable and not is_optimizer_given, view,
    )  # fmt: skip


def build_schedule(
    config: TrainerConfig, steps: int, start: int, *, given: Schedule | None, view: Any = None
) -> Schedule:
    """Step → fraction of the peak learning rate, over so many steps from step `start`."""
    schedule = given
    if schedule is None:
        factory = registry.find("scheduler", config.scheduler.type)(config.scheduler, trainer=view)
        factory.training_horizon = steps
        factory.warmup_steps = config.scheduler.warmup_updates(steps)
        schedule = factory.create_scheduler(config.optimizer)
    return (lambda step: schedule(step - start)) if start else schedule
