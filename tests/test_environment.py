"""What is set before jax starts."""

import os
import subprocess
import sys
from importlib import metadata

import pytest

from jaxtrain import environment
from jaxtrain.environment import GPU_FLAGS, GPU_VERSIONS, add_flags, find_flags

OURS = {"xla_one": "true", "xla_two": "3"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "--xla_one=true --xla_two=3"),
        ("--xla_other=1", "--xla_other=1 --xla_one=true --xla_two=3"),
        ("  --xla_one=false ", "--xla_one=false --xla_two=3"),
        ("--xla_two --xla_one", "--xla_two --xla_one"),
        ("--xla_one_more=1 --xla_two=4", "--xla_one_more=1 --xla_two=4 --xla_one=true"),
        ("/etc/flags of XLA", "/etc/flags of XLA"),
    ],
)
def test_what_a_user_sets_wins_and_nothing_is_set_twice(given, expected):
    assert add_flags(given, OURS) == expected == add_flags(expected, OURS)


@pytest.mark.parametrize("has_plugin", [False, True])
@pytest.mark.parametrize("version", [*GPU_VERSIONS, "0.9.9"])
def test_flags_are_set_where_they_are_known_and_used(tmp_path, monkeypatch, has_plugin, version):
    if has_plugin:
        (tmp_path / f"{environment.PLUGINS[0]}.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(metadata, "version", lambda package: version)
    expected = has_plugin and version in GPU_VERSIONS
    assert find_flags() == (GPU_FLAGS if expected else {})


def start(flags):
    program = "import jax; jax.devices(); print('started')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    return "started" in done.stdout


@pytest.mark.skipif(metadata.version("jaxlib") not in GPU_VERSIONS, reason="sets no flags")
def test_this_jaxlib_knows_every_flag_and_would_end_at_another():
    assert start(add_flags("", GPU_FLAGS))
    assert not start(add_flags("", GPU_FLAGS | {"xla_gpu_no_such_flag": "true"}))
