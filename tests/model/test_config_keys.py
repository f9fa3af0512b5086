"""Every key of config.json that transformers reads, changed: our logits are still its logits, or
the key is refused."""

import dataclasses
import inspect
import json
import re
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from tiny_models import FAMILIES, describe_model, hf_model, load_model, torch, transformers
from transformers import masking_utils, modeling_rope_utils

from jaxtrain.model.decoder import merge
from jaxtrain.recipe.errors import RecipeError

TOLERANCE = 1e-4  # float32, against another order of summation
TOKENS = random_tokens(1, 40)
BASES = ("llama31", "mistral", "qwen2-windows", "qwen3")
OTHER_ROWS = {
    "llama2", "llama3", "linear", "smollm2", "biased", "qwen2", "qwen2-alternating",
    "deepseek-v3-plain", "gemma4-equal", "gemma4-small", "phi4", "gpt-neox-serial",
    "gemma3-whole", "gemma4-whole", "qwen3-5-whole",
}  # fmt: skip
"""Further rows of a family."""
MORE = tuple(name for name in FAMILIES if name not in {*BASES, *OTHER_ROWS})
"""Families whose keys are tried with the slow tests."""
OLD_KEYS = {
    "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings",
    "is_causal", "per_layer_config", "attention_bias", "mlp_bias", "head_dim", "layer_types",
    "rope_local_base_freq", "sliding_window_pattern", "rotary_pct", "rotary_emb_base",
}  # fmt: skip
"""What transformers reads by other ways than `config.key`."""
NOT_OF_THE_MODEL = {"architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
"""The class that is made, which other tests compare, and the dtype, which the recipe says."""
OTHER_VALUES: dict[str, list[Any]] = {
    "hidden_act": ["gelu", "relu"],
    "per_layer_config": [{"1": {"sliding_window": 3}}],
    "layer_types": [["full_attention"] * 3, ["sliding_attention", "full_attention"] * 2],
    "rope_scaling": [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
    ],
}


@cache
def written(name: str) -> dict[str, Any]:
    """config.json of a tiny model."""
    model = hf_model(name)
    return model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "model_type": model.config.model_type,
    }


def keys_of(name: str) -> list[str]:
    config = hf_model(name).config
    module = inspect.getmodule(type(hf_model(name)))
    text = "".join(map(inspect.getsource, (module, masking_utils, modeling_rope_utils)))
    read = {
        a or b for a, b in re.findall(r'config\.([a-z]\w*)|getattr\(config, "([a-z]\w*)"', text)
    }
    fields = {field.name for field in dataclasses.fields(config)}
    methods = {key for key in read if callable(getattr(type(config), key, None))}
    return sorted((fields | set(config.to_dict()) | read | OLD_KEYS) - methods - NOT_OF_THE_MODEL)


def other_values(key: str, value: Any) -> list[Any]:
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, max(1, value // 2), 0]
    if isinstance(value, float):
        return [value * 100 + 0.5]
    if isinstance(value, str):
        return ["other"]
    if isinstance(value, dict) and value:
        return [value | {k: v} for k in value for v in other_values(k, value[k])]
    return [True, False, 2, 0.5]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A tiny model's folder, to write a config.json into."""

    @cache
    def folder_of(name):
        folder = tmp_path_factory.mktemp(name)
        hf_model(name).save_pretrained(folder)
        return folder

    return folder_of


@cache
def our_logits(folder, config) -> np.ndarray:
    _, _, model, params = load_model(folder)
    forward = jax.jit(lambda params, batch: merge(model.graph, params)(batch))
    return np.asarray(forward(params, batch_of(TOKENS)))


def their_logits(folder) -> np.ndarray | None:
    """None where transformers has no meaning for the config and these weights."""
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        if report["missing_keys"]:
            return None
        with torch.no_grad():
            logits = model.eval()(torch.tensor(TOKENS, dtype=torch.long), return_dict=True).logits
    except Exception:  # whatever it says of a value that it cannot take
        return None
    return logits.float().numpy()


@cache
def cases(names: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, key) for name in names for key in keys_of(name)]


@pytest.mark.parametrize(
    ("name", "key"),
    [*cases(BASES), *(pytest.param(*case, marks=pytest.mark.slow) for case in cases(MORE))],
)
def test_a_changed_key_means_what_it_means_in_transformers_or_is_refused(name, key, folder_of):
    folder, config = folder_of(name), written(name)
    current = config[key] if key in config else getattr(hf_model(name).config, key, None)
    for value in other_values(key, current):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        try:
            described, _, _ = describe_model(folder)
            found = our_logits(folder, described)
        except RecipeError:
            continue
        expected = their_logits(folder)
        if expected is not None:
            np.testing.assert_allclose(found, expected, atol=TOLERANCE, err_msg=str(value))


def test_the_keys_are_those_that_matter():
    keys = keys_of("llama31")
    assert {"rms_norm_eps", "rope_parameters", "tie_word_embeddings", "is_causal"} <= {*keys}
