"""safetensors files: eight bytes of header length, a JSON header, then the bytes of the tensors.

Reads map the file into memory, so that only what is used leaves the disk; writes take one tensor at
a time, since the header needs only shapes. (https://github.com/huggingface/safetensors, Format)
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from jaxtrain.model_folder import INDEX, SINGLE, weight_files
from jaxtrain.recipe.errors import Fault, WeightError, show

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
PACKED = ("_blocks", "_scales")
"""Ends of names of tensors that may be bytes: mxfp4.py reads them."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    """returns the tensor, as a view of the file if the format allows"""


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """Reads every tensor of a Hugging Face folder; WeightError names all broken files."""
    tensors: dict[str, StoredTensor] = {}
    faults: list[Fault] = []
    for path in _files(folder):
        try:
            tensors |= read_file(path)
        except WeightError as error:
            faults += error.faults
    if faults:
        raise WeightError(faults)
    return tensors


def _files(folder: Path) -> list[Path]:
    files = weight_files(folder)
    absent = [file for file in files if not file.is_file()]
    if not absent:
        return files
    if absent != [folder / SINGLE]:
        what, index = "names {}, which does not exist", str(folder / INDEX)
        raise WeightError([Fault(index, what.format(file.name)) for file in absent])
    others = sorted(path.name for path in folder.glob("*") if path.suffix in WEIGHT_SUFFIXES)
    what = f"needs {SINGLE} or {INDEX}, found {', '.join(others) or 'no weights'}"
    if any(not name.endswith(".safetensors") for name in others):
        what += "; pickled weights are not read; save the model again with safetensors"
    raise WeightError(f"{folder}: {what}")


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Reads the tensors of one file as views of its memory map; WeightError if it is broken."""
    try:
        with safe_open(path, "numpy"):  # checks the header against the length of the file
            data = np.memmap(path, np.uint8, "r")
    except SafetensorError as error:
        raise WeightError(f"{path}: not a safetensors file: {error}; fetch it again") from None
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    faults = [
        Fault(str(path), f"{name} has dtype {show(entry['dtype'])}; use one of {', '.join(DTYPES)}")
        for name, entry in header.items()
        if entry["dtype"] not in DTYPES and not (entry["dtype"] == "U8" and name.endswith(PACKED))
    ]
    if faults:
        raise WeightError(faults)
    return {name: _view(data[start:], entry) for name, entry in header.items()}


def _view(data: np.ndarray, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], np.dtype(np.uint8))
    return StoredTensor(shape, lambda: data[begin:end].view(dtype).reshape(shape))


class TensorToWrite(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """called once, just before its result is written"""


def write_folder(
    folder: Path, tensors: Mapping[str, TensorToWrite], max_shard_bytes: float
) -> None:
    """Writes one file, or shards and their index; a tensor above the limit gets its own file."""
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: math.prod(tensor.shape) * tensor.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=int(max_shard_bytes),
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says beside its tensors."""
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def write_file(
    path: Path, tensors: Mapping[str, TensorToWrite], metadata: Mapping[str, str] | None = None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        stored = next(name for name, known in DTYPES.items() if known == tensor.dtype)
        header[name] = {"dtype": stored, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data for every dtype
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = np.ascontiguousarray(tensor.make(), tensor.dtype)
            assert value.shape == tensor.shape, (name, value.shape, tensor.shape)
            file.write(value.view(np.uint8).data)
