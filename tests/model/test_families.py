"""Every family against transformers: logits, weights in and out, bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from tiny_models import (
    FAMILIES,
    SIZES,
    describe_model,
    hf_model,
    load_model,
    on_one_device,
    save_model,
    torch,
    transformers,
)

from jaxtrain.model.decoder import merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.hf_config import decoder_config
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.sharding import parameter_shardings
from tests.runs import mesh_of

LOGITS_TOLERANCE = 1e-4  # float32, against another order of summation


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: save_model(name, root / name) for name in FAMILIES}


def logits_of(folder: Path, tokens: np.ndarray) -> np.ndarray:
    _, _, model, params = load_model(folder)
    forward = jax.jit(lambda params, batch: merge(model.graph, params)(batch))
    return np.asarray(forward(params, batch_of(tokens)))


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name, folders):
    tokens = random_tokens(2, 40)
    np.testing.assert_allclose(
        logits_of(folders[name], tokens), hf_logits(hf_model(name), tokens), atol=LOGITS_TOLERANCE
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_export_equals_what_was_loaded_bit_for_bit(name, folders, tmp_path):
    config, hf, _, params = load_model(folders[name])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    assert_same_tensors(folders[name], tmp_path / "out")


def assert_same_tensors(a: Path, b: Path) -> None:
    theirs, ours = read_folder(a), read_folder(b)
    assert sorted(theirs) == sorted(ours)
    for name in theirs:
        x, y = theirs[name].read(), ours[name].read()
        assert x.dtype == y.dtype
        assert x.shape == y.shape and x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize("name", ["llama31", "mistral", "qwen2-windows", "qwen3"])
def test_an_export_reloads_in_transformers_with_the_same_logits(name, folders, tmp_path):
    config, hf, _, params = load_model(folders[name])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    tokens = random_tokens(1, 40)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_array_equal(hf_logits(model, tokens), hf_logits(hf_model(name), tokens))
    assert model.config.rope_parameters == hf_model(name).config.rope_parameters


def test_bfloat16_in_several_files_goes_through_bit_for_bit(tmp_path):
    folder = save_model("qwen3", tmp_path / "in", "bfloat16", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    config, hf, _, params = load_model(folder)
    save_pretrained(tmp_path / "out", params, config, hf, dtype="bfloat16", max_shard_bytes=20e3)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same_tensors(folder, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


@pytest.mark.covers("model.param_dtype")
def test_param_dtype_is_the_dtype_of_every_parameter(folders):
    *_, params = load_model(folders["biased"], param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_tied_model_has_no_head_here_and_none_in_the_export(folders, tmp_path):
    config, hf, _, params = load_model(folders["smollm2"])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32")
    assert "head" not in params
    assert "lm_head.weight" not in read_folder(tmp_path / "out")


@pytest.mark.parametrize("name", ["smollm2", "biased", "qwen2-alternating", "qwen3"])
def test_a_sharded_load_equals_one_device_and_leaves_no_matrix_whole(name, folders):
    config, _, model = describe_model(folders[name])
    shardings = parameter_shardings(mesh_of(fsdp=4, tensor=2), model.shapes)
    sharded = load_params(folders[name], config, model.shapes, shardings)
    whole = load_params(folders[name], config, model.shapes, on_one_device(model.shapes))
    for ours, theirs in zip(jax.tree.leaves(sharded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharded):
        if leaf.ndim > 2 or path[0].key in ("embed", "head"):
            assert leaf.addressable_shards[0].data.size <= leaf.size // 2, path


def test_the_config_may_be_of_transformers_4(folders, tmp_path):
    new = json.loads((folders["llama31"] / "config.json").read_text())
    scaling = dict(new.pop("rope_parameters"))
    old = {**new, "rope_theta": scaling.pop("rope_theta")}
    old["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert describe_model(tmp_path)[0] == describe_model(folders["llama31"])[0]


@pytest.mark.parametrize("first", [None, 0, 1, 28, 29, 30, 31])
@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3"])
def test_windows_of_upper_layers_are_those_of_transformers(kind, first):
    """Of a file without `layer_types`, as transformers 4 wrote it."""
    fields = {**SIZES, "num_hidden_layers": 30, "use_sliding_window": True, "sliding_window": 5}
    fields |= {} if first is None else {"max_window_layers": first}
    types = getattr(transformers, f"{kind}Config")(**fields).layer_types
    groups = decoder_config({"architectures": [f"{kind}ForCausalLM"], **fields}).groups
    found = [layer.window for g in groups for _ in range(g.repeats) for layer in g.layers]
    assert found == [5 if kind == "sliding_attention" else None for kind in types]
