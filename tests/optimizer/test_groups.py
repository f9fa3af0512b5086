"""Groups of parameters, the dtype of moments, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import registry
from jaxtrain.optimizer import Groups
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer import step as pure
from tests.optimizer.test_optimizers import NAMES, parameters, take_step
from tests.runs import first_batch, host, losses, recipe, trainer


def build(name, params, **keys):
    written = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    config = get_config(written | {"optimizer": {"type": name, **keys}}).optimizer
    groups = Groups.of(config, jax.eval_shape(lambda: params))
    return groups, groups.optimizer(registry.find("optimizer", name)(config))


def bits(tree):
    return {name: array.tobytes() for name, array in host(tree).items()}


@pytest.mark.covers(
    "optimizer.groups.match optimizer.groups.lr_scale optimizer.groups.weight_decay"
)
@pytest.mark.covers("optimizer.groups.freeze")
@pytest.mark.parametrize("name", NAMES)
def test_a_group_is_the_optimizer_with_its_settings(name):
    """Each parameter moves as in a run whose whole section has its group's settings."""
    params = parameters()
    groups = [
        {"match": "attention", "lr_scale": 0.5, "weight_decay": 0.3},
        {"match": "layers", "freeze": True},
    ]
    common = {"lr": 0.1, "weight_decay": 0.01}
    some, optimizer = build(name, params, groups=groups, **common)
    _, rest = build(name, params, **common)
    _, attention = build(name, params, lr=0.05, weight_decay=0.3)
    after = []
    for one in (optimizer, rest, attention):
        p = some.trained(params) if one is optimizer else params
        state = one.init(p)
        for _ in range(3):
            p, state = take_step(one, p, state)
        after.append(some.merge(params, p))
    found, as_rest, as_attention = after
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    close(found["embed"]["embedding"], as_rest["embed"]["embedding"])
    layers = found["layers"]
    close(layers["attention"]["qkv"], as_attention["layers"]["attention"]["qkv"])
    assert bits(layers["mlp"]) == bits(params["layers"]["mlp"])
    assert bits(layers["mlp_norm"]) == bits(params["layers"]["mlp_norm"])
    state = optimizer.init(some.trained(params))
    held = {p.shape for p in jax.tree.leaves(params["layers"]["mlp"])}
    assert not held & {leaf.shape for leaf in jax.tree.leaves(state)}, "frozen: no moments"


def test_a_frozen_zero_keeps_its_sign():
    params = {"embed": jnp.array([-0.0, 1.0]), "norm": jnp.ones(2)}
    groups, optimizer = build("sgd", params, groups=[{"match": "embed", "freeze": True}])
    trained = groups.trained(params)
    updates, _ = optimizer.update(trained, optimizer.init(trained), trained)
    after = groups.merge(params, optax.apply_updates(trained, updates))
    assert after["embed"].tobytes() == params["embed"].tobytes() and bits(after) != bits(params)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            [{"match": "embed"}, {"match": "lm_head"}],
            "optimizer.groups.1.match: 'lm_head' matches no parameter; there are embed/embedding, "
            "layers/attention/qkv, layers/mlp/gate_up, layers/mlp_norm",
        ),
        (
            [{"match": "layers"}, {"match": "mlp"}],
            "optimizer.groups.1.match: every parameter that 'mlp' matches belongs to an earlier group",
        ),
        (
            [{"match": ".", "freeze": True}],
            "optimizer.groups: freeze every parameter; nothing is trained",
        ),
    ],
)
def test_a_group_that_cannot_be_is_refused(groups, expected):
    with pytest.raises(RecipeError) as error:
        build("adamw", parameters(), groups=groups)
    assert expected in str(error.value)


def test_parameters_are_counted_by_what_happens_to_them():
    keys = {"groups": [{"match": "gate", "freeze": True}, {"match": "qkv", "weight_decay": 0}]}
    groups, _ = build("adamw", parameters(), **keys)
    embedding, qkv, gate_up, norm = 12 * 8, 2 * 8 * 2 * 3 * 4, 2 * 8 * 2 * 16, 2 * 8
    assert groups.counts() == {
        "decayed": embedding, "not decayed": qkv + norm, "frozen": gate_up
    }  # fmt: skip


@pytest.mark.covers("optimizer.state_dtype")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw_8bit"])
@pytest.mark.parametrize("params", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_moments_have_the_dtype_that_is_said(name, params, dtype):
    params = parameters(params)
    more = {"momentum": 0.9} if name == "sgd" else {}
    _, optimizer = build(name, params, state_dtype=dtype, **more)
    state = optimizer.init(params)
    grads = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    _, after = optimizer.update(grads, state, params)
    want = {"fp32": jnp.float32, "bf16": jnp.bfloat16}[dtype]
    for tree in (state, after):
        moments = [x for x in jax.tree.leaves(tree) if x.ndim and x.dtype != jnp.int32]
        assert moments and {x.dtype for x in moments} == {jnp.dtype(want)}


def second_moment(**keys):
    """What adamw has of a gradient that was large for a while and has long been small."""
    params = {"embed": {"embedding": jnp.zeros((8, 128))}}
    _, optimizer = build("adamw", params, **keys)

    @jax.jit
    def many(state, size, updates):
        grads = jax.tree.map(lambda p: jnp.full_like(p, size), params)
        step = lambda _, state: optimizer.update(grads, state, params)[1]
        return jax.lax.fori_loop(0, updates, step, state)

    state = many(many(optimizer.init(params), 1.0, 200), 0.01, 3000)
    return float(optax.tree.get(state, "nu")["embed"]["embedding"].astype(jnp.float32).mean())


def test_moments_in_bfloat16_forget_as_those_in_float32():
    assert second_moment(state_dtype="bf16") == pytest.approx(second_moment(), rel=0.05)


def test_moments_in_float16_are_refused():
    """The square of a gradient of 1e-4 is 0 there."""
    with pytest.raises(RecipeError, match="optimizer.state_dtype"):
        build("adamw", parameters(), state_dtype="fp16")


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), optax.adafactor(1e-2)])
def test_a_given_optimizer_trains_weights_in_bfloat16(tmp_path, optimizer):
    run = trainer(recipe(tmp_path, model={"param_dtype": "bf16"}), optimizer=optimizer)
    found = losses(run, 4)
    assert found[-1] < found[0]


def test_a_run_trains_around_what_is_frozen(tmp_path):
    groups = [{"match": "embed|attention", "freeze": True}]
    changes = {"gradient_accumulation_steps": 2}
    plain = trainer(recipe(tmp_path / "plain", **changes))
    optimizer = {"groups": groups, "state_dtype": "bf16"}
    run = trainer(recipe(tmp_path, optimizer=optimizer, **changes))
    before = bits(run.state.params)
    with jax.set_mesh(run.mesh):
        gradients = jax.eval_shape(
            lambda p, b: pure.grads(run.step_spec, p, {}, b, jax.random.key(0))[1],
            run.run.model.shapes, run.layout.batch_shapes(run.data.sequence_tokens),
        )  # fmt: skip
    is_frozen = {name: "embed" in name or "attention" in name for name in before}
    trained = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(gradients)}
    assert trained == {name for name in before if not is_frozen[name]}, "frozen: no gradient"
    _, whole = plain.step(plain.state, first_batch(plain))
    found = []
    for batch in run.data.train_batches(0, 4):
        run.state, metrics = run.step(run.state, run.layout.on_devices(batch))
        found.append(metrics)
    assert found[0]["grad_norm"] < whole["grad_norm"], "frozen: not in the norm"
    assert found[-1]["loss"] < found[0]["loss"]
    for name, array in bits(run.state.params).items():
        assert (array == before[name]) == is_frozen[name], name


def test_weights_in_bfloat16_are_trained(tmp_path):
    run = trainer(recipe(tmp_path, model={"param_dtype": "bf16"}))
    found = losses(run, 4)
    assert found[-1] < found[0]
    assert {p.dtype for p in jax.tree.leaves(run.state.params)} == {jnp.dtype("bfloat16")}
