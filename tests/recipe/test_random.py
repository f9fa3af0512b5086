"""Arbitrary recipes: a config or a RecipeError, never another exception, never a hang."""

import copy
import string
from datetime import timedelta

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.recipe.check import told
from jaxtrain.recipe.dump import to_yaml
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import resolve
from jaxtrain.recipe.trainer import TrainerConfig
from tests.recipe.arctic import ACCEPTED, REFUSED

VALID = [*ACCEPTED.values(), *(recipe for recipe, _ in REFUSED.values())]
WORDS = st.sampled_from(
    [
        *TrainerConfig.model_fields,
        "lr",
        "type",
        "name_or_path",
        "sources",
        "stage",
        "enabled",
        "auto",
        "${dir}",
        "${env:HOME}",
        "${env:NONE_SUCH}",
        "${env:NONE_SUCH:1}",
        "sft",
        "dpo",
        "1K",
        "10%",
        "2^10",
        "9^9^9",
        "9^999999999",
        "1e999",
        "nan",
        "~",
        "\x00",
        "../x",
        "a/b:train[:3]",
        "*",
        "[",
        "é",
        "on",
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), WORDS, st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=8,
)
QUICK = settings(
    max_examples=300,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(source, overrides=()):
    """Resolve, and use everything that a command would print of the result."""
    try:
        resolved = resolve(source, overrides)
    except RecipeError as error:
        assert str(error)
        return
    told(resolved)
    if resolved.config is not None:
        to_yaml(resolved.config)


def places(tree, key=()):
    yield key
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for name, inner in items:
        yield from places(inner, (*key, name))


@QUICK
@given(st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_map(tree):
    outcome(tree)


@QUICK
@given(st.data())
def test_any_edit_of_a_valid_recipe(data):
    tree = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from([p for p in places(tree) if p] or [("x",)]))
        here = tree
        for part in parents:
            here = here[part]
        if data.draw(st.booleans()) and isinstance(here, dict):
            here[data.draw(WORDS)] = data.draw(VALUES)
        else:
            here[last] = data.draw(VALUES)
    outcome(tree)


@QUICK
@given(st.text(max_size=300) | st.text(string.punctuation + " \nab01", max_size=120))
def test_any_text(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    outcome(file)


@QUICK
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    outcome(file)


@QUICK
@given(st.dictionaries(WORDS, VALUES, max_size=4))
def test_any_yaml(tmp_path, tree):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="ignore")
    outcome(file)


@QUICK
@given(
    st.lists(st.text(max_size=20) | st.builds("{}.{}={}".format, WORDS, WORDS, SCALARS), max_size=3)
)
def test_any_override(overrides):
    outcome(ACCEPTED["zero 2"], overrides)


def test_a_recipe_a_thousand_levels_deep_is_refused(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: " + "[" * 5000 + "]" * 5000)
    outcome(file)
    tree = leaf = {}
    for _ in range(5000):
        leaf["a"] = leaf = {}
    outcome(tree)
    loop = {"model": {}}
    loop["model"]["model"] = loop
    outcome(loop)


def test_a_faulty_entry_does_not_end_the_search_for_other_faults():
    for entry in (False, 3, None, [True], "x\0y"):
        held_out = {"sources": ["a/b"], "eval_sources": [entry]}
        outcome(ACCEPTED["zero 2"] | {"data": held_out, "eval_interval": 5})


def test_enormous_numbers_end_at_once():
    huge = {"micro_batch_size": 2**61 - 1, "pipeline": {"microbatches": 7}, "mesh": {"pipeline": 2}}
    outcome(ACCEPTED["zero 2"] | huge)
    outcome(ACCEPTED["zero 2"] | {"train_iters": "9^999999999", "epochs": 10**400})
    outcome(ACCEPTED["zero 2"] | {"mesh": {"tensor": 10**30}, "optimizer": {"lr": 10**400}})


def test_a_megabyte_is_refused_at_once(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: [" + "1, " * 400_000 + "]")
    try:
        resolve(file)
    except RecipeError as error:
        assert "a recipe has at most 1000000" in str(error)
    else:
        raise AssertionError("a recipe of more than a megabyte was read")
