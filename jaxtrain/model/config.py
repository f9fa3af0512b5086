"""The architecture of a decoder and how it is computed: hashable, so static under jit."""

from dataclasses import dataclass
from typing import Literal

from jaxtrain.model.rope import Rope


@dataclass(frozen=True)
class LayerSpec:
    """The settings that may differ between layers."""

    window: int | None = None
    """number of last tokens that a query sees, itself included; None: all of its document"""


@dataclass(frozen=True)
class LayerGroup:
    """A repeating pattern of layers; each member is stacked over the repeats and scanned."""

    layers: tuple[LayerSpec, ...]
    repeats: int


@dataclass(frozen=True)
class DecoderConfig:
    family: str
    vocab_size: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_width: int
    groups: tuple[LayerGroup, ...]
    rope: Rope
    rms_eps: float
    max_positions: int
    tied: bool = False
    """the head is the embedding"""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """an RMS norm over each head of queries and keys, before their rotation"""
    initializer_range: float = 0.02
    """standard deviation of random weights"""

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) * group.repeats for group in self.groups)

    def layer_numbers(self, group: int, layer: int) -> range:
        """Numbers in the whole stack of the layers that one stacked member holds."""
        before = sum(len(g.layers) * g.repeats for g in self.groups[:group])
        period = len(self.groups[group].layers)
        return range(before + layer, before + period * self.groups[group].repeats, period)


@dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is computed; changes no result beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "reference"
    """implementation of the attention kernel"""
    remat: Literal["full", "dots", "none"] = "full"
    """what is recomputed in the backward pass: layers, all but their matrix products, nothing"""
    remat_every: int = 1
    """applies `remat` to every n-th layer of a stack; the others save everything"""
    tiled_mlp: bool = False
    """feed-forward layers process as many tokens at a time as the model is wide"""
    stages: int = 1
    """parts of the stack over the `pipeline` axis"""
    microbatches: int = 1
    """parts of a batch that pass through the stages"""


def group_layers(layers: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """Groups the stack by what repeats: equal layers, or a longer pattern."""
    groups = []
    while layers:
        period, repeats = max(
            ((period, _repeats(layers, period)) for period in range(1, len(layers) + 1)),
            key=lambda pair: (pair[0] * pair[1] if pair[1] > 1 else 0, -pair[0]),
        )
        groups.append(LayerGroup(layers[:period], repeats))
        layers = layers[period * repeats :]
    return tuple(groups)


def _repeats(layers: tuple[LayerSpec, ...], period: int) -> int:
    """How often the first `period` layers repeat from the start."""
    repeats = 1
    while layers[repeats * period :][:period] == layers[:period]:
        repeats += 1
    return repeats
