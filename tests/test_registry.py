import importlib.util
import typing
from typing import Union

import pytest

from jaxtrain import (
    Callback,
    DataSource,
    OptimizerFactory,
    SFTDataFactory,
    SFTTrainer,
    TrainerConfig,
    registry,
)
from jaxtrain.hooks import HasHooks
from jaxtrain.recipe.optimizer import AdamWConfig, OptimizerConfig
from jaxtrain.recipe.resolve import resolve, run_user_code


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (k, n)
        for k, found in registry.BUILT_IN.items()
        for n in found
        if not registry.is_planned(k, n)
    ],
)
def test_a_built_in_entry_is_the_class_and_section_that_it_names(kind, name):
    if name == "snowflake":
        pytest.importorskip("snowflake.snowpark", reason="the extra `snowflake` is not installed")
    cls = registry.find(kind, name)
    assert (cls.kind, cls.name) == (kind, name)
    assert issubclass(registry.config_class(kind, name), typing.get_type_hints(cls)["config"])


@pytest.mark.parametrize("trainer", ["sft", "causal"])
def test_what_a_built_in_trainer_allows_is_what_its_annotations_say(trainer):
    hints = typing.get_type_hints(registry.find("trainer", trainer))
    for section, attribute in registry.SECTIONS.items():
        hint = hints[attribute]
        classes = typing.get_args(hint) or (hint,)
        known = registry.allowed(trainer, section)
        built = [name for name in known if not registry.is_planned(section, name)]
        assert built == [cls.name for cls in classes]


def test_a_class_without_a_name_of_its_own_is_told_the_line():
    with pytest.raises(ValueError, match=r'needs a line `name = "..."` in its class body'):

        class Nameless(OptimizerFactory):
            config: OptimizerConfig


def test_a_taken_name_says_who_has_it_and_force_replaces():
    class Another(OptimizerFactory):
        name = "adamw"
        config: OptimizerConfig

    with pytest.raises(ValueError, match="the optimizer name 'adamw' is taken by jaxtrain"):
        registry.find("optimizer", "adamw")

    class First(OptimizerFactory):
        name = "mine-of-test"
        config: OptimizerConfig

    with pytest.raises(ValueError, match=r"taken by .*test_registry.py:.*First; rename"):

        @registry.register
        class Second(OptimizerFactory):
            name = "mine-of-test"
            config: OptimizerConfig

    assert registry.find("optimizer", "mine-of-test") is First

    @registry.register(force=True)
    class Third(OptimizerFactory):
        name = "mine-of-test"
        config: OptimizerConfig

    assert registry.find("optimizer", "mine-of-test") is Third


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("def loss(self, batch): ...", "define `loss_fn`; `loss(self, batch)` is the PyTorch hook"),
        ("def step(self, batch): ...", "lacks 'state'; it is called as step(self, state, batch)"),
        ("def loss_fn(self, model, rows, key): ...", "lacks 'batch' and demands 'rows'"),
        ("def pre_stp_callback(self): ...", "no event 'pre-stp'; did you mean `pre-step`"),
        ("callbacks = [('before-step', print)]", "no event 'before-step'"),
        (
            "def pre_epoch_callback(self, batch): ...",
            "the pre-epoch callback takes 'batch'; it receives what it names of (self)",
        ),
        (
            "callbacks = [('post-step', lambda self, state, batch: None)]",
            "the post-step callback takes 'batch'; it receives what it names of (self, state)",
        ),
        (
            "def pre_step_callback(self, bacth): ...",
            "takes 'bacth'; did you mean `batch`?; it receives what it names of (self, state, batch)",
        ),
        (
            "def pre_step_callback(self, *, rows): ...",
            "takes 'rows'; it receives what it names of (self, state, batch)",
        ),
        ("def backward(self, loss): ...", "it is called as backward(self, gradients)"),
        (
            "data_factory: AdamWConfig",
            "data_factory must name factories of kind 'data', one or a union, found <class 'jaxtrain",
        ),
        (
            "config: AdamWConfig",
            "config must be TrainerConfig or a subclass, found <class 'jaxtrain",
        ),
    ],
)
def test_a_mistake_is_found_when_the_class_is_made(body, expected):
    source = f"class Mine(SFTTrainer):\n    name = 'mistaken-of-test'\n    {body}\n"
    with pytest.raises(ValueError) as error:
        exec(source, {"SFTTrainer": SFTTrainer, "AdamWConfig": AdamWConfig, "__name__": "user"})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("base", "method", "expected"),
    [
        (DataSource, "load_fn", "load_fn is not called; define `load(config, split)`"),
        (SFTDataFactory, "get_masked_labels", "define `encoder`"),
        (SFTDataFactory, "get_assistant_start_end_indices", "define `encoder`"),
        (SFTDataFactory, "tokenize_messages", "define `encoder`"),
    ],
)
def test_a_method_that_nothing_calls_is_answered_with_what_to_write(base, method, expected):
    with pytest.raises(ValueError) as error:
        type("Mine", (base,), {"name": "retired-of-test", method: lambda self, rows: rows})
    assert str(error.value).startswith("Mine: ") and expected in str(error.value)


def test_a_callback_object_is_told_where_it_belongs():
    with pytest.raises(ValueError, match="a callback is given by `default_callbacks` of a trainer"):

        @registry.register
        class Mine(Callback):
            pass


class One(OptimizerFactory):
    name = "one-of-test"


class Two(OptimizerFactory):
    name = "two-of-test"


def trainer_with(name, **body):
    return type("Mine", (SFTTrainer,), {"name": name, "__module__": "user", **body})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("union-of-test", Union[One, Two]), ("bar-of-test", One | Two)],  # noqa: UP007
)
@pytest.mark.parametrize("older", [False, True])
def test_hints_are_read_in_both_forms_and_under_both_names(name, hint, older):
    """Trap A39."""
    body = (
        {"optimizer_factory_type": hint}
        if older
        else {"__annotations__": {"optimizer_factory": hint}}
    )
    trainer_with(f"{name}-{older}", **body)
    assert registry.allowed(f"{name}-{older}", "optimizer") == ("one-of-test", "two-of-test")
    assert registry.allowed(f"{name}-{older}", "data") == ("sft",)  # a missing hint is inherited


def test_every_older_attribute_is_read_with_a_note_in_the_report():
    class Config(TrainerConfig):
        extra: int = 1

    hints = typing.get_type_hints(SFTTrainer)
    body = {f"{attribute}_type": hints[attribute] for attribute in registry.SECTIONS.values()}
    trainer_with("older-of-test", config_type=Config, **body)
    for section in registry.SECTIONS:
        named = registry.allowed("older-of-test", section)
        assert set(named) <= set(registry.allowed("sft", section)) and named
    recipe = {"type": "older-of-test", "extra": 2, "model": {"name_or_path": "m"}}
    recipe["checkpoint"] = [{"output_dir": "a", "save_end_of_training": True}]
    resolved = resolve(recipe | {"data": {"sources": ["a/b"]}})
    assert resolved.require_config().extra == 2
    notes = set(resolved.report.notes)
    assert "Mine: write `data_factory: …` for `data_factory_type = …`" in notes
    assert len(notes) == len(registry.OLDER)


def test_optional_arguments_may_be_added():
    class Mine(SFTTrainer):
        name = "optional-of-test"

        def loss_fn(self, model, batch, key, scale=1.0):
            return super().loss_fn(model, batch, key)

    assert registry.find("trainer", "optional-of-test") is Mine


def test_the_same_file_twice_is_one_registration(tmp_path):
    file = tmp_path / "twice.py"
    file.write_text(
        "from jaxtrain import OptimizerFactory\n"
        "class Twice(OptimizerFactory):\n"
        "    name = 'twice-of-test'\n"
        "    def create_optimizer(self, model, optimizer_config): ...\n"
    )
    run_user_code(file)
    spec = importlib.util.spec_from_file_location("another_name", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert registry.find("optimizer", "twice-of-test").__module__ == "another_name"


def test_an_unknown_name_lists_the_known_ones_nearest_first():
    with pytest.raises(ValueError, match=r"did you mean `adamw` or `cpu_adam`\? \(known: adamw"):
        registry.find("optimizer", "adamv")


def test_callbacks_receive_what_they_name_and_return_it_in_their_own_order():
    seen = []

    class Own(HasHooks):
        events = {"add": "add"}
        callbacks = [
            ("pre-add", lambda self, b: seen.append(("b", b))),
            ("pre-add", lambda self, b, a: (b + 1, a)),
            ("pre-add", lambda self, a, **more: seen.append((a, more))),
            ("pre-add", lambda self, *values: seen.append(values)),
            ("pre-add", lambda self, *, c: seen.append(("c", c))),
            ("post-add", lambda self, total: total * 10),
            ("post-add", lambda self, **more: seen.append(more)),
        ]

        def add(self, a, b, c=3):
            return a + b + c

    assert Own().add(1, 2) == 70
    assert seen == [("b", 2), (1, {"b": 3, "c": 3}), (1, 3, 3), ("c", 3), {"result": 70}]


def test_a_parents_callback_that_a_class_lists_again_runs_once():
    seen = []

    class Parent(HasHooks):
        events = {"act": "act"}
        callbacks = [("pre-act", lambda self: seen.append("parent"))]

        def act(self):
            seen.append("act")

    class Child(Parent):
        callbacks = [*Parent.callbacks, ("pre-act", lambda self: seen.append("child"))]

    Child().act()
    assert seen == ["parent", "child", "act"]
    with pytest.raises(ValueError, match="takes 'b'; it receives what it names of"):

        class Renamed(HasHooks):
            events = {"act": "act"}

            def act(self, a):
                pass

            def pre_act_callback(self, b):
                pass
