"""The public attention function."""

from functools import partial

from jax import Array

from jaxtrain.kernels.attention.mask import TokenPositions
from jaxtrain.kernels.attention.reference import reference_attention
from jaxtrain.kernels.attention.splash import splash_attention

IMPLEMENTATIONS = {
    "reference": reference_attention,
    "splash": partial(splash_attention, interpret=False),
    "splash_interpret": partial(splash_attention, interpret=True),
}


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    q_positions: TokenPositions,
    kv_positions: TokenPositions,
    window: int | None = None,
    implementation: str = "reference",
) -> Array:
    """Causal attention inside each segment, [B, T, N, H] in the dtype of q; softmax in float32.

    A query sees a key of its own segment at the same or an earlier position, at most `window - 1`
    back. Padding (segment 0) gives exactly 0 and gets no gradient. T == S is self-attention, and
    positions must rise with the index inside a segment. With T != S the keys are a cache, in any
    order; an empty slot has segment 0 and finite contents. `implementation` is the name that
    `choose` returns, or 'splash_interpret' for a test on CPU; an implementation that does not
    support a shape raises NotImplementedError.
    """
    attend = IMPLEMENTATIONS[implementation]
    return attend(window, q_BTNH, k_BSKH, v_BSKH, q_positions, kv_positions)
