"""What is set before jax is imported: where compiled programs are kept, and XLA's flags for
accelerators."""

import os
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

GPU_FLAGS = {"xla_gpu_enable_latency_hiding_scheduler": "true"}
GPU_VERSIONS = ("0.10.2", "0.12.0.1")
"""A process ends at a flag that its XLA does not know, so flags are set for the versions of jaxlib
that were seen to take them."""
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "datasets")


def prepare_jax() -> None:
    """Sets what a user has not set; to be called before jax is imported."""
    from jaxtrain.assets import cache_folder  # imports what `--help` does without

    # Compiled programs are kept in the user's cache, also those that take less than jax's second.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder() / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    set_flags()


def set_flags() -> None:
    """Adds the flags of XLA that a user has not set."""
    if flags := find_flags():
        os.environ["XLA_FLAGS"] = add_flags(os.environ.get("XLA_FLAGS", ""), flags)


def find_flags() -> dict[str, str]:
    """Flags and values for what is installed here."""
    has_gpu_plugin = any(map(util.find_spec, PLUGINS))
    return GPU_FLAGS if has_gpu_plugin and find_version("jaxlib") in GPU_VERSIONS else {}


def add_flags(given: str, flags: dict[str, str]) -> str:
    """The flags that are given, before those that they do not name already."""
    words = given.split()
    if words and not words[0].startswith("-"):  # XLA reads its flags from this file
        return given
    named = {word.lstrip("-").partition("=")[0] for word in words}
    own = [f"--{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join([*words, *own])


def find_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def find_bfloat16_unit() -> str | None:
    """What this processor multiplies bfloat16 with; None where nothing is known of it."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    return next((unit for flag, unit in BFLOAT16_UNITS.items() if flag in words), None)


def describe() -> Iterator[tuple[str, str]]:
    """(name, fact) of this machine, as far as it is known without jax."""
    yield "versions", ", ".join(f"{name} {find_version(name)}" for name in PACKAGES)
    unit = find_bfloat16_unit()
    yield "processor", f"{os.cpu_count()} cores, bfloat16 by {unit or 'no unit that is known'}"
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        yield variable, os.environ.get(variable, "")
