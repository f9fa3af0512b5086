"""What a run is made of: each part from its section of the recipe, or given ready-made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypedDict

import jax
import optax
from jax.sharding import Mesh

from jaxtrain import registry
from jaxtrain.checkpoint import CheckpointEngine
from jaxtrain.data import BatchShape, DataFactory, DataShape, TrainingData
from jaxtrain.data.prepare import GivenRows, data_factory, prepare_data, prepare_evaluation
from jaxtrain.model import Decoder, LanguageModel, ModelFactory, ModelSpec
from jaxtrain.optimizer import Groups, with_moments
from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.recipe.errors import RecipeError, did_you_mean
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.scheduler import Schedule
from jaxtrain.trainer.average import Average
from jaxtrain.trainer.state import (
    PyTree,
    TrainState,
    new_state,
    state_shardings,
    with_shardings,
)


class Given(TypedDict, total=False):
    """Ready-made objects, each in place of what a section of the recipe makes."""

    model: Decoder | None
    """With the weights to start from, such as the `model` of another trainer."""
    tokenizer: Any
    processing_class: Any
    """Another name for `tokenizer`."""
    train_data: GivenRows | None
    eval_data: GivenRows | Mapping[str, GivenRows] | None
    """Rows of one set, or of several by their names."""
    optimizer: optax.GradientTransformation | None
    """At its own peak rate."""
    scheduler: Schedule | None
    """Update number, from 0 → share of that rate."""
    early_stopper: Any
    """`(step, score) → bool`, or an object with such a `should_stop`: whether to end the run. The
    score is the `metric` of the first checkpoint entry, else `eval/loss`."""
    devices: Sequence[Any] | None
    """Of the mesh; to lower the step they need not be present."""
    data: TrainingData | DataShape | None
    """All batches, or their shape where nothing but a step is lowered."""


RIGHT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, Decoder), "the `model` of another trainer"),
    "optimizer": (
        lambda v: isinstance(v, optax.GradientTransformation), "an optax transformation"
    ),
    "scheduler": (callable, "a function of the update number"),
    "early_stopper": (
        lambda v: callable(getattr(v, "should_stop", v)), "a function of step and score"
    ),
}  # fmt: skip


def known(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """TypeError for an argument that no trainer has, or of which it could make nothing."""
    for name, (is_right, right) in RIGHT.items():
        if given.get(name) is not None and not is_right(given[name]):
            raise TypeError(f"{name} must be {right}, found {given[name]!r}")
    for name in given.keys() - Given.__annotations__.keys():
        names = ["mode", "callbacks", *Given.__annotations__]
        raise TypeError(f"a trainer takes no {name!r}{did_you_mean(name, names)}")
    return given


class Parts:
    """Of a trainer. A part is made when it is first asked for, since one asks for another: a model
    for the length of a row, a schedule for that of the run."""

    config: TrainerConfig
    given: Mapping[str, Any]
    """what `Given` names"""
    schedule_start: int = 0
    """update from which the schedule counts"""

    @cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self.config.mesh, self.given.get("devices") or jax.devices())

    @cached_property
    def layout(self) -> BatchLayout:
        return BatchLayout.of(self.config, self.mesh)

    @cached_property
    def model_config(self) -> ModelSpec:
        """What the model is, with room for the tokenizer, and where its weights lie."""
        if isinstance(self.given.get("data"), DataShape):
            return self._found_model  # no token will come
        tokens = 1 + max(self.tokenizer.get_vocab().values())
        return self._found_model.with_room(tokens, self.config.model)

    @cached_property
    def tokenizer(self) -> Any:
        """With its chat template."""
        for name in ("tokenizer", "processing_class"):
            if self.given.get(name) is not None:
                return self.given[name]
        path = self._found_model.path
        return self._made("tokenizer", self.config.tokenizer, path).create_tokenizer()

    @cached_property
    def data(self) -> TrainingData:
        """Rows to batches, for training and for every evaluation set."""
        if self.given.get("data") is not None:
            return self.given["data"]
        data = prepare_data(
            self.data_factory,
            self._batch_shape,
            train_data=self.given.get("train_data"),
            eval_data=self.given.get("eval_data"),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ).repeated(
            min_updates=self.config.min_iterations, first_only=self.config.overfit_first_batch
        )
        self.layout.refuse_too_few(data.train_rows)
        return data

    def data_of(self, dataset: Any) -> TrainingData:
        """With a data set for evaluation that is none of the recipe's, in place of those."""
        lengths = self.data.train.lengths
        plan = prepare_evaluation(self.data_factory, dataset, self._batch_shape, lengths=lengths)
        return replace(self.data, evals={"eval": plan})

    @cached_property
    def language_model(self) -> LanguageModel:
        """As the mesh computes it, without its weights."""
        return self.model_factory.create_model(self.model_config)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Updates at the peak rate."""
        if (given := self.given.get("optimizer")) is not None:
            return with_moments(given, None)
        return self.groups.optimizer(self._made("optimizer", self.config.optimizer))

    @cached_property
    def groups(self) -> Groups:
        """Which parameters are trained, and with which settings of the optimizer."""
        section = self.config.optimizer
        if section.groups and self.given.get("optimizer") is not None:
            raise RecipeError("optimizer.groups: excludes a given optimizer; remove one")
        return Groups.of(section, self.language_model.shapes)

    @cached_property
    def scheduler(self) -> Schedule:
        """Update number → share of the peak rate."""
        schedule, start = self.given.get("scheduler"), self.schedule_start
        if schedule is None:
            factory = self._made("scheduler", self.config.scheduler)
            schedule = factory.create_scheduler(self.config.optimizer)
        return (lambda update: schedule(update - start)) if start else schedule

    @cached_property
    def checkpoint_engines(self) -> list[CheckpointEngine]:
        return [self._made("checkpoint", entry) for entry in self.config.checkpoint]

    @cached_property
    def average(self) -> Average:
        return Average(self.config.ema)

    @cached_property
    def shardings(self) -> TrainState:
        """Where each array of the state lives."""
        return state_shardings(
            self.mesh,
            self.language_model.shapes,
            self.optimizer,
            zero_stage=self.config.deepspeed.zero_stage,
            has_average=self.config.ema is not None,
        )

    @cached_property
    def state_shapes(self) -> TrainState:
        """What a checkpoint is restored to."""
        return with_shardings(
            jax.eval_shape(self._first_state, self.language_model.shapes), self.shardings
        )

    def new_state(self, params: PyTree) -> TrainState:
        """The state before the first update of these parameters, which are donated."""
        make = jax.jit(self._first_state, donate_argnums=0, out_shardings=self.shardings)
        with jax.set_mesh(self.mesh):
            return make(params)

    def _first_state(self, params: PyTree) -> TrainState:
        return new_state(params, self.optimizer, self.average.start)

    @property
    def peak_lr(self) -> float:
        """What the schedule is a share of; 1 for a given optimizer, whose rate nobody knows."""
        return (
            1.0 if self.given.get("optimizer") is not None else self.config.optimizer.learning_rate
        )

    @cached_property
    def _found_model(self) -> ModelSpec:
        """As its files describe it."""
        return self.model_factory.create_config()

    @cached_property
    def model_factory(self) -> ModelFactory:
        return self._made("model", self.config.model)

    @cached_property
    def data_factory(self) -> DataFactory:
        positions = self.model_config.config.max_positions
        return data_factory(
            self.config.data,
            self.tokenizer,
            max_positions=positions,
            tokenize_kwargs=self.config.tokenizer.tokenize_kwargs,
            trainer=self,
        )

    @property
    def _batch_shape(self) -> BatchShape:
        return BatchShape(self.layout.num_microbatches, self.layout.microbatch_rows)

    def _made(self, kind: str, config: Any, *values: Any) -> Any:
        """The factory that a section of the recipe names."""
        return registry.find(kind, config.type)(config, *values, trainer=self)
