"""Writes trained parameters as a Hugging Face folder, one tensor at a time and atomically, and
reads it back.

B sequences, T tokens, V vocabulary.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtrain.batch import Batch
from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.decoder import Params, abstract, merge
from jaxtrain.model.families import BY_NAME
from jaxtrain.model.hf_config import decoder_config, family_of, read_hf_config
from jaxtrain.model.tables import Layout, name_in_file, stored_dtype
from jaxtrain.model.tensor_file import TensorToWrite, write_folder
from jaxtrain.model.weights import (
    Piece,
    load_params,
    pieces,
    read_tensors,
    tensor_shapes,
    unread_names,
)
from jaxtrain.model_folder import is_complete
from jaxtrain.parallel.host_memory import fetch, is_on_host
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import CheckpointError, WeightError

PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
TOKENS = 16  # of the sequence whose logits are compared


def save_pretrained(
    folder: Path,
    params: Any,
    config: DecoderConfig,
    hf_config: Mapping[str, Any],
    *,
    dtype: str,
    max_shard_bytes: float = 4e9,
    generation_config: Mapping[str, Any] | None = None,
    source: Path | None = None,
    add_files: Callable[[Path], None] = lambda folder: None,
    verify: bool = True,
) -> None:
    """Replaces `folder` with one that transformers can load: weights, config, generation config.

    What the model does not read comes from `source`, where it was read, in the names that it has
    there. `add_files` receives the unfinished folder, to add the tokenizer. The name `folder`
    appears only after everything is written and, with `verify`, read back and found equal.
    """
    assert decoder_config(hf_config) == config, "config.json describes another model"
    with replace_folder(folder) as unfinished:
        carried, layout = _carried(source, config)
        tensors = carried | to_hf_tensors(params, config, dtype, layout)
        write_folder(unfinished, dict(sorted(tensors.items())), max_shard_bytes)
        if carried and source is not None:
            for file in filter(Path.is_file, (source / name for name in PROCESSOR_FILES)):
                shutil.copy(file, unfinished)
        _write_json(unfinished / "config.json", config_to_export(hf_config, dtype))
        if generation_config is not None:
            _write_json(unfinished / "generation_config.json", generation_config)
        add_files(unfinished)
        if verify:
            verify_folder(unfinished, params, config, dtype)


def _carried(source: Path | None, config: DecoderConfig) -> tuple[dict[str, TensorToWrite], Layout]:
    """The tensors of `source` that are no part of the text model, or are not read of it, as they
    are there; and how the names of the others are written."""
    family = BY_NAME[config.family]
    if source is None or not source.is_dir() or not is_complete(source, with_weights=True):
        return {}, family.layouts[0]
    stored, layout = read_tensors(source, family)
    unread = unread_names(config, layout)
    return {
        name_in_file(layout, name) if name in unread else name: TensorToWrite(
            tensor.read().dtype, tensor.shape, tensor.read
        )
        for name, tensor in stored.items()
        if name in unread or (family.carried and re.fullmatch(family.carried, name))
    }, layout


def to_hf_tensors(
    params: Any, config: DecoderConfig, dtype: str, layout: Layout
) -> dict[str, TensorToWrite]:
    """Every tensor by its name in a file of this layout; computed lazily."""
    parts: dict[str, list[tuple[Piece, jax.Array]]] = {}
    dtypes: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for piece in pieces(config, path_name(path), layout):
            parts.setdefault(piece.name, []).append((piece, leaf))
            dtypes[piece.name] = stored_dtype(path[-1].key, dtype)
    shapes = tensor_shapes(config, params, layout)
    return {
        name_in_file(layout, name): TensorToWrite(
            np.dtype(jnp.dtype(stored)), shapes[name], partial(_make_tensor, parts[name], stored)
        )
        for name, stored in dtypes.items()
    }


def _make_tensor(parts: list[tuple[Piece, jax.Array]], dtype: str) -> np.ndarray:
    """Copies one tensor to the host in `dtype`; only its own layer leaves the devices."""
    rows = [piece.to_theirs(np.asarray(_take(leaf, piece.place, dtype))) for piece, leaf in parts]
    return rows[0] if len(rows) == 1 else np.concatenate(rows)


def _take(leaf: jax.Array, place: tuple[slice, ...], dtype: str) -> jax.Array:
    """A part of a parameter, on the devices."""
    if is_on_host(leaf):
        layers, *place_in_layers = place
        leaf = _fetch_layers(layers.stop - layers.start, leaf, layers.start)
        place = (slice(None), *place_in_layers)
    return leaf[place].astype(dtype)


@partial(jax.jit, static_argnums=0)
def _fetch_layers(count: int, leaf: jax.Array, first: jax.Array) -> jax.Array:
    return fetch(jax.lax.dynamic_slice_in_dim(leaf, first, count))


def config_to_export(hf_config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json as it was read, rope in its original style, with the dtype of the file, in which
    nothing is quantised."""
    family = family_of(hf_config)
    dtypes = ("dtype", "torch_dtype")
    replaced = (*dtypes, "quantization_config") if family.quantizations else dtypes
    config = {k: v for k, v in hf_config.items() if k not in replaced}
    if family.text in config:
        config[family.text] = {k: v for k, v in config[family.text].items() if k not in dtypes}
    named = {"architectures": [family.architecture], "model_type": family.name}
    # transformers 4 reads only `torch_dtype`; 5 writes `dtype` and reads both.
    return config | named | {"torch_dtype": dtype}


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
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


def verify_folder(folder: Path, params: Params, config: DecoderConfig, dtype: str) -> None:
    """CheckpointError unless the config, every tensor bit for bit and the logits match `params`.

    The weights that are read lie on the devices beside the state, in the dtype of the file: at most
    4 bytes per parameter, as many as the gradients of a step, which do not exist during a save.
    """
    found = decoder_config(read_hf_config(folder), str(folder / "config.json"))
    if found != config:
        differing = [name for name, value in vars(config).items() if vars(found)[name] != value]
        raise _export_error(f"config.json describes another {' and '.join(differing)}")
    graph, shapes = abstract(found, ComputeConfig(compute_dtype="float32"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    try:
        read = load_params(folder, found, shapes, shardings, dtype)
    except WeightError as error:
        raise _export_error(str(error)) from error
    same = jax.device_get(_compare_bits(dtype, params, read))
    is_same = jax.tree_util.tree_leaves_with_path(same)
    if other := [path_name(path) for path, yes in is_same if not yes]:
        raise _export_error(f"{len(other)} parameters differ when read back, first {other[0]}")
    wanted_BTV, found_BTV = (np.asarray(_logits(graph, dtype, tree)) for tree in (params, read))
    # The parameters are equal, so this finds a config or a graph that does not fit them.
    if not np.allclose(wanted_BTV, found_BTV, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise _export_error(f"its logits differ by up to {np.abs(wanted_BTV - found_BTV).max()}")


def _export_error(what: str) -> CheckpointError:
    return CheckpointError(f"the export failed verification and was removed: {what}")


@partial(jax.jit, static_argnums=0)
def _compare_bits(dtype: str, ours: Params, theirs: Params) -> Params:
    """Whether each parameter is equal bit for bit: NaN equals NaN, 0 does not equal -0."""
    bits = {2: jnp.uint16, 4: jnp.uint32}[jnp.dtype(dtype).itemsize]
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    compare = lambda a, b: (as_bits(a.astype(dtype)) == as_bits(b)).all()
    return jax.tree.map(compare, fetch(ours), fetch(theirs))


@partial(jax.jit, static_argnums=(0, 1))
def _logits(graph: nnx.GraphDef, dtype: str, params: Params) -> jax.Array:
    model = merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), fetch(params)))
    positions_BT = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    tokens_BT = positions_BT * 7919 % model.config.vocab_size
    ones_BT = jnp.ones_like(positions_BT)
    rows_B = jnp.zeros(1, jnp.int32)
    return model(Batch(tokens_BT, positions_BT, ones_BT, ones_BT.astype(jnp.float32), rows_B))
