"""The `mesh` and `pipeline` sections."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jaxtrain.recipe.errors import RecipeError, nearest_multiples, pluralize
from jaxtrain.recipe.section import Section, not_supported

AXES = ("pipeline", "data", "fsdp", "context", "expert", "tensor")
"""Mesh axes, outermost first. Stages of a pipeline send least; and jaxlib 0.12 ends the process
where a nested `shard_map` has an axis before that of the one around it."""
BATCH_AXES = ("data", "fsdp", "expert")
"""The axes over which the sequences of a batch are split."""


class MeshConfig(Section):
    """Size of each mesh axis; one of them may be -1, for the devices that are left."""

    data: int = -1
    """Batch axis over which parameters are replicated; -1 when left out and no other axis is -1."""
    fsdp: int = 1
    """Batch axis over which parameters, gradients and optimizer state are sharded."""
    pipeline: int = 1
    """Pipeline stages; layers are split over them."""
    context: int = 1
    """Devices that share a sequence; its length must be a multiple of twice as many."""
    expert: int = 1
    """Batch axis over which experts are split; each device computes its own experts for the tokens
    of all that share the axis."""
    tensor: int = 1
    """Devices that share heads, feed-forward width and vocabulary."""

    @model_validator(mode="before")
    @classmethod
    def _data_gives_way(cls, values):
        """`data` takes the devices that are left, unless another axis does."""
        if isinstance(values, dict) and "data" not in values and -1 in values.values():
            return {"data": 1, **values}
        return values

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for axis, size in self:
            if size != -1 and size < 1:
                yield axis, f"must be at least 1, or -1 for what is left, found {size}"
        if [size for _, size in self].count(-1) > 1:
            yield "", "only one axis may be -1"

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on `num_devices`, outermost first; RecipeError if their product is
        another number."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: num_devices // known if n == -1 else n for axis, n in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            written = " x ".join(f"{a} {s}" for a, s in self if s not in (1, -1)) or "1"
            fits = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise RecipeError(
                f"mesh: {written} does not fit {pluralize(num_devices, 'device')}; "
                f"the sizes must multiply to {num_devices}, each one of {fits}"
            )
        return sizes

    def shards(self, num_devices: int) -> int:
        """Batch shards on `num_devices`."""
        sizes = self.sizes(num_devices)
        return math.prod(sizes[axis] for axis in BATCH_AXES)


def length_multiple(context: int) -> int:
    """What the lengths of sequences that so many devices share must be multiples of: each of these
    may hold an early and a late piece."""
    return 2 * context if context > 1 else 1


def describe_uneven(length: int, context: int) -> str | None:
    """Why so many devices cannot share sequences of this length; None where they can."""
    multiple = length_multiple(context)
    if length % multiple == 0:
        return None
    use = nearest_multiples(length, multiple)
    return (
        f"{length} does not divide into the {multiple} pieces of mesh.context {context}; use {use}"
    )


def refuse_uneven(length: int, context: int) -> None:
    """RecipeError where so many devices cannot share sequences of this length."""
    if what := describe_uneven(length, context):
        raise RecipeError(f"data.max_length: {what}")


class PipelineConfig(Section):
    """How a model that is split into stages runs a step."""

    schedule: Annotated[
        Literal["gpipe", "1f1b", "interleaved"],
        not_supported("use gpipe: the loss is the same", "gpipe"),
    ] = "gpipe"
    """Order of forward and backward work; the loss does not depend on it."""
    microbatches: int | None = Field(default=None, ge=1)
    """Microbatches per step and batch shard; as many as there are stages, where that divides, when
    left out."""
    stages_per_device: int | None = Field(default=None, ge=1)
    """2 with `interleaved`, else 1, when left out."""
    split: Annotated[
        Literal["auto"] | tuple[int, ...],
        not_supported("remove it: layers are split evenly", "auto"),
    ] = "auto"
    """Layers of each stage."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.stages_per_device not in (None, 1) and self.schedule != "interleaved":
            what = f"needs schedule: interleaved, found {self.schedule}"
            yield "stages_per_device", f"{self.stages_per_device} {what}"

    def num_microbatches(self, *, stages: int, micro_batch_size: int, accumulation: int) -> int:
        """Microbatches of a pipelined step: as written, or at least as many as there are stages
        where that divides its sequences."""
        rows = micro_batch_size * accumulation
        if self.microbatches is not None or accumulation >= stages:
            return self.microbatches or accumulation
        return next((n for n in range(stages, rows) if rows % n == 0), rows)
