"""What a recipe comes to, as far as it is known without jax, data or network."""

import json
import math
import textwrap
from collections.abc import Iterator
from functools import partial
from glob import glob
from pathlib import Path

from jaxtrain.recipe.checkpoint import CheckpointConfig
from jaxtrain.recipe.data import LocalDataSourceConfig, SFTDataConfig, SyntheticDataSourceConfig
from jaxtrain.recipe.mesh import AXES, BATCH_AXES, MeshConfig
from jaxtrain.recipe.resolve import Resolved
from jaxtrain.recipe.section import is_there
from jaxtrain.recipe.standing import Report, braced
from jaxtrain.recipe.trainer import TrainerConfig

DEVICE_COUNTS = (1, 8, 64)  # for which the batch of an open mesh is told
WIDTH = 100
COUNTED_BYTES = 1 << 28  # of local files whose lines are counted: a tenth of a second


def told(resolved: Resolved, devices: int | None = None) -> str:
    """The report of a recipe's keys and, when nothing is wrong with it, the run that it asks for,
    on so many devices if their number is known."""
    parts = [report_lines(resolved.report)]
    if resolved.config is not None and not resolved.faults:
        counts = (devices,) if devices else DEVICE_COUNTS
        parts.append([f"{name:10} {fact}" for name, fact in run_facts(resolved.config, counts)])
    wrap = partial(
        textwrap.fill, width=WIDTH, subsequent_indent=" " * 11,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n\n".join("\n".join(map(wrap, lines)) for lines in parts if lines)


def report_lines(report: Report) -> list[str]:
    """Keys that mean what they mean upstream, keys that do not with the reason, refused ones."""
    same, refused = (
        [f"{word:10} {braced(line.key for line in lines)}"] if (lines := report.of(word)) else []
        for word in ("same", "refused")
    )
    return [*same, *report.changes(), *refused]


def run_facts(config: TrainerConfig, counts: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """(name, fact) of the run on these numbers of devices, in the order in which they are shown."""
    horizon = config.horizon(None)
    sizes = batch_sizes(config, counts)
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
    yield "files", folded(config)
    for entry in config.checkpoint:
        if entry.enabled:
            yield "checkpoint", f"{entry.output_dir}/global_step_N ({entry.type}), {moments(entry)}"


def model(config: TrainerConfig) -> str:
    name = config.model.name_or_path.split("#")[0]
    if is_there(name):
        return name
    is_path = name.startswith(("/", ".", "~"))
    return f"{name}, {'not on this machine' if is_path else 'of the local cache or fetched'}"


def missing_files(config: TrainerConfig) -> Iterator[str]:
    """Files of sources that are not there."""
    for place, source in config.data.placed_sources():
        if isinstance(source, LocalDataSourceConfig):
            for path in local_paths(source):
                is_glob = "\0" not in path and glob(path, recursive=True)
                if not ("://" in path or is_there(path) or is_glob):
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
        return (
            "length still open: the model's positions, read when it is there; see data.max_length"
        )


def batch(config: TrainerConfig, sizes: dict[int, int]) -> str:
    """Rows an update."""
    rows, pieces = config.micro_batch_size, config.gradient_accumulation_steps
    (n, size), *others = sizes.items()
    what = "pair" if config.data.ROWS_A_SAMPLE == 2 else "row"
    counts = [f"{size:,} {what}{'s' * (size != 1)} an update on {n}"]
    counts += [f"{size:,} on {n}" for n, size in others]
    devices = "device" if [*sizes] == [1] else "devices"
    return f"{', '.join(counts)} {devices}: {rows} x {pieces} on each batch shard"


def batch_sizes(config: TrainerConfig, counts: tuple[int, ...]) -> dict[int, int]:
    """Devices → rows an update; one entry where the mesh says how many devices there are, or the
    person does. RecipeError when those do not fit each other."""
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    rows = config.micro_batch_size * config.gradient_accumulation_steps
    if counts is DEVICE_COUNTS:
        counts = tuple(fixed * n for n in counts) if -1 in sizes else (fixed,)
    return {n: rows * shards(config.mesh, n) for n in counts}


def shards(mesh: MeshConfig, num_devices: int) -> int:
    """Parts into which the rows of a batch are split."""
    sizes = mesh.sizes(num_devices)
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def updates(config: TrainerConfig, horizon: int | None, sizes: dict[int, int]) -> str:
    if horizon is not None:
        end, this_run = config.exit_iteration, config.exit_iteration_this_run
        told = f"{horizon:,}" + (f", ends at {end:,}" if 0 < end < horizon else "")
        return told + (f", at most {this_run:,} of one process" if this_run else "")
    epochs = config.passes
    first = f"{config.train_iters:,}, or " if config.train_iters else ""
    known = "counted when the data is read"
    if rows := local_rows(config):
        (devices, size), *_ = sizes.items()
        on = f"{devices} device{'s' * (devices > 1)}"
        known = f"at most {-(-rows // size):,} updates each on {on}: {rows:,} local rows"
    return f"{first}{epochs} epoch{'s' * (epochs != 1)}, {known}"


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
            left -= sum(p.stat().st_size for p in paths if p.is_file())
            if left < 0 or not all(
                p.is_file() and p.suffix in (".jsonl", ".ndjson") for p in paths
            ):
                return None
            rows = sum(bool(line.strip()) for p in paths for line in p.open("rb"))
        else:
            return None
        total += min(rows * (source.sample_ratio or 1), source.sample_count or rows)
    return math.ceil(total * config.data.train_eval_split[0])


def warmup(config: TrainerConfig, horizon: int | None) -> str:
    scheduler = config.scheduler
    if horizon is not None:
        return f"{scheduler.warmup_updates(horizon):,} updates"
    if scheduler.warmup_ratio is None and scheduler.warmup_updates(0):
        return f"{scheduler.warmup_updates(0):,} updates"
    return f"{scheduler.warmup_updates(1_000) / 10:g}% of the updates"


def evaluation(config: TrainerConfig) -> str:
    moments = [f"every {config.eval_interval:,} updates"] if config.eval_interval else []
    epochs = config.eval_every_n_epochs
    moments += [f"every {epochs:,} epoch{'s' * (epochs > 1)}"] if epochs else []
    moments += ["at the start"] if config.eval_at_start else []
    moments += ["at the end"] if config.eval_at_end is not False else []
    return ", ".join(moments)


def folded(config: TrainerConfig) -> str:
    """The files of a run, those of its folder together."""
    folder, found = Path(config.run_dir or ""), list(files(config))
    inside = [str(file.relative_to(folder)) for file in found if file.is_relative_to(folder)]
    outside = [str(file) for file in found if not file.is_relative_to(folder)]
    return ", ".join([f"{folder}: {', '.join(inside)}", *outside])


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
        f"every {count:,} {what}{'s' * (count > 1)}"
        for count, what in (
            (entry.save_every_n_steps, "update"),
            (entry.save_every_n_epochs, "epoch"),
        )
        if count
    ]
    found += ["at the end"] if entry.save_end_of_training else []
    return ", ".join(found) or "never: no save key is written"
