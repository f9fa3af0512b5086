"""Generates continuations of prompts with a cache of keys and values.

B prompts, P tokens of the longest, N new tokens, S = P + N slots of the cache, T tokens, D width,
V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.model.decoder import Caches, Decoder, Params, merge
from jaxtrain.model.layers import Cache

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this, so that few lengths are compiled."""


class Sampling(NamedTuple):
    max_new_tokens: int
    eos_ids: tuple[int, ...]
    temperature: float
    top_p: float


class Progress(NamedTuple):
    """The state of the generation loop."""

    count: Array
    """int32 []: tokens generated so far"""
    tokens_BN: Array
    """int32 [B, new tokens]"""
    is_done_B: Array
    logits_BV: Array
    caches: Caches
    positions: TokenPositions
    """[B, S]; segment 1 where the slot holds a token, prompted or generated"""
    key: Array


def generate(
    graph: nnx.GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, its end token included; greedy at temperature 0.

    With `top_p` below 1, samples only from the likeliest tokens that together reach it.
    """
    is_valid_sampling = temperature >= 0 and 0 < top_p <= 1
    if not prompts or not all(prompts) or max_new_tokens < 1 or not is_valid_sampling:
        raise ValueError(
            "generate needs prompts of at least one token, max_new_tokens >= 1, temperature >= 0 "
            f"and 0 < top_p <= 1; found prompts of {[len(p) for p in prompts]} tokens, "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    longest = max(map(len, prompts))
    P = -(-longest // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens_BP = np.zeros((len(prompts), P), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BP[row, : len(prompt)] = prompt
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    sampling = Sampling(max_new_tokens, tuple(eos_ids), temperature, top_p)
    tokens_BN = np.asarray(
        _run(graph, sampling, params, tokens_BP, lengths_B, jax.random.key(seed))
    )
    is_end_BN = np.isin(tokens_BN, sampling.eos_ids)
    ends_B = np.where(is_end_BN.any(1), is_end_BN.argmax(1) + 1, max_new_tokens)
    return [row[:end].tolist() for row, end in zip(tokens_BN, ends_B, strict=True)]


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    graph: nnx.GraphDef,
    sampling: Sampling,
    params: Params,
    tokens_BP: Array,
    lengths_B: Array,
    key: Array,
) -> Array:
    model = merge(graph, params)
    progress = _prefill(model, sampling, tokens_BP, lengths_B, key)
    unfinished = lambda p: (p.count < sampling.max_new_tokens) & ~p.is_done_B.all()
    step = partial(_generate_token, model, sampling, tokens_BP.shape[1], lengths_B)
    return lax.while_loop(unfinished, step, progress).tokens_BN


def _prefill(
    model: Decoder, sampling: Sampling, tokens_BP: Array, lengths_B: Array, key: Array
) -> Progress:
    B, P = tokens_BP.shape
    slots_S = jnp.arange(P + sampling.max_new_tokens, dtype=jnp.int32)
    segments_BS = (slots_S < lengths_B[:, None]).astype(jnp.int32)
    positions = TokenPositions(segments_BS, jnp.broadcast_to(slots_S, segments_BS.shape))
    prompt_positions = TokenPositions(*(x[:, :P] for x in positions))
    inputs = model.attention_inputs(prompt_positions, positions, jnp.int32(0))
    caches = _empty_caches(model, B, len(slots_S))
    x_BPD, caches = model.stack(
        model.embed_tokens(tokens_BP, prompt_positions.positions), inputs, caches
    )
    assert caches is not None
    last_B1D = jnp.take_along_axis(x_BPD, lengths_B[:, None, None] - 1, axis=1)
    return Progress(
        count=jnp.int32(0),
        tokens_BN=jnp.zeros((B, sampling.max_new_tokens), jnp.int32),
        is_done_B=jnp.zeros(B, bool),
        logits_BV=model.logits(model.normalize(last_B1D))[:, 0],
        caches=caches,
        positions=positions,
        key=key,
    )


def _generate_token(
    model: Decoder, sampling: Sampling, P: int, lengths_B: Array, progress: Progress
) -> Progress:
    """Chooses a token from the current logits and computes the next ones."""
    key, sample_key = jax.random.split(progress.key)
    token_B = _choose_token(progress.logits_BV, sampling, sample_key)
    is_end_B = jnp.isin(token_B, jnp.array(sampling.eos_ids, jnp.int32))
    # Prompts are padded at their end, and every row puts its next token in the same slot: attention
    # follows the positions, not the order of the slots.
    slot = P + progress.count
    positions = TokenPositions(
        progress.positions.segments.at[:, slot].set(1),
        progress.positions.positions.at[:, slot].set(lengths_B + progress.count),
    )
    q_positions = TokenPositions(*(x[:, slot, None] for x in positions))
    inputs = model.attention_inputs(q_positions, positions, slot)
    x_B1D, caches = model.stack(
        model.embed_tokens(token_B[:, None], q_positions.positions), inputs, progress.caches
    )
    assert caches is not None
    return Progress(
        count=progress.count + 1,
        tokens_BN=progress.tokens_BN.at[:, progress.count].set(token_B),
        is_done_B=progress.is_done_B | is_end_B,
        logits_BV=model.logits(model.normalize(x_B1D))[:, 0],
        caches=caches,
        positions=positions,
        key=key,
    )


def _empty_caches(model: Decoder, B: int, S: int) -> Caches:
    K, H, dtype = model.config.num_kv_heads, model.config.head_size, model.compute.compute_dtype
    empty = lambda repeats: Cache(*jnp.zeros((2, repeats, B, S, K, H), dtype))
    return {
        str(g): {str(m): empty(group.repeats) for m in range(len(group.layers))}
        for g, group in enumerate(model.config.groups)
    }


def _choose_token(logits_BV: Array, sampling: Sampling, key: Array) -> Array:
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it do not yet reach top_p; so the likeliest always stays.
        is_kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < sampling.top_p
        lowest_B1 = jnp.where(is_kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)
