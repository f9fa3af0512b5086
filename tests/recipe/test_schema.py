"""Schema and pages: current, complete, and true of the recipes that ship."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxtrain import registry
from jaxtrain.recipe import shipped
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config
from jaxtrain.recipe.schema import HEADER, json_schema, reference
from tests.recipe.arctic import ACCEPTED, SMALL

ROOT = Path(__file__).parents[2]


def test_the_reference_page_is_current():
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert page == reference(), "run: jaxtrain schema --markdown > docs/recipe.md"


def test_the_page_has_a_meaning_for_every_key_and_an_example_for_every_section():
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert not [row for row in rows if row.rstrip(" |") != row[: -len(" |")]]
    parts = re.split(r"^##+ ", reference(), flags=re.M)[1:]
    titles = {title for title in re.findall(r"^##+ `([a-z_.]+)`", reference(), re.M)}
    assert {re.match(r"`([a-z_.]+)`|", p)[1] or "" for p in parts if "```yaml" in p} >= titles - {
        "model.peft_config", "optimizer.groups",  # one is not supported, one is in its section's
    }  # fmt: skip


def allows(schema, value, definitions):
    """Does a part of the schema admit a value? As far as the schema goes in keys and choices."""
    if "$ref" in schema:
        return allows(definitions[schema["$ref"].rpartition("/")[2]], value, definitions)
    if "anyOf" in schema:
        return any(allows(choice, value, definitions) for choice in schema["anyOf"])
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {
        "object": dict,
        "array": list | tuple,
        "string": str,
        "boolean": bool,
        "null": type(None),
        "integer": int,
        "number": int | float,
    }
    kind = schema.get("type")
    names = [kind] if isinstance(kind, str) else kind
    if names and not any(isinstance(value, kinds[name]) for name in names):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return set(schema.get("required", ())) <= set(value) and all(
            key in known and allows(known[key], inner, definitions) for key, inner in value.items()
        )
    if isinstance(value, list) and "items" in schema:
        return all(allows(schema["items"], item, definitions) for item in value)
    return True


@pytest.mark.parametrize("name", shipped.list_names())
def test_a_shipped_recipe_fits_the_schema_and_no_typo_does(name):
    file = ROOT / "recipes" / f"{name}.yaml"
    schema = json_schema(file)
    written = yaml.safe_load(file.read_text())
    assert allows(schema, written, schema["$defs"])
    assert not allows(schema, written | {"epoch": 1}, schema["$defs"])
    assert not allows(schema, written | {"optimizer": {"learning_rat": 1}}, schema["$defs"])
    assert file.read_text().startswith(HEADER)


FORMS = {
    "a switch for a section": {"tensorboard": True},
    "a file for a list": {"eval_samples": {"prompts": "prompts.txt"}},
    "a number as text": {"micro_batch_size": "2^3", "optimizer": {"lr": "1e-5"}},
    "a list of recipes": {"base": ["a.yaml", "b.yaml"]},
    "named sets": {"data": {"sources": "a/b", "eval_sources": {"x": ["c/d"]}}},
    "a dtype by another name": {"model": {"name_or_path": "m", "param_dtype": "torch.float32"}},
}


@pytest.mark.parametrize("recipe", [*ACCEPTED.values(), *FORMS.values()], ids=[*ACCEPTED, *FORMS])
def test_what_is_accepted_fits_the_schema(recipe):
    schema = json_schema()
    written = json.loads(json.dumps({"model": {"name_or_path": "m"}} | SMALL | recipe))
    assert allows(schema, written, schema["$defs"])


def test_the_schema_has_the_keys_of_user_code(tmp_path):
    (tmp_path / "own.py").write_text(
        "from jaxtrain import SFTTrainer, TrainerConfig\n"
        "class OwnConfig(TrainerConfig):\n"
        "    own_key_of_test_schema: int = 1\n"
        "class Own(SFTTrainer):\n"
        "    name = 'own-of-test-schema'\n"
        "    config: OwnConfig\n"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text("type: own-of-test-schema\ncode: own.py\n")
    keys = json_schema(file)["$defs"]["trainer.own-of-test-schema"]["properties"]
    assert "own_key_of_test_schema" in keys and "epochs" in keys


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_user", {})  # another test runs the file where it lies
    assert all(name in shipped.format_list() for name in shipped.list_names())
    files = shipped.copy_recipe("quickstart", tmp_path)
    assert {file.name for file in files} == {
        "quickstart.yaml",
        "chitchat.py",
        "jaxtrain.schema.json",
    }
    assert get_config(tmp_path / "quickstart.yaml").type == "sft"
    assert json.loads((tmp_path / "jaxtrain.schema.json").read_text())["anyOf"]
    shipped.copy_recipe("focal", tmp_path)  # the schema beside it knows its keys
    schema = json.loads((tmp_path / "jaxtrain.schema.json").read_text())
    assert "gamma" in schema["$defs"]["trainer.focal"]["properties"]
    with pytest.raises(RecipeError, match="exists already"):
        shipped.copy_recipe("quickstart", tmp_path)
    (tmp_path / "file.yaml").write_text("")
    with pytest.raises(RecipeError, match="inside: .*; name another folder"):
        shipped.copy_recipe("quickstart", tmp_path / "file.yaml" / "inside")
    with pytest.raises(RecipeError, match="did you mean `quickstart`"):
        shipped.read_recipe("quickstrt")


def test_a_wheel_holds_the_recipes(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jaxtrain", source / "jaxtrain", symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "recipes", source / "recipes", ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [
        sys.executable,
        "-c",
        "from setuptools import setup; setup()",
        "-q",
        "build",
        "--build-lib",
    ]
    subprocess.run([*build, str(tmp_path / "lib")], cwd=source, check=True, capture_output=True)
    built = {file.name for file in (tmp_path / "lib" / "jaxtrain" / "recipes").iterdir()}
    assert {f"{name}.yaml" for name in shipped.list_names()} | {"chitchat.py"} <= built
