"""Weights in four and eight bits: the published numbers, the blocks, products and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.model.layers import dense
from jaxtrain.model.quantized import (
    BLOCK,
    GROUP,
    NF4,
    SCALES,
    Form,
    QuantizedWeight,
    dequantize,
    part_shapes,
    quantize,
)

# Dettmers et al. 2023, appendix E, and what bitsandbytes prints of its table.
PUBLISHED = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FORMS = {
    "of whole blocks": ((), (128,), (3, 5)),
    "of several inputs": ((2,), (4, 3, 16), (40,)),
    "of a part of a block": ((3,), (40,), (2, 300)),
    "of experts": ((2, 3), (72,), (2, 6)),
}


def weight_of(lead, inputs, outputs, *, seed=0):
    draw = np.random.default_rng(seed)
    size = (*lead, *inputs, *outputs)
    return (draw.normal(size=size) * draw.uniform(0.2, 3, size=size[-1:])).astype(np.float32)


def rows_of(lead, inputs, outputs, weight):
    """As torch has them: [..., outputs, inputs]."""
    flat = weight.reshape(*lead, int(np.prod(inputs)), int(np.prod(outputs)))
    return flat.swapaxes(-1, -2).reshape(-1, int(np.prod(inputs)))


def test_the_sixteen_numbers_are_those_of_the_paper_and_the_scales_those_of_bitsandbytes():
    np.testing.assert_array_equal(NF4, np.array(PUBLISHED, np.float32))
    assert len(SCALES) == len(set(SCALES.tolist())) == 256
    ends = [-0.99296875, -0.97890625, -5.5e-07, 0.0, 5.5e-07, 0.97890625, 0.99296875, 1.0]
    found = SCALES[[0, 1, 126, 127, 128, 253, 254, 255]]
    np.testing.assert_allclose(found, ends, rtol=1e-6)


@pytest.mark.parametrize("case", FORMS)
def test_a_block_is_64_inputs_of_an_output_each_at_the_nearest_of_its_numbers(case):
    """By a loop over the blocks of the tensor of torch."""
    lead, inputs, outputs = FORMS[case]
    weight = weight_of(lead, inputs, outputs)
    form = Form("nf4", inputs, outputs)
    parts = quantize(form, weight)
    shapes = part_shapes(form, lead)
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {
        k: (s.shape, s.dtype) for k, s in shapes.items()
    }
    found = rows_of(lead, inputs, outputs, np.asarray(dequantize(form, parts, jnp.float32)))
    for row, ours in zip(rows_of(lead, inputs, outputs, weight), found, strict=True):
        for begin in range(0, len(row), BLOCK):
            block, mine = row[begin : begin + BLOCK], ours[begin : begin + BLOCK]
            largest = np.abs(block).max()
            distance = np.abs(block[:, None] / largest - np.array(PUBLISHED)[None])
            nearest = np.array(PUBLISHED)[distance.argmin(1)]
            scale = np.abs(mine).max()
            # Neighbours of the rounded scales lie 0.9 / 64 of their range apart at most.
            assert abs(scale - largest) <= 0.9 / 128 * np.abs(weight).max()
            np.testing.assert_allclose(mine, scale * nearest, rtol=1e-5, atol=1e-6)


def test_scales_are_rounded_like_their_groups_of_256():
    """The mean of a group is taken off, and the rest is at the nearest of 256 numbers."""
    inputs, outputs = (64,), (2, GROUP + 44)
    weight = weight_of((), inputs, outputs)
    parts = quantize(Form("nf4", inputs, outputs), weight)
    largest = np.abs(weight).max(0)
    for row in range(2):
        for group, part in enumerate((slice(0, GROUP), slice(GROUP, None))):
            scales = largest[row, part]
            mean = scales.mean(dtype=np.float32)
            reach = np.abs(scales - mean).max()
            nearest = np.abs((scales - mean)[:, None] / reach - SCALES[None]).argmin(1)
            np.testing.assert_array_equal(parts["scales"][0, row, part], nearest)
            np.testing.assert_allclose(parts["means"][0, row, group], mean, rtol=1e-6)
            np.testing.assert_allclose(parts["ranges"][0, row, group], reach, rtol=1e-5)


@pytest.mark.parametrize("case", FORMS)
def test_int8_is_within_half_a_step_of_the_largest_number_of_its_block(case):
    lead, inputs, outputs = FORMS[case]
    weight = weight_of(lead, inputs, outputs)
    form = Form("int8", inputs, outputs)
    found = np.asarray(dequantize(form, quantize(form, weight), jnp.float32))
    pairs = (rows_of(lead, inputs, outputs, w) for w in (weight, found))
    for row, ours in zip(*pairs, strict=True):
        for begin in range(0, len(row), BLOCK):
            block, mine = row[begin : begin + BLOCK], ours[begin : begin + BLOCK]
            assert np.abs(block - mine).max() <= np.abs(block).max() / 254 * 1.001


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_zeros_stay_zeros(kind):
    weight = weight_of((), (128,), (4,))
    weight[:64, 1] = 0
    form = Form(kind, (128,), (4,))
    found = np.asarray(dequantize(form, quantize(form, weight), jnp.float32))
    assert not found[:64, 1].any() and found[64:, 1].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_product_is_that_of_the_whole_weight_which_nothing_keeps(kind, dtype):
    inputs, outputs = (4, 2, 16), (3, 24)
    form = Form(kind, inputs, outputs)
    parts = quantize(form, weight_of((), inputs, outputs))
    weight = QuantizedWeight(form, ())
    for name, part in parts.items():
        getattr(weight, name)[...] = jnp.asarray(part)
    x = jax.random.normal(jax.random.key(0), (2, 5, *inputs), dtype)
    whole = dequantize(form, parts, dtype)
    y, back = jax.vjp(lambda x: dense(x, weight, contract=3), x)
    expected, back_whole = jax.vjp(lambda x: dense(x, whole, contract=3), x)
    unit = {jnp.float32: 5e-7, jnp.bfloat16: 2e-3}[dtype]
    for found, wanted in ((y, expected), (back(y)[0], back_whole(y)[0])):
        found, wanted = (np.asarray(a, np.float32) for a in (found, wanted))
        atol = unit * np.abs(wanted).max() * 128**0.5
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)
    kept = [leaf for leaf in jax.tree.leaves(back) if leaf.size >= whole.size]
    assert all(leaf.dtype == jnp.int8 for leaf in kept), [leaf.dtype for leaf in kept]
