"""What `jaxtrain check` refuses by this machine's files alone, and nobody else."""

import json

import pytest

from jaxtrain.preflight import find_faults
from jaxtrain.recipe.resolve import get_config, resolve
from tests.runs import model_folder, recipe
from tests.test_cli import files, jaxtrain, no_template, written


def change(key, value):
    return lambda folder, base: base.__setitem__(key, {**base.get(key, {}), **value})


def set_key(key, value):
    return lambda folder, base: base.__setitem__(key, value)


def other_architecture(folder, base):
    model_folder(folder / "model", architectures=["BertModel"], model_type="bert")


def wrong_type(folder, base):
    model_folder(folder / "model", num_hidden_layers="many")


def broken_generation_config(text):
    return lambda folder, base: (folder / "model" / "generation_config.json").write_text(text)


def no_tokenizer(folder, base):
    for file in (folder / "model").glob("*token*"):
        file.unlink()


def no_folder(folder, base):
    base["model"]["name_or_path"] = str(folder / "gone")


def broken_template(folder, base):
    (folder / "own.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    base["tokenizer"] = {"chat_template": str(folder / "own.jinja")}


def broken_template_of_the_model(folder, base):
    (folder / "model" / "chat_template.jinja").write_text("{% if %}")


def empty_folder(folder, base):
    (folder / "rows").mkdir()
    base["data"]["sources"] = [{"type": "local", "path": str(folder / "rows")}]


def below_a_file(key):
    def spoil(folder, base):
        (folder / "file").touch()
        section, _, name = key.partition(".")
        if section == "checkpoint":
            entry = {"output_dir": str(folder / "file" / "x"), "save_end_of_training": True}
            base["checkpoint"] = [entry]
        elif name:
            base[section] = {**base.get(section, {}), name: str(folder / "file" / "x")}
        else:
            base[section] = str(folder / "file" / "x")

    return spoil


def samples_without_a_template(folder, base):
    no_template(folder, base)
    base |= {"type": "causal", "data": {"sources": [str(folder / "rows.jsonl")], "max_length": 64}}
    base["eval_samples"] = {"prompts": ["hello"]}


def positions_that_do_not_divide(folder, base):
    model_folder(folder / "model", max_position_embeddings=252)
    del base["data"]["max_length"]
    base["mesh"] = {"context": 4}


def positions_in_a_table(folder, base):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 384}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **sizes, **no_dropout}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    base["data"]["max_length"] = 999


def convolutions_over_context(folder, base):
    model_folder(
        folder / "model", architectures=["Lfm2ForCausalLM"], model_type="lfm2", norm_eps=1e-5,
        conv_bias=False, conv_L_cache=3, block_multiple_of=8, block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 3,
    )  # fmt: skip
    base["mesh"] = {"context": 2}


REFUSED = {
    "architecture": (other_architecture, "unsupported architecture, found 'BertModel'"),
    "config.json": (wrong_type, "num_hidden_layers: must be a positive whole number"),
    "generation": (broken_generation_config("{"), "generation_config.json: not JSON"),
    "stops": (broken_generation_config('{"eos_token_id": "x"}'), "eos_token_id: must be the number"),
    "no model": (no_folder, "no such folder or file"),
    "no tokenizer": (no_tokenizer, "has no readable tokenizer"),
    "no weights": (change("model", {"from_scratch": False}), "needs model.safetensors"),
    "no template": (no_template, "the tokenizer has no chat template"),
    "template file": (change("tokenizer", {"chat_template": "gone.jinja"}), "no file 'gone.jinja'"),
    "template syntax": (broken_template, "tokenizer.chat_template: line 2: "),
    "the model's template": (broken_template_of_the_model, "tokenizer.chat_template: line 1: "),
    "samples": (samples_without_a_template, "the tokenizer has no chat template"),
    "max_length": (
        positions_in_a_table,
        "data.max_length: 999 is longer than the 256 positions that gpt2 has in a table",
    ),
    "vocabulary": (change("tokenizer", {"extra_tokens": ["<x>"]}), "model.resize_vocab: true"),
    "heads": (change("mesh", {"tensor": 3}), "mesh.tensor: 3 does not divide 4 key/value heads"),
    "context": (
        positions_that_do_not_divide,
        "data.max_length: 252 does not divide into the 8 pieces of mesh.context 4; use 248 or 256",
    ),
    "convolutions": (
        convolutions_over_context,
        "mesh.context: 2 cannot cut sequences for layers of short convolutions, which lfm2 has; "
        "write 1, and use mesh.fsdp or mesh.tensor",
    ),
    "ring in a pipeline": (
        change("mesh", {"context": 16, "pipeline": 2}),
        "mesh.pipeline: 2 excludes attention in a ring over context 16, since context 16 does not "
        "divide 8 heads; use mesh.fsdp, or for mesh.context one of [1, 2, 4, 8]",
    ),
    "data": (change("data", {"sources": ["gone.jsonl"]}), "no file or folder 'gone.jsonl'"),
    "pattern": (change("data", {"sources": ["gone/*.csv"]}), "no file matches 'gone/*.csv'"),
    "data folder": (change("data", {"sources": ["./gone"]}), "no folder './gone'"),
    "empty folder": (empty_folder, "rows holds no data file"),
    "run_dir": (below_a_file("run_dir"), "is a file, where a folder is needed"),
    "output_dir": (below_a_file("checkpoint"), "is a file, where a folder is needed"),
    "cache": (below_a_file("data.cache_dir"), "is a file, where a folder is needed"),
    "logs": (below_a_file("logger.output_dir"), "is a file, where a folder is needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_local_files_refute_is_refused(tmp_path, case):
    spoil, expected = REFUSED[case]
    base = recipe(tmp_path, rows=4)
    assert list(find_faults(get_config(base))) == []
    spoil(tmp_path, base)
    before = files(tmp_path)
    found = [str(fault) for fault in find_faults(get_config(base))]
    assert len(found) == 1 and expected in found[0], found
    assert files(tmp_path) == before


def test_check_refuses_all_at_once_with_exit_code_two_and_other_commands_do_not_ask(tmp_path):
    base = recipe(tmp_path, rows=4)
    base["data"] |= {"sources": ["gone.jsonl"]}
    base["tokenizer"] = {"extra_tokens": ["<x>"]}
    file = written(tmp_path, base)
    done = jaxtrain(tmp_path, "check", file)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{file}:6: data.sources.0.path: no file or folder 'gone.jsonl'" in done.stderr
    assert "model.resize_vocab: true" in done.stderr
    assert done.stderr.rstrip().endswith("2 errors in recipe.yaml; nothing was started")
    assert resolve(file).faults == ()


def test_a_weight_that_is_missing_is_found_without_reading_any(tmp_path):
    base = recipe(tmp_path, rows=4)
    base["model"]["from_scratch"] = False
    header = json.dumps({}).encode()
    text = len(header).to_bytes(8, "little") + header
    (tmp_path / "model" / "model.safetensors").write_bytes(text)
    found = [str(fault) for fault in find_faults(get_config(base))]
    assert any("tensor model.embed_tokens.weight [384, 32] is missing" in line for line in found)


LOST = {
    "no entry": ({}, "checkpoint: no entry saves anything"),
    "off": ({"checkpoint": [{"output_dir": "a", "enabled": False}]}, "no entry saves anything"),
    "never": ({"checkpoint": [{"output_dir": "a"}]}, "checkpoint.0: never saves"),
    "late": (
        {"checkpoint": [{"output_dir": "a", "save_every_n_steps": 500}]},
        "checkpoint.0: its first save is due after step 500, and the run ends at 100",
    ),
    "late by its start": (
        {"checkpoint": [{"output_dir": "a", "save_every_n_steps": 40, "save_after_step": 90}]},
        "its first save is due after step 120, and the run ends at 100",
    ),
    "late by the end": (
        {"checkpoint": [{"output_dir": "a", "save_every_n_steps": 50}], "exit_iteration": 20},
        "and the run ends at 20",
    ),
    "no score": (
        {
            "checkpoint": [{"output_dir": "a", "save_every_n_steps": 50, "keep_best_n": 1}],
            "data": {"sources": ["a/b"], "train_eval_split": [0.9, 0.1]},
            "eval_every_n_epochs": 1,
        },
        "checkpoint.0.keep_best_n: no save falls on an evaluation",
    ),
}
KEPT = (
    {"output_dir": "a", "save_every_n_steps": 50},
    {"output_dir": "a", "save_end_of_training": True},
    {"output_dir": "a", "save_every_n_epochs": 1},
)


@pytest.mark.parametrize("case", LOST)
def test_work_that_is_not_kept_is_a_note(case):
    base = {"model": {"name_or_path": "m"}, "data": {"sources": ["a/b"]}, "train_iters": 100}
    changed, expected = LOST[case]
    resolved = resolve(base | changed)
    assert resolved.config is not None
    assert [note for note in resolved.report.notes if expected in note], resolved.report.notes
    for entry in KEPT:
        assert resolve(base | {"checkpoint": [entry]}).report.notes == ()
