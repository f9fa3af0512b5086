"""From a recipe's plain data to its typed, checked config."""

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from jaxtrain import registry
from jaxtrain.recipe.checks import CHECKS, MACHINE_CHECKS, find_lost_work
from jaxtrain.recipe.code import run_user_code
from jaxtrain.recipe.compose import compose
from jaxtrain.recipe.data import DataConfig, source_from_text
from jaxtrain.recipe.dump import recipe_hash
from jaxtrain.recipe.errors import Fault, RecipeError, show
from jaxtrain.recipe.load import Key, Recipe, join_key
from jaxtrain.recipe.messages import explain, list_keys
from jaxtrain.recipe.report import (
    Report,
    build_report,
    carry_over,
    drop_carried,
    find_unsupported,
)
from jaxtrain.recipe.secrets import find_secrets, hide_secrets
from jaxtrain.recipe.section import TypedSection, find_values, path_exists
from jaxtrain.recipe.strangers import ELSEWHERE
from jaxtrain.recipe.trainer import TrainerConfig

SOURCES = {"sources": "train", "eval_sources": "eval"}
"""Keys of `data` that hold sources, with the split that theirs are read from."""
DATA_SECTIONS = ("data", "model", "tokenizer")
"""Sections that data preparation reads."""

MAX_PASSES = 4
"""How often a section is validated, each time without the keys found faulty before, so that checks
across keys run on the rest."""

TRAINER_KEYS = ("type", "name", "code", "base")
"""Keys whose meaning does not depend on the trainer."""


class Resolved(NamedTuple):
    """A recipe's config or its faults, and the report on its keys in either case."""

    recipe: Recipe
    config: TrainerConfig | None
    faults: tuple[Fault, ...]
    report: Report

    def require_config(self) -> TrainerConfig:
        """The config; RecipeError with every fault at once."""
        if self.faults or self.config is None:
            raise self.error
        return self.config

    def with_faults(self, faults: Iterable[Fault]) -> "Resolved":
        """The same with faults that were found later, each at its place if it is one of a key, and
        without secrets."""
        recipe, found = self.recipe, list(self.faults)
        for fault in faults:
            fault = fault._replace(what=hide_secrets(fault.what, recipe.secrets))
            is_key = fault.key.split(".")[0] in recipe.tree
            found.append(recipe.locate(fault) if is_key else fault)
        return self._replace(faults=tuple(found))

    @property
    def error(self) -> RecipeError:
        return RecipeError(self.faults, recipe=self.recipe.file)


def get_config(
    source: Path | str | dict[str, Any], overrides: Iterable[str] = (), *, runs_here: bool = True
) -> TrainerConfig:
    """The checked config of a recipe file or dict. Runs its `code:`, opens no device and writes
    nothing; RecipeError lists every fault, among them files and packages that this machine lacks
    unless the recipe only describes what ran elsewhere."""
    return resolve(source, overrides, runs_here=runs_here).require_config()


def resolve(
    source: Path | str | dict[str, Any],
    overrides: Iterable[str] = (),
    *,
    only_data: bool = False,
    runs_here: bool = True,
) -> Resolved:
    """As `get_config`, but returns faults, with a report; RecipeError only for a recipe that cannot
    be read. With `only_data`, for commands that do not train, what only a run lacks is a note."""
    recipe = compose(source, overrides)
    private = {k: v for k, v in find_secrets(recipe.tree).items() if k not in recipe.secrets}
    recipe = recipe._replace(secrets={**recipe.secrets, **private})
    resolver = _Resolver(recipe, only_data, runs_here)
    resolver.notes += [
        f"{join_key(key)}: neither shown nor saved; write {secret.written}, "
        "and the saved recipe runs"
        for key, secret in private.items()
    ]
    trainer = resolver.find_trainer()
    config = resolver.build_config(trainer) if trainer else None
    unread = tuple(f"{fault.key}." for fault in recipe.faults if fault.key)
    is_caused = lambda fault: (
        fault not in recipe.faults
        and (
            f"{fault.key}.".startswith(unread)
            or (fault.what == "is required" and any(key.startswith(fault.key) for key in unread))
        )
    )
    faults = tuple(
        fault._replace(what=hide_secrets(fault.what, recipe.secrets, recipe.key(fault.key)))
        for fault in dict.fromkeys(resolver.faults)
        if not is_caused(fault)  # by a value that could not be read, which has a fault itself
    )
    notes = [hide_secrets(note, recipe.secrets) for note in resolver.notes]
    if trainer is None:  # it decides which other keys there are
        known = {key: value for key, value in recipe.tree.items() if key in TRAINER_KEYS}
        recipe = recipe._replace(tree=known)
    report = build_report(recipe, resolver.classes, resolver.typed_config, faults, notes)
    if config is None or faults:
        config = None
    elif config.run_dir is None:
        name = recipe.file.stem if recipe.file else "run"
        folder = config.logger.output_dir or f"runs/{name}-{recipe_hash(config)}"
        config = config.model_copy(update={"run_dir": folder})
    return Resolved(recipe, config, faults, report)


def parse_eval_sources(written: Any, data: DataConfig) -> tuple[Any, ...]:
    """The typed sources of a list under `data.eval_sources`; RecipeError lists every fault."""
    resolver = _Resolver(compose({}))
    found = resolver.read_sources(written, (), "eval", data.default_source)
    if resolver.faults:
        raise RecipeError(resolver.faults)
    return tuple(found)


class _Resolver:
    """Validates section by section and collects the faults."""

    def __init__(self, recipe: Recipe, only_data: bool = False, runs_here: bool = True):
        self.recipe = recipe
        self.checks = [*CHECKS, *(MACHINE_CHECKS if runs_here else ())]
        self.only_data = only_data
        self.tree = dict(recipe.tree)
        self.faults = [*recipe.faults]
        self.notes: list[str] = []
        self.unsupported: list[Fault] = []
        self.classes: dict[Key, type] = {}
        """key of each section → its class"""
        self.typed_config: TrainerConfig | None = None
        """the config as it is written, if no section is missing"""
        self.has_stand_in = False

    def build_config(self, trainer: str) -> TrainerConfig | None:
        for section in registry.SECTIONS:
            value, key = self.tree.get(section), (section,)
            if value is None and section not in ("model", "data"):
                value = {}
            allowed = registry.allowed(trainer, section)
            read = partial(self.read_section, section, allowed=allowed, default=allowed[0])
            if section != "checkpoint":
                self.tree[section] = read(value, key)
            elif isinstance(value, list):
                self.tree[section] = [read(entry, (*key, i)) for i, entry in enumerate(value)]
            else:
                self.tree[section] = [read(value, key)] if value else []
        config = self.validate("trainer", trainer, self.tree, ())
        self.typed_config = None if self.has_stand_in else config
        return None if config is None else self.resolve_shared_keys(config)

    def find_trainer(self) -> str | None:
        """The recipe's `type`; runs the user's code if the recipe needs it."""
        older, name = self.tree.get("name"), self.tree.get("type")
        if None not in (older, name) and older != name:
            self.add_fault(("name",), f"{show(older)} contradicts type {show(name)}; remove it")
        key = "name" if name is None and older is not None else "type"
        name = self.tree["type"] = next((n for n in (name, older) if n is not None), "sft")
        try:
            file, has_failed = load_code(self.recipe, name), False
        except RecipeError as error:
            self.faults += error.faults
            file, has_failed = None, True
        if file:
            self.tree["code"] = str(file)
            if "code" not in self.recipe.tree:
                self.notes.append(f"code: {file} was run, for a type that is not built in")
        known, name = registry.names("trainer"), registry.canonical("trainer", str(name))
        if name in known:
            return name
        if not has_failed:  # what the code would have registered is not known
            what = registry.unknown("trainer", name, known)
            self.add_fault((key,), f"{what}; for your own trainer, name its file under `code:`")
        return None

    def read_section(
        self, kind: str, value: Any, key: Key, *, allowed: Collection[str], default: str
    ) -> Any:
        """The typed section, or an unvalidated stand-in where its faults leave none."""
        self.classes[key] = TypedSection
        typed, written = None, value.get("type") if isinstance(value, dict) else None
        name = registry.canonical(kind, default if written is None else str(written))
        if value is None and kind in ("model", "data"):
            self.add_fault(key, "is required")
        elif not isinstance(value, dict):
            form = "a name, a path or a map" if kind == "data_source" else "a map of keys"
            self.add_fault(key, f"must be {form}, found {show(value)}")
        elif not isinstance(written, str | None):
            self.add_fault((*key, "type"), f"must be a name, found {show(written)}")
        elif name not in registry.names(kind):
            self.add_fault((*key, "type"), registry.unknown(kind, name, [*allowed]))
        elif name not in allowed and self.tree.get("skip_validation") is not True:
            what = f"{name!r} is not allowed with trainer {self.tree['type']!r}"
            lift = f"skip_validation: true allows it (allowed: {', '.join(allowed)})"
            self.add_fault((*key, "type"), f"{what}, {lift}")
        else:
            value = self.read_source_lists(name, value, key) if kind == "data" else value
            typed = self.validate(kind, name, {**value, "type": name}, key)
        self.has_stand_in |= typed is None
        return typed or registry.config_class(kind, default).model_construct()

    def read_source_lists(self, name: str, value: dict[str, Any], key: Key) -> dict[str, Any]:
        default = registry.config_class("data", name).default_source
        return value | {
            name: self.read_sources(value[name], (*key, name), split, default)
            for name, split in SOURCES.items()
            if name in value
        }

    def read_sources(self, written: Any, key: Key, split: str, default: str) -> Any:
        """The typed sources of a list, or of each list of a map; anything else as it is."""
        if isinstance(written, dict) and split == "eval" and "type" not in written:
            return {n: self.read_sources(w, (*key, n), split, default) for n, w in written.items()}
        if not isinstance(written, list | str):
            return written
        known, sources = registry.names("data_source"), []
        read = partial(self.read_section, "data_source", allowed=known, default=default)
        for i, item in enumerate([written] if isinstance(written, str) else written):
            if isinstance(item, str):
                item = source_from_text(item, registered=known, default=default)
            elif isinstance(item, dict) and "path" in item and "type" not in item:
                item = {"type": "local", **item}
            with_split = {"split": split, **item} if isinstance(item, dict) else item
            sources.append(read(with_split, (*key, i)))
        return sources

    def validate(self, kind: str, name: str, value: dict[str, Any], key: Key) -> Any:
        """The typed section of the valid keys in `value`; None when these do not suffice."""
        cls = self.classes[key] = registry.config_class(kind, name)
        self.notes += registry.notes(kind, name)
        if registry.is_planned(kind, name):
            supported = ", ".join(registry.supported(kind))
            what = f"{name!r} is not supported yet; supported: {supported}"
            self.unsupported.append(Fault(join_key((*key, "type")), what))
        found: list[tuple[Key, str]] = []
        find = lambda field: self.recipe.folders_of((*key, field))
        context = {"folders_of": find, "notes": self.notes}
        for _ in range(MAX_PASSES):
            try:
                return cls.model_validate(value, context=context)
            except ValidationError as error:
                faults = explain(error, cls, partial(explain_owner, kind, name))
            for loc, what in faults:
                if any(what == "is required" or str(bad[-1]) in what for bad, _ in found if bad):
                    continue  # as the faulty key may be to blame
                self.add_fault((*key, *loc), what)
            found += faults
            value = _without(value, {_find_droppable(loc, what) for loc, what in found})
        return None

    def resolve_shared_keys(self, config: TrainerConfig) -> TrainerConfig:
        """Carries shared keys over, and runs every check whose keys are valid."""
        keys = {fault.key for fault in self.faults}
        faulty = {key.split(".")[0] for key in keys}
        zero = config.deepspeed.zero_optimization
        if zero is not None and "stage" not in zero.model_fields_set:
            self.notes.append("deepspeed.zero_optimization: without a stage it is stage 0")
        carried = carry_over(config, keys)
        found = list(carried.faults)
        for needs, check in self.checks:
            if not faulty & set(needs):
                found += check(carried.config)
        if not (faulty or found or self.only_data):
            self.notes += find_lost_work(carried.config)
        unsupported = find_unsupported(carried.config, carried.origins)
        for fault in (*self.unsupported, *unsupported):
            if self.only_data and fault.key.split(".")[0] not in DATA_SECTIONS:
                self.notes.append(f"a run is refused: {fault}")
            else:
                found.append(fault)
        self.faults += map(self.recipe.locate, found)
        config = drop_carried(carried.config)
        config._secrets = dict(self.recipe.secrets)
        return config

    def add_fault(self, key: Key, what: str) -> None:
        self.faults.append(Fault(join_key(key), what, self.recipe.place(key)))


def _find_droppable(loc: Key, what: str) -> Key:
    """What to leave out because of a fault: the section that lacks a key, else the faulty value."""
    names = [n for n, part in enumerate(loc) if not isinstance(part, int)]
    return loc[: names[-2] + 1] if what == "is required" and len(names) > 1 else loc


def _without(value: Any, faulty: set[Key], key: Key = ()) -> Any:
    """Plain data without its faulty parts."""
    if isinstance(value, dict):
        items = {name: _without(v, faulty, (*key, name)) for name, v in value.items()}
        return {name: item for name, item in items.items() if (*key, name) not in faulty}
    if isinstance(value, list):
        items = [_without(v, faulty, (*key, i)) for i, v in enumerate(value)]
        return [item for i, item in enumerate(items) if (*key, i) not in faulty]
    return value


def explain_owner(kind: str, name: str, key: str) -> str:
    """Where a key belongs that a section of this type does not have."""
    if (ours := ELSEWHERE.get(key)) and kind == "trainer":
        return f"; write `{ours}`"
    types = [n for n in registry.BUILT_IN[kind] if key in list_type_keys(kind, n)]
    if types:
        return f"; it belongs to type {' and '.join(types)}, not {name}"
    for section in registry.SECTIONS:
        if any(key in list_type_keys(section, n) for n in registry.BUILT_IN[section]):
            return f"; it is a key of `{section}`"
    if kind != "trainer" and key in list_type_keys("trainer", "sft"):
        return "; it is a key of the recipe itself, beside its sections"
    return "; remove it, or, if your own trainer defines it, name its file under `code:`"


def list_type_keys(kind: str, name: str) -> list[str]:
    """The keys of a built-in class's section, in all their spellings."""
    return list_keys(registry.config_class(kind, name), ())


def load_code(recipe: Recipe, trainer: Any = "sft") -> Path | None:
    """Runs the file that the recipe names, or the `train.py` beside it when a type is not known.
    RecipeError when it fails or does not exist."""
    written = recipe.tree.get("code")
    unknown = any(name not in registry.names(kind) for kind, name in find_types(recipe, trainer))
    if written is None and not (unknown and recipe.file):
        return None
    folders = recipe.folders_of(("code",)) if written else [recipe.folder]
    files = [folder / str(written or "train.py") for folder in folders]
    file = next((file for file in files if path_exists(str(file)) and file.is_file()), None)
    if file is not None:
        run_user_code(file)
    elif written is not None:
        looked = " and ".join(map(str, folders))
        fault = Fault("code", f"no such file: {written!r} (looked in {looked})")
        raise RecipeError([recipe.locate(fault)])
    return file


def find_types(recipe: Recipe, trainer: Any) -> Iterable[tuple[str, str]]:
    """Every (kind, name) that the recipe writes."""
    yield "trainer", registry.canonical("trainer", str(trainer))
    places = {section: section for section in registry.SECTIONS} | {"checkpoint.*": "checkpoint"}
    places |= dict.fromkeys(("data.sources.*", "data.eval_sources.*", "data.eval_sources.*.*"),
                            "data_source")  # fmt: skip
    for section, kind in places.items():
        for _, name in find_values(recipe.tree, f"{section}.type".split(".")):
            if isinstance(name, str):
                yield kind, registry.canonical(kind, name)
