"""Where arrays live: a table of parameter paths to logical axes, and one of those to mesh axes."""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.matrices import BLOCKS, axes_of_matrices
from jaxtrain.recipe.errors import Fault, RecipeError
from jaxtrain.recipe.mesh import BATCH_AXES

MESH_AXES = {
    "batch": BATCH_AXES,
    "tokens": ("context",),
    "rows": tuple(axis for axis in BATCH_AXES if axis != "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "kv_heads": ("tensor",),
    "delta_heads": ("tensor",),
    "conv": ("tensor",),
    "ffn": ("tensor",),
    **dict.fromkeys(BLOCKS.values(), ("tensor",)),
    "experts": ("expert",),
    "layers": ("pipeline",),
}
"""Logical axis → the mesh axes that split it."""

PARAMETERS = (
    *axes_of_matrices(),
    (r"embed/embedding", ("vocab", "embed")),
    (r"embed/positions", (None, "embed")),
    (r"embed/layer_inputs", ("vocab", None, "embed")),
    (r"head", ("embed", "vocab")),
    (r"layer_inputs/.*", ()),
    (r"layers/.*_lora/.*/(scale|salt)", ("layers",)),
    (r"layers/.*/(means|ranges)", ("layers",)),
    (r"layers/.*/attention/qkv_bias", ("layers", "kv_heads", None, None)),
    (r"layers/.*/attention/sinks", ("layers", "kv_heads")),
    (r"layers/.*/mixer/in_bcx_bias", ("layers", None, "conv")),
    (r"layers/.*/mixer/decay_bias", ("layers", "delta_heads")),
    (r"layers/.*/mixer/log_decay_scale", ("layers", "delta_heads")),
    (r"layers/.*/mixer/qkv_conv", ("layers", None, "delta_heads")),
    (r"layers/.*/mixer/conv", ("layers", None, "conv")),
    (r"layers/.*/mlp/gate_up_bias", ("layers", None, "ffn")),
    (r"layers/.*/(mlp|experts)/expert_gate_up_bias", ("layers", "experts", None, "ffn")),
    (r"layers/.*(norm|bias|scale)", ("layers",)),
    (r"norm|norm_bias", ()),
)
"""Parameter path → logical axis of each dimension, none where it ends; the first full match counts.
"""

ZERO_AXES = ("data", "context")
"""Mesh axes whose devices hold the same parameters, unless a ZeRO stage splits what they store."""

TITLES = {
    "vocab": "tokens of the vocabulary",
    "kv_heads": "key/value heads",
    "delta_heads": "key heads of linear attention",
    "conv": "channels of the convolution",
    "ffn": "feed-forward channels",
    "head_blocks": "blocks of attention channels",
    "delta_blocks": "blocks of channels of linear attention",
    "conv_blocks": "blocks of channels of the convolution",
    "ffn_blocks": "blocks of feed-forward channels",
    "experts": "experts",
}
"""Names in messages of the dimensions that `tensor` and `expert` split."""


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains the sharding of `x` to these logical axes; no effect outside a mesh.

    Skips mesh axes that an enclosing `shard_map` has made manual, and leaves tokens whole that do
    not divide, as those are that generation adds.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name for name, kind in kinds if kind == AxisType.Auto}

    def place(name: str | None, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in MESH_AXES[name] if axis in free) if name else ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        return None if name == "tokens" and size % parts else axes or None

    placed = map(place, logical_axes, x.shape)
    return jax.lax.with_sharding_constraint(x, P(*placed))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/…/attention/qkv` for the key path of a leaf."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def parameter_shardings(mesh: Mesh | AbstractMesh, shapes: Any, *, over_data: bool = False) -> Any:
    """The sharding of every parameter; `over_data` splits over ZERO_AXES what `fsdp` splits.

    RecipeError if `tensor` or `expert` does not divide what it splits, with the sizes that would;
    ValueError for a parameter that no rule matches.
    """
    split: dict[tuple[str, int], str] = {}

    def sharding_of(path, leaf) -> NamedSharding:
        name = path_name(path)
        axes = next((axes for row, axes in PARAMETERS if re.fullmatch(row, name)), None)
        if axes is None:
            raise ValueError(
                f"no sharding rule matches the parameter {name!r}; add one to PARAMETERS"
            )
        assert len(axes) <= len(leaf.shape), (name, axes, leaf.shape)
        axes = (*axes, *(None,) * (len(leaf.shape) - len(axes)))
        split.update(
            ((axis, size), MESH_AXES[axis][0])
            for axis, size in zip(axes, leaf.shape, strict=True)
            if axis in TITLES
        )
        return NamedSharding(mesh, P(*_mesh_axes(axes, leaf.shape, mesh, over_data)))

    shardings = jax.tree_util.tree_map_with_path(sharding_of, shapes)
    faults = []
    for mesh_axis in ("tensor", "expert"):
        parts = mesh.shape[mesh_axis]
        sizes = {named: named[1] for named, splits in split.items() if splits == mesh_axis}
        if uneven := [f"{size} {TITLES[axis]}" for axis, size in sizes if size % parts]:
            common = math.gcd(*sizes.values())
            legal = [n for n in range(1, common + 1) if common % n == 0]
            what = f"{parts} does not divide {' and '.join(uneven)}; use one of {legal}"
            faults.append(Fault(f"mesh.{mesh_axis}", what))
    if faults:
        raise RecipeError(faults)
    return shardings


def _mesh_axes(
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    over_data: bool,
) -> list[tuple[str, ...] | None]:
    """Mesh axes of each dimension.

    Axes that do not divide their own dimension move to one that they divide, so that parameters
    stay sharded; `tensor` never moves.
    """
    placed = [list(MESH_AXES[axis]) if axis else [] for axis in axes]

    def fits(dimension: int, *more: str) -> bool:
        parts = math.prod(mesh.shape[axis] for axis in (*placed[dimension], *more))
        return shape[dimension] % parts == 0

    def place_axes(dimension: int, *more: str) -> None:
        """Adds mesh axes to this dimension if they divide it, else to the largest that they do."""
        for other in sorted(range(len(shape)), key=lambda i: (i != dimension, -shape[i])):
            if axes[other] is not None and fits(other, *more):
                placed[other] += more
                return

    for dimension, axis in enumerate(axes):
        if axis in ("embed", "layers") and not fits(dimension):
            moved, placed[dimension] = placed[dimension], []
            place_axes(dimension, *moved)
    if over_data and "embed" in axes:
        for axis in ZERO_AXES:
            place_axes(axes.index("embed"), axis)
    return [tuple(dimension) or None for dimension in placed]
