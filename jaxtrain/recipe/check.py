"""What a recipe comes to, as far as it is known without jax, data or network."""

import json
import math
import os
import textwrap
from collections.abc import Iterator
from functools import partial
from glob import glob
from pathlib import Path

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import LocalDataSourceConfig, SFTDataConfig, SyntheticDataSourceConfig
from jaxtrain.recipe.errors import pluralize
from jaxtrain.recipe.report import Report, join_keys
from jaxtrain.recipe.resolve import Resolved
from jaxtrain.recipe.section import path_exists
from jaxtrain.recipe.trainer import TrainerConfig

DEVICE_COUNTS = (1, 8, 64)  # for which the batch of an open mesh is told
WIDTH = 100
COUNTED_BYTES = 1 << 28  # of local files whose lines are counted: a tenth of a second


def describe(resolved: Resolved, devices: int | None = None) -> str:
    """The report of a recipe's keys and, when nothing is wrong with it, the run that it asks for,
    on so many devices if their number is known."""
    parts = [report_lines(resolved.report)]
    if resolved.config is not None and not resolved.faults:
        parts.append([f"{name:10} {fact}" for name, fact in run_facts(resolved.config, devices)])
    wrap = partial(
        textwrap.fill, width=WIDTH, subsequent_indent=" " * 11,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n\n".join("\n".join(map(wrap, lines)) for lines in parts if lines)


def report_lines(report: Report) -> list[str]:
    """Keys that mean what they mean upstream, keys that do not with the reason, refused ones."""
    same, refused = (
        [f"{word:10} {join_keys(line.key for line in lines)}"]
        if (lines := report.select(word))
        else []
        for word in ("same", "refused")
    )
    return [*same, *report.changes(), *refused]


def run_facts(config: TrainerConfig, devices: int | None) -> Iterator[tuple[str, str]]:
    """(name, fact) of the run on so many devices, in the order in which they are shown."""
    horizon = config.horizon(None)
    sizes = batch_sizes(config, devices)
    yield "trainer", config.type
    yield "model", model(config)
    yield "rows", row_length(config)
    if missing := ", ".join(missing_files(config)):
        yield "missing", f"{missing}: a run here would be refused"
    yield "batch", batch(config, sizes)
    yield "updates", updates(config, horizon, sizes)
    yield "warm-up", warmup(config, horizon)
    if config.data.has_eval:
        yield "evaluation", evaluation(config)
    yield "files", files(config)
    for entry in config.checkpoint:
        if entry.enabled:
            folder = f"{entry.output_dir}/global_step_N ({entry.type})"
            yield "checkpoint", f"{folder}, {saves(entry) or 'never: no save key is written'}"


def model(config: TrainerConfig) -> str:
    name = config.model.name_or_path.split("#")[0]
    if path_exists(name):
        return name
    is_path = name.startswith(("/", ".", "~"))
    return f"{name}, {'not on this machine' if is_path else 'of the local cache or fetched'}"


def missing_files(config: TrainerConfig) -> Iterator[str]:
    """Files of sources that are not there."""
    for place, source in config.data.iter_sources():
        if isinstance(source, LocalDataSourceConfig):
            for path in local_paths(source):
                is_glob = "\0" not in path and glob(path, recursive=True)
                if not ("://" in path or path_exists(path) or is_glob):
                    yield f"{place}.path {path}"


def local_paths(source: LocalDataSourceConfig) -> tuple[str, ...]:
    return (source.path,) if isinstance(source.path, str) else source.path


def row_length(config: TrainerConfig) -> str:
    """Tokens a row has at most."""
    if config.data.max_length is not None:
        return f"at most {config.data.max_length:,} tokens"
    file = Path(config.model.name_or_path) / "config.json"
    try:
        fields = json.loads(file.read_text()) | config.model.hf_config_kwargs
        return f"at most {fields['max_position_embeddings']:,} tokens, the model's positions"
    except (OSError, ValueError, KeyError, TypeError):
        where = "the model's positions, read when it is there"
        return f"length still open: {where}; see data.max_length"


def batch(config: TrainerConfig, sizes: dict[int, int]) -> str:
    """Rows an update."""
    rows, pieces = config.micro_batch_size, config.gradient_accumulation_steps
    (n, size), *others = sizes.items()
    what = "pair" if config.data.ROWS_PER_SAMPLE == 2 else "row"
    counts = [f"{pluralize(size, what)} an update on {n}"]
    counts += [f"{size:,} on {n}" for n, size in others]
    devices = "device" if [*sizes] == [1] else "devices"
    return f"{', '.join(counts)} {devices}: {rows} x {pieces} on each batch shard"


def batch_sizes(config: TrainerConfig, devices: int | None) -> dict[int, int]:
    """Devices → rows an update; one entry where the mesh says how many devices there are, or the
    person does. RecipeError when those do not fit each other."""
    sizes = [size for _, size in config.mesh]
    fixed = math.prod(size for size in sizes if size != -1)
    counts = [fixed * n for n in (DEVICE_COUNTS if -1 in sizes else (1,))]
    rows = config.micro_batch_size * config.gradient_accumulation_steps
    return {n: rows * config.mesh.shards(n) for n in ([devices] if devices else counts)}


def updates(config: TrainerConfig, horizon: int | None, sizes: dict[int, int]) -> str:
    if horizon is not None:
        end, this_run = config.exit_iteration, config.exit_iteration_this_run
        told = f"{horizon:,}" + (f", ends at {end:,}" if 0 < end < horizon else "")
        return told + (f", at most {this_run:,} of one process" if this_run else "")
    first = f"{config.train_iters:,}, or " if config.train_iters else ""
    known = "counted when the data is read"
    if rows := local_rows(config):
        (devices, size), *_ = sizes.items()
        on = pluralize(devices, "device")
        known = f"at most {-(-rows // size):,} updates each on {on}: {rows:,} local rows"
    return f"{first}{pluralize(config.passes or 0, 'epoch')}, {known}"


def local_rows(config: TrainerConfig) -> int | None:
    """Rows of an epoch before any is dropped or packed, counted by the lines of local files; None
    where that takes reading them."""
    if not isinstance(config.data, SFTDataConfig):
        return None
    total, left = 0.0, COUNTED_BYTES
    for source in config.data.sources:
        if isinstance(source, SyntheticDataSourceConfig):
            rows = source.rows
        elif isinstance(source, LocalDataSourceConfig) and source.split == "train":
            paths = [Path(path) for path in local_paths(source)]
            is_open = all(p.is_file() and os.access(p, os.R_OK) for p in paths)
            left -= sum(p.stat().st_size for p in paths if is_open)
            if left < 0 or not is_open or not {p.suffix for p in paths} <= {".jsonl", ".ndjson"}:
                return None
            rows = sum(bool(line.strip()) for p in paths for line in p.open("rb"))
        else:
            return None
        total += min(rows * (source.sample_ratio or 1), source.sample_count or rows)
    return math.ceil(total * config.data.train_eval_split[0])


def warmup(config: TrainerConfig, horizon: int | None) -> str:
    scheduler = config.scheduler
    fixed = scheduler.warmup_ratio is None and scheduler.warmup_updates(0)
    if horizon is not None or fixed:
        return f"{scheduler.warmup_updates(horizon or 0):,} updates"
    return f"{scheduler.warmup_updates(1_000) / 10:g}% of the updates"


def evaluation(config: TrainerConfig) -> str:
    is_last = config.eval_at_end is not False
    ends = ["at the start"] * config.eval_at_start + ["at the end"] * is_last
    return ", ".join([*periods(config.eval_interval, config.eval_every_n_epochs), *ends])


def saves(entry: CheckpointConfig) -> str:
    """When an engine saves; empty when never."""
    found = periods(entry.save_every_n_steps, entry.save_every_n_epochs)
    return ", ".join([*found, *["at the end"] * entry.save_end_of_training])


def periods(num_updates: int, num_epochs: int) -> list[str]:
    due = ((num_updates, "update"), (num_epochs, "epoch"))
    return [f"every {pluralize(number, what)}" for number, what in due if number]


def files(config: TrainerConfig) -> str:
    """What the run writes beside checkpoints, the files of its folder together."""
    folder, trace = config.output_path(None, ""), config.profile
    found = [
        config.output_path(None, "recipe.yaml"),
        config.output_path(None, "run.json"),
        config.output_path(config.logger.output_dir, "") / "logs",
        config.output_path(config.train_log_metrics_path, "train-log-metrics.jsonl"),
        config.output_path(None, "loss.png"),
    ]
    for is_written, written, name in (
        (config.tensorboard.enable, config.tensorboard.dir, "tensorboard"),
        (config.wandb.is_on, None, "wandb"),
        (trace is not None, trace and trace.dir, "profile"),
        (config.mem_profiler is not None, config.mem_profiler_dir, "mem-prof"),
    ):
        if is_written:
            found.append(config.output_path(written, name))
    inside = [str(file.relative_to(folder)) for file in found if file.is_relative_to(folder)]
    outside = [str(file) for file in found if not file.is_relative_to(folder)]
    return ", ".join([f"{folder}: {', '.join(inside)}", *outside])
