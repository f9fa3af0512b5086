"""Arrays in the memory of the host, which is a memory kind of each device. Computing with them
takes a copy on the device (`fetch`), which a program makes of the part that it needs."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.parallel.mesh import platform
from jaxtrain.recipe.errors import Fault, RecipeError

KIND = "pinned_host"


def has_host_memory(mesh: Mesh, wanted_by: Iterable[str]) -> bool:
    """Whether arrays can be in the host's memory and not in that of the devices; False on CPU,
    where these are one. RecipeError for other devices, with the keys of the recipe that want it."""
    device = mesh.devices.flat[0]
    if platform(mesh) == "cpu":
        return False
    kinds = {memory.kind for memory in device.addressable_memories()}
    if KIND not in kinds:
        what = f"{device.device_kind} has no memory of kind {KIND}, only {', '.join(sorted(kinds))}"
        raise RecipeError([Fault(key, f"{what}; remove it") for key in wanted_by])
    return True


def move_to_host(shardings: Any, shapes: Any) -> Any:
    """The shardings, with all arrays but scalars in the host's memory."""
    move = lambda sharding, shape: sharding.with_memory_kind(KIND) if shape.ndim else sharding
    return jax.tree.map(move, shardings, shapes)


def is_moved_to_host(shardings: Any) -> bool:
    """Whether any array is there."""
    return any(sharding.memory_kind == KIND for sharding in jax.tree.leaves(shardings))


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, traced or not, is in the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def fetch(tree: Any) -> Any:
    """Copies on the devices of what is on the host. Traced."""
    copy = lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x
    return jax.tree.map(copy, tree)


def put_like(tree: Any, like: Any) -> Any:
    """Each array on the host where that of `like` is. Traced."""
    put = lambda x, old: jax.device_put(x, jax.memory.Space.Host) if is_on_host(old) else x
    return jax.tree.map(put, tree, like)
