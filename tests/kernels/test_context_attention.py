"""Attention of sequences that devices share, against one device that has them whole."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention import (
    Scoring,
    attention,
    choose_exchange,
    to_ring_order,
    to_row_order,
)
from tests.kernels.test_attention import H, packed, random_qkv
from tests.runs import mesh_of

T = 32
ROWS = [(9, 20), (32,), (5, 1, 5), (31,)]
RULES = {
    "plain": {},
    "window": {"window": 5},
    "long window": {"window": 19},
    "capped": {"softcap": 0.7},
}


@partial(jax.jit, static_argnums=(0, 1, 2))
def pull(scoring, exchange, kernel, positions, qkv, sinks, d_out):
    """Output, and gradients of q, k, v and sinks, all in row order."""

    def attend(qkv, sinks):
        inputs, parts = (qkv, positions), jax.sharding.get_abstract_mesh().shape.get("context", 1)
        is_ring = exchange == "ring"
        (q, k, v), placed = to_ring_order(inputs, parts=parts) if is_ring else inputs
        out = attention(
            q, k, v, q_positions=placed, kv_positions=placed, scoring=scoring, sinks_N=sinks,
            implementation=kernel, exchange=exchange,
        )  # fmt: skip
        return to_row_order(out, parts=parts) if is_ring else out

    out, back = jax.vjp(attend, qkv, sinks)
    return out, *back(d_out)


def check(exchange, sizes, *, rule=(), heads=(8, 4), sinks=None, kernel="reference", tokens=T):
    scoring, rows = Scoring(H**-0.5, **dict(rule)), ROWS
    if tokens != T:
        rows = [(tokens // 3, tokens // 2), (tokens,)]
    positions, qkv = packed(*rows, tokens=tokens), random_qkv(len(rows), tokens, heads=heads)
    d_out = jax.random.normal(jax.random.key(9), qkv[0].shape)
    wanted = pull(scoring, None, "reference", positions, qkv, sinks, d_out)
    mesh = mesh_of(**sizes)
    cut = NamedSharding(mesh, P(("data", "fsdp"), "context"))
    with jax.set_mesh(mesh):
        found = pull(
            scoring, exchange, kernel, *jax.device_put((positions, qkv), cut), sinks,
            jax.device_put(d_out, cut),
        )  # fmt: skip
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_devices_that_share_sequences_change_nothing(exchange, rule):
    """Forward and backward: packed documents that lie across the cuts, padding, grouped heads."""
    check(exchange, {"context": 4, "data": 2}, rule=tuple(rule.items()))


@pytest.mark.parametrize(
    ("exchange", "sizes"),
    [
        ("ring", {"context": 2, "tensor": 2}),
        ("all_to_all", {"context": 2, "tensor": 2}),
        pytest.param("ring", {"context": 8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sinks_are_those_of_the_heads_of_a_device(exchange, sizes):
    sinks = jnp.linspace(-2.0, 4.0, 8)
    check(exchange, sizes, sinks=sinks, rule=(("window", 9),))


@pytest.mark.parametrize(
    ("exchange", "rule"),
    [
        ("all_to_all", {"window": 5}),
        *(
            pytest.param("ring", rule, marks=pytest.mark.slow)
            for rule in ({"softcap": 0.7}, {"window": 5})
        ),
    ],
    ids=str,
)
def test_splash_attends_on_each_device(exchange, rule):
    """In interpret mode; pieces are shorter than its blocks, and are filled up."""
    rule, sinks = tuple(rule.items()), jnp.linspace(-2.0, 4.0, 4)
    check(exchange, {"context": 2}, rule=rule, heads=(4, 2), sinks=sinks, kernel="splash_interpret")


@pytest.mark.slow
def test_splash_attends_to_pieces_of_several_blocks():
    check("ring", {"context": 2}, heads=(2, 1), kernel="splash_interpret", tokens=1280)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(8, 1), (3, 3), (6, 2)], ids=str)
@pytest.mark.parametrize("context", [2, 4, 8])
def test_a_ring_takes_any_heads(heads, context):
    check("ring", {"context": context}, heads=heads)


@pytest.mark.parametrize("context", [2, 4, 8])
def test_the_order_of_the_ring_gives_each_device_an_early_and_a_late_piece(context):
    """And that of rows comes back, of any array and under differentiation."""
    mesh = mesh_of(context=context)
    row = jnp.arange(2 * 16 * 3).reshape(2, 16, 3).astype(jnp.float32)
    cut = NamedSharding(mesh, P(None, "context"))
    pieces = np.split(np.asarray(row), 2 * context, axis=1)
    order = [piece for i in range(context) for piece in (i, 2 * context - 1 - i)]

    def there_and_back(x):
        ring = to_ring_order(x, parts=context)
        return to_row_order(ring, parts=context), ring

    with jax.set_mesh(mesh):
        (back, ring), pull = jax.vjp(jax.jit(there_and_back), jax.device_put(row, cut))
        (d_row,) = pull((jnp.zeros_like(row), row))
    np.testing.assert_array_equal(ring, np.concatenate([pieces[i] for i in order], 1))
    np.testing.assert_array_equal(back, row)
    backward = np.split(np.asarray(row), 2 * context, axis=1)
    np.testing.assert_array_equal(
        d_row, np.concatenate([backward[order.index(i)] for i in range(2 * context)], 1)
    )


@pytest.mark.parametrize(
    ("heads", "parts", "tensor", "way"),
    [
        ([(32, 8)], 8, 1, "all_to_all"),
        ([(32, 8)], 2, 4, "all_to_all"),
        ([(32, 8)], 4, 4, "2 copies"),
        ([(32, 8), (32, 4)], 16, 1, "4 copies"),
        ([(48, 6)], 16, 1, "8 copies"),
        ([(32, 8)], 8, 8, "ring"),
        ([(32, 8), (24, 8)], 16, 1, "ring"),  # one order of tokens for all layers
    ],
)
def test_the_way_follows_from_the_heads(heads, parts, tensor, way):
    found, reason = choose_exchange(heads, parts=parts, tensor=tensor)
    assert way in (found, *re.findall(r"\d copies", reason)) and f"context {parts}" in reason


@pytest.mark.parametrize(
    ("heads", "sizes"),
    [
        ((8, 1), {"context": 8}),
        ((8, 4), {"context": 4, "tensor": 2}),
        pytest.param((12, 6), {"context": 4}, marks=pytest.mark.slow),
        pytest.param((8, 2), {"context": 4, "data": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_key_is_copied_for_all_devices_whose_queries_read_it(heads, sizes):
    check("all_to_all", sizes, heads=heads, sinks=jnp.linspace(-2.0, 4.0, heads[0]))
