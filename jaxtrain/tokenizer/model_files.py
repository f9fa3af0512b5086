"""Finds a model's tokenizer and description for commands that need neither jax nor weights."""

from pathlib import Path
from typing import NamedTuple

from jaxtrain.gguf_file import read_header
from jaxtrain.model_folder import locate, read_json
from jaxtrain.recipe.model import ModelConfig


class ModelFiles(NamedTuple):
    path: Path
    """Folder or GGUF file."""
    max_positions: int | None
    """None when the description names no length."""


def find_model_files(config: ModelConfig) -> ModelFiles:
    """Finds the files of a model; RecipeError when it is neither here nor on the hub."""
    path = locate(config.name_or_path, with_weights=False)
    if path.is_dir():
        described, field = read_json(path / "config.json"), "max_position_embeddings"
    else:
        described = read_header(path).metadata
        field = f"{described.get('general.architecture')}.context_length"
    positions = config.hf_config_kwargs.get("max_position_embeddings", described.get(field))
    return ModelFiles(path, positions if isinstance(positions, int) else None)
