"""Checks that need more than one section of a recipe."""

import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtrain import registry
from jaxtrain.recipe.checkpoint import PREFIX, CheckpointConfig
from jaxtrain.recipe.deepspeed import OFFLOAD_PARAM
from jaxtrain.recipe.errors import Fault, nearest_divisors, nearest_multiples, show
from jaxtrain.recipe.guards import EVAL_METRICS, metric_direction
from jaxtrain.recipe.logger import LEVELS
from jaxtrain.recipe.mesh import describe_uneven
from jaxtrain.recipe.scheduler import WSDSchedulerConfig
from jaxtrain.recipe.section import expand_user, path_exists
from jaxtrain.recipe.trainer import TrainerConfig

NEEDS_EVAL = "needs eval data; add `data.eval_sources` or `data.train_eval_split`"
TRAIN_METRICS = ("loss", "grad_norm", "token_accuracy", "z_loss")
"""Metrics of the steps of a built-in trainer."""
Check = Callable[[Any], Iterator[Fault]]
CHECKS: list[tuple[tuple[str, ...], Check]] = []
"""(keys that must be valid for the check to run, check)"""
MACHINE_CHECKS: list[tuple[tuple[str, ...], Check]] = []
"""Those of files and packages that a run needs here; an export of its checkpoint does not."""


def _needs(*keys: str, checks: list[Any] = CHECKS) -> Callable[[Check], None]:
    return lambda check: checks.append((keys, check))


def _entries(config: TrainerConfig) -> list[tuple[str, CheckpointConfig]]:
    """(dotted key, entry) of every checkpoint engine."""
    return [(f"checkpoint.{i}", entry) for i, entry in enumerate(config.checkpoint)]


@_needs("data", "eval_interval", "eval_at_start", "eval_at_end")
def _eval_data_and_interval(config: TrainerConfig) -> Iterator[Fault]:
    other = config.eval_at_start or config.eval_at_end is not False or config.eval_every_n_epochs
    keys = ("eval_interval", "eval_every_n_epochs", "eval_at_start", "eval_at_end")
    keys += ("early_stopping",)
    if not config.data.has_eval:
        yield from (Fault(key, NEEDS_EVAL) for key in keys if getattr(config, key))
    elif not config.eval_interval and not other:
        what = "must be > 0 with evaluation data and eval_at_end: false, found 0"
        yield Fault("eval_interval", what)


@_needs("checkpoint")
def _one_resume_each_folder_once(config: TrainerConfig) -> Iterator[Fault]:
    resumes = [(key, e) for key, e in _entries(config) if e.auto_resume or e.start]
    for key, entry in resumes[1:2]:
        name = "auto_resume" if entry.auto_resume else "resume_from"
        both = " and ".join(key for key, _ in resumes)
        yield Fault(f"{key}.{name}", f"only one entry may resume, found {both}")
    folders: dict[Path, str] = {}
    for key, entry in _entries(config):
        if (first := folders.setdefault(entry.folder, key)) != key:
            what = f"{entry.output_dir!r} is the folder of {first} too; use another"
            yield Fault(f"{key}.output_dir", what)


@_needs("checkpoint", checks=MACHINE_CHECKS)
def _start_is_there(config: TrainerConfig) -> Iterator[Fault]:
    for key, entry in _entries(config):
        start = entry.start
        if start is None or "{" in entry.output_dir:  # filled in when the run starts
            continue
        is_found = path_exists(str(start))
        if not is_found or not re.fullmatch(rf"{PREFIX}\d+", start.name):
            folder = start if is_found else start.parent
            found = folder.glob(f"{PREFIX}*") if path_exists(str(folder)) else ()
            held = ", ".join(sorted(path.name for path in found)) or "no checkpoints"
            what = f"must be a folder {PREFIX}N, found none at {start}; {folder} contains {held}"
            yield Fault(f"{key}.resume_from", what)


@_needs("checkpoint", "data", "eval_interval")
def _best_needs_scores(config: TrainerConfig) -> Iterator[Fault]:
    every = config.eval_interval
    for key, entry in _entries(config):
        save = entry.save_every_n_steps
        if not entry.keeps_best:
            continue
        if not config.data.has_eval:
            yield Fault(f"{key}.keep_best_n", NEEDS_EVAL)
        elif save and every and save % every:
            yield Fault(
                f"{key}.keep_best_n",
                f"needs saves that fall on evaluations: save_every_n_steps {save} is no multiple "
                f"of eval_interval {every}; use {nearest_multiples(save, every)}",
            )


@_needs("checkpoint")
def _folders_are_local(config: TrainerConfig) -> Iterator[Fault]:
    profile, tensorboard = config.profile, config.tensorboard
    written = {
        "run_dir": config.run_dir,
        "logger.output_dir": config.logger.output_dir,
        "train_log_metrics_path": config.train_log_metrics_path,
        "mem_profiler_dir": config.mem_profiler_dir,
        "profile.dir": profile and profile.dir,
        "tensorboard.dir": tensorboard.dir,
        "data.cache_dir": config.data.cache_dir,
    }
    written |= {f"{key}.output_dir": entry.output_dir for key, entry in _entries(config)}
    for key, path in written.items():
        if path and "://" in str(path):
            what = f"must be a local folder, found {show(path)}"
            yield Fault(key, f"{what}; object stores are not supported yet")
    for key, entry in _entries(config):
        named = entry.output_dir.replace("{run_dir}", config.run_dir or "")
        folder = str(expand_user(named).absolute())
        if entry.type == "orbax" and (found := {*folder} & {*"[]*?"}):
            what = f"Orbax cannot read back a folder with {' '.join(sorted(found))} in its path"
            yield Fault(f"{key}.output_dir", f"{what}, found {show(folder)}")


def find_lost_work(config: TrainerConfig) -> Iterator[str]:
    """Notes on a run whose work is not kept, or not kept as the recipe seems to mean."""
    if not any(entry.enabled for entry in config.checkpoint):
        yield "checkpoint: no entry saves anything, so the trained weights are lost at the end"
    horizon = config.horizon(None)
    last = min([n for n in (horizon, config.exit_iteration) if n], default=None)
    for key, entry in _entries(config):
        steps, epochs = entry.save_every_n_steps, entry.save_every_n_epochs
        if not entry.enabled or entry.save_end_of_training:
            continue
        first = -(-max(steps, entry.save_after_step) // steps) * steps if steps else 0
        if not (steps or epochs):
            yield f"{key}: never saves; write save_end_of_training: true or save_every_n_steps"
        elif not epochs and last is not None and first > last:
            yield (
                f"{key}: its first save is due after step {first}, and the run ends at {last}; "
                "write save_end_of_training: true"
            )
    for key, entry in _entries(config):
        has_end = entry.save_end_of_training and config.eval_at_end is not False
        by_steps = entry.save_every_n_steps and config.eval_interval
        by_epochs = entry.save_every_n_epochs and config.eval_every_n_epochs
        if entry.keeps_best and config.data.has_eval and not (has_end or by_steps or by_epochs):
            yield (
                f"{key}.keep_best_n: no save falls on an evaluation, so none has a score; write "
                "eval_interval for save_every_n_steps, eval_every_n_epochs for save_every_n_epochs"
            )


@_needs("checkpoint", "data", "early_stopping", "divergence")
def _metrics_exist(config: TrainerConfig) -> Iterator[Fault]:
    if not registry.is_built_in("trainer", config.type):
        return  # a user's trainer has its own metrics
    sets = config.data.eval_sources
    names = [f"eval/{name}" for name in sets] if isinstance(sets, dict) else []
    known = [f"{name}/{metric}" for name in ("eval", *names) for metric in EVAL_METRICS]
    used = [(key, entry.metric) for key, entry in _entries(config) if entry.keeps_best]
    if config.early_stopping:
        used.append(("early_stopping", config.early_stopping.metric))
    for key, metric in used:
        if metric not in known:
            yield Fault(f"{key}.metric", f"must be one of {', '.join(known)}, found {metric!r}")
    if (divergence := config.divergence) is None:
        return
    known = [*TRAIN_METRICS, *(known if config.data.has_eval else ())]
    is_own = "/" in divergence.metric and not divergence.metric.startswith("eval/")  # of a callback
    if divergence.metric not in known and not is_own:
        what = f"must be one of {', '.join(known)}, found {divergence.metric!r}"
        yield Fault("divergence.metric", what)


@_needs("early_stopping")
def _stopping_has_a_direction(config: TrainerConfig) -> Iterator[Fault]:
    stopping = config.early_stopping
    if stopping and metric_direction(stopping.metric, stopping.mode) is None:
        what = f"cannot tell whether a smaller {stopping.metric} is better; write min or max"
        yield Fault("early_stopping.mode", what)


@_needs("checkpoint", "on_nonfinite", "divergence")
def _rollback_has_a_checkpoint(config: TrainerConfig) -> Iterator[Fault]:
    action = config.divergence and config.divergence.action
    has_state = any(
        entry.type == "orbax" and entry.enabled and getattr(entry, "save_model_only", 0) is not True
        for entry in config.checkpoint
    )
    for key, value in (("on_nonfinite", config.on_nonfinite), ("divergence.action", action)):
        if value == "rollback" and not has_state:
            yield Fault(key, "rollback needs an `orbax` checkpoint entry")


@_needs("data")
def _sources_write_what_is_read(config: TrainerConfig) -> Iterator[Fault]:
    """Refuses keys of sources that nothing reads; a default passes, as dumps contain it."""
    if not registry.is_built_in("data", config.data.type):
        return  # a user's factory may read any of them
    for place, source in config.data.iter_sources():
        for key in ("column", "role_mapping", "content_key", "process"):
            fields = type(source).model_fields
            if key not in source.model_fields_set or getattr(source, key) == fields[key].default:
                continue
            if owner := config.data.UNREAD_SOURCE_KEYS.get(key):
                what = f"belongs to data.type {owner}, {config.data.type} does not read it"
            elif source.is_tokenised and key != "process":
                what = "has no effect on tokenised records; remove it, or process: false"
            else:
                continue
            yield Fault(f"{place}.{key}", f"{what} (found {show(getattr(source, key))})")


@_needs("data", "tensorboard", "wandb", checks=MACHINE_CHECKS)
def _packages_are_installed(config: TrainerConfig) -> Iterator[Fault]:
    for place, source in config.data.iter_sources():
        if source.PACKAGE and not _is_installed(source.PACKAGE):
            what = f"{source.type} needs {source.PACKAGE}: pip install 'jaxtrain[{source.type}]'"
            yield Fault(f"{place}.type", what)
    for key, is_on, package in (
        ("tensorboard", config.tensorboard.enable, "tensorboardX"),
        ("wandb", config.wandb.is_on, "wandb"),
    ):
        if is_on and not _is_installed(package):
            what = f"needs the package {package}; pip install 'jaxtrain[{key}]', or write false"
            yield Fault(f"{key}.enable", what)


def _is_installed(package: str) -> bool:
    try:  # not by `find_spec`: wandb leaves a folder of its own name where it runs
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


@_needs("mesh", "pipeline", "micro_batch_size", "gradient_accumulation_steps")
def _microbatches_divide(config: TrainerConfig) -> Iterator[Fault]:
    pieces = config.pipeline.microbatches
    rows = config.micro_batch_size * config.gradient_accumulation_steps
    if pieces and config.mesh.pipeline == 1:
        yield Fault("pipeline.microbatches", "has no effect with mesh.pipeline 1; remove it")
    elif pieces and rows % pieces:
        what = f"{pieces} does not divide the {rows} sequences of a batch shard"
        yield Fault("pipeline.microbatches", f"{what}; use {nearest_divisors(pieces, rows)}")


@_needs("data", "micro_batch_size", "deepspeed")
def _tokens_fill_the_batch(config: TrainerConfig) -> Iterator[Fault]:
    if not config.data.batch_tokens:
        return
    if config.micro_batch_size != 1:
        what = f"excludes data.batch_tokens, found {config.micro_batch_size}; remove one"
        yield Fault("micro_batch_size", what)
    if config.deepspeed.train_batch_size is not None:
        what = "excludes data.batch_tokens, whose steps have different sizes; remove it"
        yield Fault("deepspeed.train_batch_size", what)


@_needs("data", "train_iters", "epochs", "checkpoint")
def _a_stream_has_steps_and_no_epochs(config: TrainerConfig) -> Iterator[Fault]:
    if not config.data.streaming:
        return
    if not config.train_iters:
        what = "must be > 0 with data.streaming: true, where nobody counts the records, found 0"
        yield Fault("train_iters", what)
    keys = ("epochs", "min_iterations", "overfit_first_batch", "eval_every_n_epochs")
    written = [(key, getattr(config, key)) for key in keys]
    saved = [(f"{k}.save_every_n_epochs", e.save_every_n_epochs) for k, e in _entries(config)]
    for key, value in (*written, *saved):
        if value:
            what = "counts passes over the data, which data.streaming does not know"
            yield Fault(key, f"{what}, found {show(value)}; remove it")


@_needs("deepspeed", "mesh", "model")
def _parameters_are_copied_by_layer(config: TrainerConfig) -> Iterator[Fault]:
    if not config.deepspeed.offloads_params:
        return
    model, stages = config.model, config.mesh.pipeline
    if stages > 1:
        what = f"excludes mesh.pipeline, whose stages keep their layers, found {stages}"
        yield Fault(OFFLOAD_PARAM, f"{what}; use mesh.fsdp")
    if model.remat_policy == "none" or model.remat_every_nth_layer > 1:
        what = "needs every layer recomputed: one that is not keeps its weights on the devices"
        yield Fault(OFFLOAD_PARAM, f"{what}; write model.remat: full, remat_every_nth_layer: 1")


@_needs("mesh", "data")
def _rows_divide_over_context(config: TrainerConfig) -> Iterator[Fault]:
    length = config.data.max_length
    if length and (what := describe_uneven(length, config.mesh.context)):
        yield Fault("data.max_length", what)


@_needs("scheduler", "train_iters", "epochs")
def _schedule_fits(config: TrainerConfig) -> Iterator[Fault]:
    scheduler, horizon = config.scheduler, config.train_iters or config.horizon(None)
    key, length, what = "warmup_steps", scheduler.warmup_steps or 0, "is"
    if isinstance(scheduler, WSDSchedulerConfig):
        key, what = "num_decay_steps", "with num_warmup_steps is"
        length = scheduler.num_warmup_steps + scheduler.num_decay_steps
    if horizon and length > horizon:
        what = f"{length} {what} longer than the run of {horizon} steps"
        yield Fault(f"scheduler.{key}", what)


@_needs("profile", "train_iters", "epochs")
def _trace_lies_in_the_run(config: TrainerConfig) -> Iterator[Fault]:
    horizon = config.horizon(None)
    if config.profile and horizon and config.profile.start_step >= horizon:
        what = f"{config.profile.start_step} is after the end of the run of {horizon} steps"
        yield Fault("profile.start_step", what)


@_needs("deepspeed", "model")
def _dtypes_agree(config: TrainerConfig) -> Iterator[Fault]:
    block, dtype = config.deepspeed, config.model.dtype
    for key, wanted in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
        section = getattr(block, key)
        if section is None or section.enabled is None:
            continue
        # Upstream's default is bf16, which is what this section may ask for.
        if section.enabled != ((dtype or "bfloat16") == wanted) and (dtype or section.enabled):
            what = f"disagrees with model.dtype {dtype or 'bfloat16 (its default)'}"
            yield Fault(f"deepspeed.{key}.enabled", f"{what}; write model.dtype and remove it")
    if (autocast := block.autocast_dtype) and dtype not in (None, "float32", autocast):
        what = f"{autocast} contradicts model.dtype {dtype}; remove one"
        yield Fault("deepspeed.torch_autocast.dtype", what)


@_needs("kill_switch_path", checks=MACHINE_CHECKS)
def _stop_file_is_fresh(config: TrainerConfig) -> Iterator[Fault]:
    if config.kill_switch_path and path_exists(config.kill_switch_path):
        yield Fault("kill_switch_path", f"{config.kill_switch_path!r} exists already; remove it")


@_needs("logger")
def _log_level_is_known(config: TrainerConfig) -> Iterator[Fault]:
    where, level = config.logger.find_level()
    if level not in LEVELS:
        what = f"the variable {where} must be one of {', '.join(LEVELS)}, found {level!r}"
        yield Fault("logger.level", what)


@_needs("run_dir")
def _run_name_is_known(config: TrainerConfig) -> Iterator[Fault]:
    *folders, name = Path(config.run_dir or "x").parts
    if any("{n}" in folder for folder in folders) or name.count("{n}") > 1:
        yield Fault("run_dir", f"may have one {{n}}, in its last part, found {config.run_dir!r}")
