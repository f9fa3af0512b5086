"""Feed-forward experts: each token goes through those that its router chose, and none is dropped.

The choices of all tokens are sorted by expert, so that the rows of an expert lie together, and one
grouped product multiplies each group with the weights of its expert (`grouped_product.py`).

B batch, T tokens, C choices of each token, R = B * T * C rows, D width, E experts, U 2 with a gate
and else 1, M feed-forward of each expert.
"""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from jaxtrain.kernels.axes import (
    CONTEXT_AXIS,
    TENSOR_AXIS,
    batch_axes,
    context_parts,
    free_axis_sizes,
)
from jaxtrain.kernels.grouped_product import grouped_product

EXPERT_AXIS = "expert"


class ExpertWeights(NamedTuple):
    gate_up_EDUM: Array
    gate_up_bias_EUM: Array | None
    down_EMD: Array
    gate_up_a_EDr: Array | None = None
    """with `gate_up_b` the factors of a matrix of low rank that is added to `gate_up`"""
    gate_up_b_ErUM: Array | None = None
    down_a_EMr: Array | None = None
    """the same of `down`"""
    down_b_ErD: Array | None = None


def mix_experts(
    weights: ExpertWeights,
    x_BTD: Array,
    choices_BTC: Array,
    shares_BTC: Array,
    *,
    activate: Callable[[Array], Array],
) -> Array:
    """The sum of what the chosen experts make of each token, each times its share, [B, T, D] in the
    dtype of x; `activate` maps [R, U, M] to [R, M].

    On a mesh each device works on the tokens of its own part of batch and sequences. Those that
    share the `expert` axis gather the tokens of all of them, compute their own experts for these,
    and send the sums back: a token crosses the axis twice, and a device has room for every choice
    of all of these tokens, since all may fall on its experts.
    """
    sizes = free_axis_sizes()
    if jax.sharding.get_abstract_mesh().size == 1 or not sizes:
        y_BTD = _mix(weights, x_BTD, choices_BTC, shares_BTC, activate)
        return y_BTD.astype(x_BTD.dtype)
    batch = batch_axes(sizes, TENSOR_AXIS)
    tensor = TENSOR_AXIS if TENSOR_AXIS in sizes else None
    expert = EXPERT_AXIS if sizes.get(EXPERT_AXIS, 1) > 1 else None

    def local(weights: ExpertWeights, x_BTD: Array, choices_BTC: Array, shares_BTC: Array) -> Array:
        first = 0
        if expert is not None:
            first = lax.axis_index(expert) * weights.down_EMD.shape[0]
            gather = lambda a: lax.all_gather(a, expert, tiled=True)
            x_BTD, choices_BTC, shares_BTC = map(gather, (x_BTD, choices_BTC, shares_BTC))
        y_BTD = _mix(weights, x_BTD, choices_BTC - first, shares_BTC, activate)
        if tensor is not None:
            y_BTD = lax.psum(y_BTD, tensor)
        return y_BTD if expert is None else lax.psum_scatter(y_BTD, expert, tiled=True)

    rows = P(batch, CONTEXT_AXIS if context_parts(x_BTD.shape[1]) > 1 else None, None)
    # The spec of one that is None is of no tree, and fits it.
    specs: Any = (
        P(expert, None, None, tensor), P(expert, None, tensor), P(expert, tensor, None),
        P(expert, None, None), P(expert, None, None, tensor), P(expert, tensor, None), P(expert),
    )  # fmt: skip
    mapped = jax.shard_map(
        local,
        in_specs=(ExpertWeights(*specs), rows, rows, rows),
        out_specs=rows,
        axis_names=set(sizes),
        check_vma=False,
    )
    # A batch that does not split, as in generation, is filled up.
    fill = -x_BTD.shape[0] % prod(sizes[a] for a in batch)
    pad = lambda a: jnp.pad(a, ((0, fill), (0, 0), (0, 0)))
    y_BTD = mapped(weights, pad(x_BTD), pad(choices_BTC), pad(shares_BTC))
    return y_BTD[: x_BTD.shape[0]].astype(x_BTD.dtype)


def _mix(
    weights: ExpertWeights,
    x_BTD: Array,
    choices_BTC: Array,
    shares_BTC: Array,
    activate: Callable[[Array], Array],
) -> Array:
    """The same of the experts that are here, numbered from 0; float32."""
    (B, T, D), C = x_BTD.shape, choices_BTC.shape[-1]
    E, M, _ = weights.down_EMD.shape
    expert_R = choices_BTC.reshape(-1)
    is_here_R = (expert_R >= 0) & (expert_R < E)
    expert_R = jnp.where(is_here_R, expert_R, E)  # the others come last, in no group
    order_R = jnp.argsort(expert_R)
    back_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(order_R.size, dtype=order_R.dtype))
    sizes_E = jnp.zeros(E + 1, jnp.int32).at[expert_R].add(1)[:E]

    x_RD = _permute(jnp.repeat(x_BTD.reshape(-1, D), C, axis=0), order_R, back_R)

    def grouped(x: Array, w: Array, a: Array | None = None, b: Array | None = None) -> Array:
        y = grouped_product(x, w.reshape(*w.shape[:2], -1).astype(x.dtype), sizes_E)
        return y if a is None or b is None else y + grouped(grouped(x, a), b)

    wide_R = grouped(x_RD, weights.gate_up_EDUM, weights.gate_up_a_EDr, weights.gate_up_b_ErUM)
    if weights.gate_up_bias_EUM is not None:
        # As a product, whose gradient is a sum over each group and no scatter.
        ones_R1 = jnp.ones((x_RD.shape[0], 1), x_RD.dtype)
        wide_R += grouped(ones_R1, weights.gate_up_bias_EUM[:, None])
    mid_RM = activate(wide_R.reshape(wide_R.shape[0], -1, M))
    y_RD = grouped(mid_RM, weights.down_EMD, weights.down_a_EMr, weights.down_b_ErD)
    y_BTCD = _permute(y_RD, back_R, order_R).reshape(B, T, C, D)
    return jnp.einsum(
        "btcd,btc->btd", y_BTCD, shares_BTC.astype(y_BTCD.dtype), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def _permute(x_RD: Array, order_R: Array, back_R: Array) -> Array:
    """x in another order; `back_R` is its inverse, so that the gradient is no scatter either."""
    del back_R
    return x_RD[order_R]


_permute.defvjp(
    lambda x_RD, order_R, back_R: (x_RD[order_R], back_R),
    lambda back_R, dy_RD: (dy_RD[back_R], None, None),
)
