"""`jaxtrain generate` and `jaxtrain chat`: replies of a run, a checkpoint or a model."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain import registry
from jaxtrain.data.render import encode_prompt, find_stop_tokens
from jaxtrain.export import find_checkpoint, restore_weights
from jaxtrain.model.generate import Sampling, stream
from jaxtrain.model.peft_folder import CONFIG, read_base_name
from jaxtrain.model_folder import name_inside
from jaxtrain.recipe.errors import DataError, RecipeError, pluralize, show
from jaxtrain.recipe.resolve import get_config
from jaxtrain.trainer.run import Run

CHUNK_TOKENS = 8
"""Tokens between two looks at a stop string, and of a file's replies."""
MIN_ROOM = 16
"""Tokens that a prompt has to leave of the model's positions."""
FROM_FOLDER = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
DESCRIPTIONS = ("config.json", CONFIG)
"""Of which a folder of a model or of PEFT has one."""
UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character."""
MAX_FAULTS = 20
"""Lines of a message about prompts."""
Asked = tuple[str | list[dict[str, Any]], Any]
"""A text or a conversation, and the tools that it offers."""


class Options(NamedTuple):
    """How to reply."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """a reply ends before any of these texts"""
    seed: int = 0


@dataclass
class Speaker:
    """A model with its weights and its tokenizer."""

    run: Run
    params: Any
    tokenizer: Any
    is_raw: bool = False
    """texts are continued as they are, without a chat template"""

    @cached_property
    def prepared(self) -> tuple[Any, Any]:
        """The decoder that replies, and its parameters."""
        with jax.set_mesh(self.run.mesh):
            return self.run.model.prepare(self.params)

    def choose_options(
        self, *, max_new_tokens: int, stop: Sequence[str] = (), seed: int = 0, **given: float | None
    ) -> Options:
        """Sampling as given, else as the model's generation_config.json has it; RecipeError for
        what means nothing. A `stop` that is a special token, which no text shows, ends a reply
        too."""
        described = self.run.model.spec.generation_config or {}
        drawn = described if described.get("do_sample") else {}
        settings = {name: drawn[name] for name in FROM_FOLDER if drawn.get(name) is not None}
        settings |= {name: value for name, value in given.items() if value is not None}
        if drawn and "temperature" not in settings:
            settings["temperature"] = 1.0
        added = self.tokenizer.added_tokens_decoder.items()
        special = {token.content: number for number, token in added if token.special}
        stop_tokens = self._stop_tokens(described).union(special[t] for t in stop if t in special)
        sampling = Sampling(**settings, stop_tokens=tuple(sorted(stop_tokens)))
        try:
            sampling.check()
        except ValueError as error:
            raise RecipeError(str(error)) from None
        return Options(sampling, max_new_tokens, tuple(stop), seed)

    def _stop_tokens(self, described: dict[str, Any]) -> set[int]:
        listed = described.get("eos_token_id")
        known = listed if isinstance(listed, list) else [] if listed is None else [listed]
        ends = [self.tokenizer.eos_token_id] if self.is_raw else find_stop_tokens(self.tokenizer)
        return {*known, *(token for token in ends if token is not None)}

    def encode(self, prompt: str | list[dict[str, Any]], tools: Any = None) -> list[int]:
        """The tokens of a text, or of a conversation up to its next reply; DataError when they
        leave no room for one."""
        if isinstance(prompt, str):
            tokens = self.tokenizer(prompt)["input_ids"]
        else:
            tokens = encode_prompt(self.tokenizer, prompt, tools)
        room = self.run.model.spec.config.max_positions
        if not 0 < len(tokens) <= room - MIN_ROOM:
            raise DataError(
                f"a prompt of {len(tokens)} tokens; the model has {room} positions, of which a "
                f"reply needs {MIN_ROOM}"
            )
        return tokens

    def reply(self, prompts: Sequence[list[int]], options: Options) -> Iterator[list[str]]:
        """Yields the text of each reply so far, as it grows; whole in the end."""
        chunks = stream(
            *self.prepared,
            prompts,
            max_new_tokens=options.max_new_tokens,
            max_length=self.run.model.spec.config.max_positions,
            sampling=options.sampling,
            seed=options.seed,
            chunk_tokens=1 if len(prompts) == 1 else CHUNK_TOKENS,
        )
        replies = [Reply(self.tokenizer, options.stop) for _ in prompts]
        while not all(reply.has_ended for reply in replies):
            with jax.set_mesh(self.run.mesh):  # only while the model computes
                chunk = next(chunks, None)
            if chunk is None:
                break
            for reply, tokens in zip(replies, chunk, strict=True):
                reply.add(tokens)
            yield [reply.text for reply in replies]
        yield [reply.whole for reply in replies]


@dataclass
class Reply:
    """The text of one reply while it grows."""

    tokenizer: Any
    stop: Sequence[str]
    tokens: list[int] = field(default_factory=list)
    whole: str = ""
    """all of it"""
    has_ended: bool = False
    """at a stop string"""

    def add(self, tokens: Sequence[int]) -> None:
        if self.has_ended or not tokens:
            return
        self.tokens += tokens
        self.whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        ends = [at for stop in self.stop if (at := self.whole.find(stop)) >= 0]
        if ends:
            self.whole, self.has_ended = self.whole[: min(ends)], True

    @property
    def text(self) -> str:
        """What stays of it whatever follows: no half of a character, no beginning of a stop."""
        if self.has_ended:
            return self.whole
        text = self.whole.rstrip(UNFINISHED)
        begun = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return text[: len(text) - max(begun, default=0)]


def generate(
    source: str,
    prompts: Sequence[str],
    system: str | None,
    file: Path | None,
    out: Path | None,
    batch_size: int,
    *,
    is_raw: bool,
    write: Callable[[str], None],
    **how: Any,
) -> None:
    """Writes the reply to each prompt as it comes, or each record of `file` with its reply as JSON,
    to the new file `out` if it is named. `how` is what `Speaker.choose_options` takes."""
    records = read_prompts(file, is_raw=is_raw) if file else {}
    speaker = load_speaker(source, is_raw=is_raw)
    options = speaker.choose_options(**how)
    first = [] if is_raw else system_turn(system)
    said = {
        f"--prompt {n}": (text if is_raw else [*first, _user_turn(text)], None)
        for n, text in enumerate(prompts, start=1)
    }
    for prompt in encode_all(speaker, said):
        for piece in stream_reply(speaker, prompt, options):
            write(piece)
        write("\n")
    asked = {place: _find_prompt(record, is_raw) for place, record in records.items()}
    encoded = encode_all(speaker, asked)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") if out else nullcontext() as target:
        for record in reply_to_records(speaker, records.values(), encoded, options, batch_size):
            # On a terminal, control characters stay what JSON makes of them.
            line = json.dumps(record, ensure_ascii=target is None) + "\n"
            write(line) if target is None else target.write(line)


def chat(source: str, system: str | None, *, read: Any, write: Any, **how: Any) -> None:
    """Lets the user talk with a model: `read` returns a line, None at the end."""
    speaker = load_speaker(source)
    converse(speaker, speaker.choose_options(**how), system, read=read, write=write)


def system_turn(text: str | None) -> list[dict[str, Any]]:
    """The turns that a system message is."""
    return [{"role": "system", "content": text}] if text else []


def _user_turn(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def load_speaker(source: str, *, is_raw: bool = False) -> Speaker:
    """What `source` names: a checkpoint, a run, whose newest checkpoint it is, a folder of PEFT,
    with the base that it names, or any model that a recipe may name. RecipeError or CheckpointError
    when it cannot be read."""
    folder = Path(source).absolute()
    is_run = (folder / "recipe.yaml").is_file() or (folder / "metadata.json").is_file()
    if is_run:
        trainer, state = restore_weights(find_checkpoint(folder))
        params = trainer.run.eval_params(state)
    elif folder.is_dir() and not any((folder / name).is_file() for name in DESCRIPTIONS):
        inside = name_inside(folder, *DESCRIPTIONS, "metadata.json")
        raise RecipeError(f"{source}: has no {' or '.join(DESCRIPTIONS)}, and is no run{inside}")
    else:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = {"name_or_path": source, "param_dtype": dtype}
        if (base := read_base_name(folder)) is not None:
            model = {"name_or_path": base, "peft_config": {"peft_type": "Lora", "path": source}}
        recipe = {"model": model, "data": {"sources": ["none"]}, "mesh": {"data": 1, "fsdp": -1}}
        trainer = registry.find("trainer", "sft")(get_config(recipe, runs_here=False), "plan")
        params = trainer.run.first_params(None)
    if not (trainer.tokenizer.chat_template or is_raw):
        how = "`jaxtrain generate --raw` continues a text as it is"
        raise RecipeError(f"{source}: has no chat template; {how}")
    return Speaker(trainer.run, params, trainer.tokenizer, is_raw)


# A file of prompts.


def read_prompts(file: Path, *, is_raw: bool) -> dict[str, dict[str, Any]]:
    """The records of a JSON Lines file by their places, `file:line`; DataError names those that ask
    nothing."""
    records, faults = {}, []
    # Not `splitlines`, which ends a line at separators that JSON text may hold.
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            _find_prompt(record, is_raw)
        except (ValueError, DataError) as fault:
            what = str(fault) if isinstance(fault, DataError) else f"not JSON: {fault}"
            faults.append(f"{file}:{number}: {what}")
            continue
        records[f"{file}:{number}"] = record
    _raise_all(faults)
    if not records:
        raise DataError(f"{file}: holds no prompt")
    return records


def encode_all(speaker: Speaker, asked: Mapping[str, Asked]) -> list[list[int]]:
    """The tokens of prompts, by their places; DataError names all that leave no room for a reply,
    before there is one."""
    found, faults = [], []
    for place, prompt in asked.items():
        try:
            found.append(speaker.encode(*prompt))
        except DataError as fault:
            faults.append(f"{place}: {fault}")
    _raise_all(faults)
    return found


def _raise_all(faults: list[str]) -> None:
    if len(faults) > MAX_FAULTS:
        faults[MAX_FAULTS:] = [f"and {len(faults) - MAX_FAULTS:,} more"]
    if faults:
        raise DataError("\n".join(faults))


def _find_prompt(record: Any, is_raw: bool) -> Asked:
    """The text to continue, or the conversation to reply to, and its tools."""
    prompt = _find_text_or_turns(record, is_raw)
    return prompt, None if is_raw else record.get("tools")


def _find_text_or_turns(record: Any, is_raw: bool) -> str | list[dict[str, Any]]:
    if not isinstance(record, dict):
        raise DataError(f"must be a map, found {show(record)}")
    for name in ("text", "prompt") if is_raw else ("messages", "prompt"):
        if (found := record.get(name)) is not None:
            break
    else:
        wanted = "`text` or `prompt`" if is_raw else "`messages` or `prompt`"
        raise DataError(f"has no {wanted}, found {', '.join(record) or 'nothing'}")
    if isinstance(found, str) and found and name != "messages":
        return found if is_raw else [*system_turn(record.get("system")), _user_turn(found)]
    turns = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
    if is_raw or not turns:
        raise DataError(
            f"{name}: must be {'text' if is_raw else 'text or turns'}, found {show(found)}"
        )
    assert isinstance(found, list)
    if found[-1].get("role") == "assistant":
        raise DataError(f"{name}: ends with a reply; remove it to have another")
    return found


def reply_to_records(
    speaker: Speaker,
    records: Iterable[dict[str, Any]],
    encoded: Iterable[list[int]],
    options: Options,
    batch_size: int,
) -> Iterator[dict[str, Any]]:
    """Yields each record, of which the prompt is encoded, with its reply, as a recipe reads it: as
    the last turn of `messages`, or at the end of `text`; its other columns stay."""
    left = zip(records, encoded, strict=True)
    for start in count(step=batch_size):
        if not (batch := list(islice(left, batch_size))):
            break
        prompts = [tokens for _, tokens in batch]
        *_, replies = speaker.reply(prompts, options._replace(seed=options.seed + start))
        for (record, _), reply in zip(batch, replies, strict=True):
            prompt, _ = _find_prompt(record, speaker.is_raw)
            kept = {k: v for k, v in record.items() if k not in ("prompt", "system")}
            if isinstance(prompt, str):
                yield kept | {"text": prompt + reply}
            else:
                yield kept | {"messages": [*prompt, {"role": "assistant", "content": reply}]}


# A conversation on the terminal.


def stream_reply(speaker: Speaker, prompt: list[int], options: Options) -> Iterator[str]:
    """Yields a reply piece by piece: what each token adds, and what was held back."""
    written = 0
    for (text,) in speaker.reply([prompt], options):
        yield text[written:]
        written = len(text)


HELP = "/system TEXT, /reset, /help, /exit; Ctrl-C ends a reply, Ctrl-D the conversation"


def converse(
    speaker: Speaker,
    options: Options,
    system: str | None,
    *,
    read: Callable[[], str | None],
    write: Callable[[str], None],
) -> None:
    """Replies until there is nothing left to read. Lines with a slash are commands; a prompt that
    does not fit is said, and the conversation goes on."""
    messages: list[dict[str, Any]] = []
    write(f"{HELP}\n")
    while (line := read()) is not None:
        command, _, rest = line.strip().partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command in ("/reset", "/system"):
            messages = []
            system = rest if command == "/system" else system
            write(f"new conversation{', with this system message' if system else ''}\n")
        elif command.startswith("/"):
            unknown = "" if command == "/help" else f"no command {command}; "
            write(f"{unknown}{HELP}\n")
        elif line.strip():
            asked = [*messages, _user_turn(line)]
            reply = _answer(speaker, [*system_turn(system), *asked], options, write)
            if reply is not None:
                messages = [*asked, {"role": "assistant", "content": reply}]
                options = options._replace(seed=options.seed + 1)


def _answer(
    speaker: Speaker, messages: list[dict[str, Any]], options: Options, write: Callable[[str], None]
) -> str | None:
    """Writes the reply and how fast it came; None when there is none."""
    try:
        prompt = speaker.encode(messages)
    except DataError as fault:
        write(f"{fault}; /reset forgets the conversation\n")
        return None
    pieces: list[str] = []
    began = time.perf_counter()
    try:
        for piece in stream_reply(speaker, prompt, options):
            pieces.append(piece)
            write(piece)
        tokens = len(pieces) - 1  # the last piece is what was held back
    except KeyboardInterrupt:
        tokens = len(pieces)
        write(" …")
    seconds = time.perf_counter() - began
    write(f"\n[{pluralize(tokens, 'token')}, {tokens / seconds:.1f} tokens/s]\n")
    return "".join(pieces)
