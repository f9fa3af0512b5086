"""Whether a run may go on with the state of another: what has changed between their recipes."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxtrain.recipe.dump import find_differences
from jaxtrain.recipe.errors import Fault, RecipeError, show

RESET = {"optimizer": ("optimizer",), "data": ("data", "global_batch")}
"""Part that is not restored → what may differ then."""


def refuse_changes(trainer: Any, saved: dict[str, Any], path: Path, reset: Collection[str]) -> None:
    """Say what has changed; RecipeError for what the state does not fit, unless it is allowed by
    name or its part is reset."""
    before, now = saved["lineage"], json.loads(json.dumps(trainer.compatibility))
    known = sorted({*before, *now})
    freed = [name for part in reset for name in RESET.get(part, ())]
    allowed = (*trainer.allowed_changes, *freed)
    faults = [
        Fault(key, f"is {show(now.get(key))}, {path} has {show(before.get(key))}; a run cannot "
              f"be continued with another, --allow-change {key} does it all the same")
        for key in known
        if before.get(key) != now.get(key) and not any(_covers(name, key) for name in allowed)
    ]  # fmt: skip
    for name in trainer.allowed_changes:
        if not any(_covers(name, key) for key in known):
            faults.append(Fault("--allow-change", f"{name!r} is none of {', '.join(known)}"))
    if faults:
        raise RecipeError(faults)
    if changed := find_differences(saved["recipe"], trainer.metadata["recipe"]):
        trainer.console.line(f"changed since {path.name}: {', '.join(changed)}")


def _covers(name: str, key: str) -> bool:
    """Is the key the one named, or in the section named?"""
    return key == name or key.startswith(f"{name}.")
