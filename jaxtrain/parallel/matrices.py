"""The matrices of a model: the weights that its tokens are multiplied with.

Each is [lead, inputs, outputs], several dimensions each: lead numbers matrices, those of layers and
of experts. An adapter beside one, and the blocks in the place of one that is quantised, have
dimensions of the same kinds:

    <matrix>_lora/<module>/  a [lead, inputs, r], b [lead, r, outputs], magnitude [lead, outputs]
    <matrix>/                codes [lead, blocks of inputs, block, outputs],
                             scales [lead, blocks of inputs, outputs]
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

Axes = tuple[str | None, ...]
"""The logical axis of each dimension."""


class Matrix(NamedTuple):
    lead: Axes
    inputs: Axes
    outputs: Axes

    @property
    def axes(self) -> Axes:
        return (*self.lead, *self.inputs, *self.outputs)


def _matrix(text: str, *lead: str | None) -> Matrix:
    """Parses `inputs -> outputs`, with a dot for a dimension that is never split."""
    read = lambda part: tuple(None if axis == "." else axis for axis in part.split())
    inputs, outputs = map(read, text.split("->"))
    return Matrix(lead or ("layers",), inputs, outputs)


_EXPERTS = {
    "router": _matrix("embed -> ."),
    "expert_gate_up": _matrix("embed -> . ffn", "layers", "experts"),
    "expert_down": _matrix("ffn -> embed", "layers", "experts"),
}
MATRICES = {
    "attention/qkv": _matrix("embed -> kv_heads . ."),
    "attention/q": _matrix("embed -> kv_heads ."),
    "attention/q_a": _matrix("embed -> ."),
    "attention/q_b": _matrix("embed -> kv_heads ."),
    "attention/kv_a": _matrix("embed -> ."),
    "attention/kv_b": _matrix("embed -> kv_heads ."),
    "attention/out": _matrix("kv_heads . . -> embed"),
    "mixer/in_qkv": _matrix("embed -> delta_heads ."),
    "mixer/in_gate": _matrix("embed -> delta_heads . ."),
    "mixer/in_strength": _matrix("embed -> delta_heads ."),
    "mixer/in_decay": _matrix("embed -> delta_heads ."),
    "mixer/out": _matrix("delta_heads . . -> embed"),
    "mixer/in_bcx": _matrix("embed -> . conv"),
    "mixer/conv_out": _matrix("conv -> embed"),
    "mlp/gate_up": _matrix("embed -> . ffn"),
    "mlp/down": _matrix("ffn -> embed"),
    "mlp/shared/gate_up": _matrix("embed -> . ffn"),
    "mlp/shared/down": _matrix("ffn -> embed"),
    "mlp/shared_gate": _matrix("embed -> ."),
    **{f"{part}/{name}": one for part in ("mlp", "experts") for name, one in _EXPERTS.items()},
    "layer_input/narrow": _matrix("embed -> ."),
    "layer_input/widen": _matrix(". -> embed"),
    "layer_inputs/project": _matrix("embed -> . .", None),
}
"""Path in its layer, or in the decoder of one before the layers, which has a lead of 1 → matrix."""
BLOCKS = {
    "kv_heads": "head_blocks", "delta_heads": "delta_blocks", "conv": "conv_blocks",
    "ffn": "ffn_blocks",
}  # fmt: skip
"""Axis of inputs → that of their blocks, where it is another: a device has whole blocks."""


def place_of(path: str) -> str:
    """The path of a parameter in its layer: without `layers/<group>/<member>/`."""
    return re.sub(r"^layers/\d+/\d+/", "", path)


def axes_of_product(path: str) -> Axes | None:
    """The axes of inputs and outputs of a matrix, or of a factor of an adapter beside one."""
    place, _, factor = place_of(path).partition("_lora/")
    if (matrix := MATRICES.get(place)) is None:
        return None
    inputs, outputs = matrix.inputs, matrix.outputs
    axes = {"": inputs + outputs, "a": (*inputs, None), "b": (None, *outputs)}
    return axes.get(factor.rpartition("/")[2])


def axes_of_matrices() -> Iterator[tuple[str, Axes]]:
    """A regular expression of the path of each array, and its axes, none where it ends."""
    for place, matrix in MATRICES.items():
        lead, inputs, outputs = matrix
        path = place if lead[0] is None else rf"layers/\d+/\d+/{place}"
        blocks = inputs[0] and BLOCKS.get(inputs[0], inputs[0])
        yield path, matrix.axes
        yield rf"{path}_lora/.*/a", (*lead, *inputs)
        yield rf"{path}_lora/.*/b", (*lead, None, *outputs)
        yield rf"{path}_lora/.*/magnitude", (*lead, *outputs)
        yield f"{path}/codes", (*lead, blocks, None, *outputs)
        yield f"{path}/scales", (*lead, blocks, *outputs)
