"""Look-up of factories and trainers by kind and name.

Built-in classes are known by import path, so a recipe is checked without importing what it names.
Classes of the user register when they are made.
"""

import inspect
import sys
import typing
from collections.abc import Mapping
from pkgutil import resolve_name
from types import UnionType
from typing import Any, ClassVar, NamedTuple

from jaxtrain.hooks import HasHooks
from jaxtrain.recipe.errors import did_you_mean


class Entry(NamedTuple):
    """One registered class, as `module:Class` below the package, and the section that it reads,
    below `jaxtrain.recipe`. The first is empty while the class is planned: its section is known
    and checked, and it is not supported yet."""

    path: str
    config: str


BUILT_IN: dict[str, dict[str, Entry]] = {
    "trainer": {
        "sft": Entry("trainer.sft:SFTTrainer", "trainer:TrainerConfig"),
        "causal": Entry("trainer.causal:CausalTrainer", "trainer:TrainerConfig"),
        "dpo": Entry("", "objectives:DPOTrainerConfig"),
        "cpo": Entry("", "objectives:CPOConfig"),
        "orpo": Entry("", "objectives:ORPOConfig"),
        "simpo": Entry("", "objectives:SimPOConfig"),
        "kto": Entry("", "trainer:TrainerConfig"),
        "reward": Entry("", "objectives:RewardConfig"),
        "distill": Entry("", "objectives:DistillConfig"),
        "grpo": Entry("", "objectives:GRPOConfig"),
    },
    "model": {"huggingface": Entry("model:HFModelFactory", "model:ModelConfig")},
    "tokenizer": {"huggingface": Entry("tokenizer:HFTokenizerFactory", "model:TokenizerConfig")},
    "data": {
        "sft": Entry("data.sft:SFTDataFactory", "data:SFTDataConfig"),
        "causal": Entry("data.causal:CausalDataFactory", "data:CausalDataConfig"),
        "dpo": Entry("data.preference:DPODataFactory", "objectives:PreferenceDataConfig"),
        "kto": Entry("data.preference:KTODataFactory", "objectives:JudgedDataConfig"),
    },
    "data_source": {
        "huggingface": Entry("data.hub:HuggingFaceSource", "data:HFDataSourceConfig"),
        "huggingface_instruct": Entry(
            "data.hub:HuggingFaceInstructSource", "data:HFDataSourceConfig"
        ),
        "huggingface_causal": Entry(
            "data.hub:HuggingFaceCausalSource", "data:HFCausalDataSourceConfig"
        ),
        "given": Entry("data.source:GivenSource", "data:RowsConfig"),
        "synthetic": Entry("data.source:SyntheticSource", "data:SyntheticDataSourceConfig"),
        "local": Entry("data.source:LocalSource", "data:AnyLocalDataSourceConfig"),
        "json": Entry("data.source:JsonSource", "data:LocalDataSourceConfig"),
        "jsonl": Entry("data.source:JsonLinesSource", "data:LocalDataSourceConfig"),
        "csv": Entry("data.source:CsvSource", "data:LocalDataSourceConfig"),
        "parquet": Entry("data.source:ParquetSource", "data:LocalDataSourceConfig"),
        "arrow": Entry("data.source:ArrowSource", "data:LocalDataSourceConfig"),
        "text": Entry("data.source:TextSource", "data:TextDataSourceConfig"),
        "ProjectGutenbergSFT": Entry("", "data:HFDataSourceConfig"),
        "snowflake": Entry("data.snowflake:SnowflakeSource", "snowflake:SnowflakeSourceConfig"),
    },
    "optimizer": {
        "adamw": Entry("optimizer:AdamWFactory", "optimizer:AdamWConfig"),
        "adafactor": Entry("optimizer:AdafactorFactory", "optimizer:AdafactorConfig"),
        "lion": Entry("optimizer:LionFactory", "optimizer:LionConfig"),
        "muon": Entry("optimizer:MuonFactory", "optimizer:MuonConfig"),
        "sgd": Entry("optimizer:SGDFactory", "optimizer:SGDConfig"),
        "adamw_8bit": Entry("optimizer:AdamW8bitFactory", "optimizer:AdamW8bitConfig"),
    },
    "scheduler": {
        "huggingface": Entry("scheduler:HFSchedulerFactory", "scheduler:HFSchedulerConfig"),
        "wsd": Entry("scheduler:WSDSchedulerFactory", "scheduler:WSDSchedulerConfig"),
    },
    "checkpoint": {
        "orbax": Entry("checkpoint:OrbaxEngine", "checkpoint:OrbaxConfig"),
        "huggingface": Entry("checkpoint:HFCheckpointEngine", "checkpoint:HFCheckpointConfig"),
    },
}

ALIASES = {
    ("model", "liger"): "huggingface",
    ("optimizer", "fused_adam"): "adamw",
    ("optimizer", "fused_adam_moe"): "adamw",
    ("optimizer", "cpu_adam"): "adamw",
    ("optimizer", "cpu_adam_moe"): "adamw",
    ("scheduler", "wds"): "wsd",
    ("checkpoint", "deepspeed"): "orbax",
    ("data_source", "snowflake_causal"): "snowflake",
    ("data_source", "HuggingFaceH4/ultrafeedback_binarized"): "huggingface",
}
"""Names of the shared format for classes that have another name here."""

SECTIONS = {
    "model": "model_factory",
    "tokenizer": "tokenizer_factory",
    "data": "data_factory",
    "optimizer": "optimizer_factory",
    "scheduler": "scheduler_factory",
    "checkpoint": "checkpoint_engine",
}
"""Recipe section with a `type` → the attribute of a trainer whose annotation says what is
allowed."""

DATA = {"causal": "causal", "kto": "kto"} | dict.fromkeys(
    ("dpo", "cpo", "orpo", "simpo", "reward"), "dpo"
)
"""Built-in trainer → the type of `data` that it reads, where that is not `sft`."""

OLDER = {
    "config_type": "config",
    **{f"{attribute}_type": attribute for attribute in SECTIONS.values()},
}
"""Class attributes of older trainers → the annotation that says the same."""

ALSO_CALLED = {"create_model": {"config": "model_config"}, "save_model": {"dir": "output_dir"}}
"""Method → argument names that the shared format's documentation has for ours."""

_user: dict[tuple[str, str], type] = {}
_contested: dict[tuple[str, str], str] = {}


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("jaxtrain.")


class Registered(HasHooks):
    """A base of which every subclass registers under its `name` when the class is made."""

    kind: ClassVar[str]
    name: ClassVar[str]
    retired: ClassVar[dict[str, str]] = {}
    """Methods of the shared format that nothing calls here → what to write instead."""
    notes: ClassVar[tuple[str, ...]] = ()
    """What the report on a recipe says of this class."""

    def __init_subclass__(cls, *, kind: str | None = None, abstract: bool = False, **options: Any):
        """`kind` makes a base of its own; `abstract` a class that only others derive from."""
        super().__init_subclass__(**options)
        if kind is not None:
            cls.kind = kind
        elif not _is_ours(cls):
            _check_methods(cls)
            _read_older_hints(cls)
            _check_hints(cls)
        if kind is None and not abstract:
            _enter(cls, force=False)


class TrainerView:
    """A trainer as the code of others sees it: every attribute can be read, none can be set."""

    def __init__(self, trainer: Any):
        vars(self)["_trainer"] = trainer

    def __getattr__(self, name: str) -> Any:
        trainer = vars(self)["_trainer"]
        if not hasattr(trainer, name):
            here = ", ".join(n for n in vars(trainer) if not n.startswith("_"))
            raise AttributeError(f"trainer.{name}: no such attribute here; there are {here}")
        return getattr(trainer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"trainer.{name}: a trainer is read-only here")


class Factory(Registered, abstract=True):
    """What a recipe section with a `type` names. `trainer`, a view, is for classes of the user;
    built-in ones take the values that they use."""

    config: Any

    def __init__(self, config: Any, trainer: Any = None):
        self.config = config
        self.trainer = trainer


def register(cls: type | None = None, *, force: bool = False) -> Any:
    """Make a subclass of a jaxtrain base known by its `name`; `force` replaces an existing one.

    Every subclass is, when it is made; the decorator says so, and takes `force`. ValueError when
    the name is missing, inherited, or taken by a class made elsewhere.
    """
    if cls is None:
        return lambda cls: register(cls, force=force)
    if not issubclass(cls, Registered):
        raise ValueError(
            f"{cls.__qualname__} is no subclass of a base that recipes name, which are "
            f"{', '.join(BUILT_IN)}; a callback is given by `default_callbacks` of a trainer"
        )
    _enter(cls, force=force)
    settle()
    return cls


def _enter(cls: type[Registered], *, force: bool) -> None:
    """Note a class under its name. A name that is taken is an error at the next look-up, since
    `@register(force=True)` comes only after the class is made."""
    name = vars(cls).get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f'{cls.__qualname__} needs a line `name = "..."` in its class body')
    key = (cls.kind, name)
    built_in = BUILT_IN[cls.kind].get(name)
    if built_in is not None and _is_ours(cls):
        return
    _contested.pop(key, None)
    known = _user.get(key)
    taken = _where(known) if known else built_in and built_in.path and f"jaxtrain.{built_in.path}"
    if taken and taken != _where(cls) and not force:
        _contested[key] = (
            f"the {cls.kind} name {name!r} is taken by {taken}; rename {_where(cls)}, "
            "or replace the other with @register(force=True)"
        )
        return
    _user[key] = cls


def settle() -> None:
    """ValueError for a name that two classes claim; to be called when both are made."""
    if _contested:
        what = next(iter(_contested.values()))
        _contested.clear()
        raise ValueError(what)


def _check_methods(cls: type[Registered]) -> None:
    """ValueError for a method that nothing would call, or that does not take what its base's is
    given."""
    for name, method in vars(cls).items():
        base = next((vars(b)[name] for b in cls.__mro__[1:] if name in vars(b)), None)
        if base is None and name in cls.retired:
            raise ValueError(f"{cls.__qualname__}: {name} is not called; {cls.retired[name]}")
        if inspect.isfunction(method) and inspect.isfunction(base) and not name.startswith("_"):
            _check_signature(cls, name, inspect.signature(method), inspect.signature(base))


def _check_signature(
    cls: type[Registered], name: str, given: inspect.Signature, wanted: inspect.Signature
) -> None:
    spelled = ALSO_CALLED.get(name, {})
    named = {spelled.get(p.name, p.name): p for p in given.parameters.values()}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in named.values())
    lacks = [] if takes_all else [n for n in _required(wanted.parameters) if n not in named]
    demands = [named[n].name for n in _required(named) if n not in wanted.parameters]
    if lacks or demands:
        at_fault = [f"lacks {p!r}" for p in lacks] + [f"demands {p!r}" for p in demands]
        hint = cls.retired.get(name, "")
        raise ValueError(
            f"{cls.__qualname__}: {name}({', '.join(given.parameters)}) {' and '.join(at_fault)}; "
            f"it is called as {name}({', '.join(wanted.parameters)}){hint and '; ' + hint}"
        )


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic]


def _read_older_hints(cls: type[Registered]) -> None:
    """Take over `data_factory_type = A` as `data_factory: A`, with a note."""
    for older in OLDER.keys() & vars(cls).keys():
        cls.__annotations__[OLDER[older]] = vars(cls)[older]
        cls.notes += (f"{cls.__qualname__}: write `{OLDER[older]}: …` for `{older} = …`",)


def _check_hints(cls: type[Registered]) -> None:
    """ValueError for an annotation that names no class of its kind; one that names a class which
    is defined further down is left to the look-up."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:
        return
    base = next(b for b in cls.__mro__ if "kind" in vars(b))
    for kind, attribute in SECTIONS.items() if cls.kind == "trainer" else ():
        for named in _classes(hints[attribute]):
            if getattr(named, "kind", None) != kind:
                raise ValueError(
                    f"{cls.__qualname__}: {attribute} must name factories of kind {kind!r}, one or "
                    f"a union, found {named!r}"
                )
    config, section = hints["config"], typing.get_type_hints(base)["config"]
    if not (isinstance(config, type) and issubclass(config, section)):
        raise ValueError(
            f"{cls.__qualname__}: config must be {section.__name__} or a subclass, found {config!r}"
        )


def _classes(hint: Any) -> tuple[Any, ...]:
    """Of `A`, `Union[A, B]` or `A | B`."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    return typing.get_args(hint) if union else (hint,)


def _where(cls: type) -> str:
    """File and name of a class; the file also when its module is no longer known."""
    codes = (f.__code__.co_filename for f in vars(cls).values() if inspect.isfunction(f))
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return f"{file or next(codes, cls.__module__)}:{cls.__qualname__}"


def names(kind: str) -> list[str]:
    """Every registered name of a kind, built-in ones first."""
    return [*dict.fromkeys([*BUILT_IN[kind], *(name for k, name in _user if k == kind)])]


def is_built_in(kind: str, name: str) -> bool:
    return name in BUILT_IN[kind] and (kind, name) not in _user


def is_planned(kind: str, name: str) -> bool:
    """Is this a name whose section is checked and whose class does not exist yet?"""
    return is_built_in(kind, name) and not BUILT_IN[kind][name].path


def supported(kind: str) -> list[str]:
    return [name for name in names(kind) if not is_planned(kind, name)]


def canonical(kind: str, name: str) -> str:
    """The name under which a class is registered, for one of the shared format's names."""
    return ALIASES.get((kind, name), name)


def find(kind: str, name: str) -> type:
    """The class of that kind and name, imported; ValueError that lists the known names."""
    settle()
    name = canonical(kind, name)
    if (kind, name) in _user:
        return _user[kind, name]
    if is_planned(kind, name):
        raise ValueError(f"{kind.replace('_', ' ')} type {name!r} is not supported yet")
    if name in BUILT_IN[kind]:
        return resolve_name(f"jaxtrain.{BUILT_IN[kind][name].path}")
    raise ValueError(unknown(kind, name, names(kind)))


def config_class(kind: str, name: str) -> type:
    """The recipe section of a class, without importing a built-in one; ValueError as `find`."""
    name = canonical(kind, name)
    if (kind, name) in _user:
        return typing.get_type_hints(_user[kind, name])["config"]
    if name in BUILT_IN[kind]:
        return resolve_name(f"jaxtrain.recipe.{BUILT_IN[kind][name].config}")
    raise ValueError(unknown(kind, name, names(kind)))


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The message for a name that no class of this kind has."""
    what = kind.replace("_", " ")
    known = [*known, *(a for (k, a), target in ALIASES.items() if k == kind and target in known)]
    return f"unknown {what} type {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})"


def allowed(trainer: str, section: str) -> tuple[str, ...]:
    """Names that a trainer's annotation admits for a section, the default first. A test compares
    what is known of built-in trainers without importing them with their annotations."""
    if ("trainer", trainer) not in _user:
        return (DATA.get(trainer, "sft"),) if section == "data" else tuple(BUILT_IN[section])
    hint = typing.get_type_hints(find("trainer", trainer))[SECTIONS[section]]
    return tuple(cls.name for cls in _classes(hint))


def notes(kind: str, name: str) -> tuple[str, ...]:
    """What the report on a recipe says of a class that it names."""
    return getattr(_user.get((kind, canonical(kind, name))), "notes", ())
