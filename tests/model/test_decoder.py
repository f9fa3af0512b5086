"""What a decoder must do whatever its weights: isolation of documents, causality, equal remat."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh
from model_rows import batch_of, random_tokens

from jaxtrain.batch import Batch
from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec, Norm, group_layers
from jaxtrain.model.decoder import Decoder, Model, abstract, init_params, merge, run_group, split
from jaxtrain.model.layers import ACTIVATIONS, AttentionInputs, activate, normalize
from jaxtrain.model.rope import Llama3, Rope
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.mesh import MeshConfig

ROPE = Rope(1e4, Llama3(8.0, 1.0, 4.0, 32))
CONFIG = DecoderConfig(
    family="qwen3",
    vocab_size=96,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    ffn_width=48,
    groups=group_layers((LayerSpec(rope=ROPE), LayerSpec(), LayerSpec(window=5, rope=ROPE))),
    norm=Norm(0.02),
    max_positions=64,
    qkv_bias=True,
    out_bias=True,
    qk_norm="head",
    initializer_range=0.1,
)


PLAIN = ComputeConfig()


@cache
def build(compute: ComputeConfig = PLAIN) -> tuple[Model, dict]:
    model = abstract(CONFIG, compute)
    return model, jax.jit(partial(init_params, CONFIG, compute))(jax.random.key(0))


def inputs_of(decoder: Decoder, batch: Batch) -> AttentionInputs:
    positions = TokenPositions(batch.segments, batch.positions)
    return decoder.attention_inputs(positions, positions)


def packed_rows(*lengths: int) -> tuple[Batch, list[np.ndarray]]:
    """Documents of these lengths and three tokens of padding in one row; and each alone."""
    count = len(lengths)
    segments = np.repeat([*range(1, count + 1), 0], [*lengths, 3])[None]
    tokens = random_tokens(1, segments.size)
    return batch_of(tokens, segments), [tokens[:, segments[0] == s + 1] for s in range(count)]


def test_a_document_in_a_packed_row_equals_the_document_alone():
    model, params = build()
    packed, documents = packed_rows(9, 1, 11)

    @jax.jit
    def outputs(params, batch):
        decoder = merge(model.graph, params)
        return decoder(batch), decoder.token_log_probs(batch)

    logits, logps = outputs(params, packed)
    start = 0
    for document in documents:
        alone_logits, alone_logps = outputs(params, batch_of(document))
        end = start + document.shape[1]
        np.testing.assert_allclose(logits[:, start:end], alone_logits, atol=2e-5)
        np.testing.assert_allclose(logps[:, start:end], alone_logps, atol=2e-5)
        start = end
    assert np.isfinite(logits).all()


def test_gradients_of_a_packed_row_are_the_sum_of_those_of_its_documents():
    model, params = build()
    packed, documents = packed_rows(11, 11)

    @jax.jit
    def gradient(params, batch):
        return jax.grad(lambda p: merge(model.graph, p).token_log_probs(batch).sum())(params)

    apart = [gradient(params, batch_of(document)) for document in documents]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *apart)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), gradient(params, packed), summed)


def test_no_gradient_flows_back_in_time():
    model, params = build()
    batch = batch_of(random_tokens(1, 16))
    decoder = merge(model.graph, params)
    x_BTD = decoder.embed_tokens(batch.tokens, batch.positions)

    @jax.jit
    def gradient(x_BTD, t):
        out = lambda x_BTD: decoder.stack(x_BTD, inputs_of(decoder, batch))[0][0, t].sum()
        return jax.grad(out)(x_BTD)[0]

    for t in (0, 7, 14):
        by_token = np.abs(gradient(x_BTD, t)).sum(-1)
        assert (by_token[t + 1 :] == 0).all() and (by_token[: t + 1] > 0).any()


def test_token_log_probs_are_those_of_the_logits():
    model, params = build()
    batch, _ = packed_rows(9, 1, 11)
    logps = jax.jit(lambda p: jax.nn.log_softmax(merge(model.graph, p)(batch)))(params)
    expected = np.take_along_axis(np.asarray(logps)[:, :-1], batch.tokens[:, 1:, None], 2)[..., 0]
    is_first = batch.positions[:, 1:] == 0
    expected = np.where(is_first | (batch.segments[:, 1:] == 0), 0, expected)
    found = jax.jit(lambda p: merge(model.graph, p).token_log_probs(batch))(params)
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)
    assert found[0, 0] == 0


def test_a_loss_of_logits_of_targets_equals_the_built_in_one():
    """Written as the page says: logits, targets and weights of token t stand at t."""
    model, params = build()
    batch, _ = packed_rows(9, 1, 11)
    decoder = merge(model.graph, params)
    logits = decoder.logits_of_targets(batch)
    by_token = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens))
    expected = decoder.weighted_nll(batch, batch.loss_weights).total
    np.testing.assert_allclose((by_token * batch.loss_weights).sum(), expected, rtol=1e-5)
    is_predicted = decoder.token_log_probs(batch) != 0
    assert (np.asarray(logits).any(-1) == is_predicted).all()


def test_the_weighted_sum_is_that_of_the_log_probs():
    model, params = build()
    batch, _ = packed_rows(9, 1, 11)
    weights = np.random.default_rng(0).random(batch.tokens.shape, np.float32)
    summed = lambda p: merge(model.graph, p).weighted_nll(batch, weights)[0]
    by_token = lambda p: -(merge(model.graph, p).token_log_probs(batch) * weights).sum()
    found, expected = (jax.jit(jax.value_and_grad(loss))(params) for loss in (summed, by_token))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def test_remat_changes_neither_loss_nor_gradient():
    batch, _ = packed_rows(9, 1, 11)

    def loss_and_gradient(compute):
        model, params = build(compute)
        loss = lambda p: merge(model.graph, p).token_log_probs(batch).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    plain = loss_and_gradient(ComputeConfig(remat="none"))
    for compute in (
        ComputeConfig(remat="full"),
        ComputeConfig(remat="attention"),
        ComputeConfig(remat="dots"),
        ComputeConfig(remat="full", remat_every=2),
        ComputeConfig(remat="dots", remat_every=3),
        ComputeConfig(remat="none", tiled_mlp=True),
        ComputeConfig(remat="full", tiled_mlp=True),
    ):
        close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, loss_and_gradient(compute), plain)


def count_rematerialised(jaxpr) -> int:
    """How many blocks under `jax.checkpoint` a forward pass runs."""
    count = 0
    for eqn in jaxpr.eqns:
        times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        inner = eqn.params.get("jaxpr")
        if eqn.primitive.name in ("checkpoint", "remat2"):
            count += 1
        elif inner is not None:
            count += times * count_rematerialised(getattr(inner, "jaxpr", inner))
    return count


@pytest.mark.parametrize(
    ("members", "repeats", "every"), [(1, 8, 2), (1, 7, 3), (2, 4, 2), (2, 3, 3), (3, 2, 9)]
)
def test_every_nth_layer_is_rematerialised(members, repeats, every):
    """And the stack gives the same, however its pattern and the recipe's fall together."""
    layers = tuple(LayerSpec(4 + i, ROPE) for i in range(members)) * repeats
    config = dataclasses.replace(CONFIG, groups=group_layers(layers))
    assert len(config.groups) == 1
    batch, _ = packed_rows(9, 1, 11)
    params = jax.jit(partial(init_params, config, PLAIN))(jax.random.key(0))

    def hidden(compute):
        return lambda p: merge(abstract(config, compute).graph, p).hidden(batch)

    some, all_of_them = hidden(ComputeConfig(remat_every=every)), hidden(PLAIN)
    assert count_rematerialised(jax.make_jaxpr(all_of_them)(params).jaxpr) == len(layers)
    assert count_rematerialised(jax.make_jaxpr(some)(params).jaxpr) == -(-len(layers) // every)
    np.testing.assert_allclose(jax.jit(some)(params), jax.jit(all_of_them)(params), atol=1e-5)


def test_tiles_of_the_feed_forward_layer_are_held_one_at_a_time():
    config = dataclasses.replace(
        CONFIG, ffn_width=4096, groups=group_layers((LayerSpec(rope=ROPE),))
    )
    batch = batch_of(random_tokens(2, 250))  # in eight tiles, the last of which is not full

    def bytes_of(compute):
        model = abstract(config, compute)
        loss = lambda p: merge(model.graph, p).hidden(batch).sum()
        lowered = jax.jit(jax.grad(loss)).lower(model.shapes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    wide = 2 * 256 * 2 * 4096 * 4  # of one array [B, T, 2, F]
    assert bytes_of(ComputeConfig(tiled_mlp=True)) < bytes_of(ComputeConfig()) - wide


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_not_computed_again(dtype):
    """In bfloat16 rotations are products too, on one CPU."""
    config = dataclasses.replace(CONFIG, qk_norm=None)
    batch, _ = packed_rows(9, 1, 11)

    def backward_products(remat):
        model = abstract(config, ComputeConfig(remat=remat, compute_dtype=dtype))
        loss = lambda p: merge(model.graph, p).hidden(batch).sum()
        with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
            text = str(jax.make_jaxpr(jax.grad(loss))(model.shapes))
        return text.count("dot_general")

    full, attention, dots, none = map(backward_products, ("full", "attention", "dots", "none"))
    assert full > attention > dots == none


def test_gate_and_up_are_kept_apart_in_place_of_their_product():
    """In bfloat16 on one CPU: the backward pass would cut the product in each layer."""
    batch, _ = packed_rows(9, 1, 11)
    config = dataclasses.replace(CONFIG, groups=group_layers((LayerSpec(rope=ROPE),) * 2))
    model = abstract(config, ComputeConfig(remat="dots", compute_dtype="bfloat16"))
    loss = lambda p: merge(model.graph, p).hidden(batch).sum()
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        text = str(jax.make_jaxpr(jax.grad(loss))(model.shapes))
    B, T = batch.tokens.shape
    stack, wide = f"u16[2,{B},{T},", f"{config.ffn_width}]"
    assert f"{stack}{wide}" in text and f"{stack}2,{wide}" not in text


def test_bfloat16_computes_in_bfloat16_and_answers_in_float32():
    batch, _ = packed_rows(9, 1, 11)
    params = build()[1]

    @partial(jax.jit, static_argnums=0)
    def outputs(graph, params):
        hidden = merge(graph, params).hidden(batch)
        return hidden, merge(graph, params).logits(hidden)

    hidden, logits = outputs(build(ComputeConfig(compute_dtype="bfloat16"))[0].graph, params)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    _, exact = outputs(build()[0].graph, params)
    np.testing.assert_allclose(logits, exact, atol=0.1)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_computed_in_float32_and_has_the_gradient_of_autodiff(activation, rows):
    rng = np.random.default_rng(0)
    wide, dy = (3 * rng.normal(size=(5, *size)) for size in ((rows, 17), (17,)))
    act = ACTIVATIONS[activation]
    plain = lambda wide: act(wide[:, 0]) * (wide[:, 1] if rows > 1 else 1)

    def both(function, wide, dy):
        y, pull = jax.vjp(function, wide)
        return y, *pull(dy)

    with jax.enable_x64(True):
        expected = both(plain, jnp.asarray(wide), jnp.asarray(dy))
    found = both(partial(activate, activation), jnp.float32(wide), jnp.float32(dy))
    for value, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-5)

    wide, dy = jnp.bfloat16(wide), jnp.bfloat16(dy)
    in_float32 = both(plain, jnp.float32(wide), jnp.float32(dy))
    for value, exact in zip(both(partial(activate, activation), wide, dy), in_float32, strict=True):
        assert value.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(value), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("platform", "is_at_once"), [("cpu", True), ("tpu", True), ("gpu", False)])
def test_an_activation_on_gpu_leaves_its_gradient_to_autodiff(platform, is_at_once):
    device = AbstractDevice(device_kind="of a test", num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.make_jaxpr(partial(activate, "silu"))(jnp.ones((5, 2, 17)))
    assert ("custom_vjp_call" in str(traced)) == is_at_once


def test_norms_are_computed_in_float32():
    """Only the result is rounded to bfloat16, of eight bits; `normalize` is not jitted, since the
    compiler may keep more bits than were asked for."""
    rng = np.random.default_rng(0)
    x, scale = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((8, 256), (256,)))
    exact_x, exact_scale = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    exact = exact_x / np.sqrt((exact_x**2).mean(-1, keepdims=True) + 0.02) * exact_scale
    found = np.asarray(normalize(Norm(0.02), x, nnx.Param(scale)), np.float64)
    assert (np.abs(found - exact) <= 1.001 * 2.0**-8 * np.abs(exact)).all()


def test_a_group_may_be_run_in_slices():
    model, params = build()
    batch, _ = packed_rows(9, 1, 11)
    decoder = merge(model.graph, params)
    x_BTD, inputs = decoder.embed_tokens(batch.tokens, batch.positions), inputs_of(decoder, batch)
    graph, layers = split(decoder.layers["0"])
    whole = run_group(graph, layers, x_BTD, inputs, PLAIN).x_BTD
    for i in range(2):
        one = jax.tree.map(lambda p, i=i: p[i : i + 1], layers)
        x_BTD = run_group(graph, one, x_BTD, inputs, PLAIN).x_BTD
    np.testing.assert_allclose(x_BTD, whole, atol=1e-6)


def test_random_parameters_do_not_depend_on_the_mesh():
    model, params = build()
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    shardings = parameter_shardings(mesh, model.shapes)
    init = jax.jit(partial(init_params, CONFIG, ComputeConfig()), out_shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, init(jax.random.key(0)), params)


def test_a_sharded_forward_and_backward_equal_those_of_one_device():
    model, params = build()
    batch = batch_of(random_tokens(4, 24))
    loss = lambda p, b: -merge(model.graph, p).token_log_probs(b).sum()
    whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(mesh, model.shapes))
        sharded = jax.jit(jax.value_and_grad(loss))(placed, batch)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), sharded, whole)


@pytest.mark.parametrize(
    ("windows", "groups"),
    [
        ([None] * 5, [(1, 5)]),
        ([None, None, 4], [(1, 2), (1, 1)]),
        ([4, None] * 3, [(2, 3)]),
        ([4, 4, None] * 2 + [4, 4], [(3, 2), (1, 2)]),
        ([None, 4, 5], [(1, 1), (1, 1), (1, 1)]),
    ],
)
def test_layers_are_grouped_by_what_repeats(windows, groups):
    layers = tuple(LayerSpec(window=window) for window in windows)
    found = group_layers(layers)
    assert [(len(group.layers), group.repeats) for group in found] == groups
    assert tuple(layer for group in found for layer in group.layers * group.repeats) == layers
