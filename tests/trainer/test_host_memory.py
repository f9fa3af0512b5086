"""Moments and layer inputs in the host's memory: the same numbers, and what is said where it has no
effect. What it saves on accelerators is in tests/test_ahead_of_time.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.parallel import host_memory
from jaxtrain.parallel.host_memory import KIND, has_host_memory, move_to_host
from jaxtrain.plan import host_bytes
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.trainer.pieces import update_in_pieces
from jaxtrain.trainer.state import Moving, apply_if, is_finite
from tests.optimizer.test_groups import build
from tests.optimizer.test_optimizers import parameters
from tests.runs import host, losses, mesh_of, recipe, trainer

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
ZERO_3 = {"zero_optimization": {"stage": 3}}
PARAMS = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
ALL = {"zero_optimization": {"stage": 3, "cpu_offload_param": True, "cpu_offload": True}}
PEFT = {"peft_type": "Lora", "r": 4, "target_modules": "all-linear", "use_dora": True}
OLDER = {"zero_optimization": {"stage": 2, "cpu_offload": True}}
INPUTS = {"activation_checkpoint_cpu_offload": True}


@pytest.mark.covers("deepspeed.zero_optimization.offload_optimizer.device")
@pytest.mark.covers("deepspeed.zero_optimization.cpu_offload", "activation_checkpoint_cpu_offload")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"deepspeed": OFFLOAD}, "moments"),
        ({"deepspeed": OLDER}, "moments"),
        ({"deepspeed": PARAMS}, "matrices of layers"),
        ({"deepspeed": PARAMS, "model": {"peft_config": PEFT}}, "matrices of layers of the base"),
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
    assert has_host_memory(mesh("gpu"), ["a.b"])  # one that is not there lists none
    with pytest.raises(RecipeError, match="a.b: X9 has no memory of kind pinned_host, only device"):
        has_host_memory(mesh("gpu", "device"), ["a.b"])


MERGED = {"type": "huggingface", "output_dir": "{run_dir}/out", "adapter": "both"}
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.covers("deepspeed.zero_optimization.offload_param.device")
@pytest.mark.covers("deepspeed.zero_optimization.cpu_offload_param")
@pytest.mark.parametrize(
    ("zero", "changes", "place"),
    [
        pytest.param(
            PARAMS,
            {"mesh": MESH, "gradient_accumulation_steps": 2},
            ".params",
            marks=pytest.mark.slow,
        ),
        (ALL, {"mesh": {"fsdp": 2}, "ema": {"decay": 0.5}, **INPUTS}, ".params"),
        (
            PARAMS,
            {"mesh": {"fsdp": 2}, "model": {"peft_config": PEFT}, "checkpoint": [MERGED]},
            ".frozen['base']",
        ),
    ],
    ids=("mesh", "moments", "adapters"),
)
def test_what_waits_in_the_host_s_memory_changes_no_number(
    tmp_path, monkeypatch, zero, changes, place
):
    """On CPU, which has a memory kind of that name; all that computes with it has to fetch it."""
    devices, found = np.prod([*changes["mesh"].values()]), {}
    for name, deepspeed in (("plain", ZERO_3), ("moved", zero)):
        written = recipe(
            tmp_path / name, deepspeed=deepspeed, micro_batch_size=2, optimizer={"eps": 1e-4},
            **{**changes, "data": {"train_eval_split": [0.9, 0.1]}, "eval_interval": 2},
        )  # fmt: skip
        if name == "moved":
            monkeypatch.setattr(host_memory, "PLATFORMS_IN_HOST_MEMORY", set())
        run = trainer(written, devices=int(devices))
        kinds = {path: kind for path, kind in kinds_of(run.state).items() if kind == KIND}
        found[name] = losses(run, 3), host(run.state), run.evaluate(), reply(run)
        assert kinds == {path: k for path, k in kinds_of(run.state).items() if k == KIND}
        # Which compares what it reads back; of adapters, merged too.
        run.save_model(tmp_path / name / "run" / "out" / "export")
    moved = [path for path in kinds if path.startswith(place)]
    assert any("'qkv'" in path for path in moved) and all("layers" in path for path in moved)
    assert not any("embedding" in path or "norm" in path for path in moved)
    assert "without effect" not in run.header["host memory"]
    (plain_losses, plain_state, plain_scores, plain_reply), (loss_of, state, scores, answer) = (
        found.values()
    )
    # Bit for bit, up to an update, which is rounded by other fusions where it is of a layer.
    assert loss_of[0] == plain_losses[0] and loss_of == pytest.approx(plain_losses, rel=1e-6)
    for name, array in plain_state.items():
        np.testing.assert_allclose(state[name], array, rtol=1e-5, atol=1e-7, err_msg=name)
    assert scores == pytest.approx(plain_scores, rel=1e-6) and answer == plain_reply


def kinds_of(state):
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): leaf.sharding.memory_kind for path, leaf in leaves}


def reply(run):
    with jax.set_mesh(run.mesh):
        return run.run.model.generate(run.run.eval_params(run.state), [[1, 2, 3]], max_new_tokens=4)
