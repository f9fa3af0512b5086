"""Whether a run may resume from the state of another: what has changed between their recipes."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.recipe.dump import find_differences
from jaxtrain.recipe.errors import Fault, RecipeError, show

DIGEST, BATCH = "data.digest", "global_batch"
RESET = {"optimizer": ("optimizer",), "data": ("data", BATCH)}
"""Part that is not restored → what may differ then."""


class Identity(NamedTuple):
    """What a run is compared by with the one that it resumes."""

    compatibility: dict[str, Any]
    """Key → value: what both must agree in."""
    recipe: dict[str, Any]
    allowed_changes: Sequence[str]
    """Keys that may differ all the same."""


def refuse_changes(
    run: Identity, saved: dict[str, Any], path: Path, reset: Collection[str]
) -> list[str]:
    """Dotted keys of the recipe that have changed; RecipeError for what the state does not fit,
    unless it is allowed by name or its part is reset."""
    before, now = saved["lineage"], json.loads(json.dumps(run.compatibility))
    known = sorted({*before, *now})
    differing = [key for key in known if before.get(key) != now.get(key)]
    # What the data holds says something only where the recipe says the same, and is not known of
    # older checkpoints.
    if differing != [DIGEST] or DIGEST not in before:
        differing = [key for key in differing if key != DIGEST]
    freed = [name for part in reset for name in RESET.get(part, ())]
    allowed = (*run.allowed_changes, *freed)
    faults = []
    for key in differing:
        if any(_covers(name, key) for name in allowed):
            continue
        help = f"a run cannot be continued with another, --allow-change {key} does it all the same"
        if key == BATCH:
            help = (
                "micro_batch_size and gradient_accumulation_steps can keep it on other devices, "
                f"--allow-change {key} continues at the same sequence with steps of another size"
            )
        faults.append(
            Fault(key, f"is {show(now.get(key))}, {path} has {show(before.get(key))}; {help}")
        )
    for name in run.allowed_changes:
        if not any(_covers(name, key) for key in known):
            faults.append(Fault("--allow-change", f"{name!r} is none of {', '.join(known)}"))
    if faults:
        raise RecipeError(faults)
    found = find_differences(saved["recipe"], run.recipe)
    return found + [key for key in differing if key == BATCH]  # no key of a recipe


def _covers(name: str, key: str) -> bool:
    """Is the key the one named, or in the section named?"""
    return key == name or key.startswith(f"{name}.")
