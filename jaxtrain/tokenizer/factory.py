"""Makes the tokenizer of the `tokenizer` section."""

from pathlib import Path
from typing import Any

from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.registry import Factory
from jaxtrain.tokenizer.load import load_tokenizer


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
        return load_tokenizer(self.config, self.model_path)
