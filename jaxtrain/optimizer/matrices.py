"""The matrices that a parameter holds: the layers of a stack, and what is joined in one array.

Statistics of a matrix, such as its norm, are of each of them alone: an optimizer does to a stack
what it would do to its layers one by one, and to q, k and v what it would do to each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxtrain.parallel.matrices import MATRICES, place_of
from jaxtrain.parallel.sharding import path_name


class Layout(NamedTuple):
    """Dimensions of one matrix, or vector, in its parameter; the others number separate ones."""

    rows: tuple[int, ...]
    columns: tuple[int, ...] = ()
    """none for a vector"""
    joined: int | None = None
    """the dimension along which q, k and v are joined: the last two entries are k and v"""

    def split(self, x: Array) -> list[Array]:
        """The parts of a parameter, each with separate matrices of one kind."""
        if self.joined is None:
            return [x]
        end = x.shape[self.joined]
        return jnp.split(x, [end - 2, end - 1], self.joined)

    def join(self, parts: list[Array]) -> Array:
        return parts[0] if self.joined is None else jnp.concatenate(parts, self.joined)

    def means(self, x: Array, dims: tuple[int, ...]) -> Array:
        """Means of each matrix over some of its dimensions, which have length 1 then; that of
        `joined` has an entry for q, k and v each."""
        if self.joined not in dims:
            return x.mean(dims, keepdims=True)
        return self.join([part.mean(dims, keepdims=True) for part in self.split(x)])

    def repeat(self, means: Array, like: Array) -> Array:
        """`means` of `like`, so that they broadcast to it."""
        if self.joined is None or means.shape[self.joined] == like.shape[self.joined]:
            return means
        sizes = [part.shape[self.joined] for part in self.split(like)]
        q, k, v = self.split(means)
        return self.join([jnp.repeat(q, sizes[0], self.joined), k, v])


LAYOUTS = {
    "embedding": Layout((0,), (1,)),
    "positions": Layout((0,), (1,)),
    "head": Layout((0,), (1,)),
    "norm": Layout((0,)),
    "norm_bias": Layout((0,)),
    "qkv": Layout((1,), (2, 3, 4), joined=3),
    "qkv_bias": Layout((1, 2, 3), joined=2),
    "out": Layout((1, 2, 3), (4,)),
    "q": Layout((1,), (2, 3)),
    "q_a": Layout((1,), (2,)),
    "q_b": Layout((1,), (2, 3)),
    "kv_a": Layout((1,), (2,)),
    "kv_b": Layout((1,), (2, 3)),
    "sinks": Layout((1, 2)),
    "in_qkv": Layout((1,), (2, 3)),
    "in_gate": Layout((1,), (2, 3, 4)),
    "in_strength": Layout((1,), (2, 3)),
    "in_decay": Layout((1,), (2, 3)),
    "decay_bias": Layout((1, 2)),
    "log_decay_scale": Layout((1, 2)),
    "qkv_conv": Layout((2, 3), (1,)),
    "in_bcx": Layout((1,), (3,)),
    "in_bcx_bias": Layout((2,)),
    "conv": Layout((2,), (1,)),
    "conv_out": Layout((1,), (2,)),
    "layer_inputs": Layout((0,), (1, 2)),
    "project": Layout((1,), (2, 3)),
    "narrow": Layout((1,), (2,)),
    "widen": Layout((1,), (2,)),
    "gate_up": Layout((1,), (3,)),
    "gate_up_bias": Layout((2,)),
    "down": Layout((1,), (2,)),
    "router": Layout((1,), (2,)),
    "shared_gate": Layout((1,), (2,)),
    "expert_gate_up": Layout((2,), (4,)),
    "expert_gate_up_bias": Layout((3,)),
    "expert_down": Layout((2,), (3,)),
    "expert_down_bias": Layout((2,)),
}
"""Name of a parameter → its matrices; every other is a stack of vectors, but for the factors `a`
and `b` of adapters. model/decoder.py has the shapes."""


def map_matrices(function: Callable[..., Any], *trees: Any) -> Any:
    """The tree of `function(layout, *leaves)` of every parameter."""

    def apply(path: Any, *leaves: Any) -> Any:
        name, adapted = path[-1].key, path_name(path).rpartition("_lora/")[0]
        matrix = MATRICES.get(place_of(adapted))
        dims = tuple(range(len(matrix.lead) if matrix else 1, leaves[0].ndim))
        factors = {"a": Layout(dims[:-1], dims[-1:]), "b": Layout(dims[:1], dims[1:])}
        return function({**LAYOUTS, **factors}.get(name, Layout(dims)), *leaves)

    return jax.tree_util.tree_map_with_path(apply, *trees)
