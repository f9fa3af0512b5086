"""The chunked loss against the definition with all logits, in float64."""

import re
from functools import partial

import cross_entropy_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels import cross_entropy
from jaxtrain.kernels.cross_entropy import token_log_probs, weighted_nll
from tests.runs import mesh_of

B, T, D, V = 8, 11, 16, 40
OPTIONS = {
    "plain": {},
    "z": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "both": {"z_loss": 0.1, "label_smoothing": 0.2},
    "capped": {"scale": 0.7, "softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.2},
}


def problem(*, tokens=T, layout="DV", dtype=jnp.float32):
    """Hidden states, head, targets and weights; a third of the weights are 0."""
    rng = np.random.default_rng(tokens)
    hidden = jnp.asarray(rng.normal(size=(B, tokens, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, tokens)), jnp.int32)
    weights = rng.uniform(0.5, 2.0, (B, tokens)) * (rng.uniform(size=(B, tokens)) > 1 / 3)
    weights = jnp.asarray(weights, jnp.float32)
    return hidden, head if layout == "DV" else head.T, targets, weights


def sum_form(loss, options, hidden, head, targets, weights):
    """NLL, and the gradients of hidden and head for a total that is scaled by 1.7."""

    def scaled(hidden, head):
        nll = loss(hidden, head, targets, weights, **options)
        return 1.7 * nll.total, nll

    (_, nll), grads = jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, head)
    return tuple(nll), *grads


def token_form(log_probs, options, hidden, head, targets, weights):
    """Log-probabilities, and gradients through a loss that is not linear in them."""

    def focal(hidden, head):
        found = log_probs(hidden, head, targets, **options)
        return jnp.sum(-found * (1 - jnp.exp(found)) ** 2 * weights), found

    (_, found), grads = jax.value_and_grad(focal, (0, 1), has_aux=True)(hidden, head)
    return (found,), *grads


FORMS = {
    "sum": (partial(sum_form, weighted_nll), partial(sum_form, reference.weighted_nll)),
    "token": (
        partial(token_form, token_log_probs),
        partial(token_form, reference.token_log_probs),
    ),
}


def in_float64(form, options, inputs):
    """The definition, with every float input taken as float64."""
    with jax.enable_x64(True):
        inputs = [np.asarray(x, np.float64) if x.dtype != jnp.int32 else x for x in inputs]
        return jax.jit(partial(form, options))(*inputs)


def check(form, options, inputs, *, tolerance=2e-6, **settings):
    """Values and gradients agree with the definition, relative to the largest of each."""
    chunked, definition = FORMS[form]
    found = jax.jit(partial(chunked, {**options, **settings}))(*inputs)
    expected = in_float64(definition, {**options, **layout_of(settings)}, inputs)
    near(found, expected, tolerance)
    return found


def layout_of(settings):
    return {k: v for k, v in settings.items() if k == "head_layout"}


def near(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-3)


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("token", {}),
        ("token", {"scale": 0.7, "softcap": 3.0}),
        *(("sum", options) for options in OPTIONS.values()),
    ],
)
@pytest.mark.parametrize("layout", ["DV", "VD"])
def test_value_and_gradients_equal_the_definition(form, options, layout):
    check(form, options, problem(layout=layout), head_layout=layout, chunk_tokens=4)


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [8, 16, 39, 40, 4096])
def test_exponentials_are_summed_in_blocks_on_cpu(form, block, monkeypatch):
    monkeypatch.setattr(cross_entropy, "SUM_BLOCK", block)
    with jax.set_mesh(mesh_of()):
        check(form, OPTIONS["both"] if form == "sum" else {}, problem(), chunk_tokens=4)


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize(("layout", "multiple"), [("VD", 8), ("VD", 7), ("DV", 8)])
def test_rows_that_are_turned_are_filled(form, tiles, layout, multiple, monkeypatch):
    monkeypatch.setattr(cross_entropy, "ROW_MULTIPLE", multiple)
    inputs, settings = problem(layout=layout), {"head_layout": layout, "chunk_tokens": 4}
    with jax.set_mesh(mesh_of()):
        check(form, {}, inputs, tiles=tiles, **settings)
        text = jax.jit(partial(FORMS[form][0], settings)).lower(*inputs).as_text()
    is_filled = layout == "VD" and V % multiple == 0
    assert (f"tensor<1x{D}x{V + cross_entropy.ROW_FILL}xf32>" in text) == is_filled


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("tokens", "chunk"), [(1, None), (1, 1), (7, 7), (9, 2), (9, None)])
def test_any_number_of_tokens_and_chunks(form, tokens, chunk):
    check(form, {}, problem(tokens=tokens), chunk_tokens=chunk)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_rounds_the_inputs_of_products_only(form):
    found = check(form, {}, problem(dtype=jnp.bfloat16), chunk_tokens=4, tolerance=1e-2)
    values, d_hidden, d_head = found
    assert all(x.dtype == jnp.float32 for x in values)
    assert d_hidden.dtype == d_head.dtype == jnp.bfloat16
    with_float32 = FORMS[form][0]({"chunk_tokens": 4}, *problem(dtype=jnp.bfloat16))
    near(values, in_float64(FORMS[form][1], {}, problem(dtype=jnp.bfloat16))[0], 1e-6)
    near(found, with_float32, 1e-2)


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["DV", "VD"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_a_float32_head_under_bfloat16_hidden_gets_a_float32_gradient(form, layout, chunk):
    hidden, head, targets, weights = problem(layout=layout)
    inputs = hidden.astype(jnp.bfloat16), head, targets, weights
    settings = {"head_layout": layout, "chunk_tokens": chunk}
    _, _, d_head = check(form, {}, inputs, tolerance=2e-2, **settings)
    assert d_head.dtype == jnp.float32


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("sizes", [{}, {"data": 4}, {"context": 4, "data": 2}], ids=str)
@pytest.mark.parametrize("weighted", [0, 1, 4, 7, 88])
def test_chunks_without_weight_are_not_computed(form, tiles, sizes, weighted, monkeypatch):
    inputs = problem(tokens=24 if "context" in sizes else T)
    place = np.random.default_rng(0).permutation(inputs[3].size).reshape(inputs[3].shape)
    weights = np.where(place < weighted, np.float32(1), 0)
    data, context = sizes.get("data", 1), sizes.get("context", 1)
    of_shards = weights.reshape(data, -1, context, weights.shape[1] // context).sum((1, 3))
    computed = []
    original = cross_entropy._d_products

    def counted(*args):
        jax.debug.callback(lambda: computed.append(1))
        return original(*args)

    monkeypatch.setattr(cross_entropy, "_d_products", counted)
    with jax.set_mesh(mesh_of(**sizes)):
        check(form, {}, (*inputs[:3], jnp.asarray(weights)), chunk_tokens=4, tiles=tiles)
        jax.effects_barrier()
    whole, rest = divmod(int(of_shards.max()), 4)  # a quarter of a chunk is a token
    assert len(computed) == tiles * (whole + rest.bit_count())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_bad_row_of_weight_0_does_not_leak(bad, chunk):
    hidden, head, targets, weights = problem()
    clean = sum_form(weighted_nll, {"chunk_tokens": chunk}, hidden, head, targets, weights)
    dirty = jnp.where(weights[..., None] == 0, bad, hidden)
    found = sum_form(weighted_nll, {"chunk_tokens": chunk}, dirty, head, targets, weights)
    near(found, clean, 0.0)
    assert not np.any(found[1][weights == 0])


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_bad_row_without_gradient_does_not_leak_through_log_probs(chunk):
    hidden, head, targets, weights = problem()
    dirty = jnp.where(weights[..., None] == 0, jnp.nan, hidden)

    def total(hidden, head):
        log_probs = token_log_probs(hidden, head, targets, chunk_tokens=chunk)
        return jnp.sum(jnp.where(weights != 0, log_probs, 0))

    near(jax.grad(total, (0, 1))(dirty, head), jax.grad(total, (0, 1))(hidden, head), 0.0)


def test_z_loss_is_a_part_of_the_total_and_only_the_total_has_a_gradient():
    hidden, head, targets, weights = problem()
    plain = weighted_nll(hidden, head, targets, weights)
    with_z = weighted_nll(hidden, head, targets, weights, z_loss=0.1)
    np.testing.assert_allclose(with_z.total - with_z.z_total, plain.total, rtol=1e-6)

    def logged(head):
        nll = weighted_nll(hidden, head, targets, weights, z_loss=0.1)
        return nll.z_total + nll.correct

    assert not np.any(jax.grad(logged)(head))


def products(f, *args):
    return len(re.findall(r"\bdot\(", jax.jit(f).lower(*args).compile().as_text()))


def test_gradient_products_are_made_only_when_asked_for():
    hidden, head, targets, weights = problem()

    def total(hidden, head):
        return weighted_nll(hidden, head, targets, weights, chunk_tokens=8).total

    loops = 2  # of chunks, and of parts of one
    assert products(total, hidden, head) == loops
    assert products(jax.grad(total), hidden, head) == loops * 2  # a frozen head
    assert products(jax.grad(total, (0, 1)), hidden, head) == loops * 3


def test_all_logits_are_never_held():
    hidden, head, targets, weights = problem(tokens=64)

    def total(hidden, head):
        return weighted_nll(hidden, head, targets, weights, chunk_tokens=2).total

    text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, head).compile().as_text()
    sizes = [np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) < B * 64 * V / 2  # the hidden states alone are B * 64 * V / 2.5


@pytest.mark.parametrize(
    ("platform", "tokens", "chunks"), [("tpu", 4096, 1), ("tpu", 8192, 8), ("gpu", 4096, 4)]
)
def test_a_tpu_takes_all_tokens_at_once_where_their_logits_are_few(platform, tokens, chunks):
    shaped = jax.ShapeDtypeStruct
    hidden, head = shaped((1, tokens, 2048), jnp.bfloat16), shaped((2048, 128256), jnp.float32)
    targets, weights = (shaped((1, tokens), dtype) for dtype in (jnp.int32, jnp.float32))
    device = AbstractDevice(device_kind="of a test", num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.make_jaxpr(weighted_nll)(hidden, head, targets, weights)
    rows = {int(rows) for rows in re.findall(r"\bf32\[1,(\d+),128256\]", str(traced))}
    assert max(rows - {2048}) == tokens // chunks  # the head's gradient has as many as the width


def test_a_head_in_the_wrong_layout_is_an_error():
    hidden, head, targets, _ = problem()
    with pytest.raises(ValueError, match="'VD'"):
        token_log_probs(hidden, head.T, targets)


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
    {"pipeline": 2, "data": 2, "tensor": 2},
    {"context": 4, "data": 2},
]


def compiled_on(mesh, form, settings, inputs, layout):
    """The compiled function with the gradients sharded as the inputs are, and its inputs."""
    rows = NamedSharding(mesh, P(("data", "fsdp"), "context"))
    head_axes = ("fsdp", "tensor") if layout == "DV" else ("tensor", "fsdp")
    head = NamedSharding(mesh, P(*head_axes))
    inputs = jax.device_put(inputs, (rows, head, rows, rows))
    f = jax.jit(partial(FORMS[form][0], settings), out_shardings=(None, rows, head))
    return f.lower(*inputs).compile(), inputs


def loop_text(compiled) -> str:
    """Every computation of a compiled program that the body of a loop reaches."""
    computations = {}
    for part in compiled.as_text().split("\n\n"):
        if name := re.match(r"\s*(?:ENTRY )?%?([\w.\-]+) \(", part):
            computations[name[1]] = part
    found, todo = {}, re.findall(r"body=%?([\w.\-]+)", compiled.as_text())
    while todo:
        name = todo.pop()
        if name in computations and name not in found:
            found[name] = computations[name]
            todo += re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", found[name])
    assert found
    return "\n".join(found.values())


@pytest.mark.each_value_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["DV", "VD"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_the_mesh_changes_nothing_and_the_head_moves_once(form, layout, sizes):
    inputs = problem(layout=layout, tokens=24 if "context" in sizes else T)
    settings = {"head_layout": layout, "chunk_tokens": 4}
    if form == "sum":
        settings |= OPTIONS["both"]
    alone = jax.jit(partial(FORMS[form][0], settings))(*inputs)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        compiled, inputs = compiled_on(mesh, form, settings, inputs, layout)
        found = compiled(*inputs)
    near(found, alone, 1e-6)
    loop = loop_text(compiled)
    assert not re.search(r"all-gather|all-to-all|collective-permute", loop)
    # What is left in the loop are the sums over vocabulary shards; the head's gradient is not.
    for line in re.findall(r".*all-reduce\(.*|.*reduce-scatter\(.*", loop):
        assert sizes.get("tensor", 1) > 1, line
        assert not re.search(rf"\[(\d+,)*({V}|{V // sizes['tensor']})[,\]]", line.split("=")[1]), (
            line
        )


def test_the_loss_nests_in_a_pipeline_stage():
    inputs = problem()
    expected = sum_form(weighted_nll, {}, *inputs)

    def last_stage(hidden, head, targets, weights):
        (total, *_), d_hidden, d_head = sum_form(
            weighted_nll, {"chunk_tokens": 4}, hidden, head, targets, weights
        )
        is_last = jax.lax.axis_index("pipeline") == 1
        return jax.tree.map(
            lambda x: jax.lax.psum(jnp.where(is_last, x, 0), "pipeline"), (total, d_hidden, d_head)
        )

    stages = jax.shard_map(
        last_stage, in_specs=P(), out_specs=P(), axis_names={"pipeline"}, check_vma=False
    )
    with jax.set_mesh(mesh_of(pipeline=2, data=2, tensor=2)):
        total, *grads = jax.jit(stages)(*inputs)
    near((total, *grads), (expected[0][0], *expected[1:]), 1e-6)


def test_float16_keeps_gradients_that_are_small_before_they_are_scaled():
    """As in training, where the loss is multiplied by what makes up for its weight."""
    hidden, head, targets, weights = (
        jax.random.normal(jax.random.key(0), (2, 16, 32)),
        0.1 * jax.random.normal(jax.random.key(1), (32, 4096)),
        jax.random.randint(jax.random.key(2), (2, 16), 0, 4096),
        jnp.full((2, 16), 1e-3),
    )

    def gradients(dtype):
        total = lambda x, w: 65536 * weighted_nll(x.astype(dtype), w, targets, weights).total
        return jax.grad(total, (0, 1))(hidden.astype(dtype).astype(jnp.float32), head)

    for half, full in zip(gradients(jnp.float16), gradients(jnp.float32), strict=True):
        error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
        assert error < 7e-4


@pytest.mark.each_value_once
@pytest.mark.parametrize("layout", ["DV", "VD"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_tiles_of_the_vocabulary_change_nothing_and_no_device_has_the_head(form, layout, sizes):
    inputs = problem(layout=layout)
    settings = {"head_layout": layout, "chunk_tokens": 4}
    settings |= OPTIONS["capped"] if form == "sum" else {"scale": 0.7, "softcap": 3.0}
    alone = jax.jit(partial(FORMS[form][0], settings))(*inputs)
    settings |= {"tiles": 5}
    near(jax.jit(partial(FORMS[form][0], settings))(*inputs), alone, 2e-6)
    with jax.set_mesh(mesh_of(**sizes)):
        compiled, inputs = compiled_on(mesh_of(**sizes), form, settings, inputs, layout)
        near(compiled(*inputs), alone, 2e-6)
    if "fsdp" in sizes:
        assert re.search(
            rf"f32\[.*(?:{D},{V // 5}|{V // 5},{D})\]\S* all-gather", compiled.as_text()
        )
        assert not re.search(rf"f32\[(1,)?(?:{D},{V}|{V},{D})\]", compiled.as_text())


def test_a_head_is_tiled_where_it_is_too_large_to_be_whole_on_every_device(monkeypatch):
    """By the number of its products: the tiles of a loss compute one more of four."""
    inputs = problem()
    total = lambda hidden, head: weighted_nll(hidden, head, *inputs[2:]).total
    with jax.set_mesh(mesh_of(fsdp=8)):
        assert products(jax.grad(total, (0, 1)), *inputs[:2]) == 3
        monkeypatch.setattr(cross_entropy, "WHOLE_BYTES", 6 * D * V - 1)
        monkeypatch.setattr(cross_entropy, "TILE_BYTES", 4 * D * V // 3)
        monkeypatch.setattr(cross_entropy, "MIN_TILE", 8)
        assert products(jax.grad(lambda *x: total(*x), (0, 1)), *inputs[:2]) == 4
    assert products(jax.grad(lambda *x: total(*x) * 1, (0, 1)), *inputs[:2]) == 3
