"""The `data` section and its sources."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from jaxtrain.recipe.errors import did_you_mean, nearest_multiples
from jaxtrain.recipe.section import (
    InputPath,
    Own,
    TypedSection,
    contradiction,
    input_folders,
    mapped,
    no_effect,
    path_exists,
    walk,
)

FORMATS = {
    ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow",
    ".csv": "csv", ".txt": "text", ".text": "text", ".md": "text",
}  # fmt: skip
"""Suffix of a local file → the source type that reads it."""
COMPRESSED = (".gz", ".zst")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Speakers of a conversation."""
REFUSED_ARGUMENTS = {
    "trust_remote_code": "code comes only from `code:`",
    "split": "write split beside kwargs",
    "streaming": "write data.streaming: true, which reads this source so",
}
"""Arguments of `datasets.load_dataset` that a recipe may not pass."""
ALL_FULL = "has no effect: all sequences have max_length tokens; write micro_batch_size instead"
WITHOUT_A_NUMBER = "needs the number of records, which data.streaming does not know; remove one"
DEFAULT_WINDOW = 10_000
"""Records of a block of a stream, where the recipe names no number."""
SPLIT_SUFFIX = re.compile(r"(?P<name>.+):(?P<split>[A-Za-z0-9_.-]+(?:\[[^\[\]]*\])?)")


def file_format(path: str) -> str | None:
    """The source type that reads a file, compressed or not; None for an unknown suffix."""
    path = path.partition("?")[0] if "://" in path else path
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def parse_split(text: str, folders: Iterable[Path] = ()) -> tuple[str, str]:
    """The two parts of `name:split[10:20]`. The second is empty when there is none, and for a path
    with a colon that exists in one of `folders` or the current one."""
    if path_exists(text) or any(path_exists(f"{folder}/{text}") for folder in folders):
        return text, ""
    match = SPLIT_SUFFIX.fullmatch(text)
    return (match["name"], match["split"]) if match else (text, "")


def source_from_text(text: str, *, registered: Collection[str], default: str) -> dict[str, Any]:
    """The source that a string stands for: a registered name, else a local file or URL, else a name
    for the factory's `default` source."""
    name, split = parse_split(text)
    given = {"split": split} if split else {}
    if name in registered:
        return {"type": name, **given}
    if kind := file_format(name):
        return {"type": kind, "path": name, **given}
    return {"type": default, "name_or_path": text}


def _resolve_glob(value: Any, info: ValidationInfo) -> Any:
    """Resolves a glob in the folders where plain paths are looked up."""
    if not isinstance(value, str) or "://" in value or not set("*?[") & set(value):
        return value
    folders = input_folders(info) if "\0" not in value else []
    found = (f for f in folders if glob(value, root_dir=f, recursive=True))
    return next((str(folder / value) for folder in found), value)


InputPattern = Annotated[InputPath, BeforeValidator(_resolve_glob)]


class DataSourceConfig(TypedSection):
    """Keys of every source."""

    split: str = ""
    """Split name, slices allowed (`train[:100]`); `train` when left out, `eval` under
    `eval_sources`."""
    sample_ratio: float | None = Field(default=None, gt=0, le=1)
    """Fraction of the records, sampled at random."""
    sample_count: int | None = Field(default=None, gt=0)
    """Number of records, sampled at random; all when there are fewer."""
    sample_seed: int = 42
    """Seed of the sample."""
    process: bool = True
    """False: records are tokenised already, as `input_ids` and, for conversations, `labels`."""
    weight: Own[float | None] = Field(default=None, gt=0)
    """Relative size of this source in the mixture; if one training source has it, all must. An
    epoch keeps its length, and each source is cut or repeated to its part of it; each epoch draws
    anew what it takes of a source."""
    name: Own[str] = ""
    """Label in logs and counts."""

    @property
    def selection_keys(self) -> tuple[str, ...]:
        """Keys that say where records are and which of them are used; the cache's key has the
        content of the records instead."""
        return ("name", "split", "sample_ratio", "sample_count", "sample_seed", "weight")

    PACKAGE: ClassVar[str] = ""
    """Package that the extra named after the source's type installs."""

    @property
    def is_tokenised(self) -> bool:
        return not self.process

    @property
    def text_column(self) -> str:
        """Column of the text of causal training; not needed for records with one column."""
        return "text"

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.sample_ratio is not None and self.sample_count is not None:
            yield "sample_ratio", "excludes sample_count; remove one"

    def idle(self) -> Iterator[tuple[str, str]]:
        if self.sample_ratio is None and self.sample_count is None:
            yield "sample_seed", "no sample is drawn"


class RowsConfig(DataSourceConfig):
    """Records of columns that become conversations."""

    role_mapping: dict[str, str] = {}
    """Role → column, or role → `array.field.value`: each turn of `array` whose `field` has that
    value gets the role; turns keep their order."""
    content_key: str | None = None
    """Field of a turn's text in the three-part form; one of `content`, `text`, `message` and
    `value` when left out."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if "content_key" in self.role_mapping:
            yield "role_mapping", "holds roles only; move content_key beside it, into the source"


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

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for key, why in REFUSED_ARGUMENTS.items():
            if self.kwargs.get(key, False) is not False:
                yield f"kwargs.{key}", f"is refused: {why}"

    @model_validator(mode="before")
    @classmethod
    def _split_beside_name(cls, data: Any, info: ValidationInfo) -> Any:
        """Splits `name:split` into two keys, so that the effective recipe has each of them once."""
        if not isinstance(data, dict) or not isinstance(data.get("name_or_path"), str):
            return data
        name, split = parse_split(data["name_or_path"], input_folders(info, "name_or_path"))
        if not split:
            return data
        given = data.get("split")
        if given not in (None, "", "train", "eval", split):  # those two are what is filled in
            what = f"asks for split {split!r}, and split for {given!r}; remove one"
            raise contradiction("name_or_path", what)
        return {**data, "name_or_path": name, "split": split}


class HFCausalDataSourceConfig(HFDataSourceConfig):
    """A hub data set of plain text."""

    column: str = "text"
    """Column of the text; a data set with one column uses that one."""

    @property
    def text_column(self) -> str:
        return self.column


class SyntheticDataSourceConfig(DataSourceConfig):
    """Documents of `max_length` random tokens."""

    rows: Own[int] = Field(default=10_000, ge=1)
    """Number of documents."""
    vocab_size: Own[int | None] = Field(default=None, ge=1)
    """Upper bound of the tokens; the tokenizer's size when left out."""
    process: Literal[False] = False
    """Always false: records are tokens."""

    @property
    def selection_keys(self) -> tuple[str, ...]:
        return (*super().selection_keys, "rows", "vocab_size")


class LocalDataSourceConfig(RowsConfig):
    """Files of one format, by path, list of paths, folder or glob; `.gz` and `.zst` too. Paths may
    be URLs that fsspec reads, such as `s3://`: those are copied into the user's cache."""

    path: Own[InputPattern | tuple[InputPattern, ...]]
    """File, folder, glob or URL, or a list of them."""
    columns: Own[dict[str, str]] = {}
    """Column → its new name."""
    column: str = "text"
    """Column of the text of causal training; the only column of a `text` file."""

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def text_column(self) -> str:
        return self.column

    @property
    def selection_keys(self) -> tuple[str, ...]:
        return (*super().selection_keys, "path")


class TextDataSourceConfig(LocalDataSourceConfig):
    """Files of plain text."""

    per_line: Own[bool] = False
    """One record per line instead of per file."""


class AnyLocalDataSourceConfig(TextDataSourceConfig):
    """Files of any format."""

    format: Own[Literal["auto", "json", "jsonl", "parquet", "arrow", "csv", "text"]] = "auto"
    """Format of all files; `auto` goes by the suffix of each."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.per_line and self.format not in ("auto", "text"):
            yield "per_line", f"has no effect with format: {self.format}; remove it"


_ALWAYS_CACHED = no_effect("the cache is always on; remove the key")


class DataConfig(TypedSection):
    """Keys of every data factory."""

    sources: tuple[Any, ...]
    """Training sources: names, paths or maps."""
    eval_sources: tuple[Any, ...] | dict[str, tuple[Any, ...]] = ()
    """Evaluation sources; a map of name to sources makes named sets."""
    train_eval_split: tuple[float, float] = (1.0, 0.0)
    """Fractions for training and for evaluation; split before packing, by `seed`."""
    max_length: int | None = Field(default=None, gt=0)
    """Longest sequence in tokens; the model's `max_position_embeddings` when left out."""
    num_proc: int = Field(default=16, ge=1)
    """Processes for tokenising, at most one per core; the result never depends on it."""
    dl_num_workers: Annotated[int, mapped("prefetch threads per process")] = Field(default=2, ge=0)
    """Threads that prepare batches ahead of the step; 0 prepares them in the loop."""
    seed: int = Field(default=42, ge=0)
    """Seed of the order of documents, together with the epoch, and of the split."""

    max_rows_with_errors: Own[int] = Field(default=0, ge=0)
    """Number of faulty records that are skipped and counted; one more stops the run."""
    cache_dir: str | None = None
    """Folder of prepared data, in your cache folder when left out. Machines that share it wait for
    the first of them to prepare."""
    cache_fs_type: Annotated[
        Literal["auto", "local", "shared"], no_effect("a lock file decides which machine prepares")
    ] = "auto"
    use_data_cache: Annotated[bool | None, _ALWAYS_CACHED] = None
    cache_processed_data: Annotated[bool | None, _ALWAYS_CACHED] = None
    fail_on_missing_cache: bool = False
    """Stop when data is not prepared yet."""
    streaming: Own[bool] = False
    """Read, encode and pack training records when they are needed, in blocks, instead of preparing
    all of them; needs `train_iters`. Evaluation sets are prepared."""
    shuffle_window: Own[int | None] = Field(default=None, ge=1)
    """Records of a block of `streaming`, which are packed and shuffled together; 10,000 when left
    out. With 1 their order is kept."""
    batch_tokens: Own[int] = Field(default=0, ge=0)
    """Padded tokens per batch shard and forward pass, to which batches of unpacked sequences are
    filled instead of `micro_batch_size` sequences; 0 is off. A step has sequences of one of
    `max_length_buckets` lengths, and as many of them as fit."""
    split_special_tokens: Own[bool] = False
    """Encode special tokens that records write out, such as `<|im_end|>` in a user's text, as plain
    text; otherwise they become the control tokens, and the counts say in how many documents."""
    max_length_buckets: Own[int] = Field(default=8, ge=1)
    """Maximum number of lengths that unpacked sequences are padded to. Each step uses the shortest
    that fits, and each length compiles the step once; the loss is the same."""

    CHANGES_NO_BATCH: ClassVar[frozenset[str]] = frozenset((
        "num_proc", "dl_num_workers", "cache_dir", "cache_fs_type", "use_data_cache",
        "cache_processed_data", "fail_on_missing_cache",
    ))  # fmt: skip
    """Keys of place and speed, which change no batch."""
    NOT_IN_DOCUMENTS: ClassVar[frozenset[str]] = CHANGES_NO_BATCH | {
        "sources", "eval_sources", "train_eval_split", "max_length", "seed", "batch_tokens",
        "max_length_buckets", "streaming", "shuffle_window",
    }  # fmt: skip
    """Keys that change no document: those, and what is planned from documents at every start."""
    default_source: ClassVar[str] = "huggingface"
    """Type of a source without a `type`."""
    NEED_THE_WHOLE: ClassVar[tuple[str, ...]] = ()
    """Keys that say something about all packed sequences of a set."""
    SEQUENCES_PER_SAMPLE: ClassVar[int] = 1
    """Sequences in a batch per unit of `micro_batch_size`."""
    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {}
    """Key of a source that this factory does not read → the type of `data` that reads it."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if not self.sources:
            yield "sources", "is empty; name at least one source"
        train, held_out = self.train_eval_split
        if min(train, held_out) < 0 or abs(train + held_out - 1) > 1e-6:
            what = "must be two numbers from 0 to 1 that add up to 1"
            yield "train_eval_split", f"{what}, found {train} and {held_out}"
        if held_out and self.eval_sources:
            yield "train_eval_split", "excludes eval_sources; remove one"
        weights = [s.weight for s in self.sources if isinstance(s, DataSourceConfig)]
        if None in weights and any(weights):
            what = "has no weight, and another source has; write it for all or for none"
            yield f"sources.{weights.index(None)}", what
        if 0 < self.batch_tokens < (self.max_length or 0) * self.SEQUENCES_PER_SAMPLE:
            needed = f"at least {(self.max_length or 0) * self.SEQUENCES_PER_SAMPLE}"
            what = f"{self.batch_tokens} may hold no sequence of max_length {self.max_length}"
            yield "batch_tokens", f"{what}; write {needed}, or lower max_length"
        yield from self._find_what_a_stream_cannot()
        for name, named in self.eval_sets.items():
            if not named:
                yield f"eval_sources.{name}", "is empty; name at least one source"
            if any(isinstance(s, DataSourceConfig) and s.weight for s in named):
                yield "eval_sources", "weight has no effect here; remove it"

    def _find_what_a_stream_cannot(self) -> Iterator[tuple[str, str]]:
        if not self.streaming:
            if self.shuffle_window:
                yield "shuffle_window", "needs streaming: true; otherwise all records are shuffled"
            return
        for key in ("batch_tokens", *self.NEED_THE_WHOLE):
            if getattr(self, key):
                yield key, "excludes streaming, which knows a block of the records only; remove one"
        if self.train_eval_split[1]:
            yield "train_eval_split", "excludes streaming; name the records under eval_sources"
        for number, source in enumerate(self.sources):
            if not isinstance(source, DataSourceConfig):
                continue
            for key in ("sample_ratio", "sample_count"):
                if getattr(source, key):
                    yield f"sources.{number}.{key}", WITHOUT_A_NUMBER
            if "[" in source.split:
                yield f"sources.{number}.split", WITHOUT_A_NUMBER

    @property
    def eval_sets(self) -> dict[str, tuple[Any, ...]]:
        """Name → sources; a plain list is the set `eval`."""
        if isinstance(self.eval_sources, dict):
            return self.eval_sources
        return {"eval": self.eval_sources} if self.eval_sources else {}

    def iter_sources(self) -> Iterator[tuple[str, DataSourceConfig]]:
        """Yields (dotted key, source) of every source."""
        for key, section in walk(self, "data"):
            if isinstance(section, DataSourceConfig):
                yield key, section

    @property
    def has_eval(self) -> bool:
        return bool(self.eval_sources) or self.train_eval_split[1] > 0


class SFTDataConfig(DataConfig):
    """Conversations, one per sequence or packed."""

    NOT_IN_DOCUMENTS: ClassVar[frozenset[str]] = DataConfig.NOT_IN_DOCUMENTS | {
        "div_length", "pad_to", "pack_samples", "packing", "always_max_length", "drop_last",
        "fuse_positions_prob", "repeat_to_pack_max_length",
    }  # fmt: skip
    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {"column": "causal"}
    NEED_THE_WHOLE: ClassVar[tuple[str, ...]] = ("drop_last", "repeat_to_pack_max_length")
    default_source: ClassVar[str] = "huggingface_instruct"

    div_length: int = Field(default=256, ge=1)
    """Sequences are padded to a multiple of it."""
    pad_to: Literal["div_length", "max_length"] = "div_length"
    """Pad to a multiple of `div_length`, or every sequence to `max_length`."""
    mask_inputs: bool = True
    """Train on assistant text only."""
    pack_samples: bool = False
    """Pack several conversations into a sequence, isolated from one another."""
    packing: Own[Literal["best_fit", "next_fit"]] = "best_fit"
    """How `pack_samples` fills sequences."""
    filter_samples: bool = True
    """Drop conversations longer than `max_length`."""
    overlong: Own[Literal["drop", "truncate", "error"] | None] = None
    """What happens to conversations longer than `max_length`; `drop` with `filter_samples`, else
    `truncate`, when left out."""

    always_max_length: bool = False
    """Fill every packed sequence to its last token, in order; a conversation that does not fit
    continues in the next sequence."""
    drop_last: bool = False
    """Drop the last packed sequence of a data set if it is short."""
    fuse_positions_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability that a packed sequence is one document: its positions run through and its
    conversations attend to each other."""
    repeat_to_pack_max_length: bool = False
    """Repeat a data set that is shorter than one packed sequence until that is nearly full."""
    loss_roles: Own[tuple[str, ...]] = Field(default=("assistant",), min_length=1)
    """Roles whose text is trained."""
    completion_only: Own[bool] = True
    """Train only the reply of records with a prompt and a reply; false trains both."""
    ignore_empty_think: bool = False
    """Do not train an empty think block at the start of a reply."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        for key in ("always_max_length", "drop_last", "fuse_positions_prob",
                    "repeat_to_pack_max_length"):  # fmt: skip
            if getattr(self, key) and not self.pack_samples:
                yield key, "needs pack_samples: true"
        if self.always_max_length and self.packing != "best_fit":
            yield "packing", "has no effect with always_max_length; remove one"
        if self.batch_tokens and (self.pack_samples or self.pad_to == "max_length"):
            yield "batch_tokens", ALL_FULL
        for role in sorted({*self.loss_roles} - {*ROLES}):
            known = f"{did_you_mean(role, ROLES)} (known: {', '.join(ROLES)})"
            yield "loss_roles", f"unknown role {role!r}{known}"
        if not self.mask_inputs and self.loss_roles != ("assistant",):
            yield "loss_roles", "has no effect with mask_inputs: false; remove one"
        # The effective recipe has every default written down, and has to run again.
        length, step = self.max_length or 0, self.div_length
        is_own = step != SFTDataConfig.model_fields["div_length"].default
        if self.pad_to == "max_length" and is_own and length % step:
            use = nearest_multiples(length, step)
            yield "max_length", f"{length} is not a multiple of div_length {step}; use {use}"

    def idle(self) -> Iterator[tuple[str, str]]:
        if not self.pack_samples:
            yield "packing", "only `pack_samples: true` packs"
        if self.pack_samples or self.pad_to == "max_length":
            for key in ("div_length", "max_length_buckets"):
                yield key, "all sequences have `max_length` tokens"
        if self.overlong is not None:
            yield "filter_samples", "`overlong` says what happens to long conversations"
        if not self.mask_inputs:
            for key in ("completion_only", "ignore_empty_think"):
                yield key, "with `mask_inputs: false` every token is trained"

    @property
    def overlong_rule(self) -> Literal["drop", "truncate", "error"]:
        return self.overlong or ("drop" if self.filter_samples else "truncate")


class CausalDataConfig(DataConfig):
    """Text, joined with BOS and EOS and cut into sequences of exactly `max_length` tokens."""

    UNREAD_SOURCE_KEYS: ClassVar[Mapping[str, str]] = {"role_mapping": "sft", "content_key": "sft"}

    def contradictions(self) -> Iterator[tuple[str, str]]:
        if self.batch_tokens:
            yield "batch_tokens", ALL_FULL

    def idle(self) -> Iterator[tuple[str, str]]:
        yield "max_length_buckets", "all sequences have `max_length` tokens"

    @model_validator(mode="before")
    @classmethod
    def _rows_are_full(cls, data: Any) -> Any:
        for key in ("div_length", "pack_samples", "pad_to"):
            if isinstance(data, dict) and key in data:
                raise contradiction(key, "causal sequences all have `max_length` tokens; remove it")
        return data
