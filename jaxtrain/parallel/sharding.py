"""Where arrays live: one table from parameter paths to logical axes, one from those to mesh axes."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.recipe.mesh import BATCH_AXES

MESH_AXES = {
    "batch": BATCH_AXES,
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "kv_heads": ("tensor",),
    "ffn": ("tensor",),
    "layers": ("pipeline",),
}
"""Logical axis → the mesh axes that split it."""

PARAMETERS = (
    (r"embed/embedding", ("vocab", "embed")),
    (r"head", ("embed", "vocab")),
    (r"layers/.*/attention/qkv", ("layers", "embed", "kv_heads", None, None)),
    (r"layers/.*/attention/qkv_bias", ("layers", "kv_heads", None, None)),
    (r"layers/.*/attention/out", ("layers", "kv_heads", None, None, "embed")),
    (r"layers/.*/attention/(q_norm|k_norm)", ("layers", None)),
    (r"layers/.*/mlp/gate_up", ("layers", "embed", None, "ffn")),
    (r"layers/.*/mlp/down", ("layers", "ffn", "embed")),
    (r"layers/.*/(attention_norm|mlp_norm)", ("layers", None)),
    (r"norm", (None,)),
)
"""Parameter path → logical axis of each of its dimensions; the first row that matches whole counts."""


def spec(logical_axes: tuple[str | None, ...]) -> P:
    """Mesh axes of an array whose dimensions have these logical axes."""
    return P(*(MESH_AXES[axis] if axis else None for axis in logical_axes))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """`x`, kept sharded by these logical axes; unchanged outside a mesh.

    Axes that an enclosing `shard_map` has made manual are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    free = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto
    }
    axes = (tuple(a for a in MESH_AXES[name] if a in free) if name else () for name in logical_axes)
    return jax.lax.with_sharding_constraint(x, P(*(a or None for a in axes)))


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/…/attention/qkv` for the key path of a leaf."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def parameter_shardings(mesh: Mesh, shapes: Any) -> Any:
    """The sharding of every parameter; ValueError for one that no row of the table names."""

    def one(path, leaf) -> NamedSharding:
        name = path_name(path)
        for pattern, axes in PARAMETERS:
            if re.fullmatch(pattern, name):
                assert len(axes) == len(leaf.shape), (name, axes, leaf.shape)
                return NamedSharding(mesh, spec(axes))
        raise ValueError(f"no sharding rule names the parameter {name!r}; add a row to PARAMETERS")

    return jax.tree_util.tree_map_with_path(one, shapes)
