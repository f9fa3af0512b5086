"""Every optimizer of the recipe: what it does to a loss, to dtypes, to weights without a
gradient."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxtrain import registry
from jaxtrain.parallel.mesh import make_mesh
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.mesh import MeshConfig
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer.state import optimizer_shardings

NAMES = ["adamw", "adafactor", "lion", "muon", "sgd", "adamw_8bit"]
RATES = {"sgd": 0.3, "adafactor": 0.05}


def build(name, params, **keys):
    recipe = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}}
    config = get_config(recipe | {"optimizer": {"type": name, **keys}}).optimizer
    shapes = jax.eval_shape(lambda: params)
    return registry.find("optimizer", name)(config).create_optimizer(shapes, config)


def parameters(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    make = lambda key, *shape: jax.random.normal(key, shape).astype(dtype)
    return {
        "embed": {"embedding": make(keys[0], 12, 8)},
        "layers": {
            "attention": {"qkv": make(keys[1], 2, 8, 2, 3, 4)},
            "mlp": {"gate_up": make(keys[2], 2, 8, 2, 16)},
            "mlp_norm": make(keys[3], 2, 8),
        },
    }


def distance(params):
    return sum(jnp.mean(jnp.square(p.astype(jnp.float32) - 0.5)) for p in jax.tree.leaves(params))


def take_step(optimizer, params, state):
    grads = jax.grad(distance)(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("name", NAMES)
def test_it_lowers_a_quadratic(name):
    params = parameters()
    optimizer = build(name, params, lr=RATES.get(name, 0.02), weight_decay=0)
    state, before = optimizer.init(params), distance(params)
    step = jax.jit(lambda params, state: take_step(optimizer, params, state))
    for _ in range(100):
        params, state = step(params, state)
    assert distance(params) < 0.6 * before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_keeps_dtypes(name, dtype):
    params = parameters(dtype)
    optimizer = build(name, params)
    after, _ = take_step(optimizer, params, optimizer.init(params))
    assert {p.dtype for p in jax.tree.leaves(after)} == {jnp.dtype(dtype)}


@pytest.mark.covers("optimizer.weight_decay")
@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_weights_and_leaves_norms(name):
    params = parameters()
    optimizer = build(name, params, lr=0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    want = 0.95 * params["layers"]["mlp"]["gate_up"]
    assert jnp.allclose(after["layers"]["mlp"]["gate_up"], want, atol=1e-6)
    assert jnp.allclose(after["embed"]["embedding"], 0.95 * params["embed"]["embedding"], atol=1e-6)
    assert jnp.array_equal(after["layers"]["mlp_norm"], params["layers"]["mlp_norm"])


@pytest.mark.parametrize("name", NAMES)
def test_its_state_has_a_place_on_a_mesh(name):
    params = {"embed": {"embedding": jnp.ones((256, 256))}, "norm": jnp.ones(256)}
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    optimizer = build(name, params)
    shapes = jax.eval_shape(lambda: params)
    placed = optimizer_shardings(mesh, optimizer, shapes, parameter_shardings(mesh, shapes))
    state = jax.jit(optimizer.init, out_shardings=placed)(params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert len(sharding.spec) <= leaf.ndim


@pytest.mark.covers("optimizer.betas", "optimizer.eps", "optimizer.momentum", "optimizer.nesterov")
@pytest.mark.parametrize(
    ("name", "keys"),
    [("adamw", {"betas": [0.0, 0.5]}), ("lion", {"betas": [0.1, 0.5]}), ("muon", {"betas": [0.0, 0.5]}),
     ("adamw", {"eps": 1.0}), ("muon", {"eps": 1.0}), ("sgd", {"momentum": 0.9}), ("muon", {"momentum": 0.1}),
     ("sgd", {"momentum": 0.9, "nesterov": True}), ("muon", {"nesterov": False})],
)  # fmt: skip
def test_every_key_changes_the_update(name, keys):
    results = []
    for extra in ({}, keys):
        params = parameters()
        optimizer = build(name, params, lr=0.1, **extra)
        state = optimizer.init(params)
        for _ in range(3):
            params, state = take_step(optimizer, params, state)
        results.append(params)
    same = jax.tree.map(jnp.array_equal, *results)
    assert not all(jax.tree.leaves(same))
