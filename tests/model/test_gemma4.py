"""What Gemma 4 alone has: layers that read the keys of others, two sizes of heads, inputs of each
layer, weights that are not trained."""

import dataclasses
import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from model_rows import batch_of, random_tokens
from safetensors.numpy import load_file, save_file
from tiny_models import (
    SIZES,
    load_model,
    on_one_device,
    save_model,
    transformers,
)

from jaxtrain.model import HFModelFactory
from jaxtrain.model.config import ComputeConfig, DecoderConfig, LayerSpec, Norm, group_layers
from jaxtrain.model.decoder import abstract, init_params, merge
from jaxtrain.model.export import save_pretrained
from jaxtrain.model.hf_config import decoder_config
from jaxtrain.model.rope import Rope
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.errors import RecipeError, WeightError
from jaxtrain.recipe.model import ModelConfig
from tests.runs import mesh_of

HUB = {
    **SIZES,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 5,
    "hidden_size_per_layer_input": 10,
    "vocab_size_per_layer_input": 96,
}
"""Fields as the files of the hub have them; transformers 5.24 writes `per_layer_config`."""
ARCHITECTURE = {"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text"}
SHARED = DecoderConfig(
    family="gemma4_text",
    vocab_size=96,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    ffn_width=48,
    groups=group_layers((
        *(LayerSpec(rope=Rope(1e4), writes_keys="a"), LayerSpec(window=5, writes_keys="b")) * 3,
        *(LayerSpec(window=5, reads_keys="b"), LayerSpec(rope=Rope(1e4), reads_keys="a")) * 3,
    )),
    norm=Norm(0.02),
    max_positions=64,
    norm_place="around",
    qk_norm="head",
    v_norm=True,
    per_layer_width=8,
    has_layer_scale=True,
    initializer_range=0.1,
)  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_kv_shared_layers": 5},
        {"num_kv_shared_layers": 6, "use_double_wide_mlp": True},
        {"num_global_key_value_heads": 1},
        {"num_global_key_value_heads": 1, "attention_k_eq_v": True},
        {"global_head_dim": 12},
        {"layer_types": ["sliding_attention", "full_attention"] * 5 + ["sliding_attention"] * 2},
        {"use_bidirectional_attention": "vision"},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_the_layers_are_those_of_transformers_in_either_style_of_file(fields):
    theirs = transformers.Gemma4TextConfig(**{**HUB, **fields})
    written = json.loads(theirs.to_json_string(use_diff=False))
    assert "per_layer_config" in written and "global_head_dim" not in written
    config = decoder_config({**ARCHITECTURE, **HUB, **fields})
    assert decoder_config({**written, **ARCHITECTURE}) == config
    layers = [
        layer for group in config.groups for _ in range(group.repeats) for layer in group.layers
    ]
    modes = theirs.kv_sharing_modes
    for i, layer in enumerate(layers):
        is_full, of_layer = theirs.layer_types[i] == "full_attention", theirs.per_layer_config[i]
        sizes = config.of_layer(layer)
        assert layer.window == (None if is_full else 5)
        found = sizes.head_size, sizes.num_kv_heads
        assert found == (of_layer.head_dim, of_layer.num_key_value_heads)
        assert layer.reads_keys == (theirs.layer_types[i] if modes[i] == "reuse" else None)
        if modes[i] == "store" and "num_kv_shared_layers" in fields:
            assert layer.writes_keys == theirs.layer_types[i]
        assert layer.values_are_keys == (is_full and theirs.attention_k_eq_v)
        wide = theirs.use_double_wide_mlp and modes[i] == "reuse"
        assert sizes.ffn_width == (96 if wide else 48)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_kv_shared_layers": 12}, "num_kv_shared_layers: must leave a layer of each type"),
        ({"num_kv_shared_layers": 8}, "num_kv_shared_layers: must leave .*, found 8"),
        ({"vocab_size_per_layer_input": 90}, "must be vocab_size, 96, found 90"),
        ({"global_head_dim": 13}, "per_layer_config: must be even head sizes"),
        (
            {"num_global_key_value_heads": 3, "attention_k_eq_v": True},
            "divisors of the 8 attention heads, found 16 and 3",
        ),
        ({"per_layer_config": {"5": {"head_dim": 16}}}, "the same for all layers of a type"),
        ({"per_layer_config": {"12": {"head_dim": 16}}}, "only for the 12 layers"),
        ({"per_layer_config": {"5": {"sliding_window": 3}}}, "a map from numbers of layers to"),
        ({"enable_moe_block": True}, "num_experts: must be a positive whole number, found null"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5,
             "moe_intermediate_size": 8},
            "top_k_experts: must be at most 4, found 5",
        ),
        ({"use_bidirectional_attention": "all"}, "must be null or 'vision', found 'all'"),
    ],
)  # fmt: skip
def test_a_config_that_means_nothing_is_refused(fields, expected):
    with pytest.raises(RecipeError, match=expected):
        decoder_config({**ARCHITECTURE, **HUB, **fields})


def test_keys_that_no_layer_reads_may_be_in_a_file_and_stay_there(tmp_path):
    """Files of the hub have them for layers that read those of others; of other layers, a tensor
    too many is a fault."""
    folder = save_model("gemma4-small", tmp_path / "in")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    extra = {
        f"model.layers.5.self_attn.{name}.weight": np.full((2, 3), n, np.float32)
        for n, name in enumerate(("k_proj", "v_proj", "k_norm"))
    }
    save_file(tensors | extra, file)
    config, hf, _, params = load_model(folder)
    save_pretrained(tmp_path / "out", params, config, hf, dtype="float32", source=folder)
    theirs, ours = read_folder(folder), read_folder(tmp_path / "out")
    assert sorted(theirs) == sorted(ours)
    assert all(theirs[name].read().tobytes() == ours[name].read().tobytes() for name in theirs)
    save_file(tensors | {"model.layers.3.self_attn.v_norm.weight": np.ones(16, np.float32)}, file)
    with pytest.raises(WeightError, match=r"v_norm.weight \[16\] is unknown"):
        load_model(folder)


@pytest.mark.covers("model.resize_vocab")
def test_the_table_of_layer_inputs_grows_with_the_vocabulary(tmp_path):
    folder = save_model("gemma4-small", tmp_path)
    recipe = ModelConfig(name_or_path=str(folder), resize_vocab=True)
    spec = HFModelFactory(recipe).create_config().with_room(101, recipe)
    assert decoder_config(spec.hf_config) == spec.config
    shapes = abstract(spec.config, ComputeConfig()).shapes
    params = load_params(
        folder, spec.config, shapes, on_one_device(shapes), stored_tokens=spec.stored_tokens
    )
    old = load_model(folder)[3]
    for name in ("embedding", "layer_inputs"):
        grown, table = np.asarray(params["embed"][name]), np.asarray(old["embed"][name])
        np.testing.assert_array_equal(grown[:96], table)
        np.testing.assert_allclose(grown[96:], np.repeat(table.mean(0)[None], 5, 0), atol=1e-6)


def loss_and_gradient(compute, params, batch):
    model = abstract(SHARED, compute)
    loss = lambda p: merge(model.graph, p).token_log_probs(batch).sum()
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def params():
    return jax.jit(partial(init_params, SHARED, ComputeConfig()))(jax.random.key(0))


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(ComputeConfig(remat="full", remat_every=3), marks=pytest.mark.slow),
        ComputeConfig(remat="full"),
        pytest.param(ComputeConfig(remat="dots"), marks=pytest.mark.slow),
    ],
)
def test_remat_changes_nothing_of_keys_that_later_layers_read(params, compute):
    segments = np.repeat([[1, 2, 0]], 1, 0).repeat([9, 11, 3], 1)
    batch = batch_of(random_tokens(1, 23), segments)
    plain = loss_and_gradient(ComputeConfig(remat="none"), params, batch)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, loss_and_gradient(compute, params, batch), plain)


def test_layers_read_the_keys_of_the_last_layer_that_writes_them(params):
    """So those of the writers before have no part in what later layers attend to."""
    assert [(len(g.layers), g.repeats) for g in SHARED.groups] == [(2, 3), (2, 3)]
    alone = dataclasses.replace(
        SHARED,
        groups=group_layers(tuple(
            dataclasses.replace(spec, writes_keys=None) if repeat < 2 else spec
            for group in SHARED.groups
            for repeat in range(group.repeats)
            for spec in group.layers
        )),
    )  # fmt: skip
    assert len(alone.groups) > 2
    batch = batch_of(random_tokens(2, 20))
    rows = {
        i: jax.tree.map(lambda a, r=r: a[r], params["layers"][str(g)][str(m)])
        for g, group in enumerate(SHARED.groups)
        for m in range(len(group.layers))
        for r, i in enumerate(SHARED.layer_numbers(g, m))
    }
    layers = {
        str(g): {
            str(m): jax.tree.map(
                lambda *leaves: np.stack(leaves), *(rows[i] for i in alone.layer_numbers(g, m))
            )
            for m in range(len(group.layers))
        }
        for g, group in enumerate(alone.groups)
    }
    logits = lambda config, p: merge(abstract(config, ComputeConfig()).graph, p)(batch)
    found = jax.jit(partial(logits, SHARED))(params)
    expected = jax.jit(partial(logits, alone))(params | {"layers": layers})
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_no_device_gathers_the_table_of_layer_inputs(params):
    """The tokens go to its parts, in the forward pass and in the backward pass."""
    mesh, model = mesh_of(fsdp=4), abstract(SHARED, ComputeConfig())
    batch = batch_of(random_tokens(4, 24))
    loss = lambda p, b: -merge(model.graph, p).token_log_probs(b).sum()
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(mesh, model.shapes))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(placed, batch).compile()
    whole = ",".join(map(str, params["embed"]["layer_inputs"].shape))
    assert re.search(r"f32\[96,12,2\]", compiled.as_text()), "a part of it is there"
    assert f"f32[{whole}]" not in compiled.as_text()


def test_a_scale_of_a_layer_has_no_gradient(params):
    _, gradients = loss_and_gradient(ComputeConfig(), params, batch_of(random_tokens(1, 12)))
    leaves = dict(jax.tree_util.tree_leaves_with_path(gradients))
    scales = [leaf for path, leaf in leaves.items() if path[-1].key == "layer_scale"]
    assert len(scales) == 4 and not any(np.asarray(leaf).any() for leaf in scales)
