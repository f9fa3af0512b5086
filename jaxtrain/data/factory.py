"""From the `data` section of a recipe to the batches of its run: the order of all that follows."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from itertools import accumulate
from math import lcm
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxtrain import registry
from jaxtrain.assets import cache_folder
from jaxtrain.data.cache import DataCache
from jaxtrain.data.code_digest import hash_class_code, hash_encoding_code
from jaxtrain.data.documents import (
    Documents,
    DocumentWriter,
    Tolerance,
    choose_num_workers,
    tokenise,
)
from jaxtrain.data.encode import Encoder, prepare_backend
from jaxtrain.data.ledger import Ledger, SourceCounts, compute_percentiles, describe_drops
from jaxtrain.data.order import MIXTURE, Mixture, mix_sources, sample, split_by_content
from jaxtrain.data.packing import PackingPlan, choose_lengths, halve_lengths, join_plans, pack
from jaxtrain.data.plan import BatchPlan, BatchShape, Draw, TrainingData
from jaxtrain.data.records import hash_records
from jaxtrain.data.render import DATE
from jaxtrain.data.source import DataSource, GivenSource, LoadedSource
from jaxtrain.data.stream import Stream
from jaxtrain.data.token_batches import TokenBatchPlan
from jaxtrain.recipe.data import DEFAULT_WINDOW, DataConfig
from jaxtrain.recipe.errors import DataError, RecipeError
from jaxtrain.recipe.resolve import parse_eval_sources
from jaxtrain.recipe.trainer import TrainerConfig

GivenRows = Iterable[dict[str, Any]]
"""Records as a source returns them."""
Processed = tuple[Documents, tuple[SourceCounts, ...]]
COUNTS_FILE = "counts.json"


def sequence_limit(config: DataConfig, max_positions: int | None) -> int:
    """Returns the tokens of a sequence, as many as the model's positions where the recipe names no
    number; RecipeError where neither does."""
    length = config.max_length or max_positions
    if length is None:
        raise RecipeError("data.max_length: is required, since the model's config names no length")
    return length


def build_data_factory(
    recipe: TrainerConfig, tokenizer: Any, *, max_positions: int | None, trainer: Any = None
) -> "DataFactory":
    """Builds the factory that the `data` section names; `sequence_limit` says what is refused."""
    config, max_length = recipe.data, sequence_limit(recipe.data, max_positions)
    factory = registry.find("data", config.type)(config, tokenizer, max_length, trainer=trainer)
    factory.tokenize_kwargs = recipe.tokenizer.tokenize_kwargs
    return factory


def prepare_data(
    recipe: TrainerConfig,
    factory: "DataFactory",
    shape: BatchShape,
    *,
    train_data: GivenRows | None = None,
    eval_data: GivenRows | Mapping[str, GivenRows] | None = None,
) -> TrainingData:
    """Turns records into batches, for training and for every evaluation set; given records stand in
    for the recipe's sources, as one set or by the names of several."""
    config = factory.config
    train = _build_sources(config.sources, factory)
    evals = {name: _build_sources(listed, factory) for name, listed in config.eval_sets.items()}
    if train_data is not None:
        train = [GivenSource.from_records(train_data, config.sources[0])]
    if eval_data is not None:
        if config.train_eval_split[1]:
            raise RecipeError("data.train_eval_split: excludes eval_data; remove one")
        named: Any = eval_data if isinstance(eval_data, Mapping) else {"eval": eval_data}
        evals = {name: [GivenSource.from_records(records)] for name, records in named.items()}
    data = factory.prepare(train, evals, shape)
    if not isinstance(data.train, BatchPlan):  # a stream has no epoch to repeat
        return data
    repeated = data.train.repeat(recipe.min_iterations)
    return replace(data, train=replace(repeated, first_only=recipe.overfit_first_batch))


def prepare_evaluation(
    factory: "DataFactory", dataset: Any, shape: BatchShape, *, lengths: tuple[int, ...]
) -> BatchPlan:
    """Plans the batches of a data set that is none of the recipe's: records, or what a recipe may
    write under `data.eval_sources`, maps with their `type`."""
    records: list[Any] = [dataset] if isinstance(dataset, str) else list(dataset)
    first = records[0] if records else None
    kind = first.get("type") if isinstance(first, Mapping) else None
    if isinstance(first, str) or kind in registry.names("data_source"):
        sources = _build_sources(parse_eval_sources(records, factory.config), factory)
    else:
        sources = [GivenSource.from_records(records)]
    return factory.evaluation(sources, shape, lengths=lengths)


def _build_sources(listed: Iterable[Any], factory: "DataFactory") -> list[DataSource]:
    return [registry.find("data_source", s.type)(s, factory.trainer) for s in listed]


class PackedSet(NamedTuple):
    """The packed sequences of one set, before they are cut into batches."""

    documents: Documents
    packing: PackingPlan
    shape: BatchShape
    lengths: tuple[int, ...]
    """Possible T of a batch, rising; the same for all sets of a run."""
    is_train: bool
    draws: tuple[Draw, ...] = ()
    """Of `BatchPlan`."""


class DataFactory(registry.Factory, kind="data"):
    """Turns the records of sources into batches.

    A subclass has a `name` and a `config` annotation, and defines how a source's records become
    documents (`encoder`) and how documents share sequences (`plan_packing`)."""

    events = {
        "load": "load",
        "process": "process",
        "split": "split_data",
        "create-dataloader": "create_dataloader",
    }
    retired = {
        "default_source_cls": "write `type` in the entries of `data.sources`",
        "cache_path": "write `data.cache_dir` in the recipe",
        "plan_rows": "define `plan_packing`",
        "row_multiple": "define `length_multiple`",
    }
    config: DataConfig
    extras: ClassVar[Mapping[str, tuple[str, tuple[int, ...]]]] = MappingProxyType({})
    """What `Batch.extras` of its batches have: name → dtype and shape for each sequence."""
    tokenize_kwargs: Mapping[str, Any] = MappingProxyType({})
    """Further arguments of the tokenizer where it tokenises plain text."""
    length_multiple: int | None = None
    """The lengths of batches are multiples of this; None pads every batch to `max_length`."""

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
        return [LoadedSource(source, source.read("train")) for source in data_sources]

    def encoder(self, loaded: LoadedSource) -> Encoder:
        """Returns what turns the records of one source into documents."""
        raise NotImplementedError(f"{type(self).__name__} must define encoder(loaded)")

    def plan_packing(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> PackingPlan:
        """Packs the documents numbered in `chosen` into sequences; here each into its own."""
        return pack(documents.lengths, self.max_length, "none", chosen)

    def lengths(self, sequence_lengths: np.ndarray, shape: BatchShape) -> tuple[int, ...]:
        """Returns the possible T of a batch, rising; the step compiles once for each."""
        if self.length_multiple is None:
            return (self.max_length,)
        return choose_lengths(
            sequence_lengths,
            step_sequences=1 if self.config.batch_tokens else shape.step_sequences,
            multiple=lcm(self.length_multiple, shape.length_multiple),
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
        counts = tuple(SourceCounts(one.source.label) for one in dataset)
        tolerance = Tolerance(self.config.max_rows_with_errors)
        parent = cache_folder() / "data"
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # So named, the cache deletes what a killed process leaves.
        with tempfile.TemporaryDirectory(dir=parent, prefix=".new-") as folder:
            with DocumentWriter(Path(folder)) as writer:
                for number, (one, count) in enumerate(zip(dataset, counts, strict=True)):
                    workers = choose_num_workers(len(one.records), self.config.num_proc)
                    tokenise(
                        one.records, self.encoder(one), writer, count,
                        source=number, tolerance=tolerance, workers=workers,
                    )  # fmt: skip
            documents = Documents.open(Path(folder))  # readable after the files are deleted
        for number, count in enumerate(counts):
            of_source = documents.index["source"] == number
            count.lengths = compute_percentiles(documents.sequence_lengths[of_source])
        if not len(documents.index):
            raise DataError(f"no record is left: {describe_drops(counts)}")
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
            SourceCounts(**{**count, "label": one.source.label})
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
        documents, packing, shape, lengths, is_train, draws = dataset
        seed = self.config.seed if is_train else None
        together = self.config.SEQUENCES_PER_SAMPLE
        plan = partial(BatchPlan, documents, packing, shape, lengths, seed)
        if self.config.batch_tokens:
            plan = partial(TokenBatchPlan, *plan.args, batch_tokens=self.config.batch_tokens)
        return plan(together=together, draws=draws)

    def evaluation(
        self, sources: Sequence[DataSource], shape: BatchShape, *, lengths: tuple[int, ...]
    ) -> BatchPlan:
        """Plans the batches of an evaluation set that is not in the recipe, with T of `lengths`, or
        longer where a sequence needs it."""
        packed, _ = self._pack_eval(sources, shape)
        longest = self.lengths(packed.packing.sequence_lengths, shape)[-1]
        lengths += (longest,) if longest > lengths[-1] else ()
        return self.create_dataloader(packed._replace(lengths=lengths))

    def prepare(
        self,
        sources: Sequence[DataSource],
        eval_sources: Mapping[str, Sequence[DataSource]],
        shape: BatchShape,
    ) -> TrainingData:
        """Turns records into batches; DataError when nothing is left to train on."""
        if self.config.streaming:
            return self._prepare_stream(sources, eval_sources, shape)
        loaded = self._load(sources)
        documents, ledger = self.load_or_process(loaded)
        chosen, held_out = self.split_data(documents)
        weights = [source.config.weight for source in sources]
        mixture = mix_sources(chosen, documents.index["source"], weights)
        sets = [("train", self._pack_mixture(documents, mixture, shape))]
        if len(held_out):
            sets.append(("eval", self._pack(documents, held_out, shape)))
        for name, named in eval_sources.items():
            packed, counted = self._pack_eval(named, shape)
            sets.append((name, packed))
            ledger = ledger.merge(counted)
        packed_lengths = [packed.packing.sequence_lengths for _, packed in sets]
        lengths = self.lengths(np.concatenate(packed_lengths), shape)
        plans = [(n, self.create_dataloader(one._replace(lengths=lengths))) for n, one in sets]
        for name, plan in plans:
            self._check_extras(name, plan)
        counts = tuple(plan.count(name) for name, plan in plans)
        can_pack = "pack_samples" in type(self.config).model_fields
        warnings = (
            *(text for one in loaded for text in one.warnings()),
            *(text for source in ledger.sources for text in source.warnings()),
            *(text for one in counts if can_pack for text in one.warnings()),
            *documents.warnings(self.tokenizer.bos_token_id),
        )
        counted = _describe_mixture(loaded, documents, mixture) if any(weights) else ()
        notes = (*counted, *self.remarks(), *ledger.notes)
        return TrainingData(
            train=plans[0][1],
            evals=dict(plans[1:]),
            ledger=Ledger(ledger.sources, counts, notes, warnings),
            threads=self.config.dl_num_workers,
        )

    def _prepare_stream(
        self,
        sources: Sequence[DataSource],
        eval_sources: Mapping[str, Sequence[DataSource]],
        shape: BatchShape,
    ) -> TrainingData:
        """Reads the first block of training records, and prepares the evaluation sets."""
        config, lengths = self.config, (self.max_length,)
        if (multiple := self.length_multiple) is not None:
            count = config.max_length_buckets
            lengths = halve_lengths(multiple=multiple, max_length=self.max_length, count=count)

        def make_plan(documents: Documents, chosen: np.ndarray) -> BatchPlan:
            packing = self.plan_packing(documents, chosen, train=False)  # all of a block is kept
            return self.create_dataloader(PackedSet(documents, packing, shape, lengths, True))

        for source in sources:
            source.data_factory = self
        train = Stream(
            sources, self.encoder, make_plan, shape=shape, lengths=lengths,
            window=config.shuffle_window or DEFAULT_WINDOW, seed=config.seed,
            tolerated=config.max_rows_with_errors,
        )  # fmt: skip
        self._check_extras("train", train.first_block.plan)
        ledger, evals = Ledger(train.counts, (), tuple(train.describe())), {}
        for name, named in eval_sources.items():
            packed, counted = self._pack_eval(named, shape)
            evals[name] = self.create_dataloader(packed._replace(lengths=lengths))
            self._check_extras(name, evals[name])
            ledger = ledger.merge(counted)
        warnings = (
            *(text for source in ledger.sources for text in source.warnings()),
            *train.first_block.plan.documents.warnings(self.tokenizer.bos_token_id),
        )
        counts = tuple(plan.count(name) for name, plan in evals.items())
        notes = (*self.remarks(), *ledger.notes)
        ledger = Ledger(ledger.sources, counts, notes, warnings)
        return TrainingData(train, evals, ledger, config.dl_num_workers)

    def _load(self, sources: Sequence[DataSource]) -> list[LoadedSource]:
        for source in sources:
            source.data_factory = self
        return self.load(sources)

    def _pack_eval(
        self, sources: Sequence[DataSource], shape: BatchShape
    ) -> tuple[PackedSet, Ledger]:
        """Packs all documents of an evaluation set, in their order."""
        documents, ledger = self.load_or_process(self._load(sources))
        return self._pack(documents, np.arange(len(documents.index)), shape), ledger

    def _pack(self, documents: Documents, chosen: np.ndarray, shape: BatchShape) -> PackedSet:
        """Packs an evaluation set, whose `lengths` follow when all sets are packed."""
        packing = self.plan_packing(documents, chosen, train=False)
        return PackedSet(documents, packing, shape, (), False)

    def _pack_mixture(self, documents: Documents, mixture: Mixture, shape: BatchShape) -> PackedSet:
        """Packs the training set. What each epoch draws anew is packed source by source; a part
        that is too small for that has its one draw among the documents of every epoch."""
        whole = mixture.whole
        parts: list[PackingPlan] = []
        draws: list[Draw] = []
        for number, (own, count) in enumerate(mixture.drawn):
            try:
                packing = self.plan_packing(documents, own, train=True)
                samples = packing.num_sequences // self.config.SEQUENCES_PER_SAMPLE
            except DataError:  # it does not fill a sequence
                packing, samples = None, 0
            if packing is None or samples < 2:
                chosen = sample(len(own), count, MIXTURE, self.config.seed, number)
                whole = np.concatenate([whole, own[chosen]])
                continue
            parts.append(packing)
            draws.append(Draw(0, samples, max(1, round(count / len(own) * samples))))
        first = 0
        if len(whole) or not parts:
            parts = [self.plan_packing(documents, whole, train=True), *parts]
            first = parts[0].num_sequences // self.config.SEQUENCES_PER_SAMPLE
        firsts = accumulate((draw.count for draw in draws), initial=first)
        placed = tuple(d._replace(first=f) for d, f in zip(draws, firsts, strict=False))
        return PackedSet(documents, join_plans(parts), shape, (), True, placed)

    def _check_extras(self, name: str, plan: BatchPlan) -> None:
        """DataError where a set has other `extras` than the class declares, which is what a plan is
        compiled for."""
        found = {n: (str(a.dtype), a.shape[1:], len(a)) for n, a in plan.extras.items()}
        wanted = {n: (*spec, plan.packing.num_sequences) for n, spec in self.extras.items()}
        if found != wanted:
            raise DataError(
                f"{name}: the batches of {type(self).__qualname__} must have extras (dtype, shape, "
                f"sequences) {wanted}, found {found}"
            )


def _describe_mixture(
    loaded: Sequence[LoadedSource], documents: Documents, mixture: Mixture
) -> Iterator[str]:
    """Yields how many documents of each source an epoch has."""
    known = np.bincount(documents.index["source"], minlength=len(loaded))
    counts = np.bincount(documents.index["source"][mixture.whole], minlength=len(loaded))
    for own, count in mixture.drawn:
        counts[documents.index["source"][own[0]]] += count
    for (source, _), count, total in zip(loaded, counts.tolist(), known.tolist(), strict=True):
        share, label = f"{count / max(counts.sum(), 1):.1%}", source.label
        yield f"mixture: an epoch has {count:,} documents of {label} ({share}), from {total:,}"


def _hash_text(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
