"""Verifies an exported folder: reads it back and compares it with the parameters in memory.

The weights that are read lie on the devices beside the state, in the dtype of the file: at most 4
bytes per parameter, as many as the gradients of a step, which do not exist during a save.
B sequences, T tokens, V vocabulary.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtrain.batch import Batch
from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.decoder import Params, abstract, merge
from jaxtrain.model.hf_config import decoder_config
from jaxtrain.model.source import read_hf_config
from jaxtrain.model.weights import load_params
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import CheckpointError, WeightError

TOKENS = 16  # of the sequence whose logits are compared


def verify_folder(folder: Path, params: Params, config: DecoderConfig, dtype: str) -> None:
    """CheckpointError unless the config, every tensor bit for bit and the logits match `params`."""
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
    return jax.tree.map(lambda a, b: (as_bits(a.astype(dtype)) == as_bits(b)).all(), ours, theirs)


@partial(jax.jit, static_argnums=(0, 1))
def _logits(graph: nnx.GraphDef, dtype: str, params: Params) -> jax.Array:
    model = merge(graph, jax.tree.map(lambda leaf: leaf.astype(dtype), params))
    positions_BT = jnp.arange(TOKENS, dtype=jnp.int32)[None]
    tokens_BT = positions_BT * 7919 % model.config.vocab_size
    ones_BT = jnp.ones_like(positions_BT)
    rows_B = jnp.zeros(1, jnp.int32)
    return model(Batch(tokens_BT, positions_BT, ones_BT, ones_BT.astype(jnp.float32), rows_B))
