"""The `mesh` and `pipeline` sections."""

import math
from typing import Literal

from pydantic import Field, model_validator

from jaxtrain.recipe.errors import RecipeError, nearest_divisors
from jaxtrain.recipe.section import Section

AXES = ("data", "fsdp", "pipeline", "context", "expert", "tensor")
"""Mesh axes, outermost first."""
BATCH_AXES = ("data", "fsdp", "expert")
"""The axes over which the rows of a batch are split."""


class MeshConfig(Section):
    """Size of each mesh axis; one of them may be -1: what is left."""

    data: int = -1
    """Batch axis; parameters are replicated over it."""
    fsdp: int = 1
    """Batch axis over which parameters, gradients and optimizer state are sharded."""
    pipeline: int = 1
    """Layers split into stages."""
    context: int = 1
    """Sequence split."""
    expert: int = 1
    """Batch axis over which experts are split."""
    tensor: int = 1
    """Heads, feed-forward width and vocabulary split."""

    @model_validator(mode="before")
    @classmethod
    def _data_gives_way(cls, values):
        """`data` is what is left, unless another axis says so."""
        if isinstance(values, dict) and "data" not in values and -1 in values.values():
            return {"data": 1, **values}
        return values

    @model_validator(mode="after")
    def _sizes_are_legal(self) -> "MeshConfig":
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"{axis} must be at least 1, or -1 for what is left, found {size}")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("only one axis may be -1")
        return self

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Size of each axis on so many devices; RecipeError if the product is another number."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
        if open_axis is not None and num_devices % known == 0:
            sizes[open_axis] = num_devices // known
        if math.prod(sizes.values()) != num_devices:
            written = " x ".join(f"{a} {s}" for a, s in sizes.items() if s not in (1, -1)) or "1"
            fits = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            raise RecipeError(
                f"mesh: {written} does not fit {num_devices} device{'s' * (num_devices > 1)}; "
                f"the sizes must multiply to {num_devices}, each one of {fits}"
            )
        return sizes


class PipelineConfig(Section):
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "gpipe"
    """Order of forward and backward work; the loss does not depend on it."""
    microbatches: int | None = Field(default=None, ge=1)
    """Pieces into which one update's rows of a shard are cut."""
    stages_per_device: int | None = Field(default=None, ge=1)
    """2 with `interleaved`, else 1, when left out."""
    split: Literal["auto"] | tuple[int, ...] = "auto"
    """Layers of each stage."""

    @model_validator(mode="after")
    def _stages_fit_the_schedule(self) -> "PipelineConfig":
        if self.stages_per_device not in (None, 1) and self.schedule != "interleaved":
            raise ValueError(
                f"stages_per_device {self.stages_per_device} needs schedule: interleaved, "
                f"found {self.schedule}"
            )
        return self

    def num_microbatches(self, *, stages: int, micro_batch_size: int, accumulation: int) -> int:
        """Microbatches of a pipelined update; RecipeError when they do not divide its rows."""
        rows = micro_batch_size * accumulation
        if self.microbatches is None:
            if accumulation >= stages:
                return accumulation
            return next((n for n in range(stages, rows) if rows % n == 0), rows)
        if rows % self.microbatches:
            raise RecipeError(
                f"pipeline.microbatches: {self.microbatches} does not divide the {rows} rows of a "
                f"shard; use {nearest_divisors(self.microbatches, rows)}"
            )
        return self.microbatches
