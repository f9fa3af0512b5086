"""Training of adapters: what moves, on every mesh, resumed, packed, evaluated and exported."""

import json
import re
from math import prod

import jax
import numpy as np
import pytest

from jaxtrain import SFTTrainer, get_config
from jaxtrain.export import export, restore_weights
from jaxtrain.model.layers import drop_out
from jaxtrain.plan import plan
from jaxtrain.recipe.errors import CheckpointError, RecipeError
from jaxtrain.trainer import step as pure
from tests.runs import (
    assert_same,
    first_batch,
    host,
    loss_and_gradients,
    losses,
    model_folder,
    recipe,
    trainer,
)

STEPS = 4
PEFT = {
    "peft_type": "Lora",
    "r": 4,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "rank_pattern": {r".*\.(1|4)\.mlp\.up_proj": 2},
    "init_lora_weights": False,
    "lora_dropout": 0.3,
}


def written(folder, peft=PEFT, **changes):
    model = {"peft_config": peft, **changes.pop("model", {})}
    # With a small eps Adam makes a step of what rounding leaves of a gradient near 0.
    return recipe(folder, model=model, seed=3, optimizer={"eps": 1e-4}, **changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    run = trainer(written(tmp_path_factory.mktemp("alone"), micro_batch_size=8))
    before = host(run.state)
    return before, losses(run, STEPS), host(run.state)


@pytest.mark.covers("model.peft_config.peft_type", "model.peft_config.r")
def test_only_adapters_are_trained_and_have_moments(alone):
    before, found, after = alone
    assert found[-1] < 0.97 * found[0]
    for name in before:
        is_factor = re.search(r"_lora'\]\['\w+'\]\['[ab]'\]$", name) is not None
        if name.startswith(".frozen"):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        assert is_factor == name.startswith((".params", ".opt_state[0].mu", ".opt_state[0].nu"))
        if name.startswith(".params"):
            assert before[name].dtype == np.float32
            assert before[name].shape[-1] == 4 or before[name].shape[1] == 4, "of rank r"
            assert not np.array_equal(before[name], after[name]), name


def test_what_pads_a_smaller_rank_stays_zero(alone):
    for state in (alone[0], alone[2]):
        path = ".params['layers']['0']['0']['mlp']['gate_up_lora']['up_proj']"
        a, b = (state[f"{path}['{factor}']"] for factor in "ab")
        for layer in range(6):
            rank = 2 if layer in (1, 4) else 4
            assert not a[layer, :, rank:].any() and a[layer, :, :rank].all()
            assert not b[layer, rank:].any() and b[layer, :rank].all()


@pytest.mark.parametrize(
    ("mesh", "rows", "accumulation", "model"),
    [
        pytest.param(
            {}, 2, 4, {"remat": "dots", "remat_every_nth_layer": 2}, marks=pytest.mark.slow
        ),
        pytest.param({"data": 2, "fsdp": 2}, 1, 2, {"remat": "none"}, marks=pytest.mark.slow),
        ({"fsdp": 2, "tensor": 4}, 2, 2, {}),
        ({"data": 2, "pipeline": 2}, 2, 2, {}),
    ],
    ids=["accumulation", "data and fsdp", "tensor", "pipeline"],
)
def test_adapters_train_the_same_on_every_mesh(tmp_path, alone, mesh, rows, accumulation, model):
    before, expected, after = alone
    cut = {"micro_batch_size": rows, "gradient_accumulation_steps": accumulation}
    devices = prod(mesh.values())
    run = trainer(written(tmp_path, model=model, mesh=mesh, **cut), devices=devices)
    assert np.abs(np.array(losses(run, STEPS)) - expected).max() < 1e-5
    for name, array in host(run.state).items():
        np.testing.assert_allclose(array, after[name], atol=2e-5, err_msg=name)
        if name.startswith(".frozen"):
            np.testing.assert_array_equal(array, before[name], err_msg=name)


DORA = {**PEFT, "use_dora": True, "layers_to_transform": [0, 1, 3, 4, 5]}


@pytest.mark.slow
def test_dora_trains_its_magnitudes_the_same_on_a_mesh(tmp_path):
    run = trainer(written(tmp_path / "alone", DORA, micro_batch_size=8))
    before, expected, after = host(run.state), losses(run, STEPS), host(run.state)
    cut = {"mesh": {"fsdp": 2, "tensor": 2}, "micro_batch_size": 4, "model": {"remat": "none"}}
    other = trainer(written(tmp_path / "mesh", DORA, **cut), devices=4)
    np.testing.assert_allclose(losses(other, STEPS), expected, atol=1e-5)
    magnitudes = [name for name in after if re.search(r"params.*'magnitude'\]$", name)]
    assert len(magnitudes) == 5
    for name, array in host(other.state).items():
        np.testing.assert_allclose(array, after[name], atol=2e-5, err_msg=name)
    for name in magnitudes:
        assert not after[name][2].any(), "layer 2 has no adapter"
        moved = np.abs(after[name] - before[name])[[0, 1, 3, 4, 5]]
        assert (moved > 0).mean() > 0.99, name


def test_packing_changes_neither_the_loss_nor_what_is_dropped(tmp_path):
    changes = {"rows": 8, "micro_batch_size": 8}
    packed = trainer(written(tmp_path / "packed", **changes))
    apart = trainer(written(tmp_path / "apart", data={"pack_samples": False}, **changes))
    assert packed.data.steps_per_epoch == apart.data.steps_per_epoch == 1
    assert int(first_batch(packed).segments.max()) > 1
    (a, grads_a), (b, grads_b) = map(loss_and_gradients, (packed, apart))
    assert float(a.total) == pytest.approx(float(b.total), rel=1e-6)
    expected = host(grads_b)
    for name, gradient in host(grads_a).items():
        assert np.abs(gradient - expected[name]).max() <= 1e-5 * np.abs(gradient).max(), name


@pytest.mark.covers("model.peft_config.lora_dropout")
def test_dropout_is_another_in_each_step_and_none_in_an_evaluation(tmp_path):
    without = trainer(written(tmp_path / "without", {**PEFT, "lora_dropout": 0}))
    run = trainer(written(tmp_path))
    batch, key = first_batch(run), jax.random.key(0)
    first, expected = (one.loss(one.state, batch, key) for one in (run, without))
    np.testing.assert_array_equal(first.total, expected.total)
    spec, state = run.step_spec, run.state

    @jax.jit
    def trained(step):
        return pure.grads(spec, state.params, state.frozen, batch, key, step)[0].total

    with jax.set_mesh(run.mesh):
        totals = [float(trained(step)) for step in (0, 1, 0)]
    assert totals[0] == totals[2] and len({*totals, float(first.total)}) == 3


def test_this_fraction_of_inputs_is_dropped_each_token_apart():
    x = jax.numpy.ones((2, 50, 40, 25))
    noise = jax.numpy.arange(100, dtype=jax.numpy.uint32).reshape(2, 50)
    kept = np.asarray(drop_out(x, noise, 0.2) > 0).reshape(100, 1000)
    np.testing.assert_allclose(drop_out(x, noise, 0.2).max(), 1.25)
    spread = (0.2 * 0.8 / 1000) ** 0.5
    assert abs(kept.mean() - 0.8) < 4 * spread / 10, "of 100,000"
    assert np.abs(kept.mean(1) - 0.8).max() < 5 * spread, "of each token"
    assert np.abs(kept.mean(0) - 0.8).max() < 5 * spread * 10**0.5, "of each input"
    both = np.corrcoef(kept)[~np.eye(100, dtype=bool)]
    assert np.abs(both).max() < 6 / 1000**0.5, "two tokens are dropped alike"


def test_the_program_has_no_gradient_of_a_base_weight(tmp_path):
    sizes = {"hidden_size": 40, "intermediate_size": 72, "vocab_size": 392}
    products = {}
    for peft in (None, PEFT):
        made = written(tmp_path, peft, rows=4)
        model_folder(tmp_path / "model", **sizes)
        run = trainer(made)
        compiled = run.step.lower(run.run.state_shapes, first_batch(run)).compile()
        shapes = re.findall(r"= f32\[([0-9,]+)\]\S* dot\(", compiled.as_text())
        products[peft is not None] = {tuple(map(int, shape.split(","))) for shape in shapes}
    # of qkv, out, gate_up, down and the head that is the embedding
    weights = {(40, 128), (64, 40), (40, 144), (72, 40), (392, 40), (40, 392)}
    assert len(products[False] & weights) == 5
    assert not products[True] & weights


def test_what_adapters_add_is_not_kept_for_the_backward_pass(tmp_path):
    """With `remat: dots` a layer keeps what its products and adapters give together, not apart."""
    kept = {}
    for peft in (None, {**PEFT, "lora_dropout": 0}):
        made = get_config(written(tmp_path, peft, model={"remat": "dots"}))
        run = SFTTrainer(made, "plan", devices=jax.devices()[:1])
        model, T = run.run.model, 128
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype),
                             run.layout.batch_shapes(T))  # fmt: skip

        def backward(params, base, batch, model=model):
            return jax.vjp(lambda params: model.merge(params, base).hidden(batch), params)[1]

        with jax.set_mesh(run.mesh):
            residuals = jax.eval_shape(backward, model.shapes, model.base_shapes, batch)
        of_tokens = (leaf.size for leaf in jax.tree.leaves(residuals) if T in leaf.shape)
        tokens = batch.tokens.size * model.spec.config.num_layers
        kept[peft is not None] = sum(of_tokens) / tokens
    added, low = 64 + 32 + 32 + 64 + 32, 5 * 4
    assert kept[False] < kept[True] < kept[False] + low + added / 8, "numbers of a token and layer"


def resumable(folder, **changes):
    entry = {"output_dir": str(folder / "state"), "save_every_n_steps": 2, "auto_resume": True}
    return written(folder, checkpoint=[entry], ema={"decay": 0.5}, **changes)


def test_a_resumed_run_is_bitwise_the_unbroken_one_without_the_base_in_its_checkpoint(tmp_path):
    whole = trainer(written(tmp_path / "whole", ema={"decay": 0.5}))
    whole.train()
    trainer(resumable(tmp_path, exit_iteration=2)).train()
    saved = json.loads((tmp_path / "state/global_step_2/metadata.json").read_text())
    assert not [name for name in saved["shapes"] if "frozen" in name]
    assert all(re.search(r"_lora|step|count", name) for name in saved["shapes"])
    again = trainer(resumable(tmp_path))
    again.train()
    assert_same(again.state, host(whole.state))
    at_once = resumable(tmp_path, mesh={"tensor": 2})
    at_once["checkpoint"][0]["reset"] = ["optimizer"]
    other = trainer(at_once, devices=2)
    assert_same(other.state.frozen, host(whole.state.frozen))
    assert_same(other.state.params, host(whole.state.params))
    assert not any(a.any() for name, a in host(other.state.opt_state).items())


def test_a_checkpoint_is_refused_over_another_base_or_other_adapters(tmp_path):
    trainer(resumable(tmp_path, exit_iteration=2)).train()
    with pytest.raises(RecipeError, match=r"model\.peft_config: is .* has "):
        trainer(resumable(tmp_path, peft={**PEFT, "lora_alpha": 8})).start()
    made = resumable(tmp_path)
    model_folder(tmp_path / "model", initializer_range=0.11)
    with pytest.raises(CheckpointError, match="the base has changed: .* the adapters were trained"):
        trainer(made).start()


@pytest.mark.covers("checkpoint.*.adapter")
def test_a_run_is_exported_continued_evaluated_sampled_and_planned(tmp_path, capsys):
    """One run through all that reads its weights."""
    data = {"train_eval_split": [0.75, 0.25]}
    samples = {"prompts": ["why?"], "max_new_tokens": 4}
    changes = {"data": data, "eval_interval": 4, "eval_samples": samples}
    made = resumable(tmp_path, **changes)
    made["checkpoint"].append({
        "type": "huggingface", "output_dir": str(tmp_path / "out"), "save_end_of_training": True,
        "adapter": "both",
    })  # fmt: skip
    first = trainer(made)
    found = first.train().metrics["eval/loss"]
    header = capsys.readouterr().out
    assert "are frozen, LoRA of 10,368 trained parameters" in header

    out = tmp_path / "out" / "global_step_4"
    held = out / "merged"
    model = {"name_or_path": str(held), "from_scratch": False, "peft_config": None}
    merged = trainer({**made, "model": model, "checkpoint": [], "ema": None})
    assert merged.evaluate()["eval/loss"] == pytest.approx(found, abs=1e-5)

    peft = {"peft_type": "Lora", "path": str(out)}
    model = {**made["model"], "peft_config": peft}
    on = trainer({**made, "model": model, "checkpoint": [], "ema": None})
    assert_same(on.state.params, host(first.state.average))
    assert on.evaluate()["eval/loss"] == pytest.approx(found, abs=1e-6)

    _, state = restore_weights(tmp_path / "state" / "global_step_4")
    assert_same(state.params, host(first.state.params))
    export(tmp_path / "state" / "global_step_4", tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()

    facts = dict(plan(get_config(made), jax.devices()[:1]))
    assert "are frozen" in facts["model"]
