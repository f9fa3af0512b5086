"""The keys of a recipe as JSON Schema, and as a page to read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from jaxtrain import registry
from jaxtrain.recipe.compose import compose
from jaxtrain.recipe.deepspeed import DeepSpeedConfig
from jaxtrain.recipe.errors import show
from jaxtrain.recipe.not_built import TABLE
from jaxtrain.recipe.resolve import SOURCES, load_code
from jaxtrain.recipe.section import TypedSection, sections_in, spellings, why_refused
from jaxtrain.recipe.standing import CHOICES, standing

HEADER = "# yaml-language-server: $schema=jaxtrain.schema.json"
"""First line of a recipe, from which an editor completes keys."""
LEVELS = {
    "trainer": "",
    **{kind: kind for kind in registry.SECTIONS},
    "data_source": "data.sources",
}
"""Kind → the key of the sections that it reads."""


class _HumanNumbers(GenerateJsonSchema):
    """Every number may be written as text: 1K, 10%, 2^10."""

    def int_schema(self, schema: Any) -> dict[str, Any]:
        return super().int_schema(schema) | {"type": ["integer", "number", "string"]}

    def float_schema(self, schema: Any) -> dict[str, Any]:
        return super().float_schema(schema) | {"type": ["number", "string"]}


def json_schema(recipe: Path | None = None) -> dict[str, Any]:
    """JSON Schema of recipes, with what the `code:` of one registers."""
    if recipe is not None:
        load_code(compose(recipe))
    definitions: dict[str, Any] = {}
    trainers = _built("trainer")
    for kind in LEVELS:
        for name in _built(kind):
            definitions[f"{kind}.{name}"] = _section_schema(kind, name, definitions)
    for name in trainers:
        _with_sections(definitions[f"trainer.{name}"], name)
    for name in _built("data"):
        _with_sources(definitions[f"data.{name}"])
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "jaxtrain recipe",
        "anyOf": [_ref("trainer", name) for name in trainers],
        "$defs": definitions,
    }


def reference() -> str:
    """The page of every key, from the docstrings of the config classes."""
    parts = [INTRODUCTION]
    for kind, level in LEVELS.items():
        for name in _built(kind):
            if registry.is_built_in(kind, name):
                parts += _section_page(kind, level, name)
    rows = [(f"`{row.key}`", row.instead) for row in TABLE]
    parts += ["## Not built yet", NOT_BUILT, _table(("key", "instead"), rows)]
    return "\n\n".join(parts) + "\n"


def shared_keys() -> str:
    """What becomes of every key of ArcticTraining, by section; keys of one fate together."""
    not_built = {row.key.replace(".*", ""): row.instead for row in TABLE}
    fates: dict[str, dict[tuple[str, str], list[str]]] = {}
    for section, name, field in _every_field():
        found = standing(f"{section}.{name}".lstrip("."))
        if found.standing == "own" or field.exclude:
            continue
        choices = (f"`{value}`: {what}" for value, what in CHOICES.get(found.key, {}).items())
        word, how = found.standing, found.reason or "; ".join(choices)
        if why := why_refused(field):
            word, how = "refused", why
        if instead := not_built.get(found.key):
            how = f"{how}; refused where not built: {instead}".removeprefix("; ")
        fates.setdefault(section, {}).setdefault((word, how), []).append(f"`{name}`")
    parts = []
    for section, by_fate in fates.items():
        rows = [(", ".join(dict.fromkeys(keys)), *fate) for fate, keys in by_fate.items()]
        title = f"`{section}`" if section else "Top level"
        parts += [f"### {title}", _table(("keys", "here", "how"), rows)]
    return "\n\n".join(parts) + "\n"


def _every_field() -> Iterator[tuple[str, str, FieldInfo]]:
    """(section, key, field) of every section that recipes of ArcticTraining have."""

    def inside(key: str, cls: type[BaseModel]) -> Iterator[tuple[str, str, FieldInfo]]:
        yield from ((key, name, field) for name, field in cls.model_fields.items())
        for name, field in cls.model_fields.items():
            dotted = f"{key}.{name}".lstrip(".")
            if name not in registry.SECTIONS and standing(dotted).standing != "own":
                for inner in sections_in(field.annotation):
                    if not issubclass(inner, TypedSection):
                        yield from inside(dotted, inner)

    for kind, level in LEVELS.items():
        for name in registry.BUILT_IN[kind] if kind != "trainer" else ("sft", "dpo"):
            yield from inside(level, registry.config_class(kind, name))


INTRODUCTION = """# Recipe reference

Every key of a recipe, by section. Made by `jaxtrain schema --markdown` from the config classes.
`jaxtrain check RECIPE` says what is wrong with a recipe and what its keys become;
`jaxtrain schema` prints the same keys as JSON Schema, for editors.

Numbers may be written as `1_000`, `1.25K`, `1Ki`, `10%`, `2^10` or `1e-5`. Input paths are looked
up beside the recipe, then in the current directory; output paths belong to the current directory.
`${env:NAME}`, `${env:NAME:default}` and `${dir}` (the recipe's folder) may stand in any value."""

NOT_BUILT = """These keys are known and checked. A recipe that asks for them is refused, with what
to do instead."""


def _built(kind: str) -> list[str]:
    return [name for name in registry.names(kind) if not registry.is_planned(kind, name)]


def _section_schema(kind: str, name: str, definitions: dict[str, Any]) -> dict[str, Any]:
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


def _with_sections(schema: dict[str, Any], trainer: str) -> None:
    """Each section of a trainer may be what its factories read."""
    for section in registry.SECTIONS:
        names = [n for n in registry.allowed(trainer, section) if n in _built(section)]
        choice = {"anyOf": [_ref(section, name) for name in names]}
        if section == "checkpoint":
            choice = {"anyOf": [*choice["anyOf"], {"type": "array", "items": choice}]}
        schema["properties"][section] = choice
    schema["required"] = ["model", "data", *(["type"] if trainer != "sft" else [])]


def _with_sources(schema: dict[str, Any]) -> None:
    one = {"anyOf": [{"type": "string"}, *(_ref("data_source", n) for n in _built("data_source"))]}
    many = {"type": "array", "items": one}
    for key in SOURCES:
        named = {"type": "object", "additionalProperties": many}
        schema["properties"][key] = {"anyOf": [{"type": "string"}, many, named]}


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{kind}.{name}"}


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return "\n".join([lines[0], f"{'|---' * len(columns)}|", *lines[1:]])


def _section_page(kind: str, level: str, name: str) -> list[str]:
    cls = registry.config_class(kind, name)
    title = f"`{level}`, type `{name}`" if level else f"Trainer `{name}`"
    said = (cls.__dict__.get("__doc__") or "").strip()
    parts = [f"## {title}", *([" ".join(said.split())] if said else []), _rows(cls, level)]
    for key, field in cls.model_fields.items():
        for inner in sections_in(field.annotation):
            if inner is not DeepSpeedConfig and key not in registry.SECTIONS:
                parts += [f"### `{level}.{key}`".replace("`.", "`"), _rows(inner, f"{level}.{key}")]
    return parts


def _rows(cls: type[BaseModel], level: str) -> str:
    rows = []
    for name, field in cls.model_fields.items():
        if field.exclude:
            continue
        found = standing(f"{level}.{name}".lstrip("."))
        said = " ".join((field.description or "").split())
        if found.standing == "no effect":
            said = f"No effect: {found.reason}."
        names = ", ".join(f"`{n}`" for n in dict.fromkeys((name, *spellings(field))))
        filled = not level and name in registry.SECTIONS and name not in ("model", "data")
        cells = (names, _type(field.annotation), "" if filled else _default(field), said)
        rows.append(tuple(cell.replace("|", "\\|") for cell in cells))
    return _table(("key", "type", "default", "meaning"), rows)


WORDS = {Any: "any", type(None): "null", str: "text", bool: "true, false"}


def _type(annotation: Any) -> str:
    """A type as a person reads it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return ", ".join(f"`{show(a) if isinstance(a, bool) else a}`" for a in args)
    if origin in (tuple, list):
        return f"list of {_type(args[0])}"
    if origin is dict or sections_in(annotation) == [annotation]:
        return "map"
    inner = [_type(a) for a in args if a is not type(None)]
    return " or ".join(dict.fromkeys(inner)) or WORDS.get(annotation) or annotation.__name__


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{show(list(value) if isinstance(value, tuple) else value)}`"
