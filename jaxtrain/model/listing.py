"""`jaxtrain models`: the families that train here, read from their tables."""

import json
from collections.abc import Iterable, Iterator

from jaxtrain.model.families import BY_NAME, FAMILIES, Family
from jaxtrain.model.lora import FORMER_MODULES, LINEAR, PARAMETERS
from jaxtrain.recipe.errors import RecipeError, did_you_mean, show

EVERY_FAMILY = """\
All: packing; data, fsdp and tensor meshes; LoRA, DoRA and QLoRA; generation; export.
With experts: an expert mesh.
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
    yield from _modules(family)
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


def _modules(family: Family) -> Iterator[str]:
    """The last parts of the names in transformers, as keys of `peft_config` take them."""
    table, former = family.table(family.in_memory), FORMER_MODULES.get(family.name, {})

    def names(places: Iterable[str], begin: int, end: int | None) -> dict[str, None]:
        found = [tensor.name for place in places for tensor in table.get(place, ())]
        return dict.fromkeys(".".join(name.split(".")[begin:end]) for name in found)

    linear = ", ".join(name for name in names(LINEAR, -2, -1) if name not in former)
    yield f"linear        {linear}"
    if parameters := names(PARAMETERS, -2, None):
        also = f", or as target_modules {', '.join(former)}" if former else ""
        yield f"experts       {', '.join(parameters)}, as target_parameters{also}"
