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
from jaxtrain.model.generate import generate
from jaxtrain.model.hf_config import decoder_config

T = 40
PACKED_TOLERANCE = 1e-5  # of the largest number


@cache
def differentiated(name, kind):
    """The gradients of random parameters of a model with one layer of this kind, and its logits, for
    a batch and the gradients of these."""
    fields = hf_config(name, num_hidden_layers=1, layer_types=[kind]).to_dict()
    config = decoder_config(fields | {"architectures": [f"{FAMILIES[name][0]}ForCausalLM"]})
    compute = ComputeConfig(remat="none")  # compiles faster
    graph, params = abstract(config, compute).graph, init_params(config, compute, jax.random.key(0))
    mixer = params["layers"]["0"]["0"]["mixer"]
    # Slow decays and large values, so that what leaks is seen.
    mixer |= {name: 20 * a for name, a in mixer.items() if name.endswith("conv")}
    mixer |= {name: a - 5 for name, a in mixer.items() if name == "log_decay_scale"}

    @jax.jit
    def differentiate(batch, d_logits):
        def loss(params):
            logits = merge(graph, params)(batch)
            return jnp.vdot(logits, d_logits), logits

        return jax.grad(loss, has_aux=True)(params)

    return differentiate


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "kind"), [("qwen3-5", "linear_attention"), ("lfm2", "conv")])
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


@pytest.mark.parametrize("name", ["qwen3-5", pytest.param("lfm2", marks=pytest.mark.slow)])
def test_prompts_of_any_length_generate_what_transformers_does(name, tmp_path):
    """Here together, there each alone: padding after a prompt is in no state. Two are shorter than
    a convolution. The cache of layers with a state does not grow with the tokens."""
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
