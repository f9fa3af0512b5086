"""The `data` section and its sources."""

from typing import Any, Literal

from pydantic import Field, model_validator

from jaxtrain.recipe.errors import nearest_multiples
from jaxtrain.recipe.section import InputPath, TypedSection


class DataSourceConfig(TypedSection):
    """Keys of every source."""

    split: str = ""
    """Split name, slices allowed (`train[:100]`); `train` when left out, `eval` under `eval_sources`."""
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
    """Field that holds the text in the three-part form; `content`, `text`, `message` or `value` else."""


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


class LocalDataSourceConfig(RowsConfig):
    """Local files: json, jsonl, parquet, csv or text, by path, list of paths, folder or glob."""

    path: InputPath | tuple[InputPath, ...]
    column: str = "text"
    """Column of text rows."""


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
