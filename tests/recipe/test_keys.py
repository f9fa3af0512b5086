"""Every key of a recipe does what its field says: a test sees its effect (`@pytest.mark.covers`),
or it has none, is refused, or stands for another key."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from pydantic import BaseModel

from jaxtrain import registry
from jaxtrain.recipe.dump import find_differences, to_dict
from jaxtrain.recipe.resolve import resolve
from jaxtrain.recipe.section import (
    NotSupported,
    Support,
    find_marker,
    get_value,
    refusal_reason,
    sections_in,
)

TESTS = Path(__file__).parents[1]
BASE = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
HELD_OUT = {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}
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
SUPPORT = {key: find_marker(cls, name, Support) or Support() for key, (cls, name) in FIELDS.items()}
UNSUPPORTED = {
    key: marker
    for key, (cls, name) in FIELDS.items()
    if (marker := find_marker(cls, name, NotSupported))
}
REFUSED = {key for key, (cls, name) in FIELDS.items() if refusal_reason(cls.model_fields[name])}
"""Keys that may only be off."""
NO_EFFECT = {key: support.how for key, support in SUPPORT.items() if support.word == "no effect"}
SETS = [(key, support.sets) for key, support in SUPPORT.items() if support.sets]
EQUALS = [(key, support.equals) for key, support in SUPPORT.items() if support.equals]


def needs_a_test(key: str) -> bool:
    """Whether the key changes a run."""
    cls, name = FIELDS[key]
    parts = key.split(".")
    around = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    elsewhere = {key for key, _ in (*SETS, *EQUALS)}
    is_section = sections_in(cls.model_fields[name].annotation)
    return not (is_section or around & {*UNSUPPORTED} or key in REFUSED | elsewhere | {*NO_EFFECT})


def covered() -> set[str]:
    """Keys that the marker on some test names."""
    found = set()
    for file in TESTS.rglob("test_*.py"):
        for arguments in re.findall(
            r"^@pytest\.mark\.covers\((.*?)\)", file.read_text(), re.S | re.M
        ):
            found |= {*" ".join(re.findall(r'"([^"]+)"', arguments)).split()}
    return found


def test_every_key_is_covered_by_a_test():
    missing = sorted(filter(needs_a_test, {*FIELDS} - covered()))
    assert not missing, f"mark the test that sees the effect with @pytest.mark.covers: {missing}"
    assert covered() <= {*FIELDS}, covered() - {*FIELDS}


@pytest.mark.covers("skip_validation")
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
    (line,) = [line for line in resolved.report.lines if line.key == key]
    assert (line.word, line.reason) == ("no effect", NO_EFFECT[key])
    section = key.startswith("deepspeed.zero_optimization.")  # without a stage it is one of its own
    plain = resolve(nested("deepspeed.zero_optimization", {}) if section else BASE)
    if key.startswith("model.peft_config."):
        plain = resolve(nested("model.peft_config.peft_type", "Lora"))
    without, with_it = (flat(to_dict(r.require_config())) for r in (plain, resolved))
    changed = {k for k in {*without, *with_it} if without.get(k) != with_it.get(k)}
    assert changed <= {key, "run_dir"}, "it changes another key"


def test_a_key_of_a_source_without_effect_says_why(monkeypatch):
    monkeypatch.setattr(metadata, "distribution", lambda name: None)  # every extra is installed
    source = {"type": "snowflake", "table_name": "t"}
    plain, sized = (
        resolve(BASE | {"data": {"sources": [source | more]}}) for more in ({}, {"batch_size": 7})
    )
    found = {line.key: line.reason for line in sized.report.lines if line.word == "no effect"}
    assert found == {"data.sources.0.batch_size": NO_EFFECT["data.sources.*.batch_size"]}
    changed = find_differences(to_dict(plain.require_config()), to_dict(sized.require_config()))
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


@pytest.mark.parametrize(("key", "target"), SETS)
def test_a_key_with_another_name_sets_the_other_and_may_not_contradict_it(key, target):
    value = True if target.endswith(("offload", "enable")) else 4
    if target == "tensorboard.enable":
        pytest.importorskip("tensorboardX")
    resolved = resolve(nested(key, value))
    if target in UNSUPPORTED:
        assert [fault.key for fault in resolved.faults] == [key]
    else:
        assert get_value(resolved.require_config(), target) == value
        assert needs_a_test(target)
    twice = nested(key, value)
    here = twice
    *parents, last = target.split(".")
    for part in parents:
        here = here.setdefault(part, {})
    here[last] = False if value is True else 2
    (fault,) = [f for f in resolve(twice).faults if "contradicts" in f.what]
    assert fault.key == key and f"contradicts {target} " in fault.what


@pytest.mark.parametrize(("key", "target"), EQUALS)
def test_a44_a_computed_key_must_be_what_it_comes_to(key, target):
    """Trap A44."""
    assert resolve(nested(key, 1)).faults == ()
    (fault,) = resolve(nested(key, 4)).faults
    assert (fault.key, fault.what) == (key, f"must equal {target} 1, found 4; remove it")


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


# What is not supported yet.

EXAMPLES = {
    "pipeline.schedule": ("1f1b", "'1f1b'"),
    "pipeline.split": ([1, 2], "(1, 2)"),
    "deepspeed.zero_optimization.offload_optimizer.device": ("nvme", "'nvme'"),
    "deepspeed.zero_optimization.offload_param.device": ("nvme", "'nvme'"),
    "deepspeed.data_types.grad_accum_dtype": ("bf16", "'bf16'"),
}
"""Key → a value that is refused, and what the message shows of it, where that is not true."""


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(key):
    value, found = EXAMPLES.get(key, (True, "true"))
    faults = resolve(nested(key, value)).faults
    (fault,) = (fault for fault in faults if "pip install" not in fault.what)
    assert ".".join("*" if part.isdigit() else part for part in fault.key.split(".")) == key
    assert fault.what == f"not supported yet, found {found}; {UNSUPPORTED[key].instead}"


BOOKS = {"type": "ProjectGutenbergSFT", "name_or_path": "a/b"}


@pytest.mark.parametrize(
    ("change", "key", "what"),
    [
        ({"type": "dpo"}, "type", "'dpo' is not supported yet; supported: sft, causal"),
        ({"data": {"sources": [BOOKS]}}, "data.sources.0.type", "'ProjectGutenbergSFT' is not"),
        (
            {"data": {"sources": ["a/b"], "eval_sources": [BOOKS]}, "eval_interval": 1},
            "data.eval_sources.0.type",
            "'ProjectGutenbergSFT' is not supported yet; supported: huggingface, ",
        ),
        (
            {"data": {"sources": ["a/b"], "eval_sources": {"x": [BOOKS]}}, "eval_interval": 1},
            "data.eval_sources.x.0.type",
            "'ProjectGutenbergSFT' is not supported yet",
        ),
    ],
)
def test_the_key_that_was_written_is_named(change, key, what):
    faults = resolve(BASE | change).faults
    (fault,) = (fault for fault in faults if "pip install" not in fault.what)
    assert fault.key == key and fault.what.startswith(what)
    assert resolve(BASE).faults == ()


@pytest.mark.parametrize("kind", ["trainer", "optimizer"])
def test_a_planned_class_cannot_be_had(kind):
    for name in filter(lambda name: registry.is_planned(kind, name), registry.names(kind)):
        with pytest.raises(ValueError, match="is not supported yet"):
            registry.find(kind, name)
