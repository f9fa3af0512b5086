"""Devices that share sequences compute what one device does that has them whole."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import registry
from jaxtrain.plan import plan
from jaxtrain.recipe.check import find_facts
from jaxtrain.recipe.code import run_user_code
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config
from tests.runs import LLAMA, host, loss_and_gradients, losses, metrics_of, recipe, trainer

ROWS, STEPS = 8, 10
FOCAL = Path(__file__).parents[2] / "recipes" / "focal.py"
SMALL = {"num_hidden_layers": 2}
ONE_KEY = SMALL | {"num_key_value_heads": 1}
ALL_KEYS = SMALL | {"num_key_value_heads": 8}
FOUR_HEADS = {"num_attention_heads": 4}
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
WINDOWS = SMALL | {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 20,
}  # fmt: skip
CAPPED = SMALL | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "sliding_window": 20,
    "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8,
    "hidden_activation": "gelu_pytorch_tanh", "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
SINKS = SMALL | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "attention_bias": True, "tie_word_embeddings": False,
    "rope_scaling": None,
}  # fmt: skip
LATENT = SMALL | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": False,
    "num_key_value_heads": 8, "n_shared_experts": 1, "routed_scaling_factor": 1.0,
}  # fmt: skip
LORA = {"model": {"peft_config": {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1}}}
EVALUATION = {"data": {"train_eval_split": [0.8, 0.2]}, "eval_interval": 100}
TABLE = {
    # The way of attention is that of the last column.
    "two": ({"context": 2, "data": 2}, SMALL, EVALUATION, "all-to-all"),
    "ring": ({"context": 4}, SMALL | SIX_HEADS, EVALUATION, "ring"),
    "adapters": ({"context": 2, "tensor": 2}, SMALL | SIX_HEADS, LORA, "ring"),
    "four": ({"context": 4, "fsdp": 2}, SMALL, EVALUATION, "all-to-all"),
    "eight": ({"context": 8}, ALL_KEYS, {}, "all-to-all"),
    "eight in a ring": ({"context": 8}, SMALL | FOUR_HEADS, EVALUATION, "ring"),
    "tensor": ({"context": 2, "tensor": 2, "data": 2}, SMALL, {}, "all-to-all"),
    "tensor in a ring": ({"context": 2, "tensor": 4}, SMALL | FOUR_HEADS, {}, "ring"),
    "fsdp": ({"context": 2, "fsdp": 4}, SMALL, {}, "all-to-all"),
    "one key": ({"context": 2, "fsdp": 2, "data": 2}, ONE_KEY, {}, "2 copies of key/value heads"),
    "a key for two": ({"context": 4, "tensor": 2}, SMALL, LORA, "2 copies of key/value heads"),
    "a key for all": ({"context": 8}, ONE_KEY, EVALUATION, "8 copies of key/value heads"),
    "windows": ({"context": 4, "data": 2}, WINDOWS, EVALUATION, "all-to-all"),
    "windows in a ring": ({"context": 8}, WINDOWS | FOUR_HEADS, EVALUATION, "ring"),
    "capped": ({"context": 2, "fsdp": 2}, CAPPED, {}, "all-to-all"),
    "capped in a ring": ({"context": 8}, CAPPED | FOUR_HEADS, {}, "ring"),
    "sinks": ({"context": 2, "expert": 2, "tensor": 2}, SINKS, {}, "all-to-all"),
    "sinks in a ring": ({"context": 4, "expert": 2}, SINKS | SIX_HEADS, {}, "ring"),
    "latent": ({"context": 4, "fsdp": 2}, LATENT, {}, "all-to-all"),
    "accumulation": (
        {"context": 4, "fsdp": 2}, SMALL, {"gradient_accumulation_steps": 4}, "all-to-all",
    ),
    "accumulation in a ring": (
        {"context": 8}, SMALL | FOUR_HEADS,
        {"gradient_accumulation_steps": 2, "model": {"remat": "dots"}, **EVALUATION}, "ring",
    ),
    "tiles and padding": (
        {"context": 2, "fsdp": 2, "tensor": 2}, SMALL | {"mlp_bias": True},
        {
            "tiled_mlp_compute": True,
            "data": {"pack_samples": False, "pad_to": "max_length", "max_length": 256},
        },
        "all-to-all",
    ),
    "adapters in the ring of eight": ({"context": 8}, SMALL | FOUR_HEADS, LORA | EVALUATION, "ring"),
    "zero 3": (
        {"context": 2, "data": 4}, SMALL,
        {"deepspeed": {"zero_optimization": {"stage": 3}}}, "all-to-all",
    ),
    "a loss of one's own": ({"context": 4}, SMALL | SIX_HEADS, {"type": "focal"}, "ring"),
    "a pipeline": ({"pipeline": 2, "context": 2, "data": 2}, SMALL, {}, "all-to-all"),
}  # fmt: skip
QUICK = ("two", "ring")


def run_of(folder, mesh, config, changes):
    devices = int(np.prod(list(mesh.values()) or [1]))
    shards = int(np.prod([size for a, size in mesh.items() if a in ("data", "fsdp", "expert")]))
    cut = shards * changes.get("gradient_accumulation_steps", 1)
    written = recipe(
        folder, train_iters=STEPS, mesh=mesh, **{**changes, "micro_batch_size": ROWS // cut}
    )
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA | config))
    run_user_code(FOCAL)
    return trainer(
        written, devices=devices, cls=registry.find("trainer", changes.get("type", "sft"))
    )


def assert_same(run, alone):
    params = host(alone.state.params)
    for name, array in host(run.state.params).items():
        np.testing.assert_array_equal(array, params[name], err_msg=name)
    (_, expected), (_, found) = map(loss_and_gradients, (alone, run))
    found = host(found)
    for name, g in host(expected).items():
        assert np.abs(found[name] - g).max() <= 1e-5 * np.abs(g).max(), name
    expected, found = (losses(one, STEPS) for one in (alone, run))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert found[-1] < found[0]  # it trains
    if run.data.evals:
        expected, found = alone.evaluate(), run.evaluate()
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, abs=1e-5, rel=1e-6), key


@pytest.mark.covers("mesh.context")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TABLE]
)
def test_devices_that_share_sequences_change_no_number(tmp_path, name):
    mesh, config, changes, way = TABLE[name]
    run = run_of(tmp_path / "cut", mesh, config, changes)
    assert way in run.run.model.attention
    documents = np.asarray(next(run.data.train_batches(0, 1)).segments).max()
    assert documents > 1 or "padding" in name, "the rows must be packed"
    assert_same(run, run_of(tmp_path / "alone", {}, config, changes))


def test_each_device_holds_its_part_of_every_sequence(tmp_path):
    """Of tokens, not of what a sequence has one of."""
    run = run_of(tmp_path, {"context": 4, "data": 2}, SMALL, {})
    host_batch = next(run.data.train_batches(0, 1))
    batch = run.layout.on_devices(host_batch)
    for name in ("tokens", "positions", "segments", "loss_weights"):
        whole, array = getattr(host_batch, name), getattr(batch, name)
        np.testing.assert_array_equal(array, whole)
        assert array.addressable_shards[0].data.size * 8 == whole.size
    assert batch.rows.addressable_shards[0].data.size * 2 == host_batch.rows.size


@pytest.mark.covers("data.div_length")
def test_lengths_are_multiples_of_what_the_devices_share(tmp_path):
    data = {"max_length": 240, "div_length": 20, "pack_samples": False}
    run = run_of(tmp_path, {"context": 4}, SMALL, {"data": data})
    assert all(length % 40 == 0 for length in run.data.train.lengths)


def test_a_length_that_does_not_divide_is_named(tmp_path):
    written = recipe(tmp_path, mesh={"context": -1, "data": 1}, data={"max_length": 100})
    with pytest.raises(RecipeError) as error:
        trainer(written, devices=4)
    assert str(error.value) == (
        "data.max_length: 100 does not divide into the 8 pieces of mesh.context 4; use 96 or 104"
    )


@pytest.mark.slow
def test_prompts_are_answered_and_the_header_says_how_attention_goes(tmp_path, capsys):
    changes = {
        **EVALUATION, "eval_samples": {"prompts": ["Numbers?", "x"], "max_new_tokens": 5},
        "eval_interval": 2, "train_iters": 2, "micro_batch_size": 2,
    }  # fmt: skip
    answers, headers = [], []
    for folder, mesh in ((tmp_path / "alone", {}), (tmp_path / "cut", {"context": 2, "data": 1})):
        written = recipe(folder, mesh=mesh, **changes)
        (folder / "model" / "config.json").write_text(json.dumps(LLAMA | SMALL))
        trainer(written, devices=len(mesh) or 1).train()
        answers.append([row["answer"] for row in metrics_of(folder) if "answer" in row])
        headers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and len(answers[0]) == 2
    assert "all-to-all of heads and tokens over context 2" in headers[1]
    assert "context" not in headers[0]


def test_a_sequence_may_be_longer_than_the_model_names(tmp_path):
    """As sequences over many devices are, but not where positions are rows of a table."""
    written = recipe(tmp_path, data={"max_length": 512}, train_iters=2)
    run = trainer(written)
    longer = "longer than the 256 positions that the model's config names"
    assert run.header["positions"] == f"up to 512, {longer}"
    assert ("sequences", f"at most 512 tokens, {longer}") in find_facts(run.config, 1)
    assert np.isfinite(losses(run, 2)).all()
    assert "positions" not in trainer(recipe(tmp_path)).header
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 384}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **dropout}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="512 is longer than the 256 positions that gpt2 has"):
        trainer(written)


def test_a_plan_says_what_a_part_of_each_sequence_takes(tmp_path):
    """The more devices share a sequence, the less of its activations each holds."""
    peaks = []
    for context in (1, 4):
        written = recipe(tmp_path, mesh={"context": context}, micro_batch_size=4)
        (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA | SMALL))
        facts = dict(plan(get_config(written), jax.devices()[:context]))
        peaks.append(float(facts["step"].split()[0]))
    assert facts["devices"] == "4 x cpu, mesh context 4"
    assert facts["batch"] == "4 sequences of 128 tokens per step"
    assert peaks[1] < 0.6 * peaks[0]
