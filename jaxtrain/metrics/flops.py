"""FLOPs of a model and the peak of a chip."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.batch import Batch

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Start of a device's kind → its dense bfloat16 FLOP/s, from the makers' data sheets."""


def find_peak_flops(device_kind: str) -> float | None:
    """Returns the FLOP/s of the longest name that the kind starts with; None if unknown."""
    known = [kind for kind in PEAK_FLOPS if device_kind.startswith(kind)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def count_matmul_parameters(params: Any, *, share_of_experts: float = 1.0) -> float:
    """Counts the parameters that a token is multiplied with: all but norms, biases and scales, an
    embedding only if it is also the head, of tokens, and of experts those that it takes.

    Each costs 2 FLOPs per token forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361); a
    pair of query and key costs 2 and 4 times query heads times the sizes of a key and a value."""
    count = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_head = name == "embed/embedding" and "head" not in params
        lookup_only = name.startswith("embed/") and not is_head
        vectors = ("norm", "bias", "sinks", "scale", "salt", "magnitude")
        if not lookup_only and not name.endswith(vectors):
            count += leaf.size * (share_of_experts if "/expert_" in name else 1)
    return count


def count_tokens(batch: Batch, windows: Sequence[tuple[int | None, float]]) -> dict[str, jax.Array]:
    """Counts sequences that have a token, their padded length, tokens, trained tokens, and pairs of
    a query and a key that it sees, summed over the layers.

    `windows` has one entry per layer, with the weight of its pairs. A document of n tokens has
    n * (n + 1) / 2 pairs, fewer with a window."""
    visible = jnp.where(batch.segments > 0, batch.positions + 1, 0)
    pairs = jnp.float32(0)
    for (window, weight), layers in Counter(windows).items():
        seen = visible if window is None else jnp.minimum(visible, window)
        pairs += weight * layers * jnp.sum(seen, dtype=jnp.float32)
    return {
        "rows": jnp.sum(batch.segments[..., 0] > 0, dtype=jnp.int32),
        "seqlen": jnp.int32(batch.tokens.shape[-1]),
        "tokens": jnp.sum(batch.segments > 0, dtype=jnp.int32),
        "trained_tokens": jnp.sum(batch.loss_weights > 0, dtype=jnp.int32),
        "pairs": pairs,
    }
