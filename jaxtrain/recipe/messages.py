"""The faults that pydantic finds in a section: a message for each, under its key."""

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError

from jaxtrain.recipe.errors import did_you_mean, show
from jaxtrain.recipe.load import Key
from jaxtrain.recipe.section import sections_in, spellings

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
MAX_KEYS = 10  # that a message lists


def explain(
    error: ValidationError, cls: type[BaseModel], hint: Callable[[str], str] = lambda key: ""
) -> list[tuple[Key, str]]:
    """(key, message) of each fault in a section of that class; one per key. `hint` ends the message
    on an unknown key of the section."""
    found: dict[Key, str] = {}
    for detail in error.errors():
        loc = tuple(part for part in detail["loc"] if not _is_branch(part))
        if key := detail.get("ctx", {}).get("key"):  # of a contradiction
            loc = (*loc, *key.split("."))
        what = _message(detail, cls, hint)
        found[loc] = _either(found[loc], what) if loc in found else what
    return [*found.items()]


def _either(one: str, other: str) -> str:
    """One message for a value that is neither of two things: `must be a list or text, …`."""
    (wanted, comma, found), (also, _, _) = one.partition(", found"), other.partition(", found")
    return f"{wanted} or {also.removeprefix('must be ')}{comma}{found}" if comma else one


def _is_branch(part: str | int) -> bool:
    """Whether a part of a fault's path is the name of a union's branch, which is no key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _message(detail: Any, cls: type[BaseModel], hint: Callable[[str], str]) -> str:
    found, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        section, name = find_section(cls, detail["loc"][:-1]), str(detail["loc"][-1])
        if full := section and find_full_name(section, name):
            return f"is another name of `{full}`, which is written too; remove one"
        known = list_keys(cls, detail["loc"][:-1])
        help = hint(name) if len(detail["loc"]) == 1 else ""
        help = help if help.startswith("; write") else did_you_mean(name, known) or help
        if not help and known and len(known) <= MAX_KEYS and "type" not in known:
            help = f"; known: {', '.join(known)}"
        return f"unknown key (found {show(found)}){help}"
    if kind == "missing":
        return "is required"
    if kind == "contradiction":
        return context["message"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        expected = context["expected"].replace("True", "true").replace("False", "false")
        words = re.findall(r"'([^']*)'", expected)
        one_of = "one of " * (len(words) > 1)
        return f"must be {one_of}{expected}, found {show(found)}{did_you_mean(str(found), words)}"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return f"must be {_range(cls, detail)}, found {show(found)}"
    wanted = {
        "int_type": "a whole number", "int_parsing": "a whole number", "float_type": "a number",
        "float_parsing": "a number", "string_type": "text", "bool_type": "true or false",
        "bool_parsing": "true or false", "dict_type": "a map of keys",
        "model_type": "a map of keys", "tuple_type": "a list", "list_type": "a list",
        "string_too_short": "text that is not empty",
    }  # fmt: skip
    if kind in wanted:
        return f"must be {wanted[kind]}, found {show(found)}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, found {show(found)}"


def _range(cls: type[BaseModel], detail: Any) -> str:
    """The legal range of a key: `>= 1` with one bound, `in (0, 1]` with two."""
    section, name = find_section(cls, detail["loc"][:-1]), str(detail["loc"][-1])
    field = section.model_fields.get(name) if section else None
    limits = field.metadata if field else ()
    bounds = {k: getattr(limit, k) for limit in limits for k in SIGNS if hasattr(limit, k)}
    if len(bounds) == 2:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        left, right = "[" if "ge" in bounds else "(", "]" if "le" in bounds else ")"
        return f"in {left}{low:g}, {high:g}{right}"
    return next(f"{SIGNS[k]} {limit:g}" for k, limit in detail["ctx"].items() if k in SIGNS)


def find_section(cls: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The class of the section at `loc` below `cls`."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        models = sections_in(field.annotation) if field else []
        if not models and not isinstance(part, int) and not _is_branch(part):
            return None
        cls = models[0] if models else cls
    return cls


def find_full_name(section: type[BaseModel], name: str) -> str | None:
    """The key that `name` is a shorter spelling of."""
    fields = section.model_fields.items()
    return next((full for full, field in fields if name in spellings(field)), None)


def list_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `loc` below `cls`, in all their spellings."""
    section = find_section(cls, loc)
    fields = section.model_fields if section else {}
    return [*dict.fromkeys([*fields, *(n for f in fields.values() for n in spellings(f))])]
