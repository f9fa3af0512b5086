"""Log-probabilities of tokens that are given, and whether a greedy reply would have them.

B sequences, T tokens, D width, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.batch import Batch
from jaxtrain.model.decoder import Params, merge

PLACES = 256  # whose logits are in memory at a time


@partial(jax.jit, static_argnums=0)
def score_targets(
    graph: nnx.GraphDef, params: Params, batch: Batch, targets_BT: Array
) -> tuple[Array, Array]:
    """Of each target, after the tokens of its document up to its place: the log-probability,
    float32 [B, T], and whether it is the likeliest, bool [B, T]."""
    model = merge(graph, params)
    hidden_BTD = model.hidden(batch)

    def score(place: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_D, target = place
        logits_V = model.logits(hidden_D[None, None])[0, 0]
        return logits_V[target] - jax.nn.logsumexp(logits_V), jnp.argmax(logits_V) == target

    places = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), targets_BT.reshape(-1)
    scores = lax.map(score, places, batch_size=PLACES)
    return jax.tree.map(lambda a: a.reshape(targets_BT.shape), scores)
