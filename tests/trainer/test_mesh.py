"""A mesh changes where arrays live and nothing else."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxtrain import registry
from jaxtrain.recipe.code import run_user_code
from jaxtrain.recipe.errors import RecipeError
from tests.runs import host, losses, model_folder, recipe, trainer

try:
    from tests.model import tiny_models
except pytest.skip.Exception:  # without torch
    FAMILIES = ()
else:
    FAMILIES = tiny_models.FAMILIES

LIKE_OTHERS = {
    "llama2", "llama3", "llama31", "linear", "smollm2", "biased", "mistral", "qwen2",
    "qwen2-windows", "qwen2-alternating", "qwen3", "deepseek-v3-plain", "glm4-moe",
    "gemma3-whole", "gemma4-whole", "qwen3-5-whole",
}  # fmt: skip
"""Rows of families whose options other tests here, or other rows, have."""
ROWS = 8  # an update, on every mesh
STEPS = 20
FOCAL = Path(__file__).parents[2] / "recipes" / "focal.py"
MESHES = [
    *(
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in (
            {"data": 8}, {"fsdp": 8}, {"tensor": 4, "data": 2},
            {"pipeline": 4, "fsdp": 2},  # six layers on four stages
        )
    ),
    {"fsdp": 2, "tensor": 4},
    {"pipeline": 2, "data": 2, "tensor": 2},
]  # fmt: skip


def on_mesh(folder, mesh, config=None, **changes):
    shards = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("expert", 1)
    devices = int(np.prod(list(mesh.values()) or [1]))
    written = recipe(
        folder, mesh=mesh, micro_batch_size=ROWS // shards, train_iters=STEPS, **changes
    )
    if config is not None:
        (folder / "model" / "config.json").write_text(json.dumps(config))
    run_user_code(FOCAL)
    return trainer(
        written, devices=devices, cls=registry.find("trainer", changes.get("type", "sft"))
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Initial parameters and losses of one device, by trainer."""
    found = {}
    for kind in ("sft", "focal"):
        run = on_mesh(
            tmp_path_factory.mktemp(kind),
            {},
            **({"type": "focal"} if kind == "focal" else {}),
        )
        params = host(run.state.params)
        found[kind] = (params, losses(run, STEPS))
    return found


@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: " ".join(f"{a}{n}" for a, n in mesh.items())
)
@pytest.mark.parametrize("kind", ["sft", pytest.param("focal", marks=pytest.mark.slow)])
def test_a_mesh_changes_no_number(tmp_path, alone, mesh, kind):
    run = on_mesh(tmp_path, mesh, **({"type": "focal"} if kind == "focal" else {}))
    params, expected = alone[kind]
    for name, array in host(run.state.params).items():
        np.testing.assert_array_equal(array, params[name], err_msg=name)
    found = losses(run, STEPS)
    assert np.abs(np.array(found) - expected).max() < 1e-5
    assert found[-1] < 0.9 * found[0]  # it trains


def test_bfloat16_trains_on_a_mesh_of_cpus(tmp_path):
    def train(mesh):
        folder = tmp_path / "-".join(mesh)
        folder.mkdir(exist_ok=True)
        return losses(on_mesh(folder, mesh, model={"dtype": "bfloat16"}), 3)

    alone = train({})
    for mesh in ({"data": 2}, {"fsdp": 2, "tensor": 2}, {"pipeline": 2, "data": 2}):
        np.testing.assert_allclose(train(mesh), alone, atol=1e-2, err_msg=str(mesh))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in LIKE_OTHERS])
def test_a_mesh_changes_no_number_of_a_family(tmp_path, name):
    # More than 384 tokens: transformers adds one to the tokenizer of some families.
    sizes = {"vocab_size": 392, "max_position_embeddings": 256, "num_key_value_heads": 2}
    changes = {}
    if name == "gemma4":
        # Its scores lie so close that rounding would choose other experts, and with steps as large
        # as those of the others a difference of rounding grows fourfold from one to the next.
        sizes["top_k_experts"] = 6
        changes["optimizer"] = {"lr": 3e-3}
    config = tiny_models.hf_config(name, **sizes).to_dict()
    config["architectures"] = [type(tiny_models.hf_model(name)).__name__]

    def train(mesh):
        folder = tmp_path / "".join(mesh)
        folder.mkdir(exist_ok=True)
        return losses(on_mesh(folder, mesh, config=config, **changes), 5)

    alone = train({})
    assert alone[-1] < alone[0]
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    has_experts = any(config.get(key) for key in counts)
    meshes = [{"fsdp": 8}, {"tensor": 2, "data": 2}]
    if name == "gemma4-small":
        with pytest.raises(RecipeError, match="mesh.pipeline: 2 needs a stack of equal layers"):
            train({"pipeline": 2})
    else:
        meshes.append({"expert" if has_experts else "pipeline": 2, "fsdp": 2})
    for mesh in meshes:
        np.testing.assert_allclose(train(mesh), alone, atol=1e-5, err_msg=str(mesh))


def test_no_parameter_or_moment_is_whole_on_a_device(tmp_path):
    run = on_mesh(tmp_path, {"fsdp": 8})
    for name, leaf in jax.tree_util.tree_leaves_with_path((run.state.params, run.state.opt_state)):
        if leaf.ndim > 2:
            assert leaf.addressable_shards[0].data.size * 8 == leaf.size, name


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        ({"tensor": 8}, "mesh.tensor: 8 does not divide 4 key/value heads; use one of [1, 2, 4]"),
        ({"data": 3}, "mesh: data 3 does not fit 8 devices"),
        ({"data": 16}, "mesh: data 16 does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_would(tmp_path, mesh, expected):
    with pytest.raises(RecipeError) as error:
        trainer(recipe(tmp_path, mesh=mesh), devices=8)
    assert expected in str(error.value)


def test_a_vocabulary_that_tensor_does_not_divide_is_named(tmp_path):
    written = recipe(tmp_path, mesh={"tensor": 2, "data": 1})
    model_folder(tmp_path / "model", vocab_size=385)
    with pytest.raises(RecipeError, match="2 does not divide 385 tokens of the vocabulary"):
        trainer(written, devices=2)
