"""Runs whose layers multiply in eight-bit floats, emulated."""

import re

import numpy as np
import pytest
from flax import nnx

from jaxtrain.model.decoder import merge
from jaxtrain.model.layers import Fp8Weight
from jaxtrain.recipe.errors import RecipeError
from tests.runs import losses, model_folder, recipe, trainer
from tests.trainer.test_experts import EXPERTS

STEPS = 20


SHAPE = {"hidden_size": 64, "intermediate_size": 256}


def run_of(folder, precision="fp8", *, devices=1, shape=SHAPE, **changes):
    model = {"matmul_precision": precision, **changes.pop("model", {})}
    written = recipe(folder, model=model, **changes)
    model_folder(folder / "model", **shape)
    return trainer(written, devices=devices)


def marked(run):
    """Paths of the weights that are multiplied in eight-bit floats."""
    module = nnx.eval_shape(lambda: merge(run.run.model.graph, run.run.model.all_shapes))
    found = nnx.iter_graph(module)
    return {"/".join(map(str, path)) for path, node in found if isinstance(node, Fp8Weight)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("alone"), micro_batch_size=4)
    return run, losses(run, STEPS)


@pytest.mark.covers("model.matmul_precision")
def test_it_learns_as_in_whole_floats(tmp_path, alone):
    run, found = alone
    whole = run_of(tmp_path, None, micro_batch_size=4)
    expected = np.array(losses(whole, STEPS))
    assert expected[-1] < 0.85 * expected[0]
    off = np.abs(np.array(found) - expected)
    assert off.max() > 0 and (off < 0.01 * expected).all()
    assert "float32, matrices of layers in fp8 (emulated)" in run.header["model"]
    names = ("attention/qkv", "attention/out", "mlp/gate_up", "mlp/down")
    assert marked(run) == {f"layers/0/0/{name}" for name in names} and not marked(whole)
    text = run.step.lower(
        run.run.state_shapes, run.layout.batch_shapes(run.data.sequence_tokens)
    ).as_text()
    dots = re.findall(r"dot_general .*f8(E\w+)>, .*f8(E\w+)>\)", text)
    assert len([dot for dot in dots if "E5M2" in dot]) == 2 * len(names)


@pytest.mark.slow
def test_a_mesh_changes_no_scale(tmp_path, alone):
    run = run_of(tmp_path, micro_batch_size=2, mesh={"fsdp": 2, "tensor": 2}, devices=4)
    np.testing.assert_allclose(losses(run, 4), alone[1][:4], rtol=2e-3)


@pytest.mark.slow
def test_adapters_train_over_a_base_in_fp8(tmp_path):
    peft = {"peft_type": "Lora", "r": 4, "target_modules": "all-linear"}
    run = run_of(tmp_path, model={"peft_config": peft})
    found = losses(run, 4)
    assert found[-1] < found[0] and len(marked(run)) == 4


def test_routers_and_experts_are_left(tmp_path):
    run = run_of(tmp_path, shape=EXPERTS)
    assert {path.rpartition("/")[2] for path in marked(run)} == {"qkv", "out", "gate_up", "down"}
    assert run.header["model"].count("in fp8 (emulated), not those of experts") == 1


def test_weights_that_are_quantized_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="model.matmul_precision: is not for weights that"):
        peft = {"peft_type": "Lora"}
        run_of(tmp_path, model={"peft_config": peft, "quantization": "nf4"})
