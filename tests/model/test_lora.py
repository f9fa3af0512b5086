"""LoRA against the `peft` package: which modules get adapters, their first values, logits, folders
in both directions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.batch import Batch
from jaxtrain.model import HFModelFactory
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.decoder import abstract
from jaxtrain.model.factory import LanguageModel
from jaxtrain.model.families import BY_NAME
from jaxtrain.model.listing import linear_modules
from jaxtrain.model.lora import (
    DEFAULT_TARGETS,
    FORMER_MODULES,
    find_adapters,
    init_adapters,
    list_modules,
    start_magnitudes,
)
from jaxtrain.model.peft_folder import CONFIG, WEIGHTS, _named, checksum, list_parts
from jaxtrain.model.quantized import dequantize, form_of, may_be_quantized
from jaxtrain.parallel.sharding import parameter_shardings
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig, PeftConfig
from tests.model import tiny_models
from tests.model.tiny_models import (
    describe_model,
    hf_config,
    hf_model,
    on_one_device,
    torch,
    transformers,
)
from tests.runs import mesh_of

peft = pytest.importorskip("peft")
PEFT_DEFAULTS = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields):
    return PeftConfig.model_validate({"peft_type": "Lora", **fields})


FAMILIES = sorted(
    {*{kind: name for name, (kind, _) in tiny_models.FAMILIES.items()}.values(), "gemma4"}
)
"""One of each class of transformers, and one with experts beside a feed-forward layer."""
QUICK = ("phi3", "gpt2", "gemma3-whole", "gemma4-small", "qwen3-moe", "gpt-oss")
OF_EACH_KIND = ("gpt2", "deepseek-v3", "qwen3-5-moe", "lfm2", "gemma4")
EVERYWHERE = r".*\.(self_attn|linear_attn|attn|attention|conv)\..*(proj|attn|dense)"
SPELLINGS = {
    "default": {},
    "all": {"target_modules": "all-linear"},
    "ALL": {"target_modules": "All-Linear"},
    "names": {
        "target_modules": ["o_proj", "dense", "c_fc", "down_proj", "qkv_proj", "w2", "gate"],
    },
    "regex": {"target_modules": EVERYWHERE},
    "regex of layers": {"target_modules": r".*\.(0|2)" + EVERYWHERE[2:]},
    "regex of experts": {"target_modules": r".*\.(o_proj|w[123]|(gate|up|down)_proj|c_fc|dense)"},
    "latent": {
        "target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"],
        "rank_pattern": {"kv_b_proj": 2},
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "c_fc", "dense"]},
    "excluded regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "layers": {
        "target_modules": ["o_proj", "c_proj", "dense", "out_proj"],
        "layers_to_transform": [0, 2],
    },
    "layer": {
        "target_modules": ["down_proj", "dense_h_to_4h", "c_fc", "output_linear", "v_proj"],
        "layers_to_transform": 1,
    },
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.1\..*": 2, "o_proj": 5, "dense": 3, "c_proj": 1},
        "alpha_pattern": {"down_proj": 3, "attn.c_proj": 5, "dense": 7},
        "use_rslora": True,
    },
    "saved": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
    "parameters": {
        "target_parameters": ["experts.gate_up_proj", "2.mlp.experts.down_proj", "router.weight"],
        "rank_pattern": {"gate_up_proj": 3},
    },
    "parameters and modules": {
        "target_modules": ["o_proj"], "target_parameters": ["experts.down_proj", "gate.weight"],
    },
}  # fmt: skip


def known_to(config, fields):
    """The fields with the names alone that are modules of this family: PEFT passes over others."""
    names = {one.local_name for one in list_modules(config) if not one.is_parameter}
    names |= FORMER_MODULES.get(config.family, {}).keys()
    parameters = [one.name for one in list_modules(config) if one.is_parameter]

    def keep(value):
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if {k, k.split(".")[-1]} & names or "*" in k}
        return [name for name in value if name in names] if isinstance(value, list) else value

    targets = fields.get("target_modules")
    kept = {k: keep(v) if k in ("rank_pattern", "alpha_pattern") else v for k, v in fields.items()}
    kept |= {"target_modules": keep(targets)} if isinstance(targets, list) else {}
    if "target_parameters" in fields:
        there = [
            n for n in fields["target_parameters"] if any(p.endswith(f".{n}") for p in parameters)
        ]
        kept["target_parameters"] = there
    return kept


def without_vision(fields):
    """The fields for a multimodal model: PEFT cannot adapt the layers of some vision parts."""
    excluded = fields.get("exclude_modules", ())
    if not isinstance(excluded, str):
        excluded = "|".join(rf".*\.{name}" for name in excluded)
    return fields | {"exclude_modules": "|".join(filter(None, [r".*vision.*", excluded]))}


OPTIONAL = {
    "q_proj", "q_a_proj", "q_b_proj", "proj", "per_layer_input_gate", "per_layer_projection",
    "per_layer_model_projection",
}  # fmt: skip
"""Modules that a config of their family may lack: low ranks of queries, experts, layer inputs."""


@pytest.mark.covers(
    "model.peft_config.target_modules",
    "model.peft_config.exclude_modules",
    "model.peft_config.layers_to_transform",
    "model.peft_config.rank_pattern",
    "model.peft_config.alpha_pattern",
    "model.peft_config.use_rslora",
    "model.peft_config.modules_to_save",
)
@pytest.mark.parametrize(
    "family",
    [
        f if f in {*QUICK, *OF_EACH_KIND, "mixtral"} else pytest.param(f, marks=pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_the_modules_ranks_and_scales_are_those_that_peft_selects(tmp_path, family):
    hf_config(family).save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)
    names = {m.local_name for m in list_modules(config) if not m.is_parameter}
    listed = {*linear_modules(BY_NAME[config.family])}
    assert names - FORMER_MODULES.get(config.family, {}).keys() <= listed
    assert listed - names <= OPTIONAL
    for name, fields in SPELLINGS.items():
        fields = known_to(config, fields)
        if name == "saved" and config.family == "granitemoehybrid":
            fields |= {"modules_to_save": ["shared_mlp"]}
        if name == "saved" and config.family == "lfm2":
            fields |= {"modules_to_save": ["feed_forward"]}
        if name == "default" and config.family not in DEFAULT_TARGETS:
            assert config.family not in PEFT_DEFAULTS
            with pytest.raises(RecipeError, match="has no default for .*; write all-linear"):
                find_adapters(lora(**fields), config)
            continue
        if name == "latent" and config.latent is None:
            continue
        if config.experts is not None and name == "saved":
            continue  # experts stay frozen
        if config.family in FORMER_MODULES and name == "default":
            continue  # PEFT has none for what it converts
        if name.startswith("parameters") and config.experts is None:
            continue
        if name == "regex of layers" and config.family in FORMER_MODULES:
            with pytest.raises(RecipeError, match="does not fit model.layers.1.* PEFT extends it"):
                find_adapters(lora(**fields), config)
            continue
        ours = find_adapters(lora(r=4, lora_alpha=6, **fields), config)
        if family.endswith("whole"):
            fields = without_vision(fields)
        theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **fields)
        wrapped = peft.get_peft_model(hf_model(family), theirs)
        expected = {
            name_in_peft(path, module): (module.r["default"], module.scaling["default"])
            for path, module in wrapped.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and "vis" not in path
        }
        found = {module.name: (module.rank, module.scale) for module in ours.modules}
        assert found == expected, (name, fields)
        state = peft.get_peft_model_state_dict(wrapped)
        shapes = {k: tuple(v.shape) for k, v in state.items() if "vis" not in k}
        assert {k: part.shape for k, part in list_parts(ours, config).items()} == shapes, name


def name_in_peft(path, module):
    """Of a module with an adapter, or of the parameter that a wrapper of its module adapts."""
    name = path.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{name}.{module.parameter_name}" if hasattr(module, "parameter_name") else name


def language_model(folder, **fields):
    """The model of a folder with adapters, and its parameters."""
    config = ModelConfig(name_or_path=str(folder), peft_config=lora(**fields))
    made = LanguageModel.of(HFModelFactory(config).create_config(), ComputeConfig(), config)
    return made, made.first_params(on_one_device(made.all_shapes), seed=0)


TOKENS = torch.arange(14)[None] * 7 % 90


def logits(model, params):
    tokens = jnp.asarray(TOKENS.numpy(), jnp.int32)
    one, rows = jnp.ones_like(tokens), jnp.zeros(1, jnp.int32)
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    batch = Batch(tokens, positions, one, one.astype(jnp.float32), rows)
    return np.asarray(model.merge(params)(batch))


@torch.no_grad()
def torch_logits(model):
    return model(TOKENS).logits.numpy()


@pytest.mark.covers("model.peft_config.path", "checkpoint.*.adapter")
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_a_folder_of_peft_is_read_and_written_bit_for_bit_with_its_logits(
    tmp_path, family, use_dora
):
    model = hf_model(family)
    model.save_pretrained(tmp_path / "base")
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    described, _, _ = describe_model(tmp_path / "base")
    every, former = list(list_modules(described)), FORMER_MODULES.get(described.family, {})
    last = sorted({one.local_name for one in every if not one.is_parameter} - former.keys())
    parameters = sorted({".".join(one.name.split(".")[-2:]) for one in every if one.is_parameter})
    fields = {
        "target_modules": last,
        "target_parameters": None if use_dora else parameters,
        "rank_pattern": {last[0]: 2} | ({} if use_dora or not parameters else {parameters[0]: 2}),
        "alpha_pattern": {last[-1]: 9},
        "modules_to_save": None if is_tied or family.endswith("whole") else ["norm"],
        "exclude_modules": r".*vis(ion|ual).*",
    }
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, init_lora_weights=False, use_dora=use_dora,
        **fields,
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    expected = torch_logits(theirs)

    ours, params = language_model(tmp_path / "base", path=str(tmp_path / "adapter"))
    largest = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(logits(ours, params), expected, atol=2e-5 * largest)
    ours.save(
        tmp_path / "out", params, dtype="float32", add_files=lambda folder: None,
        adapter="both", base_name=str(tmp_path / "base"),
    )  # fmt: skip
    written, read = (
        safetensors.numpy.load_file(tmp_path / name / WEIGHTS) for name in ("out", "adapter")
    )
    assert {k: v.tobytes() for k, v in written.items()} == {k: v.tobytes() for k, v in read.items()}
    kind = type(hf_model(family))
    load = lambda folder: kind.from_pretrained(folder, attn_implementation="eager").eval()
    # Loaded alike: sums of torch depend on where in memory a tensor begins.
    again, given = (
        torch_logits(peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / folder))
        for folder in ("out", "adapter")
    )
    np.testing.assert_array_equal(again, given)
    np.testing.assert_allclose(again, expected, atol=1e-6 * largest)
    merged = torch_logits(load(tmp_path / "out" / "merged"))
    np.testing.assert_allclose(merged, expected, atol=1e-5 * largest)
    plain = torch_logits(load(tmp_path / "base"))
    assert np.abs(plain - expected).max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize(
    "family",
    [
        "deepseek-v3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gpt-oss", "qwen3-5", "gemma4-small", "lfm2")
        ),
    ],
)  # fmt: skip
def test_a_model_of_any_kind_of_layers_computes_with_quantised_weights(tmp_path, family):
    """As with the weights that they stand for, and generates."""
    hf_model(family).save_pretrained(tmp_path)
    adapters = lora(target_modules=["w2" if family == "lfm2" else "o_proj"])
    fields, made = {"name_or_path": str(tmp_path), "peft_config": adapters}, {}
    for kind in ("int8", None):
        config = ModelConfig(**fields, quantization=kind)
        spec = HFModelFactory(config).create_config()
        made[kind] = LanguageModel.of(spec, ComputeConfig(), config)
    quantized, plain = made["int8"], made[None]
    params = quantized.first_params(on_one_device(quantized.all_shapes), seed=0)

    def dequantized(tree, shapes, path=""):
        if not isinstance(tree, dict):
            return tree
        if not isinstance(shapes, dict):
            return dequantize(form_of("int8", path, shapes.shape)[0], tree, jnp.float32)
        return {k: dequantized(tree[k], v, f"{path}/{k}".lstrip("/")) for k, v in shapes.items()}

    whole = dequantized(params, plain.all_shapes)
    expected = logits(plain, whole)
    np.testing.assert_allclose(logits(quantized, params), expected, atol=1e-4)
    prompts = [[5, 17, 40], [7]]
    tokens = quantized.generate(params, prompts, max_new_tokens=4)
    assert tokens == plain.generate(whole, prompts, max_new_tokens=4)


@pytest.mark.covers("model.peft_config.use_dora")
@pytest.mark.parametrize("init", [True, False])
def test_the_magnitudes_of_dora_begin_as_those_of_peft(tmp_path, init):
    model = hf_model("llama3")
    model.save_pretrained(tmp_path / "base")
    fields = {"r": 3, "target_modules": ["v_proj", "o_proj"], "layers_to_transform": [0, 2]}
    config = peft.LoraConfig(use_dora=True, init_lora_weights=init, **fields)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = safetensors.numpy.load_file(tmp_path / "adapter" / WEIGHTS)
    made, params = language_model(
        tmp_path / "base", use_dora=True, init_lora_weights=init, **fields
    )
    ours = dict(_named(made.split(params)[0]))
    if not init:  # their lengths are those with their own random factors
        made, params = language_model(tmp_path / "base", path=str(tmp_path / "adapter"))
        graph = made.graph
        starts = dict(_named(start_magnitudes(made.adapters, graph, params)))
        ours = {name: starts.get(name, leaf) for name, leaf in _named(made.split(params)[0])}
    parts = list_parts(made.adapters, made.spec.config)
    vectors = [name for name in parts if name.endswith("magnitude_vector")]
    assert len(vectors) == 4
    for name in vectors:
        found = parts[name].take(np.asarray(ours[parts[name].path]))
        np.testing.assert_allclose(found, expected[name], rtol=1e-5)
    assert not np.asarray(ours[parts[vectors[0]].path])[1].any(), "layer 1 has no adapter"


@pytest.mark.parametrize(
    "family",
    [f if f in OF_EACH_KIND else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_every_linear_module_but_head_and_routers_is_quantised_and_every_array_has_a_place(
    tmp_path, family
):
    """And experts, which are none in transformers."""
    model = hf_model(family)
    model.config.save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)
    every = [module for module in list_modules(config) if may_be_quantized(module.path)]
    assert all("experts" in module.name for module in every if module.is_parameter)
    head, kinds = (
        model.get_output_embeddings(),
        (torch.nn.Linear, transformers.pytorch_utils.Conv1D),
    )
    expected = {
        name for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and "vis" not in name
        and not name.endswith((".router.proj", "multi_modal_projector"))
    }  # fmt: skip
    assert {module.name for module in every if not module.is_parameter} == expected

    names = {module.local_name for module in every if not module.is_parameter}
    names -= FORMER_MODULES.get(config.family, {}).keys()
    adapters = find_adapters(lora(target_modules=sorted(names), use_dora=True), config).sites
    quantized = {module.path: "nf4" for module in every}
    shapes = abstract(config, ComputeConfig(), adapters=adapters, quantized=quantized).shapes
    parameter_shardings(mesh_of(fsdp=2), shapes)
    on_experts = [module.name for module in list_modules(config) if module.is_parameter]
    if on_experts:
        adapters = find_adapters(lora(target_modules=[], target_parameters=on_experts), config)
        shapes = abstract(config, ComputeConfig(), adapters=adapters.sites).shapes
        parameter_shardings(mesh_of(fsdp=2, expert=2), shapes)


@pytest.mark.covers("model.peft_config.init_lora_weights")
def test_adapters_begin_as_in_peft_and_the_same_whatever_else_has_one(tmp_path):
    hf_config("llama3").save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)

    def first(**fields):
        found = find_adapters(lora(**fields), config)
        shapes = abstract(config, ComputeConfig(), adapters=found.sites).shapes
        made = init_adapters(found, shapes, seed=1)
        attention = made["layers"]["0"]["0"]["attention"]
        return attention["qkv_lora"]["q_proj"], attention.get("out_lora", {}).get("o_proj")

    q, o = first(r=16, target_modules="all-linear")
    for factors, inputs in ((q, 32), (o, 32)):
        assert not factors["b"].any() and factors["a"].dtype == np.float32
        bound = inputs**-0.5  # Kaiming with a of the root of 5
        assert 0.95 * bound < np.abs(factors["a"]).max() <= bound
        np.testing.assert_allclose(factors["a"].std(), bound / 3**0.5, rtol=0.05)
    assert len({a.tobytes() for a in q["a"]}) == 3, "layers begin differently"
    np.testing.assert_array_equal(first(r=16, target_modules=["q_proj"])[0]["a"], q["a"])

    gaussian, _ = first(r=16, target_modules=["q_proj"], init_lora_weights="gaussian")
    np.testing.assert_allclose(gaussian["a"].std(), 1 / 16, rtol=0.05)
    assert not gaussian["b"].any()
    random, _ = first(r=16, target_modules=["q_proj"], init_lora_weights=False)
    np.testing.assert_allclose(random["b"].std(), (1 / 48) ** 0.5, rtol=0.05)

    hf_config("mixtral").save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)
    fields = {"r": 16, "target_parameters": ["experts.down_proj"], "init_lora_weights": False}
    found = find_adapters(lora(**fields), config)
    shapes = abstract(config, ComputeConfig(), adapters=found.sites).shapes
    made = init_adapters(found, shapes, seed=1)["layers"]["0"]["0"]["mlp"]["expert_down_lora"]
    experts, inputs = 6, 48
    for factor, fan_in in (("a", inputs), ("b", experts * 16)):
        drawn = made["down_proj"][factor]
        assert drawn.shape[1] == experts
        np.testing.assert_allclose(drawn.std(), (3 * fan_in) ** -0.5, rtol=0.05)


WRONG = {
    "a name": (
        {"target_modules": ["q_porj"]},
        r"target_modules: 'q_porj' matches no module; there are down_proj, gate_proj, k_proj, "
        r"o_proj, q_proj, up_proj, v_proj; did you mean `q_proj`",
    ),
    "one name of several": ({"target_modules": ["q_proj", "dense"]}, "'dense' matches no module"),
    "a regex": ({"target_modules": "q_proj"}, "'q_proj' leaves no module; there are down_proj"),
    "the head": (
        {"target_modules": ["lm_head", "q_proj"]},
        "lm_head gets no adapter here; modules_to_save can train it whole",
    ),
    "everything excluded": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves no module",
    ),
    "no layer": ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "leaves no module"),
    "a pattern": (
        {"rank_pattern": {"k_proj": 3}}, "rank_pattern: 'k_proj' matches no module with an adapter",
    ),
    "an alpha": ({"alpha_pattern": {"up": 3}}, "alpha_pattern: 'up' matches no module"),
    "a saved name": ({"modules_to_save": ["heads"]}, "modules_to_save: 'heads' matches no module"),
    "half a parameter": (
        {"modules_to_save": ["k_proj"]},
        r"modules_to_save: model.layers.0.self_attn.k_proj is one parameter here with "
        r"model.layers.0.self_attn.q_proj; name both or neither",
    ),
    "a tied embedding": (
        {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens is also the head of this model",
    ),
}  # fmt: skip


WRONG_OF_EXPERTS = {
    "a parameter": (
        {"target_parameters": ["experts.up_proj"]},
        r"target_parameters: 'experts.up_proj' matches no parameter that gets an adapter; there are "
        r"experts.down_proj, experts.gate_up_proj, gate.weight; did you mean",
    ),
    "dropout": (
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        r"lora_dropout: is not possible on model.layers.3.mlp.gate.weight, a parameter",
    ),
    "DoRA": (
        {"target_parameters": ["down_proj"], "use_dora": True}, "use_dora: is not possible on",
    ),
    "half a parameter": (
        {"target_modules": ["q_proj", "up_proj"]},
        "names one of gate_proj and up_proj, which PEFT adapts as one; name both or neither",
    ),
    "all of an expert": (
        {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}, "which stay frozen",
    ),
}  # fmt: skip


@pytest.mark.covers("model.peft_config.target_parameters")
@pytest.mark.parametrize("case", WRONG_OF_EXPERTS)
def test_what_peft_cannot_do_to_experts_is_refused(tmp_path, case):
    fields, message = WRONG_OF_EXPERTS[case]
    hf_config("qwen3-moe").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        find_adapters(lora(**fields), describe_model(tmp_path)[0])


@pytest.mark.parametrize("case", WRONG)
def test_names_that_select_nothing_are_refused_with_what_there_is(tmp_path, case):
    fields, message = WRONG[case]
    hf_config("smollm2").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        find_adapters(lora(**fields), describe_model(tmp_path)[0])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base and an adapter of it that we have written."""
    folder = tmp_path_factory.mktemp("adapter")
    hf_model("smollm2").save_pretrained(folder / "base")
    made, params = language_model(folder / "base", r=2, init_lora_weights=False)
    made.save(
        folder / "adapter", params, dtype="float32", add_files=lambda folder: None,
        base_name=str(folder / "base"),
    )  # fmt: skip
    return folder


def edited(folder, **fields):
    """A copy of an adapter with other fields in its config."""
    shutil.copytree(folder, folder.parent / "edited")
    file = folder.parent / "edited" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return file.parent


NOT_CONTINUED = {
    "LoftQ": ({"loftq_config": {"bits": 4}}, {}, "loftq_config: is not supported, found "),
    "DoRA": ({"use_dora": True}, {}, r"q_proj.lora_magnitude_vector \[32\] is missing"),
    "a bias": ({"bias": "all"}, {}, "bias: "),
    "another kind": ({"peft_type": "IA3"}, {}, "peft_type: "),
    "tokens": (
        {"trainable_token_indices": [3]}, {}, "trainable_token_indices: is not supported",
    ),
    "another rank": (
        {}, {"r": 4}, "model.peft_config.r: is 4, the adapter in .* has 2; remove it",
    ),
    "other tensors": (
        {"r": 3}, {}, r"tensor base_model\S+q_proj.lora_A.weight must be \[3, 32\] for this model",
    ),
    "missing tensors": (
        {"target_modules": ["k_proj"]}, {},
        r"k_proj.lora_A.weight \[2, 32\] is missing(.|\n)*q_proj\S+ belongs to no module",
    ),
}  # fmt: skip


@pytest.mark.covers("model.peft_config.bias")
@pytest.mark.parametrize("case", NOT_CONTINUED)
def test_an_adapter_that_does_not_fit_is_refused_before_weights_are_read(tmp_path, adapter, case):
    theirs, ours, message = NOT_CONTINUED[case]
    shutil.copytree(adapter / "adapter", tmp_path / "adapter")
    path = str(edited(tmp_path / "adapter", **theirs))
    config = ModelConfig(name_or_path=str(adapter / "base"), peft_config=lora(path=path, **ours))
    with pytest.raises(RecipeError, match=message):
        HFModelFactory(config).create_config()


def test_a_folder_without_an_adapter_is_refused(tmp_path, adapter):
    config = ModelConfig(name_or_path=str(adapter / "base"), peft_config=lora(path=str(tmp_path)))
    with pytest.raises(
        RecipeError, match=r"peft_config.path: must be a folder with adapter_config"
    ):
        HFModelFactory(config).create_config()


def test_an_adapter_of_another_base_is_refused_by_its_checksum(tmp_path, adapter):
    base = hf_model("smollm2")
    path = str(adapter / "adapter")
    language_model(adapter / "base", path=path)
    base.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.5
    base.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="was trained on another base .checksum"):
        language_model(tmp_path, path=path)


def test_the_checksum_sees_a_weight_its_place_and_neither_mesh_nor_dtype():
    a = np.random.default_rng(0).normal(size=(4, 6)).astype(jnp.bfloat16)
    sums = {
        "itself": {"w": a},
        "float32": {"w": a.astype(np.float32)},
        "sharded": {"w": jax.device_put(a, NamedSharding(mesh_of(fsdp=2), P("fsdp")))},
        "a name": {"v": a},
        "a shape": {"w": a.reshape(6, 4)},
        "rows": {"w": a[::-1]},
        "columns": {"w": a[:, ::-1]},
        "a bit": {"w": np.where(np.arange(24).reshape(4, 6) == 7, np.nextafter(a, a + 1), a)},
        "a sign": {"w": np.where(np.arange(24).reshape(4, 6) == 7, -a, a)},
    }
    found = {name: checksum(base) for name, base in sums.items()}
    assert found["itself"] == found["float32"] == found["sharded"]
    assert len(set(found.values())) == len(sums) - 2
