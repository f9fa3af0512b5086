"""What a step reads and replaces: parameters, optimizer state, update count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.sharding import parameter_shardings, path_name

PyTree = Any


class TrainState(NamedTuple):
    step: jax.Array
    """int32 []: updates done; the label of every checkpoint and log line"""
    params: PyTree
    """what is trained"""
    frozen: PyTree
    """what is not: the base of an adapter, a reference model; empty in full training"""
    opt_state: PyTree
    average: PyTree = {}
    """of the parameters over the updates; empty without `ema`"""


def new_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    average: Callable[[PyTree], PyTree] = lambda params: {},
) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.int32(0), params, {}, optimizer.init(params), average(params))


def state_shardings(
    mesh: Mesh,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    zero_stage: int = 0,
    has_average: bool = False,
) -> TrainState:
    """A sharding for every leaf of the state; moments live where their parameter does, from stage 1
    on a part on each device of `data`.

    `params` are shapes. RecipeError if the mesh does not divide the model.
    """
    replicated = NamedSharding(mesh, P())
    param_shardings = parameter_shardings(mesh, params, over_data=zero_stage >= 1)
    named = {
        path_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params),
            jax.tree.leaves(param_shardings),
            strict=True,
        )
    }

    def placed(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # A moment ends in its parameter's path; a factored one has another shape, and is small.
        parts = path_name(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        shape, sharding = next((named[end] for end in ends if end in named), (None, replicated))
        return sharding if shape == leaf.shape else replicated

    state = jax.eval_shape(optimizer.init, params)
    opt_state = jax.tree_util.tree_map_with_path(placed, state)
    average = param_shardings if has_average else {}
    return TrainState(replicated, param_shardings, {}, opt_state, average)  # type: ignore[arg-type]


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that also say where each array lives; what a checkpoint is restored to."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )
