"""What every section of a recipe is: a frozen model that refuses unknown keys and reads human
numbers."""

import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from jaxtrain.recipe.errors import show

SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12} | {
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40
}  # fmt: skip
MAX_EXPONENT = 1024
PLAIN = r"[-+]?(?:\d[\d_]*)?(?:\.\d*)?"
HUMAN = re.compile(rf"({PLAIN})\s*(K|M|B|T|Ki|Mi|Gi|Ti|%)?")
POWER = re.compile(rf"({PLAIN})\^({PLAIN})")


def parse_number(text: str) -> int | float:
    """The value of `1_000`, `1.25K`, `1Ki`, `10%`, `2^10` or `1e-5`; ValueError for anything
    else."""
    text = text.strip()
    if match := POWER.fullmatch(text):
        exponent = _parse_plain(match[2])
        if abs(exponent) > MAX_EXPONENT:  # the power itself could take for ever
            raise ValueError(text)
        value = _parse_plain(match[1]) ** exponent
        if isinstance(value, complex):
            raise ValueError(text)
    elif match := HUMAN.fullmatch(text):
        value = _parse_plain(match[1])
        if match[2] == "%":
            value = value / 100
        elif match[2]:
            value = value * SUFFIXES[match[2]]
    else:
        value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _parse_plain(text: str) -> int | float:
    return float(text) if "." in text else int(text)


def _list_alternatives(annotation: Any) -> tuple[Any, ...]:
    """The plain types that an annotation admits: `int | None` gives (int, NoneType)."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _list_alternatives(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return tuple(t for a in get_args(annotation) for t in _list_alternatives(a))
    return (annotation,)


def read_numbers(value: Any, annotation: Any) -> Any:
    """`value` with human numbers read where `annotation` asks for numbers; booleans are never
    numbers."""
    kinds = _list_alternatives(annotation)
    if isinstance(value, list | tuple):
        items = [get_args(kind) for kind in kinds if get_origin(kind) in (tuple, list)]
        return [read_numbers(item, items[0][0]) for item in value] if items else value
    numeric = int in kinds or float in kinds
    if isinstance(value, bool):
        if numeric and bool not in kinds:
            raise ValueError(f"must be a number, found {str(value).lower()}")
        if str in kinds and bool not in kinds:
            raise ValueError("must be text; YAML reads yes, no, on and off as booleans: add quotes")
        return value
    if bool in kinds and set(kinds) <= {bool, type(None)} and value is not None:
        raise ValueError(f"must be true or false, found {value!r}")
    if numeric and isinstance(value, str) and str not in kinds:
        try:
            value = parse_number(value)
        except (ValueError, OverflowError):
            raise ValueError(f"must be a number, found {value!r}") from None
    if numeric and isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, found {value}")
        if float not in kinds and not value.is_integer():
            raise ValueError(f"must be a whole number, found {value}")
    return value


class Section(BaseModel):
    """A part of a recipe. Subclass it to add keys; they are checked like the built-in ones."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        if not cls.__module__.startswith("jaxtrain."):  # a mistake of the user has its line now
            cls.model_rebuild(raise_errors=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_human_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        if value is None and isinstance(field.default, Section):
            return field.default  # a section without keys is as one that is left out
        return read_numbers(value, field.annotation)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Yields (key, what is wrong) between keys that are valid alone. The methods of base
        classes run too, and first."""
        yield from ()

    def idle(self) -> Iterator[tuple[str, str]]:
        """Yields (key, why) of each key that has no effect beside the others. The methods of base
        classes run too, and first."""
        yield from ()

    def collect(self, method: Literal["contradictions", "idle"]) -> Iterator[tuple[str, str]]:
        for cls in reversed(type(self).__mro__):
            if method in vars(cls):
                yield from vars(cls)[method](self)

    @model_validator(mode="after")
    def _does_not_contradict_itself(self) -> Self:
        for key, message in self.collect("contradictions"):
            raise contradiction(key, message)
        return self


def contradiction(key: str, message: str) -> PydanticCustomError:
    """The error of a section's validator that is reported under one of its keys, or under the
    section's own when `key` is empty."""
    context = {"key": key, "message": message}
    return PydanticCustomError("contradiction", "{key}: {message}" if key else "{message}", context)


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Section]]:
    """(dotted key, section) of a typed section and of every section inside it."""
    if isinstance(value, Section):
        yield key, value
    if isinstance(value, list | tuple):
        value = enumerate(value)
    elif isinstance(value, dict):
        value = value.items()
    elif not isinstance(value, Section):
        return
    for name, inner in value:
        yield from walk(inner, f"{key}.{name}".lstrip("."))


class TypedSection(Section):
    """A section whose `type` names the class that reads it, and so decides its keys."""

    type: str = ""
    """Registered name; the trainer's first allowed one when left out."""


def expand_user(path: str | Path) -> Path:
    """`path` with a leading `~` replaced by the home folder, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def path_exists(path: str) -> bool:
    """Whether a file or folder exists; False for text that cannot be a path."""
    try:
        return expand_user(path).exists()
    except (OSError, ValueError):
        return False


def is_path(name: str) -> bool:
    """Whether a name can only be a path: it exists, or is written as one."""
    return name.startswith(("/", ".", "~")) or name.endswith(".gguf") or path_exists(name)


def resolve_input_path(value: Any, info: ValidationInfo) -> Any:
    """The absolute path of what exists in a folder where it is looked up; `value` as it is when
    nothing does."""
    if not isinstance(value, str) or not value or "://" in value:
        return value
    context = info.context or {}
    paths = [folder / expand_user(value) for folder in input_folders(info)]
    found = list(dict.fromkeys(path.resolve() for path in paths if path_exists(str(path))))
    if not found:
        return value
    if len(found) > 1 and "notes" in context:
        context["notes"].append(f"{info.field_name}: {found[0]} is used, not {found[1]}")
    return str(found[0])


def input_folders(info: ValidationInfo, field: str | None = None) -> list[Path]:
    """Where a path of a section is looked up: `Recipe.folders_of` its field."""
    find = (info.context or {}).get("folders_of")
    return find(info.field_name or field) if find else [Path.cwd()]


InputPath = Annotated[str, BeforeValidator(resolve_input_path)]
"""A file or folder that is read, looked up in `input_folders`."""


DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "bfloat": "bfloat16",
    "fp16": "float16", "float16": "float16", "half": "float16",
    "fp32": "float32", "float32": "float32", "float": "float32",
}  # fmt: skip


def _read_dtype(value: Any) -> Any:
    name = str(value).lower().removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"must be one of bf16, fp16, fp32, found {value!r}")
    return DTYPES[name]


def _accept_aliases(*dtypes: str) -> tuple[BeforeValidator, WithJsonSchema]:
    names = [name for name, dtype in DTYPES.items() if dtype in dtypes]
    schema = {"enum": [*names, *(f"torch.{name}" for name in names)]}
    return BeforeValidator(_read_dtype), WithJsonSchema(schema)


DType = Annotated[
    Literal["bfloat16", "float16", "float32"], *_accept_aliases("bfloat16", "float16", "float32")
]
WideDType = Annotated[Literal["bfloat16", "float32"], *_accept_aliases("bfloat16", "float32")]
"""For squares of gradients, which are 0 in float16, and for weights that are trained, which small
updates would leave as they are."""
HalfDType = Annotated[Literal["bfloat16", "float16"], *_accept_aliases("bfloat16", "float16")]


# What becomes of a key: markers on its field.


@dataclass(frozen=True)
class Support:
    """What a key of the shared format becomes; valid for the keys below it too."""

    word: Literal["same", "mapped", "no effect", "own"] = "same"
    how: str = ""
    by_value: Mapping[Any, str] = field(default_factory=dict, hash=False)
    """what single values become"""
    sets: str = ""
    """the key that takes its value"""
    equals: str = ""
    """the key whose value it must have"""


T = TypeVar("T")
Own = Annotated[T, Support("own")]
"""A key that only this package has."""


def mapped(how: str, by_value: Mapping[Any, str] | None = None) -> Support:
    return Support("mapped", how, by_value or {})


def no_effect(why: str) -> Support:
    return Support("no effect", why)


def sets(key: str) -> Support:
    return Support("mapped", key, sets=key)


def equals(key: str) -> Support:
    return Support("mapped", f"compared with {key}", equals=key)


@dataclass(frozen=True)
class NotSupported:
    """A value of the key that this version refuses: any but the `allowed`, or any that is on."""

    instead: str
    allowed: tuple[Any, ...] = ()

    def refuses(self, value: Any) -> bool:
        return value is not None and value not in self.allowed if self.allowed else bool(value)


def not_supported(instead: str, *allowed: Any) -> NotSupported:
    return NotSupported(instead, allowed)


Marker = TypeVar("Marker", Support, NotSupported)


def find_marker(cls: type[BaseModel], name: str, kind: type[Marker]) -> Marker | None:
    """The marker on a field of a section, or on the field that it redefines."""
    fields = (base.model_fields.get(name) for base in cls.__mro__ if issubclass(base, BaseModel))
    markers = (marker for field in fields if field for marker in field.metadata)
    return next((marker for marker in markers if isinstance(marker, kind)), None)


def is_off(value: Any) -> bool:
    """Whether a setting of the shared format asks for nothing: null, false, 0, empty, or a map that
    is not enabled."""
    if isinstance(value, dict) and "enabled" in value:
        return not value["enabled"]
    return value in (None, False, 0, "", "none", "auto", [], {})


def refused_when_on(why: str, *off: Any) -> BeforeValidator:
    """For a key that may only say what happens without it: one of `off`, or nothing."""
    return BeforeValidator(partial(_refuse_when_on, why, off))


def _refuse_when_on(why: str, off: tuple[Any, ...], value: Any) -> None:
    if value not in off if off else not is_off(value):
        raise ValueError(f"{why}, found {show(value)}")


def refusal_reason(field: FieldInfo) -> str | None:
    """Why a key may only be off; None for any other key."""
    calls = [getattr(validator, "func", None) for validator in field.metadata]
    found = [c for c in calls if isinstance(c, partial) and c.func is _refuse_when_on]
    return found[0].args[0] if found else None


# Sections and values by key.


def get_value(config: Any, key: str) -> Any:
    """The value of a dotted key; None below a section that was left out."""
    return next((value for _, value in find_values(config, key.split("."))), None)


def find_values(value: Any, path: list[str], key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) to which a path leads; `*` is every position of a list or map."""
    if not path:
        yield key, value
        return
    name, *rest = path
    if isinstance(value, list | tuple):
        items = {str(i): item for i, item in enumerate(value)}
    else:
        items = dict(value) if isinstance(value, dict | BaseModel) else {}
    for part in items if name == "*" else items.keys() & {name}:
        yield from find_values(items[part], rest, f"{key}.{part}".lstrip("."))


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in getattr(annotation, "__args__", ()) for m in sections_in(a)]


def spellings(field: FieldInfo) -> list[str]:
    """Every name of a key that has several."""
    return [str(choice) for choice in getattr(field.validation_alias, "choices", ())]
