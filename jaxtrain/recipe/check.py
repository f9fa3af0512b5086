"""What a recipe comes to, as far as it is known without jax, data or network."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.mesh import AXES, BATCH_AXES, MeshConfig
from jaxtrain.recipe.resolve import Resolved
from jaxtrain.recipe.standing import Report
from jaxtrain.recipe.trainer import TrainerConfig

DEVICE_COUNTS = (1, 8, 64)  # for which the batch of an open mesh is told


def told(resolved: Resolved) -> str:
    """The report of a recipe's keys and, when nothing is wrong with it, the run that it asks
    for."""
    parts = ["\n".join(report_lines(resolved.report))]
    if resolved.config is not None:
        facts = [f"{name:11} {fact}" for name, fact in run_facts(resolved.config)]
        parts.append("\n".join(facts))
    return "\n\n".join(part for part in parts if part)


def report_lines(report: Report) -> list[str]:
    """One line for the keys that mean what they mean upstream, one for each that does not."""
    same = ", ".join(line.key for line in report.of("same"))
    refused = [str(line) for line in report.of("refused")]
    return [*([f"{'same':9} {same}"] if same else []), *report.changes(), *refused]


def run_facts(config: TrainerConfig) -> Iterator[tuple[str, str]]:
    """(name, fact) of the run, in the order in which they are shown."""
    horizon = config.horizon(None)
    name = config.model.name_or_path.split("#")[0]
    yield "trainer", config.type
    yield "model", name if Path(name).exists() else f"{name} (not on this disk; a run fetches it)"
    yield "rows", row_length(config)
    yield "batch", batch(config)
    yield "updates", updates(config, horizon)
    yield "warm-up", warmup(config, horizon)
    if config.data.has_eval:
        yield "evaluation", evaluation(config)
    yield "files", ", ".join(map(str, files(config)))
    for entry in config.checkpoint:
        if entry.enabled:
            yield "checkpoint", f"{entry.output_dir}/global_step_N ({entry.type}), {moments(entry)}"


def row_length(config: TrainerConfig) -> str:
    """Tokens a row has at most."""
    if config.data.max_length is not None:
        return f"at most {config.data.max_length:,} tokens"
    file = Path(config.model.name_or_path) / "config.json"
    try:
        fields = json.loads(file.read_text()) | config.model.hf_config_kwargs
        return f"at most {fields['max_position_embeddings']:,} tokens, the model's positions"
    except (OSError, ValueError, KeyError, TypeError):
        return (
            "length still open: the model's positions, read when it is there; see data.max_length"
        )


def batch(config: TrainerConfig) -> str:
    """Rows an update."""
    rows, pieces = config.micro_batch_size, config.gradient_accumulation_steps
    of_shard = f"{rows} x {pieces} accumulated = {rows * pieces} rows a batch shard"
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axis is None:
        return f"{of_shard}, {rows * pieces * shards(config.mesh, fixed):,} on {fixed} devices"
    counts = [fixed * n for n in DEVICE_COUNTS]
    each = [f"{rows * pieces * shards(config.mesh, n):,} on {n}" for n in counts]
    return f"{of_shard}; {', '.join(each)} devices"


def shards(mesh: MeshConfig, num_devices: int) -> int:
    """Parts into which the rows of a batch are split."""
    sizes = mesh.sizes(num_devices)
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def updates(config: TrainerConfig, horizon: int | None) -> str:
    if horizon is None:
        epochs = config.passes
        first = f"{config.train_iters:,}, or " if config.train_iters else ""
        return f"{first}{epochs} epoch{'s' * (epochs != 1)}, counted when the data is read"
    end, this_run = config.exit_iteration, config.exit_iteration_this_run
    told = f"{horizon:,}" + (f", ends at {end:,}" if 0 < end < horizon else "")
    return told + (f", at most {this_run:,} of one process" if this_run else "")


def warmup(config: TrainerConfig, horizon: int | None) -> str:
    scheduler = config.scheduler
    if horizon is not None:
        return f"{scheduler.warmup_updates(horizon):,} updates"
    if scheduler.warmup_ratio is None and scheduler.warmup_updates(0):
        return f"{scheduler.warmup_updates(0):,} updates"
    return f"{scheduler.warmup_updates(1_000) / 1_000:.1%} of the updates"


def evaluation(config: TrainerConfig) -> str:
    moments = [f"every {config.eval_interval:,} updates"] if config.eval_interval else []
    epochs = config.eval_every_n_epochs
    moments += [f"every {epochs:,} epoch{'s' * (epochs > 1)}"] if epochs else []
    moments += ["at the start"] if config.eval_at_start else []
    moments += ["at the end"] if config.eval_at_end is not False else []
    return ", ".join(moments)


def files(config: TrainerConfig) -> Iterator[Path]:
    """What the run writes beside checkpoints."""
    trace = config.profile
    yield from (config.output(None, name) for name in ("recipe.yaml", "run.json"))
    yield config.output(config.logger.output_dir, "") / "logs"
    yield config.output(config.train_log_metrics_path, "train-log-metrics.jsonl")
    yield config.output(None, "loss.png")
    for is_written, written, name in (
        (config.tensorboard.enable, config.tensorboard.dir, "tensorboard"),
        (config.wandb.is_on, None, "wandb"),
        (trace is not None, trace and trace.dir, "profile"),
        (config.mem_profiler is not None, config.mem_profiler_dir, "mem-prof"),
    ):
        if is_written:
            yield config.output(written, name)


def moments(entry: CheckpointConfig) -> str:
    """When an engine saves."""
    found = [
        f"every {count:,} {what}"
        for count, what in (
            (entry.save_every_n_steps, "updates"),
            (entry.save_every_n_epochs, "epochs"),
        )
        if count
    ]
    found += ["at the end"] if entry.save_end_of_training else []
    return ", ".join(found) or "never: no save key is written"
