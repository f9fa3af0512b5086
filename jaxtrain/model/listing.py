"""`jaxtrain models`: the families that train here, read from their tables."""

import json
from collections.abc import Iterable, Iterator
from textwrap import wrap

from jaxtrain.model.families import BY_NAME, FAMILIES, Family
from jaxtrain.model.lora import FORMER_MODULES, LINEAR, PARAMETERS
from jaxtrain.recipe.errors import RecipeError, did_you_mean, show

EVERY_FAMILY = """\
All: packing, LoRA, DoRA, QLoRA, generation, export; data, fsdp, tensor meshes.
experts: an expert mesh. Others: a pipeline, of one repeating pattern of layers.
linear: layers of linear attention or convolutions. Others: a context mesh.
multimodal: the text part trains; the rest is exported as it was."""
COLUMNS = 80


def list_families() -> Iterator[str]:
    """A line for each family, by the `model_type` of its config.json."""
    yield f"{'model_type':16} architecture"
    for family in FAMILIES:
        yield f"{family.name:16} {family.architecture}{_note(family)}"
    yield EVERY_FAMILY


def describe_family(name: str) -> Iterator[str]:
    """What is known of the family of this model_type or architecture; RecipeError for an unknown
    name."""
    family = next((f for f in FAMILIES if name in (f.name, f.architecture)), None)
    if family is None:
        raise RecipeError(
            f"no family is called {show(name)}{did_you_mean(name, BY_NAME)}; `jaxtrain models` "
            "lists them"
        )
    yield f"model_type    {family.name}"
    yield f"architecture  {family.architecture}{_note(family)}"
    for line in _modules(family):
        yield from wrap(line, COLUMNS, subsequent_indent=" " * 14)
    for field, values in sorted(family.only.items()):
        read = family.quantizations if field == "quantization_config" else ()
        allowed = [*map(json.dumps, values), *(f"quant_method {kind}" for kind in read)]
        yield f"only with     {field}: {' or '.join(allowed)}"


def _note(family: Family) -> str:
    notes = {
        "experts": _has_experts(family),
        "linear": any(path.startswith("mixer/") for path in family.tensors),
        "multimodal": family.carried is not None,
    }
    found = ", ".join(note for note, holds in notes.items() if holds)
    return f"  {found}" if found else ""


def _has_experts(family: Family) -> bool:
    return any(path.endswith("/router") for path in family.tensors)


def _modules(family: Family) -> Iterator[str]:
    """What may have adapters, as keys of `peft_config` take it."""
    former = FORMER_MODULES.get(family.name, {})
    yield f"linear        {', '.join(linear_modules(family))}"
    if parameters := _names(family, PARAMETERS, -2, None):
        also = f", or as target_modules {', '.join(former)}" if former else ""
        yield f"experts       {', '.join(parameters)}, as target_parameters{also}"


def linear_modules(family: Family) -> list[str]:
    """The last parts of the names in transformers of all that a model of the family may have."""
    former = FORMER_MODULES.get(family.name, {})
    return [name for name in _names(family, LINEAR, -2, -1) if name not in former]


def _names(family: Family, places: Iterable[str], begin: int, end: int | None) -> list[str]:
    table = family.table(family.in_memory)
    found = [tensor.name for place in places for tensor in table.get(place, ())]
    return list(dict.fromkeys(".".join(name.split(".")[begin:end]) for name in found))
