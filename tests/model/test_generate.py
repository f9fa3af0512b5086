"""Generation through the cache against transformers, and against the decoder without a cache."""

import jax
import numpy as np
import pytest
from model_rows import batch_of
from tiny_models import FAMILIES, hf_model, load_model, save_model, torch

from jaxtrain.model.decoder import merge
from jaxtrain.model.generate import generate

PROMPTS = [[5, 17, 40], [7], [33, 9, 81, 12, 60, 4, 77, 51, 20]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A family with windows shorter than what is generated."""
    _, _, model, params = load_model(
        save_model("qwen2-alternating", tmp_path_factory.mktemp("hf") / "m")
    )
    return model.graph, params


def test_greedy_tokens_equal_those_of_transformers(qwen):
    ours = generate(*qwen, PROMPTS, max_new_tokens=14, eos_ids=[2])
    reference = hf_model("qwen2-alternating")
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=2
        )
        assert tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_generates_what_transformers_does(name, tmp_path):
    """Past windows, and past the length from which some ropes change."""
    _, _, model, params = load_model(save_model(name, tmp_path))
    ours = generate(model.graph, params, PROMPTS, max_new_tokens=32)
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        theirs = hf_model(name).generate(
            torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None
        )
        assert tokens == theirs[0, len(prompt) :].tolist()


@pytest.mark.covers("eval_samples.max_new_tokens")
def test_a_prompt_generates_the_same_alone_and_among_others(qwen):
    together = generate(*qwen, PROMPTS, max_new_tokens=14)
    assert [generate(*qwen, [prompt], max_new_tokens=14)[0] for prompt in PROMPTS] == together


def test_generation_ends_with_the_end_token(qwen):
    (tokens,) = generate(*qwen, PROMPTS[:1], max_new_tokens=14)
    end = tokens[4]
    (ended,) = generate(*qwen, PROMPTS[:1], max_new_tokens=14, eos_ids=[end])
    assert ended == tokens[: tokens.index(end) + 1]


@pytest.mark.covers("eval_samples.temperature", "eval_samples.top_p")
def test_sampling_follows_the_seed_and_a_small_top_p_is_greedy(qwen):
    draw = lambda **how: generate(*qwen, PROMPTS, max_new_tokens=14, temperature=1.0, **how)
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert draw(seed=1, top_p=1e-6) == generate(*qwen, PROMPTS, max_new_tokens=14)


def test_sampled_tokens_follow_the_probabilities(qwen):
    graph, params = qwen
    batch = batch_of(np.array([PROMPTS[0]]))
    forward = jax.jit(lambda params: jax.nn.softmax(merge(graph, params)(batch)[0, -1]))
    probs = np.asarray(forward(params))
    rows = 2000
    drawn = generate(graph, params, PROMPTS[:1] * rows, max_new_tokens=1, temperature=1.0)
    counts = np.bincount(np.ravel(drawn), minlength=len(probs))
    # Four standard deviations of each count, and one more count for the rare tokens.
    assert (abs(counts - rows * probs) < 4 * np.sqrt(rows * probs) + 1).all()
    kept = np.flatnonzero(
        probs >= np.sort(probs)[::-1][np.cumsum(np.sort(probs)[::-1]) < 0.5].min()
    )
    nucleus = generate(
        graph, params, PROMPTS[:1] * rows, max_new_tokens=1, temperature=1.0, top_p=0.5
    )
    assert set(kept) <= set(np.ravel(nucleus)) and len(set(np.ravel(nucleus))) == len(kept) + 1


def test_what_cannot_be_generated_is_refused(qwen):
    with pytest.raises(ValueError, match="prompts of at least one token"):
        generate(*qwen, [[1], []], max_new_tokens=3)
