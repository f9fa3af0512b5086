"""The `data` section and its sources."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from jaxtrain.recipe.errors import nearest_multiples
from jaxtrain.recipe.section import InputPath, TypedSection

FORMATS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".csv": "csv", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
"""Suffix of a local file → the source type that reads it."""
COMPRESSED = (".gz", ".zst")
SPLIT_SUFFIX = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z0-9_.-]+(?:\[[^\[\]]*\])?)")


def file_format(path: str) -> str | None:
    """The source type for a file name, compressed or not; None when the suffix says nothing."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def split_suffix(text: str, folder: Path | None = None) -> tuple[str, str]:
    """`name:split[10:20]` in its two parts; the second is empty when there is none, as in a path
    that exists, in `folder` or the current one, and has a colon in it."""
    if Path(text).exists() or (folder is not None and (folder / text).exists()):
        return text, ""
    match = SPLIT_SUFFIX.fullmatch(text)
    return (match["name"], match["split"]) if match else (text, "")


def source_from_text(text: str, *, registered: Collection[str], default: str) -> dict[str, Any]:
    """The map that a source written as a string stands for: a registered name, else a local file,
    else what the factory's `default` source makes of it."""
    name, split = split_suffix(text)
    given = {"split": split} if split else {}
    if name in registered:
        return {"type": name, **given}
    kind = file_format(name)
    if kind and (Path(name).is_file() or "://" not in name):
        return {"type": kind, "path": name, **given}
    return {"type": default, "name_or_path": text}


def _input_pattern(value: Any, info: ValidationInfo) -> Any:
    """A glob goes by the recipe's folder first, as plain paths do."""
    if not isinstance(value, str) or not set("*?[") & set(value):
        return value
    folder = (info.context or {}).get("folder")
    if folder is not None and any(Path(folder).glob(value)):
        return str(Path(folder).resolve() / value)
    return value


InputPattern = Annotated[InputPath, BeforeValidator(_input_pattern)]


class DataSourceConfig(TypedSection):
    """Keys of every source."""

    split: str = ""
    """Split name, slices allowed (`train[:100]`); `train` when left out, `eval` under
    `eval_sources`."""
    sample_ratio: float | None = Field(default=None, gt=0, le=1)
    """Random share of the rows."""
    sample_count: int | None = Field(default=None, gt=0)
    """Random number of rows; a larger number than there is takes all."""
    sample_seed: int = 42
    name: str = ""
    """Label in logs and counts."""

    @model_validator(mode="after")
    def _one_sample_key(self) -> "DataSourceConfig":
        if self.sample_ratio is not None and self.sample_count is not None:
            raise ValueError("sample_ratio and sample_count exclude each other; remove one")
        return self


class RowsConfig(DataSourceConfig):
    """How a row of columns becomes a conversation."""

    role_mapping: dict[str, str] = {}
    """Role → column, or role → `array.field.value`, in which each turn of `array` with that field's
    value has the role; turns keep their order."""
    content_key: str | None = None
    """Field of the text in the three-part form; `content`, `text`, `message` or `value` else."""

    @model_validator(mode="after")
    def _content_key_has_its_place(self) -> "RowsConfig":
        if "content_key" in self.role_mapping:
            raise ValueError(
                "role_mapping holds roles; content_key stands beside it, as a key of the source"
            )
        return self


class HFDataSourceConfig(RowsConfig):
    """A hub data set, or a folder saved by `datasets`."""

    name_or_path: InputPath = Field(min_length=1)
    """Hub name, `name:split[10:20]`, or a folder."""
    kwargs: dict[str, Any] = {}
    """Arguments of `datasets.load_dataset`."""
    split_mapping: dict[str, str] = {}
    """Standard split name → the data set's own."""

    @model_validator(mode="after")
    def _no_remote_code(self) -> "HFDataSourceConfig":
        if self.kwargs.get("trust_remote_code"):
            raise ValueError("kwargs.trust_remote_code is refused: code comes only from `code:`")
        return self

    @model_validator(mode="before")
    @classmethod
    def _split_beside_name(cls, data: Any, info: ValidationInfo) -> Any:
        """`name:split` is the name and the split, so that the effective recipe says each once."""
        if not isinstance(data, dict) or not isinstance(data.get("name_or_path"), str):
            return data
        name, split = split_suffix(data["name_or_path"], (info.context or {}).get("folder"))
        if not split:
            return data
        given = data.get("split")
        if given not in (None, "", "train", "eval", split):  # those two are what is filled in
            raise ValueError(
                f"name_or_path asks for split {split!r} and split for {given!r}; remove one"
            )
        return {**data, "name_or_path": name, "split": split}


class LocalDataSourceConfig(RowsConfig):
    """Local files of one format, by path, list of paths, folder or glob; `.gz` and `.zst` too."""

    path: InputPattern | tuple[InputPattern, ...]
    columns: dict[str, str] = {}
    """Column → the name it goes by from here on."""


class TextDataSourceConfig(LocalDataSourceConfig):
    column: str = "text"
    """Name of the one column."""
    per_line: bool = False
    """A row per line, not per file."""


class AnyLocalDataSourceConfig(TextDataSourceConfig):
    """Local files of any format."""

    format: Literal["auto", "json", "jsonl", "parquet", "csv", "text"] = "auto"
    """What all files are; `auto` goes by the suffix of each."""


class DataConfig(TypedSection):
    """Keys of every data factory."""

    sources: tuple[Any, ...]
    """Training sources: names, paths or maps."""
    eval_sources: tuple[Any, ...] = ()
    """Evaluation sources."""
    train_eval_split: tuple[float, float] = (1.0, 0.0)
    """Shares kept for training and for evaluation; split before packing, by `seed`."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest row in tokens; the model's `max_position_embeddings` when left out."""
    num_proc: int = Field(default=16, ge=1)
    """Processes for tokenising, at most one a core; the rows never depend on it."""
    dl_num_workers: int = Field(default=2, ge=0)
    """Threads that make batches ahead of the step; 0 makes them in the loop."""
    seed: int = Field(default=42, ge=0)
    """Order of the rows, together with the epoch; and the split."""

    @model_validator(mode="after")
    def _sources_and_split(self) -> "DataConfig":
        if not self.sources:
            raise ValueError("sources is empty; name at least one source")
        train, held_out = self.train_eval_split
        if min(train, held_out) < 0 or abs(train + held_out - 1) > 1e-6:
            raise ValueError(
                f"train_eval_split must be two shares from 0 to 1 that add up to 1, "
                f"found {train} and {held_out}"
            )
        if held_out and self.eval_sources:
            raise ValueError("train_eval_split and eval_sources exclude each other; remove one")
        return self

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_sources) or self.train_eval_split[1] > 0


class SFTDataConfig(DataConfig):
    div_length: int = Field(default=256, ge=1)
    """Rows are padded to a multiple of it."""
    pad_to: Literal["div_length", "max_length"] = "div_length"
    mask_inputs: bool = True
    """Train on assistant text only."""
    pack_samples: bool = False
    """Several conversations a row, isolated from one another."""
    packing: Literal["best_fit", "next_fit"] = "best_fit"
    """Fill rule of `pack_samples`."""
    filter_samples: bool = True
    """Drop conversations longer than `max_length`."""
    overlong: Literal["drop", "truncate", "error"] | None = None
    """What happens to them; `drop` with `filter_samples`, else `truncate`, when left out."""

    @model_validator(mode="after")
    def _lengths_divide(self) -> "SFTDataConfig":
        written = "div_length" in self.model_fields_set
        if self.pad_to == "max_length" and written and self.max_length:
            if self.max_length % self.div_length:
                raise ValueError(
                    f"max_length {self.max_length} is not a multiple of div_length "
                    f"{self.div_length}; use {nearest_multiples(self.max_length, self.div_length)}"
                )
        return self

    @property
    def overlong_rule(self) -> Literal["drop", "truncate", "error"]:
        return self.overlong or ("drop" if self.filter_samples else "truncate")
