"""Layers with a state: documents that share a sequence, prompts of different length, states of a
cache."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from tiny_models import hf_model, load_model, save_model, torch

from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, merge
from jaxtrain.model.generate import generate

NAMES = ["qwen3-5", "lfm2"]
T = 40
PACKED_TOLERANCE = 1e-5  # of the largest number


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    @cache
    def model_of(name):
        config, _, model, params = load_model(save_model(name, tmp_path_factory.mktemp("hf") / "m"))
        graph = abstract(config, ComputeConfig(remat="none")).graph  # compiles faster

        def loss(params, batch, d_logits):
            logits = merge(graph, params)(batch)
            return jnp.vdot(logits, d_logits), logits

        return model, params, jax.jit(jax.grad(loss, has_aux=True))

    return model_of


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_documents_cut_anywhere_are_packed_as_each_alone_with_their_gradients(name, seed, model_of):
    """Two rows of three documents, one of a single token, padding after them and rows of it; then a
    row for each document."""
    _, params, differentiate = model_of(name)
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

    packed_grads, packed = differentiate(params, batch_of(tokens, segments), d_logits)
    grads, alone = differentiate(params, batch_of(apart, 1 * is_alone), d_apart)
    np.testing.assert_allclose(
        np.asarray(packed)[segments > 0], np.asarray(alone)[is_alone], atol=PACKED_TOLERANCE
    )
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(packed_grads), jax.tree.leaves(grads), strict=True
    ):
        atol = PACKED_TOLERANCE * max(1, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=atol, err_msg=str(path))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_any_length_generate_what_transformers_does(name, model_of):
    """Together, each alone, and there: padding behind a prompt is in no state. One is shorter than
    a convolution."""
    model, params, _ = model_of(name)
    prompts = [random_tokens(1, n, seed=n)[0].tolist() for n in (1, 2, 5, 31)]
    ours = generate(model.graph, params, prompts, max_new_tokens=8)
    reference = hf_model(name)
    for prompt, tokens in zip(prompts, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert tokens == theirs[0, len(prompt) :].tolist()
    assert generate(model.graph, params, prompts[2:3], max_new_tokens=8) == ours[2:3]


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_of_a_layer_with_a_state_does_not_grow(name, model_of):
    model, params, _ = model_of(name)
    layer = merge(model.graph, params).layers["0"]["0"].token_mixer
    sizes = [
        [x.shape for x in jax.tree.leaves(layer.empty_cache(2, 3, S, "float32"))]
        for S in (32, 4096)
    ]
    assert sizes[0] == sizes[1]
