"""The mesh axes and the platform of kernels; this folder imports nothing else from the package."""

import jax
from jax.sharding import AxisType

BATCH_AXES = ("data", "fsdp", "expert")
TENSOR_AXIS = "tensor"
CONTEXT_AXIS = "context"


def current_platform() -> str | None:
    """That of the devices of the current mesh, here or not, as jax calls it; None without them."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def has_capability(capability: str | None, oldest: float) -> bool:
    """Whether a GPU of this compute capability, if it is known, is of NVIDIA and as new as that."""
    return capability is None or (
        capability.replace(".", "", 1).isdigit() and float(capability) >= oldest
    )


def free_axis_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes that no enclosing `shard_map` has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {a: mesh.shape[a] for a, kind in kinds if kind is not AxisType.Manual}


def batch_axes(sizes: dict[str, int], *others: str) -> tuple[str, ...]:
    """The axes over which a batch is split inside a `shard_map` that is manual over all of `sizes`,
    beside these others. Axes of size 1 join it: one that no input names costs a sum in the backward
    pass."""
    return tuple(a for a in sizes if a not in others and (a in BATCH_AXES or sizes[a] == 1))


def context_parts(tokens: int) -> int:
    """Parts over the devices into which the current mesh cuts sequences of so many tokens; 1 where
    they do not divide, as tokens that are generated do not."""
    parts = free_axis_sizes().get(CONTEXT_AXIS, 1)
    return 1 if tokens % (2 * parts) else parts


def batch_parts(sequences: int) -> tuple[tuple[str, ...], int]:
    """The axes that split a batch of so many sequences, and into how many parts."""
    sizes, axes, parts = free_axis_sizes(), (), 1
    for axis in BATCH_AXES:
        size = sizes.get(axis, 1)
        if size > 1 and sequences % (parts * size) == 0:
            axes, parts = (*axes, axis), parts * size
    return axes, parts
