"""Whether the copies of an array on several devices are still the same, bit for bit: a device that
computes wrongly, or a collective that does, parts them in silence."""

from collections import Counter, defaultdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import ReplicaError, pluralize
from jaxtrain.trainer.callbacks import Callback

MAX_NAMES = 3  # of arrays in a message


class ReplicaCheck(Callback):
    """Compares the copies of every array of the state after each n-th step, before it is saved."""

    def __init__(self, every: int):
        self.every = every

    def on_step_end(self, state: Any) -> None:
        if state.global_step % self.every == 0:
            refuse_differences(state.state, state.run.mesh, step=state.global_step)


def refuse_differences(tree: Any, mesh: Mesh, *, step: int) -> None:
    """ReplicaError that names arrays and devices where copies of an array differ."""
    found = find_differences(tree, mesh)
    if not found:
        return
    named = "; ".join(f"{name} on {_describe(devices)}" for name, devices in found[:MAX_NAMES])
    more = f"; and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
    raise ReplicaError(
        f"step {step}: copies differ of {pluralize(len(found), 'array')}: {named}{more}; nothing "
        "is saved of it, resume from the newest checkpoint, on other devices if it happens again"
    )


def find_differences(tree: Any, mesh: Mesh) -> list[tuple[str, list[Any]]]:
    """(name, devices with a copy that fewest share) of each array whose copies differ; those of
    all, where no copy is in the minority."""
    leaves = [
        (path_name(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if len(_copies(leaf, mesh)) < mesh.size
    ]
    if not leaves:
        return []
    arrays = [leaf for _, leaf in leaves]
    sums = np.asarray(_checksums(mesh, tuple(a.sharding.spec for a in arrays), arrays))
    found = []
    for (name, leaf), of_devices in zip(leaves, sums.T, strict=True):
        odd = [row for rows in _copies(leaf, mesh) for row in _find_odd(rows, of_devices)]
        if odd:
            found.append((name, [mesh.devices.flat[row] for row in odd]))
    return found


def _copies(leaf: jax.Array, mesh: Mesh) -> list[list[int]]:
    """Positions in the mesh of the devices that hold the same part of an array, for each part."""
    parts = defaultdict(list)
    held = leaf.sharding.devices_indices_map(leaf.shape)
    for row, device in enumerate(mesh.devices.flat):
        parts[str(held[device])].append(row)
    return list(parts.values())


def _find_odd(rows: list[int], sums: np.ndarray) -> list[int]:
    counts = Counter(sums[row] for row in rows)
    if len(counts) == 1:
        return []
    (usual, most), (_, second) = counts.most_common(2)
    return rows if most == second else [row for row in rows if sums[row] != usual]


@partial(jax.jit, static_argnums=(0, 1))
def _checksums(mesh: Mesh, specs: tuple[P, ...], arrays: list[jax.Array]) -> jax.Array:
    """uint32 [devices of the mesh, arrays]: of the part that each device holds."""
    compute = lambda *parts: jnp.stack([_checksum(part) for part in parts])[None]
    sums = jax.shard_map(
        compute, mesh=mesh, in_specs=specs, out_specs=P(mesh.axis_names), check_vma=False
    )(*fetch(arrays))
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, P()))


def _checksum(x: jax.Array) -> jax.Array:
    """A sum of its bits, in which no change of one number and no exchange of two unequal ones
    vanishes but by chance."""
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    if not jnp.issubdtype(bits.dtype, jnp.integer):
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[bits.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(bits, unsigned)
    bits = bits.astype(jnp.uint32).reshape(-1)
    # Odd factors: a product with one is 0 modulo 2^32 for 0 alone.
    odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
    return (bits * odd).sum(dtype=jnp.uint32)


def _describe(devices: list[Any]) -> str:
    return f"device{'s' * (len(devices) != 1)} {', '.join(str(d.id) for d in devices)}"
