"""Plans which documents share a packed sequence, once over the whole set, so that the number of
sequences, and with it the length of an epoch, is known before the first step."""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

MAX_CANDIDATES = 256
MIN_PADDED_LENGTH = 128  # shorter sequences leave lanes of the devices' matrix units empty


class PackingPlan(NamedTuple):
    """Packed sequence s is the pieces `offsets[s]:offsets[s + 1]`, each a part of one document."""

    documents: np.ndarray
    """int64 [pieces]"""
    starts: np.ndarray
    """int64 [pieces]: first token of the piece within its document"""
    lengths: np.ndarray
    """int64 [pieces]"""
    offsets: np.ndarray
    """int64 [sequences + 1]"""

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int64 [sequences]: tokens without padding."""
        return (
            np.add.reduceat(self.lengths, self.offsets[:-1]) if len(self.lengths) else self.lengths
        )

    def drop(self, sequence: int) -> "PackingPlan":
        """Returns the plan without one sequence."""
        pieces = np.r_[self.offsets[sequence] : self.offsets[sequence + 1]]
        documents, starts, lengths = (np.delete(part, pieces) for part in self[:3])
        offsets = np.delete(self.offsets, sequence + 1)
        offsets[sequence + 1 :] -= len(pieces)
        return PackingPlan(documents, starts, lengths, offsets)


def join_plans(plans: Sequence[PackingPlan]) -> PackingPlan:
    """Returns the sequences of one plan after those of the other."""
    if len(plans) == 1:
        return plans[0]
    documents, starts, lengths = (np.concatenate([p[part] for p in plans]) for part in range(3))
    counts = np.concatenate([np.diff(plan.offsets) for plan in plans])
    return PackingPlan(documents, starts, lengths, np.concatenate([[0], np.cumsum(counts)]))


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the sequence of each document, int64 [documents]: longest documents first, each into
    the fullest sequence that has room for it."""
    sequences, count = np.zeros(len(lengths), dtype=np.int64), 0
    rooms: list[int] = []  # free tokens that some sequence has, rising
    sequences_with: dict[int, list[int]] = {}
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            sequence, room = count, capacity
            count += 1
        else:
            room = rooms[place]
            sequence = sequences_with[room].pop()
            if not sequences_with[room]:
                del rooms[place], sequences_with[room]
        sequences[document] = sequence
        left = room - length
        if left and left not in sequences_with:
            insort(rooms, left)
        if left:
            sequences_with.setdefault(left, []).append(sequence)
    return sequences


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns the sequence of each document, int64 [documents]: in order, opening a new sequence
    for a document that does not fit."""
    sequences = np.zeros(len(lengths), dtype=np.int64)
    sequence, room = 0, capacity
    for document, length in enumerate(lengths.tolist()):
        if length > room:
            sequence, room = sequence + 1, capacity
        sequences[document] = sequence
        room -= length
    return sequences


FILL_RULES: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "best_fit": best_fit,
    "next_fit": next_fit,
    "none": lambda lengths, _: np.arange(len(lengths)),
}


def cut_documents(lengths: np.ndarray, capacity: int, chosen: np.ndarray) -> PackingPlan:
    """Joins the documents numbered in `chosen` and cuts them every `capacity` tokens: each sequence
    but the last is full, and a document may continue in the next one."""
    ends = np.cumsum(lengths[chosen])
    total = int(ends[-1]) if len(ends) else 0
    sequence_starts = np.arange(0, total, capacity)
    cuts = np.union1d(sequence_starts, ends - lengths[chosen])  # where a piece begins
    owner = np.searchsorted(ends, cuts, side="right")
    starts = cuts - (ends - lengths[chosen])[owner]
    offsets = np.append(np.searchsorted(cuts, sequence_starts), len(cuts))
    return PackingPlan(chosen[owner], starts, np.diff(cuts, append=total), offsets.astype(np.int64))


def choose_lengths(
    sequence_lengths: np.ndarray, *, step_sequences: int, multiple: int, max_length: int, count: int
) -> tuple[int, ...]:
    """Returns at most `count` rising lengths to pad sequences to, the last for the longest one.

    They are the multiples, or `max_length`, that leave the least padding when a step of
    `step_sequences` random sequences takes the shortest length that holds them all."""
    longest = int(sequence_lengths.max())
    multiple *= -(-longest // (multiple * MAX_CANDIDATES))
    sequence_lengths = np.maximum(sequence_lengths, min(longest, MIN_PADDED_LENGTH))
    padded = np.minimum(-(-sequence_lengths // multiple) * multiple, max_length)
    candidates, counts = np.unique(padded, return_counts=True)
    # Share of the steps that fit each candidate; whole numbers are the same on every host.
    steps = len(padded) ** step_sequences
    held = np.array([(n**step_sequences << 30) // steps for n in np.cumsum(counts).tolist()])
    # Least padding of the steps that fit candidate j, with j as the last of n lengths.
    cost, chosen = candidates * held, [(int(length),) for length in candidates]
    is_before = np.tri(len(candidates), k=-1, dtype=bool).T
    for _ in range(count - 1):
        with_one_more = cost[:, None] + candidates * (held - held[:, None])
        with_one_more[~is_before] = np.iinfo(np.int64).max
        best, least = with_one_more.argmin(axis=0), with_one_more.min(axis=0)
        chosen = [
            (*chosen[best[j]], int(candidates[j])) if least[j] < cost[j] else chosen[j]
            for j in range(len(candidates))
        ]
        cost = np.minimum(cost, least)
    return chosen[-1]


def halve_lengths(*, multiple: int, max_length: int, count: int) -> tuple[int, ...]:
    """Returns at most `count` rising lengths to pad sequences of unknown lengths to, each about
    half of the next."""
    lengths = (max_length,)
    while len(lengths) < count:
        half = -(-lengths[0] // (2 * multiple)) * multiple
        if not MIN_PADDED_LENGTH <= half < lengths[0]:
            break
        lengths = (half, *lengths)
    return lengths


def pack(lengths: np.ndarray, capacity: int, rule: str, chosen: np.ndarray) -> PackingPlan:
    """Packs the documents numbered in `chosen` into sequences of at most `capacity` tokens;
    sequences, and the documents in each, keep the documents' order."""
    lengths = lengths[chosen]
    assert len(lengths) == 0 or 0 < lengths.min() <= lengths.max() <= capacity
    sequences = FILL_RULES[rule](lengths, capacity)
    _, first, sequences = np.unique(sequences, return_index=True, return_inverse=True)
    first_document = first[sequences]
    order = np.argsort(first_document, kind="stable")
    _, offsets = np.unique(first_document[order], return_index=True)
    offsets = np.append(offsets, len(order))
    return PackingPlan(chosen[order], np.zeros(len(order), np.int64), lengths[order], offsets)
