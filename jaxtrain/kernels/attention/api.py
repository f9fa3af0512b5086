"""The public attention function, and the choice of its implementation for a platform."""

from functools import partial
from typing import Literal, NamedTuple

from jax import Array

from jaxtrain.kernels.attention.context import REFERENCE, Blocks, Exchange, attend_over_context
from jaxtrain.kernels.attention.mask import Scoring, TokenPositions
from jaxtrain.kernels.attention.reference import reference_attention
from jaxtrain.kernels.attention.splash import LANES, splash_attention, splash_fault
from jaxtrain.kernels.attention.splash_blocks import splash_block, splash_block_backward
from jaxtrain.kernels.axes import context_parts

IMPLEMENTATIONS = {
    "reference": reference_attention,
    "splash": partial(splash_attention, interpret=False),
    "splash_interpret": partial(splash_attention, interpret=True),
}
RING_BLOCKS = {
    name: Blocks(partial(splash_block, interpret=i), partial(splash_block_backward, interpret=i))
    for name, i in (("splash", False), ("splash_interpret", True))
}
"""Implementation → what a ring attends with; windows, and the others, have those of `reference`."""
Wanted = Literal["auto", "pallas", "reference"]


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    scoring: Scoring,
    sinks_N: Array | None = None,
    implementation: str = "reference",
    exchange: Exchange | None = None,
) -> Array:
    """Causal attention inside each segment, [B, T, N, H] in the dtype of q; softmax in float32.
    Values, and so the result, may have another size than keys.

    A query sees a key of its own segment at the same or an earlier position, at most
    `scoring.window - 1` back. `sinks_N` are scores of nothing, to which every query of a head
    attends too. Padding (segment 0) gives exactly 0 and gets no gradient. T == S is
    self-attention, and positions must rise with the index inside a segment. With T != S the keys
    are a cache, in any order; an empty slot has segment 0 and finite contents. `implementation` is
    the name that `choose` returns, or 'splash_interpret' for a test on CPU; an implementation that
    does not support a shape raises NotImplementedError.

    With an `exchange`, self-attention of sequences that a mesh cuts goes over its devices that way:
    as 'ring' in the order of `to_ring_order`.
    """
    attend = IMPLEMENTATIONS[implementation]
    if exchange is not None and context_parts(q_BTNH.shape[1]) > 1:
        blocks = REFERENCE if scoring.window else RING_BLOCKS.get(implementation, REFERENCE)
        return attend_over_context(
            attend, blocks, exchange, scoring, q_BTNH, k_BSKH, v_BSKH, q_positions, sinks_N
        )
    return attend(scoring, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions, sinks_N)


class Choice(NamedTuple):
    name: str
    """the `implementation` to pass to `attention`"""
    reason: str
    """one sentence for the log"""


def choose(platform: str, *, wanted: Wanted, head_size: int, tokens: int) -> Choice:
    """Chooses for sequences of `tokens`; ValueError if the wanted implementation cannot run."""
    if wanted == "reference":
        return Choice("reference", "attention: plain jnp, as set in the recipe")
    fault = _pallas_fault(platform, head_size)
    if wanted == "auto" and fault is None and tokens < LANES:
        fault = f"sequences of {tokens} tokens are shorter than the {LANES} that splash needs"
    if fault is None:
        return Choice("splash", "attention: splash, the Pallas kernel for TPU")
    if wanted == "pallas":
        raise ValueError(f"attention 'pallas' cannot run: {fault}; use 'auto' or 'reference'")
    return Choice("reference", f"attention: plain jnp in blocks of queries, since {fault}")


def _pallas_fault(platform: str, head_size: int) -> str | None:
    if platform == "tpu":
        return splash_fault(head_size=head_size)
    if platform in ("gpu", "cuda", "rocm"):
        return "there is no kernel for packed sequences on GPU yet"
    return f"there is no Pallas kernel for platform {platform!r}"
