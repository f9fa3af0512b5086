"""`jaxtrain plan`: what the step of a recipe takes of each device, found by compiling it; prepares
no data and reads no weights."""

import math
from collections.abc import Iterator
from typing import Any

import jax

from jaxtrain import registry
from jaxtrain.parallel.host_memory import is_moved_to_host
from jaxtrain.recipe.errors import pluralize
from jaxtrain.recipe.trainer import TrainerConfig
from jaxtrain.trainer.header import count_parameters, describe_devices


def plan(config: TrainerConfig, devices: list[Any] | None = None) -> Iterator[tuple[str, str]]:
    """(name, fact) in the order in which they are shown. RecipeError for a mesh that does not fit
    the devices or the model."""
    trainer = registry.find("trainer", config.type)(config, "plan", devices=devices)
    run, layout = trainer.run, trainer.layout
    shapes, sequence_tokens = run.state_shapes, run.model.spec.placement.sequence_tokens
    yield "devices", describe_devices(run.mesh)
    yield "model", f"{count_parameters(run)}, computed in {run.model.compute.compute_dtype}"
    sequences = layout.step_sequences(sequence_tokens)
    yield "batch", f"{pluralize(sequences, 'sequence')} of {sequence_tokens:,} tokens per step"
    parts = {"parameters": (shapes.params, shapes.frozen), "optimizer": shapes.opt_state}
    parts |= {"average": shapes.average} if shapes.average else {}
    held = ", ".join(f"{name} {format_bytes(device_bytes(part))}" for name, part in parts.items())
    yield "state", f"{format_bytes(device_bytes(shapes))} per device: {held}"
    batch = layout.batch_shapes(sequence_tokens, trainer.data_extras)
    memory = trainer.step.lower(shapes, batch).compile().memory_analysis()
    yield "step", f"{format_bytes(memory.temp_size_in_bytes)} of temporaries per device"
    if on_host := host_bytes(shapes) + memory.host_temp_size_in_bytes:
        yield "host", f"{format_bytes(on_host)} in the host's memory for each device"
    # Not the compiler's own peak, which on CPU leaves the temporaries out.
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    yield "peak", f"at most {format_bytes(kept + memory.temp_size_in_bytes)} per device"


def device_bytes(shapes: Any) -> int:
    """What one device holds of arrays with these shapes and shardings."""
    return _count_bytes(shapes, is_on_host=False)


def host_bytes(shapes: Any) -> int:
    """What the host holds of them for one device."""
    return _count_bytes(shapes, is_on_host=True)


def _count_bytes(shapes: Any, *, is_on_host: bool) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes)
        if is_moved_to_host(leaf.sharding) == is_on_host
    )


def format_bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
