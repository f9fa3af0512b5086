import importlib.util
import typing

import pytest

from jaxtrain import OptimizerFactory, SFTTrainer, registry
from jaxtrain.recipe.optimizer import OptimizerConfig
from jaxtrain.recipe.resolve import run_user_code


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k, found in registry.BUILT_IN.items() for n in found if not found[n].is_planned],
)
def test_a_built_in_entry_is_the_class_and_section_that_it_names(kind, name):
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
    ],
)
def test_a_mistake_is_found_when_the_class_is_made(body, expected):
    source = f"class Mine(SFTTrainer):\n    name = 'mistaken-of-test'\n    {body}\n"
    with pytest.raises(ValueError) as error:
        exec(source, {"SFTTrainer": SFTTrainer, "__name__": "user"})
    assert expected in str(error.value)


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
    with pytest.raises(ValueError, match=r"did you mean `adamw`\? \(known: adamw"):
        registry.find("optimizer", "adamv")
