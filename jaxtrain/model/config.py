"""The architecture of a decoder and how it is computed: hashable, so static under jit."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from jaxtrain.model.rope import Rope

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True)
class Norm:
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    zero_centered: bool = False
    """the scale is stored less 1"""
    has_bias: bool = False


@dataclass(frozen=True)
class Experts:
    """Feed-forward layers of which each token takes a few, and how a router chooses them."""

    count: int
    per_token: int
    width: int
    """feed-forward channels of each"""
    is_normalized: bool = True
    """the weights of those that a token takes sum to 1; else they are their probabilities among all
    """
    has_bias: bool = False
    """the router and the experts have biases"""
    swiglu_alpha: float = 1.0
    swiglu_limit: float | None = None
    """with a limit, gate and up make (up + 1) * gate * sigmoid(alpha * gate), both cut above it and
    up below its negative too"""
    is_beside_mlp: bool = False
    """they are added to a feed-forward layer that every token takes, each with norms of its own;
    the router reads the residual stream, normalised, and learns a scale of each expert's share"""
    balance_loss: float = 0.0
    """coefficient of the load-balancing loss of training; 0 is off"""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """what a router makes of its logits"""
    has_choice_bias: bool = False
    """a number for each expert, which nothing trains, counts in the choice and not in the share"""
    groups: int = 1
    """neighbouring experts of which a token takes only those of some groups"""
    groups_per_token: int = 1
    share_scale: float = 1.0
    """of all shares"""
    shared_width: int = 0
    """feed-forward channels that every token takes besides"""
    has_shared_gate: bool = False
    """what these add is multiplied by a gate of each token"""


@dataclass(frozen=True)
class Latent:
    """Attention whose keys and values are made of a few numbers of each token (DeepSeek-AI, 2024,
    arXiv:2405.04434, section 2.1); `DecoderConfig.head_size` counts the rotated channels."""

    q_rank: int | None
    """numbers of which the queries of a token are made; None: of the token itself"""
    kv_rank: int
    plain_size: int
    """channels of a query and a key that are not rotated"""
    value_size: int


@dataclass(frozen=True)
class Delta:
    """Sizes of layers of the gated delta rule."""

    num_key_heads: int
    num_value_heads: int
    key_size: int
    value_size: int
    conv_taps: int
    """tokens that the convolution before it spans"""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Key heads, value heads to each, key size, value size."""
        groups = self.num_value_heads // self.num_key_heads
        return self.num_key_heads, groups, self.key_size, self.value_size

    @property
    def channels(self) -> int:
        """Of the query, the key and the values of a key head."""
        _, groups, key_size, value_size = self.sizes
        return 2 * key_size + groups * value_size


@dataclass(frozen=True)
class LayerSpec:
    """The settings that may differ between layers."""

    window: int | None = None
    """number of last tokens that a query sees, itself included; None: all of its document"""
    rope: Rope | None = None
    """how queries and keys are rotated; None: not at all"""
    has_experts: bool = False
    """the feed-forward layer is `DecoderConfig.experts`"""
    mixer: Literal["attention", "latent", "delta", "conv"] = "attention"
    """how tokens are mixed: a key of `block.MIXERS`"""
    head_size: int | None = None
    num_kv_heads: int | None = None
    ffn_width: int | None = None
    """these three: None is that of the decoder"""
    values_are_keys: bool = False
    """values are the keys before their norm and rotation; there is no projection of their own"""
    writes_keys: str | None = None
    """later layers may read its keys and values under this name, those of the last writer"""
    reads_keys: str | None = None
    """the name of keys and values that an earlier layer writes and this one takes for its own"""

    @property
    def is_recurrent(self) -> bool:
        """Whether tokens are mixed through a state of fixed size; its parameters stand under
        `mixer`, others under `attention`."""
        return self.mixer in ("delta", "conv")

    @property
    def num_kv_projections(self) -> int:
        return 0 if self.reads_keys else 1 if self.values_are_keys else 2


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
    norm: Norm
    max_positions: int
    num_layers_behind: int = 0
    """that files have after the last layer, to predict further tokens; they are not read"""
    experts: Experts | None = None
    latent: Latent | None = None
    delta: Delta | None = None
    conv_taps: int = 0
    """tokens that a layer of convolution spans"""
    conv_bias: bool = False
    tied: bool = False
    """the head is the embedding"""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated_attention: bool = False
    """what each head makes of the values is multiplied by a gate, which is made as a query is"""
    attention_sinks: bool = False
    """queries attend to a learned score of nothing too, one of each head"""
    qk_norm: Literal["head", "all_heads"] | None = None
    """a norm over each head of queries and keys, or over all at once, before their rotation"""
    v_norm: bool = False
    """a norm over each head of the values, without a scale"""
    norm_place: Literal["before", "after", "around"] = "before"
    """where attention and feed-forward are normalised: what they read, what they add, or both"""
    parallel_block: bool = False
    """attention and feed-forward read the same residual stream"""
    shared_norm: bool = False
    """and the same norm of it"""
    gated_mlp: bool = True
    activation: Activation = "silu"
    learned_positions: bool = False
    """an embedding of positions is added to that of tokens"""
    per_layer_width: int = 0
    """channels of the input that each layer has of its own, made of the token; 0 without"""
    has_layer_scale: bool = False
    """each layer multiplies what it returns by a number, which is not trained"""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """of what attention and feed-forward add"""
    attention_scale: float | None = None
    """of the scores; None: head_size ** -0.5"""
    attention_softcap: float | None = None
    """caps the scores s at this c, as c * tanh(s / c)"""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """caps the scaled logits"""
    initializer_range: float = 0.02
    """standard deviation of random weights"""

    @property
    def query_size(self) -> int:
        """Channels of a query and a key of one head."""
        return self.head_size + (self.latent.plain_size if self.latent else 0)

    @property
    def value_size(self) -> int:
        return self.latent.value_size if self.latent else self.head_size

    @property
    def num_layers(self) -> int:
        return sum(len(group.layers) * group.repeats for group in self.groups)

    @property
    def num_expert_layers(self) -> int:
        return sum(
            spec.has_experts * group.repeats for group in self.groups for spec in group.layers
        )

    def of_layer(self, spec: LayerSpec) -> "DecoderConfig":
        """With the sizes of one layer in place of those of most."""
        sizes = {
            "head_size": spec.head_size,
            "num_kv_heads": spec.num_kv_heads,
            "ffn_width": spec.ffn_width,
        }
        return replace(self, **{name: size for name, size in sizes.items() if size is not None})

    @property
    def layer_kinds(self) -> tuple[LayerSpec, ...]:
        """The different layers."""
        return tuple(dict.fromkeys(spec for group in self.groups for spec in group.layers))

    @property
    def ropes(self) -> tuple[tuple[Rope, int], ...]:
        """The different rotations of the layers, and the size of the heads that they rotate."""
        return tuple(dict.fromkeys(
            (spec.rope, spec.head_size or self.head_size)
            for spec in self.layer_kinds if spec.rope is not None
        ))  # fmt: skip

    def layer_numbers(self, group: int, layer: int) -> range:
        """Numbers in the whole stack of the layers that one stacked member holds."""
        before = sum(len(g.layers) * g.repeats for g in self.groups[:group])
        period = len(self.groups[group].layers)
        return range(before + layer, before + period * self.groups[group].repeats, period)


@dataclass(frozen=True)
class ComputeConfig:
    """How a decoder is computed; changes no result beyond rounding."""

    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    matmul: Literal["fp8"] | None = None
    """what matrices of layers are multiplied in, where it is not the compute dtype"""
    attention: str = "reference"
    """implementation of the attention kernel"""
    exchange: Literal["all_to_all", "ring"] | None = None
    """how attention goes over the `context` axis; None where nothing cuts sequences"""
    remat: Literal["full", "attention", "dots", "none"] = "full"
    """what is recomputed in the backward pass: layers, all of them but attention, all but products
    with matrices too, nothing"""
    remat_every: int = 1
    """applies `remat` to every n-th layer of a stack; the others save everything"""
    routing_replay: bool = False
    """what is recomputed keeps the choices of the routers"""
    offload_inputs: bool = False
    """inputs of recomputed layers are in the host's memory until then"""
    tiled_mlp: bool = False
    """feed-forward layers process as many tokens at a time as the model is wide"""
    splits_gradients: bool = False
    """devices that hold the same parameters have parts of their gradients"""
    stages: int = 1
    """parts of the stack over the `pipeline` axis"""
    microbatches: int = 1
    """parts of a batch that pass through the stages"""


class AdapterSite(NamedTuple):
    """The low-rank adapters of one module in the layers of a stack, which is a parameter or joined
    with others into one."""

    name: str
    """of the module, without its layer: `q_proj`"""
    begin: int
    end: int
    """its entries of the last dimension but one of the parameter, where several are joined; equal
    for the whole of a parameter"""
    ranks: tuple[int, ...]
    """of each layer; 0 without an adapter"""
    scales: tuple[float, ...]
    dropout: float
    """probability that an input is 0 in training"""
    is_dora: bool = False
    """the columns of the adapted weight have lengths of their own"""


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
