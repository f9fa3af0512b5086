"""What each key of the shared format becomes here: tables, and the report made from them."""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

from jaxtrain import registry
from jaxtrain.recipe import deepspeed
from jaxtrain.recipe.errors import Fault, shown

Standing = Literal["same", "mapped", "no effect", "refused", "own"]

MAPPED = {
    "name": "type",
    "micro_batch_size": "rows of a batch shard (data x fsdp x expert), not of a device",
    "sequence_parallel_size": "mesh.context",
    "expert_parallel_size": "mesh.expert",
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
    "deepspeed.gradient_clipping": "max_grad_norm",
    "deepspeed.train_batch_size": "compared with micro_batch_size x accumulation x batch shards",
    "deepspeed.train_micro_batch_size_per_gpu": "compared with micro_batch_size",
    "deepspeed.gradient_accumulation_steps": "compared with gradient_accumulation_steps",
    "deepspeed.sequence_parallel_size": "compared with mesh.context",
    "deepspeed.bf16": "compared with model.dtype",
    "deepspeed.bfloat16": "compared with model.dtype",
    "deepspeed.fp16": "compared with model.dtype; the rest is of the loss scaler",
    "deepspeed.data_types": "dtype of the summed gradient",
    "deepspeed.tensor_parallel": "mesh.tensor",
    "deepspeed.activation_checkpointing.cpu_checkpointing": "activation_checkpoint_cpu_offload",
    "deepspeed.tensorboard": "tensorboard.enable",
}
"""Key → the mechanism that honours it; holds for the keys below it too."""

STAGES = {
    0: "parameters, gradients and optimizer state are copied to every device of `mesh.data`",
    1: "optimizer state and master weights are sharded over `mesh.data`, gathered once a step",
    2: "as 1, and gradients are reduce-scattered over `mesh.data`",
    3: "as 2, and parameters stay sharded over `mesh.data`, gathered per layer",
}
CHOICES = {
    "model.attn_implementation": {
        "sdpa": "the fastest kernel that hardware and shapes allow",
        "eager": "the plain XLA reference",
        "flash_attention_2": "the flash kernel, or the reference where it cannot run",
        "flash_attention_3": "the flash kernel, or the reference where it cannot run",
    },
    "deepspeed.zero_optimization.stage": STAGES,
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
SHARED_SECTIONS = (
    "model", "model.peft_config", "tokenizer", "data", "optimizer", "scheduler", "checkpoint",
    "logger", "wandb",
)  # fmt: skip
SPELLINGS = {"lr": "learning_rate"}


class Line(NamedTuple):
    """What became of one written key."""

    key: str
    standing: Standing
    reason: str = ""


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
        return Line(key, "mapped", CHOICES[key].get(value, ""))
    if key in NO_EFFECT:
        return Line(key, "no effect", NO_EFFECT[key])
    if key in OWN:
        return Line(key, "own")
    section = key.rpartition(".")[0]
    if key not in MAPPED and section and section not in SHARED_SECTIONS:
        above = standing(section)
        if above.standing != "same":
            return above._replace(key=key)
    return Line(key, "mapped", MAPPED[key]) if key in MAPPED else Line(key, "same")


def report(tree: dict[str, Any], faults: Iterable[Fault], notes: Iterable[str] = ()) -> Report:
    """What became of each written key; `faults` are what was refused."""
    wrong = {fault.key: fault.what for fault in faults}
    lines = []
    for key, value in written_keys(tree):
        plain = ".".join(part for part in key.split(".") if not part.isdigit())
        plain = plain.replace("eval_sources.", "sources.")
        found = _by_value(plain, value, tree) or standing(plain, value)
        parts = key.split(".")
        around = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        if refused := next((k for k in (*around, _respelled(key)) if k in wrong), None):
            lines.append(
                Line(key if refused == _respelled(key) else refused, "refused", wrong[refused])
            )
        elif found.standing != "own":
            lines.append(found._replace(key=key))
    return Report(tuple(dict.fromkeys(lines)), tuple(dict.fromkeys(notes)))


def written_keys(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything written, down to the maps whose keys are the person's."""
    if isinstance(value, dict) and (not key or _is_section(key)):
        for name, inner in value.items():
            yield from written_keys(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from written_keys(item, f"{key}.{i}")
    else:
        yield key, value


@cache
def _is_section(key: str) -> bool:
    plain = [part for part in key.split(".") if not part.isdigit()]
    is_source = plain[:1] == ["data"] and plain[1:] in (["sources"], ["eval_sources"])
    return ".".join(plain) in SHARED_SECTIONS or plain[0] == "deepspeed" or is_source


def _by_value(key: str, value: Any, tree: dict[str, Any]) -> Line | None:
    """Standings that hang on what is written, not only on where."""
    section, _, name = key.rpartition(".")
    if name == "type" and section:
        kind = "data_source" if "sources" in section else section
        target = registry.ALIASES.get((kind, str(value)))
        note = ALIAS_NOTES.get(str(value).removesuffix("_moe"), f"`{target}`")
        return Line(key, "mapped", note) if target else None
    trainer = str(tree.get("type") or "sft")
    if key == "tokenizer.tokenize_kwargs" and registry.is_built_in("trainer", trainer):
        if trainer != "causal":
            return Line(key, "no effect", f"only causal honours it, as upstream; this is {trainer}")
    if section == "scheduler" and name.startswith("warmup"):
        scheduler = tree["scheduler"]
        if scheduler.get("name") == "constant":
            return Line(key, "no effect", "`constant` has no warm-up, as upstream")
    wandb = tree.get("wandb")
    if section == "wandb" and isinstance(wandb, dict) and not wandb.get("enable"):
        if name == "enable":
            return None
        return Line(key, "no effect", "only `wandb.enable: true` would use it")
    if key == "mem_profiler_dir" and not tree.get("mem_profiler"):
        return Line(key, "no effect", "only `mem_profiler` would write there")
    if section == "logger" and name.endswith("_ranks") and isinstance(value, list):
        if any(rank not in (0, "0") for rank in value):
            return Line(
                key, "no effect", f"{shown(value)}: a rank is a process here, most runs have one"
            )
    return None


def _respelled(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"{section}.{SPELLINGS.get(name, name)}".lstrip(".")
