"""What a second start does without: torch, with which transformers chooses a tokenizer's class."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.tokenizer import load_tokenizer, save_tokenizer
from jaxtrain.tokenizer.choice import recall_class
from tests.tiny import chat, tiny_tokenizer

FOLDERS = {
    "plain": (None, "PreTrainedTokenizerFast"),
    "llama3": ("llama", "PreTrainedTokenizerFast"),
    "qwen2": ("qwen2", "PreTrainedTokenizerFast"),  # the class of the model goes before
    "qwen3": ("qwen3", "Qwen2Tokenizer"),
    "bytes": ("llama", "LlamaTokenizer"),  # whose own pieces are those of sentencepiece
    "gpt2": ("gpt2", "GPT2TokenizerFast"),
    "unnamed": ("qwen2", None),
}
"""The model's type, and the class that tokenizer_config.json names."""
TEXTS = (
    "I don't know 12345 rivers, 1,000.50.",
    "  two\n\n\tna\u00efve ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)
FACTS = """
import json, sys
from pathlib import Path
from tests.tokenizer.test_choice import FOLDERS, describe, load
found = {name: describe(load(Path(sys.argv[1]) / name)) for name in FOLDERS}
print(json.dumps(found), "torch" in sys.modules)
"""


def load(folder, **how):
    return load_tokenizer(TokenizerConfig(), folder, **how)


def describe(tokenizer):
    return [
        type(tokenizer).__name__, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template,
        [tokenizer(text)["input_ids"] for text in TEXTS], tokenizer.special_tokens_map,
        tokenizer.apply_chat_template(chat("a", "b"), tokenize=False),
    ]  # fmt: skip


def write_folder(folder: Path, model_type: str | None, name: str | None) -> Path:
    save_tokenizer(tiny_tokenizer(), folder)
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = folder / "tokenizer_config.json"
    kept = json.loads(config.read_text()) | {"tokenizer_class": name}
    config.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))
    return folder


def test_the_next_start_has_the_same_tokenizer_and_imports_no_torch(tmp_path):
    expected = {}
    for name, (model_type, declared) in FOLDERS.items():
        folder = write_folder(tmp_path / name, model_type, declared)
        chosen = transformers.AutoTokenizer.from_pretrained(folder)
        expected[name] = describe(chosen)
        assert describe(load(folder, remembers=True)) == expected[name]
        assert recall_class(folder) is type(chosen)
    assert len({facts[0] for facts in expected.values()}) > 2
    command = [sys.executable, "-c", FACTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{json.dumps(expected)} False"


def test_another_folder_than_was_seen_has_a_class_of_its_own(tmp_path):
    folder = write_folder(tmp_path / "m", "qwen3", "Qwen2Tokenizer")
    assert recall_class(folder) is None
    load(folder)
    assert recall_class(folder) is None, "`check` writes nothing"
    load(folder, remembers=True)
    assert recall_class(folder).__name__ == "Qwen2Tokenizer"
    write_folder(folder, "llama", "PreTrainedTokenizerFast")
    assert recall_class(folder) is None
    assert type(load(folder, remembers=True)).__name__ == "TokenizersBackend"


@pytest.mark.parametrize("damage", [b"\xff", b"", b"Trainer", b"no class", None])
def test_a_damaged_cache_is_not_believed(tmp_path, monkeypatch, damage):
    cache = tmp_path / "cache"
    monkeypatch.setenv("JAXTRAIN_CACHE", str(cache))
    folder = write_folder(tmp_path / "m", None, "PreTrainedTokenizerFast")
    if damage is None:
        cache.write_text("a file where the folder should be")
    load(folder, remembers=True)
    for file in (cache / "tokenizers").glob("*"):
        file.write_bytes(damage)
    assert recall_class(folder) is None
    assert describe(load(folder)) == describe(transformers.AutoTokenizer.from_pretrained(folder))
