"""DeepSeek-V3 as it is published: weights in FP8 with a factor to each block, read as numbers."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import describe_model, load_model, save_model, torch
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from jaxtrain.model.export import save_pretrained
from jaxtrain.model.fp8 import unpack_blocks
from jaxtrain.model.tensor_file import StoredTensor, read_folder
from jaxtrain.model.weights import open_tensors
from jaxtrain.recipe.errors import RecipeError, WeightError

QUANTIZED = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}  # fmt: skip


def packed_folder(folder, quantization=QUANTIZED):
    """Every matrix of attention and experts in FP8, and the numbers that transformers makes of it."""
    save_model("deepseek-v3", folder)
    rng, tensors, numbers = np.random.default_rng(0), {}, {}
    for name, tensor in read_folder(folder).items():
        tensors[name] = np.array(tensor.read())
        if len(tensor.shape) == 2 and "_proj" in name:
            factors = rng.uniform(0.5, 2, (1, 1)).astype(np.float32)
            packed = tensors[name].astype(ml_dtypes.float8_e4m3fn)
            tensors |= {name: packed, f"{name}_scale_inv": factors}
            numbers[name] = dequantized(packed, factors)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    written = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(written))
    return numbers


def dequantized(packed, factors):
    weight = torch.tensor(packed.view(np.uint8)).view(torch.float8_e4m3fn)
    return _dequantize_fp8_weight(weight, torch.tensor(factors), [128, 128], torch.float32).numpy()


def test_packed_weights_are_the_numbers_that_transformers_makes_of_them(tmp_path):
    numbers = packed_folder(tmp_path / "in")
    config, hf, _, params = load_model(tmp_path / "in")
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=tmp_path / "in")
    written = read_folder(tmp_path / "out")
    assert numbers and not [name for name in written if "scale_inv" in name]
    for name, expected in numbers.items():
        np.testing.assert_array_equal(written[name].read(), expected, err_msg=name)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in exported


@pytest.mark.parametrize("shape", [(256, 384), (300, 130), (1, 129), (128, 128)])
def test_every_block_has_its_own_factor_also_where_it_is_cut_off(shape):
    rng = np.random.default_rng(0)
    packed = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    factors = rng.uniform(0.1, 9, [-(-n // 128) for n in shape]).astype(np.float32)
    stored = {"w": packed, "w_scale_inv": factors}
    found = unpack_blocks({k: StoredTensor(a.shape, lambda a=a: a) for k, a in stored.items()})
    assert set(found) == {"w"} and found["w"].shape == shape
    np.testing.assert_array_equal(found["w"].read(), dequantized(packed, factors))


@pytest.mark.parametrize(
    "change", [{"weight_block_size": [64, 64]}, {"quant_method": "gptq"}, {"quant_method": None}]
)
def test_what_is_not_read_is_refused_with_what_to_do(tmp_path, change):
    packed_folder(tmp_path, QUANTIZED | change)
    told = r"quantization_config: must be null, found .*; save its weights in bfloat16 first"
    with pytest.raises(RecipeError, match=told):
        describe_model(tmp_path)


def test_factors_without_their_blocks_are_named(tmp_path):
    packed_folder(tmp_path)
    config, _, model = describe_model(tmp_path)
    tensors = {name: np.array(tensor.read()) for name, tensor in read_folder(tmp_path).items()}
    name = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv"
    tensors[name] = np.ones((2, 1), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=re.escape(f"tensor {name} [2, 1] is unknown")):
        open_tensors(tmp_path, config, model.shapes)
