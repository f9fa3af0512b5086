"""The files of a finished checkpoint, listed with their sizes and hashes, so that damage is seen
before anything is read."""

import hashlib
import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxtrain.recipe.errors import CheckpointError

LIST = "files.json"


class DamagedCheckpoint(CheckpointError):
    """What is on disk is not what was written."""


def list_files(folder: Path) -> None:
    """Write the list; nothing may be written into the folder after that."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_sha256, files)
        found = {
            str(file.relative_to(folder)): [file.stat().st_size, digest]
            for file, digest in zip(files, hashes, strict=True)
        }
    (folder / LIST).write_text(json.dumps(found, indent=0))


def check_files(folder: Path, parts: Collection[str]) -> None:
    """DamagedCheckpoint names the first file, at the top or in one of these subfolders, that is not
    as listed."""
    try:
        listed = json.loads((folder / LIST).read_text())
        wanted = {folder / name: tuple(entry) for name, entry in listed.items()
                  if len(Path(name).parts) == 1 or Path(name).parts[0] in parts}  # fmt: skip
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged: {LIST} does not read: {error}") from None
    for file, (size, _) in wanted.items():
        if not file.is_file() or file.stat().st_size != size:
            found = f"{file.stat().st_size} bytes" if file.is_file() else "no such file"
            name = file.relative_to(folder)
            raise DamagedCheckpoint(f"{folder} is damaged: {name} had {size} bytes, found {found}")
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_sha256, wanted)
        for (file, (_, digest)), found in zip(wanted.items(), hashes, strict=True):
            if found != digest:
                name = file.relative_to(folder)
                raise DamagedCheckpoint(f"{folder} is damaged: the content of {name} has changed")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
