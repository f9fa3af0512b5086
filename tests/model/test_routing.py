"""What the routers of a model report, and the load-balancing loss that is made of it."""

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from tiny_models import hf_model, load_model, torch

from jaxtrain.model.decoder import merge
from jaxtrain.model.export import to_hf_tensors
from jaxtrain.model.families import BY_NAME
from jaxtrain.trainer.loss import Loss
from jaxtrain.trainer.router_loss import add_router_losses

FAMILIES = (
    "qwen3-moe", "mixtral", "olmoe", pytest.param("gpt-oss", marks=pytest.mark.slow),
)  # fmt: skip
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_load_balancing_loss_is_that_of_transformers(name, tmp_path):
    """Of sequences with padding, and its gradients."""
    theirs = hf_model(name)
    for key, value in BALANCED.items():
        setattr(theirs.config, key, value)
    theirs.save_pretrained(tmp_path)
    config, _, model, params = load_model(tmp_path)
    tokens, lengths = random_tokens(3, 24), np.array([24, 9, 17])
    is_token = np.arange(24) < lengths[:, None]

    def added(params):
        _, routing = merge(model.graph, params).hidden_and_routing(batch_of(tokens, 1 * is_token))
        loss = Loss(jax.numpy.float32(0), jax.numpy.float32(7))
        loss = add_router_losses(loss, config, routing, z_loss=0.0, whole=None)
        return loss.total / loss.weight, loss.metrics["balance_loss"]

    gradients, (total, decisions) = jax.jit(jax.grad(added, has_aux=True))(params)
    out = theirs(torch.tensor(tokens), attention_mask=torch.tensor(1 * is_token))
    np.testing.assert_allclose(total / decisions, 0.3 * out.aux_loss.detach(), rtol=1e-5)
    (0.3 * out.aux_loss).backward()
    expected = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    layout = BY_NAME[config.family].layout_of(dict(theirs.named_parameters()))
    found = to_hf_tensors(gradients, config, "float32", layout)
    largest = max(np.abs(g).max() for g in expected.values())
    for tensor, gradient in expected.items():
        np.testing.assert_allclose(found[tensor].make(), gradient, atol=1e-4 * largest)
    routers = [
        g for tensor, g in expected.items() if tensor.endswith(("gate.weight", "router.weight"))
    ]
    assert all(np.abs(g).max() > 0.01 * largest for g in routers)
