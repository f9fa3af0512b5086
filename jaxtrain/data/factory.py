"""From sources to batches."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.assets import cache_folder
from jaxtrain.data.cache import DataCache
from jaxtrain.data.code_digest import code_digest, encoding_digest
from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.encode import plain_backend
from jaxtrain.data.ledger import Ledger, SetCounts, SourceCounts, length_percentiles
from jaxtrain.data.order import mixed_documents, split_by_content
from jaxtrain.data.packing import RowPlan, fitting_lengths, plan_rows
from jaxtrain.data.plan import BatchPlan, BatchShape
from jaxtrain.data.render import DATE
from jaxtrain.data.rows import rows_digest
from jaxtrain.data.source import DataSource, Limits, LoadedSource
from jaxtrain.data.tokenise import Encoder, Tolerance, tokenise, workers_for
from jaxtrain.data.training_data import TrainingData
from jaxtrain.data.warnings import (
    document_warnings,
    sample_warnings,
    set_warnings,
    source_warnings,
)
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.errors import DataError
from jaxtrain.registry import Factory


class RowSet(NamedTuple):
    """The rows of one set, before they are cut into batches."""

    documents: Documents
    rows: RowPlan
    shape: BatchShape
    lengths: tuple[int, ...]
    """what T of a batch may be, rising; the same for all sets of a run"""
    is_train: bool


Processed = tuple[Documents, tuple[SourceCounts, ...]]
COUNTS_FILE = "counts.json"


class DataFactory(Factory, kind="data"):
    """Rows of sources to batches. A subclass has a `name`, a `config` annotation, and says how a
    source's rows become documents, and how documents share rows."""

    events = {
        "load": "load",
        "process": "process",
        "split": "split_data",
        "create-dataloader": "create_dataloader",
    }
    retired = {
        "default_source_cls": "write `type` in the entries of `data.sources`",
        "cache_path": "write `data.cache_dir` in the recipe",
    }
    config: DataConfig
    tokenize_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Further arguments for a tokenizer that is given text."""

    def __init__(self, config: DataConfig, tokenizer: Any, max_length: int, trainer: Any = None):
        super().__init__(config, trainer)
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def micro_batch_size(self) -> int:
        return self.trainer.config.micro_batch_size

    @property
    def global_rank(self) -> int:
        """Number of this process; it drives all devices of its host, so `local_rank` is 0."""
        return self.trainer.global_rank

    local_rank = 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

    def load(self, data_sources: Sequence[DataSource]) -> list[LoadedSource]:
        """The rows of every source; of the split `train` for one that names none."""
        limits = Limits(self.max_length, len(self.tokenizer), self.config.seed)
        return [LoadedSource(source, source.read("train", limits)) for source in data_sources]

    def encoder(self, loaded: LoadedSource) -> Encoder:
        """Rows of one source to documents."""
        raise NotImplementedError(f"{type(self).__name__} must define encoder(loaded)")

    def plan_rows(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> RowPlan:
        """The rows of one set, out of the documents numbered in `chosen`; here a row each."""
        return plan_rows(documents.lengths, self.max_length, "none", chosen)

    @property
    def row_multiple(self) -> int | None:
        """Batches have few lengths, multiples of it; all have `max_length` when None."""
        return None

    def lengths(self, row_lengths: np.ndarray, shape: BatchShape) -> tuple[int, ...]:
        """What T of a batch may be, rising, for rows of these lengths: each compiles the step
        once."""
        if self.row_multiple is None:
            return (self.max_length,)
        return fitting_lengths(
            row_lengths,
            update_rows=shape.update_rows,
            multiple=self.row_multiple,
            most=self.max_length,
            count=self.config.max_length_buckets,
        )

    def remarks(self) -> list[str]:
        """What this factory does otherwise than the recipe or the template says, for the ledger."""
        if "strftime_now" not in str(self.tokenizer.chat_template):
            return []
        return [f"the chat template writes the day: it is {DATE:%d %b %Y} on every one"]

    def process(self, dataset: Sequence[LoadedSource]) -> Processed:
        """Every row to a document or a counted drop; `DataError` when no document is left."""
        counts = tuple(SourceCounts(one.label) for one in dataset)
        tolerance = Tolerance(self.config.max_rows_with_errors)
        with _scratch() as folder:
            with DocumentWriter(folder) as writer:
                for number, (one, count) in enumerate(zip(dataset, counts, strict=True)):
                    workers = workers_for(len(one.rows), self.config.num_proc)
                    tokenise(
                        one.rows, self.encoder(one), writer, count,
                        source=number, tolerance=tolerance, workers=workers,
                    )  # fmt: skip
            documents = Documents.open(folder)
        for number, count in enumerate(counts):
            of_source = documents.index["source"] == number
            count.lengths = length_percentiles(documents.sequence_lengths[of_source])
        if not len(documents.index):
            raise DataError(f"no row is left: {_drops(counts)}")
        return documents, counts

    def cached(self, loaded: Sequence[LoadedSource]) -> tuple[Documents, Ledger]:
        """What `process` makes of these sources, once; the ledger says whether it was there."""

        def build(folder: Path) -> None:
            documents, counts = self.process(loaded)
            documents.save(folder)
            (folder / COUNTS_FILE).write_text(json.dumps([vars(count) for count in counts]))

        found = DataCache(self.config.cache_dir).get(
            self.key_parts(loaded), build, must_exist=self.config.fail_on_missing_cache
        )
        documents = Documents.open(found.folder)
        kept = json.loads((found.folder / COUNTS_FILE).read_text())
        counts = [  # of sources that may go by other names now
            SourceCounts(**{**count, "label": one.label})
            for count, one in zip(kept, loaded, strict=True)
        ]
        return documents, Ledger(tuple(counts), (), (found.note,))

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        """Everything that decides the documents, under names that a person knows."""
        backend = plain_backend(self.tokenizer)
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        written = self.config.model_dump(mode="json", exclude=set(self.config.NOT_IN_DOCUMENTS))
        parts = {
            "jaxtrain's encoding code": encoding_digest(),
            "the tokenizer": _digest(backend.to_str() + special),
            "the chat template": _digest(json.dumps(self.tokenizer.chat_template)),
            "code of the data factory": code_digest(type(self)),
            **{f"data.{key}": json.dumps(value) for key, value in written.items()},
        }
        for number, (source, rows) in enumerate(loaded):
            parts |= {
                f"rows of source {number}": rows_digest(rows),
                f"code of source {number}": code_digest(type(source)),
                **{
                    f"source {number}: {key}": json.dumps(value, sort_keys=True)
                    for key, value in source.options().items()
                },
            }
        return parts

    def split_data(self, training_data: Documents) -> tuple[np.ndarray, np.ndarray]:
        """By `train_eval_split`, before packing; equal documents stay on one side."""
        share = self.config.train_eval_split[1]
        if not share:
            return np.arange(len(training_data.index)), np.zeros(0, dtype=np.int64)
        return split_by_content(training_data.index["digest"], share, self.config.seed)

    def create_dataloader(self, dataset: RowSet) -> BatchPlan:
        """The batches of one set; an evaluation set keeps its order."""
        documents, rows, shape, lengths, is_train = dataset
        seed = self.config.seed if is_train else None
        together = self.config.ROWS_PER_SAMPLE
        return BatchPlan(documents, rows, shape, lengths, seed, together=together)

    def evaluation(
        self, sources: Sequence[DataSource], shape: BatchShape, *, lengths: tuple[int, ...]
    ) -> BatchPlan:
        """The batches of an evaluation set that is none of the recipe's, in rows of `lengths`, or
        longer ones where they must be."""
        documents, rows, _ = self._evaluated(sources)
        longest = self.lengths(rows.row_lengths, shape)[-1]
        lengths += (longest,) if longest > lengths[-1] else ()
        return self.create_dataloader(RowSet(documents, rows, shape, lengths, is_train=False))

    def _evaluated(self, sources: Sequence[DataSource]) -> tuple[Documents, RowPlan, Ledger]:
        """All documents of an evaluation set, in their order."""
        documents, ledger = self.cached(self.load(sources))
        everything = np.arange(len(documents.index))
        return documents, self.plan_rows(documents, everything, train=False), ledger

    def prepare(
        self,
        sources: Sequence[DataSource],
        eval_sources: Mapping[str, Sequence[DataSource]],
        shape: BatchShape,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> TrainingData:
        """Everything from rows to batches; `DataError` when nothing is left to train on."""
        loaded = self.load(sources)
        documents, ledger = self.cached(loaded)
        chosen, held_out = self.split_data(documents)
        weights = [source.config.weight for source in sources]
        chosen = mixed_documents(chosen, documents.index["source"], weights, self.config.seed)
        rows = self.plan_rows(documents, chosen, train=True)
        evals: dict[str, tuple[Documents, RowPlan]] = {}
        if len(held_out):
            evals["eval"] = documents, self.plan_rows(documents, held_out, train=False)
        for name, named in eval_sources.items():
            evaluated, held, counted = self._evaluated(named)
            evals[name], ledger = (evaluated, held), ledger.joined(counted)
        row_lengths = [rows.row_lengths, *(held.row_lengths for _, held in evals.values())]
        lengths = self.lengths(np.concatenate(row_lengths), shape)
        train = self.create_dataloader(RowSet(documents, rows, shape, lengths, is_train=True))
        plans = {
            name: self.create_dataloader(RowSet(*planned, shape, lengths, is_train=False))
            for name, planned in evals.items()
        }
        sets = [SetCounts.of(name, plan) for name, plan in (("train", train), *plans.items())]
        can_pack = "pack_samples" in type(self.config).model_fields
        warnings = [
            *(text for one in loaded for text in sample_warnings(one)),
            *(text for source in ledger.sources for text in source_warnings(source)),
            *(text for counts in sets if can_pack for text in set_warnings(counts)),
            *document_warnings(documents, self.tokenizer.bos_token_id),
        ]
        notes = (*self.remarks(), *ledger.notes)
        return TrainingData(
            train=train,
            evals=plans,
            ledger=Ledger(ledger.sources, tuple(sets), notes, tuple(warnings)),
            threads=self.config.dl_num_workers,
            process_index=process_index,
            process_count=process_count,
        )


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the user's cache, by a name under which the cache deletes what a process that was
    killed leaves; what was mapped from it stays readable after it is gone."""
    parent = cache_folder() / "data"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".new-") as folder:
        yield Path(folder)


def _digest(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _drops(counts: Sequence[SourceCounts]) -> str:
    return "; ".join(
        f"{count.label}: {count.rows} rows read, "
        + ", ".join(f"{number} dropped as {reason}" for reason, number in count.dropped.items())
        for count in counts
    )
