"""Copies of an array that differ between devices are found and named."""

import jax
import numpy as np
import pytest

from jaxtrain import Callback
from jaxtrain.recipe.errors import ReplicaError
from jaxtrain.trainer.replicas import find_differences, refuse_differences
from tests.runs import mesh_of, recipe, trainer


def with_planted(array, devices, change):
    """The array, with the copies on these devices changed."""
    parts = []
    for shard in array.addressable_shards:
        part = np.asarray(shard.data)
        if shard.device.id in devices:
            part = change(part.copy())
        parts.append(jax.device_put(part, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def flip_a_bit(part):
    flat = part.reshape(-1).view(np.uint8)
    flat[len(flat) // 2] ^= 1
    return part


def swap(part):
    part[[0, 1]] = part[[1, 0]]
    return part


@pytest.fixture(scope="module")
def tree():
    """Whole copies, copies of halves, and no copies."""
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(8, 4)).astype(np.float32)
    return mesh, {
        "whole": jax.device_put(floats, spec()),
        "half": jax.device_put(floats.astype("bfloat16"), spec("fsdp")),
        "flags": jax.device_put(floats > 0, spec(None, "tensor")),
        "codes": jax.device_put((floats * 9).astype(np.uint8), spec()),
        "alone": jax.device_put(floats, spec(("data", "fsdp"), "tensor")),
        "step": jax.device_put(np.int32(7), spec()),
    }


@pytest.mark.parametrize(
    ("name", "devices", "change", "odd"),
    [
        ("whole", {3}, flip_a_bit, [3]),
        ("whole", {3, 6}, swap, [3, 6]),
        ("half", {0}, flip_a_bit, [0]),
        ("half", {0, 1}, swap, [0, 1, 4, 5]),  # two copies against two: either may be wrong
        ("flags", {7}, flip_a_bit, [7]),
        ("codes", {5}, flip_a_bit, [5]),
        ("step", {2}, flip_a_bit, [2]),
        ("alone", {2}, flip_a_bit, None),
    ],
)
def test_a_planted_difference_is_named_with_its_devices(tree, name, devices, change, odd):
    mesh, arrays = tree
    assert find_differences(arrays, mesh) == []
    changed = arrays | {name: with_planted(arrays[name], devices, change)}
    found = [(n, sorted(d.id for d in where)) for n, where in find_differences(changed, mesh)]
    assert found == ([] if odd is None else [(name, odd)])


def test_a_difference_of_many_arrays_is_one_line(tree):
    mesh, arrays = tree
    names = ("whole", "half", "flags", "codes", "step")
    changed = arrays | {name: with_planted(arrays[name], {4}, flip_a_bit) for name in names}
    with pytest.raises(ReplicaError) as error:
        refuse_differences(changed, mesh, step=9)
    said = str(error.value)
    assert said.startswith("step 9: copies differ of 5 arrays: codes on device 4; ")
    assert "; and 2 more; nothing is saved" in said and "\n" not in said


@pytest.mark.covers("replica_check_interval")
def test_a_run_compares_every_nth_step_and_ends_before_it_saves(tmp_path):
    class Damage(Callback):
        def on_step_begin(self, args, state, control):
            if state.global_step == 2:
                params = state.state.params
                norm = with_planted(params["norm"], {1}, flip_a_bit)
                state.state = state.state._replace(params=params | {"norm": norm})

    written = recipe(
        tmp_path, mesh={"data": 2}, deepspeed={"zero_optimization": {"stage": 0}},
        replica_check_interval=2, train_iters=5, optimizer={"lr": 0.0},
        checkpoint={"output_dir": str(tmp_path / "state"), "save_every_n_steps": 1},
    )  # fmt: skip
    run = trainer(written, devices=2)
    run.add_callback(Damage)
    with pytest.raises(
        ReplicaError, match=r"step 4: copies differ of .*params/norm on devices 0, 1"
    ):
        run.train()
    assert run.checkpoint_engines[0].steps() == [1, 2, 3]
