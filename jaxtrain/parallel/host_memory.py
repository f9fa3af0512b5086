"""Arrays in the memory of the host, which is a memory kind of each device. Computing with them
takes a copy on the device (`fetch`), which a program makes of the part that it needs.

jax demands that the gradient of an array is of its type, which has its memory space; that of one on
the host would be copied there. So the backward pass of `fetch` calls the gradient one of the host
and leaves it on the device, and `call_on_devices` gives it its right type again, outside of what is
differentiated.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding

from jaxtrain.parallel.mesh import platform
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, RecipeError

KIND = "pinned_host"
Space = jax.memory.Space
PLATFORMS_IN_HOST_MEMORY = {"cpu"}


def is_in_host_memory(mesh: Mesh) -> bool:
    """Whether the memory of the devices is that of the host, so that moving has no effect."""
    return platform(mesh) in PLATFORMS_IN_HOST_MEMORY


def has_host_memory(mesh: Mesh, wanted_by: Iterable[str]) -> bool:
    """Whether arrays can be in the host's memory and not in that of the devices; False on CPU,
    where these are one. RecipeError for other devices, with the keys of the recipe that want it."""
    device = mesh.devices.flat[0]
    if is_in_host_memory(mesh):
        return False
    kinds = {memory.kind for memory in device.addressable_memories()}
    if kinds and KIND not in kinds:  # a GPU that a plan is for has none
        what = f"{device.device_kind} has no memory of kind {KIND}, only {', '.join(sorted(kinds))}"
        raise RecipeError([Fault(key, f"{what}; remove it") for key in wanted_by])
    return True


def move_to_host(shardings: Any, shapes: Any) -> Any:
    """The shardings, with all arrays but scalars in the host's memory."""
    move = lambda sharding, shape: _in_host_memory(sharding) if shape.ndim else sharding
    return jax.tree.map(move, shardings, shapes)


def _in_host_memory(sharding: NamedSharding) -> NamedSharding:
    moved = sharding.with_memory_kind(KIND)
    if moved.memory_kind == KIND:
        return moved
    # Of devices that list no memories jax drops the kind, but not of a mesh without devices.
    return NamedSharding(sharding.mesh.abstract_mesh, sharding.spec, memory_kind=KIND)


def move_matrices_to_host(shardings: Any, shapes: Any) -> Any:
    """The shardings, with the matrices of layers in the host's memory. Vectors are small, and what
    is outside of the layers is in use from a step's start to its end."""

    def move(path: tuple[Any, ...], sharding: Any, shape: Any) -> Any:
        is_matrix = path_name(path).startswith("layers/") and shape.ndim > 2
        return _in_host_memory(sharding) if is_matrix else sharding

    return jax.tree_util.tree_map_with_path(move, shardings, shapes)


def is_moved_to_host(shardings: Any) -> bool:
    """Whether any array is there."""
    return any(sharding.memory_kind == KIND for sharding in jax.tree.leaves(shardings))


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, traced or not, is in the host's memory."""
    return jax.typeof(x).memory_space == Space.Host


_relabel = Primitive("relabel_memory")
_relabel.def_abstract_eval(lambda x, *, space: x.update(memory_space=space))
mlir.register_lowering(_relabel, lambda _, x, *, space: [x])


def _copy(x: jax.Array) -> jax.Array:
    return jax.device_put(x, Space.Device)


_fetch = jax.custom_vjp(_copy)
_fetch.defvjp(lambda x: (_copy(x), None), lambda _, ct: (_relabel.bind(ct, space=Space.Host),))


def fetch(tree: Any) -> Any:
    """Copies on the devices of what is on the host. Traced. Gradients are left on the devices, for
    `call_on_devices`."""
    return jax.tree.map(lambda x: _fetch(x) if is_on_host(x) else x, tree)


def call_on_devices(gradients: Any) -> Any:
    """Gradients by what may be on the host, none of which is there, as what they are. Traced."""
    call = lambda x: _relabel.bind(x, space=Space.Device) if is_on_host(x) else x
    return jax.tree.map(call, gradients)


def put_like(tree: Any, like: Any) -> Any:
    """Each array on the host where that of `like` is. Traced."""
    put = lambda x, old: jax.device_put(x, Space.Host) if is_on_host(old) else x
    return jax.tree.map(put, tree, like)
