"""Generates continuations of prompts with a cache: keys and values, or states.

B prompts, P tokens of the longest, padded, N new tokens at most, S = P + N slots of the cache, C
tokens of a chunk, D width, V vocabulary. Programs depend on these numbers alone, and not on the
length of a prompt, so that a conversation is compiled for as few lengths as P has.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.model.block import Block
from jaxtrain.model.config import LayerGroup
from jaxtrain.model.decoder import Caches, Decoder, Params, merge, split

MIN_PROMPT_TOKENS = 32
"""Prompts are padded to this length or twice another, up to the longest that may be."""


class Sampling(NamedTuple):
    """How a token is chosen from its logits; the settings apply in this order, as in
    transformers."""

    repetition_penalty: float = 1.0
    """divides the logits of tokens that the prompt or the reply has, multiplies negative ones
    (Keskar et al., 2019, arXiv:1909.05858)"""
    temperature: float = 0.0
    """divides all logits; 0 takes the likeliest token"""
    top_k: int = 0
    """chooses among so many of the likeliest tokens; 0 among all"""
    top_p: float = 1.0
    """chooses among the likeliest tokens that together reach this probability"""
    min_p: float = 0.0
    """chooses among tokens at least so likely as this fraction of the likeliest"""
    stop_tokens: tuple[int, ...] = ()
    """a sequence ends with any of them"""

    def check(self) -> None:
        """ValueError for a setting that means nothing."""
        if not all(isinstance(value, int | float) for value in self[:-1]):
            raise ValueError(f"sampling needs numbers, found {self[:-1]}")
        limits = {
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
        }
        if wrong := [name for name, is_valid in limits.items() if not is_valid]:
            found = ", ".join(f"{name} {getattr(self, name)}" for name in wrong)
            raise ValueError(
                "sampling needs repetition_penalty > 0, temperature >= 0, top_k >= 0, "
                f"0 < top_p <= 1 and 0 <= min_p <= 1, found {found}"
            )


GREEDY = Sampling()


class Progress(NamedTuple):
    """The state of the generation loop."""

    slot: Array
    """int32 []: of the next token in the cache"""
    lengths_B: Array
    """int32 [B]: tokens of each sequence so far"""
    is_done_B: Array
    logits_BV: Array
    """of the next token"""
    is_seen_BV: Array
    """tokens that the prompt or the reply has; [B, 0] without a repetition penalty"""
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
    **how: Any,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, its stop token included; `how` is that of `stream`."""
    room = {"max_new_tokens": max_new_tokens, "chunk_tokens": max_new_tokens}
    chunks = list(stream(graph, params, prompts, **room, **how))
    return [[*chain(*row)] for row in zip(*chunks, strict=True)]


def stream(
    graph: nnx.GraphDef,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    chunk_tokens: int = 1,
    max_length: int | None = None,
) -> Iterator[list[list[int]]]:
    """Yields the new tokens of each prompt as they come, at most `chunk_tokens` at a time; none of
    a prompt that has ended, or beyond `max_length` tokens of the longest prompt and its reply.
    ValueError for an empty prompt or a setting that means nothing."""
    sampling.check()
    if not prompts or not all(prompts) or min(max_new_tokens, chunk_tokens) < 1:
        raise ValueError(
            "generate needs prompts of at least one token and max_new_tokens >= 1, found prompts "
            f"of {[len(p) for p in prompts]} tokens and {max_new_tokens}"
        )
    longest, left, room = max(map(len, prompts)), max_new_tokens, max_new_tokens
    if max_length is not None:
        if longest >= max_length:
            raise ValueError(f"a prompt of {longest} tokens leaves no room within {max_length}")
        left, room = min(left, max_length - longest), min(room, max_length)
    texts, has_ended = [[*prompt] for prompt in prompts], [False] * len(prompts)
    ropes = [rope for rope, _ in merge(graph, params).config.ropes]
    limits = {rope.turns_after for rope in ropes if rope.turns_after}

    def prefill() -> Progress:
        P = padded_length(max(map(len, texts)))
        tokens_BP = np.zeros((len(texts), min(P, max_length or P)), np.int32)
        for row, text in enumerate(texts):
            tokens_BP[row, : len(text)] = text
        lengths_B, key = np.array([*map(len, texts)], np.int32), jax.random.key(seed)
        return _prefill(graph, sampling, room, params, tokens_BP, lengths_B, key)

    progress, outgrows = prefill(), False
    while left and not all(has_ended):
        if outgrows:
            # What is cached of a text that has become longer than its rope is that of another one.
            kept = {"is_done_B": progress.is_done_B, "key": progress.key}
            progress = prefill()._replace(**kept)
        lengths = [len(text) for text, ended in zip(texts, has_ended, strict=True) if not ended]
        turns = [most + 1 - size for most in limits for size in lengths if size <= most]
        slot = int(progress.slot)
        until = slot + min(chunk_tokens, left, *turns)
        tokens_BC, progress = _decode(graph, sampling, chunk_tokens, params, progress, until)
        chunk = np.asarray(tokens_BC)[:, : int(progress.slot) - slot].tolist()
        for row, tokens in enumerate(chunk):
            ends = [at for at, token in enumerate(tokens) if token in sampling.stop_tokens]
            chunk[row] = [] if has_ended[row] else tokens[: ends[0] + 1] if ends else tokens
            has_ended[row] |= bool(ends)
            texts[row] += chunk[row]
        yield chunk
        left -= until - slot
        outgrows = until - slot in turns


def padded_length(tokens: int) -> int:
    """Of prompts of so many tokens at most."""
    return max(MIN_PROMPT_TOKENS, 1 << (tokens - 1).bit_length())


def unroll(graph: nnx.GraphDef, params: Params) -> tuple[nnx.GraphDef, Params]:
    """The same decoder with the parameters of each layer in arrays of their own, which are copies;
    it generates the same tokens.

    On CPU a loop over stacked layers copies the weights and caches of each layer, which takes
    longer than the products of a single token.
    """
    decoder = merge(graph, params)
    config, blocks, specs = decoder.config, {}, {}
    for g, group in enumerate(config.groups):
        for m, spec in enumerate(group.layers):
            block_graph, stacked = split(decoder.layers[str(g)][str(m)])
            numbers = config.layer_numbers(g, m)
            for number, one in zip(numbers, _cut_layers(stacked, len(numbers)), strict=True):
                blocks[str(number)], specs[number] = nnx.merge(block_graph, one), spec
    layers = tuple(spec for _, spec in sorted(specs.items()))
    decoder.config = replace(config, groups=(LayerGroup(layers, 1),))
    decoder.layers = nnx.Dict({"0": nnx.Dict(blocks)})
    return split(decoder)


@partial(jax.jit, static_argnums=1)
def _cut_layers(stacked: Params, count: int) -> list[Params]:
    return [jax.tree.map(lambda a, at=at: a[at : at + 1], stacked) for at in range(count)]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(
    graph: nnx.GraphDef,
    sampling: Sampling,
    room: int,
    params: Params,
    tokens_BP: Array,
    lengths_B: Array,
    key: Array,
) -> Progress:
    model, (B, P) = merge(graph, params), tokens_BP.shape
    slots_S = jnp.arange(P + room, dtype=jnp.int32)
    segments_BS = (slots_S < lengths_B[:, None]).astype(jnp.int32)
    positions = TokenPositions(segments_BS, jnp.broadcast_to(slots_S, segments_BS.shape))
    prompt_positions = TokenPositions(*(x[:, :P] for x in positions))
    inputs = model.attention_inputs(prompt_positions, positions, jnp.int32(0))
    caches = _empty_caches(model, B, len(slots_S))
    out = model.run_layers(tokens_BP, inputs, caches)
    last_B1D = jnp.take_along_axis(out.x_BTD, lengths_B[:, None, None] - 1, axis=1)
    logits_BV = model.logits(model.normalize(last_B1D))[:, 0]
    is_seen_BV = jnp.zeros((B, 0), bool)
    if sampling.repetition_penalty != 1:
        is_seen_BV = jnp.zeros(logits_BV.shape, bool)
        is_seen_BV = is_seen_BV.at[jnp.arange(B)[:, None], tokens_BP].max(segments_BS[:, :P] > 0)
    is_done_B = jnp.zeros(B, bool)
    return Progress(
        jnp.int32(P), lengths_B, is_done_B, logits_BV, is_seen_BV, out.cache, positions, key
    )


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _decode(
    graph: nnx.GraphDef,
    sampling: Sampling,
    chunk_tokens: int,
    params: Params,
    progress: Progress,
    end: Array,
) -> tuple[Array, Progress]:
    """Generates tokens up to slot `end`, or until every sequence is done: int32 [B, C]."""
    model, begin = merge(graph, params), progress.slot

    def step(carry: tuple[Array, Progress]) -> tuple[Array, Progress]:
        tokens_BC, progress = carry
        at = progress.slot - begin
        token_B, progress = _generate_token(model, sampling, progress)
        return tokens_BC.at[:, at].set(token_B), progress

    unfinished = lambda carry: (carry[1].slot < end) & ~carry[1].is_done_B.all()
    empty_BC = jnp.zeros((len(progress.lengths_B), chunk_tokens), jnp.int32)
    return lax.while_loop(unfinished, step, (empty_BC, progress))


def _generate_token(
    model: Decoder, sampling: Sampling, progress: Progress
) -> tuple[Array, Progress]:
    """Chooses a token from the current logits and computes the next ones."""
    key, sample_key = jax.random.split(progress.key)
    logits_BV = filter_logits(progress.logits_BV, progress.is_seen_BV, sampling)
    token_B = logits_BV.argmax(-1)
    if sampling.temperature > 0:
        token_B = jax.random.categorical(sample_key, logits_BV)
    token_B = token_B.astype(jnp.int32)
    is_stop_B = jnp.isin(token_B, jnp.array(sampling.stop_tokens, jnp.int32))
    is_seen_BV = progress.is_seen_BV
    if sampling.repetition_penalty != 1:
        is_seen_BV = is_seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    # Prompts are padded at their end, and every row puts its next token in the same slot: attention
    # follows the positions, not the order of the slots, and states are those of the last token.
    slot = progress.slot
    positions = TokenPositions(
        progress.positions.segments.at[:, slot].set(1),
        progress.positions.positions.at[:, slot].set(progress.lengths_B),
    )
    q_positions = TokenPositions(*(x[:, slot, None] for x in positions))
    inputs = model.attention_inputs(q_positions, positions, slot)
    out = model.run_layers(token_B[:, None], inputs, progress.caches)
    return token_B, Progress(
        slot=slot + 1,
        lengths_B=progress.lengths_B + 1,
        is_done_B=progress.is_done_B | is_stop_B,
        logits_BV=model.logits(model.normalize(out.x_BTD))[:, 0],
        is_seen_BV=is_seen_BV,
        caches=out.cache,
        positions=positions,
        key=key,
    )


def _empty_caches(model: Decoder, B: int, S: int) -> Caches:
    def empty(block: Block, repeats: int) -> Any:
        cache = block.token_mixer.empty_cache(repeats, B, S, model.compute.compute_dtype)
        return cache if repeats > 1 else jax.tree.map(partial(jnp.squeeze, axis=0), cache)

    return {
        str(g): {m: empty(block, group.repeats) for m, block in model.layers[str(g)].items()}
        for g, group in enumerate(model.config.groups)
    }


def filter_logits(logits_BV: Array, is_seen_BV: Array, sampling: Sampling) -> Array:
    """The logits from which a token is drawn, -inf for those that `sampling` rules out."""
    if (penalty := sampling.repetition_penalty) != 1:
        penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
        logits_BV = jnp.where(is_seen_BV, penalized_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        lowest_B1 = lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it do not yet reach top_p; so the likeliest always stays.
        is_kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < sampling.top_p
        lowest_B1 = jnp.where(is_kept_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    if sampling.min_p > 0:
        lowest_B1 = logits_BV.max(-1, keepdims=True) + math.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
    return logits_BV
