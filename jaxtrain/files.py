"""Files that are whole or not there, and folders that one process at a time writes."""

import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from filelock import OwnerRecord, SoftFileLease, Timeout

from jaxtrain.recipe.errors import RecipeError

LOCK = ".lock"
PARTIAL = ".partial"
"""Ends the name of a hidden file that is being written; a kill leaves it."""
LEASE_S = 30.0
"""A lock that its owner, on another machine, has not renewed for so long is taken over."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to what the system says of a write that fails, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(file: Path, text: str, *, must_be_new: bool = False) -> None:
    """Replace `file` as a whole; never writes through a link. FileExistsError if it is there and
    `must_be_new`."""
    partial = file.with_name(f".{file.name}.{uuid4().hex[:8]}{PARTIAL}")
    try:
        with naming(file), partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if must_be_new:
            _link_as_new(partial, file)
        else:
            partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _link_as_new(partial: Path, file: Path) -> None:
    """Gives the file its name, unless that is taken."""
    try:
        os.link(partial, file)  # unlike a rename, fails then
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if file.exists():
            raise FileExistsError(file) from None
        partial.replace(file)


def holds_something(folder: Path) -> bool:
    """Is anything in it besides what a killed process leaves?"""
    names = [entry.name for entry in folder.iterdir()]
    left = [n for n in names if n.startswith(LOCK) or (n.startswith(".") and n.endswith(PARTIAL))]
    return len(left) < len(names)


def discard(path: Path) -> None:
    """Remove a folder, a file, or a link and not what it points to, as far as that goes."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def claim_folders(
    folders: Mapping[str, Path], *, say: Callable[[str], None], on_lost: Callable[[str], None]
) -> Iterator[None]:
    """Creates the folders, recipe key → folder, and keeps other processes out of them; removes
    those that are empty when it fails, as when the weights cannot be read.

    RecipeError for one that cannot be written, or that a live process is writing. `on_lost` is
    called with the reason, in another thread, when a lock was taken over, as after a long sleep of
    this machine.
    """
    with ExitStack() as locks:
        new = [place for path in folders.values() for place in _new(path)]
        locks.push(lambda fault, *_: _remove_empty(new) if fault else None)  # without their locks
        for folder, key in {path.resolve(): key for key, path in folders.items()}.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(_lock(key, folder, say, on_lost))
                for left in folder.glob(f".*{PARTIAL}"):
                    discard(left)
            except OSError as error:
                raise RecipeError(
                    f"{key}: {folder} cannot be written ({error.strerror}); name another folder"
                ) from error
        yield


def _new(folder: Path) -> list[Path]:
    """The folder and those around it that are not there yet."""
    return [place for place in (folder, *folder.parents) if not os.path.lexists(place)]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # holds something, or is not there
            folder.rmdir()


def why_unwritable(path: Path) -> str | None:
    """Why this file or folder cannot be made or written to; None where it can."""
    place = path = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if place != path and not place.is_dir():
        return f"{place} is a file, where a folder is needed"
    return None if os.access(place, os.W_OK) else f"{place} cannot be written to"


def _lock(
    key: str, folder: Path, say: Callable[[str], None], on_lost: Callable[[str], None]
) -> SoftFileLease:
    """A lock that is held."""
    # A lease renewed by touching a file, since many shared file systems lack locks.
    lock = SoftFileLease(
        folder / LOCK,
        lease_duration=LEASE_S,
        poll_interval=0.2,
        is_singleton=False,
        thread_local=False,
        on_compromise=lambda loss: on_lost(f"{folder} was taken over by another process"),
    )
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = lock.owner
        if owner is not None and not _is_alive_here(owner):
            say(f"{key}: {folder} was in use on {owner.hostname}; waiting for a sign of life")
            try:
                lock.acquire(timeout=1.5 * LEASE_S)
            except Timeout:
                owner = lock.owner
            else:
                return lock
        who = f"process {owner.pid} on {owner.hostname}" if owner else "another process"
        raise RecipeError(
            f"{key}: {who} is writing {folder}; wait until it ends, or name another folder"
            + ("" if owner else f"; if there is none, remove {folder / LOCK}")
        ) from None
    return lock


def _is_alive_here(owner: OwnerRecord) -> bool:
    """Whether the owner is a live process of this machine."""
    if not owner.hostname.startswith(socket.gethostname()):
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # a process of another user
    return True
