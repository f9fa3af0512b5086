"""Preferences: replies to a prompt, compared in pairs or judged one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxtrain.data.conversation import (
    Conversation,
    Message,
    read_conversation,
    read_kwargs,
    read_system,
    read_tools,
    read_turns,
)
from jaxtrain.data.documents import Documents
from jaxtrain.data.encode import (
    EMPTY_REPLY,
    ConversationEncoder,
    Dropped,
    Encoded,
    Encoder,
    Fault,
    Outcome,
    Overlong,
    check_length,
)
from jaxtrain.data.factory import DataFactory
from jaxtrain.data.packing import PackingPlan
from jaxtrain.data.records import get_column
from jaxtrain.data.source import LoadedSource
from jaxtrain.data.spans import count_shared
from jaxtrain.recipe.errors import DataError, RecipeError, show
from jaxtrain.recipe.objectives import JudgedDataConfig, PreferenceDataConfig

EQUAL = "chosen and rejected are equal"
SIDES = ("chosen", "rejected")


class Preference(NamedTuple):
    """A prompt with its chosen and rejected reply, or with the one reply that was judged."""

    prompt: list[Message]
    replies: tuple[list[Message], ...]
    tools: list[Any] | None
    scores: tuple[float, float]
    """Reference scores of chosen and rejected; the first is 1 or 0 for a judged reply."""
    template_kwargs: dict[str, Any] | None = None

    @property
    def conversations(self) -> list[Conversation]:
        start, kwargs = len(self.prompt), self.template_kwargs
        return [
            Conversation([*self.prompt, *reply], self.tools, start, kwargs)
            for reply in self.replies
        ]


def read_pair(record: Mapping[str, Any]) -> Preference:
    """Reads `chosen` and `rejected`, after `prompt` or what both begin with; DataError names the
    field at fault."""
    hint = "; judged records need data.type: kto" if "label" in record else ""
    given = [get_column(record, side, hint) for side in SIDES]
    prompt = _read_prompt(record)
    if not prompt and all(isinstance(reply, str) for reply in given):
        text = _find_shared_text(*given)
        prompt, given = [{"role": "user", "content": text}], [r[len(text) :] for r in given]
    replies = [read_turns({side: reply}, side) for side, reply in zip(SIDES, given, strict=True)]
    if not prompt or all(reply and reply[0]["role"] != "assistant" for reply in replies):
        prompt, replies = _split_shared_turns(prompt, *replies)
    for side, reply in zip(SIDES, replies, strict=True):
        if reply and reply[0]["role"] != "assistant":
            role = show(reply[0]["role"])
            raise DataError(f"{side}: must continue with the assistant's reply, found role {role}")
    scores = [_read_score(record, f"reference_score_{side}") for side in SIDES]
    whole = [*read_system(record), *prompt] if prompt[0]["role"] != "system" else prompt
    tools, kwargs = read_tools(record), read_kwargs(record)
    return Preference(whole, tuple(replies), tools, (scores[0], scores[1]), kwargs)


def read_judged(record: Mapping[str, Any]) -> Preference:
    """Reads `label` beside `prompt` and `completion`, or beside `messages`, whose last turns were
    judged; DataError names the field at fault."""
    hint = "; pairs need data.type: dpo" if "chosen" in record else ""
    label = get_column(record, "label", hint)
    if not isinstance(label, bool):
        raise DataError(f"label: must be true or false, found {show(label)}")
    messages, tools, start, kwargs = read_conversation(record)
    if not start:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise DataError("messages: must have a user turn before the judged reply, found none")
        start = users[-1] + 1
    scores = (float(label), np.nan)
    return Preference(messages[:start], (messages[start:],), tools, scores, kwargs)


def _read_prompt(record: Mapping[str, Any]) -> list[Message]:
    for column in ("prompt", "conversations"):
        if record.get(column):
            return read_turns(record, column, "user")
    return []


def _find_shared_text(chosen: str, rejected: str) -> str:
    """Returns what both replies begin with, up to the end of a word."""
    shared = chosen[: count_shared(chosen, rejected)]
    if shared != chosen and shared != rejected:
        shared = shared[: len(shared) - len(shared.split(" ")[-1])]
    if not shared.strip():
        raise DataError("no prompt, and chosen and rejected begin differently")
    return shared


def _split_shared_turns(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """Returns what both replies begin with, which must contain the given prompt, and their rest."""
    shared = chosen[: count_shared(chosen, rejected)]
    if not shared:
        raise DataError("chosen and rejected begin differently, and there is no prompt before them")
    if not all(turn in shared for turn in prompt):
        raise DataError("prompt: must be part of what chosen and rejected begin with")
    return shared, [chosen[len(shared) :], rejected[len(shared) :]]


def _read_score(record: Mapping[str, Any], column: str) -> float:
    value = record.get(column)
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{column}: must be a number, found {show(value)}")
    return float(value)


@dataclass
class PreferenceEncoder:
    """Encodes a preference as one document: a sequence per reply, each after the whole prompt."""

    tokenizer: Any
    _: KW_ONLY
    is_paired: bool
    max_length: int
    max_prompt_length: int
    prompt_truncation: Literal["keep_start", "keep_end"]
    overlong: Overlong
    split_special_tokens: bool = False

    def __post_init__(self):
        self._sequences = ConversationEncoder(
            self.tokenizer,
            max_length=2**31,
            overlong="error",
            split_special_tokens=self.split_special_tokens,
        )

    def read(self, record: Mapping[str, Any]) -> Preference:
        return read_pair(record) if self.is_paired else read_judged(record)

    def encode(self, items: Sequence[Preference]) -> list[Outcome]:
        """Returns one outcome per preference, in order and independent of the others."""
        sound = [c for item in items if not _check_replies(item) for c in item.conversations]
        encoded = iter(self._sequences.encode(sound))
        return [
            _check_replies(item) or self._join([next(encoded) for _ in item.replies], item.scores)
            for item in items
        ]

    def _join(self, outcomes: list[Outcome], scores: tuple[float, float]) -> Outcome:
        sequences: list[Encoded] = []
        for side, outcome in zip(SIDES, outcomes, strict=False):
            if isinstance(outcome, Fault):
                return Fault(f"{side}: {outcome.message}") if self.is_paired else outcome
            if isinstance(outcome, Dropped):
                return outcome
            sequences.append(outcome)
        longest = max(len(sequence.tokens) for sequence in sequences)
        if refused := check_length(longest, self.max_length, self.overlong):
            return refused
        is_cut = longest > self.max_length
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
            rejected_start=len(first.tokens) if len(sequences) == 2 else None,
            scores=scores,
            notes=tuple(dict.fromkeys(note for sequence in sequences for note in sequence.notes)),
            unread=tuple(dict.fromkeys(key for sequence in sequences for key in sequence.unread)),
        )

    def _cut(self, sequence: Encoded) -> Encoded:
        """Cuts the prompt to its own limit, and the reply to the room that the prompt leaves."""
        tokens, weights = sequence.tokens, sequence.weights
        prompt = int(np.argmax(weights))  # at least 1: the first token is never trained
        kept = min(prompt, self.max_prompt_length)
        stop = min(len(tokens), prompt + self.max_length - kept)
        head = np.arange(kept)
        if self.prompt_truncation == "keep_end":
            head += prompt - kept
            if tokens[0] == self.tokenizer.bos_token_id:
                head[0] = 0
        places = np.concatenate([head, np.arange(prompt, stop)])
        turns = int(np.count_nonzero(np.diff(weights[places].astype(np.int8)) == 1))
        is_mid_turn = stop < len(tokens) and bool(weights[stop - 1] and weights[stop])
        ended = min(sequence.ended, turns - is_mid_turn)
        changed = {"tokens": tokens[places], "weights": weights[places], "turns": turns}
        return sequence._replace(**changed, ended=ended, truncated=True)


def _check_replies(item: Preference) -> Dropped | None:
    if len(item.replies) == 2 and item.replies[0] == item.replies[1]:
        return Dropped(EQUAL, 0)
    if not all(map(_has_words, item.replies)):
        return Dropped(EMPTY_REPLY, 0)
    return None


def _has_words(reply: list[Message]) -> bool:
    spoken = (turn for turn in reply if turn["role"] == "assistant")
    return any(turn["content"].strip() or turn.get("tool_calls") for turn in spoken)


class KTODataFactory(DataFactory):
    """A sequence of a batch is one judged reply; the documents' index has its label."""

    name = "kto"
    config: JudgedDataConfig
    length_multiple = 256

    @property
    def max_prompt_length(self) -> int:
        """Limit of a prompt in tokens; RecipeError if the recipe's leaves no room for a reply."""
        written = self.config.max_prompt_length
        if written < self.max_length:
            return written
        if self.config.limits_prompt:
            raise RecipeError(
                f"data.max_prompt_length: {written} leaves no room for a reply in "
                f"max_length {self.max_length}; use at most {self.max_length - 1}"
            )
        return max(1, self.max_length // 2)

    def remarks(self) -> list[str]:
        used, written = self.max_prompt_length, self.config.max_prompt_length
        if used == written:
            return super().remarks()
        lowered = (
            f"max_prompt_length is {used}, half of max_length, which {written} does not fit in"
        )
        return [*super().remarks(), lowered]

    def encoder(self, loaded: LoadedSource) -> Encoder:
        return PreferenceEncoder(
            self.tokenizer,
            is_paired=self.config.SEQUENCES_PER_SAMPLE == 2,
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            prompt_truncation=self.config.dpo_prompt_truncation_mode,
            overlong=self.config.overlong,
            split_special_tokens=self.config.split_special_tokens,
        )

    def key_parts(self, loaded: Sequence[LoadedSource]) -> dict[str, str]:
        return {**super().key_parts(loaded), "max_length": str(self.max_length)}


class DPODataFactory(KTODataFactory):
    """Sequences 2i and 2i + 1 of a batch are the chosen and the rejected one of a pair."""

    name = "dpo"
    config: PreferenceDataConfig

    def plan_packing(self, documents: Documents, chosen: np.ndarray, *, train: bool) -> PackingPlan:
        middles, ends = documents.index["rejected_start"][chosen], documents.lengths[chosen]
        starts = np.column_stack([np.zeros_like(middles), middles]).ravel()
        lengths = np.column_stack([middles, ends - middles]).ravel()
        return PackingPlan(np.repeat(chosen, 2), starts, lengths, np.arange(len(starts) + 1))
