"""Preferences: replies to a prompt that were compared in pairs, or judged one by one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtrain.data.conversation import (
    Conversation,
    Message,
    system_turns,
    to_conversation,
    tools_of,
    turns_of,
)
from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import (
    ConversationEncoder,
    Dropped,
    Encoded,
    Fault,
    Outcome,
    Overlong,
    beyond_limit,
)
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.packing import RowPlan
from jaxtrain.data.rows import missing_column
from jaxtrain.data.source import LoadedSource
from jaxtrain.data.spans import shared_start
from jaxtrain.data.tokenise import Encoder
from jaxtrain.recipe.errors import DataError, RecipeError, show
from jaxtrain.recipe.objectives import JudgedDataConfig, PreferenceDataConfig

EQUAL = "chosen and rejected are equal"
EMPTY = "a reply is empty"


class Preference(NamedTuple):
    """One prompt with its replies: chosen and rejected, or the one that was judged."""

    prompt: list[Message]
    replies: tuple[list[Message], ...]
    tools: list[Any] | None
    scores: tuple[float, float]
    """Reference scores of chosen and rejected, or 1 or 0 for a judgement first."""

    @property
    def conversations(self) -> list[Conversation]:
        start = len(self.prompt)
        return [Conversation([*self.prompt, *reply], self.tools, start) for reply in self.replies]


def read_pair(row: Mapping[str, Any]) -> Preference:
    """Of `chosen` and `rejected`, with `prompt` or with what both begin with; DataError names the
    field at fault."""
    for column in ("chosen", "rejected"):
        if column not in row:
            other = "; judged rows need data.type: kto" if "label" in row else ""
            raise DataError(f"{missing_column(column, row)}{other}")
    prompt, given = _prompt(row), (row["chosen"], row["rejected"])
    if not prompt and all(isinstance(reply, str) for reply in given):
        text = _shared_text(*given)
        prompt, given = [{"role": "user", "content": text}], [r[len(text) :] for r in given]
    replies = [
        turns_of({name: reply}, name)
        for name, reply in zip(("chosen", "rejected"), given, strict=True)
    ]
    if not prompt or all(reply and reply[0]["role"] != "assistant" for reply in replies):
        prompt, replies = _without_shared_turns(prompt, *replies)
    for name, reply in zip(("chosen", "rejected"), replies, strict=True):
        if reply and reply[0]["role"] != "assistant":
            role = show(reply[0]["role"])
            raise DataError(f"{name}: must go on with a reply of the assistant, found role {role}")
    scores = _score(row, "reference_score_chosen"), _score(row, "reference_score_rejected")
    whole = [*system_turns(row), *prompt] if prompt[0]["role"] != "system" else prompt
    return Preference(whole, (replies[0], replies[1]), tools_of(row), scores)


def read_judged(row: Mapping[str, Any]) -> Preference:
    """Of `label` beside `prompt` and `completion`, or beside `messages`, whose last turns are what
    was judged; DataError names the field at fault."""
    if "label" not in row:
        other = "; pairs need data.type: dpo" if "chosen" in row else ""
        raise DataError(f"{missing_column('label', row)}{other}")
    if not isinstance(row["label"], bool):
        raise DataError(f"label: must be true or false, found {show(row['label'])}")
    messages, tools, start = to_conversation(row)
    if not start:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise DataError("messages: no turn of the user, so it is open what was judged")
        start = users[-1] + 1
    return Preference(messages[:start], (messages[start:],), tools, (float(row["label"]), np.nan))


def _prompt(row: Mapping[str, Any]) -> list[Message]:
    for column in ("prompt", "conversations"):
        if row.get(column):
            return turns_of(row, column, "user")
    return []


def _shared_text(chosen: str, rejected: str) -> str:
    """Up to the end of a word."""
    shared = chosen[: shared_start(chosen, rejected)]
    if shared != chosen and shared != rejected:
        shared = shared[: len(shared) - len(shared.split(" ")[-1])]
    if not shared.strip():
        raise DataError("no prompt, and chosen and rejected begin differently")
    return shared


def _without_shared_turns(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """What both replies begin with is the prompt; one that is given beside them is part of it."""
    shared = chosen[: shared_start(chosen, rejected)]
    if not shared:
        raise DataError("chosen and rejected begin differently, and there is no prompt before them")
    if not all(turn in shared for turn in prompt):
        raise DataError("prompt: is not what chosen and rejected, which have a prompt, begin with")
    return shared, [chosen[len(shared) :], rejected[len(shared) :]]


def _score(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{column}: must be a number, found {show(value)}")
    return float(value)


class PreferenceEncoder:
    """A preference to one document: the sequences of its replies, each behind the whole prompt."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        is_paired: bool,
        max_length: int,
        max_prompt_length: int,
        prompt_truncation: Literal["keep_start", "keep_end"],
        overlong: Overlong,
    ):
        self._sequences = ConversationEncoder(tokenizer, max_length=2**31, overlong="error")
        self._bos = tokenizer.bos_token_id
        self._names = ("chosen: ", "rejected: ") if is_paired else ("",)
        self._max_length = max_length
        self._max_prompt_length = max_prompt_length
        self._prompt_truncation = prompt_truncation
        self._overlong: Overlong = overlong

    def read(self, row: Mapping[str, Any]) -> Preference:
        return read_judged(row) if len(self._names) == 1 else read_pair(row)

    def encode(self, items: Sequence[Preference]) -> list[Outcome]:
        """One outcome a preference, in order; no outcome depends on the others."""
        sound = [c for item in items if not _unfit(item) for c in item.conversations]
        encoded = iter(self._sequences.encode(sound))
        return [
            _unfit(item) or self._joined([next(encoded) for _ in item.replies], item.scores)
            for item in items
        ]

    def _joined(self, outcomes: list[Outcome], scores: tuple[float, float]) -> Outcome:
        sequences: list[Encoded] = []
        for name, outcome in zip(self._names, outcomes, strict=True):
            if isinstance(outcome, Fault):
                return Fault(f"{name}{outcome.what}")
            if isinstance(outcome, Dropped):
                return outcome
            sequences.append(outcome)
        longest = max(len(sequence.tokens) for sequence in sequences)
        if refused := beyond_limit(longest, self._max_length, self._overlong):
            return refused
        is_cut = longest > self._max_length
        if is_cut:
            sequences = [self._cut(sequence) for sequence in sequences]
        first, last = sequences[0], sequences[-1]
        if len(sequences) == 2 and np.array_equal(first.tokens, last.tokens):
            return Dropped(EQUAL, longest)
        return Encoded(
            np.concatenate([sequence.tokens for sequence in sequences]),
            np.concatenate([sequence.weights for sequence in sequences]),
            turns=sum(sequence.turns for sequence in sequences),
            ended=sum(sequence.ended for sequence in sequences),
            truncated=is_cut,
            border=len(first.tokens) if len(sequences) == 2 else None,
            scores=scores,
        )

    def _cut(self, sequence: Encoded) -> Encoded:
        """The prompt first, by its own limit; the reply may use all room that it leaves."""
        tokens, weights = sequence.tokens, sequence.weights
        prompt = int(np.argmax(weights))  # at least 1: the first token is never trained
        kept = min(prompt, self._max_prompt_length)
        stop = min(len(tokens), prompt + self._max_length - kept)
        head = np.arange(kept)
        if self._prompt_truncation == "keep_end":
            head += prompt - kept
            if tokens[0] == self._bos:
                head[0] = 0
        places = np.concatenate([head, np.arange(prompt, stop)])
        turns = int(np.count_nonzero(np.diff(weights[places].astype(np.int8)) == 1))
        is_mid_turn = stop < len(tokens) and bool(weights[stop - 1] and weights[stop])
        ended = min(sequence.ended, turns - is_mid_turn)
        return Encoded(tokens[places], weights[places], turns, ended, True)


def _unfit(item: Preference) -> Dropped | None:
    if len(item.replies) == 2 and item.replies[0] == item.replies[1]:
        return Dropped(EQUAL, 0)
    if not all(map(_says_something, item.replies)):
        return Dropped(EMPTY, 0)
    return None


def _says_something(reply: list[Message]) -> bool:
    spoken = (turn for turn in reply if turn["role"] == "assistant")
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in spoken)


class KTODataFactory(DataFactory):
    """A row of a batch is one judged sequence; the index of the documents has its label."""

    name = "kto"
    config: JudgedDataConfig

    @property
    def row_multiple(self) -> int:
        return 256

    @property
    def max_prompt_length(self) -> int:
        """RecipeError for a limit that leaves no room for a reply; the default gives way."""
        most = self.config.max_prompt_length
        if most < self.max_length:
            return most
        if self.config.limits_prompt:
            raise RecipeError(
                f"data.max_prompt_length: {most} leaves no room for a reply in the "
                f"{self.max_length} tokens of a row; use at most {self.max_length - 1}"
            )
        return max(1, self.max_length // 2)

    def remarks(self) -> list[str]:
        used, written = self.max_prompt_length, self.config.max_prompt_length
        if used == written:
            return super().remarks()
        lowered = (
            f"max_prompt_length is {used}, half of max_length, since {written} is not below it"
        )
        return [*super().remarks(), lowered]

    def encoder(self, loaded: LoadedSource) -> Encoder:
        return PreferenceEncoder(
            self.tokenizer,
            is_paired=self.config.ROWS_PER_SAMPLE == 2,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            prompt_truncation=self.config.dpo_prompt_truncation_mode,
            overlong=self.config.overlong,
        )

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        return {**super().key_parts(loaded), "max_length": str(self.max_length)}


class DPODataFactory(KTODataFactory):
    """Rows 2i and 2i + 1 of a batch are the chosen and the rejected sequence of one pair."""

    name = "dpo"
    config: PreferenceDataConfig

    def plan_rows(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> RowPlan:
        borders, ends = documents.index["border"][chosen], documents.lengths[chosen]
        starts = np.column_stack([np.zeros_like(borders), borders]).ravel()
        lengths = np.column_stack([borders, ends - borders]).ravel()
        return RowPlan(np.repeat(chosen, 2), starts, lengths, np.arange(len(starts) + 1))
