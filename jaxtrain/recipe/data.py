"""The `data` section and its sources."""

import re
from collections.abc import Collection, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from jaxtrain.recipe.errors import did_you_mean, nearest_multiples
from jaxtrain.recipe.section import InputPath, TypedSection, path_exists

FORMATS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
    ".csv": "csv", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
"""Suffix of a local file → the source type that reads it."""
COMPRESSED = (".gz", ".zst")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Who speaks in a conversation."""
REFUSED_ARGUMENTS = {
    "trust_remote_code": "code comes only from `code:`",
    "split": "split stands beside kwargs",
    "streaming": "rows are looked up by number",
}
"""of `datasets.load_dataset`"""
SPLIT_SUFFIX = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z0-9_.-]+(?:\[[^\[\]]*\])?)")


def file_format(path: str) -> str | None:
    """The source type for a file name, compressed or not; None when the suffix says nothing."""
    path = path.partition("?")[0] if "://" in path else path
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def parse_split(text: str, folder: Path | None = None) -> tuple[str, str]:
    """`name:split[10:20]` in its two parts; the second is empty when there is none, as in a path
    that exists, in `folder` or the current one, and has a colon in it."""
    if path_exists(text) or (folder is not None and path_exists(f"{folder}/{text}")):
        return text, ""
    match = SPLIT_SUFFIX.fullmatch(text)
    return (match["name"], match["split"]) if match else (text, "")


def source_from_text(text: str, *, registered: Collection[str], default: str) -> dict[str, Any]:
    """The map that a source written as a string stands for: a registered name, else a file, here or
    at a URL, else what the factory's `default` source makes of it."""
    name, split = parse_split(text)
    given = {"split": split} if split else {}
    if name in registered:
        return {"type": name, **given}
    if kind := file_format(name):
        return {"type": kind, "path": name, **given}
    return {"type": default, "name_or_path": text}


def _input_pattern(value: Any, info: ValidationInfo) -> Any:
    """A glob goes by the recipe's folder first, as plain paths do."""
    if not isinstance(value, str) or "://" in value or not set("*?[") & set(value):
        return value
    folder = (info.context or {}).get("folder")
    if folder is not None and "\0" not in value and glob(value, root_dir=folder, recursive=True):
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
    process: bool = True
    """False: rows hold tokens already, as `input_ids` and, for conversations, `labels`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in the mixture; if one training source has it, all must. An epoch keeps
    its length, and each source is cut or repeated to its share."""
    name: str = ""
    """Label in logs and counts."""

    @property
    def selection_keys(self) -> tuple[str, ...]:
        """Keys that say where rows are and which of them are taken: the rows' own content stands
        for these in the cache's key."""
        return ("name", "split", "sample_ratio", "sample_count", "sample_seed", "weight")

    PACKAGE: ClassVar[str] = ""
    """Package of an extra that is called as the source's type."""

    @property
    def is_tokenised(self) -> bool:
        return not self.process

    @property
    def text_column(self) -> str:
        """Column of the text of causal training; a row with one column needs no name for it."""
        return "text"

    def contradictions(self) -> Iterator[str]:
        if self.sample_ratio is not None and self.sample_count is not None:
            yield "sample_ratio and sample_count exclude each other; remove one"


class RowsConfig(DataSourceConfig):
    """How a row of columns becomes a conversation."""

    role_mapping: dict[str, str] = {}
    """Role → column, or role → `array.field.value`, in which each turn of `array` with that field's
    value has the role; turns keep their order."""
    content_key: str | None = None
    """Field of the text in the three-part form; `content`, `text`, `message` or `value` else."""

    def contradictions(self) -> Iterator[str]:
        if "content_key" in self.role_mapping:
            yield "role_mapping holds roles; content_key stands beside it, as a key of the source"


class HFDataSourceConfig(RowsConfig):
    """A hub data set, or a folder saved by `datasets`."""

    name_or_path: InputPath = Field(min_length=1)
    """Hub name, `name:split[10:20]`, or a folder."""
    kwargs: dict[str, Any] = {}
    """Arguments of `datasets.load_dataset`."""
    split_mapping: dict[str, str] = {}
    """Standard split name → the data set's own."""

    @property
    def selection_keys(self) -> tuple[str, ...]:
        # The name of a well-known data set decides how its columns are read.
        place = ("name_or_path",) if Path(self.name_or_path).exists() else ()
        return (*super().selection_keys, *place, "kwargs", "split_mapping")

    def contradictions(self) -> Iterator[str]:
        for key, why in REFUSED_ARGUMENTS.items():
            if self.kwargs.get(key, False) is not False:
                yield f"kwargs.{key} is refused: {why}"

    @model_validator(mode="before")
    @classmethod
    def _split_beside_name(cls, data: Any, info: ValidationInfo) -> Any:
        """`name:split` is the name and the split, so that the effective recipe says each once."""
        if not isinstance(data, dict) or not isinstance(data.get("name_or_path"), str):
            return data
        name, split = parse_split(data["name_or_path"], (info.context or {}).get("folder"))
        if not split:
            return data
        given = data.get("split")
        if given not in (None, "", "train", "eval", split):  # those two are what is filled in
            raise ValueError(
                f"name_or_path asks for split {split!r} and split for {given!r}; remove one"
            )
        return {**data, "name_or_path": name, "split": split}


class HFCausalDataSourceConfig(HFDataSourceConfig):
    """A hub data set of plain text."""

    column: str = "text"
    """Column of the text; a data set with one column uses that one."""

    @property
    def text_column(self) -> str:
        return self.column


class SyntheticDataSourceConfig(DataSourceConfig):
    """Random tokens, each row `max_length` of them."""

    rows: int = Field(default=10_000, ge=1)
    vocab_size: int | None = Field(default=None, ge=1)
    """Tokens are below it; the tokenizer's size when left out."""
    process: Literal[False] = False

    @property
    def selection_keys(self) -> tuple[str, ...]:
        return (*super().selection_keys, "rows", "vocab_size")


class LocalDataSourceConfig(RowsConfig):
    """Files of one format, by path, list of paths, folder or glob; `.gz` and `.zst` too. Paths may
    be URLs that fsspec reads, such as `s3://`: those are copied into the user's cache."""

    path: InputPattern | tuple[InputPattern, ...]
    columns: dict[str, str] = {}
    """Column → the name it goes by from here on."""
    column: str = "text"
    """Column of the text of causal training; a file of `text` has this one alone."""

    @property
    def text_column(self) -> str:
        return self.column

    @property
    def selection_keys(self) -> tuple[str, ...]:
        return (*super().selection_keys, "path")


class TextDataSourceConfig(LocalDataSourceConfig):
    per_line: bool = False
    """A row per line, not per file."""


class AnyLocalDataSourceConfig(TextDataSourceConfig):
    """Files of any format."""

    format: Literal["auto", "json", "jsonl", "parquet", "arrow", "csv", "text"] = "auto"
    """What all files are; `auto` goes by the suffix of each."""

    def contradictions(self) -> Iterator[str]:
        if self.per_line and self.format not in ("auto", "text"):
            yield f"per_line has no effect with format: {self.format}; remove it"


class DataConfig(TypedSection):
    """Keys of every data factory."""

    sources: tuple[Any, ...]
    """Training sources: names, paths or maps."""
    eval_sources: tuple[Any, ...] | dict[str, tuple[Any, ...]] = ()
    """Evaluation sources; a map of name to sources makes named sets."""
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

    max_rows_with_errors: int = Field(default=0, ge=0)
    """So many faulty rows are skipped and counted; one more stops the run."""
    cache_dir: str | None = None
    """Folder of prepared rows; one that several machines share is prepared by the first of them.
    In the user's cache folder when left out."""
    cache_fs_type: Literal["auto", "local", "shared"] = "auto"
    use_data_cache: bool | None = None
    cache_processed_data: bool | None = None
    fail_on_missing_cache: bool = False
    """Stop where rows would have to be prepared."""
    streaming: bool = False
    """Read without preparing."""
    batch_tokens: int = Field(default=0, ge=0)
    """Fill batches to so many tokens, not to `micro_batch_size` rows; 0 is off."""
    max_length_buckets: int = Field(default=8, ge=1)
    """Lengths that unpacked rows are padded to, at most: each update takes the shortest that holds
    its rows, and each compiles the step once. The loss is the same."""

    CHANGES_NO_BATCH: ClassVar[frozenset[str]] = frozenset((
        "num_proc", "dl_num_workers", "cache_dir", "cache_fs_type", "use_data_cache",
        "cache_processed_data", "fail_on_missing_cache",
    ))  # fmt: skip
    """Keys of place and speed."""
    NOT_IN_DOCUMENTS: ClassVar[frozenset[str]] = CHANGES_NO_BATCH | {
        "sources", "eval_sources", "train_eval_split", "max_length", "seed", "batch_tokens",
        "max_length_buckets", "streaming",
    }  # fmt: skip
    """Keys that change no document: these, and what is planned from documents at every start."""
    default_source: ClassVar[str] = "huggingface"
    """Type of a source that names none."""
    ROWS_PER_SAMPLE: ClassVar[int] = 1
    """Rows of a batch for each of `micro_batch_size`."""
    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {}
    """Key of a source that this factory does not read → the type of `data` that does."""

    def contradictions(self) -> Iterator[str]:
        if not self.sources:
            yield "sources is empty; name at least one source"
        train, held_out = self.train_eval_split
        if min(train, held_out) < 0 or abs(train + held_out - 1) > 1e-6:
            what = "must be two shares from 0 to 1 that add up to 1"
            yield f"train_eval_split {what}, found {train} and {held_out}"
        if held_out and self.eval_sources:
            yield "train_eval_split and eval_sources exclude each other; remove one"
        weights = [s.weight for s in self.sources if isinstance(s, DataSourceConfig)]
        if None in weights and any(weights):
            without = f"sources.{weights.index(None)} has no weight and another source has one"
            yield f"{without}; write one for every source or for none"
        for name, named in self.eval_sets.items():
            if not named:
                yield f"eval_sources.{name} is empty; name at least one source"
            if any(isinstance(s, DataSourceConfig) and s.weight for s in named):
                yield "weight has no effect in eval_sources; remove it"

    @property
    def eval_sets(self) -> dict[str, tuple[Any, ...]]:
        """Name → sources; the set of a plain list is `eval`."""
        if isinstance(self.eval_sources, dict):
            return self.eval_sources
        return {"eval": self.eval_sources} if self.eval_sources else {}

    def iter_sources(self) -> Iterator[tuple[str, DataSourceConfig]]:
        """(dotted key, source) of every source."""
        for key in ("sources", "eval_sources"):
            written = getattr(self, key)
            named = written if isinstance(written, dict) else {"": written}
            for name, sources in named.items():
                place = f"data.{key}.{name}".rstrip(".")
                yield from ((f"{place}.{i}", source) for i, source in enumerate(sources))

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_sources) or self.train_eval_split[1] > 0


class SFTDataConfig(DataConfig):
    NOT_IN_DOCUMENTS: ClassVar[frozenset[str]] = DataConfig.NOT_IN_DOCUMENTS | {
        "div_length", "pad_to", "pack_samples", "packing", "always_max_length", "drop_last",
        "fuse_positions_prob", "repeat_to_pack_max_length",
    }  # fmt: skip
    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {"column": "causal"}
    default_source: ClassVar[str] = "huggingface_instruct"

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

    always_max_length: bool = False
    """Fill every pack to its last token, in the order of the rows; the row that does not fit goes
    on in the next pack."""
    drop_last: bool = False
    """Drop the last pack if it is short, once per data set."""
    fuse_positions_prob: float = Field(default=0.0, ge=0, le=1)
    """Chance of a pack to be one sequence: its positions run on and its rows attend to each
    other."""
    repeat_to_pack_max_length: bool = False
    """Repeat the rows of a data set that is shorter than one pack until the pack is nearly full."""
    loss_roles: tuple[str, ...] = Field(default=("assistant",), min_length=1)
    """Roles whose text is trained."""
    completion_only: bool = True
    """Of rows with a prompt and a reply, train the reply only; false trains both."""
    ignore_empty_think: bool = False
    """Do not train an empty think block at the start of a reply."""

    def contradictions(self) -> Iterator[str]:
        for key in ("always_max_length", "drop_last", "fuse_positions_prob",
                    "repeat_to_pack_max_length"):  # fmt: skip
            if getattr(self, key) and not self.pack_samples:
                yield f"{key} needs pack_samples: true"
        if self.always_max_length and self.packing != "best_fit":
            yield "packing has no effect with always_max_length; remove one"
        for role in sorted({*self.loss_roles} - {*ROLES}):
            known = f"{did_you_mean(role, ROLES)} (known: {', '.join(ROLES)})"
            yield f"loss_roles: unknown role {role!r}{known}"
        if not self.mask_inputs and self.loss_roles != ("assistant",):
            yield "loss_roles has no effect with mask_inputs: false; remove one"
        # The effective recipe has every default written down, and has to run again.
        length, step = self.max_length or 0, self.div_length
        is_own = step != SFTDataConfig.model_fields["div_length"].default
        if self.pad_to == "max_length" and is_own and length % step:
            use = nearest_multiples(length, step)
            yield f"max_length {length} is not a multiple of div_length {step}; use {use}"

    @property
    def overlong_rule(self) -> Literal["drop", "truncate", "error"]:
        return self.overlong or ("drop" if self.filter_samples else "truncate")


class CausalDataConfig(DataConfig):
    """Text joined with BOS and EOS and cut into rows of exactly `max_length` tokens."""

    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {"role_mapping": "sft", "content_key": "sft"}

    @model_validator(mode="before")
    @classmethod
    def _rows_are_full(cls, data: Any) -> Any:
        for key in ("div_length", "pack_samples", "pad_to"):
            if isinstance(data, dict) and key in data:
                raise ValueError(f"{key}: causal rows always have `max_length` tokens, remove it")
        return data
