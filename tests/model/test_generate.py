"""Generation through the cache against transformers, and against the decoder without a cache."""

from contextlib import contextmanager

import jax
import numpy as np
import pytest
from model_rows import batch_of
from tiny_models import FAMILIES, hf_model, load_model, save_model, torch, transformers

from jaxtrain.model.decoder import merge
from jaxtrain.model.generate import Sampling, filter_logits, generate, stream, unroll

PROMPTS = [[5, 17, 40], [7], [33, 9, 81, 12, 60, 4, 77, 51, 20]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A family with windows shorter than what is generated."""
    _, _, model, params = load_model(
        save_model("qwen2-alternating", tmp_path_factory.mktemp("hf") / "m")
    )
    return model.graph, params


def test_greedy_tokens_equal_those_of_transformers(qwen):
    ours = generate(*qwen, PROMPTS, max_new_tokens=14, sampling=Sampling(stop_tokens=(2,)))
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


def test_unrolled_layers_generate_the_same_and_each_in_its_turn(tmp_path):
    """Twelve members in a group: nnx sorts their names as text."""
    kinds = ["full_attention", "sliding_attention"] * 5 + ["full_attention"] * 2
    changes = {"num_hidden_layers": 12, "layer_types": kinds}
    hf_model("qwen2-alternating", **changes).save_pretrained(tmp_path)
    config, _, model, params = load_model(tmp_path)
    assert len(config.groups) > 1
    looped, unrolled = (
        generate(*decoder, PROMPTS, max_new_tokens=14)
        for decoder in ((model.graph, params), unroll(model.graph, params))
    )
    assert unrolled == looped


def test_a_text_that_outgrows_its_rope_goes_on_as_one_that_was_as_long(tmp_path):
    """The rope of phi3 is another one for more than 32 tokens, at once for all of a text."""
    _, _, model, params = load_model(save_model("phi3", tmp_path))
    replies = generate(model.graph, params, PROMPTS, max_new_tokens=40)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        said = 33 - len(prompt)
        room = {"max_new_tokens": 40 - said}
        (rest,) = generate(model.graph, params, [prompt + reply[:said]], **room)
        assert rest == reply[said:]


TALKED = 60
"""Tokens that a conversation may have; no length to which prompts are padded otherwise."""
GROWING = ("smollm3",)
"""Its rope depends on a document's length, so that one pass over the whole tells nothing."""
QUICK = ("qwen2-alternating", "qwen3-5", "gpt2")
"""Windows, states, learnt positions."""


@contextmanager
def compilations():
    """A list that gets the names of what is compiled meanwhile."""
    found = []

    def note(event, seconds, fun_name="", **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
        if name not in GROWING
    ],
)
def test_a_conversation_compiles_two_lengths_and_has_the_tokens_of_no_padding(name, tmp_path):
    """Each turn goes on from all tokens of those before, up to the most that may be; a second
    conversation of other lengths compiles nothing."""
    _, _, model, params = load_model(save_model(name, tmp_path))
    how = {"max_new_tokens": 6, "max_length": TALKED}

    def talk(seed):
        rng, tokens, said = np.random.default_rng(seed), [], []
        while len(tokens) < TALKED - 4:
            tokens += rng.integers(3, 60, rng.integers(1, 5)).tolist()
            reply = [chunk[0] for chunk in stream(model.graph, params, [tokens], **how)]
            assert [len(chunk) for chunk in reply] == [1] * min(6, TALKED - len(tokens))
            said += range(len(tokens), len(tokens) + len(reply))
            tokens += [token for (token,) in reply]
        return np.array(tokens), np.array(said)

    with compilations() as compiled:
        tokens, said = talk(0)
    assert compiled.count("jit(_prefill)") == compiled.count("jit(_decode)") == 2
    with compilations() as compiled:
        assert len(set(talk(1)[1]) ^ set(said)) > 0
    assert not compiled
    logits = jax.jit(lambda params: merge(model.graph, params)(batch_of(tokens[None]))[0])(params)
    before = np.asarray(logits)[said - 1]
    np.testing.assert_allclose(before[range(len(said)), tokens[said]], before.max(-1), atol=1e-4)


def test_generation_ends_with_the_end_token(qwen):
    (tokens,) = generate(*qwen, PROMPTS[:1], max_new_tokens=14)
    end = tokens[4]
    (ended,) = generate(
        *qwen, PROMPTS[:1], max_new_tokens=14, sampling=Sampling(stop_tokens=(end,))
    )
    assert ended == tokens[: tokens.index(end) + 1]


@pytest.mark.covers("eval_samples.temperature", "eval_samples.top_p")
def test_sampling_follows_the_seed_and_a_small_top_p_is_greedy(qwen):
    greedy = generate(*qwen, PROMPTS, max_new_tokens=14)

    def draw(seed, **settings):
        sampling = Sampling(temperature=1.0, **settings)
        return generate(*qwen, PROMPTS, max_new_tokens=14, sampling=sampling, seed=seed)

    assert draw(1) == draw(1) != draw(2)
    assert draw(1, top_p=1e-6) == draw(1, top_k=1) == draw(1, min_p=1.0) == greedy


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_sampled_tokens_follow_the_probabilities(qwen, temperature):
    graph, params = qwen
    batch = batch_of(np.array([PROMPTS[0]]))
    forward = jax.jit(
        lambda params: jax.nn.softmax(merge(graph, params)(batch)[0, -1] / temperature)
    )
    probs = np.asarray(forward(params))
    rows = 2000
    sampling = Sampling(temperature=temperature)
    drawn = generate(graph, params, PROMPTS[:1] * rows, max_new_tokens=1, sampling=sampling)
    counts = np.bincount(np.ravel(drawn), minlength=len(probs))
    # Four standard deviations of each count, and one more count for the rare tokens.
    assert (abs(counts - rows * probs) < 4 * np.sqrt(rows * probs) + 1).all()
    kept = np.flatnonzero(
        probs >= np.sort(probs)[::-1][np.cumsum(np.sort(probs)[::-1]) < 0.5].min()
    )
    nucleus = generate(
        graph, params, PROMPTS[:1] * rows, max_new_tokens=1, sampling=sampling._replace(top_p=0.5)
    )
    assert set(kept) <= set(np.ravel(nucleus)) and len(set(np.ravel(nucleus))) == len(kept) + 1


@pytest.mark.parametrize("chunk_tokens", [1, 5, 14])
def test_a_stream_has_the_tokens_of_the_whole_in_chunks_and_none_after_an_end(qwen, chunk_tokens):
    end = generate(*qwen, PROMPTS[:1], max_new_tokens=14)[0][4]
    how = {"max_new_tokens": 14, "sampling": Sampling(stop_tokens=(end,))}
    whole = generate(*qwen, PROMPTS, **how)
    chunks = list(stream(*qwen, PROMPTS, chunk_tokens=chunk_tokens, **how))
    assert [
        [token for part in parts for token in part] for parts in zip(*chunks, strict=True)
    ] == whole
    assert max(len(part) for chunk in chunks for part in chunk) == chunk_tokens
    longest = max(map(len, whole))
    assert len(chunks) == -(-longest // chunk_tokens) and len(whole[0]) < longest


SETTINGS = {
    "repetition_penalty": 1.7, "temperature": 0.6, "top_k": 7, "top_p": 0.8, "min_p": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("names", [(name,) for name in SETTINGS] + [tuple(SETTINGS)])
def test_logits_are_filtered_as_transformers_does(names):
    settings = {name: SETTINGS[name] for name in names}
    logits = np.random.default_rng(0).normal(0, 3, (4, 40)).astype(np.float32)
    seen = np.random.default_rng(1).integers(0, 40, (4, 9))
    is_seen = np.zeros(logits.shape, bool)
    is_seen[np.arange(4)[:, None], seen] = True
    sampling = Sampling(**{"temperature": 1.0} | settings)
    ours = np.asarray(filter_logits(jax.numpy.array(logits), jax.numpy.array(is_seen), sampling))
    theirs = torch.tensor(logits)
    warpers = {
        "repetition_penalty": "RepetitionPenaltyLogitsProcessor",
        "temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper", "min_p": "MinPLogitsWarper",
    }  # fmt: skip
    for name, value in settings.items():
        theirs = getattr(transformers, warpers[name])(value)(torch.tensor(seen), theirs)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6)
    assert names in (("temperature",), ("repetition_penalty",)) or np.isinf(ours).any()


def test_a_repetition_penalty_generates_as_transformers_does(qwen):
    """Of the prompt and of what was generated."""
    sampling = Sampling(repetition_penalty=1.8)
    ours = generate(*qwen, PROMPTS, max_new_tokens=14, sampling=sampling)
    reference = hf_model("qwen2-alternating")
    for prompt, tokens in zip(PROMPTS, ours, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=14, do_sample=False, repetition_penalty=1.8
        )
        assert tokens == theirs[0, len(prompt) :].tolist()
    assert ours != generate(*qwen, PROMPTS, max_new_tokens=14)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompts of at least one token"),
        ([], {}, "prompts of at least one token"),
        ([[1]], {"temperature": -1.0}, "temperature >= 0, .* found temperature -1.0"),
        ([[1]], {"top_p": 0.0, "min_p": 2.0}, "found top_p 0.0, min_p 2.0"),
        ([[1]], {"top_k": -1}, "found top_k -1"),
        ([[1]], {"repetition_penalty": 0.0}, "found repetition_penalty 0.0"),
    ],
)
def test_what_cannot_be_generated_is_refused(qwen, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(*qwen, prompts, max_new_tokens=3, sampling=Sampling(**settings))
