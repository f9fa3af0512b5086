"""Where a model's tokenizer and description lie, for commands that need neither jax nor weights."""

import json
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxtrain import assets
from jaxtrain.recipe.errors import Fault, RecipeError, shown
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.tokenizer.metadata import read_metadata

DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt"]
"""What a hub repository is fetched for besides weights: config, tokenizer, chat template."""


class ModelFiles(NamedTuple):
    path: Path
    """Folder or GGUF file."""
    max_positions: int | None
    """None when the description names no length."""


def model_files(config: ModelConfig) -> ModelFiles:
    """RecipeError when there is no such model here or on the hub."""
    path = _located(config.name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        metadata = read_metadata(path)
        described = {
            "max_position_embeddings": metadata.get(
                f"{metadata.get('general.architecture')}.context_length"
            )
        }
    else:
        described = _read_config(path / "config.json")
    positions = (described | config.hf_config_kwargs).get("max_position_embeddings")
    return ModelFiles(path, positions if isinstance(positions, int) else None)


def _located(name: str) -> Path:
    if assets.is_asset(name):
        return assets.fetch(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        raise _fault(f"no such folder or file: {shown(name)}")
    reasons = []
    for local_only in (True, False):
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    name, allow_patterns=DESCRIPTION, local_files_only=local_only
                )
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reasons.append(str(error).strip().splitlines()[0])
    raise _fault(
        f"cannot find {shown(name)}: no such folder, not in "
        f"{huggingface_hub.constants.HF_HUB_CACHE}, nor on the hub: {reasons[-1]}"
    )


def _read_config(file: Path) -> dict:
    if not file.is_file():
        raise _fault(f"no such file: {file}; a model folder needs one")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError([Fault(str(file), f"not JSON: {error}")]) from None


def _fault(what: str) -> RecipeError:
    return RecipeError([Fault("model.name_or_path", what)])
