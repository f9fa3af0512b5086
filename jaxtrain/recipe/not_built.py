"""What a recipe may say and this version cannot do: one table, that shrinks as it can."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from jaxtrain import registry
from jaxtrain.recipe.errors import Fault, show


class NotBuilt(NamedTuple):
    key: str
    """dotted; `*` is every position of a list"""
    is_asked: Callable[[Any], bool]
    """Would this value have to do something that it does not?"""
    instead: str


is_set = bool


def other_than(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value not in values


def planned(kind: str) -> Callable[[Any], bool]:
    return lambda name: registry.is_planned(kind, str(name))


TABLE = (
    NotBuilt("type", planned("trainer"), "use sft"),
    NotBuilt("model.dtype", lambda dtype: dtype == "float16", "use bf16 or fp32"),
    NotBuilt("model.peft_config", is_set, "remove it to train all weights"),
    *(
        NotBuilt(f"data.{place}.{key}", is_asked, instead)
        for key, is_asked, instead in (
            ("type", planned("data_source"), "it is for distill; use huggingface"),
            ("dataset_uri", is_set, "use table_name or sql"),
        )
        for place in ("sources.*", "eval_sources.*", "eval_sources.*.*")
    ),
    NotBuilt(
        "data.streaming", is_set, "remove it: rows are looked up in files, not held in memory"
    ),
    NotBuilt("data.batch_tokens", is_set, "use pack_samples: true with micro_batch_size"),
    NotBuilt("optimizer.type", planned("optimizer"), "use adamw"),
    NotBuilt(
        "mesh.context", other_than(1), "write 1, and lower data.max_length if memory is short"
    ),
    NotBuilt("mesh.expert", other_than(1), "write 1"),
    NotBuilt("pipeline.schedule", other_than("gpipe"), "use gpipe: the loss is the same"),
    NotBuilt("pipeline.split", other_than("auto"), "remove it: layers are split evenly"),
    NotBuilt("replica_check_interval", is_set, "remove it"),
    NotBuilt("activation_checkpoint_cpu_offload", is_set, "use model.remat: full"),
    NotBuilt("enable_routing_replay", is_set, "remove it: dense models route nothing"),
    NotBuilt("arctic_moe", lambda value: value is True, "remove it: there are no experts"),
    NotBuilt("checkpoint.*.adapter", other_than("adapter"), "remove it"),
    *(
        NotBuilt(
            f"deepspeed.zero_optimization.{key}.device",
            other_than("none"),
            "use zero_optimization.stage: 3 on more devices",
        )
        for key in ("offload_optimizer", "offload_param")
    ),
    *(
        NotBuilt(f"deepspeed.zero_optimization.{key}", is_set, "use zero_optimization.stage: 3")
        for key in ("cpu_offload", "cpu_offload_param")
    ),
    NotBuilt("deepspeed.data_types.grad_accum_dtype", other_than("fp32"), "use fp32"),
)


def not_built(config: Any, origins: Mapping[str, str]) -> Iterator[Fault]:
    """A fault for each row that `config` asks for, under the key that the person wrote."""
    for row in TABLE:
        for key, value in values_at(config, row.key.split(".")):
            if row.is_asked(value):
                what = f"is not built yet, {row.instead} (found {_brief(value)})"
                yield Fault(origins.get(key, key), what)


def values_at(value: Any, path: list[str], key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) that a path with `*` leads to; none where a section is left out."""
    if not path:
        yield key, value
    elif value is not None:
        name, *rest = path
        if name == "*":
            entries = value if isinstance(value, list | tuple) else ()
            items = value.items() if isinstance(value, dict) else enumerate(entries)
            found = [(str(i), item) for i, item in items]
        else:
            section = dict(value) if isinstance(value, dict | BaseModel) else {}
            found = [(name, section[name])] if name in section else []
        for part, inner in found:
            yield from values_at(inner, rest, f"{key}.{part}" if key else part)


def _brief(value: Any) -> str:
    written = getattr(value, "model_fields_set", None)
    if written is None:
        return show(value)
    return show({k: getattr(value, k) for k in type(value).model_fields if k in written})
