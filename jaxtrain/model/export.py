"""Writes trained parameters as a Hugging Face folder, one tensor at a time and atomically."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtrain.model.config import DecoderConfig
from jaxtrain.model.hf_config import decoder_config, family_of
from jaxtrain.model.tensor_file import TensorToWrite, write_folder
from jaxtrain.model.verify import verify_folder
from jaxtrain.model.weights import Piece, pieces
from jaxtrain.parallel.sharding import path_name


def save_pretrained(
    folder: Path,
    params: Any,
    config: DecoderConfig,
    hf_config: Mapping[str, Any],
    *,
    dtype: str,
    max_shard_bytes: float = 4e9,
    generation_config: Mapping[str, Any] | None = None,
    add_files: Callable[[Path], None] = lambda folder: None,
    verify: bool = True,
) -> None:
    """Replaces `folder` with one that transformers can load: weights, config, generation config.

    `add_files` receives the unfinished folder, to add the tokenizer. The name `folder` appears only
    after everything is written and, with `verify`, read back and found equal.
    """
    assert decoder_config(hf_config) == config, "config.json describes another model"
    with _replace_folder(folder) as unfinished:
        tensors = to_hf_tensors(params, config, dtype)
        write_folder(unfinished, tensors, np.dtype(jax.numpy.dtype(dtype)), max_shard_bytes)
        _write_json(unfinished / "config.json", config_to_export(hf_config, dtype))
        if generation_config is not None:
            _write_json(unfinished / "generation_config.json", generation_config)
        add_files(unfinished)
        if verify:
            verify_folder(unfinished, params, config, dtype)


def to_hf_tensors(params: Any, config: DecoderConfig, dtype: str) -> dict[str, TensorToWrite]:
    """Every tensor by its Hugging Face name, in the order of the file; computed lazily."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    tensors = [(piece, leaf) for path, leaf in leaves for piece in pieces(config, path_name(path))]
    tensors.sort(key=lambda tensor: tensor[0].name)
    return {
        piece.name: TensorToWrite(piece.shape, partial(_make_tensor, piece, leaf, dtype))
        for piece, leaf in tensors
    }


def _make_tensor(piece: Piece, leaf: jax.Array, dtype: str) -> np.ndarray:
    """Copies one tensor to the host in `dtype`; only its own layer leaves the devices."""
    return piece.to_theirs(np.asarray(leaf[piece.place].astype(dtype)))


def config_to_export(hf_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json as it was read, rope in its original style, with the dtype of the file."""
    config = {k: v for k, v in hf_config.items() if k not in ("dtype", "torch_dtype")}
    family = family_of(hf_config)
    config |= {"architectures": [family.architecture], "model_type": family.name}
    # transformers 4 reads only `torch_dtype`; 5 writes `dtype` and reads both.
    return {**config, "torch_dtype": dtype}


@contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that replaces `folder` at the end; removed if writing fails."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    unfinished.chmod(0o755)  # mkdtemp creates it readable to its owner alone
    try:
        yield unfinished
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            folder.rename(old)  # replaces the empty folder atomically
            unfinished.rename(folder)
            shutil.rmtree(old)
        else:
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
