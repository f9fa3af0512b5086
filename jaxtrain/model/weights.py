"""Parameters from named Hugging Face tensors and back, by the family's table.

L layers of one stacked parameter; the other letters are those of families.py.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.model.config import DecoderConfig
from jaxtrain.model.families import FAMILIES, HARMLESS, Row
from jaxtrain.model.gguf import read_gguf_tensors
from jaxtrain.model.tensor_file import Stored, read_folder
from jaxtrain.parallel.sharding import path_name
from jaxtrain.recipe.errors import Fault, WeightError

NAMED_FAULTS = 20  # of one kind; what is wrong is clear before the thousandth line


class Piece(NamedTuple):
    """One Hugging Face tensor, and the place in our parameter where it goes."""

    name: str
    shape: tuple[int, ...]
    """As in the file"""
    layer: int | None
    """Index along L of a stacked parameter"""
    place: tuple[slice, ...]
    """In one layer of our parameter"""
    split: tuple[int, ...]
    """The file's shape with merged dimensions apart"""
    order: tuple[int, ...]
    """Transposes `split` into our order; a 1 that the file lacks is already last in `split`"""

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """A view in our order, so that a slice of it reads only that slice of the file."""
        return theirs.reshape(self.split).transpose(self.order)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """The tensor, from what stands at its place in our parameter."""
        return ours.transpose(np.argsort(self.order)).reshape(self.shape)


def sizes(config: DecoderConfig) -> dict[str, int]:
    """Length of each dimension letter."""
    return {
        "V": config.vocab_size,
        "D": config.width,
        "F": config.ffn_width,
        "K": config.num_kv_heads,
        "G": config.num_heads // config.num_kv_heads,
        "H": config.head_size,
        "1": 1,
    }


def pieces(config: DecoderConfig, path: str) -> list[Piece]:
    """Every tensor that makes up the parameter at `path`."""
    family = next(family for family in FAMILIES if family.name == config.family)
    rows = {row.path: row for row in family.rows}
    if match := re.fullmatch(r"layers/(\d+)/(\d+)/(.*)", path):
        row = rows[match[3]]
        numbers = config.layer_numbers(int(match[1]), int(match[2]))
        return [p for at, i in enumerate(numbers) for p in _row_pieces(config, row, at, i)]
    return list(_row_pieces(config, rows[path], None, None))


def _row_pieces(
    config: DecoderConfig, row: Row, at: int | None, number: int | None
) -> Iterator[Piece]:
    size = sizes(config)
    ours = [[size[letter] for letter in tensor.ours.split()] for tensor in row.tensors]
    ends = list(accumulate(shape[row.joined or 0] for shape in ours))
    for tensor, shape, end in zip(row.tensors, ours, ends, strict=True):
        letters = tensor.dims.replace(" ", "")
        mine = tensor.ours.split()
        place = [slice(0, n) for n in shape]
        if row.joined is not None:
            place[row.joined] = slice(end - shape[row.joined], end)
        yield Piece(
            name=tensor.name.format(i=number),
            shape=tuple(int(np.prod([size[x] for x in dim])) for dim in tensor.dims.split()),
            layer=at,
            place=tuple(place),
            split=(*(size[x] for x in letters), *(1 for x in mine if x == "1")),
            order=tuple((letters + "1").index(letter) for letter in mine),
        )


def tensor_shapes(config: DecoderConfig, shapes: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every Hugging Face tensor of a model, in the order of its parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {p.name: p.shape for path, _ in leaves for p in pieces(config, path_name(path))}


def load_params(
    path: Path,
    config: DecoderConfig,
    shapes: Any,
    shardings: Any,
    param_dtype: str = "float32",
    *,
    stored_tokens: int | None = None,
) -> Any:
    """Parameters read from a folder or a GGUF file; each device reads only its own part.

    Where the file has only `stored_tokens` of the vocabulary, the others get the mean of its rows.
    WeightError names every tensor that is missing, unknown or of another shape.
    """
    stored = read_gguf_tensors(path) if path.suffix == ".gguf" else read_folder(path)
    in_file = replace(config, vocab_size=stored_tokens or config.vocab_size)
    _check(path, stored, tensor_shapes(in_file, shapes), config)
    for name, shape in tensor_shapes(config, shapes).items():
        if shape != stored[name].shape:
            stored[name] = _grown(stored[name], shape)
    dtype = np.dtype(jax.numpy.dtype(param_dtype))

    def one(key_path, shape, sharding) -> jax.Array:
        read = _reader(pieces(config, path_name(key_path)), stored, shape.shape, dtype)
        return jax.make_array_from_callback(shape.shape, sharding, read)

    return jax.tree_util.tree_map_with_path(one, shapes, shardings)


def _grown(tensor: Stored, shape: tuple[int, ...]) -> Stored:
    """The tensor with more rows, each the mean of those it has."""

    @cache
    def read() -> np.ndarray:
        rows = tensor.read()
        mean = rows.mean(0, dtype=np.float32).astype(rows.dtype)
        return np.concatenate([rows, np.broadcast_to(mean, (shape[0] - len(rows), *shape[1:]))])

    return Stored(shape, read)


def _reader(
    parts: list[Piece], stored: Mapping[str, Stored], shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
    """Reads one slice of a parameter; a slice that several devices share is read once."""
    known: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if bounds not in known:
            known[bounds] = _assembled(parts, stored, bounds, dtype)
        return known[bounds]

    return read


def _assembled(
    parts: list[Piece],
    stored: Mapping[str, Stored],
    bounds: tuple[tuple[int, int], ...],
    dtype: np.dtype,
) -> np.ndarray:
    out = np.empty([end - begin for begin, end in bounds], dtype)
    for part in parts:
        target, inner = out, bounds
        if part.layer is not None:
            (first, last), *inner = bounds
            if not first <= part.layer < last:
                continue
            target = out[part.layer - first]
        overlaps = [
            (max(begin, place.start), min(end, place.stop))
            for (begin, end), place in zip(inner, part.place, strict=True)
        ]
        if any(begin >= end for begin, end in overlaps):
            continue
        here = tuple(
            slice(a - begin, b - begin) for (a, b), (begin, _) in zip(overlaps, inner, strict=True)
        )
        there = tuple(
            slice(a - p.start, b - p.start) for (a, b), p in zip(overlaps, part.place, strict=True)
        )
        target[here] = part.to_ours(stored[part.name].read())[there]
    return out


def _check(
    path: Path,
    stored: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
) -> None:
    harmless = re.compile("|".join((*HARMLESS, *((r"lm_head\.weight",) if config.tied else ()))))
    missing = [
        f"tensor {name} {list(shape)} is missing"
        for name, shape in wanted.items()
        if name not in stored
    ]
    reshaped = [
        f"tensor {name} must be {list(shape)} by config.json, found {list(stored[name].shape)}"
        for name, shape in wanted.items()
        if name in stored and stored[name].shape != shape
    ]
    unknown = [
        f"tensor {name} {list(found.shape)} has no place in a {config.family} model of this config"
        for name, found in stored.items()
        if name not in wanted and not harmless.fullmatch(name)
    ]
    faults = [*_listed(path, missing), *_listed(path, reshaped), *_listed(path, unknown)]
    if faults:
        raise WeightError(faults)


def _listed(path: Path, lines: list[str]) -> list[Fault]:
    faults = [Fault(str(path), line) for line in lines[:NAMED_FAULTS]]
    if len(lines) > NAMED_FAULTS:
        faults.append(Fault(str(path), f"and {len(lines) - NAMED_FAULTS} more of this kind"))
    return faults
