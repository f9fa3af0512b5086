import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own; that of the session keeps what was downloaded."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
