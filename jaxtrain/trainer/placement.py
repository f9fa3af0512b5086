"""Where each array of the state lives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.model import LanguageModel
from jaxtrain.optimizer import Groups
from jaxtrain.parallel.host_memory import (
    has_host_memory,
    move_matrices_to_host,
    move_to_host,
)
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.deepspeed import OFFLOAD_OPTIMIZER, OFFLOAD_PARAM
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.loss_scale import Scaling
from jaxtrain.trainer.state import BASE, TrainState, optimizer_shardings


def place_state(
    config: TrainerConfig,
    mesh: Mesh,
    *,
    model: LanguageModel,
    groups: Groups,
    optimizer: optax.GradientTransformation,
    init_frozen: Callable[[Any], Any],
) -> TrainState:
    """The shardings of a state. RecipeError for what the mesh cannot hold."""
    shapes, stage = model.shapes, config.deepspeed.zero_stage
    place, replicated = partial(parameter_shardings, mesh), NamedSharding(mesh, P())
    params, frozen = place(shapes, over_data=stage >= 1), jax.eval_shape(init_frozen, shapes)
    if model.base_shapes:
        frozen[BASE] = model.base_shapes
    trained = groups.trained(shapes)
    opt_state = optimizer_shardings(mesh, optimizer, trained, groups.trained(params))
    if config.deepspeed.offloads_optimizer and has_host_memory(mesh, [OFFLOAD_OPTIMIZER]):
        opt_state = move_to_host(opt_state, jax.eval_shape(optimizer.init, trained))
    scale = jax.eval_shape(Scaling(config.loss_scaling).start)
    state = TrainState(
        step=replicated,  # type: ignore[arg-type]
        params=params,
        frozen={name: place(tree, over_data=stage == 3) for name, tree in frozen.items()},
        opt_state=opt_state,
        average=params if config.ema is not None else {},
        loss_scale=jax.tree.map(lambda _: replicated, scale),
    )
    if config.deepspeed.offloads_params and has_host_memory(mesh, [OFFLOAD_PARAM]):
        return _offload_matrices(state, model)
    return state


def _offload_matrices(state: TrainState, model: LanguageModel) -> TrainState:
    """Those of layers in the host's memory; with adapters, which are small, those of the base."""
    if model.base_shapes:
        base = move_matrices_to_host(state.frozen[BASE], model.base_shapes)
        return state._replace(frozen={**state.frozen, BASE: base})
    params = move_matrices_to_host(state.params, model.shapes)
    return state._replace(params=params, average=params if state.average else {})
