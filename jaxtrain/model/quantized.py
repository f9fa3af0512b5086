"""Frozen weights rounded by blocks to four or eight bits, as bitsandbytes has them: NF4, whose
scales are rounded too (Dettmers et al. 2023, arXiv:2305.14314), and int8.

A block is 64 consecutive inputs of one output. A weight [..., inputs, outputs], each several
dimensions, is kept as arrays in which a mesh cuts inputs between blocks only:

    codes          [..., S, 32, outputs] uint8, two numbers in each, or [..., S, 64, outputs] int8
    scales         [..., S, outputs]: the largest magnitude of each block, float32, or uint8 beside
    means, ranges  [..., S, outputs but the last, groups] float32: of 256 scales of neighbours

S blocks of all inputs, the last filled with zeros; R inputs, O outputs, each as one dimension.
"""

from collections.abc import Mapping
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.typing import DTypeLike

from jaxtrain.parallel.matrices import MATRICES, place_of
from jaxtrain.parallel.sharding import path_name

Kind = Literal["nf4", "int8"]
BLOCK = 64  # inputs that share a scale
GROUP = 256  # scales that share a mean and a range
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
"""Quantiles of a normal distribution, scaled to 1."""


def _dynamic_numbers() -> np.ndarray:
    """256 numbers from -1 to 1, of which each power of ten has twice as many as the one below it
    (Dettmers 2015, arXiv:1511.04561)."""
    powers = [10.0**exponent for exponent in range(-6, 1)]
    steps = [np.linspace(0.1, 1, 2**n + 1) for n in range(len(powers))]
    positive = [p * (s[:-1] + s[1:]) / 2 for p, s in zip(powers, steps, strict=True)]
    found = np.concatenate([*positive, *(-part for part in positive), [0.0, 1.0]])
    return np.sort(found).astype(np.float32)


SCALES = _dynamic_numbers()
WHOLE = ("mlp/router", "experts/router")
"""Matrices that are never quantised: a rounded score may choose another expert."""


class Form(NamedTuple):
    """What the arrays do not say of the weight that they are."""

    kind: Kind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class QuantizedWeight(nnx.Module):
    """Takes the place of a weight."""

    means: nnx.Param | None = None
    ranges: nnx.Param | None = None

    def __init__(self, form: Form, lead: tuple[int, ...]):
        self.form = form
        for name, part in part_shapes(form, lead).items():
            setattr(self, name, nnx.Param(jnp.zeros(part.shape, part.dtype)))

    @property
    def parts(self) -> dict[str, Array]:
        names = ("codes", "scales", *(("means", "ranges") if self.means is not None else ()))
        return {name: getattr(self, name)[...] for name in names}


def may_be_quantized(path: str) -> bool:
    """Whether this is the path of a matrix of a layer, or of one before the layers."""
    return (place := place_of(path)) in MATRICES and place not in WHOLE


def is_part(path: str) -> bool:
    """Whether this is the path of an array of a quantised weight."""
    return may_be_quantized(path.rpartition("/")[0])


def kind_of(params: Mapping[str, Any]) -> Kind | None:
    """How the weights of a tree are kept; None where none is quantised."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    parts = (leaf for path, leaf in leaves if path_name(path).endswith("/codes"))
    found = next(parts, None)
    return None if found is None else "int8" if found.dtype == np.int8 else "nf4"


def form_of(kind: Kind, path: str, shape: tuple[int, ...]) -> tuple[Form, tuple[int, ...]]:
    """How a parameter of this shape is kept, and the dimensions that number its matrices."""
    matrix = MATRICES[place_of(path)]
    num_lead, ends = len(matrix.lead), len(matrix.lead) + len(matrix.inputs)
    return Form(kind, shape[num_lead:ends], shape[ends:]), shape[:num_lead]


def part_shapes(form: Form, lead: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    blocks, *inner = -(-prod(form.inputs) // BLOCK), *form.outputs[:-1]
    shape = lambda *dims, dtype: jax.ShapeDtypeStruct((*lead, blocks, *dims), dtype)
    if form.kind == "int8":
        return {
            "codes": shape(BLOCK, *form.outputs, dtype=np.int8),
            "scales": shape(*form.outputs, dtype=np.float32),
        }
    of_scales = shape(*inner, -(-form.outputs[-1] // GROUP), dtype=np.float32)
    return {
        "codes": shape(BLOCK // 2, *form.outputs, dtype=np.uint8),
        "scales": shape(*form.outputs, dtype=np.uint8),
        "means": of_scales,
        "ranges": of_scales,
    }


def quantize(form: Form, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a weight [..., inputs, outputs], on the host."""
    lead = weight.shape[: weight.ndim - len(form.inputs) - len(form.outputs)]
    R, O = prod(form.inputs), prod(form.outputs)
    blocks = np.zeros((*lead, -(-R // BLOCK) * BLOCK, O), np.float32)
    blocks[..., :R, :] = weight.reshape(*lead, R, O)
    blocks = blocks.reshape(*lead, -1, BLOCK, O)
    largest = np.abs(blocks).max(-2)
    blocks /= np.where(largest > 0, largest, 1)[..., None, :]
    if form.kind == "int8":
        found = {"codes": np.rint(blocks * 127).astype(np.int8), "scales": largest}
    else:
        codes = _nearest(NF4, blocks)
        pairs = codes[..., : BLOCK // 2, :] << 4 | codes[..., BLOCK // 2 :, :]
        found = {"codes": pairs} | _quantize_scales(largest.reshape(-1, form.outputs[-1]))
    shapes = part_shapes(form, lead)
    return {name: part.reshape(shapes[name].shape) for name, part in found.items()}


def _quantize_scales(scales: np.ndarray) -> dict[str, np.ndarray]:
    """Each [rows, O] in groups of neighbours."""
    starts = np.arange(0, scales.shape[-1], GROUP)
    sizes = np.diff([*starts, scales.shape[-1]])
    means = np.add.reduceat(scales, starts, -1) / sizes.astype(np.float32)
    apart = scales - np.repeat(means, sizes, -1)
    ranges = np.maximum.reduceat(np.abs(apart), starts, -1)
    shares = apart / np.repeat(np.where(ranges > 0, ranges, 1), sizes, -1)
    return {"scales": _nearest(SCALES, shares), "means": means, "ranges": ranges}


def _nearest(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of the nearest of some numbers in order, the lower of two as near."""
    between = (numbers[:-1] + numbers[1:]) / 2
    return np.searchsorted(between, values).astype(np.uint8)


def dequantize(form: Form, parts: Mapping[str, Array], dtype: DTypeLike) -> Array:
    """The weight that the arrays are, computed in float32."""
    codes, scales = parts["codes"], parts["scales"]
    num_outputs = len(form.outputs)
    if form.kind == "int8":
        numbers, scales = codes.astype(jnp.float32), scales / 127
    else:
        both = (codes >> 4, codes & 15)
        numbers = jnp.concatenate([_look_up_nf4(c) for c in both], axis=-num_outputs - 1)
        widen = lambda a: jnp.repeat(a, GROUP, axis=-1)[..., : form.outputs[-1]]
        scales = jnp.asarray(SCALES)[scales] * widen(parts["ranges"]) + widen(parts["means"])
    lead = codes.shape[: codes.ndim - num_outputs - 2]
    weight = numbers * jnp.expand_dims(scales, -num_outputs - 1)
    weight = weight.astype(dtype).reshape(*lead, -1, *form.outputs)
    filled = (slice(None),) * len(lead) + (slice(prod(form.inputs)),)
    return weight[filled].reshape(*lead, *form.inputs, *form.outputs)


def _look_up_nf4(codes: Array) -> Array:
    """By choices between two, four to a number: a gather is slow on TPU and CPU.

    The choices are made with bits, since `where` between two numbers makes arrays of them, which
    JAX takes out of the loop over the layers: all sixteen would be in memory, in float32.
    """
    numbers: list[Any] = [int(bits) for bits in NF4.view(np.int32)]
    for bit in range(4):
        mask = -(codes >> bit & 1).astype(jnp.int32)  # all bits, or none
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        numbers = [lower ^ (mask & (lower ^ upper)) for lower, upper in pairs]
    return lax.bitcast_convert_type(numbers[0], jnp.float32)
