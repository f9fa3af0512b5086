"""Recipes written for ArcticTraining: each runs, with a word on every key, or says why it does
not."""

import pytest
import yaml

from jaxtrain.recipe.check import describe
from jaxtrain.recipe.dump import to_yaml
from jaxtrain.recipe.resolve import get_config, resolve
from tests.recipe.arctic import ACCEPTED, CHAT, REFUSED, SMALL


def leaves(value, key=""):
    """Dotted keys of everything written but lists of sections' positions; `kwargs` are one key."""
    inner = enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict) and not key.endswith("role_mapping"):
        inner = value.items()
    below = [k for n, v in inner if key == "" or isinstance(value, dict) or isinstance(v, dict)
             for k in leaves(v, f"{key}.{n}".lstrip("."))]  # fmt: skip
    return below or [key]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_recipe_has_a_word_on_every_key(name):
    resolved = resolve(ACCEPTED[name])
    assert resolved.faults == ()
    said = {line.key: line for line in resolved.report.lines}
    assert set(said) == set(leaves(ACCEPTED[name]))
    for line in said.values():
        assert line.word in ("same", "mapped", "no effect")
        assert bool(line.reason) == (line.word != "same"), line
    assert "steps" in describe(resolved)


OURS = SMALL | {"train_iters": 7, "scheduler": {"warmup_steps": 2}}


@pytest.mark.parametrize("recipe", [*ACCEPTED.values(), OURS], ids=[*ACCEPTED, "keys of our own"])
def test_its_effective_recipe_is_the_same_run(recipe):
    config = get_config(recipe)
    again = get_config(yaml.safe_load(to_yaml(config)))
    assert again == config and to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_recipe_says_why_by_key(name):
    recipe, keys = REFUSED[name]
    resolved = resolve(recipe)
    assert {fault.key for fault in resolved.faults} == keys
    assert all(len(fault.what) > 10 for fault in resolved.faults)
    refused = {line.key for line in resolved.report.select("refused")}
    assert refused <= keys and describe(resolved)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "deepspeed.zero_stage", 3),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "mesh.fsdp", 1),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "deepspeed.zero_stage", 0),
        ({"deepspeed": {"zero_optimization": {}}}, "deepspeed.zero_stage", 0),
        ({"deepspeed": {"steps_per_print": 9}}, "deepspeed.zero_stage", 2),
        ({}, "deepspeed.zero_stage", 2),
        ({"deepspeed": {"gradient_clipping": 0}}, "max_grad_norm", 0),
        ({"deepspeed": {"gradient_clipping": 2}}, "max_grad_norm", 2),
        ({"deepspeed": {"gradient_clipping": "auto"}}, "max_grad_norm", 1),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, "mesh.tensor", 2),
        ({"deepspeed": {"torch_autocast": {"enabled": True}}}, "loss_scaling", None),
        (
            {"deepspeed": {"torch_autocast": {"enabled": True}}},
            "deepspeed.autocast_dtype",
            "bfloat16",
        ),
        ({"deepspeed": {"torch_autocast": {"dtype": "fp16"}}}, "deepspeed.autocast_dtype", None),
        (
            {"deepspeed": {"torch_autocast": {"enabled": True, "dtype": "fp16"}}},
            "loss_scaling.hysteresis",
            2,
        ),
        (
            {"model": {**CHAT, "dtype": "fp16"}, "deepspeed": {"fp16": {"hysteresis": 5}}},
            "loss_scaling.hysteresis",
            5,
        ),
        (
            {"deepspeed": {"zero_optimization": {"cpu_offload": True}}},
            "deepspeed.offloads_optimizer",
            True,
        ),
        (
            {"deepspeed": {"zero_optimization": {"cpu_offload": False}}},
            "deepspeed.offloads_optimizer",
            False,
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3, "cpu_offload_param": True}}},
            "deepspeed.offloads_params",
            True,
        ),
        (
            {"deepspeed": {"activation_checkpointing": {"cpu_checkpointing": True}}},
            "activation_checkpoint_cpu_offload",
            True,
        ),
        ({"name": "sft"}, "type", "sft"),
    ],
)
def test_a_mapped_key_arrives(written, key, value):
    found = get_config(SMALL | written)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_a_metric_of_the_older_name_is_the_same():
    keep = {"output_dir": "a", "save_every_n_steps": 5, "keep_best_n": 1, "metric": "loss/eval"}
    data = {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]}
    config = get_config(SMALL | {"checkpoint": keep, "data": data, "eval_interval": 5})
    assert config.checkpoint[0].metric == "eval/loss"
