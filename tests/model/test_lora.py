"""LoRA against the `peft` package: which modules get adapters, their first values, logits, folders
in both directions."""

import json
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.batch import Batch
from jaxtrain.model import HFModelFactory
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, init_params
from jaxtrain.model.factory import LanguageModel
from jaxtrain.model.lora import find_adapters, init_adapters, join, merge_weights, take_adapters
from jaxtrain.model.peft_folder import checksum, list_parts
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig, PeftConfig
from tests.model.tiny_models import describe_model, hf_config, hf_model, on_one_device, torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields):
    return PeftConfig.model_validate({"peft_type": "Lora", **fields})


FAMILIES = ("llama31", "qwen2-windows", "gemma3", "gemma3-whole", "phi3", "gpt2", "gpt-neox")
SPELLINGS = {
    "default": {},
    "all": {"target_modules": "all-linear"},
    "ALL": {"target_modules": "All-Linear"},
    "names": {"target_modules": ["o_proj", "dense", "c_fc", "down_proj", "qkv_proj"]},
    "regex": {"target_modules": r".*\.(0|2)\.(self_attn|attn|attention)\..*(proj|attn|dense)"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "c_fc", "dense"]},
    "excluded regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["o_proj", "c_proj", "dense"], "layers_to_transform": [0, 2]},
    "layer": {"target_modules": ["down_proj", "dense_h_to_4h", "c_fc"], "layers_to_transform": 1},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.1\..*": 2, "o_proj": 5, "dense": 3, "c_proj": 1},
        "alpha_pattern": {"down_proj": 3, "attn.c_proj": 5, "dense": 7},
        "use_rslora": True,
    },
    "saved": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
}
NO_DEFAULT = ("gemma3-whole", "phi3")


def known_to(config, fields):
    """The fields with the names alone that are modules of this family: PEFT passes over others."""
    family = find_adapters(lora(target_modules="all-linear"), config)
    names = {module.local_name for module in family.modules}

    def keep(value):
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if {k, k.split(".")[-1]} & names or "*" in k}
        return [name for name in value if name in names] if isinstance(value, list) else value

    targets = fields.get("target_modules")
    kept = {k: keep(v) if k in ("rank_pattern", "alpha_pattern") else v for k, v in fields.items()}
    return kept | ({"target_modules": keep(targets)} if isinstance(targets, list) else {})


@pytest.mark.covers(
    "model.peft_config.target_modules",
    "model.peft_config.exclude_modules",
    "model.peft_config.layers_to_transform",
    "model.peft_config.rank_pattern",
    "model.peft_config.alpha_pattern",
    "model.peft_config.use_rslora",
    "model.peft_config.modules_to_save",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_ranks_and_scales_are_those_that_peft_selects(tmp_path, family):
    hf_config(family).save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)
    for name, fields in SPELLINGS.items():
        fields = known_to(config, fields)
        if name == "default" and family in NO_DEFAULT:
            with pytest.raises(RecipeError, match="has no default for .*; write all-linear"):
                find_adapters(lora(**fields), config)
            continue
        ours = find_adapters(lora(r=4, lora_alpha=6, **fields), config)
        theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **fields)
        wrapped = peft.get_peft_model(hf_model(family), theirs)
        expected = {
            path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for path, module in wrapped.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and "vision" not in path
        }
        found = {module.name: (module.rank, module.scale) for module in ours.modules}
        assert found == expected, (name, fields)
        state = peft.get_peft_model_state_dict(wrapped)
        shapes = {k: tuple(v.shape) for k, v in state.items() if "vision" not in k}
        assert {k: part.shape for k, part in list_parts(ours, config).items()} == shapes, name
