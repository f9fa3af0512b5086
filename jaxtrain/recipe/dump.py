"""The effective recipe: with every default filled in, it can be run again."""

import hashlib
import json
from typing import Any

import yaml

from jaxtrain.recipe.secrets import restore_variables
from jaxtrain.recipe.section import get_value
from jaxtrain.recipe.trainer import TrainerConfig


def to_dict(config: TrainerConfig) -> dict[str, Any]:
    """Plain data of a config, without the keys that are None, and with variables in place of what
    came from the environment."""
    plain = config.model_dump(mode="json", exclude_none=True)
    return restore_variables(plain, config.secrets)


def to_yaml(config: TrainerConfig) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def recipe_hash(config: TrainerConfig) -> str:
    """Eight hex digits of every key but `run_dir`."""
    tree = config.model_dump(mode="json", exclude_none=True, exclude={"run_dir"})
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]


def compatibility(config: TrainerConfig, *, global_batch: int) -> dict[str, Any]:
    """What a checkpoint and a run that resumes from it must agree in: model, batches, optimizer."""
    tree = to_dict(config)
    keys = ["type", "model.name_or_path", "model.hf_config_kwargs", "model.param_dtype"]
    keys += ["model.peft_config", "model.quantization"]
    keys += ["tokenizer", "optimizer.type", "seed", "min_iterations", "overfit_first_batch"]
    keys += [f"data.{key}" for key in tree["data"] if key not in config.data.CHANGES_NO_BATCH]
    return {key: get_value(tree, key) for key in keys} | {"global_batch": global_batch}


def find_differences(a: Any, b: Any, key: str = "") -> list[str]:
    """Dotted keys in which two recipes differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [key]
    return [
        found
        for name in sorted(a.keys() | b.keys())
        for found in find_differences(a.get(name), b.get(name), f"{key}.{name}".lstrip("."))
    ]
