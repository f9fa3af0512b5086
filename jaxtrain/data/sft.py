"""Supervised fine-tuning: conversations to packed rows with loss on what the assistant says."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxtrain.assets import cache_folder
from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.encode import ConversationEncoder
from jaxtrain.data.factory import DataFactory, LoadedSource, TrainingData
from jaxtrain.data.ledger import Ledger, SetCounts, SourceCounts, length_percentiles
from jaxtrain.data.packing import RowPlan, plan_rows
from jaxtrain.data.plan import BatchPlan, BatchShape
from jaxtrain.data.source import DataSource
from jaxtrain.data.split import split_by_content
from jaxtrain.data.tokenise import tokenise, workers_for
from jaxtrain.recipe.data import SFTDataConfig
from jaxtrain.recipe.errors import DataError

Processed = tuple[Documents, tuple[SourceCounts, ...]]


class SFTDataFactory(DataFactory):
    name = "sft"
    config: SFTDataConfig

    def process(self, loaded: Sequence[LoadedSource]) -> Processed:
        """Every row to a document or a counted drop; `DataError` when no document is left."""
        encoder = ConversationEncoder(
            self.tokenizer,
            max_length=self.max_length,
            overlong=self.config.overlong_rule,
            mask_inputs=self.config.mask_inputs,
        )
        counts = tuple(SourceCounts(source.label) for source in loaded)
        with _scratch() as folder:
            with DocumentWriter(folder) as writer:
                for number, (source, count) in enumerate(zip(loaded, counts, strict=True)):
                    workers = workers_for(len(source.rows), self.config.num_proc)
                    tokenise(source.rows, encoder, writer, count, source=number, workers=workers)
            documents = Documents.open(folder)
        for number, count in enumerate(counts):
            of_source = documents.index["source"] == number
            count.lengths = length_percentiles(documents.lengths[of_source])
        if not len(documents.index):
            raise DataError(f"no row is left: {_drops(counts)}")
        return documents, counts

    def split_data(self, documents: Documents) -> tuple[np.ndarray, np.ndarray]:
        """By `train_eval_split`, before packing; equal documents stay on one side."""
        share = self.config.train_eval_split[1]
        if not share:
            return np.arange(len(documents.index)), np.zeros(0, dtype=np.int64)
        return split_by_content(documents.index["digest"], share, self.config.seed)

    def create_dataloader(
        self,
        documents: Documents,
        rows: RowPlan,
        shape: BatchShape,
        *,
        row_tokens: int,
        train: bool,
    ) -> BatchPlan:
        """The batches of one set; an evaluation set keeps its order."""
        seed = self.config.seed if train else None
        return BatchPlan(documents, rows, shape, row_tokens, seed)

    def prepare(
        self,
        sources: Sequence[DataSource],
        eval_sources: Mapping[str, Sequence[DataSource]],
        shape: BatchShape,
        *,
        process_index: int = 0,
        process_count: int = 1,
    ) -> TrainingData:
        documents, counts = self.process(self.load(sources, "train"))
        chosen, held_out = self.split_data(documents)
        planned = {"train": (documents, self._rows(documents, chosen))}
        if len(held_out):
            planned["eval"] = (documents, self._rows(documents, held_out))
        for name, named in eval_sources.items():
            if not named:
                continue
            evaluated, eval_counts = self.process(self.load(named, "eval"))
            planned[name] = (evaluated, self._rows(evaluated, np.arange(len(evaluated.index))))
            counts += eval_counts
        row_tokens = self._row_tokens([rows for _, rows in planned.values()])
        plans = {
            name: self.create_dataloader(
                docs, rows, shape, row_tokens=row_tokens, train=name == "train"
            )
            for name, (docs, rows) in planned.items()
        }
        ledger = Ledger(counts, tuple(SetCounts.of(name, plan) for name, plan in plans.items()))
        return TrainingData(
            train=plans.pop("train"),
            evals=plans,
            ledger=ledger,
            threads=self.config.dl_num_workers,
            process_index=process_index,
            process_count=process_count,
        )

    def _rows(self, documents: Documents, chosen: np.ndarray) -> RowPlan:
        rule = self.config.packing if self.config.pack_samples else "none"
        return plan_rows(documents.lengths, self.max_length, rule, chosen)

    def _row_tokens(self, plans: Sequence[RowPlan]) -> int:
        """T: `max_length`, or without packing the smallest multiple of `div_length` that holds the
        longest row of any set, since every further length compiles the step once more."""
        if self.config.pack_samples or self.config.pad_to == "max_length":
            return self.max_length
        longest = max(int(rows.row_lengths.max()) for rows in plans)
        return min(-(-longest // self.config.div_length) * self.config.div_length, self.max_length)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder in the user's cache; what was mapped from it stays readable after it is gone, so
    that nothing is left behind by a run that is killed later."""
    parent = cache_folder() / "tmp"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="documents-") as folder:
        yield Path(folder)


def _drops(counts: Sequence[SourceCounts]) -> str:
    return "; ".join(
        f"{count.label}: {count.rows} rows read, "
        + ", ".join(f"{number} dropped as {reason}" for reason, number in count.dropped.items())
        for count in counts
    )
