"""What only DeepSeek-V3 has: latents that are cached, layers behind the last, groups of experts."""

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from safetensors.numpy import save_file
from tiny_models import FAMILIES, describe_model, hf_config, load_model, save_model

from jaxtrain.model.config import Experts
from jaxtrain.model.decoder import merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.generate import GREEDY, _generate_token, _prefill
from jaxtrain.model.hf_config import decoder_config
from jaxtrain.model.routing import choose_experts
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model.weights import open_tensors
from jaxtrain.recipe.errors import RecipeError, WeightError

FIELDS = FAMILIES["deepseek-v3"][1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model("deepseek-v3", tmp_path_factory.mktemp("hf") / "m")


def test_latents_alone_are_cached_and_give_the_logits_that_keys_and_values_do(folder):
    """The next token's, after each of some tokens that come one at a time."""
    _, _, model, params = load_model(folder)
    prompts, new = [[5, 17, 40], [33, 9, 81, 12, 60]], 5
    tokens = np.zeros((2, 8), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts])
    key = jax.random.key(0)
    progress = _prefill(model.graph, GREEDY, new, params, tokens, lengths, key)
    sizes = {leaf.shape[-2:] for leaf in jax.tree.leaves(progress.caches)}
    assert sizes == {(13, FIELDS["kv_lora_rank"]), (13, FIELDS["qk_rope_head_dim"])}
    step = jax.jit(lambda params, now: _generate_token(merge(model.graph, params), GREEDY, now))
    forward = jax.jit(lambda params, batch: merge(model.graph, params)(batch))
    for _ in range(new):
        token, progress = step(params, progress)
        prompts = [[*prompt, int(t)] for prompt, t in zip(prompts, token, strict=True)]
    rows = np.stack([np.pad(prompt, (0, 16 - len(prompt))) for prompt in prompts])
    logits = np.asarray(forward(params, batch_of(rows)))
    for b, prompt in enumerate(prompts):
        found = np.asarray(progress.logits_BV[b])
        np.testing.assert_allclose(found, logits[b, len(prompt) - 1], atol=2e-5)


def test_the_bias_of_the_choice_stays_float32_in_a_file_of_bfloat16(folder, tmp_path):
    config, hf, _, params = load_model(folder)
    save_pretrained(tmp_path / "out", params, config, hf, dtype="bfloat16")
    before, after = read_folder(folder), read_folder(tmp_path / "out")
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    for name, tensor in after.items():
        found = tensor.read()
        if name in biases:
            np.testing.assert_array_equal(found, before[name].read())
        assert found.dtype == (np.float32 if name in biases else "bfloat16"), name


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_behind_the_last_are_not_read_if_the_config_tells_of_them(folder, tmp_path, layers):
    """A file of DeepSeek-V3 has one, which predicts a second token."""
    tensors = {name: np.array(tensor.read()) for name, tensor in read_folder(folder).items()}
    behind = {k.replace(".2.", ".3."): v for k, v in tensors.items() if ".layers.2." in k}
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors | behind, tmp_path / "model.safetensors")
    told = {"num_nextn_predict_layers": layers}
    config, _, model = describe_model(tmp_path, hf_config_kwargs=told)
    if layers:
        open_tensors(tmp_path, config, model.shapes)
    else:
        with pytest.raises(WeightError, match=r"tensor model.layers.3.*is unknown"):
            open_tensors(tmp_path, config, model.shapes)


def test_a_token_takes_experts_of_its_best_groups_by_biased_scores_and_shares_without_bias():
    """Against one token at a time, in words."""
    rng = np.random.default_rng(0)
    experts = Experts(
        12, 4, 8, scores="sigmoid", has_choice_bias=True, groups=4, groups_per_token=2,
        share_scale=2.5,
    )  # fmt: skip
    logits, bias = rng.normal(0, 2, (1, 50, 12)).astype(np.float32), rng.normal(0, 1, 12)
    chosen, routing = choose_experts(experts, logits, np.ones((1, 50), int), bias.astype("f4"))
    for t in range(50):
        scores = 1 / (1 + np.exp(-logits[0, t].astype(float)))
        biased = scores + bias
        groups = sorted(range(4), key=lambda g: -np.sort(biased[3 * g : 3 * g + 3])[1:].sum())[:2]
        allowed = [e for e in range(12) if e // 3 in groups]
        best = sorted(allowed, key=lambda e: -biased[e])[:4]
        assert sorted(chosen.choices_BTC[0, t].tolist()) == sorted(best)
        shares = 2.5 * scores / scores[best].sum()
        np.testing.assert_allclose(
            chosen.shares_BTC[0, t], shares[np.asarray(chosen.choices_BTC[0, t])], rtol=1e-5
        )
    assert float(routing.choices_E.sum()) == 4 * 50


@pytest.mark.parametrize(
    "change",
    [{"n_group": 3}, {"n_group": 8}, {"topk_group": 5}, {"topk_group": 1}, {"n_group": 0}],
    ids=str,
)
def test_groups_that_cannot_hold_the_choices_are_refused(change):
    fields = hf_config("deepseek-v3").to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    with pytest.raises(RecipeError, match=r"n_group: must (cut the 8 experts|be a positive)"):
        decoder_config(fields | change)


def test_packed_rows_and_random_tokens_reach_every_group(folder):
    """Else the comparison with transformers would see only some of them."""
    _, _, model, params = load_model(folder)
    _, routing = merge(model.graph, params).hidden_and_routing(batch_of(random_tokens(3, 40)))
    assert (np.asarray(routing.choices_E) > 0).all()
