"""Digests of the code that turns records into documents, for the cache's key."""

import ast
import hashlib
import inspect
import sys
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

ENCODING_FILES = (
    "causal.py", "conversation.py", "documents.py", "encode.py", "files.py", "hub.py", "order.py",
    "preference.py", "render.py", "records.py", "source.py", "spans.py",
)  # fmt: skip
"""Our files that decide records, tokens and weights; a version number would be forgotten."""
LIBRARIES = ("jinja2", "tokenizers", "transformers")


def hash_encoding_code() -> str:
    folder = Path(__file__).parent
    files = [(folder / name).read_bytes() for name in ENCODING_FILES]
    return _combine_hashes([*files, repr([version(name) for name in LIBRARIES]).encode()])


def hash_class_code(cls: type) -> str:
    """Hashes the files that define a user's class and what these import from beside themselves;
    empty for our own classes."""
    if cls.__module__.split(".")[0] == "jaxtrain":
        return ""
    files: dict[Path, None] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in ("jaxtrain", "builtins", "typing", "abc"):
            _add_file(_find_file(base.__module__), files)
    # A class defined without a file, as in a notebook, has at least its own functions.
    return _combine_hashes([path.read_bytes() for path in files] or [_describe_class(cls)])


def _combine_hashes(texts: list[bytes]) -> str:
    parts = sorted(hashlib.sha256(text).hexdigest() for text in texts)
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _describe_class(cls: type) -> bytes:
    functions = [value for value in vars(cls).values() if inspect.isfunction(value)]
    return repr([sorted(vars(cls)), *(_describe_code(f.__code__) for f in functions)]).encode()


def _describe_code(code: CodeType) -> list[Any]:
    inner = [_describe_code(c) if isinstance(c, CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, *inner]


def _add_file(path: Path | None, files: dict[Path, None]) -> None:
    """Adds a file, and those that it imports from its folder or below."""
    if path is None or path in files:
        return
    files[path] = None
    for name in _find_imports(path):
        place = path.parent.joinpath(*name.split("."))
        for other in (place.with_suffix(".py"), place / "__init__.py"):
            if other.is_file():
                _add_file(other, files)


def _find_file(module: str) -> Path | None:
    found = getattr(sys.modules.get(module), "__file__", None)
    path = Path(found) if found else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _find_imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = f"{node.module}." if node.module else ""
            names += [start.rstrip("."), *(f"{start}{alias.name}" for alias in node.names)]
    return [name for name in names if name]
