"""Turns the records of sources into batches."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxtrain.assets import cache_folder
from jaxtrain.data.cache import DataCache
from jaxtrain.data.code_digest import hash_class_code, hash_encoding_code
from jaxtrain.data.documents import Documents, DocumentWriter
from jaxtrain.data.encode import prepare_backend
from jaxtrain.data.ledger import Ledger, SetCounts, SourceCounts, compute_percentiles
from jaxtrain.data.order import mix_sources, split_by_content
from jaxtrain.data.packing import PackingPlan, choose_lengths, pack
from jaxtrain.data.plan import BatchPlan, BatchShape
from jaxtrain.data.records import hash_records
from jaxtrain.data.render import DATE
from jaxtrain.data.source import DataSource, Limits, LoadedSource
from jaxtrain.data.tokenise import Encoder, Tolerance, choose_num_workers, tokenise
from jaxtrain.data.training_data import TrainingData
from jaxtrain.data.warnings import check_documents, check_sample, check_set, check_source
from jaxtrain.recipe.data import DataConfig
from jaxtrain.recipe.errors import DataError
from jaxtrain.registry import Factory


class PackedSet(NamedTuple):
    """The packed sequences of one set, before they are cut into batches."""

    documents: Documents
    packing: PackingPlan
    shape: BatchShape
    lengths: tuple[int, ...]
    """Possible T of a batch, rising; the same for all sets of a run."""
    is_train: bool


Processed = tuple[Documents, tuple[SourceCounts, ...]]
COUNTS_FILE = "counts.json"


class DataFactory(Factory, kind="data"):
    """Turns the records of sources into batches.

    A subclass has a `name` and a `config` annotation, and defines how a source's records become
    documents (`encoder`) and how documents share sequences (`plan_rows`)."""

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
    extras: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = MappingProxyType({})
    """What `Batch.extras` of its batches have: name → dtype and shape for each sequence."""
    tokenize_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Further arguments of the tokenizer where it tokenises plain text."""

    def __init__(self, config: DataConfig, tokenizer: Any, max_length: int, trainer: Any = None):
        super().__init__(config, trainer)
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def micro_batch_size(self) -> int:
        return self.trainer.config.micro_batch_size

    @property
    def global_rank(self) -> int:
        """Index of this process; it drives all devices of its host, so `local_rank` is 0."""
        return self.trainer.global_rank

    local_rank = 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size

    def load(self, data_sources: Sequence[DataSource]) -> list[LoadedSource]:
        """Reads the records of every source, by default those of its `train` split."""
        limits = Limits(self.max_length, len(self.tokenizer), self.config.seed)
        return [LoadedSource(source, source.read("train", limits)) for source in data_sources]

    def encoder(self, loaded: LoadedSource) -> Encoder:
        """Returns what turns the records of one source into documents."""
        raise NotImplementedError(f"{type(self).__name__} must define encoder(loaded)")

    def plan_rows(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> PackingPlan:
        """Packs the documents numbered in `chosen` into sequences; here each into its own."""
        return pack(documents.lengths, self.max_length, "none", chosen)

    @property
    def row_multiple(self) -> int | None:
        """The lengths of batches are multiples of this; None pads every batch to `max_length`."""
        return None

    def lengths(self, sequence_lengths: np.ndarray, shape: BatchShape) -> tuple[int, ...]:
        """Returns the possible T of a batch, rising; the step compiles once for each."""
        if self.row_multiple is None:
            return (self.max_length,)
        return choose_lengths(
            sequence_lengths,
            update_rows=shape.update_rows,
            multiple=self.row_multiple,
            max_length=self.max_length,
            count=self.config.max_length_buckets,
        )

    def remarks(self) -> list[str]:
        """Returns ledger lines that say where this factory departs from the recipe or template."""
        if "strftime_now" not in str(self.tokenizer.chat_template):
            return []
        return [f"the chat template writes the date; it is always {DATE:%d %b %Y}"]

    def process(self, dataset: Sequence[LoadedSource]) -> Processed:
        """Turns records into documents and counted drops; DataError when no document is left."""
        counts = tuple(SourceCounts(one.label) for one in dataset)
        tolerance = Tolerance(self.config.max_rows_with_errors)
        with _open_scratch() as folder:
            with DocumentWriter(folder) as writer:
                for number, (one, count) in enumerate(zip(dataset, counts, strict=True)):
                    workers = choose_num_workers(len(one.rows), self.config.num_proc)
                    tokenise(
                        one.rows, self.encoder(one), writer, count,
                        source=number, tolerance=tolerance, workers=workers,
                    )  # fmt: skip
            documents = Documents.open(folder)
        for number, count in enumerate(counts):
            of_source = documents.index["source"] == number
            count.lengths = compute_percentiles(documents.sequence_lengths[of_source])
        if not len(documents.index):
            raise DataError(f"no record is left: {_describe_drops(counts)}")
        return documents, counts

    def load_or_process(self, loaded: Sequence[LoadedSource]) -> tuple[Documents, Ledger]:
        """Returns the documents of these sources, from the cache or else from `process`."""

        def build(folder: Path) -> None:
            documents, counts = self.process(loaded)
            documents.save(folder)
            (folder / COUNTS_FILE).write_text(json.dumps([vars(count) for count in counts]))

        found = DataCache(self.config.cache_dir).get(
            self.key_parts(loaded), build, must_exist=self.config.fail_on_missing_cache
        )
        documents = Documents.open(found.folder)
        saved = json.loads((found.folder / COUNTS_FILE).read_text())
        counts = [  # a source may have another name now
            SourceCounts(**{**count, "label": one.label})
            for count, one in zip(saved, loaded, strict=True)
        ]
        return documents, Ledger(tuple(counts), (), (found.note,))

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        """Returns everything that decides the documents, under names for people."""
        backend = prepare_backend(self.tokenizer)
        special = json.dumps(self.tokenizer.special_tokens_map, sort_keys=True, default=str)
        written = self.config.model_dump(mode="json", exclude=set(self.config.NOT_IN_DOCUMENTS))
        parts = {
            "jaxtrain's encoding code": hash_encoding_code(),
            "the tokenizer": _hash_text(backend.to_str() + special),
            "the chat template": _hash_text(json.dumps(self.tokenizer.chat_template)),
            "code of the data factory": hash_class_code(type(self)),
            **{f"data.{key}": json.dumps(value) for key, value in written.items()},
        }
        for number, (source, records) in enumerate(loaded):
            parts |= {
                f"records of source {number}": hash_records(records),
                f"code of source {number}": hash_class_code(type(source)),
                **{
                    f"source {number}: {key}": json.dumps(value, sort_keys=True)
                    for key, value in source.options().items()
                },
            }
        return parts

    def split_data(self, training_data: Documents) -> tuple[np.ndarray, np.ndarray]:
        """Splits by `train_eval_split` before packing; equal documents stay on one side."""
        share = self.config.train_eval_split[1]
        if not share:
            return np.arange(len(training_data.index)), np.zeros(0, dtype=np.int64)
        return split_by_content(training_data.index["digest"], share, self.config.seed)

    def create_dataloader(self, dataset: PackedSet) -> BatchPlan:
        """Plans the batches of one set; an evaluation set keeps its order."""
        documents, packing, shape, lengths, is_train = dataset
        seed = self.config.seed if is_train else None
        together = self.config.ROWS_PER_SAMPLE
        return BatchPlan(documents, packing, shape, lengths, seed, together=together)

    def evaluation(
        self, sources: Sequence[DataSource], shape: BatchShape, *, lengths: tuple[int, ...]
    ) -> BatchPlan:
        """Plans the batches of an evaluation set that is not in the recipe, with T of `lengths`, or
        longer where a sequence needs it."""
        documents, packing, _ = self._pack_eval(sources)
        longest = self.lengths(packing.sequence_lengths, shape)[-1]
        lengths += (longest,) if longest > lengths[-1] else ()
        return self.create_dataloader(PackedSet(documents, packing, shape, lengths, is_train=False))

    def _check_extras(self, name: str, plan: BatchPlan) -> None:
        """DataError where a set has other `extras` than the class declares, which is what a plan is
        compiled for."""
        found = {n: (str(a.dtype), a.shape[1:], len(a)) for n, a in plan.extras.items()}
        wanted = {n: (*spec, plan.rows.num_sequences) for n, spec in self.extras.items()}
        if found != wanted:
            raise DataError(
                f"{name}: the batches of {type(self).__qualname__} must have extras (dtype, shape, "
                f"sequences) {wanted}, found {found}"
            )

    def _pack_eval(self, sources: Sequence[DataSource]) -> tuple[Documents, PackingPlan, Ledger]:
        """Packs all documents of an evaluation set, in their order."""
        documents, ledger = self.load_or_process(self.load(sources))
        everything = np.arange(len(documents.index))
        return documents, self.plan_rows(documents, everything, train=False), ledger

    def prepare(
        self,
        sources: Sequence[DataSource],
        eval_sources: Mapping[str, Sequence[DataSource]],
        shape: BatchShape,
    ) -> TrainingData:
        """Turns records into batches; DataError when nothing is left to train on."""
        loaded = self.load(sources)
        documents, ledger = self.load_or_process(loaded)
        chosen, held_out = self.split_data(documents)
        weights = [source.config.weight for source in sources]
        chosen = mix_sources(chosen, documents.index["source"], weights, self.config.seed)
        packing = self.plan_rows(documents, chosen, train=True)
        packed_evals: dict[str, tuple[Documents, PackingPlan]] = {}
        if len(held_out):
            packed_evals["eval"] = documents, self.plan_rows(documents, held_out, train=False)
        for name, named in eval_sources.items():
            evaluated, held, counted = self._pack_eval(named)
            packed_evals[name], ledger = (evaluated, held), ledger.merge(counted)
        packings = [packing, *(held for _, held in packed_evals.values())]
        lengths = self.lengths(np.concatenate([one.sequence_lengths for one in packings]), shape)
        train = self.create_dataloader(PackedSet(documents, packing, shape, lengths, is_train=True))
        evals = {
            name: self.create_dataloader(PackedSet(*packed, shape, lengths, is_train=False))
            for name, packed in packed_evals.items()
        }
        plans = (("train", train), *evals.items())
        for name, plan in plans:
            self._check_extras(name, plan)
        sets = [SetCounts.from_plan(name, plan) for name, plan in plans]
        can_pack = "pack_samples" in type(self.config).model_fields
        warnings = [
            *(text for one in loaded for text in check_sample(one)),
            *(text for source in ledger.sources for text in check_source(source)),
            *(text for counts in sets if can_pack for text in check_set(counts)),
            *check_documents(documents, self.tokenizer.bos_token_id),
        ]
        notes = (*self.remarks(), *ledger.notes)
        return TrainingData(
            train=train,
            evals=evals,
            ledger=Ledger(ledger.sources, tuple(sets), notes, tuple(warnings)),
            threads=self.config.dl_num_workers,
        )


@contextmanager
def _open_scratch() -> Iterator[Path]:
    """Opens a temporary folder in the user's cache, named so that the cache deletes what a killed
    process leaves; what was mapped from it stays readable after it is deleted."""
    parent = cache_folder() / "data"
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".new-") as folder:
        yield Path(folder)


def _hash_text(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _describe_drops(counts: Sequence[SourceCounts]) -> str:
    return "; ".join(
        f"{count.label}: {count.rows} records read, "
        + ", ".join(f"{number} dropped as {reason}" for reason, number in count.dropped.items())
        for count in counts
    )
