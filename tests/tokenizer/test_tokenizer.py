import json

import numpy as np
import pytest

from jaxtrain.gguf_file import read_header
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.tokenizer import load_tokenizer, save_tokenizer
from tests.tiny import CHATML, HEADERS, chat, tiny_tokenizer

TEXTS = (
    "I don't know 12345 rivers, 1,000.50 or 7; it's HERE'S.",
    "  two  spaces\n\n\tand a tab \r\n",
    "naïve café ½ 日本語 🙂 e\u0301",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
)


@pytest.fixture
def folder(tmp_path):
    save_tokenizer(tiny_tokenizer(), tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def load(path, **keys):
    return load_tokenizer(TokenizerConfig(**keys), path)


def failure(path, **keys):
    with pytest.raises(RecipeError) as error:
        load(path, **keys)
    return str(error.value)


def test_a_saved_tokenizer_comes_back_the_same(folder):
    again, original = load(folder), tiny_tokenizer()
    for text in TEXTS:
        assert again(text)["input_ids"] == original(text)["input_ids"]
    messages = chat("a", "b")
    assert again.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.covers("tokenizer.name_or_path")
def test_the_recipes_tokenizer_goes_before_the_models(folder, tmp_path):
    assert load(tmp_path, name_or_path=str(folder)).vocab_size == 384


@pytest.mark.covers("tokenizer.chat_template")
def test_a_template_as_text_or_as_a_file(folder, tmp_path):
    (tmp_path / "own.jinja").write_text(HEADERS)
    (tmp_path / "marked.jinja").write_text(HEADERS, encoding="utf-8-sig")
    files = (str(tmp_path / name) for name in ("own.jinja", "marked.jinja"))
    for template in (HEADERS, *files):
        tokenizer = load(folder, chat_template=template)
        assert tokenizer.chat_template == HEADERS
        save_tokenizer(tokenizer, tmp_path / "out")
        assert load(tmp_path / "out").chat_template == HEADERS


def test_bad_templates_are_said(folder, tmp_path):
    assert failure(folder, chat_template="nowhere.jinja") == (
        "tokenizer.chat_template: no file 'nowhere.jinja'"
    )
    assert failure(folder, chat_template="no template").endswith("and it is not Jinja text")
    assert failure(folder, chat_template="{% for m in messages %}\n{% end %}").startswith(
        "tokenizer.chat_template: line 2: "
    )
    deep = "{{ " + "[" * 3000 + "}}"
    assert failure(folder, chat_template=deep) == "tokenizer.chat_template: is nested too deeply"
    long = failure(folder, chat_template=f"{{{{ {'9' * 5000} }}}}")
    assert long == "tokenizer.chat_template: has a number of too many digits"
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    assert failure(folder, chat_template=str(tmp_path / "latin.jinja")).endswith("is not UTF-8")


def test_a_template_may_refuse_the_probe(folder):
    refusing = "{{ raise_exception('never') }}"
    assert load(folder, chat_template=refusing).chat_template == refusing


def test_pad_falls_back_to_the_end_of_text(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(folder)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert failure(tmp_path / "a.gguf") == f"tokenizer: no file {tmp_path}/a.gguf"
    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty") == (
        f"tokenizer: {tmp_path}/empty has no readable tokenizer, found no file"
    )
    assert failure(tmp_path, name_or_path="nobody/nothing") == (
        "tokenizer 'nobody/nothing' is neither a folder nor in the hub's cache (offline)"
    )


DAMAGE = {
    "id": ({"added_tokens": [{"content": "x", "id": "y"}]}, "invalid type"),
    "vocab": ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "expected a map"),
    "number": (5, ""),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_tokenizer_is_refused_with_the_reason(folder, name):
    """Its library raises whatever a file makes it."""
    changed, expected = DAMAGE[name]
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | changed if isinstance(changed, dict) else changed))
    message = failure(folder)
    assert message.startswith(f"tokenizer: {folder} has no readable tokenizer, found ")
    assert expected in message.partition("tokenizer_config.json: ")[2]


def gguf_file(path, *, pre="gpt-2", model="gpt2", bos=False):
    """Metadata of the tiny tokenizer, as converters write it, and one small tensor."""
    gguf = pytest.importorskip("gguf")
    tokenizer = tiny_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(state["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in state["added_tokens"]}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocab])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(bos)
    writer.add_chat_template(CHATML)
    writer.add_tensor("token_embd.weight", np.zeros((1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("pre", ["gpt-2", "default", None])
def test_a_gguf_file_gives_the_ids_of_the_tokenizer_it_was_made_of(tmp_path, pre):
    found, original = load(gguf_file(tmp_path / "a.gguf", pre=pre)), tiny_tokenizer()
    for text in TEXTS:
        assert found(text)["input_ids"] == original(text)["input_ids"]
        assert found.decode(found(text)["input_ids"]) == text
    assert found.eos_token == found.pad_token == "<|im_end|>" and found.model_max_length == 64
    assert found.chat_template == CHATML


CUTS = {
    "gpt-2": ["Ġ", "Ġ12345", "!!", "Ċ"],
    "smollm": ["ĠĠ", "1", "2", "3", "4", "5", "!!", "Ċ"],  # digits are cut off before the rest
    "llama-bpe": ["Ġ", "Ġ", "123", "45", "!!Ċ"],
    "qwen2": ["Ġ", "Ġ", "1", "2", "3", "4", "5", "!!Ċ"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_pre_tokenizers_cut_as_their_regex_says(tmp_path, pre):
    backend = load(gguf_file(tmp_path / "a.gguf", pre=pre)).backend_tokenizer
    cuts = [cut for cut, _ in backend.pre_tokenizer.pre_tokenize_str("Idon't  12345!!\n")]
    assert cuts == ["Idon", "'t", *CUTS[pre]]


def test_bos_is_added_when_the_file_says_so(tmp_path):
    tokenizer = load(gguf_file(tmp_path / "a.gguf", bos=True))
    assert tokenizer("yes")["input_ids"][0] == tokenizer.bos_token_id


def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path):
    path = gguf_file(tmp_path / "a.gguf", pre="qwen3")
    assert failure(path).startswith(f"{path}: tokenizer.ggml.pre is 'qwen3', known are default, ")
    path = gguf_file(tmp_path / "b.gguf", model="llama")
    assert failure(path).startswith(f"{path}: tokenizer.ggml.model is 'llama', must be gpt2")
    (tmp_path / "c.gguf").write_bytes(b"no such thing")
    assert failure(tmp_path / "c.gguf") == f"{tmp_path}/c.gguf: not a GGUF file"


@pytest.mark.parametrize("size", [4, 9, 30, 200, 2000])
def test_a_file_that_is_cut_off_is_said(tmp_path, size):
    path = gguf_file(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:size])
    message = f"{path}: the metadata is damaged; is the file cut off?"
    assert failure(path) == message


def test_the_metadata_is_what_the_gguf_package_reads(tmp_path):
    path = gguf_file(tmp_path / "a.gguf")
    fields = pytest.importorskip("gguf").GGUFReader(path).fields
    expected = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert read_header(path).metadata == expected


def test_a_header_is_that_of_the_file_as_it_is_now(tmp_path):
    path = gguf_file(tmp_path / "a.gguf", pre="smollm")
    assert read_header(path) is read_header(path), "read once at a start"
    gguf_file(path, pre="qwen2")
    assert read_header(path).metadata["tokenizer.ggml.pre"] == "qwen2"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_header(path)


@pytest.mark.covers("tokenizer.extra_tokens")
def test_extra_tokens_are_special_and_whole(folder, tmp_path):
    tokenizer = load(folder, extra_tokens=["<tool>", "<|im_end|>"], pad_token="<pad>")
    ids = tokenizer("a<tool>b<|im_end|>")["input_ids"]
    assert ids[1] == 384 and ids[3] == tiny_tokenizer().eos_token_id, "what was there stays"
    assert (tokenizer.pad_token_id, len(tokenizer)) == (385, 386)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"
    save_tokenizer(tokenizer, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again("a<tool>b<|im_end|>")["input_ids"] == ids
    assert (again.pad_token, again.pad_token_id) == ("<pad>", 385)


@pytest.mark.covers("tokenizer.pad_token")
def test_a_pad_token_of_the_vocabulary_is_taken(folder):
    tokenizer = load(folder, pad_token="</s>")
    assert len(tokenizer) == 384
    assert tokenizer.pad_token_id == tiny_tokenizer().convert_tokens_to_ids("</s>")
    assert tokenizer.eos_token == "<|im_end|>"
