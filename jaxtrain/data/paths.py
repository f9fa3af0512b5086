"""Turns paths, patterns, folders and URLs into local files; remote files are copied into the user's
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
from jaxtrain.data.records import first_line
from jaxtrain.recipe.data import FORMATS, file_format
from jaxtrain.recipe.errors import RecipeError, UserError
from jaxtrain.recipe.section import expand_user

CONTENT_KEYS = (
    "etag", "md5", "sha", "crc", "digest", "blob_id", "generation", "version", "modified", "mtime",
    "created",
)  # fmt: skip
"""Parts of the names of file properties that show whether the content has changed."""

BAR = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
"""tqdm arguments; `disable: None` is silent where no terminal is."""


def find_data_files(paths: str | Sequence[str]) -> Iterator[Path]:
    """Yields the local files of paths, globs, folders and URLs in their order; RecipeError for a
    missing one. Open each file before taking the next, whose download may evict it from the
    cache."""
    for written in [paths] if isinstance(paths, str) else paths:
        path = expand_user(written)
        if "://" in written:
            yield from fetch_url(written)
        elif path.is_file():
            yield path
        elif path.is_dir():
            names = {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
            yield from (names[name] for name in select_data_files(names, path))
        elif files := [f for f in map(Path, glob(str(path), recursive=True)) if f.is_file()]:
            yield from sorted(files)
        else:
            is_pattern = set("*?[") & set(written)
            raise RecipeError(f"no file {'matches' if is_pattern else 'or folder'} {written}")


def fetch_url(url: str) -> list[Path]:
    """Copies the files of a URL, a pattern or a remote folder into the cache, ordered by name;
    copies again only when the file system says that one has changed.

    RecipeError for a URL that names nothing, or that cannot be read from here."""
    with _report_errors_of(url):
        files, path = fsspec.core.url_to_fs(url)
        infos = _list_files(files, path, url)
        parts = {name: str(sorted(info.items())) for name, info in infos.items()}
        known = [{key.lower() for key, value in info.items() if value} for info in infos.values()]
        if not all(any(part in key for key in keys for part in CONTENT_KEYS) for keys in known):
            parts["time"] = str(time.time_ns())
        bases = (name.partition("?")[0].rstrip("/").rpartition("/")[2] for name in infos)
        copies = [f"{number}-{base}" for number, base in enumerate(bases)]

        def build(folder: Path) -> None:
            for copy, (name, info) in zip(copies, infos.items(), strict=True):
                size = f"{(info.get('size') or 0) / 1e6:.1f} MB"
                print(f"fetching {name}, {size}", file=sys.stderr, flush=True)
                with TqdmCallback(tqdm_kwargs=BAR) as callback:
                    files.get_file(name, str(folder / copy), callback=callback)

        folder = DataCache(cache_folder() / "remote").get(parts, build).folder
    return [folder / copy for copy in copies]


def _list_files(files: Any, path: str, url: str) -> dict[str, dict[str, Any]]:
    """Returns the files of a remote path: name → the file system's properties of the file."""
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
        found = {below[name]: found[below[name]] for name in select_data_files(below, url)}
    return {name: info for name, info in sorted(found.items()) if info["type"] == "file"}


def select_data_files(names: Iterable[str], folder: object) -> list[str]:
    """Selects the data files of a folder, without hidden ones and without Markdown beside data of
    other formats, which describes them. RecipeError when there are none."""
    kinds = {
        name: kind
        for name in names
        if (kind := file_format(name)) and not any(p.startswith(".") for p in Path(name).parts)
    }
    if not kinds:
        raise RecipeError(f"folder {folder} holds no data file; known are {', '.join(FORMATS)}")
    is_text = set(kinds.values()) == {"text"}
    return [name for name, kind in kinds.items() if is_text or not name.lower().endswith(".md")]


@contextmanager
def _report_errors_of(url: str) -> Iterator[None]:
    """Reports every fault as one of the URL."""
    try:
        yield
    except UserError:
        raise
    except ImportError as fault:
        raise RecipeError(f"{url}: needs a package that is not installed: {fault}") from None
    except FileNotFoundError:
        raise RecipeError(f"{url}: no such file") from None
    except Exception as fault:  # every protocol is a library with exceptions of its own
        kind, first = type(fault).__name__, first_line(fault)
        reason = kind if first == kind else f"{kind}: {first}"
        raise RecipeError(f"{url}: cannot be read: {reason}") from fault
