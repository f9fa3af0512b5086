"""Data sets of the hub, read through `datasets`, and folders that `datasets` saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jaxtrain.data.files import HASH_RECORDS, ArrowRecords, hash_table, open_files
from jaxtrain.data.records import (
    MappedRecords,
    NamedRecords,
    Records,
    drop_nulls,
    first_line,
    get_text,
    take_split,
)
from jaxtrain.data.source import ConversationSource, find_data_files
from jaxtrain.recipe.data import HFCausalDataSourceConfig, HFDataSourceConfig
from jaxtrain.recipe.errors import DataError, RecipeError, show

Record = dict[str, Any]

ACE_MATH = "nvidia/AceMath-Instruct-Training-Data"
SPLITS = {
    "HuggingFaceH4/ultrachat_200k": {"train": "train_sft", "test": "test_sft", "eval": "test_sft"},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "train": "train_prefs", "test": "test_prefs", "eval": "test_prefs",
    },
    ACE_MATH: {"train": "general_sft_stage2"},
}  # fmt: skip
"""Data sets whose splits have names of their own: our name → theirs."""
ARGUMENTS = {ACE_MATH: {"verification_mode": "no_checks"}}


def _map_roles(array: str) -> dict[str, str]:
    return {role: f"{array}.role.{role}" for role in ("system", "user", "assistant")}


ROLES = {
    ACE_MATH: _map_roles("messages"),
    "HuggingFaceH4/ultrachat_200k": _map_roles("messages"),
    "Open-Orca/OpenOrca": {
        "system": "system_prompt", "user": "question", "assistant": "response",
    },
    "THUDM/LongAlign-10k": _map_roles("messages"),
    "Yukang/LongAlpaca-12k": {"user": "instruction", "assistant": "output"},
    "Open-Orca/SlimOrca": {
        "system": "conversations.from.system", "user": "conversations.from.human",
        "assistant": "conversations.from.gpt",
    },
    "meta-math/MetaMathQA": {"user": "query", "assistant": "response"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"user": "problem", "assistant": "solution"},
    "lmsys/lmsys-chat-1m": _map_roles("conversation"),
}  # fmt: skip
"""Role mappings of well-known data sets; a mapping in the recipe overrides them."""
PART_RECORDS = 1000
"""Records of a data set of the hub that a stream holds."""
SAVED_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


class DatasetRecords(ArrowRecords):
    """Records of a `datasets.Dataset`, whose features may decode what a table holds."""

    def _read_block(self, start: int, stop: int) -> list[Record]:
        columns = self._records.with_format(None)[start:stop]
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def update_digest(self, digest: Any) -> None:
        digest.update(repr(self._records.features).encode())
        for block in self._records.with_format("arrow").iter(HASH_RECORDS):
            hash_table(digest, block.combine_chunks())


class HuggingFaceSource(ConversationSource):
    """Records as the data set has them."""

    name = "huggingface"
    config: HFDataSourceConfig

    @property
    def label(self) -> str:
        return self.config.name or self.config.name_or_path

    def load(self, config: HFDataSourceConfig, split: str) -> Records:
        split = self._rename_split(config, split)
        path = Path(config.name_or_path)
        is_saved = any((path / name).is_file() for name in SAVED_FILES)
        if path.exists() and not is_saved:
            name = split.partition("[")[0]
            files = find_data_files([str(path)], name)
            return take_split({name: open_files(files)}, split, self.label)
        splits = _load_saved(path) if is_saved else self._download(config)
        named = {
            str(name): DatasetRecords(records, f"{self.label}:{name}")
            for name, records in splits.items()
        }
        return take_split(named, split, self.label)

    def _rename_split(self, config: HFDataSourceConfig, split: str) -> str:
        name, bracket, rest = split.partition("[")
        mapping = SPLITS.get(config.name_or_path, {}) | config.split_mapping
        return mapping.get(name, name) + bracket + rest

    def parts(self, default_split: str, since: Any = None) -> Iterator[tuple[Any, Records]]:
        """What is on the hub is not copied: each part is the next records."""
        config, has_own_load = self.config, self.has_own_load(HuggingFaceSource.load)
        if has_own_load or Path(config.name_or_path).exists():
            yield from super().parts(default_split, since)
            return
        split = self._rename_split(config, config.split or default_split)
        splits = self._download(config, streaming=True)
        if split not in splits:
            take_split(dict.fromkeys(splits, NamedRecords((), "")), split, self.label)  # says so
        stream, first = splits[split], 0
        if since:
            first = since["first"]
            stream.load_state_dict(since["state"])
        records = iter(stream)
        while True:
            with self._report_errors():
                part = [drop_nulls(record) for record in islice(records, PART_RECORDS)]
            if not part:
                return
            label = f"{self.label}:{split} after record {first}"
            yield since, self.adapt(NamedRecords(part, label))
            first += len(part)
            since = {"first": first, "state": stream.state_dict()}

    def _download(self, config: HFDataSourceConfig, *, streaming: bool = False) -> Any:
        import datasets  # a second of imports, which local files do without

        arguments: dict[str, Any] = {**ARGUMENTS.get(config.name_or_path, {}), **config.kwargs}
        with self._report_errors():
            return datasets.load_dataset(config.name_or_path, streaming=streaming, **arguments)

    @contextmanager
    def _report_errors(self) -> Iterator[None]:
        """Reports what `datasets` and the network raise."""
        from datasets.config import HF_DATASETS_CACHE
        from datasets.exceptions import DatasetsError

        config = self.config
        try:
            yield
        except (OSError, ValueError) as fault:  # not found, offline, no such config
            raise RecipeError(
                f"data set {show(config.name_or_path)} is not a local file, and cannot be "
                f"read from {HF_DATASETS_CACHE} or the hub: {first_line(fault)}"
            ) from None
        except DatasetsError as fault:
            first = first_line(fault.__cause__ or fault)
            raise DataError(f"data set {show(config.name_or_path)}: {first}") from None


class HuggingFaceInstructSource(HuggingFaceSource):
    """Records as conversations; the columns of well-known data sets are mapped unasked."""

    name = "huggingface_instruct"

    def role_mapping(self) -> dict[str, str]:
        return self.config.role_mapping or ROLES.get(self.config.name_or_path, {})

    def adapt(self, records: Records) -> Records:
        records = super().adapt(records)
        if self.config.name_or_path == ACE_MATH and not self.config.role_mapping:
            return MappedRecords(records, _append_answer)
        return records


class HuggingFaceCausalSource(HuggingFaceSource):
    """Records of plain text."""

    name = "huggingface_causal"
    config: HFCausalDataSourceConfig


def _append_answer(record: Record) -> Record:
    """Appends the last reply, which AceMath keeps beside the conversation."""
    answer = {"role": "assistant", "content": get_text(record, "answer")}
    return {**record, "messages": [*record["messages"], answer]}


def _load_saved(path: Path) -> Any:
    """Loads the splits of a saved folder; a data set without splits goes by both names."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as fault:
        raise DataError(f"{path}: datasets cannot read this folder: {first_line(fault)}") from None
    if isinstance(saved, datasets.DatasetDict):
        return saved
    return {"train": saved, "eval": saved}
