"""The facts that a run begins with."""

import math
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxtrain import registry
from jaxtrain.data import TrainingData
from jaxtrain.data.ledger import format_range
from jaxtrain.environment import find_bfloat16_unit
from jaxtrain.model.config import ComputeConfig, Experts
from jaxtrain.model.lora import partition, take_adapters
from jaxtrain.model.quantized import may_be_quantized
from jaxtrain.parallel.host_memory import is_in_host_memory, is_moved_to_host
from jaxtrain.parallel.mesh import platform
from jaxtrain.parallel.sharding import ZERO_AXES
from jaxtrain.recipe.check import describe_batch, describe_excess, describe_steps
from jaxtrain.recipe.errors import pluralize
from jaxtrain.recipe.mesh import AXES
from jaxtrain.trainer.progress import Horizon, Progress
from jaxtrain.trainer.run import Run


def collect_facts(
    run: Run, data: TrainingData, progress: Progress, horizon: Horizon, folder: Path
) -> dict[str, str]:
    """Name → fact, in the order in which they are shown; a fact may have several lines."""
    config, model, mesh = run.config, run.model, run.mesh
    is_split = any(mesh.shape[axis] > 1 for axis in ZERO_AXES)
    stage = config.deepspeed.zero_stage if is_split else 0
    excess = describe_excess(data.sequence_tokens, model.spec.config.max_positions)
    experts, is_ours = model.spec.config.experts, registry.is_built_in("trainer", config.type)
    return {
        "model": f"{config.model.name_or_path.split('#')[0]}, {count_parameters(run)}, "
        f"{_arithmetic(run)}{_loss_scale(run)}, {_remat(model.compute)}",
        **({"experts": _experts(experts, config.router_z_loss, is_ours)} if experts else {}),
        "kernels": model.attention,
        "optimizer": _optimizer(run),
        "devices": describe_devices(mesh) + (f", ZeRO stage {stage}" if stage else ""),
        **({"host memory": host} if (host := _host_memory(run)) else {}),
        "data": "\n".join(data.ledger.lines()),
        "batch": _batch(run, data),
        **({"positions": f"up to {data.sequence_tokens:,}{excess}"} if excess else {}),
        "steps": _steps(run, data, progress, horizon),
        "run": str(folder),
    }


def count_parameters(run: Run) -> str:
    """Of the model; with adapters, how many of these and of the base."""
    model, count = run.model, lambda t: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(t))
    if model.adapters is None:
        return f"{count(model.shapes):,} parameters"
    _, weights = take_adapters(model.plain_shapes)
    trained, _ = model.split(weights)
    kept = ""
    if model.quantization:
        few = partition(model.split(weights)[1], may_be_quantized)[0]
        kept = f", {count(few):,} of them in {model.quantization}"
    return (
        f"{count(weights):,} parameters, of which {count(weights) - count(trained):,} are frozen"
        f"{kept}, "
        f"LoRA of {model.adapters.num_parameters + count(trained):,} trained parameters"
    )


def describe_devices(mesh: Mesh) -> str:
    """How many of which kind, and the axes of the mesh that split anything."""
    axes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1)
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}" + (f", mesh {axes}" if axes else "")


def _loss_scale(run: Run) -> str:
    config = run.scaling.config
    if config is None:
        return ""
    fixed, first = config.loss_scale, 2.0**config.initial_scale_power
    return f" with a loss scale {f'of {fixed:g}' if fixed else f'from {first:g} on'}"


def _host_memory(run: Run) -> str:
    """What the recipe asks to keep there; empty for nothing."""
    config, remat = run.config, run.model.compute.remat
    base = "" if run.model.adapters is None else " of the base"
    wanted = {
        f"matrices of layers{base}": config.deepspeed.offloads_params,
        "moments": config.deepspeed.offloads_optimizer,
        "layer inputs": config.activation_checkpoint_cpu_offload and remat != "none",
    }
    named = " and ".join(name for name, is_wanted in wanted.items() if is_wanted)
    if named and is_in_host_memory(run.mesh):
        return f"{named}: without effect, on CPU it is that of the devices"
    updated = run.shardings.params, run.shardings.opt_state
    is_whole = is_moved_to_host(updated) and not run.is_separable
    return named + (", copied to the devices all at once for the update" if is_whole else "")


def _arithmetic(run: Run) -> str:
    """The dtype that the model is computed in, and what a processor multiplies bfloat16 with."""
    dtype, is_on_cpu = run.model.compute.compute_dtype, platform(run.mesh) == "cpu"
    if run.model.compute.matmul:
        others = ", not those of experts" if run.model.spec.config.experts else ""
        return f"{dtype}, matrices of layers in fp8{' (emulated)' * is_on_cpu}{others}"
    if not is_on_cpu or dtype != "bfloat16":
        return dtype
    unit = find_bfloat16_unit()
    return f"bfloat16, multiplied by {unit or 'no unit of its own, in float32'}"


def _remat(compute: ComputeConfig) -> str:
    every = f" of every {compute.remat_every} layers" if compute.remat_every > 1 else ""
    return f"remat {compute.remat}{every}" + (", tiled MLP" if compute.tiled_mlp else "")


def _experts(experts: Experts, z_loss: float, is_ours: bool) -> str:
    """How many, and what their routers are trained with, if the objective is ours."""
    balance = "not in the loss; model.hf_config_kwargs.output_router_logits: true adds it"
    if experts.balance_loss:
        balance = f"in the loss with coefficient {experts.balance_loss:g}"
    elif experts.has_choice_bias:
        balance = "left to a bias of the choice, which stays as it is"
    z = f", router z-loss with coefficient {z_loss:g}" if z_loss else ""
    own = "" if is_ours else "; an objective of your own has only what it adds"
    return f"{experts.per_token} of {experts.count} per token, load balance {balance}{z}{own}"


def _optimizer(run: Run) -> str:
    """Which, and how many parameters it decays, does not decay, and leaves alone."""
    if run.is_optimizer_given:
        return "as given"
    counts = run.groups.counts().items()
    return ", ".join((run.config.optimizer.type, *(f"{n:,} {kind}" for kind, n in counts)))


def _batch(run: Run, data: TrainingData) -> str:
    layout, lengths = run.layout, data.train.lengths
    if layout.batch_tokens:
        shapes = ", ".join(f"{layout.step_sequences(n):,} x {n:,}" for n in lengths)
        compiled = pluralize(len(lengths), "shape")
        return (
            f"{describe_batch(run.config, {})}: sequences x tokens of a step are {shapes}, "
            f"compiled for {compiled}"
        )
    size = layout.global_batch // layout.sequences_per_sample
    tokens = layout.global_batch * data.sequence_tokens
    most = "at most " if len(lengths) > 1 else ""
    cut = f" in {layout.num_microbatches} microbatches" if layout.num_microbatches > 1 else ""
    compiled = f", compiled for {len(lengths)} lengths" if most else ""
    return (
        f"{describe_batch(run.config, {run.mesh.size: size})}; {format_range(lengths)} tokens per "
        f"sequence, {most}{tokens:,} per step{cut}{compiled}"
    )


def _steps(run: Run, data: TrainingData, progress: Progress, horizon: Horizon) -> str:
    warmup = run.config.scheduler.warmup_updates(horizon.steps - progress.schedule_start)
    start = f", from step {progress.step}" if progress.step else ""
    per_epoch = None if run.config.data.streaming else data.steps_per_epoch
    steps = describe_steps(run.config, horizon.steps, per_epoch)
    return f"{steps}, warm-up {pluralize(warmup, 'step')}{start}"
