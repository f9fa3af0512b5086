"""The keys of a recipe as JSON Schema and as pages, made from the config classes."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from jaxtrain import registry
from jaxtrain.recipe.compose import compose
from jaxtrain.recipe.errors import show
from jaxtrain.recipe.resolve import SOURCES, load_code
from jaxtrain.recipe.section import (
    NotSupported,
    Support,
    find_marker,
    refusal_reason,
    sections_in,
    spellings,
)

HEADER = "# yaml-language-server: $schema=jaxtrain.schema.json"
"""First line of a recipe, from which an editor completes keys."""
LEVELS = {
    "trainer": "",
    **{kind: kind for kind in registry.SECTIONS},
    "data_source": "data.sources",
}
"""Kind → the key of its sections."""


class _HumanNumbers(GenerateJsonSchema):
    """Accepts text for every number: 1K, 10%, 2^10."""

    def int_schema(self, schema: Any) -> dict[str, Any]:
        return super().int_schema(schema) | {"type": ["integer", "number", "string"]}

    def float_schema(self, schema: Any) -> dict[str, Any]:
        return super().float_schema(schema) | {"type": ["number", "string"]}


def json_schema(recipe: Path | None = None) -> dict[str, Any]:
    """JSON Schema of recipes, with the classes that the `code:` of one registers."""
    if recipe is not None:
        load_code(compose(recipe))
    definitions: dict[str, Any] = {}
    trainers = registry.supported("trainer")
    for kind in LEVELS:
        for name in registry.supported(kind):
            definitions[f"{kind}.{name}"] = _build_section(kind, name, definitions)
    for name in trainers:
        _add_sections(definitions[f"trainer.{name}"], name)
    for name in registry.supported("data"):
        _add_sources(definitions[f"data.{name}"])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "jaxtrain recipe",
        **_one_of("trainer", trainers),
        "$defs": definitions,
    }


def reference() -> str:
    """The page of every key, from the docstrings of the config classes."""
    parts = [INTRODUCTION]
    for kind, level in LEVELS.items():
        printed: dict[str, dict[str, Row]] = {}
        by_class: dict[type[BaseModel], list[str]] = {}
        for name in filter(partial(registry.is_built_in, kind), registry.supported(kind)):
            by_class.setdefault(registry.config_class(kind, name), []).append(name)
        for cls, names in by_class.items():
            parts += _format_section(cls, level, names, printed)
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Recipe reference

Every key of a recipe, by section. Made by `jaxtrain schema --markdown` from the config classes.
`jaxtrain check RECIPE` says what is wrong with a recipe and what its keys become;
`jaxtrain schema` prints the same keys as JSON Schema, for editors.

Numbers may be written as `1_000`, `1.25K`, `1Ki`, `10%`, `2^10` or `1e-5`. Input paths are looked
up beside the file that they are written in, which may be a base, then beside the recipe, then in
the current directory; output paths belong to the current directory. `${env:NAME}`,
`${env:NAME:default}` and `${dir}` (the recipe's folder) may be used in any value.

A key of ArcticTraining or DeepSpeed does here what it does there, unless its meaning says
`Mapped`, with what honours it instead, or `No effect`, with the reason."""

EXAMPLES = {
    "": """
type: sft
epochs: 3
micro_batch_size: 4
eval_interval: 100
model: {name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {sources: [HuggingFaceH4/ultrachat_200k], train_eval_split: [99%, 1%]}
checkpoint: {type: huggingface, output_dir: exported, save_end_of_training: true}""",
    "logger": "logger: {level: INFO, print_output_ranks: [0]}",
    "wandb": "wandb: {enable: false, project: chat, mode: offline}",
    "tensorboard": "tensorboard: {enable: false, dir: events}",
    "deepspeed": "deepspeed: {zero_optimization: {stage: 3}, gradient_clipping: 0.5}",
    "mesh": "mesh: {fsdp: 4, tensor: 2}",
    "pipeline": "mesh: {pipeline: 2}\npipeline: {microbatches: 4}\nmicro_batch_size: 4",
    "ema": "ema: {decay: 0.999, start_step: 100}",
    "divergence": "divergence: {threshold: 1.5, action: stop}",
    "early_stopping": """
early_stopping: {metric: eval/loss, patience: 3}
eval_interval: 100
data: {sources: [HuggingFaceH4/ultrachat_200k], train_eval_split: [99%, 1%]}""",
    "eval_samples": "eval_samples: {prompts: [Name a colour.], temperature: 0.7, top_p: 0.9}",
    "profile": "profile: {start_step: 10, num_steps: 3}",
    "model": "model: {name_or_path: meta-llama/Llama-3.1-8B-Instruct, dtype: bf16, remat: dots}",
    "tokenizer": "tokenizer: {extra_tokens: [<tool>], pad_token: <pad>}",
    "data": "data: {sources: [chats.jsonl], max_length: 8Ki, pack_samples: true}",
    "optimizer": "optimizer: {type: adamw, lr: 2e-5, groups: [{match: embedding, freeze: true}]}",
    "scheduler": "scheduler: {name: cosine, warmup_ratio: 5%, min_lr_ratio: 10%}",
    "checkpoint": """
checkpoint:
  - {type: orbax, output_dir: state, save_every_n_steps: 500, keep_last_n: 2, auto_resume: true}
  - {type: huggingface, output_dir: exported, save_end_of_training: true}""",
    "data.sources": """
data:
  sources:
    - {name_or_path: HuggingFaceH4/ultrachat_200k, split: train_sft, sample_count: 10K}
    - {type: jsonl, path: chats/*.jsonl, role_mapping: {user: question, assistant: answer}}""",
}
"""Section → a part of a recipe that uses it."""


def _build_section(kind: str, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    cls = registry.config_class(kind, name)
    schema = cls.model_json_schema(
        by_alias=False, ref_template="#/$defs/{model}", schema_generator=_HumanNumbers
    )
    definitions |= schema.pop("$defs", {})
    aliases = [a for (k, a), target in registry.ALIASES.items() if (k, target) == (kind, name)]
    schema["properties"]["type"] = {"enum": [name, *aliases]}
    for field in cls.model_fields.values():
        for other in spellings(field):
            schema["properties"].setdefault(other, {"description": field.description or ""})
    return schema


def _add_sections(schema: dict[str, Any], trainer: str) -> None:
    """Lets each section of a trainer be what its factories read."""
    for section in registry.SECTIONS:
        names = [n for n in registry.allowed(trainer, section) if n in registry.supported(section)]
        choice = _one_of(section, names)
        if section == "checkpoint":
            choice = {"anyOf": [*choice["anyOf"], {"type": "array", "items": choice}]}
        schema["properties"][section] = choice
    schema["required"] = ["model", "data", *(["type"] if trainer != "sft" else [])]


def _add_sources(schema: dict[str, Any]) -> None:
    text = {"type": "string"}
    many = {
        "type": "array",
        "items": _one_of("data_source", registry.supported("data_source"), text),
    }
    named = {"type": "object", "additionalProperties": many}
    for key in SOURCES:
        schema["properties"][key] = {"anyOf": [text, many, named]}


def _one_of(kind: str, names: Iterable[str], *others: Any) -> dict[str, list[Any]]:
    return {"anyOf": [*others, *({"$ref": f"#/$defs/{kind}.{name}"} for name in names)]}


Row = tuple[str, ...]
COLUMNS = ("key", "type", "default", "meaning")


def _format_table(rows: Iterable[Row]) -> str:
    """A table of keys; those that agree in all but their names share a row."""
    names: dict[Row, list[str]] = {}
    for name, *rest in rows:
        names.setdefault(tuple(rest), []).append(name)
    cells = [COLUMNS, *((", ".join(keys), *rest) for rest, keys in names.items())]
    head, *lines = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, f"{'|---' * len(COLUMNS)}|", *lines])


def _format_section(
    cls: type[BaseModel], level: str, names: list[str], printed: dict[str, dict[str, Row]]
) -> list[str]:
    """The part about the types of one class; of classes after the first, what differs from the
    most similar one that is `printed`."""
    types, rows = ", ".join(f"`{name}`" for name in names), _build_rows(cls, level)
    title = f"`{level}`, type {types}" if level else f"Trainer {types}"
    parts = [f"## {title}", *_format_introduction(cls, "-" if printed else level)]
    if printed:
        same = {other: len({*rows.values()} & {*printed[other].values()}) for other in printed}
        nearest = max(same, key=lambda other: same[other])
        missing = ", ".join(f"`{key}`" for key in printed[nearest] if key not in rows)
        without = f", without {missing}" if missing else ""
        different = [row for key, row in rows.items() if row != printed[nearest].get(key)]
        parts += [f"The keys of `{nearest}`{without}{', and:' if different else '.'}"]
        parts += [_format_table(different)] if different else []
    else:
        parts += ["\n".join(map(_format_data_type, names))] if not level else []
        parts += [_format_table(rows.values()), *_format_inner_sections(cls, level)]
    printed[names[0]] = rows
    return parts


def _format_inner_sections(cls: type[BaseModel], level: str) -> Iterator[str]:
    """The parts about the sections inside a section, those of one class together."""
    by_class: dict[type[BaseModel], list[str]] = {}
    for key, field in cls.model_fields.items():
        for inner in sections_in(field.annotation) if key not in registry.SECTIONS else ():
            by_class.setdefault(inner, []).append(f"{level}.{key}".lstrip("."))
    for inner, keys in by_class.items():
        title = ", ".join(f"`{key}`" for key in keys)
        yield f"### {title}" if level in LEVELS.values() else f"**{title}**"
        yield from _format_introduction(inner, keys[0])
        yield _format_table(_build_rows(inner, keys[0]).values())
        yield from _format_inner_sections(inner, keys[0])


def _format_data_type(trainer: str) -> str:
    data, *_ = registry.allowed(trainer, "data")
    text = " ".join((registry.config_class("data", data).__doc__ or "").split())
    return f"- `{trainer}` takes `data` of type `{data}`: {text[:1].lower()}{text[1:]}"


def _format_introduction(cls: type[BaseModel], level: str) -> list[str]:
    text = " ".join((cls.__dict__.get("__doc__") or "").split())
    example = EXAMPLES.get(level, "").strip()
    return [*([text] if text else []), *([f"```yaml\n{example}\n```"] if example else [])]


def _build_rows(cls: type[BaseModel], level: str) -> dict[str, Row]:
    rows = {}
    for name, field in cls.model_fields.items():
        if not field.exclude:
            names = ", ".join(f"`{n}`" for n in dict.fromkeys((name, *spellings(field))))
            is_filled = not level and name in registry.SECTIONS and name not in ("model", "data")
            default = "" if is_filled else _format_default(field)
            meaning = _format_meaning(cls, name, field)
            if name == "type" and (planned := _list_planned(level)):
                meaning = f"{meaning} Not supported yet: {', '.join(planned)}."
            cells = (names, _format_type(field.annotation), default, meaning)
            rows[name] = tuple(cell.replace("|", "\\|") for cell in cells)
    return rows


def _list_planned(level: str) -> list[str]:
    """The types of a section that are not supported yet."""
    kinds = [kind for kind, key in LEVELS.items() if key == level]
    return [n for kind in kinds for n in registry.BUILT_IN[kind] if registry.is_planned(kind, n)]


def _format_meaning(cls: type[BaseModel], name: str, field: FieldInfo) -> str:
    """What a key means, and what it becomes."""
    text, support = " ".join((field.description or "").split()), find_marker(cls, name, Support)
    if why := refusal_reason(field):
        return f"Must be off: {why}."
    if support and support.word == "no effect":
        text = f"No effect: {support.how}."
    elif support and support.word == "mapped":
        choices = "; ".join(f"`{value}`: {what}" for value, what in support.by_value.items())
        text = f"{text} Mapped: {choices or support.how}.".lstrip()
    if marker := find_marker(cls, name, NotSupported):
        allowed = ", ".join(f"`{v if isinstance(v, str) else show(v)}`" for v in marker.allowed)
        limit = (
            f"Supported so far: {allowed}" if allowed else f"Not supported yet: {marker.instead}"
        )
        text = f"{text} {limit}.".lstrip()
    return text


WORDS = {Any: "any", type(None): "null", str: "text", bool: "true, false"}


def _format_type(annotation: Any) -> str:
    """A type in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _format_type(args[0])
    if origin is Literal:
        return ", ".join(f"`{show(a) if isinstance(a, bool) else a}`" for a in args)
    if origin in (tuple, list):
        return f"list of {_format_type(args[0])}"
    if origin is dict or sections_in(annotation) == [annotation]:
        return "map"
    inner = [_format_type(a) for a in args if a is not type(None)]
    return " or ".join(dict.fromkeys(inner)) or WORDS.get(annotation) or annotation.__name__


def _format_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{show(list(value) if isinstance(value, tuple) else value)}`"
