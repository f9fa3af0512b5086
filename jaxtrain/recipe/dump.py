"""The effective recipe: every default filled in, fit to be run again."""

import hashlib
import json
from typing import Any

import yaml

from jaxtrain.recipe.mapping import value_at
from jaxtrain.recipe.secrets import restore_variables
from jaxtrain.recipe.trainer import TrainerConfig


def to_dict(config: TrainerConfig) -> dict[str, Any]:
    """Plain data of a config; keys that were left out and have no default stay out, and what came
    from the environment is a variable again."""
    return restore_variables(_plain(config), config.secrets)


def _plain(config: TrainerConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude_none=True)


def to_yaml(config: TrainerConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def recipe_hash(config: TrainerConfig) -> str:
    """Eight hex digits that differ between recipes that differ in any key but `run_dir`."""
    tree = {key: value for key, value in _plain(config).items() if key != "run_dir"}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def compatibility(config: TrainerConfig, *, global_batch: int) -> dict[str, Any]:
    """What must be equal for one run to continue another's state: the model, the rows and their
    order, the kind of optimizer."""
    tree = to_dict(config)
    keys = ["type", "model.name_or_path", "model.hf_config_kwargs", "model.param_dtype"]
    keys += ["tokenizer", "optimizer.type", "seed", "min_iterations", "overfit_first_batch"]
    keys += [f"data.{key}" for key in tree["data"] if key not in config.data.CHANGES_NO_BATCH]
    return {key: value_at(tree, key) for key in keys} | {"global_batch": global_batch}


def find_differences(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys in which two recipes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            found
            for name in sorted(a.keys() | b.keys())
            for found in find_differences(
                a.get(name), b.get(name), f"{key}.{name}" if key else name
            )
        ]
    return [] if a == b else [key]
