"""gpt-oss as it is published: experts in MXFP4, read as numbers and exported as such."""

import json

import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from safetensors.numpy import save_file
from tiny_models import describe_model, hf_model, load_model, torch, transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxtrain.model.decoder import merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.mxfp4 import unpack
from jaxtrain.model.tensor_file import StoredTensor, read_folder
from jaxtrain.model.weights import open_tensors
from jaxtrain.recipe.errors import RecipeError, WeightError

QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def packed_folder(folder, quantization=QUANTIZED):
    """A tiny model, and the weights that transformers makes of what its files hold."""
    rng, model = np.random.default_rng(0), hf_model("gpt-oss")
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors, dequantized = {}, {}
    for name, tensor in state.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        blocks = rng.integers(0, 256, (experts, columns, rows // 32, 16), np.uint8)
        scales = rng.integers(121, 126, blocks.shape[:-1], np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        numbers = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
        dequantized[name] = numbers.float()
        assert numbers.shape == tensor.shape
    model.load_state_dict(dequantized, strict=False)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["GptOssForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return model, dequantized


def test_packed_experts_are_the_numbers_that_transformers_makes_of_them(tmp_path):
    (tmp_path / "in").mkdir()
    model, dequantized = packed_folder(tmp_path / "in")
    config, hf, ours, params = load_model(tmp_path / "in")
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=tmp_path / "in")
    written = read_folder(tmp_path / "out")
    for name, numbers in dequantized.items():
        np.testing.assert_array_equal(written[name].read(), numbers, err_msg=name)
    assert not [name for name in written if name.endswith(("_blocks", "_scales"))]
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", attn_implementation="eager"
        )(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(merge(ours.graph, params)(batch_of(tokens)))
    atol = min(1e-4, 2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(logits, expected, atol=atol)
    np.testing.assert_array_equal(again, expected)


def test_every_byte_and_exponent_is_read_as_transformers_reads_it():
    """Also where a number is too small for bfloat16."""
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    blocks = np.broadcast_to(blocks, (255, 16, 16)).copy()  # each with each
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (255, 16)).copy()
    stored = {"w_blocks": blocks, "w_scales": scales}
    found = unpack({
        name: StoredTensor(a.shape, lambda a=a: a) for name, a in stored.items()
    })["w"]  # fmt: skip
    theirs = convert_moe_packed_tensors(torch.tensor(blocks)[None], torch.tensor(scales)[None])[0]
    assert found.shape == tuple(theirs.shape)
    np.testing.assert_array_equal(found.read().astype(np.float32), theirs.float().numpy())


def test_what_is_not_mxfp4_is_refused(tmp_path):
    for quantization in ({"quant_method": "bitsandbytes"}, {}, "mxfp4"):
        packed_folder(tmp_path, quantization)
        with pytest.raises(RecipeError, match=r"quantization_config: must be null, found"):
            describe_model(tmp_path)


@pytest.mark.parametrize("lost", ["scales", "blocks"])
def test_blocks_and_scales_need_each_other(tmp_path, lost):
    packed_folder(tmp_path)
    config, _, model = describe_model(tmp_path)
    tensors = {name: np.array(tensor.read()) for name, tensor in read_folder(tmp_path).items()}
    name = "model.layers.0.mlp.experts.down_proj"
    del tensors[f"{name}_{lost}"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError) as error:
        open_tensors(tmp_path, config, model.shapes)
    assert len(error.value.faults) == 2
    assert f"tensor {name} [6, 64, 32] is missing" in str(error.value)
