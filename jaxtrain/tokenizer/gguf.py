"""Rebuilds a byte-level BPE tokenizer from the metadata of a GGUF file.

The file stores tokens, merges and the *name* of a pre-tokenizer, but not the regex of that name. An
unknown name is refused: a guess that is nearly right yields wrong ids on a few texts, unnoticed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from jaxtrain.gguf_file import read_header
from jaxtrain.recipe.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4  # token types of the format
REQUIRED = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges"))

# Contractions, words, digits in groups of at most {digits}, punctuation, white space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """How text is split before merging."""

    regex: str | None
    """None is that of GPT-2, which is built into the byte-level step."""
    single_digits: bool = False
    ignore_merges: bool = False
    """A piece that is a token as a whole stays one, whatever the merges say."""
    nfc: bool = False


GPT2 = PreTokenizer(None)
LLAMA3 = PreTokenizer(WORDS.format(digits="{1,3}"), ignore_merges=True)
QWEN2 = PreTokenizer(WORDS.format(digits=""), nfc=True)
PRE_TOKENIZERS = {
    "default": GPT2, "gpt-2": GPT2, "gpt2": GPT2,
    "smollm": PreTokenizer(None, single_digits=True),
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3,
    "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2,
}  # fmt: skip


def build_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer of a file with its chat template; RecipeError for an unknown kind."""
    from transformers import PreTrainedTokenizerFast

    fields = read_header(path).metadata
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise RecipeError(
            f"{path}: tokenizer.ggml.model is {model!r}, must be gpt2 (byte-level BPE) to be "
            f"rebuilt; name a Hugging Face tokenizer in tokenizer.name_or_path"
        )
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise RecipeError(
            f"{path}: tokenizer.ggml.pre is {name!r}, known are {', '.join(PRE_TOKENIZERS)}"
            f"{did_you_mean(name, PRE_TOKENIZERS)}; name a Hugging Face tokenizer in "
            f"tokenizer.name_or_path"
        )
    if missing := [key for key in REQUIRED if key not in fields]:
        raise RecipeError(f"{path}: the metadata lacks {', '.join(missing)}")
    tokens = fields["tokenizer.ggml.tokens"]
    backend = _build_backend(fields, PRE_TOKENIZERS[name])
    named = {
        f"{role}_token": tokens[fields[key]]
        for role, key in {
            "bos": "tokenizer.ggml.bos_token_id",
            "eos": "tokenizer.ggml.eos_token_id",
            "pad": "tokenizer.ggml.padding_token_id",
            "unk": "tokenizer.ggml.unknown_token_id",
        }.items()
        if key in fields
    }
    if fields.get("tokenizer.ggml.add_bos_token") and "bos_token" in named:
        bos = named["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, fields["tokenizer.ggml.bos_token_id"])],
        )
    architecture = fields.get("general.architecture", "")
    context = fields.get(f"{architecture}.context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **({"model_max_length": context} if context else {}),
        **named,
    )


def _build_backend(fields: dict[str, Any], pre: PreTokenizer) -> Tokenizer:
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=pre.ignore_merges,
        )
    )
    splits: list[Any] = []
    if pre.single_digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.regex is not None:
        splits.append(pre_tokenizers.Split(Regex(pre.regex), behavior="isolated"))
    splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    for kind, add in ((CONTROL, backend.add_special_tokens), (USER_DEFINED, backend.add_tokens)):
        add(
            [
                AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, found in zip(tokens, types, strict=True)
                if found == kind
            ]
        )
    return backend
