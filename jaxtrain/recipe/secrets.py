"""Values of environment variables, and of keys that say they are secret, never leave the process:
not in messages, not in files."""

import re
from typing import Any

from jaxtrain.recipe.load import Key, Secret, Secrets

PRIVATE = re.compile(
    r"token|(.*_)?((hf|auth|access)_token|api_?key|(access|private|secret)_key|passw(or)?d|secret)"
)
"""Names of keys whose value nobody else should read."""

SPELLINGS: dict[str | int, str | int] = {"lr": "learning_rate"}
LONG = 8  # characters from which a value is looked for in text that is not its own


def written_out(tree: Any, key: Key = ()) -> dict[Key, Secret]:
    """The secrets that a recipe holds itself; where they are saved, a variable stands instead."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        found = [written_out(value, (*key, name)) for name, value in items]
        return {k: secret for inner in found for k, secret in inner.items()}
    name = str(key[-1]) if key else ""
    is_text = isinstance(tree, str | int) and not isinstance(tree, bool)
    if not is_text or not tree or not PRIVATE.fullmatch(name.lower()):
        return {}
    return {key: Secret(f"${{env:{name.upper()}}}", (str(tree),))}


def hidden(text: str, secrets: Secrets, key: Key | None = None) -> str:
    """`text` without the values of `secrets`; in a message about `key`, short ones too."""
    for where, secret in secrets.items():
        related = key is not None and (where[: len(key)] == key or key[: len(where)] == where)
        for value in secret.values:
            if related or len(value) >= LONG:
                text = _without(text, value)
    return text


def restored(tree: Any, secrets: Secrets) -> Any:
    """Plain data in which each value that came from the environment is written as it was."""
    for key, secret in secrets.items():
        tree = _put(tree, key, secret.written)
    return _map_text(tree, secrets)


def _without(text: str, value: str) -> str:
    """Also where a message escaped it, or cut it short."""
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


def _map_text(tree: Any, secrets: Secrets) -> Any:
    if isinstance(tree, dict):
        return {name: _map_text(value, secrets) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_map_text(value, secrets) for value in tree]
    return hidden(tree, secrets) if isinstance(tree, str) and "${env:" not in tree else tree
