"""Models with experts in training: what their routers add to the loss, and what a cut of the batch,
a mesh or rematerialisation may not change."""

import json

import jax
import numpy as np
import pytest

from jaxtrain.trainer.loss import compute_means
from tests.runs import LLAMA, first_batch, host, loss_and_gradients, recipe, trainer

EXPERTS = {
    **LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
    "num_hidden_layers": 2, "mlp_only_layers": [0], "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": False, "decoder_sparse_step": 1,
}  # fmt: skip
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


def run_of(folder, *, devices=1, config=(), **changes):
    written = recipe(folder, **changes)
    (folder / "model" / "config.json").write_text(json.dumps(EXPERTS | dict(config)))
    return trainer(written, devices=devices)


@pytest.mark.covers("router_z_loss")
@pytest.mark.parametrize(
    "cut",
    [
        {"micro_batch_size": 1, "gradient_accumulation_steps": 4},
        {"micro_batch_size": 4, "loss_weighting": "sample"},
    ],
    ids=["in microbatches", "as one"],
)
def test_the_losses_of_routers_are_those_of_their_definition(tmp_path, cut):
    """Means over the tokens and layers of the whole step, of logits computed by hand."""
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
