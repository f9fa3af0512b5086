"""Eight simulated devices, cheap compilation that is remembered, and no way to a hub.

All of it is set before jax is imported.
"""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

from jaxtrain.assets import cache_folder

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"
)  # no second start of the command line
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/jaxtrain-test-xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        # Their programs run in half the time and compile as fast; jaxlib 0.12 has the new emitters
        # only, and no flag for them: it passes over an unknown extra option.
        "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    )
)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, in runs too


def _use_an_empty_data_cache() -> None:
    """Rows that an earlier run prepared would hide a fault of today's code; what was downloaded is
    known by its sum, and stays."""
    assets = cache_folder() / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="jaxtrain-test-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "assets").symlink_to(assets)
    os.environ["JAXTRAIN_CACHE"] = str(folder)


_use_an_empty_data_cache()

# How long an example takes depends on the machine.
settings.register_profile("quick", deadline=None)
settings.load_profile("quick")
settings.register_profile("full", deadline=None)  # tests/fuzz.py


def pytest_collection_finish():
    """What is imported by now stays: without this the garbage collector looks at all of it again
    and again, which takes a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Those of a file are of little use to the next, and would take gigabytes in the end."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Of a test marked `each_value_once`, the cases with a value that none before them has are
    quick; further combinations of the same values are slow."""
    seen = defaultdict(set)
    for item in items:
        if item.get_closest_marker("each_value_once"):
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            before = seen[item.path, item.originalname]
            if values <= before:
                item.add_marker(pytest.mark.slow)
            before |= values
