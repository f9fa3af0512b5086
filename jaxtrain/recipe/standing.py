"""What each key of the shared format becomes here: tables, and the report made from them."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxtrain import registry
from jaxtrain.recipe import deepspeed
from jaxtrain.recipe.errors import Fault, show
from jaxtrain.recipe.mapping import CARRIED, COMPUTED
from jaxtrain.recipe.model import PeftConfig
from jaxtrain.recipe.secrets import SPELLINGS
from jaxtrain.recipe.section import is_off, why_refused

Standing = Literal["same", "mapped", "no effect", "refused", "own"]

MAPPED = {
    **dict(CARRIED),
    **{key: f"compared with {other}" for key, other in COMPUTED},
    "name": "type",
    "micro_batch_size": "rows of a batch shard (data x fsdp x expert), not of a device",
    "enable_routing_replay": "router choices are kept across rematerialisation",
    "activation_checkpoint_cpu_offload": "rematerialisation to host memory",
    "tiled_mlp_compute": "a scan over pieces of the sequence",
    "mem_profiler": "device memory profiles (pprof)",
    "model.dtype": "compute and export dtype; the trained weights have model.param_dtype",
    "model.attn_implementation": "one of our kernels; the start message says which",
    "model.peft_config": "our own LoRA",
    "data.dl_num_workers": "prefetch threads of a process",
    "deepspeed.zero_optimization": "what is sharded over mesh.data",
    "deepspeed.zero_optimization.offload_optimizer": "where optimizer state lives",
    "deepspeed.zero_optimization.offload_param": "where parameters live",
    "deepspeed.zero_optimization.cpu_offload": "older spelling of offload_optimizer.device: cpu",
    "deepspeed.zero_optimization.cpu_offload_param": "older spelling of offload_param.device: cpu",
    "deepspeed.train_batch_size": "compared with micro_batch_size x accumulation x batch shards",
    "deepspeed.bf16": "compared with model.dtype",
    "deepspeed.bfloat16": "compared with model.dtype",
    "deepspeed.fp16": "compared with model.dtype; the rest is of the loss scaler",
    "deepspeed.data_types": "dtype of the summed gradient",
    "deepspeed.tensor_parallel": "mesh.tensor",
    "deepspeed.tensorboard": "tensorboard.enable",
}
"""Key → the mechanism that honours it; holds for the keys below it too."""

CHOICES = {
    "model.attn_implementation": {
        "sdpa": "the fastest kernel that hardware and shapes allow",
        "eager": "the plain XLA reference",
        "flash_attention_2": "the flash kernel, or the reference where it cannot run",
        "flash_attention_3": "the flash kernel, or the reference where it cannot run",
    },
    "deepspeed.zero_optimization.stage": {
        0: "parameters, gradients and optimizer state are copied to every device of `mesh.data`",
        1: "optimizer state and master weights are sharded over `mesh.data`, gathered once a step",
        2: "as 1, and gradients are reduce-scattered over `mesh.data`",
        3: "as 2, and parameters stay sharded over `mesh.data`, gathered per layer",
    },
}
"""Key → value → what that value becomes."""
ALIAS_NOTES = {
    "liger": "the same model as `huggingface`; fused kernels are always on",
    "cpu_adam": "`adamw`; deepspeed.zero_optimization.offload_optimizer says where its state lives",
    "deepspeed": "`orbax`, our full-state engine",
}

_NO_EFFECT = {
    "": {
        "experts and kernels are our own": "arctic_moe enable_arctic_moe_custom_optimization",
        "JAX profiles have no history limit": "mem_profiler_max_entries",
    },
    "model": {"nothing reads it, upstream neither": "save_name"},
    "model.peft_config": {
        "nothing here depends on it": """
            layers_pattern fan_in_fan_out task_type inference_mode megatron_config megatron_core
            runtime_config"""
    },
    "data": {
        "the cache is always on, remove the key": "use_data_cache cache_processed_data",
        "whoever comes first claims rows by a file, and prepares them": "cache_fs_type",
    },
    "data.sources": {"the package fetches rows in parts of its own": "batch_size"},
    **{f"deepspeed.{section}".rstrip("."): why for section, why in deepspeed.NO_EFFECT.items()},
}
NO_EFFECT = {
    f"{section}.{name}".lstrip("."): why
    for section, reasons in _NO_EFFECT.items()
    for why, names in reasons.items()
    for name in names.split()
}
"""Key → why it changes nothing."""

_OWN = {
    "": """base run_dir mesh pipeline max_grad_norm eval_at_start eval_at_end eval_after_step
        eval_every_n_epochs max_eval_batches early_stopping on_nonfinite divergence z_loss
        label_smoothing ema profile tensorboard eval_samples replica_check_interval
        loss_weighting""",
    "model": "from_scratch param_dtype resize_vocab remat remat_every_nth_layer",
    "tokenizer": "chat_template extra_tokens pad_token",
    "data": """streaming batch_tokens max_length_buckets overlong packing loss_roles
        completion_only max_rows_with_errors""",
    "data.sources": "weight name path columns per_line format rows vocab_size",
    "optimizer": "eps momentum nesterov groups state_dtype",
    "scheduler": "warmup_steps min_lr_ratio",
    "checkpoint": """keep_last_n keep_best_n keep_every_n_steps metric mode async_save
        save_after_step save_model_only reset on_corrupt adapter verify_export resume_from
        max_shard_size""",
    "wandb": "id mode",
}
OWN = {f"{section}.{name}".lstrip(".") for section, names in _OWN.items() for name in names.split()}
"""Keys that only this package has."""
OFF = {
    f"{section}.{name}"
    for section, cls in (
        ("deepspeed", deepspeed.DeepSpeedConfig),
        ("deepspeed.zero_optimization", deepspeed.ZeroConfig),
        ("deepspeed.zero_optimization.offload_optimizer", deepspeed.OffloadConfig),
        ("deepspeed.zero_optimization.offload_param", deepspeed.OffloadConfig),
        ("model.peft_config", PeftConfig),
    )
    for name, field in cls.model_fields.items()
    if why_refused(field)
}
"""Keys that may only be off."""
NAMED_SOURCE = re.compile(r"data\.eval_sources\.[^.]+\.\d+")
"""Key of a source in a named set."""
READ_AT_THE_START = ("type", "output_dir", "auto_resume", "resume_from", "reset", "on_corrupt")
"""Keys of a checkpoint entry that a run reads to continue, also from one that saves nothing."""
SHARED_SECTIONS = (
    "model", "model.peft_config", "tokenizer", "data", "optimizer", "scheduler", "checkpoint",
    "logger", "wandb",
)  # fmt: skip


def _without(*names: str) -> Callable[[dict[str, Any], Any], bool]:
    return lambda section, tree: all(is_off(section.get(name)) for name in names)


def _evaluates_nothing(section: Any, tree: dict[str, Any]) -> bool:
    data = tree.get("data")
    split = data.get("train_eval_split") if isinstance(data, dict) else None
    holds_none_out = not isinstance(split, list) or not split or is_off(split[-1])
    return isinstance(data, dict) and is_off(data.get("eval_sources")) and holds_none_out


def _has_one_length(section: dict[str, Any], tree: Any) -> bool:
    is_causal = "causal" in (section.get("type"), tree.get("type"), tree.get("name"))
    is_full = is_causal or section.get("pad_to") == "max_length"
    return is_full or not is_off(section.get("pack_samples"))


def _is_not_causal(section: Any, tree: dict[str, Any]) -> bool:
    trainer = str(tree.get("type") or tree.get("name") or "sft")
    return trainer != "causal" and registry.is_built_in("trainer", trainer)


IDLE = (
    ("wandb", "entity project name id mode", _without("enable"),
     "only `wandb.enable: true` would use it"),
    ("tensorboard", "dir", lambda section, _: section.get("enable") is False,
     "only `tensorboard.enable: true` would use it"),
    ("", "mem_profiler_dir", _without("mem_profiler"),
     "only `mem_profiler` would write there"),
    ("", "eval_at_end eval_after_step max_eval_batches eval_log_iter_interval",
     _evaluates_nothing, "there is no evaluation data"),
    ("", "eval_after_step", _without("eval_interval", "eval_every_n_epochs"),
     "no evaluation is periodic"),
    ("eval_samples", "top_p", _without("temperature"),
     "temperature 0 takes the likeliest token each time"),
    ("tokenizer", "tokenize_kwargs", _is_not_causal, "only causal honours it, as upstream"),
    ("data", "packing", _without("pack_samples"), "only `pack_samples: true` packs"),
    ("data", "div_length max_length_buckets", _has_one_length, "all rows have `max_length` tokens"),
    ("data", "filter_samples", lambda section, _: section.get("overlong") is not None,
     "`overlong` says what happens to long rows"),
    ("data", "completion_only ignore_empty_think",
     lambda section, _: section.get("mask_inputs") is False,
     "with `mask_inputs: false` every token is trained"),
    ("data.sources", "sample_seed", _without("sample_ratio", "sample_count"),
     "no sample is drawn"),
    ("optimizer", "nesterov",
     lambda section, _: section.get("type") == "sgd" and is_off(section.get("momentum")),
     "without `momentum` there is none to look ahead with"),
    ("scheduler", "warmup_ratio warmup_steps",
     lambda section, _: section.get("name") == "constant",
     "`constant` has no warm-up, as upstream"),
    ("checkpoint", "metric mode", _without("keep_best_n"), "only `keep_best_n` asks for it"),
    ("checkpoint", "save_after_step", _without("save_every_n_steps", "save_every_n_epochs"),
     "no save is periodic"),
    ("pipeline", "schedule stages_per_device",
     lambda _, tree: not isinstance(mesh := tree.get("mesh"), dict)
     or mesh.get("pipeline", 1) in (1, "1"),
     "only `mesh.pipeline` > 1 has stages"),
)  # fmt: skip
"""Section, keys of it, when they change nothing beside what else the section and the recipe say,
and why."""


class Line(NamedTuple):
    """What became of one written key."""

    key: str
    standing: Standing
    reason: str = ""


STANDINGS = (
    {key: Line(key, "mapped", how) for key, how in MAPPED.items()}
    | {key: Line(key, "own") for key in OWN}
    | {key: Line(key, "no effect", "it is off, as without it") for key in OFF}
    | {key: Line(key, "no effect", why) for key, why in NO_EFFECT.items()}
)


class Report(NamedTuple):
    """What became of every key of the shared format that a recipe writes."""

    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def of(self, standing: Standing) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.standing == standing)

    def changes(self) -> list[str]:
        """Everything but the keys that do here what they do upstream; one line a reason."""
        keys: dict[tuple[str, str], list[str]] = {}
        for line in (*self.of("mapped"), *self.of("no effect")):
            keys.setdefault((line.standing, line.reason), []).append(line.key)
        changed = [f"{word:10} {braced(found)}: {why}" for (word, why), found in keys.items()]
        return [*changed, *(f"{'note':10} {note}" for note in self.notes)]


def braced(keys: Iterable[str]) -> str:
    """`a, b.c, d.{e, f}`: keys of one section together, in the order of their first."""
    sections: dict[str, list[str]] = {}
    for key in keys:
        section, _, name = key.rpartition(".")
        sections.setdefault(section, []).append(name)
    joined = {section: ", ".join(names) for section, names in sections.items()}
    return ", ".join(
        names if not section else f"{section}.{names if ',' not in names else f'{{{names}}}'}"
        for section, names in joined.items()
    )


def standing(key: str, value: Any = None) -> Line:
    """The standing of a dotted key, with positions of lists left out."""
    if key in CHOICES and not isinstance(value, dict | list):
        whys = (why for choice, why in CHOICES[key].items() if str(choice) == str(value))
        return Line(key, "mapped", next(whys, ""))
    section = key.rpartition(".")[0]
    if key in STANDINGS or not section or section in SHARED_SECTIONS:
        return STANDINGS.get(key, Line(key, "same"))
    return standing(section)._replace(key=key)


def report(tree: dict[str, Any], faults: Iterable[Fault], notes: Iterable[str] = ()) -> Report:
    """What became of each written key; `faults` are what was refused."""
    wrong = {fault.key: fault.what for fault in faults}
    lines = []
    for key, value, section in written_keys(tree):
        plain = _plain(NAMED_SOURCE.sub("data.sources", key)).replace("eval_sources.", "sources.")
        above, _, name = key.rpartition(".")
        if above and name != "type" and f"{above}.type" in wrong:
            continue  # which keys there are hangs on the type
        found = _by_value(plain, value, section, tree) or standing(plain, value)
        parts, full = key.split("."), f"{above}.{SPELLINGS.get(name, name)}".lstrip(".")
        around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        if refused := next((k for k in (*around, full) if k in wrong), None):
            lines.append(Line(key if refused == full else refused, "refused", wrong[refused]))
        elif found.standing != "own":
            lines.append(found._replace(key=key))
    return Report(tuple(dict.fromkeys(lines)), tuple(dict.fromkeys(notes)))


def written_keys(
    value: Any, key: str = "", section: Any = None
) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(dotted key, value, map around it) of everything written, down to the maps whose keys are the
    person's."""
    if isinstance(value, dict) and (not key or _is_section(key)):
        for name, inner in value.items():
            yield from written_keys(inner, f"{key}.{name}".lstrip("."), value)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from written_keys(item, f"{key}.{i}", section)
    else:
        yield key, value, section or {}


@cache
def _is_section(key: str) -> bool:
    plain, (first, *_) = _plain(key), key.split(".")
    is_source = plain in ("data.sources", "data.eval_sources") or NAMED_SOURCE.fullmatch(key)
    is_whole = first in ("deepspeed", "eval_samples", "pipeline", "tensorboard")
    return bool(is_source) or is_whole or plain in SHARED_SECTIONS


def _plain(key: str) -> str:
    """A dotted key with positions of lists left out."""
    return ".".join(part for part in key.split(".") if not part.isdigit())


def _by_value(key: str, value: Any, section: dict[str, Any], tree: dict[str, Any]) -> Line | None:
    """Standings that hang on what is written, not only on where."""
    above, _, name = key.rpartition(".")
    if name == "type" and above:
        kind = "data_source" if "sources" in above else above
        target = registry.ALIASES.get((kind, str(value)))
        note = ALIAS_NOTES.get(str(value).removesuffix("_moe"), f"`{target}`")
        return Line(key, "mapped", note) if target else None
    if key.startswith("deepspeed.") and value == "auto":
        return Line(key, "no effect", "`auto` counts as not written")
    if above == "logger" and name.endswith("_ranks") and isinstance(value, list):
        if any(rank not in (0, "0") for rank in value):
            why = f"{show(value)}: a rank is a process here, most runs have one"
            return Line(key, "no effect", why)
    if above == "checkpoint" and section.get("enabled") is False and name != "enabled":
        starts = not is_off(section.get("auto_resume")) or section.get("resume_from") is not None
        if not (starts and name in READ_AT_THE_START):
            return Line(key, "no effect", "`enabled: false` turns the entry off")
    for where, names, is_idle, why in IDLE:
        if where == above and name in names.split() and is_idle(section, tree):
            return Line(key, "no effect", why)
    return None
