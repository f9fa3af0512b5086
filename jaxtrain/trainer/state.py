"""What a step reads and replaces: parameters, optimizer state, step count."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.sharding import parameter_shardings, path_name

PyTree = Any


class TrainState(NamedTuple):
    step: jax.Array
    """int32 []: steps done; the label of every checkpoint and log line"""
    params: PyTree
    """the parameters of the model"""
    frozen: PyTree
    """name → further parameters that nothing trains: the base of an adapter, a reference model"""
    opt_state: PyTree
    """of the parameters that are trained"""
    average: PyTree = {}
    """of the parameters over the steps; empty without `ema`"""


def optimizer_shardings(
    mesh: Mesh, optimizer: optax.GradientTransformation, trained: PyTree, shardings: PyTree
) -> PyTree:
    """A sharding for every leaf of the optimizer state, given shapes and shardings of what is
    trained: a moment lives where its parameter does."""
    replicated = NamedSharding(mesh, P())
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    by_name = {
        path_name(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # A moment ends in its parameter's path; a factored one has another shape, and is small.
        parts = path_name(path).split("/")
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        shape, sharding = next((by_name[end] for end in ends if end in by_name), (None, replicated))
        return sharding if shape == leaf.shape else replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trained))


def frozen_shardings(mesh: Mesh, frozen: PyTree, *, over_data: bool) -> PyTree:
    """Those of each named tree, by the rules for parameters."""
    place = lambda shapes: parameter_shardings(mesh, shapes, over_data=over_data)
    return {name: place(shapes) for name, shapes in frozen.items()}


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that also say where each array lives; what a checkpoint is restored to."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )
