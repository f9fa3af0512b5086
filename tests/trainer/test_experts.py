"""Models with experts in training: what their routers add to the loss, and what a cut of the batch,
a mesh or rematerialisation may not change."""

import json
import re
from math import prod

import jax
import numpy as np
import pytest

from jaxtrain import SFTTrainer, get_config
from jaxtrain.parallel.sharding import path_name
from jaxtrain.preflight import find_faults
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.trainer import step as pure
from jaxtrain.trainer.loss import compute_means
from tests.runs import LLAMA, first_batch, host, loss_and_gradients, losses, recipe, trainer

EXPERTS = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "num_hidden_layers": 2, "mlp_only_layers": [0], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": False, "decoder_sparse_step": 1,
}  # fmt: skip
SIGMOID = {
    **{k: v for k, v in EXPERTS.items() if k not in ("num_experts", "mlp_only_layers")},
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": 8,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": None,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def host_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in leaves]


def run_of(folder, *, devices=1, config=(), **changes):
    written = recipe(folder, **{"model": {"remat": "none"}, **changes})  # compiles faster
    (folder / "model" / "config.json").write_text(json.dumps(EXPERTS | dict(config)))
    return trainer(written, devices=devices)


@pytest.mark.covers("router_z_loss")
def test_the_losses_of_routers_are_those_of_their_definition(tmp_path):
    """Means over the tokens and layers of the whole step, whatever documents weigh."""
    cut = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "loss_weighting": "sample"}
    plain, run = (
        run_of(tmp_path / name, **cut, **changes)
        for name, changes in {
            "plain": {},
            "both": {"router_z_loss": 0.3, "config": BALANCED},
        }.items()
    )
    batch = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), first_batch(run))
    assert (np.asarray(batch.segments) == 0).any(), "there must be padding"

    def router_losses(params):
        _, routing = run.language_model.merge(params).hidden_and_routing(batch)
        frequency = jax.lax.stop_gradient(routing.choices_E) / routing.decisions
        balance = 8 * (frequency * routing.probs_E / routing.decisions).sum()
        square = routing.squares / routing.decisions
        return 0.5 * balance + 0.3 * square, (balance, square, routing)

    (_, (balance, square, routing)), added = jax.jit(
        jax.value_and_grad(router_losses, has_aux=True)
    )(run.state.params)
    chosen = np.asarray(routing.choices_E)
    assert chosen.sum() == 2 * (np.asarray(batch.segments) != 0).sum()

    (a, grads_a), (b, grads_b) = map(loss_and_gradients, (plain, run))
    np.testing.assert_allclose(a.total, b.total, rtol=1e-6)  # the loss is told without them
    grads_a, grads_b, added = map(host, (grads_a, grads_b, added))
    for name, g in grads_b.items():
        expected = grads_a[name] + float(b.weight) * added[name]
        assert np.abs(g - expected).max() <= 2e-5 * np.abs(expected).max(), name
    assert any(np.abs(g).max() > 0 for g in added.values())

    found = compute_means(b)
    np.testing.assert_allclose(found["balance_loss"], 0.5 * balance, rtol=1e-5)
    np.testing.assert_allclose(found["router_z_loss"], 0.3 * square, rtol=1e-5)
    loads = [found[f"expert_load/{e}"] for e in range(8)]
    np.testing.assert_allclose(loads, 8 * chosen / chosen.sum(), rtol=1e-5)
    assert not {"balance_loss", "router_z_loss"} & a.metrics.keys()


def test_accumulation_and_packing_change_neither_router_losses_nor_gradients(tmp_path):
    common = {"rows": 8, "router_z_loss": 0.3, "config": BALANCED, "train_iters": 1}
    cut = run_of(tmp_path / "cut", micro_batch_size=2, gradient_accumulation_steps=4, **common)
    whole = run_of(tmp_path / "whole", micro_batch_size=8, **common)
    apart = run_of(tmp_path / "apart", micro_batch_size=8, data={"pack_samples": False}, **common)
    expected, grads = loss_and_gradients(whole)
    for run in (cut, apart):
        loss, found = loss_and_gradients(run)
        found = host(found)
        for name, g in host(grads).items():
            assert np.abs(g - found[name]).max() <= 2e-5 * np.abs(g).max(), name
        for name, mean in compute_means(expected).items():
            np.testing.assert_allclose(compute_means(loss)[name], mean, rtol=1e-5, err_msg=name)


MESHES = [{"expert": 2, "fsdp": 2, "tensor": 2}]
MORE_MESHES = [
    {"expert": 4, "data": 2},
    {"expert": 8},
    {"fsdp": 8},
    {"tensor": 2, "data": 2},
    {"data": 8},
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train_five(tmp_path_factory.mktemp("alone"), {})


def train_five(folder, mesh):
    """Loss of each of five updates, and the balance that routers were trained with."""
    devices = prod(mesh.values())
    shards = devices // mesh.get("tensor", 1)
    how = {"mesh": mesh, "micro_batch_size": 8 // shards, "router_z_loss": 0.01, "model": {}}
    run = run_of(folder, devices=devices, config=BALANCED, **how)
    found = []
    for batch in run.data.train_batches(0, 5):
        run.state, metrics = run.step(run.state, run.layout.on_devices(batch))
        found.append([float(metrics[name]) for name in ("loss", "balance_loss", "expert_load/3")])
    return np.array(found), run


@pytest.mark.covers("mesh.expert", "expert_parallel_size")
@pytest.mark.parametrize(
    "mesh",
    [*MESHES, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES)],
    ids=lambda mesh: " ".join(f"{a}{n}" for a, n in mesh.items()),
)
def test_a_mesh_changes_no_number_of_a_model_with_experts(tmp_path, alone, mesh):
    found, run = train_five(tmp_path, mesh)
    expected, _ = alone
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[-1, 0] < found[0, 0]
    for name, leaf in host_leaves((run.state.params, run.state.opt_state)):
        if "expert_" in name:
            assert leaf.addressable_shards[0].data.size * prod(mesh.values()) == leaf.size, name


LORA = {"peft_type": "Lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
WIDE = {"moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 16}


@pytest.mark.covers("model.peft_config.target_parameters")
@pytest.mark.parametrize("quantization", [None, pytest.param("nf4", marks=pytest.mark.slow)])
def test_adapters_on_experts_train_the_same_on_a_mesh_beside_a_frozen_base(tmp_path, quantization):
    base = run_of(tmp_path / "base", config=WIDE).save_model(tmp_path / "weights")
    how = {"name_or_path": str(base), "from_scratch": False, "peft_config": LORA}
    model = {**how, "quantization": quantization, "remat": "full"}

    def train(name, mesh):
        devices = prod(mesh.values())
        rows = 8 // (devices // mesh.get("tensor", 1))
        changes = {"mesh": mesh, "model": model, "micro_batch_size": rows}
        run = trainer(recipe(tmp_path / name, **changes, optimizer={"eps": 1e-4}), devices=devices)
        before = host(run.state)
        return before, losses(run, 3), host(run.state)

    before, expected, after = train("alone", {})
    assert expected[-1] < expected[0]
    kept = [name for name in after if re.search(r"frozen.*expert_\w+(?<!_lora)'\]", name)]
    assert len(kept) == (8 if quantization else 2)
    moved = [name for name in after if re.search(r"params.*(expert_|router)\w*_lora.*'[ab]'", name)]
    assert len(moved) == 6, "both factors of the router, gate_up and down"
    assert all(np.any(after[name] != before[name]) for name in moved)
    first, found, last = train("mesh", {"expert": 2, "fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for name, array in last.items():
        np.testing.assert_allclose(array, after[name], atol=2e-5, err_msg=name)
        if name.startswith(".frozen"):
            for other in (before, first, after):
                np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in ("muon", "adafactor"))],
)
def test_the_bias_of_a_choice_has_no_gradient_and_no_decay_and_keeps_its_bits(tmp_path, optimizer):
    how = {"type": optimizer, "lr": 0.1, "weight_decay": 0.5}
    model = {"param_dtype": "bfloat16"}
    run = run_of(tmp_path, config=SIGMOID, train_iters=2, optimizer=how, model=model)
    bias = np.random.default_rng(0).normal(0, 1e-3, (1, 8)).astype(np.float32)
    params = run.state.params
    mlp = params["layers"]["1"]["0"]["mlp"]
    assert mlp["choice_bias"].dtype == np.float32 != mlp["router"].dtype
    before = np.asarray(mlp["router"].astype("float32"))
    mlp["choice_bias"] = jax.device_put(bias, mlp["choice_bias"].sharding)
    run.state = run.state._replace(params=params)
    _, gradients = loss_and_gradients(run)
    assert not np.any(gradients["layers"]["1"]["0"]["mlp"]["choice_bias"])
    losses(run, 2)
    mlp = run.state.params["layers"]["1"]["0"]["mlp"]
    assert np.asarray(mlp["choice_bias"]).tobytes() == bias.tobytes()
    assert np.abs(np.asarray(mlp["router"].astype("float32")) - before).max() > 1e-3


@pytest.mark.slow
def test_a_mesh_generates_what_one_device_does(tmp_path, alone):
    """Three prompts, which do not split over the mesh."""
    prompts = [[5, 17, 40], [7], [33, 9, 81, 12]]

    def generate(run, params):
        with jax.set_mesh(run.mesh):
            return run.language_model.generate(params, prompts, max_new_tokens=20)

    found, run = train_five(tmp_path, {"expert": 2, "fsdp": 2, "tensor": 2})
    assert generate(run, run.state.params) == generate(alone[1], alone[1].state.params)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mesh": {"expert": 3}}, "mesh.expert: 3 does not divide 8 experts; use one of [1, 2, 4"),
        (
            {"mesh": {"pipeline": 2}},
            "mesh.pipeline: 2 cannot split a model with experts; use mesh.expert",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_experts_says_what_would(tmp_path, changes, expected):
    with pytest.raises(RecipeError, match=re.escape(expected)):
        run_of(tmp_path, devices=prod(changes["mesh"].values()), **changes)


@pytest.mark.covers("arctic_moe", "enable_routing_replay")
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("expert_parallel_size", 2, "mesh.expert"),
        ("arctic_moe", True, "arctic_moe"),
        ("enable_routing_replay", True, "enable_routing_replay"),
        ("router_z_loss", 0.1, "router_z_loss"),
    ],
)
def test_settings_of_experts_are_refused_without_any(tmp_path, key, value, named):
    written = recipe(tmp_path, **{key: value})
    with pytest.raises(RecipeError, match=f"{named}: needs a model with experts, which llama has"):
        trainer(written, devices=2)
    assert any(named == fault.key for fault in find_faults(get_config(written)))


@pytest.mark.parametrize(("replay", "times"), [(True, 1), (False, 2)], ids=["kept", "chosen anew"])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_routing_replay_keeps_the_choices_for_the_backward_pass(tmp_path, remat, replay, times):
    """What is recomputed has no router that chooses; the numbers are the same."""
    run = run_of(tmp_path, enable_routing_replay=replay, model={"remat": remat})
    differentiate = lambda p, b: pure.grads(run.step_spec, p, {}, b, jax.random.key(0))[1]
    program = str(jax.make_jaxpr(differentiate)(run.state.params, first_batch(run)))
    assert len(re.findall(r"= top_k", program)) == times


def test_the_header_says_whether_load_is_balanced(tmp_path):
    fact = lambda name, **how: run_of(tmp_path / name, **how).header["experts"]
    assert fact("off") == (
        "2 of 8 per token, load balance not in the loss; "
        "model.hf_config_kwargs.output_router_logits: true adds it"
    )
    assert fact("on", config=BALANCED, router_z_loss=0.01) == (
        "2 of 8 per token, load balance in the loss with coefficient 0.5, router z-loss with "
        "coefficient 0.01"
    )
    assert fact("sigmoid", config=SIGMOID) == (
        "2 of 8 per token, load balance left to a bias of the choice, which stays as it is"
    )

    class Own(SFTTrainer):
        name = "objective-of-test-experts"

    written = recipe(tmp_path / "own", type=Own.name)
    (tmp_path / "own" / "model" / "config.json").write_text(json.dumps(EXPERTS | BALANCED))
    said = trainer(written, cls=Own).header["experts"]
    assert said.endswith("coefficient 0.5; an objective of your own has only what it adds")
