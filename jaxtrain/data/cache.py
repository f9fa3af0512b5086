"""Prepared documents, cached under a key of everything that decides them.

An entry is a folder that appears by rename and never changes. The first process that misses it
claims and builds it; others, also on other machines that share the folder, wait for it to appear.
"""

import errno
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from filelock import SoftFileLease

from jaxtrain.assets import cache_folder
from jaxtrain.recipe.errors import DataError, RecipeError, show
from jaxtrain.recipe.section import expand_user

MAX_BYTES = 20 * 2**30
"""Above this size the least recently used entries are deleted; $JAXTRAIN_DATA_CACHE_BYTES overrides
it."""
CLAIM_TIMEOUT_S = 30.0
"""A claim that was not renewed for so long belongs to a process that is gone."""
POLL_S = 0.2
MAX_BUILD_AGE_S = 7 * 24 * 3600.0
"""Longer than any preparation takes; what a killed one left behind is deleted after it."""
PARTS_FILE = "key.json"
DAMAGE = (ValueError, LookupError, TypeError, AttributeError)
"""What reading a damaged `PARTS_FILE` raises."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CacheEntry(NamedTuple):
    folder: Path
    note: str
    """Hit or miss, and why: one line for the ledger."""


class DataCache:
    """The cache entries in one folder, by default in the user's cache folder."""

    def __init__(self, folder: str | Path | None = None, *, limit_bytes: int | None = None):
        self.folder = cache_folder() / "data" if folder is None else expand_user(folder)
        # Private in our own cache, since data may be; a folder of the recipe follows the umask.
        self._mode = 0o700 if self.folder.is_relative_to(cache_folder()) else 0o777
        self.limit_bytes = limit_bytes or _read_limit()

    def get(
        self, parts: Mapping[str, str], build: Callable[[Path], None], *, must_exist: bool = False
    ) -> CacheEntry:
        """Returns the entry for `parts`; `build` fills an empty folder for a missing one.

        DataError when the entry `must_exist` and does not."""
        key = sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()
        entry = self.folder / key[:32]
        if self._is_intact(entry):
            return self._use_entry(entry)
        reason = self._explain_miss(parts)
        if must_exist:
            raise DataError(
                f"data.fail_on_missing_cache: not found in {self.folder}: {reason}; "
                f"run `jaxtrain data` with this recipe first"
            )
        self._make_folder()
        # A lease renewed by touching a file, since many shared file systems lack locks.
        claim = SoftFileLease(
            entry.with_suffix(".claim"), lease_duration=CLAIM_TIMEOUT_S, poll_interval=POLL_S
        )
        with claim:
            if self._is_intact(entry):  # the previous holder of the claim has built it
                return self._use_entry(entry)
            self._build(entry, parts, build)
            self._delete_oldest(keep=entry)
        return CacheEntry(entry, f"cache: miss, {reason}; prepared in {entry}")

    def _use_entry(self, entry: Path) -> CacheEntry:
        with suppress(OSError):  # a read-only cache has no order of use
            os.utime(entry / PARTS_FILE)
        return CacheEntry(entry, f"cache: hit, {entry}")

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=self._mode)
        except OSError as fault:
            raise RecipeError(
                f"cannot create the cache folder {self.folder}: {fault.strerror}; name another "
                f"one in data.cache_dir or JAXTRAIN_CACHE"
            ) from None
        for left in self.folder.glob(".new-*"):
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > MAX_BUILD_AGE_S:
                    shutil.rmtree(left, ignore_errors=True)

    def _new_folder(self) -> Path:
        return self.folder / f".new-{uuid4().hex}"

    def _build(self, entry: Path, parts: Mapping[str, str], build: Callable[[Path], None]) -> None:
        new = self._new_folder()
        new.mkdir(mode=self._mode)
        try:
            build(new)
            sums = {file.name: checksum(file) for file in new.iterdir()}
            (new / PARTS_FILE).write_text(json.dumps({"parts": dict(parts), "sums": sums}))
            self._remove(entry)  # it may be there, damaged
            with suppress(OSError):
                new.rename(entry)
            if not self._is_intact(entry):
                raise DataError(f"{entry}: could not be written; is the disk full?")
        except OSError as fault:
            if fault.errno not in FULL:
                raise
            raise DataError(f"cache folder {self.folder}: {fault.strerror}") from fault
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def _is_intact(self, entry: Path) -> bool:
        try:
            sums = json.loads((entry / PARTS_FILE).read_text())["sums"]
            return all(checksum(entry / name) == known for name, known in sums.items())
        except (FileNotFoundError, NotADirectoryError, *DAMAGE):
            return False

    def _explain_miss(self, parts: Mapping[str, str]) -> str:
        """Says in which parts the most similar entry differs."""
        nearest: list[str] | None = None
        for _, _, entry in self._list_entries():
            with suppress(OSError, *DAMAGE):
                known = json.loads((entry / PARTS_FILE).read_text())["parts"]
                names = [*parts, *(name for name in known if name not in parts)]
                differing = [name for name in names if known.get(name) != parts.get(name)]
                if nearest is None or len(differing) <= len(nearest):
                    nearest = differing
        if nearest is None:
            return "nothing prepared yet"
        return f"the nearest entry differs in {', '.join(nearest) or 'nothing, but is damaged'}"

    def _list_entries(self) -> list[tuple[float, int, Path]]:
        """Returns the time of last use, size and folder of each entry, oldest first."""
        found = []
        for file in self.folder.glob(f"*/{PARTS_FILE}"):
            with suppress(OSError):  # another process may delete it meanwhile
                used = file.stat().st_mtime
                size = sum(part.stat().st_size for part in file.parent.iterdir())
                found.append((used, size, file.parent))
        return sorted(found)

    def _delete_oldest(self, *, keep: Path) -> None:
        """Deletes entries until the limit is met; what a run has mapped stays readable to it."""
        entries = self._list_entries()
        total = sum(size for _, size, _ in entries)
        for _, size, entry in entries:
            if total <= self.limit_bytes:
                return
            if entry != keep:
                self._remove(entry)
                total -= size

    def _remove(self, entry: Path) -> None:
        """Renames an entry before deleting it, so that nobody opens half of one."""
        gone = self._new_folder()
        with suppress(OSError):
            entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def checksum(file: Path) -> int:
    """Returns the CRC of a file, which a flipped bit or a missing byte changes; a second reads
    gigabytes."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def _read_limit() -> int:
    written = os.environ.get("JAXTRAIN_DATA_CACHE_BYTES") or str(MAX_BYTES)
    if not written.isdecimal():
        raise RecipeError(
            f"JAXTRAIN_DATA_CACHE_BYTES: must be a number of bytes, found {show(written)}"
        )
    return int(written)
