"""LoRA against the `peft` package: which modules get adapters, their first values, logits, folders
in both directions."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain.batch import Batch
from jaxtrain.model import HFModelFactory
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.factory import LanguageModel
from jaxtrain.model.lora import DEFAULT_TARGETS, find_adapters
from jaxtrain.model.peft_folder import WEIGHTS, list_parts
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig, PeftConfig
from tests.model import tiny_models
from tests.model.tiny_models import describe_model, hf_config, hf_model, on_one_device, torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
PEFT_DEFAULTS = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**fields):
    return PeftConfig.model_validate({"peft_type": "Lora", **fields})


FAMILIES = sorted({kind: name for name, (kind, _) in tiny_models.FAMILIES.items()}.values())
"""One of each class of transformers."""
SPELLINGS = {
    "default": {},
    "all": {"target_modules": "all-linear"},
    "ALL": {"target_modules": "All-Linear"},
    "names": {"target_modules": ["o_proj", "dense", "c_fc", "down_proj", "qkv_proj"]},
    "regex": {"target_modules": r".*\.(0|2)\.(self_attn|attn|attention)\..*(proj|attn|dense)"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "c_fc", "dense"]},
    "excluded regex": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "layers": {"target_modules": ["o_proj", "c_proj", "dense"], "layers_to_transform": [0, 2]},
    "layer": {"target_modules": ["down_proj", "dense_h_to_4h", "c_fc"], "layers_to_transform": 1},
    "ranks": {
        "target_modules": "all-linear",
        "rank_pattern": {r".*\.1\..*": 2, "o_proj": 5, "dense": 3, "c_proj": 1},
        "alpha_pattern": {"down_proj": 3, "attn.c_proj": 5, "dense": 7},
        "use_rslora": True,
    },
    "saved": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
}


def known_to(config, fields):
    """The fields with the names alone that are modules of this family: PEFT passes over others."""
    family = find_adapters(lora(target_modules="all-linear"), config)
    names = {module.local_name for module in family.modules}

    def keep(value):
        if isinstance(value, dict):
            return {k: v for k, v in value.items() if {k, k.split(".")[-1]} & names or "*" in k}
        return [name for name in value if name in names] if isinstance(value, list) else value

    targets = fields.get("target_modules")
    kept = {k: keep(v) if k in ("rank_pattern", "alpha_pattern") else v for k, v in fields.items()}
    return kept | ({"target_modules": keep(targets)} if isinstance(targets, list) else {})


@pytest.mark.covers(
    "model.peft_config.target_modules",
    "model.peft_config.exclude_modules",
    "model.peft_config.layers_to_transform",
    "model.peft_config.rank_pattern",
    "model.peft_config.alpha_pattern",
    "model.peft_config.use_rslora",
    "model.peft_config.modules_to_save",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_modules_ranks_and_scales_are_those_that_peft_selects(tmp_path, family):
    hf_config(family).save_pretrained(tmp_path)
    config, _, _ = describe_model(tmp_path)
    for name, fields in SPELLINGS.items():
        fields = known_to(config, fields)
        if name == "default" and config.family not in DEFAULT_TARGETS:
            assert config.family not in PEFT_DEFAULTS
            with pytest.raises(RecipeError, match="has no default for .*; write all-linear"):
                find_adapters(lora(**fields), config)
            continue
        ours = find_adapters(lora(r=4, lora_alpha=6, **fields), config)
        theirs = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **fields)
        wrapped = peft.get_peft_model(hf_model(family), theirs)
        expected = {
            path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
            for path, module in wrapped.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer) and "vision" not in path
        }
        found = {module.name: (module.rank, module.scale) for module in ours.modules}
        assert found == expected, (name, fields)
        state = peft.get_peft_model_state_dict(wrapped)
        shapes = {k: tuple(v.shape) for k, v in state.items() if "vision" not in k}
        assert {k: part.shape for k, part in list_parts(ours, config).items()} == shapes, name


def language_model(folder, **fields):
    """The model of a folder with adapters, and its parameters."""
    config = ModelConfig(name_or_path=str(folder), peft_config=lora(**fields))
    made = LanguageModel.of(HFModelFactory(config).create_config(), ComputeConfig(), config)
    return made, made.load(on_one_device(made.all_shapes), seed=0)


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


@pytest.mark.covers("model.peft_config.path", "checkpoint.adapter")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_peft_is_read_and_written_bit_for_bit_with_its_logits(tmp_path, family):
    model = hf_model(family)
    model.save_pretrained(tmp_path / "base")
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    targets = describe_model(tmp_path / "base")[0]
    last = sorted(
        {m.local_name for m in find_adapters(lora(target_modules="all-linear"), targets).modules}
    )
    fields = {
        "target_modules": last,
        "rank_pattern": {last[0]: 2},
        "alpha_pattern": {last[-1]: 9},
        "modules_to_save": None if is_tied or family == "gemma3-whole" else ["norm"],
        "exclude_modules": r".*vision.*",
    }
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, init_lora_weights=False, **fields
    )
    theirs = peft.get_peft_model(model, config)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    expected = torch_logits(theirs)

    ours, params = language_model(tmp_path / "base", path=str(tmp_path / "adapter"))
    np.testing.assert_allclose(logits(ours, params), expected, atol=2e-5)
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
    again = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out").eval()
    np.testing.assert_array_equal(torch_logits(again), expected)
    np.testing.assert_allclose(torch_logits(load(tmp_path / "out" / "merged")), expected, atol=1e-5)
    plain = torch_logits(load(tmp_path / "base"))
    assert np.abs(plain - expected).max() > 0.1, "the adapter changes nothing"
