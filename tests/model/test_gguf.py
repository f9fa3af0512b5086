"""A GGUF file gives the parameters and the config of the folder that it was made from."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_models import describe_model, load_model, save_model

from jaxtrain.model.gguf import FIXED, PER_LAYER
from jaxtrain.model.hf_config import read_generation_config
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.recipe.errors import WeightError

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in the order of GGUF: the two halves of a head in turn."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path, folder, hf, kind=gguf.GGMLQuantizationType.F32, architecture="llama"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf["num_key_value_heads"])
    writer.add_rope_dimension_count(hf["hidden_size"] // hf["num_attention_heads"])
    writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_eos_token_id(2)
    heads = {"q": hf["num_attention_heads"], "k": hf["num_key_value_heads"]}
    for name, stored in read_folder(folder).items():
        w = np.asarray(stored.read())
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = permute(w, heads[name[-len("q_proj.weight")]])
        if "down_proj" not in name:  # its rows are no multiple of a block
            w = quants.quantize(w, kind) if w.ndim == 2 else w
            writer.add_tensor(gguf_name(name), w, raw_dtype=kind if w.ndim == 2 else None)
        else:
            writer.add_tensor(gguf_name(name), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    fixed = {theirs: ours for ours, theirs in FIXED.items()}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}." + {theirs: ours for ours, theirs in PER_LAYER.items()}[rest]


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_a_gguf_file_equals_its_folder(name, tmp_path):
    folder = save_model(name, tmp_path / "hf")
    config, hf, _, params = load_model(folder)
    path = write_gguf(tmp_path / "m.gguf", folder, hf)
    of_file, _, _, from_file = load_model(path)
    # How a model was initialised is the one thing that the format does not keep.
    assert replace(of_file, initializer_range=config.initializer_range) == config
    jax.tree.map(np.testing.assert_array_equal, from_file, params)
    assert read_generation_config(path) == {"eos_token_id": 2}


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_1", "Q4_0"])
def test_quantised_tensors_come_back_as_their_format_rounds_them(kind, tmp_path):
    folder = save_model("smollm2", tmp_path / "hf")
    _, hf, _, params = load_model(folder)
    path = write_gguf(tmp_path / "m.gguf", folder, hf, gguf.GGMLQuantizationType[kind])
    *_, from_file = load_model(path)
    table = np.asarray(params["embed"]["embedding"])
    type_ = gguf.GGMLQuantizationType[kind]
    rounded = quants.dequantize(quants.quantize(table, type_), type_)
    np.testing.assert_array_equal(from_file["embed"]["embedding"], rounded)
    far = {"F16": 1e-3, "Q8_0": 5e-3, "Q4_1": 0.06, "Q4_0": 0.08}[kind]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=far), from_file, params)


def test_other_architectures_and_other_files_are_refused(tmp_path):
    folder = save_model("smollm2", tmp_path / "hf")
    other = write_gguf(
        tmp_path / "gemma.gguf", folder, describe_model(folder)[1], architecture="gemma"
    )
    with pytest.raises(WeightError, match="must be of architecture llama, found 'gemma'"):
        describe_model(other)
    (tmp_path / "text.gguf").write_text("no weights in here, only words that go on for a while")
    with pytest.raises(WeightError, match="not a GGUF file"):
        describe_model(tmp_path / "text.gguf")


def test_a_file_that_is_cut_off_is_refused_before_a_tensor_is_read(tmp_path):
    folder = save_model("smollm2", tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", folder, describe_model(folder)[1])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WeightError, match=r"ends at byte \d+, the file at \d+; fetch it again"):
        describe_model(path)


def test_a_type_that_is_not_read_is_named(tmp_path):
    folder = save_model("smollm2", tmp_path / "hf")
    path = write_gguf(tmp_path / "m.gguf", folder, describe_model(folder)[1])
    name = b"blk.0.ffn_norm.weight"
    data = path.read_bytes()
    at = data.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the only one
    path.write_bytes(data[:at] + (28).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(WeightError, match=r"ffn_norm.weight: .* cannot read type F64"):
        describe_model(path)
