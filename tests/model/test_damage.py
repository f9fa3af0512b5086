"""Damaged model folders: a RecipeError that names the file, never another exception, never a
hang."""

import json
import re
import struct
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.model import decoder
from jaxtrain.model.config import ComputeConfig
from jaxtrain.model.families import FAMILIES, NO_EFFECT, REQUIRED
from jaxtrain.model.hf_config import read_config
from jaxtrain.model.rope import FIELDS
from jaxtrain.model.tensor_file import TensorToWrite, write_folder
from jaxtrain.model.weights import tensor_shapes
from jaxtrain.model_folder import INDEX
from jaxtrain.preflight import find_model_faults
from jaxtrain.recipe.check import describe
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.recipe.resolve import resolve
from tests.fuzz import WRONG, bounded, damaged, edited, examples
from tests.runs import LLAMA, model_folder

WORDS = st.sampled_from(
    [*LLAMA, *FIELDS, "layer_types", "sliding_window", "rope_type", "factor", "type", "content", "id",
     "vocab", "model", "normalizer", "weight_map", "eos_token", "__metadata__", "dtype", "shape", "x"]
)  # fmt: skip
VALUES = st.sampled_from(WRONG)
LAYERS = 2


def json_text(tree) -> bytes:
    return json.dumps(tree).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small model's folder with everything that is read, its weights in two shards."""
    folder = model_folder(tmp_path_factory.mktemp("whole"), num_hidden_layers=LAYERS)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    config, _ = read_config(folder, ModelConfig(name_or_path=str(folder), from_scratch=True))
    shapes = tensor_shapes(config, decoder.abstract(config, ComputeConfig()).shapes)
    make = lambda shape: lambda: np.zeros(shape, np.float32)
    float32 = np.dtype(np.float32)
    tensors = {name: TensorToWrite(float32, shape, make(shape)) for name, shape in shapes.items()}
    write_folder(folder, tensors, 4e4)
    assert (folder / INDEX).is_file() and faults_of(folder) == []
    return folder


def faults_of(folder: Path) -> list[str]:
    """What `check` finds."""
    written = {"model": {"name_or_path": str(folder)}, "data": {"sources": ["a/b"]}}
    resolved = resolve(written)
    describe(resolved)
    found = [str(fault) for fault in find_model_faults(resolved.require_config(), 1)]
    assert all(found)
    return found


FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", INDEX,
)  # fmt: skip


@examples(60, 2000)
@given(st.data())
def test_any_damage_to_a_file(whole, data):
    """Of its bytes, or of the values of JSON."""
    name = data.draw(st.sampled_from(FILES))
    content = (whole / name).read_bytes()
    if name.endswith(".json") and data.draw(st.booleans()):
        changed = json_text(data.draw(edited(json.loads(content), WORDS, VALUES)))
    else:
        changed = data.draw(damaged(content))
    try:
        (whole / name).write_bytes(changed)
        with bounded():
            faults_of(whole)
    finally:
        (whole / name).write_bytes(content)


@examples(60, 2000)
@given(st.data())
def test_any_damage_to_the_header_of_the_weights(whole, data):
    file = sorted(whole.glob("*.safetensors"))[0]
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + length], content[8 + length :]
    if data.draw(st.booleans()):
        header = json_text(data.draw(edited(json.loads(header), WORDS, VALUES)))
    else:
        header = data.draw(damaged(header))
    length = data.draw(st.sampled_from([len(header)] * 6 + [0, 1, length, 2**31, 2**63, 2**64 - 1]))
    rest = data.draw(st.sampled_from([rest, rest[:-1], rest + b"\0", b""]))
    try:
        file.write_bytes(struct.pack("<Q", length) + header + rest)
        with bounded():
            faults_of(whole)
    finally:
        file.write_bytes(content)


QUICK = ("llama", "gemma4_text", "qwen3_5_text", "lfm2", "deepseek_v3", "gpt_oss", "gpt2")
"""Families that have every field of the others, or nearly."""
FORMS = [value for value in WRONG if value != "null"] + [
    3, 10_000_000, [[1]], {"rope_type": []}, {"rope_type": "llama3"}, {"rope_theta": 1e-300},
    {"rope_type": "linear", "factor": 10**400}, ["full_attention"] * LAYERS,
    ["full_attention"] * 10**4, "LlamaForCausalLM", ["LlamaForCausalLM", 3],
]  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=() if one.name in QUICK else pytest.mark.slow)
        for one in FAMILIES
        if one.text is None
    ],
)
def test_every_field_of_a_wrong_type_is_refused_by_its_name(tmp_path, family):
    config = LLAMA | {"architectures": [family.architecture], "model_type": family.name}
    config["num_hidden_layers"] = LAYERS
    if "num_experts" in family.defaults:
        config |= {"num_experts": 2, "num_experts_per_tok": 2}
    if "n_group" in family.defaults:
        config |= {"n_group": 1, "topk_group": 1}
    if "vocab_size_per_layer_input" in family.defaults:
        config |= {"vocab_size_per_layer_input": config["vocab_size"]}
    if family.name.startswith("qwen3_5_moe"):
        config |= {"shared_expert_intermediate_size": config["intermediate_size"]}
    if family.name == "granitemoehybrid":
        config |= {
            "shared_intermediate_size": config["intermediate_size"],
            "layer_types": ["full_attention"] * LAYERS,
        }
    config = {k: v for k, v in config.items() if v in family.only.get(k, (v,))}
    for field, values in family.only.items():
        if family.defaults.get(field, values[0]) not in values:
            config.setdefault(field, values[0])
    fields = {*config, *family.defaults, *family.only, *REQUIRED, *FIELDS, *NO_EFFECT}
    model = ModelConfig(name_or_path=str(tmp_path), from_scratch=True)
    shapes_of = cache(lambda config: decoder.abstract(config, ComputeConfig()))
    for field in sorted(fields):
        for value in FORMS:
            (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
            try:
                with bounded():
                    found, _ = read_config(tmp_path, model)
                    shapes_of(found)
            except RecipeError as error:
                # What does not fit together is named by another of its fields.
                is_other = isinstance(value, int) or field in ("architectures", "model_type")
                named = r"\w+" if is_other else f"{field}|rope_\\w+|layer_types"
                assert re.search(f"config.json: ({named}): .*(found|contradicts)", str(error)), (
                    field,
                    value,
                )
