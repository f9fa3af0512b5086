"""The decoder: embedding, a scanned stack of layers, norm, head.

Outside this folder its parameters are a plain nested dict:

    embed/embedding [V, D], positions [P, D], layer_inputs [V, X, I]
    head [D, V], absent when tied   norm, norm_bias [D]
    layer_inputs/ project [1, D, X, I], project_norm [1, I]
    layers/<group>/<member>/ attention_norm, attention_post_norm, mlp_norm, mlp_post_norm [L, D],
                   layer_scale [L, 1]
        attention/ qkv [L, D, K, Q + 2, H], qkv_bias [L, K, Q + 2, H], out [L, K, G, H, D],
                   out_bias [L, D], q_norm, k_norm [L, H] or [L, K, G, H] and [L, K, 1, H],
                   sinks [L, K, G]; of latent attention those of latent.py
        mixer/     in the place of attention, in_qkv [L, D, J, R], in_gate [L, D, J, W, C],
                   in_strength, in_decay [L, D, J, W], decay_bias, log_decay_scale [L, J, W],
                   qkv_conv [L, S, J, R], out_norm [L, C], out [L, J, W, C, D]
                   or in_bcx [L, D, 3, D], conv [L, S, D], conv_out [L, D, D], each may have a _bias
        mlp/       gate_up [L, D, U, F], gate_up_bias [L, U, F], down [L, F, D], down_bias [L, D]
                   or router [L, D, E], expert_gate_up [L, E, D, U, M], expert_down [L, E, M, D],
                   router_bias [L, E], expert_gate_up_bias [L, E, U, M], expert_down_bias [L, E, D],
                   choice_bias [L, E], shared/ gate_up, down, shared_gate [L, D, 1]
        layer_input/ narrow [L, D, I], widen [L, I, D], post_norm [L, D]

A family has those that its options ask for; `attention_norm` and `mlp_norm` may have a `_bias`. K,
H and F may differ between members, and `qkv` may lack values, or keys too (`LayerSpec`). Beside
those of `layers.CONTRACTED` there may be adapters, by module of the family's files:

    <parameter>_lora/<module>/ a [L, inputs, r], b [L, r, outputs], scale [L]

Frozen weights of layers may be kept in fewer bits, as the arrays of quantized.py: `qkv/codes`.

B batch, T tokens, D width, K key/value heads, G query heads to each, Q = G, or 2 G with gates, H
head size, J key heads of the delta rule, W value heads to each, C value size, R = W C and twice the
key size, S taps of a convolution, F feed-forward, U 2 with a gate and 1 without, E experts, M feed-
forward of each, P positions, V vocabulary, L layers of one member of a group, X all layers, I
channels of a layer's own input.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jaxtrain.batch import Batch
from jaxtrain.kernels.attention import TokenPositions, to_ring_order, to_row_order
from jaxtrain.kernels.axes import TENSOR_AXIS, context_parts
from jaxtrain.kernels.cross_entropy import (
    NLL,
    HeadLayout,
    scale_and_cap,
    token_log_probs,
    weighted_nll,
)
from jaxtrain.kernels.product import from_bits, to_bits
from jaxtrain.kernels.sums import SHARED, SHARED_BY_ALL, Axes, map_with_copies
from jaxtrain.model.block import Block
from jaxtrain.model.config import AdapterSite, ComputeConfig, DecoderConfig
from jaxtrain.model.layers import (
    PRODUCT,
    WHOLE_PRODUCTS,
    AttentionInputs,
    Cache,
    Fp8Weight,
    Initializer,
    LayerInputs,
    Output,
    attach_adapters,
    mix_bits,
    normalize,
)
from jaxtrain.model.quantized import Kind, QuantizedWeight, form_of
from jaxtrain.model.rope import rotation
from jaxtrain.model.routing import Routing, add_routings
from jaxtrain.parallel.host_memory import KIND, fetch
from jaxtrain.parallel.matrices import MATRICES, axes_of_product
from jaxtrain.parallel.pipeline import gpipe, pad_stack
from jaxtrain.parallel.sharding import constrain

Params = dict[str, Any]
Adapters = Mapping[str, Sequence[AdapterSite]]
"""Path of a parameter → the adapters that products with it have."""
NO_ADAPTERS: Adapters = {}
LAYER_INPUT = "layer_input"
"""Name for a rematerialisation policy of what a layer reads."""
Caches = Mapping[str, Mapping[str, Any]]
"""Group → member → its cache, stacked over L where the group repeats; None for a layer that reads
the keys of others."""
Carry = tuple[Array, dict[str, Cache]]
"""What a layer passes on: x, and keys and values that later layers read."""


def rematerialize(block: Callable, compute: ComputeConfig) -> Callable:
    """The same layer, of which the backward pass recomputes what `compute` says."""
    if compute.remat == "none":
        return block
    policies = jax.checkpoint_policies
    kept = {"full": [], "attention": ["attention"], "dots": ["attention", PRODUCT]}[compute.remat]
    if compute.routing_replay:
        kept.append("routing")
    policy = policies.save_only_these_names(*kept)
    if compute.offload_inputs:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst=KIND,
        )
    return jax.checkpoint(block, prevent_cse=False, policy=policy)


class Decoder(nnx.Module):
    def __init__(
        self,
        config: DecoderConfig,
        compute: ComputeConfig,
        key: Array,
        param_dtype: str,
        adapters: Adapters = NO_ADAPTERS,
        quantized: Mapping[str, Kind] = {},
    ):
        """`quantized` has the paths of weights that are kept in fewer bits."""
        init = Initializer(config, key, param_dtype)
        self.config = config
        self.compute = compute
        self.embed = nnx.Dict(embedding=init.normal(config.vocab_size, config.width))
        if config.learned_positions:
            self.embed.positions = init.normal(config.max_positions, config.width)
        has_inputs = config.per_layer_width > 0
        if has_inputs:
            sizes = config.vocab_size, config.num_layers, config.per_layer_width
            self.embed.layer_inputs = init.normal(*sizes)
        self.layer_inputs = LayerInputs(config, init, 1) if has_inputs else None
        self.layers = nnx.Dict({
            str(g): nnx.Dict({
                str(m): Block(config, spec, compute, init, group.repeats)
                for m, spec in enumerate(group.layers)
            })
            for g, group in enumerate(config.groups)
        })  # fmt: skip
        self.has_dropout = any(site.dropout for sites in adapters.values() for site in sites)
        for path, sites in adapters.items():
            attach_adapters(reduce(getattr, path.split("/")[:-1], self), path, sites)
        for path, kind in quantized.items():
            *parents, name = path.split("/")
            module = reduce(getattr, parents, self)
            shape = getattr(module, name)[...].shape
            setattr(module, name, QuantizedWeight(*form_of(kind, path, shape)))
        if compute.matmul == "fp8":
            self._multiply_in_fp8()
        self.norm = init.norm(config.width)
        self.norm_bias = init.zeros(config.width) if config.norm.has_bias else None
        self.head = None if config.tied else init.normal(config.width, config.vocab_size)
        name = lambda axis: self._shared if axis == "embed" else axis and TENSOR_AXIS
        for path, weight in nnx.iter_graph(self):
            axes = axes_of_product("/".join(map(str, path)))
            if axes is not None and isinstance(weight, nnx.Param):
                weight.set_metadata(places=tuple(map(name, axes)))

    @property
    def _shared(self) -> Axes:
        """Axes whose devices share gradients."""
        return SHARED_BY_ALL if self.compute.splits_gradients else SHARED

    def _multiply_in_fp8(self) -> None:
        for path, weight in list(nnx.iter_graph(self.layers)):
            *parents, name = map(str, path or [""])
            place = "/".join((*parents[2:], name))
            if place in MATRICES and name not in WHOLE_PRODUCTS and isinstance(weight, nnx.Param):
                setattr(reduce(getattr, parents, self.layers), name, Fp8Weight(weight[...]))

    def __call__(self, batch: Batch) -> Array:
        """Logits of each next token, float32 [B, T, V]: those at t predict token t + 1."""
        return self.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> Array:
        """Hidden states [B, T, D] after the final norm, in the compute dtype."""
        return self.hidden_and_routing(batch)[0]

    def hidden_and_routing(self, batch: Batch) -> tuple[Array, Routing | None]:
        """Hidden states, and what the routers of all layers chose; None without experts."""
        parts = context_parts(batch.tokens.shape[1])
        is_ring = self.compute.exchange == "ring" and parts > 1
        if is_ring:
            tokens = batch.tokens, batch.positions, batch.segments
            tokens, positions, segments = to_ring_order(tokens, parts=parts)
            batch = batch._replace(tokens=tokens, positions=positions, segments=segments)
        positions = TokenPositions(batch.segments, batch.positions)
        inputs = self.attention_inputs(positions, positions)
        if self.has_dropout and batch.is_training:
            inputs = inputs._replace(noise_BT=_noise(batch))
        out = self.run_layers(batch.tokens, inputs)
        x_BTD = to_row_order(out.x_BTD, parts=parts) if is_ring else out.x_BTD
        return self.normalize(x_BTD), out.routing

    def logits_of_targets(self, batch: Batch) -> Array:
        """Logits that predict each token given those before it, float32 [B, T, V]: those at t
        predict token t, and belong to `batch.loss_weights` there.

        0 on padding and on the first token of every document.
        """
        is_predicted_BT1 = _is_predicted(batch.segments)[..., None]
        return jnp.where(is_predicted_BT1, jnp.roll(self(batch), 1, axis=1), 0.0)

    def token_log_probs(self, batch: Batch) -> Array:
        """Log-probability of each token given those before it, float32 [B, T].

        0 on padding and on the first token of every document. Never builds [B, T, V].
        """
        logps_BT = token_log_probs(
            self.hidden(batch),
            self.head_weight(),
            _next(batch.tokens),
            head_layout=self.head_layout,
            scale=self.config.logit_scale,
            softcap=self.config.logit_softcap,
            shared=self._shared,
        )
        # Position t - 1 predicts token t; the roll puts the last at t = 0, which no token predicts.
        return jnp.where(_is_predicted(batch.segments), jnp.roll(logps_BT, 1, axis=1), 0.0)

    def weighted_nll(
        self,
        batch: Batch,
        weights_BT: Array,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        hidden_BTD: Array | None = None,
    ) -> NLL:
        """Weighted sum of -log p of each token given those before it, with its gradients.

        weights_BT[b, t] weighs the prediction of token t; first tokens and padding weigh 0. Takes
        `hidden(batch)` if it is known.
        """
        weights_BT = jnp.where(_is_predicted(batch.segments), weights_BT, 0.0)
        return weighted_nll(
            self.hidden(batch) if hidden_BTD is None else hidden_BTD,
            self.head_weight(),
            _next(batch.tokens),
            _next(weights_BT),
            head_layout=self.head_layout,
            scale=self.config.logit_scale,
            softcap=self.config.logit_softcap,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            shared=self._shared,
        )

    # The parts of a forward pass, for pipelines and for generation.

    def attention_inputs(
        self, q_positions: TokenPositions, kv_positions: TokenPositions, slot: Array | None = None
    ) -> AttentionInputs:
        rotations = tuple(rotation(rope, size, q_positions) for rope, size in self.config.ropes)
        return AttentionInputs(q_positions, kv_positions, rotations, slot)

    def embed_tokens(self, tokens_BT: Array, positions_BT: Array) -> Array:
        x_BTD = self._look_up(self.embed.embedding, tokens_BT, TENSOR_AXIS)
        if self.config.learned_positions:
            x_BTD += self._look_up(self.embed.positions, positions_BT, None)
        x_BTD = x_BTD.astype(self.compute.compute_dtype) * self.config.embedding_scale
        return constrain(x_BTD, "batch", "tokens", None)

    def _look_up(self, table: nnx.Param, index_BT: Array, rows: str | None) -> Array:
        """`rows` is the axis that splits those of the table."""
        if context_parts(index_BT.shape[1]) == 1:
            # First on the devices of the table's parts, as the gradient comes back to these.
            return constrain(look_up(table[...], index_BT), "rows", "tokens", "embed")
        # The table goes to the tokens, of which a device has many, and not these to its parts.
        dtype = "float32" if self.config.learned_positions else self.compute.compute_dtype
        look = lambda weights, index_BT: look_up(weights[0], index_BT)
        return map_with_copies(look, [(table[...], (rows, self._shared))], index_BT, dtype=dtype)

    def run_layers(
        self, tokens_BT: Array, inputs: AttentionInputs, caches: Caches | None = None
    ) -> Output:
        """Embeds tokens and runs all layers; with caches, also returns them with these added."""
        x_BTD = self.embed_tokens(tokens_BT, inputs.q_positions.positions)
        own_XBTI = self._make_layer_inputs(tokens_BT, x_BTD, inputs.noise_BT)
        return self.stack(x_BTD, inputs, caches, own_XBTI)

    def _make_layer_inputs(
        self, tokens_BT: Array, x_BTD: Array, noise_BT: Array | None
    ) -> Array | None:
        if self.layer_inputs is None:
            return None
        graph, params = split(self.layer_inputs)
        # The tokens go to the parts of the table on their devices, not the table to the tokens.
        table_BTXI = constrain(
            look_up(self.embed.layer_inputs[...], tokens_BT), "rows", "tokens", None, "embed"
        )
        table_BTXI = constrain(table_BTXI.astype(x_BTD.dtype), "batch", "tokens", None, None)

        def make(params: Params, x_BTD: Array, table_BTXI: Array) -> Array:
            module = nnx.merge(graph, jax.tree.map(lambda a: a[0], params))
            return module(x_BTD, table_BTXI, noise_BT)

        return rematerialize(make, self.compute)(params, x_BTD, table_BTXI).transpose(2, 0, 1, 3)

    def stack(
        self,
        x_BTD: Array,
        inputs: AttentionInputs,
        caches: Caches | None = None,
        own_XBTI: Array | None = None,
    ) -> Output:
        """Runs all layers on hidden states, with the own inputs of each."""
        if self.compute.stages > 1 and caches is None:
            return Output(self._run_stages(x_BTD, inputs))
        new_caches, routings, begin = {}, [], 0
        for name, layers in zip(by_number(self.layers), self.config.groups, strict=True):
            end = begin + len(layers.layers) * layers.repeats
            out = run_group(
                *split(self.layers[name]), x_BTD, inputs, self.compute,
                caches=caches[name] if caches else None,
                own_XBTI=None if own_XBTI is None else own_XBTI[begin:end],
            )  # fmt: skip
            begin, x_BTD, new_caches[name] = end, out.x_BTD, out.cache
            inputs = inputs._replace(shared={**(inputs.shared or {}), **out.written})
            routings.append(out.routing)
        return Output(x_BTD, caches and new_caches, add_routings(routings))

    def _run_stages(self, x_BTD: Array, inputs: AttentionInputs) -> Array:
        """Runs all layers, split into stages over the `pipeline` axis, by microbatch."""
        stages, num_microbatches = self.compute.stages, self.compute.microbatches
        (graph, params), num_repeats = split(self.layers["0"]), self.config.groups[0].repeats

        def stage(params: Params, x_BTD: Array, inputs: AttentionInputs, first: Array) -> Array:
            return run_group(
                graph, params, x_BTD, inputs, self.compute, first=first, end=num_repeats
            ).x_BTD

        # Sequences lead and microbatches follow, so that every device keeps its own.
        split_batch = lambda a: a.reshape(-1, num_microbatches, *a.shape[1:]).swapaxes(0, 1)
        y_MBTD = gpipe(
            stage,
            pad_stack(params, stages=stages),
            constrain(split_batch(x_BTD), None, "batch", "tokens", None),
            jax.tree.map(split_batch, inputs),
            stages=stages,
        )
        return constrain(y_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", "tokens", None)

    def normalize(self, x_BTD: Array) -> Array:
        return normalize(self.config.norm, x_BTD, self.norm, self.norm_bias)

    def logits(self, hidden_BTD: Array) -> Array:
        head = self.head_weight().astype(hidden_BTD.dtype)
        form = "btd,dv->btv" if self.head_layout == "DV" else "btd,vd->btv"
        raw_BTV = jnp.einsum(form, hidden_BTD, head, preferred_element_type=jnp.float32)
        return scale_and_cap(raw_BTV, self.config.logit_scale, self.config.logit_softcap)

    @property
    def head_layout(self) -> HeadLayout:
        return "VD" if self.head is None else "DV"

    def head_weight(self) -> Array:
        """[D, V], or the embedding [V, D] when tied, in the dtype of the parameters."""
        return self.embed.embedding[...] if self.head is None else self.head[...]


def run_group(
    graph: nnx.GraphDef,
    params: Params,
    x_BTD: Array,
    inputs: AttentionInputs,
    compute: ComputeConfig,
    *,
    caches: Mapping[str, Any] | None = None,
    own_XBTI: Array | None = None,
    first: Array | int = 0,
    end: int | None = None,
) -> Output:
    """Runs the layers of a group, all or any slice, on x; `params` are their stacked parameters,
    and `own_XBTI` the own inputs of each.

    `first` is the number of the first repeat; those from number `end` on are padding, which leaves
    x unchanged.
    """

    every, num_members = compute.remat_every, len(params)

    def repeat(carry: Carry, scanned, before: int = 0):
        i, scanned = scanned
        run = partial(run_members, before=before)
        if end is None:
            return run(carry, scanned)
        return lax.cond(i < end, run, lambda carry, _: (carry, (None, None)), carry, scanned)

    def run_members(carry: Carry, scanned, *, before: int):
        (x_BTD, written), (params, caches, own) = carry, scanned
        members = nnx.merge(graph, params)
        new_caches, routings = {}, []
        for m, name in enumerate(by_number(members)):
            block_graph, block_params = split(members[name])
            seen = inputs._replace(
                shared={**(inputs.shared or {}), **written}, own_BTI=None if own is None else own[m]
            )

            if caches is None:
                policy = compute if (before + m) % every == 0 else None
                out = _run_layer(block_graph, block_params, x_BTD, seen, policy)
            else:
                out = _run_with_cache(block_graph, block_params, x_BTD, seen, caches[name])
            x_BTD, new_caches[name] = out.x_BTD, out.cache
            if key := members[name].spec.writes_keys:
                written = {**written, key: out.cache}
            routings.append(out.routing)
        return (x_BTD, written), (caches and new_caches, add_routings(routings))

    def run_period(carry: Carry, scanned):
        """Runs the repeats after which the pattern of rematerialised layers starts again."""
        routings = []
        for j in range(jax.tree.leaves(scanned)[0].shape[0]):
            one = jax.tree.map(lambda a, j=j: a[j], scanned)
            carry, (_, routing) = repeat(carry, one, before=j * num_members)
            routings.append(routing)
        return carry, add_routings(routings)

    num_repeats = jax.tree.leaves(params)[0].shape[0]
    own = own_XBTI
    if own is not None:
        own = own.reshape(num_repeats, num_members, *own.shape[1:])
    carry = x_BTD, _first_written(nnx.merge(graph, params), x_BTD, inputs)
    if num_repeats == 1:  # without a loop, which would copy what it slices
        one, one_own = jax.tree.map(partial(jnp.squeeze, axis=0), (params, own))
        (x_BTD, written), (new_caches, routing) = repeat(carry, (first, (one, caches, one_own)))
        return Output(x_BTD, new_caches, routing, written)
    scanned = (first + jnp.arange(num_repeats), (params, caches, own))
    at_once = every // math.gcd(every, num_members)
    sum_layers = partial(jax.tree.map, lambda a: a.sum(0))
    if at_once == 1 or caches is not None:
        (x_BTD, written), (new_caches, routings) = lax.scan(repeat, carry, scanned)
        return Output(x_BTD, new_caches, sum_layers(routings), written)
    loops, rest = divmod(num_repeats, at_once)
    cut = lambda a: a[: loops * at_once].reshape(loops, at_once, *a.shape[1:])
    carry, routings = lax.scan(run_period, carry, jax.tree.map(cut, scanned))
    carry, routing = run_period(carry, jax.tree.map(lambda a: a[num_repeats - rest :], scanned))
    return Output(carry[0], None, add_routings([sum_layers(routings), routing]), carry[1])


def _run_layer(
    graph: nnx.GraphDef,
    params: Params,
    x_BTD: Array,
    inputs: AttentionInputs,
    policy: ComputeConfig | None,
) -> Output:
    """Runs a layer whose backward pass recomputes what `policy` says."""

    def run(x_BTD: Array, bits_BTD: Array | None, params: Params) -> Output:
        x_BTD = checkpoint_name(from_bits(x_BTD, bits_BTD), LAYER_INPUT)
        # Here, since copies that are made outside would be kept for the backward pass.
        return nnx.merge(graph, fetch(params))(x_BTD, inputs, None)

    return (run if policy is None else rematerialize(run, policy))(x_BTD, to_bits(x_BTD), params)


@partial(jax.jit, static_argnums=0)
def _run_with_cache(
    graph: nnx.GraphDef, params: Params, x_BTD: Array, inputs: AttentionInputs, cache: Any
) -> Output:
    """Runs a layer, which is traced once for all that are like it."""
    return nnx.merge(graph, fetch(params))(x_BTD, inputs, cache)


def _first_written(
    members: Mapping[str, Block], x_BTD: Array, inputs: AttentionInputs
) -> dict[str, Cache]:
    """Before these layers write keys and values: those that earlier ones wrote, or their shape."""
    found = {}
    for block in members.values():
        if key := block.spec.writes_keys:
            B, S = inputs.kv_positions.segments.shape
            empty = block.token_mixer.empty_cache(1, B, S, x_BTD.dtype)
            found[key] = jax.tree.map(partial(jnp.squeeze, axis=0), empty)
    return {**found, **{key: kept for key, kept in (inputs.shared or {}).items() if key in found}}


def by_number(names: Iterable[str]) -> list[str]:
    """Names of groups or of members in their order: nnx sorts them as text, 10 before 2."""
    return sorted(names, key=int)


class Model(NamedTuple):
    """A decoder without arrays: its static graph and the shapes of its parameters."""

    graph: nnx.GraphDef
    shapes: Params


def abstract(
    config: DecoderConfig,
    compute: ComputeConfig,
    *,
    param_dtype: str = "float32",
    adapters: Adapters = NO_ADAPTERS,
    quantized: Mapping[str, Kind] = {},
) -> Model:
    """The model whose parameters `init_params` or `load_params` makes; allocates nothing."""
    build = lambda: Decoder(config, compute, jax.random.key(0), param_dtype, adapters, quantized)
    return Model(*split(nnx.eval_shape(build)))


def init_params(
    config: DecoderConfig, compute: ComputeConfig, key: Array, *, param_dtype: str = "float32"
) -> Params:
    """Random parameters; pure, so that jit with `out_shardings` makes each on its devices."""
    return split(Decoder(config, compute, key, param_dtype))[1]


def merge(graph: nnx.GraphDef, params: Params) -> Decoder:
    return nnx.merge(graph, params)


def look_up(table: Array, index_BT: Array) -> Array:
    return jnp.take(table, index_BT, axis=0, mode="clip")


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """Splits a module into its static graph and its parameters as plain dicts."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def _next(x_BT: Array) -> Array:
    """Shifts x by one: t gets x[t + 1]; the last gets x[0], which is never predicted."""
    return jnp.roll(x_BT, -1, axis=1)


def _noise(batch: Batch) -> Array:
    """uint32 [B, T]: of the step, the document and the position, so that neither packing nor the
    mesh changes what dropout draws from it."""
    places_BT = batch.positions.astype(jnp.uint32) * jnp.uint32(0x9E3779B1)
    parts_BT = mix_bits(batch.tokens.astype(jnp.uint32) + places_BT)
    add_up = lambda parts_T, segments_T: jax.ops.segment_sum(
        parts_T, segments_T, num_segments=len(segments_T) + 1
    )[segments_T]
    documents_BT = jax.vmap(add_up)(parts_BT, batch.segments)
    step = jnp.asarray(0 if batch.step is None else batch.step, jnp.uint32)
    return mix_bits(mix_bits(documents_BT ^ mix_bits(step + 1)) + places_BT)


def _is_predicted(segments_BT: Array) -> Array:
    """True for every token but the first of a document, and for no padding."""
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    return (segments_BT == before_BT) & (segments_BT != 0)
