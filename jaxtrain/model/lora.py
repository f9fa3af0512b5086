"""LoRA (Hu et al. 2021, arXiv:2106.09685): which modules of a model get adapters, by the rules of
the PEFT package, and the parameters of these adapters beside the frozen ones of their base.

Of a decoder with adapters the *parameters* are what is trained: the factors of the adapters, and
`modules_to_save`. All else is the *base*, a tree of the same nesting; both together are what the
decoder's graph merges with. The layers of a stack may have adapters of different rank: each is
padded with zeros to the largest, which have zero gradients and stay zeros.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtrain.model import decoder
from jaxtrain.model.config import AdapterSite, ComputeConfig, DecoderConfig
from jaxtrain.model.families import BY_NAME, Family
from jaxtrain.model.quantized import is_part
from jaxtrain.model.tables import name_in_file, stored_dtype
from jaxtrain.model.weights import Piece, pieces
from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.matrices import MATRICES, place_of
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, RecipeError, did_you_mean, show
from jaxtrain.recipe.model import PeftConfig

PARAMETERS = ("mlp/router", "mlp/expert_gate_up", "mlp/expert_down",
              "experts/expert_gate_up", "experts/expert_down")  # fmt: skip
"""Matrices that are no linear modules in transformers, but parameters of other modules: PEFT adapts
them by `target_parameters`."""
LINEAR = tuple(place for place in MATRICES if place not in PARAMETERS)
BEFORE = "layer_inputs/project"
"""One before the layers, a stack of one."""
DEFAULT_TARGETS = {
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        ("q_proj", "v_proj"),
    ),
}
"""Family → the modules that PEFT adapts where a recipe names none; it has no more of them."""
_EXPERTS = {
    "gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}  # fmt: skip
FORMER_MODULES = {
    **dict.fromkeys(("qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe"), _EXPERTS),
    "mixtral": {
        "gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj",
    },
}  # fmt: skip
"""Family → its modules of older versions of transformers, and the parameters that they are now. By
these names PEFT adapts the parameters, and no module of such a name that there still is."""
EMBEDDINGS = ("embed/embedding", "embed/positions", "embed/layer_inputs", "head")
KEY = "model.peft_config"
MAGNITUDE = "/magnitude"
Params = dict[str, Any]


class Module(NamedTuple):
    """A linear module of transformers, or a parameter of another module, and the part of our
    parameter that is its weight."""

    name: str
    """`model.layers.3.self_attn.q_proj`, or `model.layers.3.mlp.experts.down_proj`"""
    path: str
    """of our parameter"""
    at: int
    """index of its layer in the stack"""
    begin: int
    end: int
    """its entries of the joined dimension, if there is one"""
    pieces: tuple[Piece, ...]
    rank: int = 0
    """0 without an adapter"""
    scale: float = 0.0

    @property
    def local_name(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    @property
    def is_parameter(self) -> bool:
        return place_of(self.path) in PARAMETERS

    @property
    def experts(self) -> int:
        """Matrices of its layer."""
        (num_lead, _), piece = self._dims, self.pieces[0]
        return prod(piece.split[axis] for axis in piece.order[1:num_lead])

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        (num_lead, first), piece = self._dims, self.pieces[0]
        inputs = prod(piece.split[axis] for axis in piece.order[num_lead:first])
        return inputs, sum(prod(p.split[axis] for axis in p.order[first:]) for p in self.pieces)

    def output_order(self) -> np.ndarray:
        """The index in our order of each of its outputs."""
        _, first = self._dims
        shape = [part.stop for part in self.pieces[-1].place[first:]]
        places = [list(piece.place[first:]) for piece in self.pieces]
        if self.end > self.begin:
            shape[-2] = self.end - self.begin
            for place in places:
                place[-2] = slice(place[-2].start - self.begin, place[-2].stop - self.begin)
        ours = np.arange(prod(shape)).reshape(shape)
        rows = [
            ours[tuple(place)].transpose(np.argsort(piece.order[first:])).reshape(-1)
            for piece, place in zip(self.pieces, places, strict=True)
        ]
        return np.concatenate(rows)

    @property
    def _dims(self) -> tuple[int, int]:
        """How many dimensions of our parameter number matrices, and the first of its outputs."""
        matrix = MATRICES[place_of(self.path)]
        return len(matrix.lead), len(matrix.lead) + len(matrix.inputs)


@dataclass(frozen=True)
class Lora:
    """What is trained of a model."""

    config: PeftConfig
    modules: tuple[Module, ...]
    """that have adapters"""
    sites: Mapping[str, tuple[AdapterSite, ...]] = field(default_factory=dict)
    """path of a parameter → the adapters that its products have"""
    whole: frozenset[str] = frozenset()
    """paths of the parameters that are trained whole"""

    def is_trained(self, path: str) -> bool:
        return path in self.whole or path.endswith(("/a", "/b", MAGNITUDE))

    @property
    def num_parameters(self) -> int:
        """Of all adapters, without padding."""
        magnitudes = sum(module.sizes[1] for module in self.modules) if self.config.use_dora else 0
        return magnitudes + sum(m.experts * m.rank * sum(m.sizes) for m in self.modules)


# Which modules get adapters.


def find_adapters(peft: PeftConfig, config: DecoderConfig) -> Lora:
    """The modules and parameters that PEFT would adapt; RecipeError names every key that selects
    nothing, or what is not supported here."""
    family, key = BY_NAME[config.family], f"{KEY}.target_modules"
    every, faults = tuple(list_modules(config)), []
    former = FORMER_MODULES.get(family.name, {})
    if former:
        peft = _with_parameters(peft, every, former, faults)
    linear = [module for module in every if not module.is_parameter]
    targets = _targets(peft, family)
    embeddings = [
        module_name(family, tensor.name)
        for path in EMBEDDINGS if path in family.tensors
        for tensor in family.tensors[path]
    ]  # fmt: skip
    names = sorted({module.local_name for module in linear} | former.keys())
    there_is = f"there are {', '.join(names)}"
    faults += [
        Fault(key, f"{name} gets no adapter here; modules_to_save can train it whole")
        for name in embeddings
        if not _is_all_linear(targets) and _is_target(peft, targets, name)
    ]
    known = [*(module.name for module in linear), *embeddings]
    for name in targets if isinstance(targets, tuple) else ():
        if not any(_matches((name,), one) for one in known):
            near = did_you_mean(name, names)
            faults.append(Fault(key, f"{show(name)} matches no module; {there_is}{near}"))
    parameters = _target_parameters(peft, every, faults)
    chosen = [
        module
        for module in every
        if (
            module.name in parameters
            if module.is_parameter
            else _is_target(peft, targets, module.name)
        )
    ]
    if not chosen and not faults:
        faults.append(Fault(key, f"{show(targets)} leaves no module; {there_is}"))
    for name, patterns in (
        ("rank_pattern", peft.rank_pattern),
        ("alpha_pattern", peft.alpha_pattern),
    ):
        for pattern in patterns if chosen else ():
            if not any(_fits(pattern, module.name) for module in chosen):
                what = f"{show(pattern)} matches no module with an adapter; {there_is}"
                faults.append(Fault(f"{KEY}.{name}", what))
    whole = _whole(peft, config, faults)
    if faults:
        raise RecipeError(faults)
    chosen = [_with_rank(peft, module) for module in chosen]
    return Lora(peft, tuple(chosen), _sites(peft, config, chosen), whole)


def _target_parameters(peft: PeftConfig, every: Sequence[Module], faults: list[Fault]) -> set[str]:
    """The names of those that get adapters, in whatever layers they are."""
    there = [module.name for module in every if module.is_parameter]
    names = sorted({".".join(full.split(".")[-2:]) for full in there})
    for name in peft.target_parameters or ():
        if not any(_matches((name,), full) for full in there):
            what = f"{show(name)} matches no parameter that gets an adapter; "
            near = did_you_mean(name, names)
            what += f"there are {', '.join(names)}{near}" if names else "there is none"
            faults.append(Fault(f"{KEY}.target_parameters", what))
    found = [full for full in there if _matches(peft.target_parameters or (), full)]
    for key, is_on in (("lora_dropout", peft.lora_dropout), ("use_dora", peft.use_dora)):
        if found and is_on:
            what = f"is not possible on {found[0]}, a parameter and no module in PEFT"
            faults.append(Fault(f"{KEY}.{key}", f"{what}; remove it, or adapt linear modules only"))
    return set(found)


def _with_parameters(
    peft: PeftConfig, every: Sequence[Module], former: Mapping[str, str], faults: list[Fault]
) -> PeftConfig:
    """The settings that PEFT makes of these where modules have become parameters."""
    targets, key = peft.target_modules, f"{KEY}.target_modules"
    if targets is None:
        return peft
    if _is_all_linear(targets):
        linear = {module.local_name for module in every if not module.is_parameter}
        targets = (*sorted(linear - former.keys()), *former)
    elif isinstance(targets, str):
        targets = _names_of_text(peft, targets, every, former, faults)
    left, taken = [], set()
    for target in targets:
        name = next((name for name in former if _matches((name,), target)), None)
        left.append(target) if name is None else taken.add(name)
    named = peft.target_parameters or ()
    parameters = dict.fromkeys([*named, *(former[name] for name in sorted(taken))])
    fused = [name for name, parameter in former.items() if parameter == "gate_up_proj"]
    there = taken.intersection(fused)
    if len(there) == 1:
        what = f"names one of {' and '.join(fused)}, which PEFT adapts as one; name both or neither"
        faults.append(Fault(key, what))
    # Each would have an adapter, of which PEFT makes one.
    doubled = {r".*\.gate_up_proj": len(fused)} if there else {}
    ranks = {pattern: n * peft.r for pattern, n in doubled.items()}
    alphas = {pattern: n * peft.lora_alpha for pattern, n in doubled.items()}
    return peft.model_copy(update={
        "target_modules": tuple(left), "target_parameters": tuple(parameters) or None,
        "rank_pattern": {**peft.rank_pattern, **ranks},
        "alpha_pattern": {**peft.alpha_pattern, **alphas},
    })  # fmt: skip


def _names_of_text(
    peft: PeftConfig,
    text: str,
    every: Sequence[Module],
    former: Mapping[str, str],
    faults: list[Fault],
) -> tuple[str, ...]:
    """The names of modules that PEFT makes of a regular expression there. It adapts all modules of
    these names, so one that fits only some of them is refused."""
    linear = {m.name: m.local_name for m in every if not m.is_parameter}
    past = {
        m.name.removesuffix(parameter) + name: name
        for m in every if m.is_parameter
        for name, parameter in former.items() if _matches((parameter,), m.name)
    }  # fmt: skip
    names = {name for full, name in {**linear, **past}.items() if _is_target(peft, text, full)}
    adapted = [full for full, name in past.items() if name in names]
    adapted += [
        full for full, name in linear.items()
        if name not in former and _is_target(peft, tuple(names), full)
    ]  # fmt: skip
    if beside := next((full for full in adapted if not _is_target(peft, text, full)), None):
        what = f"{show(text)} does not fit {beside}, to which PEFT extends it here; list names"
        faults.append(Fault(f"{KEY}.target_modules", what))
    return tuple(sorted(names))


def list_modules(config: DecoderConfig) -> Iterator[Module]:
    """Every module and parameter that may have an adapter, by the tables of the tensors."""
    family, known = BY_NAME[config.family], set(all_paths(config))
    paths = [
        f"layers/{g}/{m}/{place}"
        for g, group in enumerate(config.groups)
        for m in range(len(group.layers))
        for place in MATRICES
    ]
    for path in [*paths, BEFORE]:
        if path not in known:
            continue
        name_of = runtime_name if place_of(path) in PARAMETERS else module_name
        by_module: dict[str, list[Piece]] = {}
        for piece in pieces(config, path, family.in_memory):
            by_module.setdefault(name_of(family, piece.name), []).append(piece)
        # Several modules of a layer are joined along the last dimension but one.
        is_joined = len({name.rsplit(".", 1)[-1] for name in by_module}) > 1
        for module, parts in by_module.items():
            joined = [part.place[-2] for part in parts] if is_joined else [slice(0, 0)]
            begin, end = joined[0].start, joined[-1].stop
            yield Module(module, path, parts[0].place[0].start, begin, end, tuple(parts))


def runtime_name(family: Family, tensor: str) -> str:
    """The name that a tensor of the tables has in a model of transformers."""
    return name_in_file(family.in_memory, tensor)


def module_name(family: Family, tensor: str) -> str:
    return runtime_name(family, tensor).rsplit(".", 1)[0]


def _targets(peft: PeftConfig, family: Family) -> tuple[str, ...] | str:
    if peft.target_modules is not None:
        return peft.target_modules
    if peft.target_parameters and family.name not in DEFAULT_TARGETS.keys() - FORMER_MODULES:
        return ()
    if family.name not in DEFAULT_TARGETS:
        what = f"has no default for {family.name}; write all-linear, or names of modules"
        raise RecipeError([Fault(f"{KEY}.target_modules", what)])
    return DEFAULT_TARGETS[family.name]


def _is_all_linear(targets: tuple[str, ...] | str) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _is_target(peft: PeftConfig, targets: tuple[str, ...] | str, name: str) -> bool:
    """Whether the module of this name gets an adapter."""
    if _matches(peft.exclude_modules or (), name):
        return False
    if _ends_of_parents(peft.modules_to_save or (), name):
        return False
    if _is_all_linear(targets):
        return True
    if isinstance(targets, str) or name in targets:
        return _matches(targets, name)
    layers = peft.layers_to_transform
    layers = (layers,) if isinstance(layers, int) else layers
    if layers and not ((match := LAYER.match(name)) and int(match[1]) in layers):
        return False
    return _matches(targets, name)


LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def _matches(wanted: Iterable[str] | str, name: str) -> bool:
    """By a regular expression of the whole name, or by names of its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _with_rank(peft: PeftConfig, module: Module) -> Module:
    def look_up(patterns: Mapping[str, int], default: int) -> int:
        return next((n for pattern, n in patterns.items() if _fits(pattern, module.name)), default)

    rank = look_up(peft.rank_pattern, peft.r)
    alpha = look_up(peft.alpha_pattern, peft.lora_alpha)
    return module._replace(rank=rank, scale=alpha / (rank**0.5 if peft.use_rslora else rank))


def _sites(
    peft: PeftConfig, config: DecoderConfig, chosen: Sequence[Module]
) -> dict[str, tuple[AdapterSite, ...]]:
    found: dict[str, dict[str, list[Module]]] = {}
    for module in chosen:
        found.setdefault(module.path, {}).setdefault(module.local_name, []).append(module)
    return {
        path: tuple(_site(peft, config, path, modules) for modules in by_name.values())
        for path, by_name in found.items()
    }


def _site(
    peft: PeftConfig, config: DecoderConfig, path: str, modules: Sequence[Module]
) -> AdapterSite:
    repeats = 1 if path == BEFORE else config.groups[int(path.split("/")[1])].repeats
    ranks, scales = [0] * repeats, [0.0] * repeats
    for module in modules:
        ranks[module.at], scales[module.at] = module.rank, module.scale
    name, begin, end = modules[0].local_name, modules[0].begin, modules[0].end
    kind = peft.lora_dropout, peft.use_dora
    return AdapterSite(name, begin, end, tuple(ranks), tuple(scales), *kind)


def _whole(peft: PeftConfig, config: DecoderConfig, faults: list[Fault]) -> frozenset[str]:
    """Parameters of `modules_to_save`."""
    wanted, family = peft.modules_to_save or (), BY_NAME[config.family]
    if not wanted:
        return frozenset()
    whole, seen = set(), set()
    key = f"{KEY}.modules_to_save"

    selects = partial(_ends_of_parents, wanted)
    everything: dict[str, list[str]] = {}
    for path in all_paths(config):
        names = {piece.name for piece in pieces(config, path, family.in_memory)}
        everything[path] = sorted(module_name(family, name) for name in names)
    for path, names in everything.items():
        taken = [name for name in names if selects(name)]
        seen |= {end for name in taken for end in selects(name)}
        if not taken:
            continue
        if len(taken) < len(names):
            left = next(name for name in names if name not in taken)
            what = f"{taken[0]} is one parameter here with {left}; name both or neither"
            faults.append(Fault(key, what))
        elif "/expert_" in path or "/router" in path:
            faults.append(Fault(key, f"{taken[0]} is of experts, which stay frozen; remove it"))
        elif config.tied and path == "embed/embedding":
            what = (
                f"{taken[0]} is also the head of this model, which PEFT would train apart from it"
            )
            faults.append(Fault(key, f"{what}; remove it"))
        else:
            whole.add(path)
    last = sorted({name.rsplit(".", 1)[-1] for names in everything.values() for name in names})
    for end in wanted:
        if end not in seen:
            what = f"{show(end)} matches no module; there are {', '.join(last)}"
            faults.append(Fault(key, what + did_you_mean(end, last)))
    return frozenset(whole)


def _ends_of_parents(ends: Iterable[str], name: str) -> set[str]:
    """Those of `ends` in which this module, or one that holds it, ends."""
    parts = name.split(".")
    parents = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return {end for end in ends if any(parent.endswith(end) for parent in parents)}


def all_paths(config: DecoderConfig) -> list[str]:
    shapes = decoder.abstract(config, ComputeConfig()).shapes
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]


# The parameters.


def partition(
    tree: Params, chooses: Callable[[str], bool], path: str = ""
) -> tuple[Params, Params]:
    """The leaves whose paths are chosen, and the others."""
    chosen, rest = {}, {}
    for name, part in tree.items():
        where = f"{path}/{name}" if path else name
        if not isinstance(part, dict):
            (chosen if chooses(where) else rest)[name] = part
            continue
        for kept, found in zip((chosen, rest), partition(part, chooses, where), strict=True):
            if found:
                kept[name] = found
    return chosen, rest


def split(lora: Lora, tree: Params) -> tuple[Params, Params]:
    """What is trained of a tree like the whole decoder's, and its base."""
    return partition(tree, lora.is_trained)


def take_adapters(tree: Params) -> tuple[Params, Params]:
    """The adapters with their constants, and the parameters of the model alone."""
    return partition(tree, lambda path: "_lora/" in path)


def join(params: Params, base: Params) -> Params:
    """The inverse of `split`."""
    both = params.keys() & base.keys()
    return {**base, **params, **{name: join(params[name], base[name]) for name in both}}


def in_dtype(base: Params, dtype: str) -> Params:
    """Shapes of a base whose weights are in this dtype: nothing small is ever added to them. The
    constants of adapters stay in float32, and quantised weights as they are."""
    kept, weights = partition(base, lambda path: "_lora/" in path or is_part(path))
    convert = lambda path, a: jax.ShapeDtypeStruct(a.shape, stored_dtype(path[-1].key, dtype))
    return join(kept, jax.tree_util.tree_map_with_path(convert, weights))


def init_adapters(lora: Lora, shapes: Params, seed: int) -> Params:
    """First factors and constant scales of the adapters, distributed as PEFT's, on the host: they
    are small, and programs that draw on devices take long to compile. `shapes` are those of the
    whole decoder, whose other parameters are left out.

    Each adapter draws by the name of its parameter, whatever else has one.
    """

    def init(tree: Params, path: str) -> Params:
        if "a" in tree:
            parameter, _, module = path.rpartition("_lora/")
            site = next(site for site in lora.sites[parameter] if site.name == module)
            draw = np.random.Generator(np.random.Philox(key=[seed, crc32(path.encode())]))
            lead = len(MATRICES[place_of(parameter)].lead)
            return _init_adapter(lora.config, site, tree, draw, lead)
        return {name: init(part, f"{path}/{name}".lstrip("/")) for name, part in tree.items()}

    return init(take_adapters(shapes)[0], "")


def _init_adapter(
    config: PeftConfig, site: AdapterSite, shapes: Params, draw: np.random.Generator, lead: int
) -> Params:
    """`lead` dimensions number matrices."""
    a, b = (np.zeros(shapes[name].shape, np.float32) for name in "ab")
    E, inputs = a.shape[1:lead], a.shape[lead:-1]  # experts, if there are any
    for at, rank in enumerate(site.ranks):  # what is not drawn is padding
        shape = (*E, *inputs, rank)
        if config.init_lora_weights == "gaussian":
            a[at][..., :rank] = draw.standard_normal(shape, np.float32) / max(rank, 1)
        else:
            a[at][..., :rank] = _uniform(draw, shape) * prod(inputs) ** -0.5
        if config.init_lora_weights is False and rank:
            drawn = _uniform(draw, (*E, rank, *b.shape[lead + 1 :]))
            b[(at, *(slice(None),) * len(E), slice(rank))] = drawn * (prod(E) * rank) ** -0.5
    made = {
        "a": a.astype(shapes["a"].dtype),
        "b": b.astype(shapes["b"].dtype),
        "scale": np.array(site.scales, np.float32),
        "salt": draw.integers(2**32, size=len(site.ranks), dtype=np.uint32),
    }
    # The magnitudes follow from the weights: `start_magnitudes`.
    zeros = lambda shape: np.zeros(shape.shape, shape.dtype)
    return {name: made[name] if name in made else zeros(shape) for name, shape in shapes.items()}


def _uniform(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Between -1 and 1."""
    return 2 * draw.random(shape, np.float32) - 1


def start_magnitudes(lora: Lora, graph: nnx.GraphDef, params: Params) -> Params:
    """The magnitudes of all adapters where they begin: the lengths of the columns that each then
    has, found one layer at a time. Pure."""
    model: Any = decoder.merge(graph, params)
    found: Params = {}
    for path in lora.sites:
        *parents, name = path.split("/")
        stack, weights = decoder.split(reduce(getattr, parents, model))

        def of_layer(weights: Params, stack: nnx.GraphDef = stack, name: str = name) -> Params:
            layer = nnx.merge(stack, fetch(weights))
            weight, adapters = getattr(layer, name), getattr(layer, f"{name}_lora")
            lengths = lambda a: jnp.where(a.scale[...] > 0, a.column_lengths(weight), 0)
            return {module: {"magnitude": lengths(a)} for module, a in adapters.items()}

        place: Params = reduce(lambda tree, key: tree.setdefault(key, {}), parents, found)
        place[f"{name}_lora"] = lax.map(of_layer, weights)
    return found


def merge_weights(lora: Lora, params: Params, dtype: str) -> Params:
    """A plain decoder's parameters, of a whole tree with adapters: W + s A B, of DoRA stretched to
    the magnitudes, computed in float32 and then rounded to `dtype`. Pure."""

    def merge(tree: Params, path: str) -> Params:
        found = {}
        for name, part in tree.items():
            if name.endswith("_lora"):
                continue
            where = f"{path}/{name}" if path else name
            if isinstance(part, dict):
                found[name] = merge(part, where)
                continue
            weight = fetch(part).astype(jnp.float32)
            for site in lora.sites.get(where, ()):
                adapter = tree[f"{name}_lora"][site.name]
                a, b = (adapter[factor].astype(jnp.float32) for factor in ("a", "b"))
                scale = adapter["scale"].reshape(-1, *(1,) * (a.ndim - 1))
                multiply: Any = partial(jnp.tensordot, axes=1)
                for _ in MATRICES[place_of(where)].lead:
                    multiply = jax.vmap(multiply)
                own = slice(site.begin, site.end) if site.end > site.begin else slice(None)
                place = (..., own, slice(None))
                whole = weight[place] + multiply(scale * a, b)
                if site.is_dora:
                    is_adapted = adapter["scale"].reshape(-1, *(1,) * (whole.ndim - 1)) > 0
                    inputs = tuple(range(1, a.ndim - 1))
                    lengths = jnp.sqrt(jnp.square(whole).sum(inputs, keepdims=True))
                    magnitude = adapter["magnitude"].astype(jnp.float32)
                    stretch = jnp.expand_dims(magnitude, inputs) / jnp.where(is_adapted, lengths, 1)
                    whole *= jnp.where(is_adapted, stretch, 1)
                weight = weight.at[place].set(whole)
            found[name] = weight.astype(stored_dtype(name, dtype))
        return found

    return merge(params, "")
