"""One set of properties for every implementation of attention that runs on this machine."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.attention import Device, Scoring, TokenPositions, attention, choose
from jaxtrain.kernels.attention.mask import visible_keys
from jaxtrain.kernels.attention.triton import block_ranges
from tests.runs import mesh_of

IMPLEMENTATIONS = ["reference", "splash_interpret", "triton_interpret"]
N, K, H = 4, 2, 64
RULES = {"plain": {}, "window": {"window": 9}, "capped": {"softcap": 0.7, "scale": 0.3}}


def naive_attention(
    q, k, v, q_positions, kv_positions, *, window=None, scale=H**-0.5, softcap=None
):
    """All scores at once, gradients by autodiff."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    scores = softcap * jnp.tanh(scores / softcap) if softcap else scores
    distance = q_positions.positions[:, :, None] - kv_positions.positions[:, None]
    seen = (q_positions.segments[:, :, None] == kv_positions.segments[:, None]) & (distance >= 0)
    seen &= (q_positions.segments != 0)[:, :, None]
    if window:
        seen &= distance < window
    seen = seen[:, None]
    weights = jax.nn.softmax(scores, axis=-1, where=seen)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(seen, weights, 0), v)


def packed(*rows: tuple[int, ...], tokens: int) -> TokenPositions:
    """Rows of documents of the given lengths, filled up with padding."""
    segments, positions = np.zeros((2, len(rows), tokens), np.int32)
    for b, lengths in enumerate(rows):
        start = 0
        for i, length in enumerate(lengths):
            segments[b, start : start + length] = i + 1
            positions[b, start : start + length] = np.arange(length)
            start += length
    return TokenPositions(jnp.asarray(segments), jnp.asarray(positions))


def random_qkv(B, T, S=None, *, heads=(N, K), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(B * 1000 + T), 3)
    shapes = [(B, T, heads[0], H), (B, S or T, heads[1], H), (B, S or T, heads[1], H)]
    return tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))


def attend(implementation, q_positions, kv_positions=None, **rule):
    """The attention to test, or the naive one, as a function of q, k and v."""
    kv_positions = q_positions if kv_positions is None else kv_positions
    if implementation == "naive":
        return partial(naive_attention, q_positions=q_positions, kv_positions=kv_positions, **rule)
    return partial(
        attention,
        q_positions=q_positions,
        kv_positions=kv_positions,
        implementation=implementation,
        scoring=Scoring(**{"scale": H**-0.5, **rule}),
    )


@partial(jax.jit, static_argnums=(0, 1))
def pull(implementation, rule, positions, kv_positions, q, k, v, d_out):
    """Output, and gradients of q, k and v for the given gradient of the output."""
    out, back = jax.vjp(attend(implementation, positions, kv_positions, **dict(rule)), q, k, v)
    return out, *back(d_out)


def check(implementation, positions, qkv, *, kv_positions=None, rule=(), atol=1e-5):
    """Output and gradients agree with the naive definition; returns them."""
    shape = (*qkv[0].shape[:-1], qkv[2].shape[-1])
    d_out = jax.random.normal(jax.random.key(9), shape, qkv[0].dtype)
    kv_positions = positions if kv_positions is None else kv_positions
    found = pull(implementation, rule, positions, kv_positions, *qkv, d_out)
    exact = [x.astype(jnp.float32) for x in (*qkv, d_out)]
    for x, y in zip(found, pull("naive", rule, positions, kv_positions, *exact), strict=True):
        assert x.dtype == qkv[0].dtype
        np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=atol, rtol=atol)
    return found


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_packed_row_equals_each_document_alone(implementation, rule):
    rule, lengths, T = tuple(rule.items()), (70, 1, 129), 210
    positions = packed(lengths, tokens=T)
    qkv = random_qkv(1, T)
    d_out = jax.random.normal(jax.random.key(9), qkv[0].shape)
    together = pull(implementation, rule, positions, positions, *qkv, d_out)
    start = 0
    for length in lengths:
        cut = slice(start, start + length)
        alone_positions = packed((length,), tokens=length)
        x = [x[:, cut] for x in (*qkv, d_out)]
        alone = pull("naive", rule, alone_positions, alone_positions, *x)
        for one, all_ in zip(alone, together, strict=True):
            np.testing.assert_allclose(all_[:, cut], one, atol=1e-5)
        start += length
    for x in together:  # the padding at the end
        assert not np.any(x[:, start:])


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [40, 96])
def test_values_may_be_smaller_or_larger_than_keys(implementation, size):
    q, k, _ = random_qkv(2, 140)
    v = jax.random.normal(jax.random.key(3), (2, 140, K, size))
    check(implementation, packed((70, 1, 60), (130,), tokens=140), (q, k, v))


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [{}, {"window": 9}], ids=["all", "window"])
def test_a_sink_is_a_key_without_a_value_that_every_query_sees(implementation, rule):
    """Forward and backward, against one more score in each softmax; padding still gives 0."""
    T = 210
    positions = packed((70, 1, 129), (200,), tokens=T)
    qkv = random_qkv(2, T)
    sinks = jnp.array([-1.0, 0.5, 3.0, 20.0])  # of no weight to nearly all of it
    d_out = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def definition(q, k, v, sinks):
        k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
        seen = visible_keys(positions, positions, rule.get("window"))[:, None]
        scores = jnp.where(seen, scores, -jnp.inf)
        sinks = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1))[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def found(q, k, v, sinks):
        scoring = Scoring(H**-0.5, **rule)
        where = {"q_positions": positions, "kv_positions": positions, "scoring": scoring}
        return attention(q, k, v, **where, sinks_N=sinks, implementation=implementation)

    def outputs(function):
        out, back = jax.vjp(jax.jit(function), *qkv, sinks)
        return out, *back(d_out)

    for one, other in zip(outputs(found), outputs(definition), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [(6, 2), (4, 1)])
def test_heads_share_keys_in_groups(implementation, heads):
    positions = packed((40,), (13, 20), tokens=40)
    check(implementation, positions, random_qkv(2, 40, heads=heads))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_stays_near_float32(implementation):
    positions = packed((100, 31), tokens=140)
    check(implementation, positions, random_qkv(1, 140, dtype=jnp.bfloat16), atol=4e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_of_padding_alone_is_zero(implementation):
    positions = packed((), (20,), tokens=20)
    found = check(implementation, positions, random_qkv(2, 20))
    for x in found:
        assert not np.any(x[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_gradient_from_later_tokens_or_other_documents(implementation):
    positions, t = packed((60, 80), tokens=140), 100
    q, k, v = random_qkv(1, 140)
    d_out = jnp.zeros_like(q).at[:, t].set(1.0)
    _, *grads = pull(implementation, (), positions, positions, q, k, v, d_out)
    for grad in grads:
        assert not np.any(grad[:, t + 1 :])
        assert not np.any(grad[:, :60])
        assert np.any(grad[:, t])


@pytest.mark.parametrize(
    ("tokens", "rule"), [(1, ()), (300, ()), (389, (("window", 30),))], ids=["1", "300", "window"]
)
def test_reference_takes_any_length(tokens, rule):
    positions = packed((tokens // 3, tokens - tokens // 3), tokens=tokens)
    check("reference", positions, random_qkv(1, tokens), rule=rule)


@pytest.mark.each_value_once
@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rule", [(), (("window", 200),)])
def test_long_rows_agree_where_blocks_are_looped_over(implementation, rule):
    tokens = 1300  # eleven blocks in six bands for the reference
    positions = packed((500, 90, 700), tokens=tokens)
    check(implementation, positions, random_qkv(1, tokens, heads=(2, 1)), rule=rule)


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", ["reference", "triton_interpret"])
@pytest.mark.parametrize("queries", [1, 140])
def test_a_cache_may_be_in_any_order_with_empty_slots(implementation, queries):
    """Slots of a cache are shuffled, some are empty; the queries are the last tokens."""
    slots, filled = 190, 170
    order = np.random.default_rng(0).permutation(slots)
    segments = np.where(np.arange(slots) < filled, 1, 0)[order]
    kv_positions = TokenPositions(jnp.asarray(segments)[None], jnp.asarray(order)[None])
    positions = np.arange(filled - queries, filled)
    q_positions = TokenPositions(jnp.ones((1, queries), jnp.int32), jnp.asarray(positions)[None])
    qkv = random_qkv(1, queries, slots)
    for rule in ((), (("window", 20),)):
        check(implementation, q_positions, qkv, kv_positions=kv_positions, rule=rule)


@pytest.mark.parametrize("window", [None, 1, 5, 13])
def test_blocks_that_are_skipped_have_no_visible_pair(window):
    """Nor are others read, where segments and positions rise; with shuffled keys more are."""
    rng, R, C = np.random.default_rng(0), 8, 4
    for _ in range(10):
        cuts = [tuple(rng.integers(1, 20, rng.integers(0, 5))) for _ in range(3)]
        q = packed(*cuts, tokens=96)
        order = rng.permutation(96)
        shuffled = TokenPositions(*(x[:, order] for x in q))
        for kv, is_exact in ((q, True), (shuffled, False)):
            seen = np.asarray(visible_keys(q, kv, window)).reshape(3, 96 // R, R, 96 // C, C)
            seen = seen.any((2, 4))
            found = block_ranges(q, kv, window, R, C)
            for (first, end), axis in ((found.of_queries, 2), (found.of_keys, 1)):
                index = np.arange(seen.shape[axis]).reshape((-1, 1) if axis == 1 else -1)
                inside = (index >= np.expand_dims(first, axis)) & (
                    index < np.expand_dims(end, axis)
                )
                assert not np.any(seen & ~inside)
                if is_exact:
                    np.testing.assert_array_equal(inside, seen)


def test_splash_refuses_a_cache():
    positions, kv_positions = packed((3,), tokens=3), packed((9,), tokens=9)
    with pytest.raises(NotImplementedError, match="3 queries and 9 keys"):
        attend("splash_interpret", positions, kv_positions)(*random_qkv(1, 3, 9))


def test_a_policy_that_saves_attention_runs_the_forward_once():
    positions = packed((200,), tokens=200)
    qkv = random_qkv(1, 200)
    layer = attend("reference", positions)

    def scanned(policy, qkv):
        q, k, v = qkv
        step = jax.checkpoint(lambda q, _: (layer(q, k, v), None), policy=policy)
        return jax.lax.scan(step, q, None, length=2)[0].sum()

    def exponentials(policy):
        return str(jax.make_jaxpr(jax.grad(partial(scanned, policy)))(qkv)).count(" exp ")

    policies = jax.checkpoint_policies
    saving = policies.save_only_these_names("attention")
    assert exponentials(saving) < exponentials(policies.nothing_saveable)
    plain = jax.jit(jax.grad(partial(scanned, policies.everything_saveable)))(qkv)
    for x, y in zip(jax.jit(jax.grad(partial(scanned, saving)))(qkv), plain, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def shard(mesh, positions, qkv):
    heads = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
    rows = NamedSharding(mesh, P(("data", "fsdp"), None))
    return jax.device_put(positions, rows), jax.device_put(qkv, heads)


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "tensor": 2, "pipeline": 2}], ids=str)
def test_the_mesh_changes_nothing_and_gathers_nothing(implementation, sizes):
    positions = packed(*[(9, 20), (33,), (5, 5, 5), ()] * 2, tokens=33)
    qkv = random_qkv(8, 33)
    d_out = jnp.ones_like(qkv[0])
    truth = pull("naive", (), positions, positions, *qkv, d_out)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        positions, (*qkv, d_out) = shard(mesh, positions, (*qkv, d_out))
        compiled = pull.lower(implementation, (), positions, positions, *qkv, d_out).compile()
        found = compiled(positions, positions, *qkv, d_out)
    assert "all-gather" not in compiled.as_text()
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.each_value_once
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("tensor", [1, 2])
def test_attention_nests_in_a_pipeline_stage(implementation, tensor):
    positions = packed(*[(9, 20), (33,)] * 2, tokens=33)
    qkv = random_qkv(4, 33)
    mesh = mesh_of(pipeline=2, tensor=tensor)
    layer = attend(implementation, positions)

    def stage(q, k, v):
        return jax.lax.ppermute(layer(q[0], k[0], v[0])[None], "pipeline", [(0, 1), (1, 0)])

    def total(qkv):
        stages = jax.shard_map(
            stage,
            in_specs=(P("pipeline"),) * 3,
            out_specs=P("pipeline"),
            axis_names={"pipeline"},
            check_vma=False,
        )
        out = stages(*(jnp.stack([x, x / 2]) for x in qkv))
        return jnp.sum(out[0] ** 2) + jnp.sum(out[1])

    def expected(qkv):
        naive = attend("naive", positions)
        return jnp.sum(naive(*(x / 2 for x in qkv)) ** 2) + jnp.sum(naive(*qkv))

    truth = jax.jit(jax.grad(expected))(qkv)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.grad(total))(qkv)
    for x, y in zip(found, truth, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5)


def lowered(implementation, device, kind, platform):
    """The text of output and gradients for hardware that is not here."""
    positions, qkv = packed((100, 28), tokens=130), random_qkv(1, 130, dtype=jnp.bfloat16)
    chip = AbstractDevice(device_kind=kind, num_cores=None, platform=device)
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)):
        traced = pull.trace(implementation, (), positions, positions, *qkv, jnp.ones_like(qkv[0]))
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_kernels_are_in_the_lowered_text_forward_and_backward():
    """One for the output, one for the gradient of queries, one for those of keys and values."""
    assert lowered("splash", "tpu", "TPU v5 lite", "tpu").count("tpu_custom_call") >= 3
    gpu = lowered("triton", "gpu", "NVIDIA H200", "cuda")
    assert gpu.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
    ("device", "expected"),
    {
        Device("cpu"): "reference",
        Device("tpu"): "splash",
        Device("gpu"): "triton",
        Device("cuda", "8.9"): "triton",
        Device("gpu", "10.0"): "triton",
        Device("gpu", "7.5"): "reference",
        Device("gpu", "gfx942"): "reference",
    }.items(),
    ids=str,
)
def test_choice_is_pinned_per_device(device, expected):
    shape = {"head_sizes": (64, 128), "tokens": 512}
    assert choose(device, wanted="auto", **shape).name == expected
    assert choose(device, wanted="reference", **shape).name == "reference"
    if expected != "reference":
        assert choose(device, wanted="pallas", **shape).name == expected


@pytest.mark.parametrize(
    ("device", "head_size", "why"),
    [
        (Device("cpu"), 64, "no Pallas kernel for platform 'cpu'"),
        (Device("tpu"), 80, "multiple of 64, found 80"),
        (Device("gpu"), 512, "at most 256, found 512"),
        (Device("gpu", "7.5"), 64, "8.0 or newer, found '7.5'"),
        (Device("gpu", "gfx942"), 64, "NVIDIA"),
    ],
    ids=str,
)
def test_a_forced_kernel_that_cannot_run_is_an_error(device, head_size, why):
    shape = {"head_sizes": (64, head_size), "tokens": 512}
    with pytest.raises(ValueError, match=f"'pallas' cannot run: .*{why}"):
        choose(device, wanted="pallas", **shape)
    choice = choose(device, wanted="auto", **shape)
    assert choice.name == "reference" and why in choice.reason


def test_short_rows_are_left_to_the_reference_on_tpu_alone():
    shape = {"wanted": "auto", "head_sizes": (64,), "tokens": 32}
    assert choose(Device("tpu"), **shape).name == "reference"
    assert choose(Device("gpu"), **shape).name == "triton"


def test_heads_that_are_too_large_are_refused_where_they_are_computed():
    positions, q = packed((3,), tokens=3), jnp.zeros((1, 3, 1, 320))
    with pytest.raises(NotImplementedError, match="at most 256, found 320"):
        attend("triton", positions)(q, q, q)
