"""`jaxtrain models`: the families that train here, read from their tables."""

import json
from collections.abc import Iterator

from jaxtrain.model.families import BY_NAME, FAMILIES, Family
from jaxtrain.recipe.errors import RecipeError, did_you_mean, show

LINEAR = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
EVERY_FAMILY = "every family: packing; data, fsdp, tensor and pipeline meshes; generation; export"


def list_families() -> Iterator[str]:
    """A line for each family, by the `model_type` of its config.json."""
    yield f"{'model_type':18} architecture"
    for family in FAMILIES:
        yield f"{family.name:18} {family.architecture}{_note(family)}"
    yield EVERY_FAMILY


def describe_family(name: str) -> Iterator[str]:
    """What is known of one family; RecipeError for an unknown name."""
    if name not in BY_NAME:
        raise RecipeError(f"no family is called {show(name)}{did_you_mean(name, BY_NAME)}")
    family = BY_NAME[name]
    yield f"model_type    {name}"
    yield f"architecture  {family.architecture}{_note(family)}"
    yield f"linear layers {', '.join(_linear_modules(family))}"
    for field, values in sorted(family.only.items()):
        yield f"only with     {field}: {' or '.join(map(json.dumps, values))}"


def _note(family: Family) -> str:
    return "  the text part; the rest is exported as it was" if family.carried else ""


def _linear_modules(family: Family) -> list[str]:
    """The last parts of their names in transformers, as `target_modules` takes them."""
    weights = [tensor.name for path in LINEAR for tensor in family.tensors.get(path, ())]
    return list(dict.fromkeys(name.split(".")[-2] for name in weights))
