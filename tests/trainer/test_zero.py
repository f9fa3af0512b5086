"""A ZeRO stage changes what each device of `data` and `context` holds and nothing else."""

import re

import jax
import numpy as np
import pytest

from tests.runs import assert_same, host, loss_and_gradients, losses, recipe, trainer

STEPS = 20
DATA = 4
RUNS = [
    (3, {"data": DATA}),
    *(
        pytest.param(
            stage, {"data": DATA, axis: 2} if axis else {"data": DATA}, marks=pytest.mark.slow
        )
        for stage, axis in (
            (0, ""),
            (1, ""),
            (2, ""),
            (1, "fsdp"),
            (2, "tensor"),
            (3, "fsdp"),
            (2, "context"),
            (3, "context"),
        )
    ),
]


def run_of(folder, stage, mesh, **changes):
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1)
    written = recipe(
        folder,
        mesh=mesh,
        micro_batch_size=8 // shards,
        gradient_accumulation_steps=2,
        train_iters=STEPS,
        deepspeed={"zero_optimization": {"stage": stage}},
        **changes,
    )
    return trainer(written, devices=int(np.prod(list(mesh.values()) or [1])))


def share(tree):
    """Part of the matrices of a tree that one device holds."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim > 2]
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return held / sum(leaf.nbytes for leaf in leaves)


def gathers_of_parameters(run):
    """Inside a loop, and outside of any: the all-gathers of float32 matrices in the step."""
    shapes = run.layout.batch_shapes(run.data.sequence_tokens)
    text = run.step.lower(run.run.state_shapes, shapes).compile().as_text()
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    inside, outside, computation = 0, 0, ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = head[1]
        elif re.search(r"= f32\[[\d,]+\]\S* all-gather(-start)?\(", line):
            inside, outside = (
                inside + (computation in bodies),
                outside + (computation not in bodies),
            )
    return inside, outside


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return losses(run_of(tmp_path_factory.mktemp("alone"), 0, {}), STEPS)


@pytest.mark.covers("deepspeed.zero_optimization.stage")
@pytest.mark.parametrize(("stage", "mesh"), RUNS, ids=str)
def test_a_stage_changes_no_loss_and_holds_what_it_says(tmp_path, alone, mesh, stage):
    run = run_of(tmp_path, stage, mesh)
    found = losses(run, STEPS)
    assert np.abs(np.array(found) - alone).max() < 1e-5
    always = 1 / (mesh.get("fsdp", 1) * mesh.get("tensor", 1))
    sharded = always / DATA / mesh.get("context", 1)
    kept, computed, summed = (
        (always, always, always),
        (sharded, always, always),
        (sharded, always, sharded),
        (sharded, sharded, sharded),
    )[stage]
    assert share(run.state.params) == share(run.state.opt_state) == kept
    assert share(loss_and_gradients(run)[1]) == summed
    as_computed = jax.device_put(run.state.params, run.step_spec.compute_shardings)
    assert share(as_computed) == computed


def test_parameters_are_gathered_once_or_by_layer(tmp_path):
    found = [
        gathers_of_parameters(run_of(tmp_path / str(stage), stage, {"data": DATA}))
        for stage in range(4)
    ]
    matrices = 5  # embedding and four of a layer, stacked
    assert found[0] == (0, 0)
    assert found[1] == found[2] == (0, matrices)
    assert found[3][0] >= 4, "each matrix of a layer, in the loop over layers"


@pytest.mark.slow
def test_a_stage_works_with_a_pipeline(tmp_path, alone):
    run = run_of(tmp_path, 2, {"data": DATA, "pipeline": 2})
    assert np.abs(np.array(losses(run, STEPS)) - alone).max() < 1e-5


def test_a_checkpoint_restores_across_stages(tmp_path):
    def written(stage):
        entry = {
            "output_dir": str(tmp_path / "state"), "auto_resume": True, "save_every_n_steps": 2,
        }  # fmt: skip
        return run_of(tmp_path, stage, {"data": DATA}, checkpoint=[entry], exit_iteration=2)

    first = written(1)
    first.train()
    expected = host(first.state)
    for stage in (0, 2, 3):
        again = written(stage)
        again.start()
        assert again.global_step == 2
        assert_same(again.state, expected)
