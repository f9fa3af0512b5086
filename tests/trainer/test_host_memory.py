"""Moments and layer inputs in the host's memory: the same numbers, and what is said where it has no
effect. What it saves on accelerators is in tests/test_ahead_of_time.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel.host_memory import KIND, has_host_memory, move_to_host
from jaxtrain.plan import host_bytes
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.trainer.pieces import update_in_pieces
from jaxtrain.trainer.state import Moving, apply_if, is_finite
from tests.optimizer.test_groups import build
from tests.optimizer.test_optimizers import parameters
from tests.runs import host, mesh_of, recipe, trainer

FROZEN = [{"match": "gate_up", "freeze": True}, {"match": "qkv", "lr_scale": 0.5}]


@pytest.mark.parametrize(
    ("name", "groups"),
    [("adamw", FROZEN), ("adafactor", []), ("lion", []), ("muon", FROZEN), ("sgd", [])],
)
def test_an_update_in_pieces_is_the_update(name, groups):
    stacks = parameters()
    params = stacks | {"layers": {"0": {"0": stacks["layers"]}, "1": {"0": stacks["layers"]}}}
    more = {"momentum": 0.9} if name == "sgd" else {}
    some, optimizer = build(name, params, lr=0.1, groups=groups, **more)

    def update(moving, gradients):
        updates, opt_state = optimizer.update(gradients, moving.opt_state, moving.trained)
        trained = jax.tree.map(jnp.add, moving.trained, updates)
        return Moving(trained, opt_state, jax.tree.map(lambda a, p: a + p, moving.average, trained))

    def run(apply, *, is_on_host=False, **how):
        trained = some.trained(params)
        moving = Moving(trained, optimizer.init(trained), jax.tree.map(jnp.zeros_like, trained))
        places = jax.tree.map(lambda _: NamedSharding(mesh_of(data=1), P()), moving)
        if is_on_host:
            on_host = move_to_host(places.opt_state, moving.opt_state)
            places = places._replace(opt_state=on_host)
        step = jax.jit(lambda ok, *a: apply(ok, update, *a, **how), out_shardings=places)
        moving = jax.device_put(moving, places)
        for ok in (True, False, True):
            gradients = jax.tree.map(lambda p: jnp.sin(3 * p), moving.trained)
            moving = step(ok, moving, gradients)
        kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moving.opt_state)}
        assert (KIND in kinds) == is_on_host and is_finite(moving)
        return host(moving)

    whole, how = run(apply_if), {"init": optimizer.init, "is_separable": some.is_separable}
    cut = run(update_in_pieces, is_on_host=True, **how)
    uncut = run(update_in_pieces, **how | {"is_separable": False})
    assert some.is_separable and whole.keys() == cut.keys()
    for name, array in whole.items():
        np.testing.assert_allclose(cut[name], array, rtol=1e-5, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(uncut[name], array, rtol=1e-5, atol=1e-7, err_msg=name)


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
OLDER = {"zero_optimization": {"stage": 2, "cpu_offload": True}}
INPUTS = {"activation_checkpoint_cpu_offload": True}


@pytest.mark.covers("deepspeed.zero_optimization.offload_optimizer.device")
@pytest.mark.covers("deepspeed.zero_optimization.cpu_offload", "activation_checkpoint_cpu_offload")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"deepspeed": OFFLOAD}, "moments"),
        ({"deepspeed": OLDER}, "moments"),
        (INPUTS, "layer inputs"),
        (INPUTS | {"deepspeed": OFFLOAD}, "moments and layer inputs"),
        (INPUTS | {"model": {"remat": "none"}}, None),
        ({}, None),
    ],
)
def test_on_cpu_it_has_no_effect_and_says_so(tmp_path, changes, what):
    run = trainer(recipe(tmp_path, **changes))
    said = what and f"{what}: without effect, on CPU it is that of the devices"
    assert run.header.get("host memory") == said
    assert not run.run.model.compute.offload_inputs
    assert host_bytes(run.run.state_shapes) == 0


def test_devices_without_such_a_memory_are_refused():
    def mesh(platform, *kinds):
        memories = [SimpleNamespace(kind=kind) for kind in kinds]
        device = SimpleNamespace(
            platform=platform, device_kind="X9", addressable_memories=lambda: memories
        )
        return SimpleNamespace(devices=np.array([device]))

    assert not has_host_memory(mesh("cpu", "device", "pinned_host"), ["a.b"])
    assert has_host_memory(mesh("gpu", "device", "pinned_host"), ["a.b"])
    with pytest.raises(RecipeError, match="a.b: X9 has no memory of kind pinned_host, only device"):
        has_host_memory(mesh("gpu", "device"), ["a.b"])
