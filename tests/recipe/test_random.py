"""Arbitrary recipes: a config or a RecipeError, never another exception, never a hang."""

import copy
import string

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.cli import cli
from jaxtrain.recipe.check import describe
from jaxtrain.recipe.dump import to_yaml
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.load import map_leaves
from jaxtrain.recipe.resolve import resolve
from jaxtrain.recipe.shipped import FOLDER
from jaxtrain.recipe.trainer import TrainerConfig
from tests.fuzz import at, bounded, damaged, edited, examples, places
from tests.recipe.arctic import ACCEPTED, REFUSED
from tests.runs import recipe as small_recipe

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
        "/x/*.json",
        "x/**.jsonl",
        "~x/y.jsonl",
        "pypi:x",
        "token",
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
QUICK = examples(300, 1000)


def outcome(source, overrides=()):
    """Resolve, and use everything that a command would print of the result."""
    with bounded():
        try:
            resolved = resolve(source, overrides)
        except RecipeError as error:
            assert str(error)
            return
        describe(resolved)
        if resolved.config is not None:
            to_yaml(resolved.config)


@QUICK
@given(st.dictionaries(WORDS, VALUES, max_size=6))
def test_any_map(tree):
    outcome(tree)


@QUICK
@given(st.data())
def test_any_edit_of_a_valid_recipe(data):
    outcome(data.draw(edited(data.draw(st.sampled_from(VALID)), WORDS, VALUES)))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a recipe over files of its own, which `check` looks at."""
    folder = tmp_path_factory.mktemp("here")
    base = small_recipe(
        folder, rows=4, tokenizer={"chat_template": "{{ messages }}"}, mesh={"data": 1}
    )
    base["checkpoint"] = [{"output_dir": str(folder / "out"), "save_every_n_steps": 2}]
    base["eval_samples"] = {"prompts": ["hello"]}
    assert check(folder, yaml.safe_dump(base).encode()).exit_code == 0
    return folder, base


def check(folder, text):
    """`jaxtrain check` of a recipe of this text in a folder."""
    (folder / "recipe.yaml").write_bytes(text)
    with bounded():
        done = CliRunner().invoke(cli, ["check", str(folder / "recipe.yaml")])
    if not isinstance(done.exception, SystemExit | RecipeError | None):
        raise done.exception
    assert done.exit_code == 0 or done.output or str(done.exception)
    return done


@examples(60, 2000)
@given(st.data())
def test_check_of_any_edit(here, data):
    """Of a recipe whose model and data are on this machine, so that they are looked at."""
    folder, base = here
    names = ["rows.jsonl", "model", "model/config.json", "model/tokenizer.json", "recipe.yaml", "*"]
    fitting = st.sampled_from([*names, *(str(folder / name) for name in names), 1, 2, 3, 8, 0.5])
    tree = data.draw(edited(base, WORDS, VALUES | fitting))
    check(folder, yaml.safe_dump(tree).encode("utf-8", "surrogatepass"))


TEXTS = [file.read_bytes() for file in sorted(FOLDER.glob("*.yaml"))] + [
    yaml.safe_dump(tree).encode() for tree in VALID
]


@examples(60, 2000)
@given(st.data())
def test_check_of_any_damage(here, data):
    """To the text of a recipe."""
    folder, base = here
    text = data.draw(st.sampled_from([*TEXTS, yaml.safe_dump(base).encode()]))
    check(folder, data.draw(damaged(text)))


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


OVERRIDES = st.one_of(
    st.text(max_size=20),
    st.builds("{}.{}={}".format, WORDS, WORDS, SCALARS),
    st.builds("{}{}".format, st.sampled_from(["del:", ""]), WORDS),
    st.builds(
        "{}={}".format,
        st.sampled_from(
            ["data.sources.0.type", "checkpoint.0", "mesh.-1", "deepspeed", "base", "."]
        ),
        SCALARS
        | st.sampled_from(["{a: 1}", "[[]]", "&a [*a]", "!!python/name:os.system", "${dir}"]),
    ),
)


@QUICK
@given(st.sampled_from(VALID), st.lists(OVERRIDES, max_size=4))
def test_any_override(recipe, overrides):
    outcome(recipe, overrides)


@QUICK
@given(
    st.lists(st.dictionaries(WORDS | st.just("base"), VALUES, max_size=3), min_size=2, max_size=3),
    st.data(),
)
def test_any_recipes_laid_over_one_another(tmp_path, trees, data):
    files = [tmp_path / f"{n}.yaml" for n in range(len(trees))]
    names = st.sampled_from([file.name for file in files] + ["none.yaml", ".", "\x00", ""])
    for file, tree in zip(files, trees, strict=True):
        base = data.draw(st.none() | names | st.lists(names, max_size=2))
        tree = tree if base is None else tree | {"base": base}
        file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="ignore")
    outcome(files[0])


VARIABLES = st.builds(
    "{}${{env:{}{}}}{}".format,
    st.text("a: [", max_size=2),
    st.sampled_from(["RANDOM_VALUE", "NONE_SUCH", "é", ""]),
    st.sampled_from(["", ":", ":1", ":{}", ":${dir}"]),
    st.text("}$", max_size=2),
)


@QUICK
@given(st.data(), st.text(max_size=12).filter(lambda text: "\0" not in text), VARIABLES)
def test_any_variable(data, value, written):
    tree = copy.deepcopy(data.draw(st.sampled_from(VALID)))
    leaves = [p for p in places(tree) if p and not isinstance(at(tree, p), dict | list)]
    *parents, last = data.draw(st.sampled_from(leaves))
    at(tree, parents)[last] = written
    try:
        value.encode()
    except UnicodeEncodeError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANDOM_VALUE", value)
        outcome(tree)


TAGS = [
    "!!python/object/apply:os.system",
    "!!python/name:os.system",
    "!!python/object/new:os.system",
    "!x",
    "!!set",
    "!!omap",
    "!!binary",
]


@QUICK
@given(
    st.sampled_from(TAGS), st.sampled_from(["[touch {}]", "'touch {}'", "{{a: touch {}}}"]), WORDS
)
def test_no_tag_runs_code(tmp_path, tag, argument, key):
    marker = tmp_path / "was-run"
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"{yaml.safe_dump(key).strip().removesuffix('...')}: {tag} {argument.format(marker)}\n",
        errors="ignore",
    )
    outcome(file)
    assert not marker.exists()


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


def test_an_integer_that_cannot_be_written_out_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"seed: 1\na: [0x{'f' * 9000}]\n")
    for source in (tmp_path / "recipe.yaml", {"seed": 1, "a": [16**9000 - 1]}):
        with pytest.raises(RecipeError, match=r"a\.0: a number of 36000 bits is too large"):
            resolve(source).require_config()


PATHS = {
    "model.name_or_path": {"model": {"name_or_path": "{}"}},
    "tokenizer.chat_template": {"tokenizer": {"name_or_path": "{}", "chat_template": "{}"}},
    "data.sources": {"data": {"sources": ["{}", {"type": "jsonl", "path": ["{}", "{}/*"]}]}},
    "data.cache_dir": {"data": {"sources": ["a/b"], "cache_dir": "{}"}},
    "checkpoint": {"checkpoint": [{"output_dir": "{}", "resume_from": "{}"}]},
    "run_dir": {"run_dir": "{}", "logger": {"output_dir": "{}"}, "train_log_metrics_path": "{}"},
    "kill_switch_path": {"kill_switch_path": "{}"},
    "code": {"code": "{}"},
    "base": {"base": "{}"},
    "eval_samples": {"eval_samples": {"prompts": "{}"}},
}


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    "path",
    ["~nobody-of-this-name/x.jsonl", "/no/such/*.jsonl", "x\0y", "a" * 300, "**x[", "//"],
    ids=["user", "glob", "zero", "long", "pattern", "root"],
)
def test_any_text_may_stand_for_a_path(key, path):
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}} | PATHS[key]
    outcome(map_leaves(recipe, lambda text, _: text.replace("{}", path)))


def test_a_megabyte_is_refused_at_once(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("a: [" + "1, " * 400_000 + "]")
    with pytest.raises(RecipeError, match="a recipe has at most 1000000"):
        resolve(file)
    (tmp_path / "small.yaml").write_text("base: recipe.yaml")
    with pytest.raises(RecipeError, match="a recipe has at most 1000000"):
        resolve(tmp_path / "small.yaml")
