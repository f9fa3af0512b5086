"""safetensors files: eight bytes of header length, a JSON header, then the bytes of the tensors.

Read by memory map, so that only what is used leaves the disk; written a tensor at a time, since the
header needs shapes alone. (https://github.com/huggingface/safetensors, section Format)
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtrain.recipe.errors import Fault, WeightError, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20  # the limit of the safetensors library


class Stored(NamedTuple):
    """A tensor that can be read."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """The tensor, as a view of the file where the format allows."""


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a Hugging Face folder; WeightError names all broken files."""
    paths = _files(folder)
    tensors: dict[str, Stored] = {}
    faults: list[Fault] = []
    for path in paths:
        try:
            tensors |= read_file(path)
        except WeightError as error:
            faults += error.faults
    if faults:
        raise WeightError(faults)
    return tensors


def _files(folder: Path) -> list[Path]:
    if (index := folder / INDEX).is_file():
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            what = f"has no `weight_map` of names to files: {error}"
            raise WeightError([Fault(str(index), what)]) from None
        absent = [name for name in named if not (folder / name).is_file()]
        if absent:
            what = "names {}, which is not there"
            raise WeightError([Fault(str(index), what.format(name)) for name in absent])
        return [folder / name for name in named]
    if (single := folder / SINGLE).is_file():
        return [single]
    others = sorted(path.name for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES)
    what = f"needs {SINGLE} or {INDEX}, found {', '.join(others) or 'no weights at all'}"
    if any(not name.endswith(".safetensors") for name in others):
        what += "; pickled weights are never read: save the model again with safetensors"
    raise WeightError([Fault(str(folder), what)])


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of one file, as views of its memory map; WeightError names what is broken."""

    def broken(what: str) -> WeightError:
        return WeightError([Fault(str(path), f"not a safetensors file: {what}; fetch it again")])

    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if size < 8 or start > size or start > MAX_HEADER_BYTES:
            raise broken(f"its header would end at byte {start} of {size}")
        try:
            header = json.loads(file.read(start - 8))
            header.pop("__metadata__", None)
            entries = {name: _entry(entry) for name, entry in header.items()}
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise broken(f"its header does not read: {error}") from None
    faults = []
    data = np.memmap(path, np.uint8, "r", offset=start) if size > start else np.empty(0, np.uint8)
    for name, (dtype, shape, begin, end) in entries.items():
        if end > len(data):
            raise broken(f"{name} ends at byte {start + end}, the file at {size}")
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            faults.append(Fault(str(path), f"{name} has dtype {shown(dtype)}; use one of {known}"))
        elif end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise broken(f"{name} is {dtype} {list(shape)}, but has {end - begin} bytes")
    if faults:
        raise WeightError(faults)
    return {
        name: Stored(shape, _reader(data, begin, end, DTYPES[dtype], shape))
        for name, (dtype, shape, begin, end) in entries.items()
    }


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end:
        raise ValueError(f"offsets {begin} to {end}")
    return entry["dtype"], tuple(int(n) for n in entry["shape"]), int(begin), int(end)


def _reader(
    data: np.ndarray, begin: int, end: int, dtype: np.dtype, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    return lambda: data[begin:end].view(dtype).reshape(shape)


class ToWrite(NamedTuple):
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Called once, when its turn has come; the result is written and forgotten."""


def write_folder(
    folder: Path, tensors: Mapping[str, ToWrite], dtype: np.dtype, max_shard_bytes: float
) -> None:
    """One file, or several and their index; one larger than the limit is alone in its file."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        write_file(folder / SINGLE, tensors, dtype)
        return
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names}, dtype)
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(tensor.shape) * dtype.itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: Path, tensors: Mapping[str, ToWrite], dtype: np.dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned for every dtype
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = np.ascontiguousarray(tensor.make(), dtype)
            assert value.shape == tensor.shape, (name, value.shape, tensor.shape)
            file.write(value.view(np.uint8).data)
