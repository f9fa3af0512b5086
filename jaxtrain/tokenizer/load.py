"""Reads a fast tokenizer from a folder, the hub or a GGUF file, and writes it for export."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from huggingface_hub import is_offline_mode
from tokenizers import AddedToken

from jaxtrain import assets
from jaxtrain.recipe.errors import RecipeError, show
from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.registry import Factory
from jaxtrain.tokenizer.choice import recall_class, remember_class
from jaxtrain.tokenizer.gguf import build_gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_SUFFIXES = (".jinja", ".jinja2", ".j2", ".txt")


class TokenizerFactory(Factory, kind="tokenizer"):
    """Makes the tokenizer; `self.model_path` is the model's folder or GGUF file."""

    events = {"create-tokenizer": "create_tokenizer"}
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig, model_path: Path, trainer: Any = None):
        super().__init__(config, trainer)
        self.model_path = model_path

    def create_tokenizer(self) -> Any:
        raise NotImplementedError(f"{type(self).__qualname__} must define create_tokenizer()")


class HFTokenizerFactory(TokenizerFactory):
    name = "huggingface"

    def create_tokenizer(self) -> Any:
        return load_tokenizer(self.config, self.model_path, remembers=True)


def load_tokenizer(
    config: TokenizerConfig, model_path: Path, *, remembers: bool = False
) -> "PreTrainedTokenizerFast":
    """Loads the recipe's tokenizer, by default that of `model_path`; `remembers` in the cache what
    makes the next time faster.

    Extra tokens, and a pad token that it lacks, are added as special ones. The default pad token is
    EOS: padding is known by position, so EOS stays trainable."""
    named = config.name_or_path
    path = Path(assets.fetch(named) if named and assets.is_asset(named) else named or model_path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise RecipeError(f"tokenizer: no file {path}")
        tokenizer = build_gguf_tokenizer(path)
    else:
        tokenizer = _load_from_hugging_face(path, named or str(model_path), remembers)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    if isinstance(tokenizer.chat_template, str):  # a file's byte order mark would be trained
        tokenizer.chat_template = tokenizer.chat_template.removeprefix("\ufeff")
    check_syntax(tokenizer.chat_template)
    for token in filter(None, (*config.extra_tokens, config.pad_token)):
        added: Any = AddedToken(token, special=True, normalized=False)
        tokenizer.add_tokens(added, special_tokens=True)
    if config.pad_token:
        tokenizer.pad_token = config.pad_token
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Writes tokenizer.json, its config and the chat template for transformers to read."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises no class of its own
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error
    config = folder / "tokenizer_config.json"
    written = json.loads(config.read_text(encoding="utf-8"))
    if written.get("tokenizer_class") == "TokenizersBackend":
        # Transformers 5 writes the new name; every release and engine reads the older one.
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.write_text(
            json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def _load_from_hugging_face(path: Path, name: str, remembers: bool) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if path.is_dir():
        known = recall_class(path)
        tokenizer, why = _read(str(path), known, local_only=True)
        if tokenizer is None:
            files = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "no file"
            why = f": {why}" if (path / "tokenizer.json").is_file() else ""
            raise RecipeError(f"tokenizer: {path} has no readable tokenizer, found {files}{why}")
        if remembers and known is None:
            remember_class(path, type(tokenizer))
    else:
        # The cache comes first, so that a run that has its files never waits for the hub.
        tokenizer, _ = _read(name, None, local_only=True)
        if tokenizer is None and not is_offline_mode():
            tokenizer, _ = _read(name, None, local_only=False)
        if tokenizer is None:
            where = "the hub's cache (offline)" if is_offline_mode() else "the hub"
            raise RecipeError(f"tokenizer {show(name)} is neither a folder nor in {where}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise RecipeError(f"tokenizer: {name} has no tokenizer.json, which masks need")
    return tokenizer


def _read(name: str, known: Any, *, local_only: bool) -> tuple[Any, str]:
    """Returns the tokenizer, of a class that is known or chosen, or None and why it cannot be
    read."""
    if known is None:
        from transformers import AutoTokenizer as known
    try:
        tokenizer = known.from_pretrained(
            name, local_files_only=local_only, trust_remote_code=False
        )
    except Exception as fault:  # both libraries raise whatever a partial or damaged file makes them
        return None, str(fault).strip().partition("\n")[0] or type(fault).__name__
    return tokenizer, ""


def read_template(value: str) -> str:
    """Returns Jinja text, which `value` is or names a file of."""
    if "{" in value or "\n" in value:
        return value
    path = Path(value)
    if not path.is_file():
        hint = "" if path.suffix in TEMPLATE_SUFFIXES else ", and it is not Jinja text"
        raise RecipeError(f"tokenizer.chat_template: no file {show(value)}{hint}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"tokenizer.chat_template: {path} is not UTF-8") from None


def check_syntax(template: str | Mapping[str, str] | None) -> None:
    """RecipeError for a chat template, or one of several by name, that is not Jinja; renders
    nothing."""
    from transformers.utils.chat_template_utils import render_jinja_template

    named = template if isinstance(template, Mapping) else {"": template or ""}
    for name, text in named.items():
        try:
            render_jinja_template([], chat_template=text)
        except jinja2.TemplateSyntaxError as fault:
            where = f"{name}: line" if name else "line"
            raise RecipeError(
                f"tokenizer.chat_template: {where} {fault.lineno}: {fault.message}"
            ) from None
        except RecursionError:
            raise RecipeError("tokenizer.chat_template: is nested too deeply") from None
        except ValueError:  # Python reads no integer of so many digits
            why = "has a number of too many digits"
            raise RecipeError(f"tokenizer.chat_template: {why}") from None
