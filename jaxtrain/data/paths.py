"""Paths, patterns, folders and URLs to local files: what is elsewhere is copied into the user's
cache."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import TqdmCallback

from jaxtrain.assets import cache_folder
from jaxtrain.data.cache import DataCache
from jaxtrain.data.rows import first_line
from jaxtrain.recipe.data import FORMATS, file_format
from jaxtrain.recipe.errors import RecipeError, UserError
from jaxtrain.recipe.section import expand_user

CONTENT_KEYS = (
    "etag", "md5", "sha", "crc", "digest", "blob_id", "generation", "version", "modified", "mtime",
    "created",
)  # fmt: skip
"""Parts of the names under which file systems tell whether a file is another one by now."""

BAR = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
"""Of tqdm; nothing where nobody watches."""


def data_files(paths: str | Sequence[str]) -> Iterator[Path]:
    """Files, globs and folders, here or at a URL, as local files in their order; RecipeError for
    one that is not there. Each is to be opened before the next is asked for: a copy of what is
    elsewhere may give way to the next one's."""
    for written in [paths] if isinstance(paths, str) else paths:
        path = expand_user(written)
        if "://" in written:
            yield from fetched(written)
        elif path.is_file():
            yield path
        elif path.is_dir():
            names = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
            yield from (names[name] for name in rows_among(names, path))
        elif files := [f for f in map(Path, glob(str(path), recursive=True)) if f.is_file()]:
            yield from sorted(files)
        else:
            is_pattern = set("*?[") & set(written)
            raise RecipeError(f"no file {'matches' if is_pattern else 'or folder'} {written}")


def fetched(url: str) -> list[Path]:
    """Copies of the files that a URL, a pattern or a remote folder names, in the order of their
    names; copied again only when the file system says that one has changed.

    RecipeError for a URL that names nothing, or that cannot be read from here."""
    with _named(url):
        files, path = fsspec.core.url_to_fs(url)
        infos = _listed(files, path, url)
        parts = {name: str(sorted(info.items())) for name, info in infos.items()}
        known = [{key.lower() for key, value in info.items() if value} for info in infos.values()]
        if not all(any(part in key for key in keys for part in CONTENT_KEYS) for keys in known):
            parts["time"] = str(time.time_ns())
        bases = (name.partition("?")[0].rstrip("/").rpartition("/")[2] for name in infos)
        copies = [f"{number}-{base}" for number, base in enumerate(bases)]

        def build(folder: Path) -> None:
            for copy, (name, info) in zip(copies, infos.items(), strict=True):
                told = f"{name}, {(info.get('size') or 0) / 1e6:.1f} MB"
                print(f"fetching {told}", file=sys.stderr, flush=True)
                with TqdmCallback(tqdm_kwargs=BAR) as callback:
                    files.get_file(name, str(folder / copy), callback=callback)

        folder = DataCache(cache_folder() / "remote").get(parts, build).folder
    return [folder / copy for copy in copies]


def _listed(files: Any, path: str, url: str) -> dict[str, dict[str, Any]]:
    """Name → what the file system says of the file."""
    if set("*[") & set(path):
        found = files.glob(path, detail=True)
        if not found:
            raise RecipeError(f"no file matches {url}")
    else:
        info = files.info(path)
        if info["type"] == "file":
            return {path: info}
        found = files.find(path, detail=True)
        below = {name.partition("?")[0].removeprefix(path).lstrip("/"): name for name in found}
        found = {below[name]: found[below[name]] for name in rows_among(below, url)}
    return {name: info for name, info in sorted(found.items()) if info["type"] == "file"}


def rows_among(names: Iterable[str], folder: object) -> list[str]:
    """Of the files in a folder those that hold rows: no hidden ones, and no text that stands beside
    rows of other formats, which is about them. RecipeError when there are none."""
    kinds = {
        name: kind
        for name in names
        if (kind := file_format(name)) and not any(p.startswith(".") for p in Path(name).parts)
    }
    if not kinds:
        raise RecipeError(f"folder {folder} holds no file of {', '.join(FORMATS)}")
    is_text = set(kinds.values()) == {"text"}
    return [name for name, kind in kinds.items() if is_text or not name.lower().endswith(".md")]


@contextmanager
def _named(url: str) -> Iterator[None]:
    """Whatever goes wrong, as a fault of the URL."""
    try:
        yield
    except UserError:
        raise
    except ImportError as fault:
        raise RecipeError(f"{url}: needs a package that is not installed: {fault}") from None
    except FileNotFoundError:
        raise RecipeError(f"{url}: no such file") from None
    except Exception as fault:  # every protocol is a library with faults of its own
        kind, first = type(fault).__name__, first_line(fault)
        told = kind if first == kind else f"{kind}: {first}"
        raise RecipeError(f"{url}: could not be read: {told}") from fault
