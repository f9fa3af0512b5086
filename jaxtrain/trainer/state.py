"""What a step reads and replaces: parameters, optimizer state, step count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.sharding import path_name

PyTree = Any
BASE = "base"
"""Name in `TrainState.frozen` of the weights under the adapters that are trained."""


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
    loss_scale: PyTree = {}
    """a `LossScale`; empty where no scale of the loss moves"""

    def without_base(self) -> "TrainState":
        """What a checkpoint holds of it: all but the base of adapters. No step changes that, it is
        many times as large as the rest, and it lies in the model's folder already."""
        kept = {name: tree for name, tree in self.frozen.items() if name != BASE}
        return self._replace(frozen=kept)


class Moving(NamedTuple):
    """What an update replaces."""

    trained: PyTree
    """the parameters that are trained"""
    opt_state: PyTree
    average: PyTree
    """of what is trained; empty without `ema`"""


Update = Callable[[Moving, PyTree], Moving]
"""(what moves, gradients) → the same after the update"""


def apply_if(ok: jax.Array, update: Update, moving: Moving, gradients: PyTree) -> Moving:
    """`update(moving, gradients)` where `ok`, else `moving` bit for bit; either way in its
    memory."""
    # A loop of one turn or none, since XLA updates what a loop carries in place. It copies the
    # whole state out of a `cond` on GPU, and on CPU a `where` keeps the old and the new one alive.
    # The barrier keeps products of the gradients alone, two more trees of them, inside the loop.
    body = lambda _, moving: update(*jax.lax.optimization_barrier((moving, gradients)))
    return jax.lax.fori_loop(0, ok.astype(jnp.int32), body, moving)


def is_finite(state: TrainState) -> bool:
    """Whether there is neither NaN nor infinity in it; waits for the device."""
    return bool(_all_finite(state))


@jax.jit
def _all_finite(tree: PyTree) -> jax.Array:
    floats = [a for a in jax.tree.leaves(fetch(tree)) if jnp.issubdtype(a.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.isfinite(a).all() for a in floats]))


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
        # A moment has its parameter's path at the end, or before the name of a part of it.
        parts = path_name(path).split("/")
        names = ("/".join(parts[i:j]) for j in (len(parts), len(parts) - 1) for i in range(j))
        shape, sharding = next((by_name[name] for name in names if name in by_name), ((), None))
        if sharding is None or len(shape) != leaf.ndim:
            return replicated
        # One with fewer entries along a dimension may not divide as the parameter does.
        shards = map(int.__floordiv__, shape, sharding.shard_shape(shape))
        spec = zip(sharding.spec, shards, leaf.shape, strict=False)
        return NamedSharding(mesh, P(*(axes if size % n == 0 else None for axes, n, size in spec)))

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trained))


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that also say where each array lives; what a checkpoint is restored to."""
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )
