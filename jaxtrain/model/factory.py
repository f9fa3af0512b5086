"""The model of a recipe: found, described, loaded onto a mesh, asked, exported."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from jaxtrain.kernels.attention import RING_BLOCKS, Device, Wanted, choose
from jaxtrain.kernels.fp8 import fp8_fault
from jaxtrain.model import decoder
from jaxtrain.model.config import ComputeConfig, DecoderConfig
from jaxtrain.model.context import find_exchange, refuse_context, refuse_length
from jaxtrain.model.decoder import Decoder, Params
from jaxtrain.model.export import replace_folder, save_pretrained
from jaxtrain.model.families import BY_NAME
from jaxtrain.model.generate import generate, unroll
from jaxtrain.model.hf_config import (
    add_stop_tokens,
    read_config,
    read_generation_config,
    replace_text_fields,
)
from jaxtrain.model.lora import (
    MAGNITUDE,
    Lora,
    find_adapters,
    in_dtype,
    init_adapters,
    join,
    merge_weights,
    partition,
    split,
    start_magnitudes,
    take_adapters,
)
from jaxtrain.model.peft_folder import (
    open_adapter,
    read_adapter,
    read_peft_config,
    refuse_other_base,
    verify_adapter,
    write_adapter,
)
from jaxtrain.model.quantized import Kind, may_be_quantized
from jaxtrain.model.weights import load_params, open_tensors
from jaxtrain.model_folder import locate
from jaxtrain.parallel.host_memory import has_host_memory
from jaxtrain.parallel.layout import BatchLayout
from jaxtrain.parallel.mesh import compute_capability, platform
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.checkpoint import AdapterExport
from jaxtrain.recipe.errors import RecipeError, WeightError
from jaxtrain.recipe.model import ModelConfig
from jaxtrain.recipe.section import expand_user
from jaxtrain.registry import Factory

WANTED_ATTENTION: dict[str, Wanted] = {
    "eager": "reference",
    "reference": "reference",
    "pallas": "pallas",
}
"""`attn_implementation` → what the kernel is asked for; everything else is automatic."""


class Placement(NamedTuple):
    """What a model is computed on."""

    layout: BatchLayout
    sequence_tokens: int
    """T of the longest batches"""
    tiled_mlp: bool
    routing_replay: bool = False
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """in place of the one of the model's section"""
    offload_inputs: bool = False
    """layer inputs wait for the backward pass in the host's memory"""
    splits_gradients: bool = False
    """devices that hold the same parameters have parts of their gradients"""


@dataclass(frozen=True)
class ModelSpec:
    """A model before its arrays: what it is and where its weights lie."""

    config: DecoderConfig
    hf_config: dict[str, Any]
    path: Path
    stored_tokens: int | None = None
    """tokens of the vocabulary that have weights at `path`, where that is not all"""
    placement: Placement | None = None
    """what it is computed on, once that is known"""
    generation_config: dict[str, Any] | None = None
    adapters: Lora | None = None
    """what is trained of it, where that is not all"""

    def with_room(self, tokens: int, config: ModelConfig) -> "ModelSpec":
        """A model for so many tokens; RecipeError where it would have to grow and may not."""
        room = self.config.vocab_size
        if tokens <= room:
            return self
        if not config.resize_vocab:
            raise RecipeError(
                f"model.resize_vocab: the tokenizer has {tokens} tokens and the embedding room for "
                f"{room}; write model.resize_vocab: true to add {tokens - room} rows"
            )
        grown = replace(self.config, vocab_size=tokens)
        fields = dict.fromkeys(BY_NAME[self.config.family].vocabulary, tokens)
        hf_config = replace_text_fields(self.hf_config, fields)
        return replace(self, config=grown, hf_config=hf_config, stored_tokens=room)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder as it is computed on a mesh, without its arrays."""

    spec: ModelSpec
    compute: ComputeConfig
    attention: str
    """Which attention kernel, and why."""
    graph: nnx.GraphDef
    shapes: Params
    """Shape and dtype of every parameter, but for those of a base."""
    base_shapes: Params
    """Those of the frozen base of adapters; empty without adapters."""
    plain_shapes: Params
    """Those of the whole decoder with no weight quantised, as weights are read."""
    from_scratch: bool
    quantization: Kind | None = None

    @classmethod
    def of(
        cls, spec: ModelSpec, compute: ComputeConfig, config: ModelConfig, *, attention: str = ""
    ) -> "LanguageModel":
        adapters, kind = spec.adapters, config.quantization
        sites = adapters.sites if adapters is not None else decoder.NO_ADAPTERS
        build = partial(
            decoder.abstract, spec.config, compute, param_dtype=config.param_dtype, adapters=sites
        )
        graph, shapes = build()
        plain, base = shapes, {}
        if adapters is not None:
            shapes, base = split(adapters, shapes)
            base = in_dtype(base, compute.compute_dtype)
            plain = join(shapes, base)
        if adapters is not None and kind is not None:
            leaves = jax.tree_util.tree_leaves_with_path(base)
            paths = filter(may_be_quantized, (path_name(path) for path, _ in leaves))
            graph, quantized = build(quantized=dict.fromkeys(paths, kind))
            base = in_dtype(split(adapters, quantized)[1], compute.compute_dtype)
        return cls(spec, compute, attention, graph, shapes, base, plain, config.from_scratch, kind)

    @property
    def adapters(self) -> Lora | None:
        return self.spec.adapters

    @property
    def all_shapes(self) -> Params:
        """Those of the whole decoder."""
        return join(self.shapes, self.base_shapes)

    def merge(self, params: Params, base: Params | None = None) -> Decoder:
        """The module with these parameters: what a loss function is given."""
        return decoder.merge(self.graph, join(params, base or {}))

    def split(self, everything: Params) -> tuple[Params, Params]:
        """The parameters of the whole decoder as those that may be trained, and their base."""
        return (everything, {}) if self.adapters is None else split(self.adapters, everything)

    @property
    def windows(self) -> tuple[tuple[int | None, float], ...]:
        """Attention window of each layer that has attention, and its head size as a share of the
        decoder's."""
        config = self.spec.config
        one = lambda layer: (layer.window, (layer.head_size or config.head_size) / config.head_size)
        layers = (layer for g in config.groups for _ in range(g.repeats) for layer in g.layers)
        return tuple(one(layer) for layer in layers if not layer.is_recurrent)

    def first_params(self, shardings: Any, *, seed: int, given: Decoder | None = None) -> Params:
        """Parameters of the whole decoder, copied from a given one, read from disk or random, each
        made where it lives."""
        if given is not None:
            return self._copied(given, shardings)
        everything = self._load(shardings, seed)
        if self.adapters is None or not (name := self.adapters.config.path):
            return everything
        folder, (_, base) = expand_user(name), self.split(everything)
        refuse_other_base(folder, base)
        read = read_adapter(folder, self.adapters, self.shapes, self.spec.config)
        return join(jax.device_put(read, self.split(shardings)[0]), base)

    def first_base(self, shardings: Any, *, seed: int, given: Decoder | None = None) -> Params:
        """The base alone, which `first_params` joins with the adapters."""
        whole = self._load(shardings, seed) if given is None else self._copied(given, shardings)
        return self.split(whole)[1]

    def _load(self, shardings: Any, seed: int) -> Params:
        """The model as it is read or drawn, with adapters as they begin."""
        shapes, config = self.plain_shapes, self.spec.config
        (_, plain), (placed_adapters, placed) = take_adapters(shapes), take_adapters(shardings)
        if self.from_scratch:

            def make(key: jax.Array) -> Params:
                made = decoder.init_params(config, self.compute, key)
                return jax.tree.map(lambda value, shape: value.astype(shape.dtype), made, plain)

            params = jax.jit(make, out_shardings=placed)(jax.random.key(seed))
        else:
            params = self._read(plain, placed, self.quantization)
        if self.adapters is None:
            return params
        adapters = init_adapters(self.adapters, shapes, seed)
        params = join(params, jax.device_put(adapters, placed_adapters))
        if not self.adapters.config.use_dora:
            return params
        chooses = lambda path: path.endswith(MAGNITUDE)
        start = jax.jit(
            partial(start_magnitudes, self.adapters, self.graph),
            out_shardings=partition(shardings, chooses)[0],
        )
        return join(start(params), partition(params, chooses)[1])

    def _read(self, shapes: Params, shardings: Any, quantization: Kind | None = None) -> Params:
        return load_params(
            self.spec.path,
            self.spec.config,
            shapes,
            shardings,
            stored_tokens=self.spec.stored_tokens,
            quantization=quantization,
        )

    def _copied(self, module: Decoder, shardings: Any) -> Params:
        """The parameters of a module of this shape; WeightError for one of another."""
        _, params = decoder.split(module)
        wanted, found = map(_shapes_by_name, (self.all_shapes, params))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise WeightError(
                    f"model: {name} is {found.get(name, 'missing')} in the given model and "
                    f"{wanted.get(name, 'missing')} in the recipe's"
                )
        return jax.device_put(params, shardings, may_alias=False)

    def save(
        self,
        folder: Path,
        params: Params,
        *,
        dtype: str,
        add_files: Callable[[Path], None],
        stop_tokens: Sequence[int] = (),
        max_shard_bytes: float = 4e9,
        verify: bool = True,
        adapter: AdapterExport = "adapter",
        base_name: str = "",
    ) -> None:
        """Write a folder that `transformers` loads; `add_files` puts the tokenizer into it.
        Generation from it stops at `stop_tokens` too, the ends of turns that were trained.

        With adapters, a folder of PEFT, which names its base `base_name`; or a model with the
        adapters `merged` into its weights; or both: the latter in the folder `merged` of the
        former, since transformers would add an adapter that lies beside the weights. Adapters of a
        quantised base are merged into the weights that it was made of."""
        generation_config = add_stop_tokens(
            self.spec.generation_config, self.spec.hf_config, stop_tokens
        )
        save_model = partial(
            save_pretrained,
            config=self.spec.config,
            hf_config=self.spec.hf_config,
            dtype=dtype,
            generation_config=generation_config,
            source=self.spec.path,
            add_files=add_files,
            max_shard_bytes=max_shard_bytes,
            verify=verify,
        )
        if self.adapters is None:
            return save_model(folder, params)
        if adapter == "merged":
            return save_model(folder, self._merge_weights(params, dtype))
        trained, base = self.split(params)
        with replace_folder(folder) as unfinished:
            parts = self.adapters, trained, base, self.spec.config
            write_adapter(unfinished, *parts, base_name)
            add_files(unfinished)
            if verify:
                verify_adapter(unfinished, self.adapters, trained, self.spec.config)
            if adapter == "both":
                save_model(unfinished / "merged", self._merge_weights(params, dtype))

    def _merge_weights(self, params: Params, dtype: str) -> Params:
        assert self.adapters is not None
        if self.quantization is not None:
            params = self._with_weights_as_read(params, self.adapters)
        placed = take_adapters(jax.tree.map(lambda leaf: leaf.sharding, params))[1]
        merge = partial(merge_weights, self.adapters, dtype=dtype)
        return jax.jit(merge, out_shardings=placed)(params)

    def _with_weights_as_read(self, params: Params, adapters: Lora) -> Params:
        """The parameters over a base that nothing has rounded, in the host's memory: whole, it may
        be larger than that of a device."""
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        chooses = lambda path: "_lora/" in path or adapters.is_trained(path)
        _, shapes = partition(self.plain_shapes, chooses)
        base = self._read(shapes, jax.tree.map(lambda _: host, shapes))
        return join(jax.device_put(partition(params, chooses)[0], host), base)

    def generate(self, params: Params, prompts: Sequence[Sequence[int]], **how: Any) -> Any:
        """New tokens of each prompt; see `jaxtrain.model.generate`."""
        return generate(*self.prepare(params), prompts, **how)

    def prepare(self, params: Params) -> tuple[nnx.GraphDef, Params]:
        """The decoder as this platform generates with it; on CPU with copies of the layers."""
        on_cpu = jax.default_backend() == "cpu"
        return unroll(self.graph, params) if on_cpu else (self.graph, params)


def _shapes_by_name(params: Params) -> dict[str, str]:
    """Name → dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {path_name(path): f"{a.dtype}{list(a.shape)}" for path, a in leaves}


class ModelFactory(Factory, kind="model"):
    """Makes the model in two steps, so that data is checked before weights are read."""

    events = {"create-config": "create_config", "create-model": "create_model"}
    config: ModelConfig

    def create_config(self) -> ModelSpec:
        """What the model is: read from its config, no weights."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no create_config()")

    def check_weights(self, model_config: ModelSpec) -> None:
        """Raises for weights that cannot be read, where that is seen without reading them."""

    def create_model(self, model_config: ModelSpec) -> LanguageModel:
        """The model as `model_config.placement` computes it, without arrays."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no create_model(config)")


class HFModelFactory(ModelFactory):
    """A Hugging Face folder, hub name or GGUF file of a supported family."""

    name = "huggingface"

    def create_config(self) -> ModelSpec:
        return self.with_adapters(self.describe())

    def describe(self) -> ModelSpec:
        """The model without adapters."""
        path = locate(self.config.name_or_path, with_weights=not self.config.from_scratch)
        config, hf = read_config(path, self.config)
        return ModelSpec(config, hf, path, generation_config=read_generation_config(path))

    def with_adapters(self, spec: ModelSpec) -> ModelSpec:
        """RecipeError for adapters that this model cannot have."""
        if self.config.peft_config is None:
            return spec
        peft = read_peft_config(self.config.peft_config)
        adapters = find_adapters(peft, spec.config)
        if peft.path:
            open_adapter(expand_user(peft.path), adapters, spec.config)
        return replace(spec, adapters=adapters)

    def check_weights(self, model_config: ModelSpec) -> None:
        """WeightError for a folder or file whose tensors are not those of its config."""
        if not self.config.from_scratch:
            spec = model_config
            shapes = decoder.abstract(spec.config, ComputeConfig()).shapes
            open_tensors(spec.path, spec.config, shapes, spec.stored_tokens)

    def create_model(self, model_config: ModelSpec) -> LanguageModel:
        """RecipeError for what the mesh cannot compute."""
        config, spec, placement = self.config, model_config, model_config.placement
        assert placement is not None
        layout = placement.layout
        on, kinds, num_kinds = (
            platform(layout.mesh), spec.config.layer_kinds, len(spec.config.groups)
        )  # fmt: skip
        try:
            attention = choose(
                Device(on, compute_capability(layout.mesh)),
                wanted=WANTED_ATTENTION.get(config.attn_implementation, "auto"),
                head_sizes=[spec.config.of_layer(s).query_size for s in kinds],
                tokens=placement.sequence_tokens,
            )
        except ValueError as error:
            raise RecipeError(f"model.attn_implementation: {error}") from None
        kernel, how = attention
        context, tensor = (layout.mesh.shape[axis] for axis in ("context", "tensor"))
        refuse_length(spec.config, placement.sequence_tokens)
        refuse_context(spec.config, layout.mesh.shape)
        exchange = None
        if context > 1:
            exchange, way = find_exchange(spec.config, context=context, tensor=tensor)
            is_slow = exchange == "ring" and kernel not in RING_BLOCKS
            how = f"attention: plain jnp {way}" if is_slow else f"{how}; {way}"
        if layout.stages > 1 and spec.config.num_expert_layers:
            raise RecipeError(
                f"mesh.pipeline: {layout.stages} cannot split a model with experts; use mesh.expert"
            )
        if layout.stages > 1 and num_kinds > 1:
            raise RecipeError(
                f"mesh.pipeline: {layout.stages} needs a stack of equal layers, found "
                f"{num_kinds} kinds of layers in the model"
            )
        if layout.stages > 1 and spec.config.per_layer_width:
            raise RecipeError(
                f"mesh.pipeline: {layout.stages} cannot split a model whose layers have inputs of "
                "their own (hidden_size_per_layer_input); use mesh.fsdp"
            )
        kind = layout.mesh.devices.flat[0].device_kind
        fault = config.matmul_precision and fp8_fault(on, kind, compute_capability(layout.mesh))
        if fault:
            raise RecipeError(f"model.matmul_precision: {fault}")
        offload_inputs = placement.offload_inputs and has_host_memory(
            layout.mesh, ["activation_checkpoint_cpu_offload"]
        )
        dtype = config.dtype or ("float32" if on == "cpu" else "bfloat16")
        compute = ComputeConfig(
            compute_dtype=placement.compute_dtype or dtype,
            matmul=config.matmul_precision,
            attention=kernel,
            exchange=exchange,
            remat=config.remat_policy,
            remat_every=config.remat_every_nth_layer,
            tiled_mlp=placement.tiled_mlp,
            routing_replay=placement.routing_replay,
            offload_inputs=offload_inputs,
            splits_gradients=placement.splits_gradients,
            stages=layout.stages,
            microbatches=layout.num_microbatches,
        )
        return LanguageModel.of(spec, compute, config, attention=how)
