"""The facts that a run begins with."""

import math
from typing import TYPE_CHECKING

import jax

from jaxtrain.recipe.mesh import AXES

if TYPE_CHECKING:
    from jaxtrain.trainer.trainer import Trainer


def header(trainer: "Trainer") -> dict[str, str]:
    """Name → fact, in the order in which they are shown."""
    config, geometry, data = trainer.config, trainer.geometry, trainer.data
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.model.shapes))
    devices = trainer.mesh.devices.ravel()
    axes = " × ".join(
        f"{axis} {trainer.mesh.shape[axis]}" for axis in AXES if trainer.mesh.shape[axis] > 1
    )
    execution = trainer.model.execution
    tokens = geometry.global_batch * data.row_tokens
    return {
        "model": f"{config.model.name_or_path}, {parameters:,} parameters, {execution.compute_dtype}",
        "devices": f"{len(devices)} × {devices[0].device_kind}"
        + (f", mesh {axes}" if axes else ""),
        "attention": execution.attention + (f" ({trainer.model.why})" if trainer.model.why else ""),
        "data": f"{data.train_rows:,} rows of {data.row_tokens:,} tokens, "
        f"{data.trained_share:.0%} of the tokens trained, {data.eval_rows:,} evaluation rows",
        "batch": f"{geometry.global_batch:,} rows = {tokens:,} tokens a step"
        + (
            f", in {geometry.num_microbatches} microbatches"
            if geometry.num_microbatches > 1
            else ""
        ),
        "steps": f"{trainer.last_step:,} of {data.steps_per_epoch:,} an epoch, "
        f"warm-up {trainer.warmup_steps:,}"
        + (f", from step {trainer.global_step}" if trainer.global_step else ""),
        "run": str(trainer.run_folder.path),
    }
