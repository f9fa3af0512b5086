"""The mesh axes that kernels use; this folder imports nothing else from the package."""

import jax
from jax.sharding import AxisType

BATCH_AXES = ("data", "fsdp", "expert")
TENSOR_AXIS = "tensor"


def free_axis_sizes() -> dict[str, int]:
    """Sizes of the current mesh's axes that no enclosing `shard_map` has made manual."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {a: mesh.shape[a] for a, kind in kinds if kind is not AxisType.Manual}
