"""Converts named Hugging Face tensors to parameters and back, by the tables of tables.py.

L layers of one stacked parameter; the other letters are those of tables.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.model.config import DecoderConfig, LayerSpec
from jaxtrain.model.families import BY_NAME, Family
from jaxtrain.model.fp8 import unpack_blocks
from jaxtrain.model.gguf import read_gguf_tensors
from jaxtrain.model.mxfp4 import unpack
from jaxtrain.model.quantized import Kind, form_of, part_shapes, quantize
from jaxtrain.model.tables import HARMLESS, Layout, Table, Tensor, name_in_file, name_in_tables
from jaxtrain.model.tensor_file import StoredTensor, read_folder
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, WeightError

QKV = ("attention/qkv", "attention/qkv_bias")
MAX_FAULTS = 20  # of one kind in a message


class Piece(NamedTuple):
    """One Hugging Face tensor, and the part of our parameter that it fills."""

    name: str
    rows: slice
    """of the tensor in the file"""
    shape: tuple[int, ...]
    """of these rows"""
    place: tuple[slice, ...]
    split: tuple[int, ...]
    """the file's shape with merged dimensions split, and with those of length 1 that it lacks"""
    order: tuple[int, ...]
    """transposes `split` into our order"""

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """A view in our order, so that a slice of it reads only that slice of the file."""
        return theirs[self.rows].reshape(self.split).transpose(self.order)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The rows of the tensor, from their part of our parameter."""
        return ours.transpose(np.argsort(self.order)).reshape(self.shape)

    def of_each(self, experts: int, dim: int) -> Iterator["Piece"]:
        """The tensor of each expert, along this dimension of our parameter."""
        for e in range(experts):
            place = (*self.place[:dim], slice(e, e + 1), *self.place[dim + 1 :])
            yield self._replace(name=self.name.replace("{e}", str(e)), place=place)

    def in_stack(self, at: int, layer: int) -> "Piece":
        """The tensor of `layer`, at index `at` of a stacked parameter."""
        return Piece(
            self.name.format(i=layer),
            self.rows,
            self.shape,
            (slice(at, at + 1), *self.place),
            (1, *self.split),
            (0, *(dim + 1 for dim in self.order)),
        )


def pieces(config: DecoderConfig, path: str, layout: Layout) -> list[Piece]:
    """Every tensor that makes up the parameter at `path`, rows of one in their order."""
    table = BY_NAME[config.family].table(layout)
    if match := re.fullmatch(r"layers/(\d+)/(\d+)/(.*)", path):
        group, member, name = int(match[1]), int(match[2]), match[3]
        numbers, spec = config.layer_numbers(group, member), config.groups[group].layers[member]
        parts = list(_pieces(config.of_layer(spec), _tensors_of_layer(spec, name, table)))
        return [part.in_stack(at, i) for at, i in enumerate(numbers) for part in parts]
    return list(_pieces(config, table[path]))


def _tensors_of_layer(spec: LayerSpec, name: str, table: Table) -> tuple[Tensor, ...]:
    """Those of a parameter; the last of `qkv` are the keys and values, which a layer may lack."""
    lacking = 2 - spec.num_kv_projections if name in QKV else 0
    return table[name][: len(table[name]) - lacking]


def unread_names(config: DecoderConfig, layout: Layout) -> set[str]:
    """Tensors that files may have beside those of the model: for the keys and values of layers
    that read those of others."""
    table = BY_NAME[config.family].table(layout)
    kept = (table[path][1:] for path in QKV if path in table)
    unread = [*chain(*kept), *table.get("attention/k_norm", ())]
    return {
        tensor.name.format(i=i)
        for g, group in enumerate(config.groups)
        for m, spec in enumerate(group.layers)
        if spec.reads_keys
        for i in config.layer_numbers(g, m)
        for tensor in unread
    }


def _pieces(config: DecoderConfig, tensors: tuple[Tensor, ...]) -> Iterator[Piece]:
    size = {
        "V": config.vocab_size, "D": config.width, "F": config.ffn_width, "H": config.query_size,
        "K": config.num_kv_heads, "G": config.num_heads // config.num_kv_heads,
        "P": config.max_positions, "Y": config.width, "S": config.conv_taps,
        "I": config.per_layer_width, "X": config.num_layers, "1": 1, "2": 2, "3": 3,
    }  # fmt: skip
    size["Q"] = 2 * size["G"] if config.gated_attention else size["G"]
    if experts := config.experts:
        size |= {"E": experts.count, "M": experts.width, "S": experts.shared_width}
    if latent := config.latent:
        size |= {
            "Q": latent.q_rank or 0, "C": latent.kv_rank, "A": latent.kv_rank + config.head_size,
            "X": latent.value_size, "W": latent.plain_size + latent.value_size,
        }  # fmt: skip
    if delta := config.delta:
        size |= dict(zip("JWAC", delta.sizes, strict=True))
        size |= {"X": size["W"] * size["C"], "S": delta.conv_taps}
    rows: dict[str, int] = {}
    last = tensors[-1].ours.split()
    join_dim, end = last.index("1") if "1" in last else len(last) - 1, 0
    for tensor in tensors:
        mine = tensor.ours.split()
        place = [slice(0, size[letter]) for letter in mine]
        begin, end = end, end + size[mine[join_dim]]
        place[join_dim] = slice(begin, end)
        in_file = tensor.dims.replace(" ", "").replace("1", "")
        lacking = [letter for letter in mine if letter not in in_file]
        letters = in_file + "".join(lacking)
        shape = tuple(prod(size[letter] for letter in dim) for dim in tensor.dims.split())
        first = rows.get(tensor.name, 0)
        rows[tensor.name] = first + shape[0]
        whole = Piece(
            name=tensor.name,
            rows=slice(first, first + shape[0]),
            shape=shape,
            place=tuple(place),
            split=(*(size[letter] for letter in in_file), *(1 for _ in lacking)),
            order=tuple(map(letters.index, mine)),
        )
        yield from whole.of_each(size["E"], mine.index("E")) if "E" in lacking else (whole,)


def tensor_shapes(
    config: DecoderConfig, shapes: Any, layout: Layout | None = None
) -> dict[str, tuple[int, ...]]:
    """Name in the table and shape of every Hugging Face tensor of a model, in the order of its
    parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    layout = layout or BY_NAME[config.family].layouts[0]
    parts = (part for path, _ in leaves for part in pieces(config, path_name(path), layout))
    # Of several rows of a tensor the last come last.
    return {part.name: (part.rows.stop, *part.shape[1:]) for part in parts}


def load_params(
    path: Path,
    config: DecoderConfig,
    shapes: Any,
    shardings: Any,
    param_dtype: str | None = None,
    *,
    stored_tokens: int | None = None,
    quantization: Kind | None = None,
) -> Any:
    """Parameters read from a folder or a GGUF file, in the dtypes of `shapes` or all in one; each
    device reads only its own part.

    A parameter with a sharding of each of its parts is quantised, one layer at a time.

    If the file has only `stored_tokens` of the vocabulary, the others get the mean of its rows;
    `open_tensors` says what is refused.
    """
    stored, layout = open_tensors(path, config, shapes, stored_tokens)
    for name, shape in tensor_shapes(config, shapes, layout).items():
        if shape != stored[name].shape:
            stored[name] = _grow(stored[name], shape)

    def load(key_path, shape, sharding) -> Any:
        path = path_name(key_path)
        parts = pieces(config, path, layout)
        if isinstance(sharding, dict):
            assert quantization is not None
            read_float = lambda *bounds: _assemble(parts, stored, bounds, np.dtype(np.float32))
            return _load_quantized(quantization, path, shape.shape, sharding, read_float)
        dtype = np.dtype(jax.numpy.dtype(param_dtype or shape.dtype))

        @cache  # devices may share a slice
        def read(*bounds: tuple[int, int]) -> np.ndarray:
            return _assemble(parts, stored, bounds, dtype)

        def read_slice(index: Any) -> np.ndarray:
            return read(*(s.indices(n)[:2] for s, n in zip(index, shape.shape, strict=True)))

        return jax.make_array_from_callback(shape.shape, sharding, read_slice)

    return jax.tree_util.tree_map_with_path(load, shapes, shardings)


def _load_quantized(
    kind: Kind,
    path: str,
    shape: tuple[int, ...],
    shardings: Mapping[str, Any],
    read: Callable[..., np.ndarray],
) -> dict[str, jax.Array]:
    """The arrays of a quantised parameter. On the host and nowhere else is a layer of it whole."""
    form, lead = form_of(kind, path, shape)
    found = {k: np.empty(part.shape, part.dtype) for k, part in part_shapes(form, lead).items()}
    for layer in range(shape[0]):
        weight = read((layer, layer + 1), *((0, size) for size in shape[1:]))
        for name, part in quantize(form, weight).items():
            found[name][layer] = part[0]
    return {
        name: jax.make_array_from_callback(part.shape, shardings[name], part.__getitem__)
        for name, part in found.items()
    }


def open_tensors(
    path: Path, config: DecoderConfig, shapes: Any, stored_tokens: int | None = None
) -> tuple[dict[str, StoredTensor], Layout]:
    """What `read_tensors` returns; WeightError names every tensor that is missing, unknown or of
    another shape."""
    stored, layout = read_tensors(path, BY_NAME[config.family])
    in_file = replace(config, vocab_size=stored_tokens or config.vocab_size)
    _check(path, stored, tensor_shapes(in_file, shapes, layout), config, layout)
    return stored, layout


def read_tensors(path: Path, family: Family) -> tuple[dict[str, StoredTensor], Layout]:
    """The tensors of a folder or a GGUF file by their names in the tables, none read, and how the
    file writes these."""
    stored = read_gguf_tensors(path) if path.suffix == ".gguf" else read_folder(path)
    stored = unpack(stored) if "mxfp4" in family.quantizations else stored
    stored = unpack_blocks(stored) if "fp8" in family.quantizations else stored
    layout = family.layout_of(stored)
    return {name_in_tables(layout, name): tensor for name, tensor in stored.items()}, layout


def has_own_head(path: Path, family: Family) -> bool:
    """Whether the weights have a head that is not the embedding."""
    stored, _ = read_tensors(path, family)
    names = (family.tensors[name][0].name for name in ("head", "embed/embedding"))
    head, embedding = (stored.get(name) for name in names)
    if head is None or embedding is None:
        return False
    return head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read())


def _grow(tensor: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """Appends rows to a tensor, each the mean of those it has."""

    @cache
    def read() -> np.ndarray:
        rows = tensor.read()
        mean = rows.mean(0, dtype=np.float32).astype(rows.dtype)
        return np.concatenate([rows, np.broadcast_to(mean, (shape[0] - len(rows), *shape[1:]))])

    return StoredTensor(shape, read)


def _assemble(
    parts: list[Piece],
    stored: Mapping[str, StoredTensor],
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
) -> np.ndarray:
    out = np.empty([end - begin for begin, end in bounds], dtype)
    for part in parts:
        both = [
            range(max(begin, place.start), min(end, place.stop))
            for (begin, end), place in zip(bounds, part.place, strict=True)
        ]
        if all(both):
            here = (slice(r.start - b, r.stop - b) for r, (b, _) in zip(both, bounds, strict=True))
            there = (
                slice(r.start - place.start, r.stop - place.start)
                for r, place in zip(both, part.place, strict=True)
            )
            out[tuple(here)] = part.to_ours(stored[part.name].read())[tuple(there)]
    return out


def _check(
    path: Path,
    stored: Mapping[str, StoredTensor],
    wanted: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
    layout: Layout,
) -> None:
    carried, unread = BY_NAME[config.family].carried, unread_names(config, layout)
    harmless = [*HARMLESS, *([r"lm_head\.weight"] if config.tied else []), *filter(None, [carried])]
    behind = range(config.num_layers, config.num_layers + config.num_layers_behind)
    harmless += [rf"model\.layers\.{layer}\..*" for layer in behind]
    in_file = partial(name_in_file, layout)
    missing, reshaped = [], []
    for name, shape in wanted.items():
        if name not in stored:
            missing.append(f"tensor {in_file(name)} {list(shape)} is missing")
        elif (found := stored[name].shape) != shape:
            reshaped.append(
                f"tensor {in_file(name)} must have shape {list(shape)} by config.json, "
                f"found {list(found)}"
            )
    unknown = [
        f"tensor {in_file(name)} {list(found.shape)} is unknown in a {config.family} model of this "
        "config"
        for name, found in stored.items()
        if name not in {*wanted, *unread} and not re.fullmatch("|".join(harmless), name)
    ]
    lines: list[str] = []
    for kind in (missing, reshaped, unknown):
        lines += kind[:MAX_FAULTS]
        if len(kind) > MAX_FAULTS:
            lines.append(f"and {len(kind) - MAX_FAULTS} more of this kind")
    if lines:
        raise WeightError([Fault(str(path), line) for line in lines])
