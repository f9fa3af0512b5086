"""An update of parameters and moments one piece at a time, for those in the host's memory and for
moments in eight bits: no more than a layer of them is on a device at once, or in float32."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxtrain.parallel.host_memory import fetch, is_moved_to_host, put_like
from jaxtrain.trainer.state import Moving, PyTree, Update, apply_if

LAYERS = "layers"


def choose_apply_if(
    shapes: PyTree, optimizer: optax.GradientTransformation, is_separable: bool
) -> Callable[..., Moving]:
    """How an update is applied where it is to be, to what has these shapes and shardings."""
    leaves = jax.tree.leaves(shapes)
    is_rounded = any(leaf.dtype == jnp.uint8 for leaf in leaves)
    # One layer after the other is not for stages, which have different ones.
    by_layer = is_rounded and is_separable and leaves[0].sharding.mesh.shape["pipeline"] == 1
    if not by_layer and not is_moved_to_host([leaf.sharding for leaf in leaves]):
        return apply_if
    return partial(update_in_pieces, init=optimizer.init, is_separable=is_separable)


def update_in_pieces(
    ok: jax.Array,
    update: Update,
    moving: Moving,
    gradients: PyTree,
    *,
    init: Callable[[PyTree], PyTree],
    is_separable: bool,
) -> Moving:
    """`update(moving, gradients)` where `ok`, else `moving`. `init` is that of the optimizer, which
    `is_separable` if it treats every layer as if it were alone; else all is one piece."""
    before = moving
    for piece in _pieces(moving.trained) if is_separable else [moving.trained]:
        part = Moving(
            _select(piece, moving.trained),
            # Its scalars, such as the number of updates, are those before the first piece.
            _like(jax.eval_shape(init, piece), moving.opt_state, before.opt_state),
            _select(piece, moving.average) if moving.average else {},
        )
        num_layers = _count_layers(part) if is_separable else 1
        part = _update_piece(ok, update, part, _select(piece, gradients), num_layers)
        moving = Moving(*map(_replace, moving, part))
    return moving


def _pieces(trained: PyTree) -> Iterator[PyTree]:
    """Subtrees that are updated together: each group of layers, and every other parameter."""
    for name, tree in trained.items():
        if name == LAYERS:
            yield from ({LAYERS: {group: layers}} for group, layers in tree.items())
        else:
            yield {name: tree}


def _count_layers(part: Moving) -> int:
    """Layers in which a piece can be cut; 1 for what is no stack of them."""
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(part) if leaf.ndim}
    return lengths.pop() if LAYERS in part.trained and len(lengths) == 1 else 1


def _update_piece(
    ok: jax.Array, update: Update, part: Moving, gradients: PyTree, num_layers: int
) -> Moving:
    if num_layers == 1:

        def whole(_: jax.Array, part: Moving) -> Moving:
            # As in `apply_if`: else products of the gradients alone would be made before the loop.
            trained, inside = jax.lax.optimization_barrier((part.trained, gradients))
            return _apply(update, part._replace(trained=trained), inside)

        return jax.lax.fori_loop(0, ok.astype("int32"), whole, part)

    def one_layer(i: jax.Array, after: Moving) -> Moving:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1) if a.ndim else a
        scalars_before = jax.tree.map(lambda old, new: new if old.ndim else old, part, after)
        new = _apply(update, jax.tree.map(cut, scalars_before), jax.tree.map(cut, gradients))
        place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=0)
        return jax.tree.map(lambda a, x: place(a, x) if a.ndim else x, after, new)

    return jax.lax.fori_loop(0, ok * num_layers, one_layer, part)


def _apply(update: Update, part: Moving, gradients: PyTree) -> Moving:
    return put_like(update(fetch(part), fetch(gradients)), part)


def _select(piece: PyTree, tree: PyTree) -> PyTree:
    """The part of a tree of parameters that `piece` has."""
    if not isinstance(piece, dict):
        return tree
    return {name: _select(part, tree[name]) for name, part in piece.items()}


def _like(shapes: PyTree, tree: PyTree, before: PyTree) -> PyTree:
    """The part of an optimizer state that `shapes` has, with scalars as they were before."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(tree))
    scalars = dict(jax.tree_util.tree_leaves_with_path(before))
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    found = [(by_path if leaf.ndim else scalars)[path] for path, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, found)


def _replace(tree: PyTree, part: PyTree) -> PyTree:
    """A tree with the leaves that its part has too."""
    new = dict(jax.tree_util.tree_leaves_with_path(part))
    return jax.tree_util.tree_map_with_path(lambda path, old: new.get(path, old), tree)
