"""Every family against transformers: logits and gradients; weights in and out, bit for bit."""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from safetensors.numpy import save_file
from tiny_models import (
    FAMILIES,
    NOT_TRAINED,
    ROWS,
    SIZES,
    describe_model,
    hf_model,
    load_model,
    on_one_device,
    save_model,
    torch,
    transformers,
)

from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract, merge
from jaxtrain.model.export import save_pretrained, to_hf_tensors
from jaxtrain.model.families import BY_NAME
from jaxtrain.model.hf_config import decoder_config
from jaxtrain.model.tables import name_in_tables
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.errors import RecipeError
from tests.runs import mesh_of

LOGITS_TOLERANCE = 1e-4  # float32, against another order of summation
GRADIENT_TOLERANCE = 1e-4  # of the largest number of a tensor
PACKED_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {name: save_model(name, root / name) for name in FAMILIES}


@cache
def loaded(folder: Path):
    """The model of a folder, and a function of a batch: its logits, and gradients of its loss."""
    config, hf, _, params = load_model(folder)
    model = abstract(config, ComputeConfig(remat="none"))  # compiles faster

    def loss(params, batch):
        decoder = merge(model.graph, params)
        return -decoder.token_log_probs(batch).sum(), decoder(batch)

    differentiate = jax.jit(jax.grad(loss, has_aux=True))
    return config, hf, params, lambda batch: differentiate(params, batch)[::-1]


def hf_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("name", ROWS)
def test_logits_and_gradients_equal_those_of_transformers(name, folders):
    config, _, _, outputs = loaded(folders[name])
    tokens = random_tokens(3, 40)
    logits, gradients = outputs(batch_of(tokens))
    theirs = hf_model(name)
    targets = torch.tensor(tokens, dtype=torch.long)
    expected = theirs(targets).logits.float()
    largest = float(expected.detach().abs().max())
    np.testing.assert_allclose(
        logits, expected.detach(), atol=min(LOGITS_TOLERANCE, 2e-5 * largest)
    )
    torch.nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), reduction="sum"
    ).backward()
    trained = {n: p.grad.numpy() for n, p in theirs.named_parameters() if p.grad is not None}
    scales = [pair for pair in theirs.named_buffers() if pair[0].endswith(NOT_TRAINED)]
    trained |= {n: np.zeros(scale.shape) for n, scale in scales}
    layout = BY_NAME[config.family].layout_of(trained)
    found = to_hf_tensors(gradients, config, "float32", layout._replace(starts=()))
    by_name = {name_in_tables(layout, name): gradient for name, gradient in trained.items()}
    assert found.keys() == by_name.keys()
    # Gradients that are 0, as that of a bias of keys without rope, are rounding alone.
    rounding = 4e-4 * max(np.abs(gradient).max() for gradient in by_name.values())
    for tensor, gradient in by_name.items():
        atol = GRADIENT_TOLERANCE * max(np.abs(gradient).max(), rounding)
        np.testing.assert_allclose(found[tensor].make(), gradient, atol=atol, err_msg=tensor)


@pytest.mark.parametrize("name", ROWS)
def test_a_document_in_a_packed_row_equals_the_document_alone(name, folders):
    """Two in one row, then each in a row of its own, and padding behind."""
    outputs = loaded(folders[name])[3]
    tokens, index = random_tokens(1, 40)[0], np.arange(40)
    is_first, is_second = index < 17, (index >= 17) & (index < 36)
    rows = np.stack([tokens, tokens, np.roll(tokens, -17)])
    segments = np.stack([is_first + 2 * is_second, 1 * is_first, 1 * (index < 19)])
    logits, _ = outputs(batch_of(rows, segments))
    for packed, alone in ((logits[0, :17], logits[1, :17]), (logits[0, 17:36], logits[2, :19])):
        np.testing.assert_allclose(packed, alone, atol=PACKED_TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "olmoe", "deepseek-v3"])
def test_experts_in_one_tensor_are_those_of_a_tensor_each_and_are_exported_so(
    name, folders, tmp_path
):
    """The two ways in which files have them."""
    fused = save_model(name, tmp_path / "in", save_original_format=False)
    assert len(read_folder(fused)) < len(read_folder(folders[name]))
    config, hf, _, params = load_model(fused)
    jax.tree.map(np.testing.assert_array_equal, params, loaded(folders[name])[2])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=fused)
    assert_same_tensors(fused, tmp_path / "out")


@pytest.mark.parametrize("name", ROWS)
def test_export_equals_what_was_loaded_bit_for_bit(name, folders, tmp_path):
    config, hf, params, _ = loaded(folders[name])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=folders[name])
    assert_same_tensors(folders[name], tmp_path / "out")


@pytest.mark.parametrize("name", ["gemma3-whole", "gemma4-whole"])
def test_a_multimodal_folder_takes_fields_of_its_text_model_and_keeps_its_weights(name, folders):
    changed = {"rms_norm_eps": 0.5}
    config, hf, _ = describe_model(folders[name], hf_config_kwargs=changed)
    assert config.norm.eps == 0.5 == hf["text_config"]["rms_norm_eps"]
    with pytest.raises(RecipeError, match="parts beside the text model, which keep their weights"):
        describe_model(folders[name], from_scratch=True)


def test_a_multimodal_folder_is_exported_in_the_names_that_it_had(folders, tmp_path):
    """Some have the prefix of the whole model, which transformers does not write."""
    whole = folders["gemma3-whole"]
    rename = lambda name: "model." + name.replace("language_model.model.", "language_model.")
    tensors = {rename(name): tensor.read() for name, tensor in read_folder(whole).items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path / "in")
    config, hf, _, params = load_model(tmp_path / "in")
    save_pretrained(
        tmp_path / "out", params, config, hf, dtype="float32", source=tmp_path / "in", verify=False
    )
    assert_same_tensors(tmp_path / "in", tmp_path / "out")


def assert_same_tensors(a: Path, b: Path) -> None:
    theirs, ours = read_folder(a), read_folder(b)
    assert sorted(theirs) == sorted(ours)
    for name in theirs:
        x, y = theirs[name].read(), ours[name].read()
        assert x.dtype == y.dtype
        assert x.shape == y.shape and x.tobytes() == y.tobytes(), name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(
            (name, "CausalLM")
            for name in ("llama31", "mistral", "qwen2-windows", "gemma3-whole", "gemma4-whole")
        ),
        ("qwen3-5-whole", "CausalLM"),  # the text part
        ("qwen3-5-whole", "ImageTextToText"),
    ],
)
def test_an_export_reloads_in_transformers_with_the_same_logits(name, kind, folders, tmp_path):
    config, hf, params, _ = loaded(folders[name])
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=folders[name])
    tokens = random_tokens(1, 40)
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    np.testing.assert_array_equal(hf_logits(model, tokens), hf_logits(hf_model(name), tokens))
    text, theirs = (m.config.get_text_config() for m in (model, hf_model(name)))
    assert text.rope_parameters == theirs.rope_parameters


def test_layers_that_predict_several_tokens_are_carried(folders, tmp_path):
    """As published folders of Qwen 3.5 have them; transformers leaves them out."""
    whole, extra = folders["qwen3-5-whole"], np.ones((3, 4), np.float32)
    tensors = {name: tensor.read() for name, tensor in read_folder(whole).items()}
    (tmp_path / "in").mkdir()
    save_file(tensors | {"mtp.fc.weight": extra}, tmp_path / "in" / "model.safetensors")
    shutil.copy(whole / "config.json", tmp_path / "in")
    config, hf, _, params = load_model(tmp_path / "in")
    save_pretrained(
        tmp_path / "out", params, config, hf, dtype="float32", source=tmp_path / "in", verify=False
    )
    assert_same_tensors(tmp_path / "in", tmp_path / "out")


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


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Qwen3_5", {}),
        ("Qwen3_5", {"full_attention_interval": 3}),
        ("Lfm2", {}),
        ("Lfm2", {"full_attn_idxs": [0, 3, 9]}),
        ("Lfm2", {"block_auto_adjust_ff_dim": False}),
        ("Lfm2", {"block_multiple_of": 7, "block_ffn_dim_multiplier": 0.7}),
        ("Lfm2", {"block_ff_dim": 100, "tie_embedding": False}),
    ],
)
def test_layers_and_widths_follow_from_what_files_say_of_them(kind, fields):
    """Of files without `layer_types`, in the fields that publishers write."""
    sizes = {
        k: v for k, v in SIZES.items() if k != "intermediate_size" or "block_ff_dim" not in fields
    }
    fields = {**sizes, "num_hidden_layers": 10, **fields}
    class_name = {"Qwen3_5": "Qwen3_5TextConfig", "Lfm2": "Lfm2Config"}[kind]
    theirs = getattr(transformers, class_name)(**fields)
    ours = decoder_config({"architectures": [f"{kind}ForCausalLM"], **fields})
    layers = [layer for g in ours.groups for _ in range(g.repeats) for layer in g.layers]
    mixers = {"full_attention": "attention", "linear_attention": "delta", "conv": "conv"}
    assert [layer.mixer for layer in layers] == [mixers[kind] for kind in theirs.layer_types]
    assert ours.tied == theirs.tie_word_embeddings
    with torch.device("meta"):
        mlp = transformers.AutoModelForCausalLM.from_config(theirs).model.layers[0]
    widths = [
        p.shape[0] for n, p in mlp.named_parameters() if n.endswith(("w1.weight", "up_proj.weight"))
    ]
    assert widths == [ours.ffn_width]
