"""The run that a recipe asks for, as far as it is known without jax, data or network."""

import json
import math
import os
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import LocalDataSourceConfig, SFTDataConfig, SyntheticDataSourceConfig
from jaxtrain.recipe.errors import pluralize
from jaxtrain.recipe.resolve import Resolved
from jaxtrain.recipe.section import is_path, path_exists
from jaxtrain.recipe.trainer import TrainerConfig

DEVICE_COUNTS = (1, 8, 64)  # for which the batch of an open mesh is shown
WIDTH = 100
MAX_COUNTED_BYTES = 1 << 28  # of local files whose lines are counted: a tenth of a second


def describe(resolved: Resolved, devices: int | None = None) -> str:
    """The report on a recipe's keys and, if it is valid, the facts of its run, on `devices` if
    their number is known."""
    report = resolved.report
    parts = [[*report.format("same"), *report.changes(), *report.format("refused")]]
    if resolved.config is not None and not resolved.faults:
        facts = find_facts(resolved.config, devices)
        parts.append([f"{name:10} {fact}" for name, fact in facts])
    wrap = partial(
        textwrap.fill, width=WIDTH, subsequent_indent=" " * 11,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n\n".join("\n".join(map(wrap, lines)) for lines in parts if lines)


def find_facts(config: TrainerConfig, devices: int | None) -> Iterator[tuple[str, str]]:
    """(name, fact) of the run, in the order in which they are shown."""
    sizes = find_batch_sizes(config, devices)
    yield "trainer", config.type
    yield "model", describe_model(config)
    yield "sequences", describe_length(config)
    yield "batch", describe_batch(config, sizes)
    yield "steps", describe_steps(config, config.horizon(None)) or _estimate_steps(config, sizes)
    yield "warm-up", describe_warmup(config)
    if config.data.has_eval:
        yield "evaluation", describe_evaluation(config)
    yield "files", describe_files(config)
    for entry in config.checkpoint:
        if entry.enabled:
            folder = f"{entry.output_dir}/global_step_N ({entry.type})"
            yield (
                "checkpoint",
                f"{folder}, {describe_saves(entry) or 'never: no save key is written'}",
            )


# Facts that the header of a run shows too.


def describe_batch(config: TrainerConfig, sizes: Mapping[int, int]) -> str:
    """Sequences per step; `sizes` are number of devices → batch size."""
    micro, pieces = config.micro_batch_size, config.gradient_accumulation_steps
    if tokens := config.data.batch_tokens:
        return f"at most {tokens:,} padded tokens x {pieces} per batch shard"
    (n, size), *others = sizes.items()
    what = "pair" if config.data.SEQUENCES_PER_SAMPLE == 2 else "sequence"
    counts = [f"{pluralize(size, what)} per step on {n}", *(f"{s:,} on {d}" for d, s in others)]
    devices = "device" if [*sizes] == [1] else "devices"
    return f"{', '.join(counts)} {devices}: {micro} x {pieces} per batch shard"


def describe_steps(
    config: TrainerConfig, horizon: int | None, steps_per_epoch: int | None = None
) -> str:
    """Optimizer steps of a run of `horizon` steps; empty when that is not known."""
    if horizon is None:
        return ""
    end, this_run = config.exit_iteration, config.exit_iteration_this_run
    text = f"{horizon:,}" + (f", ends at {end:,}" if 0 < end < horizon else "")
    text += f", at most {this_run:,} per process" if this_run else ""
    return text + (f", {steps_per_epoch:,} per epoch" if steps_per_epoch else "")


def describe_warmup(config: TrainerConfig) -> str:
    """Optimizer steps of warm-up, or their fraction of an unknown number of steps."""
    scheduler, horizon = config.scheduler, config.horizon(None)
    is_fixed = scheduler.warmup_ratio is None and scheduler.warmup_updates(0)
    if horizon is not None or is_fixed:
        return pluralize(scheduler.warmup_updates(horizon or 0), "step")
    return f"{scheduler.warmup_updates(1_000) / 10:g}% of the steps"


def describe_excess(tokens: int, positions: int | None) -> str:
    """Follows the length of sequences that have more tokens than the model names positions; empty
    for others."""
    if positions is None or tokens <= positions:
        return ""
    return f", longer than the {positions:,} positions that the model's config names"


# Facts that only a run knows better.


def describe_model(config: TrainerConfig) -> str:
    name = config.model.name_or_path.split("#")[0]
    if path_exists(name):
        return name
    where = "not on this machine" if is_path(name) else "from the local cache or the hub"
    return f"{name}, {where}"


def describe_length(config: TrainerConfig) -> str:
    """Maximum length of a sequence."""
    length, positions = config.data.max_length, find_positions(config)
    if length is not None:
        return f"at most {length:,} tokens{describe_excess(length, positions)}"
    if positions is not None:
        return f"at most {positions:,} tokens, the model's positions"
    return "at most as many tokens as the model has positions; see data.max_length"


def find_positions(config: TrainerConfig) -> int | None:
    """Positions that the model's config names, if it is in a folder here."""
    file, key = Path(config.model.name_or_path) / "config.json", "max_position_embeddings"
    try:
        fields = json.loads(file.read_text())
        found = {**fields.get("text_config", {}), **fields, **config.model.hf_config_kwargs}
        return int(found[key])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def find_batch_sizes(config: TrainerConfig, devices: int | None) -> dict[int, int]:
    """Number of devices → sequences per step; one entry if the mesh or `devices` has the number.
    RecipeError if those contradict each other."""
    sizes = [size for _, size in config.mesh]
    fixed = math.prod(size for size in sizes if size != -1)
    counts = [fixed * n for n in (DEVICE_COUNTS if -1 in sizes else (1,))]
    rows = config.micro_batch_size * config.gradient_accumulation_steps
    return {n: rows * config.mesh.shards(n) for n in ([devices] if devices else counts)}


def _estimate_steps(config: TrainerConfig, sizes: dict[int, int]) -> str:
    first = f"{config.train_iters:,}, or " if config.train_iters else ""
    known = "counted when the data is read"
    if records := count_local_records(config):
        (devices, size), *_ = sizes.items()
        on = pluralize(devices, "device")
        known = f"at most {-(-records // size):,} steps each on {on}: {records:,} local records"
    return f"{first}{pluralize(config.passes or 0, 'epoch')}, {known}"


def count_local_records(config: TrainerConfig) -> int | None:
    """Records of an epoch before any is dropped or packed, by the lines of local files; None where
    that takes reading them."""
    if not isinstance(config.data, SFTDataConfig):
        return None
    total, left = 0.0, MAX_COUNTED_BYTES
    for source in config.data.sources:
        if isinstance(source, SyntheticDataSourceConfig):
            records = source.rows
        elif isinstance(source, LocalDataSourceConfig) and source.split == "train":
            paths = [Path(path) for path in source.paths]
            is_open = all(p.is_file() and os.access(p, os.R_OK) for p in paths)
            left -= sum(p.stat().st_size for p in paths if is_open)
            if left < 0 or not is_open or not {p.suffix for p in paths} <= {".jsonl", ".ndjson"}:
                return None
            records = sum(bool(line.strip()) for p in paths for line in p.open("rb"))
        else:
            return None
        total += min(records * (source.sample_ratio or 1), source.sample_count or records)
    return math.ceil(total * config.data.train_eval_split[0])


def describe_evaluation(config: TrainerConfig) -> str:
    is_last = config.eval_at_end is not False
    ends = ["at the start"] * config.eval_at_start + ["at the end"] * is_last
    return ", ".join([*_periods(config.eval_interval, config.eval_every_n_epochs), *ends])


def describe_saves(entry: CheckpointConfig) -> str:
    """When a checkpoint entry saves; empty when never."""
    found = _periods(entry.save_every_n_steps, entry.save_every_n_epochs)
    return ", ".join([*found, *["at the end"] * entry.save_end_of_training])


def _periods(num_steps: int, num_epochs: int) -> list[str]:
    due = ((num_steps, "step"), (num_epochs, "epoch"))
    return [f"every {pluralize(number, what)}" for number, what in due if number]


def describe_files(config: TrainerConfig) -> str:
    """Files that the run writes besides checkpoints, those in its folder together."""
    folder = config.output_path(None, "")
    found = [path for _, path in list_files(config)]
    inside = [str(file.relative_to(folder)) for file in found if file.is_relative_to(folder)]
    outside = [str(file) for file in found if not file.is_relative_to(folder)]
    return ", ".join([f"{folder}: {', '.join(inside)}", *outside])


def list_files(config: TrainerConfig) -> Iterator[tuple[str, Path]]:
    """(key that names its place, path) of each file and folder in `describe_files`."""
    logs, trace = config.logger.output_dir, config.profile
    outputs = (
        (True, "run_dir", None, "recipe.yaml"),
        (True, "run_dir", None, "run.json"),
        (True, "logger.output_dir", logs and f"{logs}/logs", "logs"),
        (True, "train_log_metrics_path", config.train_log_metrics_path, "train-log-metrics.jsonl"),
        (True, "run_dir", None, "loss.png"),
        (config.tensorboard.enable, "tensorboard.dir", config.tensorboard.dir, "tensorboard"),
        (config.wandb.is_on, "run_dir", None, "wandb"),
        (trace, "profile.dir", trace and trace.dir, "profile"),
        (config.mem_profiler, "mem_profiler_dir", config.mem_profiler_dir, "mem-prof"),
    )
    for is_written, key, path, name in outputs:
        if is_written:
            yield key if path else "run_dir", config.output_path(path, name)
