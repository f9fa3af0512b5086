"""The gated delta rule in chunks against one token after another in float64; documents that share
a sequence against each alone; the state against a longer sequence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.delta_rule import (
    delta_rule,
    delta_step,
    invert_unit_lower,
    last_tokens,
    short_convolution,
)
from tests.runs import mesh_of

B, T, K, G, A, C, S = 3, 50, 2, 3, 5, 4, 4
TOLERANCE = 2e-5  # float32, of the largest number: sums over T tokens, each rounded a few times


def draw_tokens(seed, shape=(B, T)):
    """Queries, unit keys of which some are alike, values, log decays from 0 to many, strengths."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(*shape, *x)) for x in ((K, A), (K, A), (K, G, C)))
    k[:, 1::3] = k[:, :1]
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -np.exp(rng.normal(-2, 3, (*shape, K, G)))
    strength = rng.uniform(0, 1, (*shape, K, G)) ** 0.3
    return tuple(x.astype(np.float32) for x in (q, k, v, log_decay, strength))


def draw_segments(seed):
    """Documents cut anywhere, of one token too, then padding; the last row is padding alone."""
    rng = np.random.default_rng(seed)
    starts = rng.random((B, T)) < 0.15
    starts[:, [0, 7, 8]] = True
    segments = np.cumsum(starts, axis=1)
    segments[:, -rng.integers(1, 6) :] = 0
    segments[-1] = 0
    return segments.astype(np.int32)


def blank_padding(tokens, segments):
    """The same tokens, of which those of padding neither decay nor write."""
    q, k, v, log_decay, strength = tokens
    is_token = (segments != 0)[..., None, None]
    return q, k, v, log_decay * is_token, strength * is_token


def one_by_one(is_first_BT, *arrays):
    """The definition: what tokens read and the state after the last, of the first state and tokens;
    a first token forgets the state."""

    def step(state, token):
        is_first, q, k, v, log_decay, strength = token
        state = jnp.where(is_first, 0, state) * jnp.exp(log_decay)[..., None, None]
        known = jnp.einsum("ka,kgac->kgc", k, state)
        state += jnp.einsum("ka,kgc->kgac", k, strength[..., None] * (v - known))
        return state, jnp.einsum("ka,kgac->kgc", q, state)

    def row(is_first_T, state, *tokens):
        return jax.lax.scan(step, state, (is_first_T, *tokens))[::-1]

    return jax.vmap(row)(is_first_BT, *arrays)


@partial(jax.jit, static_argnums=0)
def pull(rule, where, arrays, cotangents):
    """Output, and gradients of the arrays for those of the output."""
    out, back = jax.vjp(partial(rule, where), *arrays)
    return *out, *back(cotangents)


def check(rule, where, is_first, arrays, *, seed=0):
    """Output and gradients of a rule agree with the definition in float64."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(rule, where), *arrays)
    cotangents = tuple(rng.normal(size=x.shape).astype(np.float32) for x in shapes)
    found = pull(rule, where, arrays, cotangents)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.float64, (arrays, cotangents))
        expected = jax.tree.map(np.asarray, pull(one_by_one, is_first, *exact))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == np.float32 and y.dtype == np.float64
        np.testing.assert_allclose(x, y, atol=TOLERANCE * max(1, np.abs(y).max()))
    return found


def packed(chunk_tokens, segments, _, *tokens):
    return delta_rule(*tokens, segments_BT=segments, chunk_tokens=chunk_tokens)


def continued(chunk_tokens, _, state, *tokens):
    return delta_rule(*tokens, state_BKGAC=state, chunk_tokens=chunk_tokens)


RULES = {size: (partial(packed, size), partial(continued, size)) for size in (7, 64)}
"""The same functions for all draws, so that each is compiled once."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("chunk_tokens", RULES)
def test_chunks_are_one_token_after_another_forward_and_backward(chunk_tokens, seed):
    segments = draw_segments(seed)
    is_first = np.diff(segments, axis=1, prepend=-1) != 0
    none = np.zeros((B, K, G, A, C), np.float32)
    tokens = blank_padding(draw_tokens(seed), segments)
    y, *_ = check(RULES[chunk_tokens][0], segments, is_first, (none, *tokens))
    assert not np.any(y[-1])  # padding reads nothing


def test_tokens_continue_the_document_of_a_state():
    first = np.random.default_rng(1).normal(size=(B, K, G, A, C)).astype(np.float32)
    none = np.zeros((B, T), bool)
    check(RULES[7][1], none, none, (first, *draw_tokens(2)))


def test_documents_in_one_sequence_do_not_see_each_other():
    """What one holds changes no bit of the others."""
    segments, tokens = draw_segments(5), draw_tokens(5)
    rule = jax.jit(RULES[7][0])
    whole = rule(segments, None, *tokens)[0]
    for number in range(1, 5):
        is_other = (segments != number)[..., None, None]
        noise = draw_tokens(number + 9)
        mixed = [
            np.where(is_other if x.ndim == 4 else is_other[..., None], y, x)
            for x, y in zip(tokens, noise, strict=True)
        ]
        found = rule(segments, None, *mixed)[0]
        np.testing.assert_array_equal(found[segments == number], whole[segments == number])


def test_a_state_grows_token_by_token_to_that_of_the_whole():
    tokens = draw_tokens(3)
    y, state = jax.jit(delta_rule)(*tokens)
    now, step = jnp.zeros_like(state), jax.jit(delta_step)
    for t in range(T):
        one, now = step(*(x[:, t : t + 1] for x in tokens), state_BKGAC=now)
        np.testing.assert_allclose(one[:, 0], y[:, t], atol=TOLERANCE)
    np.testing.assert_allclose(now, state, atol=TOLERANCE)


def test_equal_keys_that_never_decay_are_stable():
    """The powers of this matrix have entries of 1e18; its inverse none above 1."""
    lower = jnp.tril(jnp.ones((2, 64, 64)), -1)
    expected = np.eye(64) - np.eye(64, k=-1)
    np.testing.assert_array_equal(invert_unit_lower(lower), np.stack([expected] * 2))


@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_unit_triangle_is_inverted_with_its_gradient(size):
    rng = np.random.default_rng(size)
    lower, d_inverse = (
        np.tril(rng.uniform(-1, 1, (2, size, size)), -1),
        rng.normal(size=(size, size)),
    )
    with jax.enable_x64(True):
        found, back = jax.vjp(invert_unit_lower, lower)
        expected, back_2 = jax.vjp(lambda x: jnp.linalg.inv(jnp.eye(size) + jnp.tril(x, -1)), lower)
        np.testing.assert_allclose(found, expected, atol=1e-9)
        d_inverse = jnp.broadcast_to(d_inverse, lower.shape)
        np.testing.assert_allclose(back(d_inverse)[0], back_2(d_inverse)[0], atol=1e-9)


def test_memory_grows_linearly_with_the_tokens():
    def temporaries(tokens):
        shapes = jax.eval_shape(lambda: tuple(map(jnp.asarray, draw_tokens(0, (1, tokens)))))
        total = lambda *x: delta_rule(*x, chunk_tokens=16)[0].sum()
        compiled = jax.jit(jax.grad(total, range(5))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1024) < 4.2 * temporaries(256)


def test_heads_on_several_devices_exchange_nothing():
    tokens, segments = draw_tokens(0, (4, 40)), np.ones((4, 40), np.int32)
    rule = RULES[7][0]
    cotangents = jax.tree.map(jnp.ones_like, jax.eval_shape(partial(rule, segments, None), *tokens))

    def run(where, tokens):
        out, back = jax.vjp(lambda *x: rule(where, None, *x), *tokens)
        return out, back(cotangents)

    expected = jax.jit(run)(segments, tokens)
    mesh = mesh_of(fsdp=2, tensor=2)
    rows, heads = (NamedSharding(mesh, P("fsdp", None, *x)) for x in ((), ("tensor",)))
    with jax.set_mesh(mesh):
        placed = jax.device_put(segments, rows), jax.device_put(tokens, heads)
        compiled = jax.jit(run).lower(*placed).compile()
        found = compiled(*placed)
    assert not {"all-gather", "all-reduce", "all-to-all"} & {*compiled.as_text().split("(")}
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(3))
def test_a_convolution_sees_the_last_tokens_of_its_document(seed):
    rng, segments = np.random.default_rng(seed), draw_segments(seed)
    x, w = rng.normal(size=(B, T, 2, 5)), rng.normal(size=(S, 2, 5))
    expected = np.zeros_like(x)
    for t in range(T):
        for lag in range(min(S, t + 1)):
            is_same = (segments[:, t] == segments[:, t - lag])[:, None, None]
            expected[:, t] += is_same * w[S - 1 - lag] * x[:, t - lag]
    found = short_convolution(jnp.float32(x), jnp.float32(w), segments_BT=jnp.array(segments))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("lengths", [(9, 1, 4), (2, 3, 0)])
def test_a_convolution_continues_behind_the_last_token_of_each_sequence(lengths):
    """Of prompts that are padded at their end, shorter than its taps too."""
    rng = np.random.default_rng(0)
    x, w = (jnp.float32(rng.normal(size=shape)) for shape in ((3, 9, 5), (S, 5)))
    later = jnp.float32(rng.normal(size=(3, 2, 5)))
    is_token = np.arange(9) < np.array(lengths)[:, None]
    past = last_tokens(x, jnp.zeros((3, S - 1, 5)), jnp.int32(is_token))
    found = short_convolution(later, w, past_BSX=past)
    for row, length in enumerate(lengths):
        whole = jnp.concatenate([x[row, :length], later[row]])[None]
        np.testing.assert_allclose(found[row], short_convolution(whole, w)[0, length:], atol=1e-6)
