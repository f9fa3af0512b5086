"""Reads the configs of a model's folder or GGUF file."""

from pathlib import Path
from typing import Any

from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.decoder import abstract
from jaxtrain.model.gguf import read_gguf_config
from jaxtrain.model.hf_config import decoder_config, override_config
from jaxtrain.model.weights import tensor_shapes
from jaxtrain.model_folder import read_json
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import ModelConfig


def read_config(path: Path, config: ModelConfig) -> tuple[DecoderConfig, dict[str, Any]]:
    """Returns the decoder, and its config.json with `hf_config_kwargs` applied.

    RecipeError if those change the shape of a tensor, unless the model is trained from scratch.
    """
    hf = read_hf_config(path)
    where = str(path / "config.json") if path.is_dir() else str(path)
    new = override_config(hf, config.hf_config_kwargs, where)
    decoder = decoder_config(new, where)
    if config.hf_config_kwargs and not config.from_scratch:
        _check_same_shapes(decoder_config(hf, where), decoder)
    return decoder, new


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or the equivalent from a GGUF file."""
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf_config(path)
    return read_json(path / "config.json")


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, or the equivalent from a GGUF file."""
    if path.is_dir():
        file = path / "generation_config.json"
        return read_json(file) if file.is_file() else None
    config = read_gguf_config(path)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {token: config[token] for token in tokens if token in config}


def _check_same_shapes(old: DecoderConfig, new: DecoderConfig) -> None:
    before, after = (tensor_shapes(c, abstract(c, ComputeConfig()).shapes) for c in (old, new))
    for name in {**before, **after}:
        was, would_be = (list(shapes.get(name, ())) or "none" for shapes in (before, after))
        if was != would_be:
            raise RecipeError(
                f"model.hf_config_kwargs: would change the shape of {name} from {was} to "
                f"{would_be}; set model.from_scratch: true for random weights"
            )
