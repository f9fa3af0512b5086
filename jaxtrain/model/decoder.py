"""The decoder: embedding, a scanned stack of layers, norm, head.

Outside this folder its parameters are a plain nested dict:

    embed/embedding [V, D], positions [P, D]   head [D, V], absent when tied   norm, norm_bias [D]
    layers/<group>/<member>/ attention_norm, attention_post_norm, mlp_norm, mlp_post_norm [L, D]
        attention/ qkv [L, D, K, G + 2, H], qkv_bias [L, K, G + 2, H], out [L, K, G, H, D],
                   out_bias [L, D], q_norm, k_norm [L, H] or [L, K, G, H] and [L, K, 1, H],
                   sinks [L, K, G]; of latent attention those of latent.py
        mlp/       gate_up [L, D, U, F], gate_up_bias [L, U, F], down [L, F, D], down_bias [L, D]
                   or router [L, D, E], expert_gate_up [L, E, D, U, M], expert_down [L, E, M, D],
                   router_bias [L, E], expert_gate_up_bias [L, E, U, M], expert_down_bias [L, E, D],
                   choice_bias [L, E], shared/ gate_up, down

A family has those that its options ask for; `attention_norm` and `mlp_norm` may have a `_bias`.
Beside `qkv`, `out`, `gate_up` and `down` there may be adapters, by module of the family's files:

    <parameter>_lora/<module>/ a [L, inputs, r], b [L, r, outputs], scale [L]

B batch, T tokens, D width, K key/value heads, G query heads to each, H head size, F feed-forward,
U 2 with a gate and 1 without, E experts, M feed-forward of each, P positions, V vocabulary,
L layers of one member of a group.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.batch import Batch
from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.kernels.cross_entropy import (
    NLL,
    HeadLayout,
    scale_and_cap,
    token_log_probs,
    weighted_nll,
)
from jaxtrain.model import latent as latent  # adds its mixer
from jaxtrain.model.config import AdapterSite, ComputeConfig, DecoderConfig
from jaxtrain.model.layers import (
    AttentionInputs,
    Block,
    Cache,
    Initializer,
    Output,
    attach_adapters,
    mix_bits,
    normalize,
)
from jaxtrain.model.rope import rotation
from jaxtrain.model.routing import Routing, add_routings
from jaxtrain.parallel.pipeline import gpipe, pad_stack
from jaxtrain.parallel.sharding import constrain

Params = dict[str, Any]
Adapters = Mapping[str, Sequence[AdapterSite]]
"""Path of a parameter → the adapters that products with it have."""
NO_ADAPTERS: Adapters = {}
Caches = Mapping[str, Mapping[str, Cache]]
"""Group → member → its cache, stacked over L where the group repeats."""


def rematerialize(block: Callable, compute: ComputeConfig) -> Callable:
    """The same layer, of which the backward pass recomputes what `compute` says."""
    if compute.remat == "none":
        return block
    policies, kept = jax.checkpoint_policies, ["routing"] if compute.routing_replay else []
    policy = policies.save_only_these_names(*kept)
    if compute.remat == "dots":
        dots = policies.dots_with_no_batch_dims_saveable
        names = policies.save_only_these_names("attention", *kept)
        policy = policies.save_from_both_policies(dots, names)
    return jax.checkpoint(block, prevent_cse=False, policy=policy)


class Decoder(nnx.Module):
    def __init__(
        self,
        config: DecoderConfig,
        compute: ComputeConfig,
        key: Array,
        param_dtype: str,
        adapters: Adapters = NO_ADAPTERS,
    ):
        init = Initializer(config, key, param_dtype)
        self.config = config
        self.compute = compute
        self.embed = nnx.Dict(embedding=init.normal(config.vocab_size, config.width))
        if config.learned_positions:
            self.embed.positions = init.normal(config.max_positions, config.width)
        self.layers = nnx.Dict({
            str(g): nnx.Dict({
                str(m): Block(config, spec, compute, init, group.repeats)
                for m, spec in enumerate(group.layers)
            })
            for g, group in enumerate(config.groups)
        })  # fmt: skip
        self.has_dropout = any(site.dropout for sites in adapters.values() for site in sites)
        for path, sites in adapters.items():
            _, group, member, part, name = path.split("/")
            attach_adapters(getattr(self.layers[group][member], part), name, sites)
        self.norm = init.norm(config.width)
        self.norm_bias = init.zeros(config.width) if config.norm.has_bias else None
        self.head = None if config.tied else init.normal(config.width, config.vocab_size)

    def __call__(self, batch: Batch) -> Array:
        """Logits of each next token, float32 [B, T, V]: those at t predict token t + 1."""
        return self.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> Array:
        """Hidden states [B, T, D] after the final norm, in the compute dtype."""
        return self.hidden_and_routing(batch)[0]

    def hidden_and_routing(self, batch: Batch) -> tuple[Array, Routing | None]:
        """Hidden states, and what the routers of all layers chose; None without experts."""
        positions = TokenPositions(batch.segments, batch.positions)
        inputs = self.attention_inputs(positions, positions)
        if self.has_dropout and batch.is_training:
            inputs = inputs._replace(noise_BT=_noise(batch))
        out = self.stack(self.embed_tokens(batch.tokens, batch.positions), inputs)
        return self.normalize(out.x_BTD), out.routing

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
        )

    # The parts of a forward pass, for pipelines and for generation.

    def attention_inputs(
        self, q_positions: TokenPositions, kv_positions: TokenPositions, slot: Array | None = None
    ) -> AttentionInputs:
        size = self.config.head_size
        rotations = tuple(rotation(rope, size, q_positions) for rope in self.config.ropes)
        return AttentionInputs(q_positions, kv_positions, rotations, slot)

    def embed_tokens(self, tokens_BT: Array, positions_BT: Array) -> Array:
        look_up = lambda table, index_BT: jnp.take(table[...], index_BT, axis=0, mode="clip")
        x_BTD = look_up(self.embed.embedding, tokens_BT)
        if self.config.learned_positions:
            x_BTD += look_up(self.embed.positions, positions_BT)
        x_BTD = x_BTD.astype(self.compute.compute_dtype) * self.config.embedding_scale
        return constrain(x_BTD, "batch", None, None)

    def stack(self, x_BTD: Array, inputs: AttentionInputs, caches: Caches | None = None) -> Output:
        """Runs all layers; with caches, also returns them with these tokens added."""
        if self.compute.stages > 1 and caches is None:
            return Output(self._run_stages(x_BTD, inputs))
        new_caches, routings = {}, []
        for name in by_number(self.layers):
            x_BTD, new_caches[name], routing = run_group(
                *split(self.layers[name]),
                x_BTD,
                inputs,
                self.compute,
                caches=caches[name] if caches else None,
            )
            routings.append(routing)
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
            constrain(split_batch(x_BTD), None, "batch", None, None),
            jax.tree.map(split_batch, inputs),
            stages=stages,
        )
        return constrain(y_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", None, None)

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
    caches: Mapping[str, Cache] | None = None,
    first: Array | int = 0,
    end: int | None = None,
) -> Output:
    """Runs the layers of a group, all or any slice, on x; `params` are their stacked parameters.

    `first` is the number of the first repeat; those from number `end` on are padding, which leaves
    x unchanged.
    """

    every, num_members = compute.remat_every, len(params)

    def repeat(x_BTD: Array, scanned, before: int = 0):
        i, scanned = scanned
        run = partial(run_members, before=before)
        if end is None:
            return run(x_BTD, scanned)
        return lax.cond(i < end, run, lambda x, _: (x, (None, None)), x_BTD, scanned)

    def run_members(x_BTD: Array, scanned, *, before: int):
        params, caches = scanned
        members = nnx.merge(graph, params)
        new_caches, routings = {}, []
        for number, name in enumerate(by_number(members), before):
            block_graph, block_params = split(members[name])

            def block(x_BTD, params, cache, graph=block_graph):
                return nnx.merge(graph, params)(x_BTD, inputs, cache)

            block = rematerialize(block, compute) if number % every == 0 else block
            out = block(x_BTD, block_params, caches and caches[name])
            x_BTD, new_caches[name] = out.x_BTD, out.cache
            routings.append(out.routing)
        return x_BTD, (caches and new_caches, add_routings(routings))

    def run_period(x_BTD: Array, scanned):
        """Runs the repeats after which the pattern of rematerialised layers starts again."""
        routings = []
        for j in range(jax.tree.leaves(scanned)[0].shape[0]):
            one = jax.tree.map(lambda a, j=j: a[j], scanned)
            x_BTD, (_, routing) = repeat(x_BTD, one, before=j * num_members)
            routings.append(routing)
        return x_BTD, add_routings(routings)

    num_repeats = jax.tree.leaves(params)[0].shape[0]
    if num_repeats == 1:  # without a loop, which would copy what it slices
        one = jax.tree.map(partial(jnp.squeeze, axis=0), params)
        x_BTD, (new_caches, routing) = repeat(x_BTD, (first, (one, caches)))
        return Output(x_BTD, new_caches, routing)
    scanned = (first + jnp.arange(num_repeats), (params, caches))
    at_once = every // math.gcd(every, num_members)
    sum_layers = partial(jax.tree.map, lambda a: a.sum(0))
    if at_once == 1 or caches is not None:
        x_BTD, (new_caches, routings) = lax.scan(repeat, x_BTD, scanned)
        return Output(x_BTD, new_caches, sum_layers(routings))
    loops, rest = divmod(num_repeats, at_once)
    cut = lambda a: a[: loops * at_once].reshape(loops, at_once, *a.shape[1:])
    x_BTD, routings = lax.scan(run_period, x_BTD, jax.tree.map(cut, scanned))
    x_BTD, routing = run_period(x_BTD, jax.tree.map(lambda a: a[num_repeats - rest :], scanned))
    return Output(x_BTD, None, add_routings([sum_layers(routings), routing]))


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
) -> Model:
    """The model whose parameters `init_params` or `load_params` makes; allocates nothing."""
    build = lambda: Decoder(config, compute, jax.random.key(0), param_dtype, adapters)
    return Model(*split(nnx.eval_shape(build)))


def init_params(
    config: DecoderConfig, compute: ComputeConfig, key: Array, *, param_dtype: str = "float32"
) -> Params:
    """Random parameters; pure, so that jit with `out_shardings` makes each on its devices."""
    return split(Decoder(config, compute, key, param_dtype))[1]


def merge(graph: nnx.GraphDef, params: Params) -> Decoder:
    return nnx.merge(graph, params)


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
