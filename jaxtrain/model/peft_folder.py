"""Folders of the PEFT package: `adapter_config.json` and `adapter_model.safetensors`, written and
read.

L layers of a stack, r the largest rank of them.
"""

import hashlib
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from pydantic import ValidationError

from jaxtrain.model.config import DecoderConfig
from jaxtrain.model.families import BY_NAME
from jaxtrain.model.layers import mix_bits
from jaxtrain.model.lora import (
    KEY,
    Lora,
    Module,
    Params,
    find_adapters,
    runtime_name,
    take_adapters,
)
from jaxtrain.model.quantized import kind_of
from jaxtrain.model.tensor_file import (
    StoredTensor,
    TensorToWrite,
    read_file,
    read_metadata,
    write_file,
)
from jaxtrain.model.weights import Piece, pieces
from jaxtrain.model_folder import read_json
from jaxtrain.parallel.host_memory import fetch
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import CheckpointError, Fault, RecipeError, WeightError, show
from jaxtrain.recipe.messages import explain
from jaxtrain.recipe.model import PeftConfig
from jaxtrain.recipe.section import expand_user, is_off

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Begins the name of every tensor; PEFT's two wrappers around a model."""
BASE_SUM = "base"
"""Entry of the metadata of the weights: the checksum of the base they were trained on. That of a
quantised one has its kind in its name, so that an adapter is not held against whole weights."""
DESCRIBES = frozenset({
    "auto_mapping", "base_model_name_or_path", "peft_version", "qalora_group_size", "revision",
})  # fmt: skip
"""Fields of adapter_config.json that change no result."""
MAY_DIFFER = frozenset({"path", "peft_type", "lora_dropout", "init_lora_weights"})
"""Keys in which a recipe may differ from the adapter that it continues."""
MAX_FAULTS = 8


# adapter_config.json


def config_to_export(lora: Lora, family: str, base_name: str) -> dict[str, Any]:
    """The content of adapter_config.json, whose targets select what was trained in PEFT too."""
    config = lora.config
    fields = config.model_dump(mode="json", exclude={"path"}, exclude_none=True)
    return fields | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "target_modules": _targets_to_export(lora, family),
        "fan_in_fan_out": family == "gpt2",
        "inference_mode": True,
    }


def _targets_to_export(lora: Lora, family: str) -> list[str] | str:
    if BY_NAME[family].text is not None:
        # By their ends they would be modules of the other parts of the model too.
        return sorted(module.name for module in lora.modules if not module.is_parameter)
    written = lora.config.target_modules
    if written is None or (isinstance(written, str) and written.lower() == "all-linear"):
        return sorted({m.local_name for m in lora.modules if not m.is_parameter})
    return written if isinstance(written, str) else list(written)


def read_base_name(folder: Path) -> str | None:
    """The model that an adapter in this folder belongs to; None where there is no adapter."""
    if not (folder / CONFIG).is_file():
        return None
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise RecipeError([Fault(str(folder / CONFIG), "names no base_model_name_or_path")])
    return name


def read_peft_config(peft: PeftConfig) -> PeftConfig:
    """The settings of the adapter that a recipe continues, as far as it names one; RecipeError
    for those that are not supported, and for keys of the recipe that differ."""
    if peft.path is None:
        return peft
    folder = expand_user(peft.path)
    if not (folder / CONFIG).is_file():
        raise RecipeError([Fault(f"{KEY}.path", f"must be a folder with {CONFIG}, found {folder}")])
    found = read_json(folder / CONFIG)
    where = str(folder / CONFIG)
    known = PeftConfig.model_fields
    faults = [
        Fault(where, f"{name}: is not supported, found {show(value)}")
        for name, value in found.items()
        if name not in known and name not in DESCRIBES and not is_off(value)
    ]
    fields = {name: value for name, value in found.items() if name in known and value is not None}
    try:
        read = PeftConfig.model_validate({"peft_type": "missing", **fields})
    except ValidationError as error:
        for loc, what in explain(error, PeftConfig):
            faults.append(Fault(where, f"{'.'.join(map(str, loc))}: {what}"))
        raise RecipeError(faults) from None
    for name in sorted(peft.model_fields_set - MAY_DIFFER):
        ours, theirs = getattr(peft, name), getattr(read, name)
        if ours != theirs:
            what = f"is {show(ours)}, the adapter in {folder} has {show(theirs)}; remove it"
            faults.append(Fault(f"{KEY}.{name}", what))
    if faults:
        raise RecipeError(faults)
    kept = {"path": peft.path, "lora_dropout": peft.lora_dropout}
    return read.model_copy(update=kept)


# The tensors.


FACTORS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


class Factor(NamedTuple):
    """A tensor of one module's adapter in a PEFT file."""

    module: Module
    name: str
    """of `FACTORS`"""

    @property
    def path(self) -> str:
        """Of the leaf of our parameters that holds it."""
        return f"{self.module.path}_lora/{self.module.local_name}/{self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        ranks, (inputs, outputs) = self.module.experts * self.module.rank, self.module.sizes
        return {"a": (ranks, inputs), "b": (outputs, ranks), "magnitude": (outputs,)}[self.name]

    def take(self, leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape(-1)[self._index(leaf.shape)]

    def put(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        leaf.reshape(-1)[self._index(leaf.shape)] = tensor

    def _index(self, shape: tuple[int, ...]) -> np.ndarray:
        """Where in the flat leaf each entry of the tensor is."""
        size, (rank, experts) = prod(shape[1:]), (self.module.rank, self.module.experts)
        layer = self.module.at * size + np.arange(size)
        if self.name == "magnitude":
            return layer[self.module.output_order()]
        if self.name == "a":  # rows of an expert are neighbours
            by_expert = layer.reshape(experts, -1, shape[-1])[..., :rank]
            return by_expert.swapaxes(1, 2).reshape(experts * rank, -1)
        by_expert = layer.reshape(experts, -1, self.module.sizes[1])[:, :rank]
        ordered = by_expert[..., self.module.output_order()]
        return ordered.transpose(2, 1, 0).reshape(-1, rank * experts)  # columns of a rank are


class Whole(NamedTuple):
    """A tensor of a module that is trained whole."""

    path: str
    pieces: tuple[Piece, ...]
    """its rows"""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.pieces[-1].rows.stop, *self.pieces[-1].shape[1:])

    def take(self, leaf: np.ndarray) -> np.ndarray:
        return np.concatenate([piece.to_theirs(leaf[piece.place]) for piece in self.pieces])

    def put(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        for piece in self.pieces:
            leaf[piece.place] = piece.to_ours(tensor)


def list_parts(lora: Lora, config: DecoderConfig) -> dict[str, Factor | Whole]:
    """Every tensor of the file by its name."""
    family, holders = BY_NAME[config.family], _holders(lora)
    found: dict[str, Factor | Whole] = {
        f"{PREFIX}{holders[module.name]}.{theirs}": Factor(module, name)
        for module in lora.modules
        for name, theirs in FACTORS.items()
        if name != "magnitude" or lora.config.use_dora
    }
    for path in sorted(lora.whole):
        rows: dict[str, list[Piece]] = {}
        for piece in pieces(config, path, family.in_memory):
            rows.setdefault(PREFIX + runtime_name(family, piece.name), []).append(piece)
        found |= {name: Whole(path, tuple(parts)) for name, parts in rows.items()}
    return found


def _holders(lora: Lora) -> dict[str, str]:
    """Name of a module or parameter → the module that holds its adapter. PEFT wraps the module of a
    parameter, and again for the next of its parameters, around which stands the last."""
    found, wrappers = {}, Counter()
    for module in reversed(lora.modules):
        holder = module.name
        if module.is_parameter:
            owner = holder.rpartition(".")[0]
            holder = owner + ".base_layer" * wrappers[owner]
            wrappers[owner] += 1
        found[module.name] = holder
    return found


def write_adapter(
    folder: Path, lora: Lora, params: Params, base: Params, config: DecoderConfig, base_name: str
) -> None:
    """Writes both files into a folder, and reads them back."""
    leaves = dict(_named(params))
    tensors = {
        name: TensorToWrite(
            np.dtype(leaves[part.path].dtype),
            part.shape,
            lambda part=part: part.take(np.asarray(leaves[part.path])),
        )
        for name, part in sorted(list_parts(lora, config).items())
    }
    write_file(folder / WEIGHTS, tensors, {_sum_name(base): checksum(base)})
    described = config_to_export(lora, config.family, base_name)
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")


def verify_adapter(folder: Path, lora: Lora, params: Params, config: DecoderConfig) -> None:
    """CheckpointError unless both files of a folder read back as what is trained, bit for bit."""
    read = find_adapters(read_peft_config(PeftConfig(peft_type="Lora", path=str(folder))), config)
    if (read.modules, read.whole) != (lora.modules, lora.whole):
        raise CheckpointError(f"the export failed verification: {CONFIG} selects other modules")
    for (name, ours), (_, theirs) in zip(
        _named(params), _named(read_adapter(folder, lora, params, config)), strict=True
    ):
        if np.asarray(ours).tobytes() != theirs.tobytes():
            raise CheckpointError(f"the export failed verification: {name} differs when read back")


def open_adapter(folder: Path, lora: Lora, config: DecoderConfig) -> dict[str, StoredTensor]:
    """The tensors of a folder by their names, none read; WeightError names those that are missing,
    unknown or of another shape."""
    file, parts = folder / WEIGHTS, list_parts(lora, config)
    if not file.is_file():
        raise WeightError([Fault(f"{KEY}.path", f"there is no {WEIGHTS} in {folder}")])
    stored = read_file(file)
    lines = [
        f"tensor {name} must be {list(part.shape)} for this model, found {list(found.shape)}"
        if (found := stored.get(name))
        else f"tensor {name} {list(part.shape)} is missing"
        for name, part in parts.items()
        if name not in stored or stored[name].shape != part.shape
    ]
    lines += [f"tensor {name} belongs to no module" for name in stored if name not in parts]
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [f"and {len(lines) - MAX_FAULTS} more"]
    if lines:
        raise WeightError([Fault(str(file), line) for line in lines])
    return stored


def read_adapter(folder: Path, lora: Lora, shapes: Params, config: DecoderConfig) -> Params:
    """What is trained, read into arrays of these shapes on the host."""
    stored = open_adapter(folder, lora, config)
    read = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    leaves = dict(_named(read))
    for name, part in list_parts(lora, config).items():
        part.put(leaves[part.path], stored[name].read())
    return read


def refuse_other_base(folder: Path, base: Params) -> None:
    """WeightError if the adapter was trained on other weights, as far as its file says."""
    found = read_metadata(folder / WEIGHTS).get(_sum_name(base))
    if found is not None and found != (here := checksum(base)):
        raise WeightError([Fault(
            f"{KEY}.path",
            f"the adapter in {folder} was trained on another base (checksum {found}) than "
            f"model.name_or_path has ({here})",
        )])  # fmt: skip


def _sum_name(base: Params) -> str:
    kind = kind_of(base)
    return BASE_SUM if kind is None else f"{BASE_SUM}.{kind}"


def checksum(base: Params) -> str:
    """Says whether two bases are the same, whatever their mesh and dtype: of the bits of each
    weight in bfloat16, and its place."""
    _, weights = take_adapters(base)
    sums = jax.device_get(_sums(weights))
    text = json.dumps([[name, list(a.shape), int(one)] for (name, a), (_, one) in
                       zip(_named(weights), _named(sums), strict=True)])  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _sums(weights: Params) -> Params:
    return jax.tree.map(_sum_bits, fetch(weights))


def _sum_bits(a: Array) -> Array:
    """uint32 []: sums wrap around, so that their order is of no matter."""
    bits = lax.bitcast_convert_type(a.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jnp.uint32(0)
    for dim in range(a.ndim):
        place = mix_bits(place + lax.broadcasted_iota(jnp.uint32, a.shape, dim) + 1)
    return jnp.sum((bits + 1) * (place | 1), dtype=jnp.uint32)


def _named(tree: Params) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(path_name(path), leaf) for path, leaf in leaves]
