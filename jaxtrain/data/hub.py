"""Data sets of the hub, read through `datasets`, and folders that it saved."""

from pathlib import Path
from typing import Any

from jaxtrain.data.files import HASHED_ROWS, ArrowRows, add_table, open_files
from jaxtrain.data.paths import data_files
from jaxtrain.data.rows import MappedRows, Rows, first_line, take_split
from jaxtrain.data.source import ConversationSource, Limits
from jaxtrain.recipe.data import HFCausalDataSourceConfig, HFDataSourceConfig
from jaxtrain.recipe.errors import DataError, RecipeError, show

Row = dict[str, Any]

ACE_MATH = "nvidia/AceMath-Instruct-Training-Data"
SPLITS = {
    "HuggingFaceH4/ultrachat_200k": {"train": "train_sft", "test": "test_sft", "eval": "test_sft"},
    "HuggingFaceH4/ultrafeedback_binarized": {
        "train": "train_prefs", "test": "test_prefs", "eval": "test_prefs",
    },
    ACE_MATH: {"train": "general_sft_stage2"},
}  # fmt: skip
"""Data sets whose splits have names of their own."""
ARGUMENTS = {ACE_MATH: {"verification_mode": "no_checks"}}


def _by_role(array: str) -> dict[str, str]:
    return {role: f"{array}.role.{role}" for role in ("system", "user", "assistant")}


ROLES = {
    ACE_MATH: _by_role("messages"),
    "HuggingFaceH4/ultrachat_200k": _by_role("messages"),
    "Open-Orca/OpenOrca": {
        "system": "system_prompt", "user": "question", "assistant": "response",
    },
    "THUDM/LongAlign-10k": _by_role("messages"),
    "Yukang/LongAlpaca-12k": {"user": "instruction", "assistant": "output"},
    "Open-Orca/SlimOrca": {
        "system": "conversations.from.system", "user": "conversations.from.human",
        "assistant": "conversations.from.gpt",
    },
    "meta-math/MetaMathQA": {"user": "query", "assistant": "response"},
    "ise-uiuc/Magicoder-OSS-Instruct-75K": {"user": "problem", "assistant": "solution"},
    "lmsys/lmsys-chat-1m": _by_role("conversation"),
}  # fmt: skip
"""Data sets whose columns are known; a mapping in the recipe goes first."""
SAVED_FILES = ("state.json", "dataset_info.json", "dataset_dict.json")


class DatasetRows(ArrowRows):
    """Rows of a `datasets.Dataset`, whose features may decode what a table holds."""

    def _objects(self, start: int, stop: int) -> list[Row]:
        columns = self._table.with_format(None)[start:stop]
        return [
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        ]

    def content(self, digest: Any) -> None:
        digest.update(repr(self._table.features).encode())
        for block in self._table.with_format("arrow").iter(HASHED_ROWS):
            add_table(digest, block.combine_chunks())


class HuggingFaceSource(ConversationSource):
    """Rows as the data set has them."""

    name = "huggingface"
    config: HFDataSourceConfig

    @property
    def label(self) -> str:
        return self.config.name or self.config.name_or_path

    def load(self, config: HFDataSourceConfig, split: str) -> Rows:
        split = self._own_split(config, split)
        path = Path(config.name_or_path)
        is_saved = any((path / name).is_file() for name in SAVED_FILES)
        if path.exists() and not is_saved:
            return self.only_split(open_files(data_files(str(path))), split)
        splits = _saved(path) if is_saved else self._downloaded(config)
        named = {
            str(name): DatasetRows(rows, f"{self.label}:{name}") for name, rows in splits.items()
        }
        return take_split(named, split, self.label)

    def _own_split(self, config: HFDataSourceConfig, split: str) -> str:
        name, bracket, rest = split.partition("[")
        mapping = SPLITS.get(config.name_or_path, {}) | config.split_mapping
        return mapping.get(name, name) + bracket + rest

    def _downloaded(self, config: HFDataSourceConfig) -> Any:
        import datasets  # a second of imports, which local files do without
        from datasets.config import HF_DATASETS_CACHE
        from datasets.exceptions import DatasetsError

        arguments: dict[str, Any] = {**ARGUMENTS.get(config.name_or_path, {}), **config.kwargs}
        try:
            return datasets.load_dataset(config.name_or_path, **arguments)
        except (OSError, ValueError) as fault:  # not found, offline, no such config
            raise RecipeError(
                f"data set {show(config.name_or_path)} is no local file, and could not be "
                f"read from {HF_DATASETS_CACHE} or the hub: {first_line(fault)}"
            ) from None
        except DatasetsError as fault:
            first = first_line(fault.__cause__ or fault)
            raise DataError(f"data set {show(config.name_or_path)}: {first}") from None


class HuggingFaceInstructSource(HuggingFaceSource):
    """Rows as conversations: the columns of well-known data sets are mapped without a word."""

    name = "huggingface_instruct"

    def role_mapping(self) -> dict[str, str]:
        return self.config.role_mapping or ROLES.get(self.config.name_or_path, {})

    def read(self, default_split: str, limits: Limits | None = None) -> Rows:
        rows = super().read(default_split, limits)
        if self.config.name_or_path == ACE_MATH and not self.config.role_mapping:
            return MappedRows(rows, _with_answer)
        return rows


class HuggingFaceCausalSource(HuggingFaceSource):
    """Rows of plain text."""

    name = "huggingface_causal"
    config: HFCausalDataSourceConfig


def _with_answer(row: Row) -> Row:
    """AceMath keeps the last reply beside the conversation."""
    if not isinstance(answer := row.get("answer"), str):
        raise DataError(f"answer: must be text, found {show(answer)}")
    return {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer}]}


def _saved(path: Path) -> Any:
    """The splits of a folder; one without splits has its rows under both names."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as fault:
        told = f"{path}: not a folder that datasets can read: {first_line(fault)}"
        raise DataError(told) from None
    if isinstance(saved, datasets.DatasetDict):
        return saved
    return {"train": saved, "eval": saved}
