"""Keeps values of environment variables and of secret keys out of messages and files."""

import re
from typing import Any

from jaxtrain.recipe.load import Key, Secret, Secrets, map_leaves

PRIVATE = re.compile(
    r"token|(.*_)?((hf|auth|access)_token|api_?key|(access|private|secret)_key|passw(or)?d|secret)"
    r"|(proxy[-_])?authorization|(set[-_])?cookie|x[-_]api[-_]key"
)
"""Names of keys whose value is secret."""

IN_URL = re.compile(r"(?<=://)([^/@\s:]*):([^/@\s]+)(?=@)")
"""User and password in a URL."""

SPELLINGS: dict[str | int, str | int] = {"lr": "learning_rate"}
MIN_LENGTH = 8  # of a value that is hidden in text about other keys


def find_secrets(tree: Any) -> dict[Key, Secret]:
    """The secrets that a recipe contains, each with the variable that is saved in its place."""
    found: dict[Key, Secret] = {}

    def note(value: Any, key: Key) -> None:
        name, is_text = str(key[-1]), isinstance(value, str | int) and not isinstance(value, bool)
        if is_text and value and PRIVATE.fullmatch(name.lower()):
            found[key] = Secret(f"${{env:{name.upper().replace('-', '_')}}}", (str(value),))
        elif isinstance(value, str) and (passwords := tuple(m[2] for m in IN_URL.finditer(value))):
            found[key] = Secret(IN_URL.sub(r"\1:${env:PASSWORD}", value), passwords)

    map_leaves(tree, note)
    return found


def hide_secrets(text: str, secrets: Secrets, key: Key | None = None) -> str:
    """`text` without the values of `secrets`; short values only in a message about their key."""
    for where, secret in secrets.items():
        related = key is not None and (where[: len(key)] == key or key[: len(where)] == where)
        for value in secret.values:
            if related or len(value) >= MIN_LENGTH:
                text = _without(text, value)
    return text


def restore_variables(tree: Any, secrets: Secrets) -> Any:
    """Plain data in which each value from the environment is its variable again."""
    for key, secret in secrets.items():
        tree = _put(tree, key, secret.written)

    def hide(value: Any, _: Key) -> Any:
        is_own = isinstance(value, str) and "${env:" not in value
        return hide_secrets(value, secrets) if is_own else value

    return map_leaves(tree, hide)


def _without(text: str, value: str) -> str:
    """`text` without `value`, also where a message escaped it or cut it short."""
    for form in dict.fromkeys((value, repr(value)[1:-1])):
        text = text.replace(form, "${env}")
        if "…" in text:
            for n in range(len(form) - 1, 0, -1):
                if f"{form[:n]}…" in text:
                    text = text.replace(f"{form[:n]}…", "${env}…")
                    break
    return text


def _put(tree: Any, key: Key, value: Any) -> Any:
    """`tree` with one value replaced, if it has it."""
    if not key:
        return value
    name, rest = SPELLINGS.get(key[0], key[0]), key[1:]
    if isinstance(tree, dict):
        return {k: _put(v, rest, value) if k == name else v for k, v in tree.items()}
    if isinstance(tree, list) and isinstance(name, str):
        return [_put(item, key, value) for item in tree]  # one entry, written without its list
    if isinstance(tree, list):
        return [_put(v, rest, value) if i == name else v for i, v in enumerate(tree)]
    return tree
