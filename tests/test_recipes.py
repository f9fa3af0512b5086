"""Every recipe that ships parses; every recipe that the README shows does too."""

import json
import re
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from jaxtrain import get_config, registry
from jaxtrain.metrics.writer import read_rows
from jaxtrain.model.hf_config import decoder_config, read_hf_config
from jaxtrain.model.tensor_file import read_folder
from jaxtrain.recipe.errors import RecipeError
from tests.runs import conversations, losses, model_folder, recipe, trainer

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_shipped_recipe_is_valid(file):
    assert get_config(file).run_dir == f"runs/{file.stem}"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES.remove(ROOT / "docs" / "data.md")  # shows parts, which tests/data/test_page.py runs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a43_every_recipe_that_is_shown_is_valid(tmp_path, monkeypatch, page):
    """Trap A43."""
    monkeypatch.setattr(registry, "_user", {})  # a class of a page may have a name of another's
    shown = {
        kind: re.findall(rf"```{kind}\n(.*?)```", page.read_text(), re.S)
        for kind in ("yaml", "python")
    }
    minimal = "model: {name_or_path: m}\ndata: {sources: [a/b]}\n"
    (tmp_path / "minimal.yaml").write_text(minimal)
    for n, text in enumerate(shown["yaml"]):
        file = tmp_path / f"{n}.yaml"
        file.write_text("base: minimal.yaml\n" * (page.stem == "recipe") + text)  # has parts only
        for name in re.findall(r"^code: (\w+\.py)$", text, re.M):
            (tmp_path / name).write_text(shown["python"][n])
        get_config(file)
    assert shown["yaml"] or page.stem not in ("README", "trainers")


def test_the_errors_in_the_readme_are_those_of_its_recipe(tmp_path):
    page = (ROOT / "README.md").read_text()
    text = re.findall(r"```yaml\n(.*?)```", page, re.S)[0]
    (errors,) = re.findall(r"```\n(recipe.yaml:.*?)```", page, re.S)
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("pack_samples", "pack_sample").replace("tensor: 2", "tensr: 2"))
    with pytest.raises(RecipeError) as error:
        get_config(file)
    assert str(error.value).replace(f"{tmp_path}/", "") == errors.strip()


def test_the_trainer_in_the_readme_trains(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names: dict = {"__name__": "readme"}
    exec(code.replace('"focal"', '"focal-of-the-readme"'), names)
    written = recipe(tmp_path, train_iters=8) | {"type": "focal-of-the-readme", "gamma": 1.0}
    found = losses(trainer(written, cls=names["FocalTrainer"]), 8)
    assert found[-1] < found[0]


@pytest.mark.slow
def test_the_qlora_recipe_trains_a_small_model_of_its_family(tmp_path):
    tokens = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
    written = recipe(tmp_path, rows=8)
    model_folder(tmp_path / "model", **tokens)
    base = trainer(written).save_model(tmp_path / "base")
    rows = conversations(tmp_path / "chats.jsonl", 400)
    overrides = [
        f"model.name_or_path={base}", f"run_dir={tmp_path / 'run'}", "train_iters=3",
        f"data.sources=[{rows}]", "data.max_length=256", "checkpoint.0.save_every_n_steps=3",
        f"checkpoint.0.output_dir={tmp_path / 'state'}", f"checkpoint.1.output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    config = get_config(ROOT / "recipes" / "qlora-llama-3.1-8b.yaml", overrides)
    run = registry.find("trainer", config.type)(config, devices=jax.devices()[:1])
    assert run.train().global_step == 3
    codes = run.state.frozen["base"]["layers"]["0"]["0"]["mlp"]["down"]["codes"]
    assert codes.dtype == "uint8"
    assert (tmp_path / "out" / "global_step_3" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["focal", "sums"])
def test_an_example_of_user_code_trains(tmp_path, name):
    files = [ROOT / "recipes" / f"{name}{suffix}" for suffix in (".py", ".yaml")]
    assert sum(len(file.read_text().splitlines()) for file in files) <= 40
    overrides = [
        f"model.name_or_path={model_folder(tmp_path / 'model')}", "model.from_scratch=true",
        f"run_dir={tmp_path / 'run'}", "train_iters=2", "micro_batch_size=1",
    ]  # fmt: skip
    if name == "focal":
        overrides.append(f"data.sources.0.path={conversations(tmp_path / 'rows.jsonl', 40)}")
    else:
        overrides.append("data.sources.0.largest=10")
    config = get_config(ROOT / "recipes" / f"{name}.yaml", overrides)
    run = registry.find("trainer", config.type)(config, devices=jax.devices()[:1])
    assert run.train().global_step == 2


@pytest.mark.slow
def test_the_recipe_of_qwen3_5_trains_a_small_one_and_exports_the_whole_model(tmp_path):
    tiny_models = pytest.importorskip("tests.model.tiny_models")
    folder, kind = (
        model_folder(tmp_path / "model"),
        tiny_models.transformers.AutoModelForImageTextToText,
    )
    kind.from_config(tiny_models.hf_config("qwen3-5-whole", vocab_size=392)).save_pretrained(folder)
    vision = {
        name: tensor.read() for name, tensor in read_folder(folder).items() if "visual" in name
    }
    overrides = [
        f"model.name_or_path={folder}", f"run_dir={tmp_path / 'run'}", "train_iters=2",
        f"data.sources.0={conversations(tmp_path / 'rows.jsonl', 40)}", "data.max_length=64",
        "epochs=null", "micro_batch_size=1", "gradient_accumulation_steps=1", "eval_interval=0",
        f"checkpoint.0.output_dir={tmp_path / 'state'}",
        f"checkpoint.1.output_dir={tmp_path / 'export'}",
    ]  # fmt: skip
    config = get_config(ROOT / "recipes" / "qwen3.5-0.8b-sft.yaml", overrides)
    run = registry.find("trainer", config.type)(config, devices=jax.devices()[:1])
    assert run.train().global_step == 2
    whole = kind.from_pretrained(next((tmp_path / "export").rglob("config.json")).parent)
    for name, parameter in whole.named_parameters():
        assert name not in vision or (parameter.detach().numpy() == vision[name]).all()
    assert vision


GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 16,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_activation": "gelu_pytorch_tanh",
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 16,
    "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True,
}  # fmt: skip
SMALL = {
    "lora-gemma-3": (GEMMA3, "gradient_accumulation_steps=2", 7),
    "lora-gpt-oss": (GPT_OSS, "gradient_accumulation_steps=2", 6),
    "pretrain": ({}, "micro_batch_size=1", 0),
}
"""Recipe that people start from → the config of a small model of its family, what else has to be
smaller, and its adapters in a layer."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_to_start_from_trains_a_small_model_of_its_family(tmp_path, monkeypatch, name):
    fields, smaller, adapters = SMALL[name]
    model_folder(tmp_path / "model", **fields)
    rows = conversations(tmp_path / "rows.jsonl", 400)
    if name == "pretrain":
        texts = (json.loads(line)["messages"][0]["content"] for line in rows.open())
        rows = tmp_path / "texts.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    overrides = [
        "model.name_or_path=model", "model.from_scratch=true", f"data.sources=[{rows}]",
        "data.max_length=128", "train_iters=4", "eval_interval=4", "max_eval_batches=1", smaller,
    ]  # fmt: skip
    if name == "pretrain":
        overrides.append(f"data.eval_sources=[{rows}]")
    monkeypatch.chdir(tmp_path)
    config = get_config(ROOT / "recipes" / f"{name}.yaml", overrides)
    devices = 8 if name == "pretrain" else 1
    run = registry.find("trainer", config.type)(config, devices=jax.devices()[:devices])
    assert run.train().global_step == 4
    (exported,) = (tmp_path / "out" / name / "export").glob("global_step_*")
    if name == "pretrain":
        rows = read_rows(tmp_path / config.run_dir / "train-log-metrics.jsonl")
        found = [row["loss"] for row in rows if "loss" in row]
        assert found[-1] < found[0] and decoder_config(read_hf_config(exported)).num_layers == 15
    else:
        factors = load_file(exported / "adapter_model.safetensors")
        assert len(factors) == 2 * adapters * 4 and all(f.any() for f in factors.values())
