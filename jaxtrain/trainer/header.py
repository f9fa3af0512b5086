"""The facts that a run begins with."""

import math
from typing import TYPE_CHECKING

import jax

from jaxtrain.data.ledger import format_range
from jaxtrain.recipe.mesh import AXES

if TYPE_CHECKING:
    from jaxtrain.model.config import ComputeConfig
    from jaxtrain.trainer.trainer import Trainer


def header(trainer: "Trainer") -> dict[str, str]:
    """Name → fact, in the order in which they are shown; a fact may have several lines."""
    config, model, mesh = trainer.config, trainer.language_model, trainer.mesh
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.shapes))
    axes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1)
    stage = config.deepspeed.zero_stage if mesh.shape["data"] > 1 else 0
    return {
        "model": f"{config.model.name_or_path.split('#')[0]}, {parameters:,} parameters, "
        f"{model.compute.compute_dtype}, {_remat(model.compute)}",
        "kernels": model.attention,
        "optimizer": _optimizer(trainer),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        + (f", mesh {axes}" if axes else "")
        + (f", ZeRO stage {stage}" if stage else ""),
        **_rows(trainer),
        "run": str(trainer.run_folder.path),
    }


def _remat(compute: "ComputeConfig") -> str:
    every = f" of every {compute.remat_every} layers" if compute.remat_every > 1 else ""
    return f"remat {compute.remat}{every}" + (", tiled MLP" if compute.tiled_mlp else "")


def _optimizer(trainer: "Trainer") -> str:
    """Which, and how many parameters it decays, does not decay, and leaves alone."""
    if trainer.given.get("optimizer") is not None:
        return "as given"
    counts = trainer.groups.counts().items()
    return ", ".join((trainer.config.optimizer.type, *(f"{n:,} {kind}" for kind, n in counts)))


def _rows(trainer: "Trainer") -> dict[str, str]:
    layout, data = trainer.layout, trainer.data
    lengths, tokens = data.train.lengths, layout.global_batch * data.row_tokens
    most = "at most " if len(lengths) > 1 else ""
    cut = f" in {layout.num_microbatches} microbatches" if layout.num_microbatches > 1 else ""
    start = f", from step {trainer.global_step}" if trainer.global_step else ""
    return {
        "data": "\n".join(data.ledger.lines()),
        "batch": f"{layout.global_batch:,} rows of {format_range(lengths)} tokens = {most}"
        f"{tokens:,} tokens a step{cut}"
        + (f", compiled for {len(lengths)} lengths" if most else ""),
        "steps": f"{trainer.last_step:,}, {data.steps_per_epoch:,} an epoch, "
        f"warm-up {trainer.warmup_steps:,}{start}",
    }
