"""Every key of a recipe is read by what it is about, and what it does is seen by a test."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from types import CodeType

import pytest
from pydantic import BaseModel

import jaxtrain
from jaxtrain import registry
from jaxtrain.recipe.check import describe
from jaxtrain.recipe.dump import find_differences, to_dict
from jaxtrain.recipe.mapping import CARRIED, COMPUTED, value_at
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.recipe.not_built import TABLE
from jaxtrain.recipe.resolve import resolve
from jaxtrain.recipe.section import Section, sections_in, why_refused
from jaxtrain.recipe.word import MAPPED, NO_EFFECT, OWN
from tests.recipe.seen import BY_CHECK, BY_REFUSAL, BY_TEST

PACKAGE, TESTS = Path(jaxtrain.__file__).parent, Path(__file__).parents[1]
BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
LEVELS = {"trainer": "", "data_source": "data.sources.*", "checkpoint": "checkpoint.*"}


def below(key: str, cls: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, class, field) of a section and those inside it."""
    for name, field in cls.model_fields.items():
        dotted = f"{key}.{name}".lstrip(".")
        yield dotted, cls, name
        if name not in registry.SECTIONS:
            for inner in sections_in(field.annotation):
                yield from below(dotted, inner)


def fields(*, planned: bool) -> Iterator[tuple[str, type[BaseModel], str]]:
    for kind in ("trainer", *registry.SECTIONS, "data_source"):
        for name in registry.BUILT_IN[kind]:
            if registry.is_planned(kind, name) == planned:
                yield from below(LEVELS.get(kind, kind), registry.config_class(kind, name))


FIELDS = {key: (cls, name) for key, cls, name in fields(planned=False)}
SECTIONS = {
    key for key, (cls, name) in FIELDS.items() if sections_in(cls.model_fields[name].annotation)
}
REFUSED = {key for key, (cls, name) in FIELDS.items() if why_refused(cls.model_fields[name])}
"""Keys that may only be off."""
NOT_BUILT = {row.key for row in TABLE}
ELSEWHERE = {key for key, _ in (*CARRIED, *COMPUTED)}
"""Keys that are honoured under another key."""


def starred(key: str) -> str:
    """The key with its lists, as in `FIELDS`, and evaluation sources as sources."""
    key = re.sub(r"\beval_sources\.\*(\.\*)?", "sources.*", key)
    return re.sub(r"^(checkpoint|data\.sources)\.(?!\*)", r"\1.*.", key)


def not_built(key: str) -> bool:
    """Is the key, a section around it, or the switch of its section refused by name?"""
    parts = key.split(".")
    around = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return bool(around & NOT_BUILT) or f"{'.'.join(parts[:-1])}.enable" in NOT_BUILT


ASKED = sorted(
    {*FIELDS}
    - SECTIONS
    - REFUSED
    - {starred(key) for key in NO_EFFECT}
    - ELSEWHERE
    - set(filter(not_built, FIELDS))
)
"""Keys that change a run."""


# What a key does is seen.


def test_every_key_that_changes_a_run_has_a_row():
    missing = [key for key in ASKED if key not in {*BY_TEST, *BY_CHECK, *BY_REFUSAL}]
    assert not missing, (
        f"no row says where the effect of {', '.join(missing)} is seen: write the test that changes "
        "the key and sees the change, and name it in a table of tests/recipe/seen.py"
    )


def test_every_row_is_a_key():
    for table in (BY_TEST, BY_CHECK, BY_REFUSAL):
        assert {*table} <= {*FIELDS}, {*table} - {*FIELDS}
    for key in (*NOT_BUILT, *NO_EFFECT, *OWN, *MAPPED):
        assert starred(key) in FIELDS, key


@cache
def parsed(file: Path) -> tuple[str, dict[str, ast.stmt]]:
    text = file.read_text()
    found = {}
    for node in ast.parse(text).body:
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
        names += [t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)]
        found |= dict.fromkeys(names, node)
    return text, found


def source(file: Path, name: str, depth: int = 2) -> str:
    """Text of a test, and of the tables and functions of its file that it uses."""
    text, found = parsed(file)
    node = found[name]
    start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
    own = "\n".join(text.splitlines()[start - 1 : node.end_lineno])
    used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & {*found} - {name}
    return "\n".join([own, *(source(file, other, depth - 1) for other in used if depth)])


@pytest.mark.parametrize("key", BY_TEST)
def test_the_named_test_is_there_and_is_about_the_key(key):
    path, _, test = BY_TEST[key].partition("::")
    assert test in parsed(TESTS / path)[1], f"{path} has no {test}: name the test that sees {key}"
    section, _, name = key.rpartition(".")
    word = section if name == "enable" else name  # a switch goes by its section
    assert re.search(rf"\b{word}\b", source(TESTS / path, test)), f"{test} says nothing of {key}"


@pytest.mark.parametrize("key", BY_CHECK)
def test_check_says_what_the_key_does(key):
    change, line = BY_CHECK[key]
    assert line in describe(resolve(BASE | change)).splitlines(), describe(resolve(BASE | change))
    assert line not in describe(resolve(BASE)).splitlines()


@pytest.mark.parametrize("key", BY_REFUSAL)
def test_other_values_are_refused(key):
    change, line = BY_REFUSAL[key]
    assert line in map(str, resolve(BASE | change).faults)


def test_skip_validation_lifts_one_refusal():
    change = {"data": {"type": "causal", "sources": ["a/b"]}}
    (fault,) = resolve(BASE | change).faults
    assert fault.key == "data.type" and "skip_validation: true allows it" in fault.what
    assert resolve(BASE | change | {"skip_validation": True}).faults == ()


# What changes nothing, or is refused, says so.


def nested(key: str, value: object) -> dict[str, object]:
    """The smallest recipe with one dotted key in it."""
    *parents, last = [part for part in key.split(".") if part != "*"]
    tree: dict = {name: dict(section) for name, section in BASE.items()}
    here = tree
    for part in parents:
        here = here.setdefault(part, {})
    if "peft_config" in parents:
        here["peft_type"] = "Lora"
    here[last] = value
    return tree


OTHER = {
    "mem_profiler_max_entries": 7,
    "wandb.mode": "offline",
    "deepspeed.fp16.loss_scale": 128,
    **{
        f"deepspeed.fp16.{name}": 3
        for name in ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
    },
    **{f"wandb.{name}": "x" for name in ("entity", "project", "name", "id")},
    "arctic_moe": "auto",
    "model.save_name": "x",
    "data.cache_fs_type": "shared",
}
"""A value that is not the default, where true is none."""


def flat(value: object, key: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {key: value}
    return {
        k: v for n, inner in value.items() for k, v in flat(inner, f"{key}.{n}".lstrip(".")).items()
    }


@pytest.mark.parametrize("key", [key for key in NO_EFFECT if "sources" not in key])
def test_a_key_without_effect_changes_nothing_and_says_why(key):
    resolved = resolve(nested(key, OTHER.get(key, True)))
    if resolved.faults:  # of the section around it
        assert key.startswith("model.peft_config.")
        return
    (line,) = [line for line in resolved.report.lines if line.key == key]
    assert (line.word, line.reason) == ("no effect", NO_EFFECT[key])
    section = key.startswith("deepspeed.zero_optimization.")  # without a stage it is one of its own
    plain = resolve(nested("deepspeed.zero_optimization", {}) if section else BASE)
    without, with_it = (flat(to_dict(r.checked())) for r in (plain, resolved))
    changed = {k for k in {*without, *with_it} if without.get(k) != with_it.get(k)}
    assert changed <= {key, "run_dir"}, "it changes another key"


def test_a_key_of_a_source_without_effect_says_why(monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: None)  # every extra is installed
    source = {"type": "snowflake", "table_name": "t"}
    plain, sized = (
        resolve(BASE | {"data": {"sources": [source | more]}}) for more in ({}, {"batch_size": 7})
    )
    found = {line.key: line.reason for line in sized.report.lines if line.word == "no effect"}
    assert found == {"data.sources.0.batch_size": NO_EFFECT["data.sources.batch_size"]}
    changed = find_differences(to_dict(plain.checked()), to_dict(sized.checked()))
    assert changed == ["data.sources", "run_dir"]


OFF_VALUES = {
    "scheduler.learning_rate": None,
    "deepspeed.zero_optimization.zero_hpz_partition_size": 1,
    "deepspeed.zero_optimization.mics_shard_size": -1,
}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_a_key_that_may_only_be_off_is_refused_with_its_reason(key):
    faults = [fault for fault in resolve(nested(key, {"enabled": True})).faults if fault.key == key]
    assert len(faults) == 1 and faults[0].what.endswith(", found {'enabled': True}"), faults
    assert len(faults[0].what.partition(", found")[0]) > 10
    off = resolve(nested(key, OFF_VALUES.get(key, {"enabled": False}))).faults
    assert not [fault for fault in off if fault.key == key]


@pytest.mark.parametrize(("key", "target"), CARRIED)
def test_a_key_with_another_name_sets_the_other_and_may_not_contradict_it(key, target):
    value = True if target.endswith(("offload", "enable")) else 4
    if target == "tensorboard.enable":
        pytest.importorskip("tensorboardX")
    resolved = resolve(nested(key, value))
    if target in NOT_BUILT:
        assert [fault.key for fault in resolved.faults] == [key]
    else:
        assert value_at(resolved.checked(), target) == value
        assert target in {*ASKED}
    twice = nested(key, value)
    here = twice
    *parents, last = target.split(".")
    for part in parents:
        here = here.setdefault(part, {})
    here[last] = False if value is True else 2
    (fault,) = [f for f in resolve(twice).faults if "contradicts" in f.what]
    assert fault.key == key and f"contradicts {target} " in fault.what


@pytest.mark.parametrize(("key", "target"), COMPUTED)
def test_a44_a_computed_key_must_be_what_it_comes_to(key, target):
    """Trap A44."""
    assert resolve(nested(key, 1)).faults == ()
    (fault,) = resolve(nested(key, 4)).faults
    assert (fault.key, fault.what) == (key, f"4 is not the 1 of {target}; write it there only")


PLANNED = {
    (cls, key)
    for key, cls, name in fields(planned=True)
    if key not in FIELDS and key.count(".") == 0 and cls.__annotations__.get(name)
}


@pytest.mark.parametrize(("cls", "key"), sorted(PLANNED, key=str))
def test_keys_of_objectives_to_come_are_checked_already(cls, key):
    trainer = next(
        n for n in registry.BUILT_IN["trainer"] if registry.config_class("trainer", n) is cls
    )
    bad = "x" if key == "reference_model_deepspeed" else {"no": ["such", "value"]}
    faults = [f.key for f in resolve(BASE | {"type": trainer, key: bad}).faults]
    assert any(fault.split(".")[0] == key for fault in faults), faults


# What is accepted is read.


class Reads(ast.NodeVisitor):
    """(what, name) of each attribute that is read off something, and all text."""

    def __init__(self, *folders: str):
        self.found: set[tuple[str, str]] = set()
        self.texts: set[str] = set()
        for folder in folders:
            for file in (
                [PACKAGE / folder] if folder.endswith(".py") else (PACKAGE / folder).rglob("*.py")
            ):
                self.visit(ast.parse(file.read_text()))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        what = (
            node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
        )
        self.found.add((what, node.attr))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)


HOMES = {
    "model": ("model", "tokenizer", "trainer"),
    "tokenizer": ("tokenizer", "data", "trainer"),
    "data": ("data", "trainer"),
    "optimizer": ("optimizer", "scheduler", "trainer"),
    "scheduler": ("scheduler", "trainer"),
    "checkpoint": ("checkpoint", "model", "trainer"),
    "logger": ("metrics", "trainer"),
    "mesh": ("parallel", "trainer"),
    "pipeline": ("parallel", "trainer"),
    "deepspeed": (
        "optimizer", "parallel", "trainer", "recipe/mapping.py", "recipe/deepspeed.py",
    ),
    "eval_samples": ("trainer",),
    "profile": ("metrics",),
}  # fmt: skip
"""Section → the folders that may read it; the trainer's own keys may be read anywhere."""
ANYWHERE = tuple(p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "recipe")
CALLED = {
    "profile": "trace",
    "eval_samples": "wanted",
    "offload_optimizer": "offload",
    "zero_optimization": "zero",
}
"""Section → what it is called where it is read, if neither `config` nor its name."""
BY_NAME = {
    "code": "recipe/resolve.py",
    "skip_validation": "recipe/resolve.py",
    "name": "recipe/resolve.py",
    "base": "recipe/compose.py",
    "mesh.fsdp": "recipe/mesh.py",
    "mesh.tensor": "recipe/mesh.py",
}
"""Keys that are looked up as text, and where."""


@cache
def reads(*folders: str) -> Reads:
    return Reads(*folders)


def names_in(code: CodeType) -> set[str]:
    inner = (names_in(part) for part in code.co_consts if isinstance(part, CodeType))
    return {*code.co_names}.union(*inner)


def readers_of_its_own(cls: type[BaseModel], name: str) -> set[str]:
    """Properties and methods of a section that read a field of it; its checks are none."""
    bases = [base for base in cls.__mro__ if issubclass(base, Section)]
    members = [(n, getattr(m, "fget", m)) for base in bases for n, m in [*vars(base).items()]]
    return {
        n
        for n, f in members
        if n[0] != "_" and inspect.isfunction(f) and name in names_in(f.__code__)
    }


def is_read(cls: type[BaseModel], key: str) -> bool:
    """Is `config.key`, or a property of the section that needs it, read where the section is
    used?"""
    section, _, name = key.rpartition(".")
    noun = next((part for part in reversed(section.split(".")) if part != "*"), "")
    called = {
        "config",
        "self",
        noun,
        noun.rstrip("s"),
        f"{noun}_config",
        CALLED.get(noun, "config"),
    }
    direct = readers_of_its_own(cls, name)
    names = {
        name,
        *direct,
        *(outer for inner in direct for outer in readers_of_its_own(cls, inner)),
    }
    found = reads(*HOMES.get(key.split(".")[0] if section else "", ANYWHERE)).found
    return any((what, name) in found for what in called for name in names)


@pytest.mark.parametrize("key", ASKED)
def test_a_key_has_a_reader(key):
    cls, name = FIELDS[key]
    if key in BY_NAME:
        assert name in reads(BY_NAME[key]).texts
    elif name != "type" and key not in BY_REFUSAL:
        assert is_read(cls, key), f"{key} is accepted, and nothing that {key} is about reads it"


def test_a_planted_key_has_no_reader():
    class Planted(ModelConfig):
        nobody_reads_it: int = 1
        sample_count: int = 1  # read off another section

    assert not is_read(Planted, "model.nobody_reads_it")
    assert not is_read(Planted, "model.sample_count")
    assert is_read(Planted, "model.remat")
