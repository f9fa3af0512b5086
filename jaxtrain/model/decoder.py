"""The decoder: embedding, a scanned stack of layers, norm, head.

Outside this folder its parameters are a plain nested dict:

    embed/embedding [V, D]                     head [D, V], absent when tied            norm [D]
    layers/<group>/<member>/ attention_norm, mlp_norm [L, D]
        attention/ qkv [L, D, K, G + 2, H], qkv_bias [L, K, G + 2, H], out [L, K, G, H, D],
                   out_bias [L, D], q_norm, k_norm [L, H]
        mlp/       gate_up [L, D, 2, F], down [L, F, D]

B batch, T tokens, D width, K key/value heads, G query heads to each, H head size, F feed-forward,
V vocabulary, L layers of one member of a group.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxtrain.batch import Batch
from jaxtrain.kernels.attention import TokenPositions
from jaxtrain.kernels.cross_entropy import NLL, HeadLayout, token_log_probs, weighted_nll
from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.layers import AttentionInputs, Block, Cache, Embed, Initial, rms_norm
from jaxtrain.model.rope import rotation
from jaxtrain.parallel.pipeline import gpipe, padded_stack
from jaxtrain.parallel.sharding import constrain

Params = dict[str, Any]
Caches = Mapping[str, Mapping[str, Cache]]
"""Group → member → its cache, stacked over L."""

_keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
_keep_attention = jax.checkpoint_policies.save_only_these_names("attention")
REMAT: Mapping[str, Callable] = {
    "none": lambda block: block,
    "full": lambda block: jax.checkpoint(block, prevent_cse=False),
    "dots": lambda block: jax.checkpoint(
        block,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(_keep_dots, _keep_attention),
    ),
}


class Decoder(nnx.Module):
    def __init__(
        self,
        config: DecoderConfig,
        compute: ComputeConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: str = "float32",
    ):
        initial = Initial(config, rngs, param_dtype)
        self.config = config
        self.compute = compute
        self.embed = Embed(config, initial)
        self.layers = nnx.Dict({
            str(g): nnx.Dict({
                str(m): Block(config, spec, compute, initial, group.repeats)
                for m, spec in enumerate(group.layers)
            })
            for g, group in enumerate(config.groups)
        })  # fmt: skip
        self.norm = initial.ones(config.width)
        self.head = None if config.tied else initial.normal(config.width, config.vocab_size)

    def __call__(self, batch: Batch) -> Array:
        """Logits of the token after each, float32 [B, T, V]."""
        return self.logits(self.hidden(batch))

    def hidden(self, batch: Batch) -> Array:
        """[B, T, D] after the final norm, in the compute dtype."""
        places = TokenPositions(batch.segments, batch.positions)
        x_BTD, _ = self.stack(self.embedded(batch.tokens), self.view(places, places))
        return self.normed(x_BTD)

    def token_log_probs(self, batch: Batch) -> Array:
        """Log-probability of each token given those before it, float32 [B, T].

        0 on padding and on the first token of every document. Never builds [B, T, V].
        """
        logps_BT = token_log_probs(
            self.hidden(batch),
            self.head_weight(),
            _next(batch.tokens),
            head_layout=self.head_layout,
        )
        # Position t - 1 predicts token t; what the last position predicts comes round to t = 0.
        return jnp.where(_is_predicted(batch.segments), jnp.roll(logps_BT, 1, axis=1), 0.0)

    def weighted_nll(
        self, batch: Batch, weights_BT: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
    ) -> NLL:
        """Weighted sum of -log p of each token given those before it, gradients made on the way.

        weights_BT[b, t] weighs the prediction of token t; first tokens and padding count 0.
        """
        weights_BT = jnp.where(_is_predicted(batch.segments), weights_BT, 0.0)
        return weighted_nll(
            self.hidden(batch),
            self.head_weight(),
            _next(batch.tokens),
            _next(weights_BT),
            head_layout=self.head_layout,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
        )

    # The parts of a forward pass, apart, for pipelines and for generation.

    def view(
        self, places: TokenPositions, kv_places: TokenPositions, slot: Array | None = None
    ) -> AttentionInputs:
        turns = rotation(self.config.rope, self.config.head_size, places.positions)
        return AttentionInputs(places, kv_places, *turns, slot)

    def embedded(self, tokens_BT: Array) -> Array:
        x_BTD = self.embed(tokens_BT, self.compute.compute_dtype)
        return constrain(x_BTD, "batch", None, None)

    def stack(
        self, x_BTD: Array, view: AttentionInputs, caches: Caches | None = None
    ) -> tuple[Array, Caches | None]:
        """All layers; with caches, also the caches with these tokens in them."""
        if self.compute.stages > 1 and caches is None:
            return self._staged(x_BTD, view), None
        filled = {}
        for name in self.layers:
            graph, params = split(self.layers[name])
            x_BTD, filled[name] = run_group(
                graph, params, x_BTD, view, self.compute,
                caches=None if caches is None else caches[name],
            )  # fmt: skip
        return x_BTD, (None if caches is None else filled)

    def _staged(self, x_BTD: Array, view: AttentionInputs) -> Array:
        """All layers, cut into stages over the `pipeline` axis, a microbatch at a time."""
        stages, num_microbatches = self.compute.stages, self.compute.microbatches
        (graph, params), num_layers = split(self.layers["0"]), self.config.num_layers

        def stage(params: Params, x_BTD: Array, view: AttentionInputs, first_layer: Array) -> Array:
            return run_group(
                graph, params, x_BTD, view, self.compute, first=first_layer, end=num_layers
            )[0]

        # Rows lead and microbatches follow, so that every device keeps its own rows.
        cut = lambda a: a.reshape(-1, num_microbatches, *a.shape[1:]).swapaxes(0, 1)
        y_MBTD = gpipe(
            stage,
            padded_stack(params, stages=stages),
            constrain(cut(x_BTD), None, "batch", None, None),
            jax.tree.map(cut, view),
            stages=stages,
        )
        return constrain(y_MBTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", None, None)

    def normed(self, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, self.norm[...], self.config.rms_eps)

    def logits(self, hidden_BTD: Array) -> Array:
        head = self.head_weight().astype(hidden_BTD.dtype)
        form = "btd,dv->btv" if self.head_layout == "DV" else "btd,vd->btv"
        return jnp.einsum(form, hidden_BTD, head, preferred_element_type=jnp.float32)

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
    view: AttentionInputs,
    compute: ComputeConfig,
    *,
    caches: Mapping[str, Cache] | None = None,
    first: Array | int = 0,
    end: int | None = None,
) -> tuple[Array, Mapping[str, Cache] | None]:
    """x after those layers of a group whose stacked parameters are given: all, or any slice.

    Repeats from number `end` on, counted from `first` for the first one here, are padding and leave
    x as it is.
    """

    every, num_members = compute.remat_every, len(params)

    def repeat(x_BTD: Array, scanned, before: int = 0):
        i, scanned = scanned
        run = partial(whole, before=before)
        if end is None:
            return run(x_BTD, scanned)
        return lax.cond(i < end, run, lambda x, _: (x, None), x_BTD, scanned)

    def whole(x_BTD: Array, scanned, *, before: int):
        params, caches = scanned
        members = nnx.merge(graph, params)
        filled = {}
        for number, name in enumerate(members, before):
            block_graph, block_params = split(members[name])

            @REMAT[compute.remat if number % every == 0 else "none"]
            def block(x_BTD, params, cache, graph=block_graph):
                return nnx.merge(graph, params)(x_BTD, view, cache)

            x_BTD, filled[name] = block(x_BTD, block_params, caches and caches[name])
        return x_BTD, (caches and filled)

    def several(x_BTD: Array, scanned):
        """Repeats after which the pattern of rematerialised layers starts again."""
        for j in range(jax.tree.leaves(scanned)[0].shape[0]):
            one = jax.tree.map(lambda a, j=j: a[j], scanned)
            x_BTD, _ = repeat(x_BTD, one, before=j * num_members)
        return x_BTD, None

    num_repeats = jax.tree.leaves(params)[0].shape[0]
    scanned = (first + jnp.arange(num_repeats), (params, caches))
    at_once = every // math.gcd(every, num_members)
    if at_once == 1 or caches is not None:
        return lax.scan(repeat, x_BTD, scanned)
    loops, rest = divmod(num_repeats, at_once)
    cut = lambda a: a[: loops * at_once].reshape(loops, at_once, *a.shape[1:])
    x_BTD, _ = lax.scan(several, x_BTD, jax.tree.map(cut, scanned))
    return several(x_BTD, jax.tree.map(lambda a: a[num_repeats - rest :], scanned))


class Model(NamedTuple):
    """A decoder without arrays: its static graph, and the shape of every parameter."""

    graph: nnx.GraphDef
    shapes: Params


def abstract(
    config: DecoderConfig, compute: ComputeConfig, *, param_dtype: str = "float32"
) -> Model:
    """The decoder that `init_params` or `load_params` fills; nothing is allocated."""

    def make() -> Decoder:
        rngs = nnx.Rngs(params=jax.random.key(0))
        return Decoder(config, compute, rngs=rngs, param_dtype=param_dtype)

    return Model(*split(nnx.eval_shape(make)))


def init_params(
    config: DecoderConfig, compute: ComputeConfig, key: Array, *, param_dtype: str = "float32"
) -> Params:
    """Random parameters; pure, so that jit with `out_shardings` makes each where it belongs."""
    rngs = nnx.Rngs(params=key)
    return split(Decoder(config, compute, rngs=rngs, param_dtype=param_dtype))[1]


def merge(graph: nnx.GraphDef, params: Params) -> Decoder:
    return nnx.merge(graph, params)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """The static graph of a module, and its parameters as plain dicts."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def _next(x_BT: Array) -> Array:
    """At t what stands at t + 1; the last place gets what stands at 0, which is never predicted."""
    return jnp.roll(x_BT, -1, axis=1)


def _is_predicted(segments_BT: Array) -> Array:
    """True where a token has one before it in its document."""
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)))[:, :-1]
    return (segments_BT == before_BT) & (segments_BT != 0)
