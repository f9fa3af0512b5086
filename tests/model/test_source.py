"""What is wrong with a model's folder or config is named, all at once, with what would be right."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from safetensors.numpy import load_file, save_file
from tiny_models import (
    LLAMA3,
    SIZES,
    describe_model,
    load_model,
    save_model,
    torch,
    transformers,
)

from jaxtrain.model import rope
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.hf_config import add_stop_tokens, decoder_config, read_generation_config
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model_folder import INDEX, SINGLE, is_complete, locate
from jaxtrain.recipe.errors import RecipeError, WeightError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    **SIZES,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save_model("llama3", tmp_path_factory.mktemp("hf") / "llama3")


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy that may be damaged."""
    for file in good.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def faults(error: pytest.ExceptionInfo) -> list[str]:
    return str(error.value).splitlines()


def test_missing_reshaped_and_unknown_tensors_are_named_together(folder):
    tensors = load_file(folder / SINGLE)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # harmless
    tensors["model.layers.0.adapter.weight"] = np.zeros(4, np.float32)
    save_file(tensors, folder / SINGLE)
    with pytest.raises(WeightError) as error:
        load_model(folder)
    missing, reshaped, unknown = faults(error)
    assert "model.norm.weight [32] is missing" in missing
    assert "up_proj.weight must have shape [48, 32]" in reshaped and "found [48, 31]" in reshaped
    assert "adapter.weight [4] is unknown" in unknown


def test_many_missing_tensors_are_counted(folder):
    save_file({"model.norm.weight": np.zeros(32, np.float32)}, folder / SINGLE)
    with pytest.raises(WeightError, match="and 9 more of this kind"):
        load_model(folder)


def test_a_folder_without_weights_says_what_it_looked_for(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"found pytorch_model.bin; pickled weights are not read"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(WeightError, match="no weights"):
        load_model(folder)


def test_an_index_names_each_file_that_is_not_there(folder):
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(WeightError) as error:
        load_model(folder)
    assert all(name in line for name, line in zip(names.values(), faults(error), strict=True))


@pytest.mark.parametrize("absent", [True, False])
def test_a_single_file_counts_before_an_index(folder, absent):
    """As in transformers; the shards of the index are old, or gone."""
    old = {name: np.zeros_like(array) for name, array in load_file(folder / SINGLE).items()}
    if not absent:
        save_file(old, folder / "old.safetensors")
    index = {"weight_map": dict.fromkeys(old, "old.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    assert is_complete(folder, with_weights=True)
    *_, params = load_model(folder)
    expected = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embed"]["embedding"], expected)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "{here}", "", "x" * 300]
)
def test_an_index_cannot_name_files_outside_its_folder(folder, name):
    inside, outside = folder / "model", folder / "x.safetensors"
    inside.mkdir()
    shutil.copy(folder / "config.json", inside)
    (folder / SINGLE).rename(outside)
    index = {"weight_map": dict.fromkeys(load_file(outside), name.format(here=outside))}
    (inside / INDEX).write_text(json.dumps(index))
    for read in (load_model, partial(is_complete, with_weights=True)):
        with pytest.raises(WeightError, match="weights must lie in the folder of the index"):
            read(inside)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[]"])
def test_an_index_without_a_map_of_files_is_refused(folder, index):
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(index)
    for read in (load_model, partial(is_complete, with_weights=True)):
        with pytest.raises(RecipeError, match=r"no `weight_map` of names to files|must hold a map"):
            read(folder)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_of_its_own_in_a_tied_model_counts(good, tmp_path, is_same):
    """transformers unties such a model; if the head is the embedding, both mean the same."""
    folder = save_model("smollm2", tmp_path / "tied")
    tensors = load_file(folder / SINGLE)
    head = tensors["model.embed_tokens.weight"] + (0 if is_same else 0.5)
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE)
    config, hf, model, params = load_model(folder)
    tokens = random_tokens(1, 20)
    found = np.asarray(merge(model.graph, params)(batch_of(tokens)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    assert config.tied == hf["tie_word_embeddings"] == is_same
    assert describe_model(tmp_path / "out")[0] == config
    assert describe_model(folder, from_scratch=True)[0].tied


def truncate(data: bytes) -> bytes:
    return data[:-100]


def with_a_long_header(data: bytes) -> bytes:
    return (10**12).to_bytes(8, "little") + data[8:]


def with_broken_json(data: bytes) -> bytes:
    return data[:8] + b"?" + data[9:]


@pytest.mark.parametrize(
    "damage",
    [truncate, with_a_long_header, with_broken_json, lambda data: b"", lambda data: b"\0" * 8],
)
def test_a_broken_safetensors_file_is_a_weight_error(folder, damage):
    file = folder / SINGLE
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(WeightError, match="not a safetensors file"):
        load_model(folder)


def test_further_keys_of_a_header_are_ignored(folder):
    data = (folder / SINGLE).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    entries = {name: entry | {"note": 1} for name, entry in header.items() if name[0] != "_"}
    text = json.dumps(entries).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    load_model(folder)


def test_whole_numbers_of_a_config_are_numbers(folder):
    """2**31 overflows where jax takes it for an int32."""
    large = decoder_config({**CONFIG, "initializer_range": 2**31, "rms_norm_eps": 10**30})
    abstract(large, ComputeConfig())


def test_a_dtype_that_is_not_read_is_named(folder):
    save_file({"model.norm.weight": np.zeros(32, np.int64)}, folder / SINGLE)
    with pytest.raises(WeightError, match=r"dtype 'I64'; use one of F32, F16, BF16"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        (
            "architectures",
            ["BertModel"],
            "found 'BertModel'; `jaxtrain models` lists what there is",
        ),
        ("architectures", "Gemma9ForCausalLM", "the nearest family is Gemma"),
        ("architectures", ["Qwen2VLForConditionalGeneration"], "is Qwen2ForCausalLM; `jaxtrain"),
        ("architectures", 3, "unsupported architecture, found 3"),
        ("model_type", "mistral", "'mistral' contradicts architectures, 'LlamaForCausalLM'"),
        ("is_causal", False, "must be true, found false"),
        ("per_layer_config", {"1": {}}, "must be null"),
        ("tie_word_embeddings", "yes", "must be true or false, found 'yes'"),
        ("attention_bias", 1, "must be true or false, found 1"),
        ("num_hidden_layers", 10_000_000, "must be at most 1,000, found 10,000,000"),
        ("vocab_size", 10**30, "must be a positive whole number"),
        ("initializer_range", 10**400, "must be a float32 number of at least 0, found 1000000"),
        ("rms_norm_eps", 1e300, "must be a float32 number of at least 0, found 1e+300"),
        ("rope_theta", 10**400, "default needs a positive float32 rope_theta, found 1000000"),
        ("rms_norm_eps", float("nan"), "must be a float32 number of at least 0, found nan"),
        ("rope_theta", float("inf"), "default needs a positive float32 rope_theta, found inf"),
        ("hidden_act", "mish", "must be one of silu, swish, gelu, "),
        ("mlp_bias", None, "must be true or false, found null"),
        ("attention_dropout", 0.1, "must be 0 or null, found 0.1"),
        ("quantization_config", {"bits": 4}, "must be null"),
        ("num_key_value_heads", 3, "must divide the 4 attention heads, found 3"),
        ("head_dim", 7, "must be even"),
        ("eos_token_id", "</s>", "must be the number of a token or a list of them, found '</s>'"),
        (
            "eos_token_id",
            [1, None],
            "must be the number of a token or a list of them, found [1, None]",
        ),
        ("hidden_size", None, "must be a positive whole number, found null"),
        ("rms_norm_eps", "1e-5", "must be a float32 number of at least 0"),
        (
            "rope_scaling",
            {"type": "ntk", "factor": 4.0},
            "yarn, longrope, proportional, found 'ntk'",
        ),
        ("rope_scaling", {"type": "longrope"}, "longrope needs a list short_factor, found null"),
        (
            "rope_scaling",
            {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]},
            "must have a number for each of the 4 rotated pairs, found 1 and 2",
        ),
        (
            "rope_parameters",
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5},
            "original_max_position_embeddings must be at least 1, found 0.5",
        ),
        (
            "rope_parameters",
            {"rope_type": "linear"},
            "linear needs a positive float32 factor, found null",
        ),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ("rope_parameters", LLAMA3 | {"low_freq_factor": 4.0}, "below the high one, found 4.0 and"),
        (
            "rope_parameters",
            {"rope_theta": 0},
            "default needs a positive float32 rope_theta, found 0",
        ),
        ("rope_parameters", {"full_attention": {"rope_theta": 5.0}}, "one map for all layers"),
        ("rope_scaling", 2.0, "must be one map for all layers, found 2.0"),
        ("rope_theta", -1.0, "default needs a positive float32 rope_theta, found -1.0"),
    ],
)
def test_a_field_that_is_not_built_in_is_named_with_its_value(field, value, expected):
    with pytest.raises(RecipeError) as error:
        decoder_config({**CONFIG, field: value})
    (line,) = faults(error)
    name = "rope_scaling" if field == "rope_theta" else field
    assert f"config.json: {name}: " in line and expected in line


@pytest.mark.parametrize("wrong", [{"head_dim": 5}, {"hidden_act": "mish"}, {"rope_theta": -1.0}])
def test_all_wrong_fields_come_together(wrong):
    with pytest.raises(RecipeError) as error:
        decoder_config({**CONFIG, "attention_dropout": 0.5, "is_causal": False, **wrong})
    assert len(faults(error)) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("layer_types", 3), ("layer_types", [[], {}, 1]), ("max_window_layers", "2")],
)
def test_windows_of_a_wrong_type_are_refused(field, value):
    qwen = CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", field: value}
    with pytest.raises(RecipeError, match=f"config.json: {field}: .*must"):
        decoder_config(qwen)


def read_rope(fields):
    return rope.read_ropes(fields, {"*": {"rope_theta": 1e4}})["*"]


@pytest.mark.parametrize("nested", [None, 16])
def test_the_original_length_beside_rope_counts_before_the_one_in_it(nested):
    """As in transformers, where some configs keep it at the top."""
    inner = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    inner |= {} if nested is None else {"original_max_position_embeddings": nested}
    fields = {"max_position_embeddings": 64, "rope_parameters": inner}
    length = read_rope(fields | {"original_max_position_embeddings": 32}).scaling
    default = read_rope(fields).scaling
    assert isinstance(length, rope.Llama3) and isinstance(default, rope.Llama3)
    assert length.original_max_positions == 32
    assert default.original_max_positions == (nested or 64)


def test_layer_types_must_fit_the_layers():
    qwen = CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    qwen |= {"layer_types": ["full_attention"]}
    with pytest.raises(RecipeError, match="for each of the 3 layers, found 1: full_attention"):
        decoder_config(qwen)


def test_llama3_frequencies_keep_the_fast_and_divide_the_slow():
    fields = {**LLAMA3, "rope_theta": 1000.0, "original_max_position_embeddings": 256}
    scaled = read_rope({"rope_parameters": fields, "max_position_embeddings": 64})
    plain = rope.frequencies(rope.Rope(1000.0), 64)
    ratio = plain / rope.frequencies(scaled, 64)
    assert ratio[0] == 1 and ratio[-1] == 8 and (np.diff(ratio) >= 0).all()


@pytest.mark.covers("model.hf_config_kwargs")
def test_replaced_fields_of_the_config_are_used_and_exported(good):
    config, hf, _ = describe_model(good, hf_config_kwargs={"rms_norm_eps": 0.5, "rope_theta": 7.0})
    assert config.norm.eps == 0.5 and config.ropes[0][0].theta == 7.0
    assert decoder_config(hf) == config


def test_an_unknown_field_is_refused_with_the_nearest(good):
    with pytest.raises(RecipeError, match=r"not a field of llama.*did you mean `rms_norm_eps`"):
        describe_model(good, hf_config_kwargs={"rms_norm_epsilon": 1})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 2}, "model.layers.2.self_attn.o_proj.weight from [32, 32] to none"),
        (
            {"intermediate_size": 64},
            "model.layers.0.mlp.down_proj.weight from [32, 48] to [32, 64]",
        ),
        ({"tie_word_embeddings": True}, "lm_head.weight from [96, 32] to none"),
    ],
)
def test_a_change_of_shapes_needs_from_scratch(good, fields, expected):
    with pytest.raises(RecipeError) as error:
        describe_model(good, hf_config_kwargs=fields)
    assert expected in str(error.value) and "model.from_scratch" in str(error.value)
    config, hf, _ = describe_model(good, hf_config_kwargs=fields, from_scratch=True)
    assert {name: hf[name] for name in fields} == fields
    assert config.num_layers == hf["num_hidden_layers"]


@pytest.mark.covers("model.from_scratch")
def test_from_scratch_needs_no_more_than_the_config(folder):
    (folder / SINGLE).unlink()
    assert describe_model(folder, from_scratch=True)[0].num_layers == 3


@pytest.mark.covers("model.name_or_path")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "some-owner/a-model",
            r"cannot find 'some-owner/a-model': no such folder under .*, not in .*, nor on",
        ),
        ("./models/tiny", "no such folder or file: './models/tiny'"),
        ("not a hub name//", "cannot find"),
    ],
)
def test_a_model_that_is_nowhere_names_the_places(name, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=expected) as error:
        locate(name, with_weights=True)
    assert len(faults(error)) == 1 and "model.name_or_path" in str(error.value)


@pytest.fixture
def cached(good, tmp_path, monkeypatch) -> Path:
    """A hub cache that holds `owner/tiny`, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(good, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_model_in_the_hub_cache_is_taken_from_there(cached):
    assert locate("owner/tiny", with_weights=True) == cached


def test_a_cache_with_the_config_alone_serves_only_from_scratch(cached):
    (cached / SINGLE).unlink()
    with pytest.raises(RecipeError, match=r"no config.json and whole safetensors weights in"):
        locate("owner/tiny", with_weights=True)
    assert locate("owner/tiny", with_weights=False) == cached


def test_a_folder_is_found_where_it_is(good, tmp_path):
    assert locate(str(good), with_weights=True) == good
    (tmp_path / "weights.bin").touch()
    with pytest.raises(RecipeError, match=r"must be a folder, .gguf file or hub name"):
        locate(str(tmp_path / "weights.bin"), with_weights=True)


def test_config_that_is_no_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"config.json: not JSON"):
        describe_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RecipeError, match="no such file"):
        describe_model(folder)


def test_the_generation_config_is_read_if_it_is_there(folder):
    assert (read_generation_config(folder) or {})["eos_token_id"] == 2
    (folder / "generation_config.json").unlink()
    assert read_generation_config(folder) is None


@pytest.mark.parametrize(
    ("generation", "stops", "expected"),
    [
        ({"eos_token_id": 2, "top_p": 0.9}, [2, 7], {"eos_token_id": [2, 7], "top_p": 0.9}),
        ({"eos_token_id": [2, 7]}, [7], {"eos_token_id": [2, 7]}),
        ({"top_p": 0.9}, [7], {"eos_token_id": 7, "top_p": 0.9}),
        (None, [2], None),  # config.json has it
        (None, [7], {"eos_token_id": [2, 7]}),
    ],
)
def test_the_ends_of_turns_that_were_trained_are_exported(generation, stops, expected):
    assert add_stop_tokens(generation, {"eos_token_id": 2}, stops) == expected
