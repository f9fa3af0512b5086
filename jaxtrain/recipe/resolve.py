"""From a recipe's plain data to its typed, checked config."""

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from jaxtrain import registry
from jaxtrain.recipe.data import source_from_text
from jaxtrain.recipe.dump import recipe_hash
from jaxtrain.recipe.errors import Fault, Place, RecipeError, did_you_mean, shown
from jaxtrain.recipe.load import Key, Recipe, load
from jaxtrain.recipe.trainer import CHECKS, TrainerConfig


def get_config(source: Path | str | dict[str, Any], overrides: Iterable[str] = ()) -> TrainerConfig:
    """The checked config of a recipe file or dict; runs its `code:`, opens no device and writes
    nothing.

    Raises RecipeError with every fault at once.
    """
    recipe = load(source, overrides)
    resolver = _Resolver(recipe)
    config = resolver.resolve()
    if resolver.faults or config is None:
        raise RecipeError(resolver.faults, recipe=recipe.file)
    if config.run_dir is None:
        name = recipe.file.stem if recipe.file else "run"
        config = config.model_copy(update={"run_dir": f"runs/{name}-{recipe_hash(config)}"})
    return config


class _Resolver:
    """Validates section by section and collects what is wrong."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.tree = dict(recipe.tree)
        self.faults: list[Fault] = []

    def resolve(self) -> TrainerConfig | None:
        trainer = self.trainer_name()
        if trainer is None:
            return None
        for section in registry.SECTIONS:
            if section != "checkpoint":
                self.tree[section] = self.typed(
                    section, trainer, self.tree.get(section), (section,)
                )
        entries = self.tree.get("checkpoint") or []
        self.tree["checkpoint"] = [
            self.typed(
                "checkpoint",
                trainer,
                entry,
                ("checkpoint", i) if entry is not entries else ("checkpoint",),
            )
            for i, entry in enumerate(entries if isinstance(entries, list) else [entries])
        ]
        return self.whole(registry.config_class("trainer", trainer))

    def trainer_name(self) -> str | None:
        """The recipe's `type`, with the user's code loaded if the recipe needs it."""
        name = self.tree.setdefault("type", "sft")
        self.load_code(name)
        known = registry.names("trainer")
        if isinstance(name, str) and registry.canonical("trainer", name) in known:
            return registry.canonical("trainer", name)
        self.fault(("type",), registry.unknown("trainer", str(name), known))
        return None

    def load_code(self, trainer: Any) -> None:
        written = self.tree.get("code")
        unknown = any(name not in registry.names(kind) for kind, name in self.types(trainer))
        if written is None and not (unknown and self.recipe.file):
            return
        folders = (self.recipe.folder, Path.cwd())
        files = [folder / str(written or "train.py") for folder in folders[: 2 if written else 1]]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            run_user_code(file)
            self.tree["code"] = str(file)
        elif written is not None:
            raise RecipeError(
                [Fault("code", f"no such file: {written!r} (looked in {folders[0]} and {folders[1]})",
                       self.place(("code",)))]
            )  # fmt: skip

    def types(self, trainer: Any) -> Iterable[tuple[str, str]]:
        """Every (kind, name) that the recipe writes."""
        yield "trainer", str(trainer)
        for section in registry.SECTIONS:
            value = self.tree.get(section)
            for entry in value if isinstance(value, list) else [value]:
                if isinstance(entry, dict) and isinstance(entry.get("type"), str):
                    yield section, registry.canonical(section, entry["type"])
        data = self.tree.get("data")
        for key in ("sources", "eval_sources") if isinstance(data, dict) else ():
            written = data.get(key) if isinstance(data, dict) else None
            for listed in written.values() if isinstance(written, dict) else [written]:
                for source in listed if isinstance(listed, list) else ():
                    if isinstance(source, dict) and isinstance(source.get("type"), str):
                        yield "data_source", source["type"]

    def typed(self, section: str, trainer: str, value: Any, key: Key) -> Any:
        """The validated section; where it has faults, they are noted and a stand-in is returned."""
        allowed = registry.allowed(trainer, section)
        stand_in = registry.config_class(section, allowed[0]).model_construct()
        if value is None and section in ("model", "data"):
            self.fault(key, "is required")
            return stand_in
        value = {} if value is None else value
        if not isinstance(value, dict):
            self.fault(key, f"must be a map of keys, found {shown(value)}")
            return stand_in
        name = registry.canonical(section, str(value.get("type") or allowed[0]))
        if name not in allowed:
            known = registry.names(section)
            what = (
                f"{name!r} is not allowed with trainer {trainer!r} (allowed: {', '.join(allowed)})"
                if name in known
                else registry.unknown(section, name, list(allowed))
            )
            self.fault((*key, "type"), what)
            return stand_in
        if section == "data":
            default = registry.config_class("data", name).default_source
            value = self.with_sources(value, key, default)
        return self.validated(registry.config_class(section, name), {**value, "type": name}, key)

    def with_sources(self, value: dict[str, Any], key: Key, default: str) -> dict[str, Any]:
        value = dict(value)
        for name, split in (("sources", "train"), ("eval_sources", "eval")):
            written, here = value.get(name), (*key, name)
            if name == "eval_sources" and isinstance(written, dict) and "type" not in written:
                value[name] = {
                    set_name: self.sources(listed, (*here, set_name), split, default)
                    for set_name, listed in written.items()
                }
            elif written is not None:
                value[name] = self.sources(written, here, split, default)
        return value

    def sources(self, written: Any, key: Key, split: str, default: str) -> Any:
        if isinstance(written, str):
            written = [written]
        if not isinstance(written, list):
            return written
        return [self.source(item, (*key, i), split, default) for i, item in enumerate(written)]

    def source(self, item: Any, key: Key, split: str, default: str) -> Any:
        if isinstance(item, str):
            registered = registry.names("data_source")
            item = source_from_text(item, registered=registered, default=default)
        if not isinstance(item, dict):
            self.fault(key, f"must be a name, a path or a map, found {shown(item)}")
            return item
        name = str(item.get("type") or default)
        try:
            cls = registry.config_class("data_source", name)
        except ValueError as error:
            self.fault((*key, "type"), str(error))
            return item
        return self.validated(cls, {"split": split, **item, "type": name}, key)

    def validated(self, cls: type[BaseModel], value: dict[str, Any], key: Key) -> Any:
        try:
            return cls.model_validate(value, context={"folder": self.recipe.folder})
        except ValidationError as error:
            self.note(error, cls, key)
            return cls.model_construct()  # stands in until all faults are known

    def whole(self, cls: type[TrainerConfig]) -> TrainerConfig | None:
        """The trainer's config, and every check across keys whose own keys are sound."""
        context = {"folder": self.recipe.folder}
        tree, config = dict(self.tree), None
        for _ in range(
            2
        ):  # once more without the faulty keys, so that the checks across keys are asked
            try:
                config = cls.model_validate(tree, context=context)
                break
            except ValidationError as error:
                self.note(error, cls, ())
                for detail in error.errors():
                    tree.pop(str(detail["loc"][0]) if detail["loc"] else "", None)
        if config is None:
            return None
        faulty = {str(fault.key).split(".")[0] for fault in self.faults}
        for needs, check in CHECKS:
            if not faulty & set(needs):
                self.faults += [f._replace(place=self.place(_key(f.key))) for f in check(config)]
        return config

    def note(self, error: ValidationError, cls: type[BaseModel], key: Key) -> None:
        for detail in error.errors():
            loc = tuple(part for part in detail["loc"] if not _is_branch(part))
            self.fault((*key, *loc), _message(detail, cls))

    def fault(self, key: Key, what: str) -> None:
        self.faults.append(Fault(".".join(map(str, key)), what, self.place(key)))

    def place(self, key: Key) -> Place | None:
        """Where a key, or the nearest section around it, was written."""
        while key and key not in self.recipe.places:
            key = key[:-1]
        return self.recipe.places.get(key)


def _key(dotted: str) -> Key:
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _is_branch(part: str | int) -> bool:
    """pydantic puts the name of a union's branch into the path of a fault; it is no key."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool"))


def _message(detail: Any, cls: type[BaseModel]) -> str:
    found, kind, context = detail["input"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = _known_keys(cls, detail["loc"][:-1])
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


def _known_keys(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
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


def run_user_code(file: Path) -> None:
    """Import a user's Python file once, with its folder on the path; RecipeError names the
    failing line."""
    file = file.resolve()
    name = f"jaxtrain_user_{file.stem}"
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__file__", None) == str(file):
        return
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        registry.settle()
    except BaseException as error:  # whatever the user's file raises, the person gets its line
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", 0)
        place = Place(str(file), line or 0)
        raise RecipeError([Fault("", f"{type(error).__name__}: {error}", place)]) from error
