"""`jaxtrain models`: the families that train here, read from their tables."""

import json
from collections.abc import Iterator

from jaxtrain.model.families import BY_NAME, FAMILIES, Family
from jaxtrain.model.lora import BEFORE, LINEAR
from jaxtrain.recipe.errors import RecipeError, did_you_mean, show

EVERY_FAMILY = """\
All: packing; data, fsdp and tensor meshes; LoRA, DoRA and QLoRA; generation; export.
With experts: an expert mesh; no adapters on experts.
Without: a pipeline, where the stack is one repeating pattern of layers."""


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
    yield f"linear        {_linear_modules(family)}"
    for field, values in sorted(family.only.items()):
        yield f"only with     {field}: {' or '.join(map(json.dumps, values))}"


def _note(family: Family) -> str:
    notes = {
        "experts": _has_experts(family),
        "the text part; the rest is exported as it was": family.carried is not None,
    }
    return "".join(f"  {note}" for note, holds in notes.items() if holds)


def _has_experts(family: Family) -> bool:
    return any(path.endswith("/router") for path in family.tensors)


def _linear_modules(family: Family) -> str:
    """The last parts of their names in transformers, as `target_modules` takes them."""

    def names(*parts: str) -> str:
        paths = [path for path in (*LINEAR, BEFORE) if path.startswith(parts)]
        weights = [tensor.name for path in paths for tensor in family.tensors.get(path, ())]
        return ", ".join(dict.fromkeys(name.split(".")[-2] for name in weights))

    where = "; where a layer has no experts " if "mlp/router" in family.tensors else ", "
    rest = names("layer_input")
    return names("attention/", "mixer/") + where + names("mlp/") + (f", {rest}" if rest else "")
