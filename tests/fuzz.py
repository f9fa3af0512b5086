"""What the fuzz tests share: how many examples they try, how long one may take, and damage.

`pytest --hypothesis-profile=full --hypothesis-seed=N` tries as many as a release should survive.
"""

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FULL = "full"
CPU_S = 20
"""Time of the processor that one example may take: the machine may stand still meanwhile."""


def examples(quick: int, full: int) -> settings:
    """Settings of a test that tries so many examples; the profile says which."""
    return settings(
        max_examples=full if settings.get_current_profile_name() == FULL else quick,
        deadline=None,  # see `bounded`
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long, which a deadline of hypothesis would wait for."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"more than {CPU_S} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


SNIPPETS = [
    b"", b"\0", b"\t", b"\r", b"\n", b"\n\n", b" ", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J",
    b"\xed\xa0\x80", "\u202e".encode(), "\u2028".encode(), "é".encode(), b"\\ud800", b"\\u0000",
    b"{", b"}", b"[", b"]", b'"', b"'", b",", b":", b"-", b"#", b"|", b"&a ", b"*a ", b"<<: *a", b"!!x ",
    b"!!python/name:os.system ", b"? ", b"%", b"null", b"true", b"NaN", b"-Infinity", b"1e999",
    b"9" * 400, b"9" * 5000, b"12:30:45", b"[" * 3000, b'{"a":' * 3000, b"${env:X}", b"${dir}", b"~",
    b'"a": 1, "a": 2', b"x" * 2000,
]  # fmt: skip


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """`content` with parts cut, replaced, doubled, moved or written over."""
    for _ in range(draw(st.integers(1, 4))):
        if not content:
            break
        start = draw(st.integers(0, len(content) - 1))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 2, 5, 20, 200, 10**6])))
        part, snippet = content[start:stop], draw(st.sampled_from(SNIPPETS))
        new = draw(st.sampled_from([snippet, snippet + part, part + part, part[::-1], b""]))
        content = content[:start] + new + content[stop:]
    return content


WRONG = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", " ", "x", "3", "null", "\ud800", "a\ud800b", "\x1b[31m", "\u202e", "\0", "é" * 99,
    "x" * 5000, "<|im_end|>", "</think>", [], {}, [[]], [{}], [None], [1], ["x"], {"a": 1}, {"": None},
    {"role": "user"}, {"role": "user", "content": "x"}, [{"role": "assistant", "content": ["x"]}],
    "[" * 3000, "9" * 5000, {"type": "text", "text": "x"}, {"name": "f", "arguments": {}}, "{", '[{"name": "f"}]',
]  # fmt: skip
"""Values of every kind, each of which is wrong somewhere."""


def places(tree: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of plain data, as the way to it."""
    yield key
    if isinstance(tree, dict | list):
        for name, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(inner, (*key, name))


def at(tree: Any, key: tuple[Any, ...]) -> Any:
    for part in key:
        tree = tree[part]
    return tree


@st.composite
def edited(draw: Any, tree: Any, names: st.SearchStrategy, values: st.SearchStrategy) -> Any:
    """Plain data with keys left out, doubled, renamed, nested or given other values."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        ways = [way for way in places(tree) if way]
        if not ways:
            break
        *parents, last = draw(st.sampled_from(ways))
        here = at(tree, tuple(parents))
        match draw(st.sampled_from("rraadkwln")):
            case "r":
                here[last] = copy.deepcopy(draw(values))
            case "a" if isinstance(here, dict):
                here[draw(names)] = copy.deepcopy(draw(values))
            case "d":
                del here[last]
            case "k" if isinstance(here, dict):
                here[draw(names)] = here.pop(last)
            case "w":
                here[last] = {draw(names): here[last]}
            case "l":
                here[last] = [here[last], copy.deepcopy(here[last])]
            case _:
                here[last] = None
    return tree
