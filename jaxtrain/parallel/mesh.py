"""The device mesh of a run."""

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.mesh import BATCH_AXES, MeshConfig


def first_devices(count: int) -> list[Any]:
    """The first `count` devices; RecipeError when there are fewer."""
    devices = jax.devices()
    if len(devices) < count:
        raise RecipeError(f"--num_gpus {count}: there are only {len(devices)}")
    return devices[:count]


def list_devices() -> str:
    """How many of each kind there are."""
    kinds = Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def make_mesh(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """A mesh of all six axes, each `Auto`: the compiler shards what the rules leave open."""
    sizes = config.sizes(len(devices))
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh((*sizes.values(),), (*sizes,), axis_types=kinds, devices=devices)


def num_batch_shards(mesh: Mesh) -> int:
    """Number of groups of devices that work on different sequences."""
    return prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`, also of devices that are only simulated; kernels are chosen by it."""
    return mesh.devices.flat[0].platform


def compute_capability(mesh: Mesh) -> str | None:
    """Of GPUs, as '9.0'; None of other devices, which have no such attribute."""
    return getattr(mesh.devices.flat[0], "compute_capability", None)
