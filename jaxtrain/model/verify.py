"""Is a written folder the model that was meant? Read back as any reader would, and compared.

The weights that were read lie on the devices in the dtype of the file, beside the state: at most
the 4 bytes a parameter that the gradients of an update take, which are not there during a save.
B rows, T tokens, V vocabulary.
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

TOKENS = 16  # of the one row whose logits are compared


def verify_folder(folder: Path, params: Params, config: DecoderConfig, dtype: str) -> None:
    """CheckpointError unless config, every tensor bit for bit, and logits are those of `params` in
    `dtype`."""
    found = decoder_config(read_hf_config(folder), str(folder / "config.json"))
    if found != config:
        differing = [name for name, value in vars(config).items() if vars(found)[name] != value]
        raise _failed(f"config.json describes another {' and '.join(differing)}")
    graph, shapes = abstract(found, ComputeConfig(compute_dtype="float32"))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    try:
        read = load_params(folder, found, shapes, shardings, dtype)
    except WeightError as error:
        raise _failed(str(error)) from error
    same = jax.device_get(_same(dtype, params, read))
    is_same = jax.tree_util.tree_leaves_with_path(same)
    if other := [path_name(path) for path, yes in is_same if not yes]:
        raise _failed(f"{len(other)} parameters read back as others, first {other[0]}")
    wanted_BTV, found_BTV = (np.asarray(_logits(graph, dtype, tree)) for tree in (params, read))
    # The parameters are equal; what is left to find is a model that cannot be computed from them.
    if not np.allclose(wanted_BTV, found_BTV, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise _failed(f"its logits differ by up to {np.abs(wanted_BTV - found_BTV).max()}")


def _failed(what: str) -> CheckpointError:
    return CheckpointError(f"the export does not pass its check, nothing is kept of it: {what}")


@partial(jax.jit, static_argnums=0)
def _same(dtype: str, ours: Params, theirs: Params) -> Params:
    """Of each parameter, whether it is equal bit for bit: NaN equals NaN, 0 is not -0."""
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
