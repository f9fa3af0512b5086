"""`jaxtrain eval --lm-eval`: tasks of lm-evaluation-harness, answered by our log-probabilities and
replies. Importing this file needs the package lm-eval.

B sequences, T tokens.
"""

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import filter as matching
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from jaxtrain.batch import Batch
from jaxtrain.generate import FROM_FOLDER, Speaker
from jaxtrain.model.generate import GREEDY
from jaxtrain.model.scoring import score_targets
from jaxtrain.parallel.mesh import num_batch_shards
from jaxtrain.recipe.errors import RecipeError, UserError, did_you_mean, show

MAX_NEW_TOKENS = 256  # of a reply where its task does not say
NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which it may; the first counts."""
IGNORED = {"num_beams": 1}
"""Settings of replies that tasks write though they ask for nothing."""
RESAMPLED = 1000  # times, to estimate the error of what is no mean
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class Tasks(NamedTuple):
    """What to evaluate."""

    names: Sequence[str]
    """of tasks, groups and tags; `*` stands for any text"""
    include_path: Path | None = None
    """a folder with task files, which count before those of the package"""
    num_fewshot: int | None = None
    """examples in a prompt; None: as the task says"""
    limit: int | None = None
    """examples of each task; None: all"""
    batch_size: int = 8


class FoundTasks(NamedTuple):
    manager: TaskManager
    names: list[str]


def find_tasks(tasks: Tasks) -> FoundTasks:
    """RecipeError names every unknown task."""
    manager = TaskManager(include_path=str(tasks.include_path) if tasks.include_path else None)
    return FoundTasks(manager, _find_names(tasks.names, manager.all_tasks))


def run_tasks(speaker: Speaker, tasks: Tasks, found: FoundTasks) -> tuple[str, dict[str, Any]]:
    """The results as a table, and as data; UserError for what a task asks of replies and cannot
    have."""
    # Its processes would be forks of this one, whose threads of jax they would lack.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluate: Any = simple_evaluate  # whose decorators hide its parameters
    results = evaluate(
        model=HarnessModel(speaker, tasks.batch_size),
        tasks=found.names,
        task_manager=found.manager,
        num_fewshot=tasks.num_fewshot,
        limit=tasks.limit,
        bootstrap_iters=RESAMPLED,
        log_samples=False,
    )
    parts = [column for column in ("results", "groups") if results.get(column)]
    table = "\n".join(make_table(results, column) for column in parts)
    return table, {name: results[name] for name in KEPT if name in results}


def _find_names(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    names, faults = [], []
    for name in wanted:
        found = matching(known, name)
        names += found
        if not found:
            faults.append(f"--lm-eval: no task is called {show(name)}{did_you_mean(name, known)}")
    if faults:
        raise RecipeError("\n".join(faults))
    return list(dict.fromkeys(names))


class HarnessModel(TemplateLM):
    """The interface of the harness; it asks with `Instance`s, whose arguments are in `args`."""

    def __init__(self, speaker: Speaker, batch_size: int):
        super().__init__()
        self.speaker, self.tokenizer = speaker, speaker.tokenizer
        shards = num_batch_shards(speaker.run.mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.max_length: int = speaker.run.model.spec.config.max_positions

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        first = self.tokenizer.bos_token_id
        first = self.eot_token_id if first is None else first
        if first is None:
            raise UserError("--lm-eval: the tokenizer has no token to begin or end a text with")
        return first

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """With the tokens that the tokenizer adds, unless the text begins with one of them."""
        if add_special_tokens is None:
            begin = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(begin)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of the third of each request after its second: the log-probability, and whether it is
        what a greedy reply would be."""
        pairs = [(context + wanted, len(wanted)) for _, context, wanted in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for batch in self._batches([len(tokens) for tokens, _ in pairs], disable_tqdm):
            scores = self._score([pairs[i][0][-self.max_length - 1 :] for i in batch])
            for i, (logps, are_likeliest) in zip(batch, scores, strict=True):
                last = slice(max(0, len(logps) - pairs[i][1]), None)
                found[i] = float(logps[last].sum(dtype=np.float64)), bool(are_likeliest[last].all())
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of which each token is in one."""
        cut = partial(
            get_rolling_token_windows, prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length, context_len=1,
        )  # fmt: skip
        owners, windows = [], []
        for owner, request in enumerate(requests):
            for window in cut(token_list=self.tok_encode(request.args[0])):
                owners.append(owner)
                windows.append((None, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (logp, _) in zip(owners, scores, strict=True):
            totals[owner] += logp
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Replies up to the first of the texts that a task names, without it."""
        replies = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for settings, group in by_settings.items():
            options = self._options(json.loads(settings))
            room = self.max_length - options.max_new_tokens
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in group]
            for batch in self._batches([len(prompt) for prompt in prompts], disable_tqdm):
                *_, texts = self.speaker.reply([prompts[i] for i in batch], options)
                for i, text in zip(batch, texts, strict=True):
                    replies[group[i]] = text
        return replies

    def _options(self, settings: dict[str, Any]) -> Any:
        """How to reply, as a task says, whatever the model's generation_config.json says."""
        known = {*NEW_TOKENS, *FROM_FOLDER, "until", "do_sample"}
        if other := {k: v for k, v in settings.items() if k not in known and IGNORED.get(k) != v}:
            raise UserError(f"--lm-eval: generation_kwargs {other} of a task are not supported")
        longest = next((settings[name] for name in NEW_TOKENS if name in settings), MAX_NEW_TOKENS)
        if longest >= self.max_length:
            raise UserError(
                f"--lm-eval: a task asks for replies of {longest} tokens; the model has "
                f"{self.max_length} positions"
            )
        given = {name: settings.get(name, getattr(GREEDY, name)) for name in FROM_FOLDER}
        given["temperature"] = float(given["temperature"]) * (
            settings.get("do_sample") is not False
        )
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        stop = [text for text in until if text]
        return self.speaker.choose_options(max_new_tokens=longest, stop=stop, **given)

    def _batches(self, lengths: Sequence[int], disable_tqdm: bool) -> Iterator[list[int]]:
        """Indices of requests of similar length; the longest first, which take the most memory."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        starts = range(0, len(order), self.batch_size)
        for start in tqdm(starts, disable=disable_tqdm, leave=False):
            yield order[start : start + self.batch_size]

    def _score(self, rows: Sequence[list[int]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probability, and whether it is the likeliest, of each token but the first."""
        shape = self.batch_size, _padded(max(map(len, rows)) - 1)
        tokens_BT, targets_BT, segments_BT = (np.zeros(shape, np.int32) for _ in range(3))
        for b, row in enumerate(rows):
            last = len(row) - 1
            tokens_BT[b, :last], targets_BT[b, :last], segments_BT[b, :last] = row[:-1], row[1:], 1
        positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        weights_BT, index_B = segments_BT.astype(np.float32), np.arange(shape[0], dtype=np.int32)
        batch = Batch(tokens_BT, positions_BT, segments_BT, weights_BT, index_B)
        with jax.set_mesh(self.speaker.run.mesh):
            graph, params = self.speaker.run.model.graph, self.speaker.params
            scores = jax.device_get(score_targets(graph, params, batch, targets_BT))
        for b, row in enumerate(rows):
            yield scores[0][b, : len(row) - 1], scores[1][b, : len(row) - 1]


def _padded(tokens: int) -> int:
    """So many tokens or up to a third more, so that few lengths are compiled."""
    step = max(32, 1 << (tokens.bit_length() - 2))
    return -(-tokens // step) * step
