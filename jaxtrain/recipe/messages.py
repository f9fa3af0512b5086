"""What pydantic finds wrong with a section, in words and under the key at fault."""

import re
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jaxtrain.recipe.errors import did_you_mean, shown
from jaxtrain.recipe.load import Key

KEY_FIRST = re.compile(r"([a-z_]\w*(?:\.\w+)*)(?:: | )(.*)", re.DOTALL)


def said(error: ValidationError, cls: type[BaseModel]) -> list[tuple[Key, str]]:
    """(key, what) of each fault in a section of that class."""
    found = []
    for detail in error.errors():
        loc = tuple(part for part in detail["loc"] if not _is_branch(part))
        what = _message(detail, cls)
        if detail["type"] == "value_error" and (match := KEY_FIRST.fullmatch(what)):
            # A validator of a section that begins with a key means that key.
            name, *rest = match[1].split(".")
            if name in known_keys(cls, loc):
                loc, what = (*loc, name, *rest), match[2]
        found.append((loc, what))
    return found


def _is_branch(part: str | int) -> bool:
    """pydantic puts the name of a union's branch into the path of a fault; it is no key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _message(detail: Any, cls: type[BaseModel]) -> str:
    found, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = known_keys(cls, detail["loc"][:-1])
        name = str(detail["loc"][-1])
        section = getattr(cls.model_fields.get("type"), "default", None) is not None
        where = " in this section" if section and not did_you_mean(name, known) else ""
        return f"unknown key{where} (found {shown(found)}){did_you_mean(name, known)}"
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return f"must be one of {context['expected']}, found {shown(found)}"
    bounds = {
        "greater_than": ">",
        "greater_than_equal": ">=",
        "less_than": "<",
        "less_than_equal": "<=",
    }
    if kind in bounds:
        limit = context.get("gt", context.get("ge", context.get("lt", context.get("le"))))
        return f"must be {bounds[kind]} {limit}, found {shown(found)}"
    wanted = {
        "int_type": "a whole number", "int_parsing": "a whole number", "float_type": "a number",
        "float_parsing": "a number", "string_type": "text", "bool_type": "true or false",
        "bool_parsing": "true or false", "dict_type": "a map of keys", "model_type": "a map of keys",
        "tuple_type": "a list", "list_type": "a list", "string_too_short": "text that is not empty",
    }  # fmt: skip
    if kind in wanted:
        return f"must be {wanted[kind]}, found {shown(found)}"
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, found {shown(found)}"


def known_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at `loc` below `cls`."""
    for part in loc:
        field = cls.model_fields.get(str(part))
        models = [m for m in _models(field.annotation) if field] if field else []
        if not models:
            return []
        cls = models[0]
    aliases = [
        str(choice)
        for field in cls.model_fields.values()
        for choice in getattr(field.validation_alias, "choices", ())
    ]
    return [*dict.fromkeys([*cls.model_fields, *aliases])]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list):
        return [m for a in get_args(annotation) for m in _models(a)]
    return []
