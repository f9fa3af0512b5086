"""The whole step compiles for hardware that is not here, with the real compilers."""

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.compile_ahead import GPUS, TPUS

pytestmark = [pytest.mark.slow, pytest.mark.network]

SITE = Path(tempfile.gettempdir()) / "jaxtrain-test-compilers"
JAX = metadata.version("jax")
TARGETS = {
    "v5e": "libtpu",
    "h200": f"jax-cuda12-plugin=={JAX} jax-cuda12-pjrt=={JAX} nvidia-cuda-nvcc-cu12",
}
MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 8},
    {"pipeline": 2, "data": 2, "tensor": 2},
]


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    """A compiler, installed beside the environment and not into it."""
    site = SITE / f"{request.param}-{JAX}"
    if not (site / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site)]
        done = subprocess.run(
            [*pip, *TARGETS[request.param].split()], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot install {TARGETS[request.param]}: {done.stderr[-300:]}")
        (site / "installed").touch()
    return request.param, site


@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: " ".join(f"{a}{n}" for a, n in mesh.items())
)
def test_the_step_compiles(target, mesh):
    name, site = target
    found = compile_with("compile_ahead.py", site, name, mesh, chips=8)
    assert found["kernels"] == ["splash" if name == "v5e" else "triton"]
    assert found["alias_bytes"] > 0.9 * found["output_bytes"], "the state must be donated"
    assert 0 < found["peak_bytes"] < 16 * 2**30


def compile_with(program, site, name, argument, *, chips):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{site}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"v5litepod-{chips}",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    file = str(Path(__file__).with_name(program))
    done = subprocess.run(
        [sys.executable, file, name, json.dumps(argument)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_attention_compiles(target):
    """For every size of heads, with and without what a family may ask for, and for rows whose dense
    scores alone would be 4 GiB."""
    name, site = target
    for chip in TPUS if name == "v5e" else GPUS:
        found = compile_with("compile_attention.py", site, chip, None, chips=8)
        for case, of_case in found.items():
            print(f"{chip:5} {case:32} {of_case['temporaries'] / 2**20:8.1f} MiB")
            # One forward, one for queries, one for keys and values.
            assert of_case["kernels"] == {"triton" if chip in GPUS else "splash": 3}
            assert of_case["temporaries"] < 0.6 * 2**30


CHIP_BYTES = {"h200": 141e9, "l4": 24e9, "v5e": 16 * 2**30}


def test_adapters_of_an_8b_model_fit(target):
    """Packed rows of 4096 tokens; prints a table of the bytes that a device takes. Beside a layer of
    whole weights, blocks cost a GPU few temporaries."""
    (name, site), temporaries = target, {}
    for chip in ("v5e",) if name == "v5e" else ("h200", "l4"):
        for quantization in (None, "int8", "nf4"):
            found = compile_with("compile_adapters.py", site, chip, quantization, chips=4)
            parts = "  ".join(f"{part} {size / 2**30:6.2f} GiB" for part, size in found.items())
            print(f"{chip:5} {quantization or 'bfloat16':9} {parts}")
            temporaries[chip, quantization] = found["temporaries"]
            if name != "v5e":
                assert found["temporaries"] < 1.25 * temporaries[chip, None]
            if quantization == "nf4" or chip != "l4":
                assert found["peak"] < 0.95 * CHIP_BYTES[chip]


def test_products_in_fp8_reach_the_units_of_a_gpu_that_has_them(target):
    """Four of a layer forward, their recomputation but for the last, and two gradients of each."""
    name, site = target
    if name == "h200":
        found = compile_with("compile_fp8.py", site, name, None, chips=8)
        assert found["cublas"].count("__cublas$lt$matmul$f8") == found["triton"] == 15
        assert len(found["cublas"]) == 18, "three of the head"
    for chip, kind in {"v5e": {"v5e": "TPU v5 lite"}, "h200": {"a100": "NVIDIA A100"}}[
        name
    ].items():
        found = compile_with("compile_fp8.py", site, chip, None, chips=8)
        assert found["refused"].startswith("model.matmul_precision: fp8 needs")
        assert kind in found["refused"]


@pytest.mark.parametrize(
    ("model", "devices", "tokens"), [("llama-3.1-8b", 8, 2**19), ("qwen3-32b", 64, 2**20)]
)
def test_one_long_sequence_fits(target, model, devices, tokens):
    """From a recipe in ArcticTraining's manner, with moments and layer inputs on the host."""
    name, site = target
    if name != "h200":
        pytest.skip("memory of eight v5e is too small")
    case = {"model": model, "devices": devices, "tokens": tokens}
    found = compile_with("compile_long.py", site, name, case, chips=8)
    print(found)
    assert found["peak"] < 0.95 * CHIP_BYTES[name]
    assert found["host"] > 2 * found["state"]  # moments are twice the parameters


OFFLOAD = {
    "moments": {"deepspeed": {"zero_optimization": {"stage": 3, "cpu_offload": True}}},
    "parameters": {"deepspeed": {"zero_optimization": {"stage": 3, "cpu_offload_param": True}}},
    "layer inputs": {"activation_checkpoint_cpu_offload": True},
    "layer inputs of 8B": {"activation_checkpoint_cpu_offload": True},
}
ROWS = 4
LAYER_INPUTS = {
    "layer inputs": 128 * ROWS * 2048 * 1024 * 2,
    "layer inputs of 8B": 32 * 4096**2 * 2,
}
"""Bytes for a device: layers, tokens, width, bfloat16; of the model that compile_host_memory.py calls
deep, and of one that a v5e is too small for."""


@pytest.mark.parametrize("what", OFFLOAD)
def test_what_moves_to_the_host_leaves_the_devices(target, what):
    name, site = target
    model = {"size": "small"}
    if what == "layer inputs":
        model = {"size": "deep", "micro_batch_size": ROWS}
    elif what == "layer inputs of 8B":
        model, name = {"size": "8b"}, name.replace("v5e", "v5p")
    before, after = (
        compile_with("compile_host_memory.py", site, name, {**model, **written}, chips=8)
        for written in ({}, OFFLOAD[what])
    )
    moved = LAYER_INPUTS.get(what, before["state"] - after["state"])
    assert before["host"] < 0.1 * moved and after["host"] > 0.99 * moved > 100e6
    assert before["peak"] - after["peak"] >= 0.9 * moved
