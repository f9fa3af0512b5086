"""Layers with a state: documents that share a sequence, prompts of different length, states of a
cache."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from tiny_models import FAMILIES, hf_config, hf_model, load_model, save_model, torch

from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, init_params, merge
from jaxtrain.model.generate import GREEDY, _prefill, generate
from jaxtrain.model.hf_config import decoder_config

T = 40
PACKED_TOLERANCE = 1e-5  # of the largest number


KINDS = [("qwen3-5", "linear_attention"), ("lfm2", "conv")]


@cache
def one_layer(name, kind):
    """The graph and random parameters of a model with one layer of this kind."""
    fields = hf_config(name, num_hidden_layers=1, layer_types=[kind]).to_dict()
    config = decoder_config(fields | {"architectures": [f"{FAMILIES[name][0]}ForCausalLM"]})
    compute = ComputeConfig(remat="none")  # compiles faster
    graph, params = abstract(config, compute).graph, init_params(config, compute, jax.random.key(0))
    mixer = params["layers"]["0"]["0"]["mixer"]
    # Slow decays and large values, so that what leaks is seen.
    mixer |= {name: 20 * a for name, a in mixer.items() if name.endswith("conv")}
    mixer |= {name: a - 5 for name, a in mixer.items() if name == "log_decay_scale"}
    return graph, params


@cache
def differentiated(name, kind):
    """The gradients of the parameters of such a model, and its logits, for a batch and the gradients
    of these."""
    graph, params = one_layer(name, kind)

    @jax.jit
    def differentiate(batch, d_logits):
        def loss(params):
            logits = merge(graph, params)(batch)
            return jnp.vdot(logits, d_logits), logits

        return jax.grad(loss, has_aux=True)(params)

    return differentiate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_documents_cut_anywhere_are_packed_as_each_alone_with_their_gradients(name, kind, seed):
    """Two rows of three documents, one of a single token, padding after them and rows of it; then a
    row for each document."""
    differentiate = differentiated(name, kind)
    rng, tokens = np.random.default_rng(seed), random_tokens(6, T, seed)
    segments, lengths = np.zeros((6, T), int), []
    for row in range(2):
        first, second, end = np.sort(rng.choice(np.arange(1, T), 3, replace=False))
        second = first + 1 if row == 0 else second
        segments[row] = np.repeat(
            [1, 2, 3, 0], np.diff([0, first, second, max(end, second + 1), T])
        )
        lengths += [(segments[row] == number).sum() for number in (1, 2, 3)]
    is_alone = np.arange(T) < np.array(lengths)[:, None]
    apart = np.zeros_like(tokens)
    apart[is_alone] = tokens[:2][segments[:2] > 0]
    d_logits = np.float32(rng.normal(size=(6, T, 96))) * (segments > 0)[..., None]
    d_apart = np.zeros_like(d_logits)
    d_apart[is_alone] = d_logits[:2][segments[:2] > 0]

    packed_grads, packed = differentiate(batch_of(tokens, segments), d_logits)
    grads, alone = differentiate(batch_of(apart, 1 * is_alone), d_apart)
    np.testing.assert_allclose(
        np.asarray(packed)[segments > 0], np.asarray(alone)[is_alone], atol=PACKED_TOLERANCE
    )
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(packed_grads), jax.tree.leaves(grads), strict=True
    ):
        atol = PACKED_TOLERANCE * max(1, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=atol, err_msg=str(path))


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_the_state_after_a_prompt_is_that_of_its_last_token(name, kind):
    """Whatever pads it, and the same as without padding; two are shorter than a convolution."""
    graph, params = one_layer(name, kind)
    lengths, tokens = np.array([1, 2, 5, 31], np.int32), random_tokens(4, 32)

    def states(tokens, lengths):
        key = jax.random.key(0)
        return jax.tree.leaves(_prefill(graph, GREEDY, 1, params, tokens, lengths, key).caches)

    is_token = np.arange(32) < lengths[:, None]
    padded = states(tokens, lengths)
    otherwise = states(np.where(is_token, tokens, random_tokens(4, 32, 1)), lengths)
    alone = states(tokens[2:3, :5], lengths[2:3])
    for x, y, z in zip(padded, otherwise, alone, strict=True):
        assert all(np.any(row) for row in x)
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x[2], z[0], atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-5", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_prompts_of_any_length_generate_what_transformers_does(name, tmp_path):
    """Here together, there each alone. The cache of a layer with a state does not grow."""
    _, _, model, params = load_model(save_model(name, tmp_path))
    prompts = [random_tokens(1, n, seed=n)[0].tolist() for n in (1, 2, 5, 31)]
    ours = generate(model.graph, params, prompts, max_new_tokens=8)
    reference = hf_model(name)
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert tokens == theirs[0, len(prompt) :].tolist()
    layer = merge(model.graph, params).layers["0"]["0"].token_mixer
    sizes = [
        [x.shape for x in jax.tree.leaves(layer.empty_cache(2, 3, S, "float32"))]
        for S in (32, 4096)
    ]
    assert sizes[0] == sizes[1]
