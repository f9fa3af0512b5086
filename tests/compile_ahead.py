"""Compile a small Llama's packed step for a named target and a mesh; prints what came of it as
JSON."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from jaxtrain import SFTTrainer, get_config
from jaxtrain.plan import device_bytes
from tests.runs import model_folder, recipe

GPU = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  core_count: {cores} fpus_per_core: {fpus} shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {shared_optin}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory} cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def describe_gpu(shared_kib: int, **facts: Any) -> str:
    """What the compiler asks of a GPU; `shared_kib` of a multiprocessor, of which a block may have
    all but one."""
    shared = shared_kib * 1024
    return GPU.format(shared=shared, shared_optin=shared - 1024, **facts)


GPUS = {
    "a100": describe_gpu(
        164, name="A100-SXM4-80GB", capability=(8, 0), cores=108, fpus=64, threads=2048,
        l2=41943040, clock=1.41, bandwidth=2039 * 10**9, memory=85 * 10**9,
    ),
    "l4": describe_gpu(
        100, name="L4", capability=(8, 9), cores=58, fpus=128, threads=1536,
        l2=50331648, clock=2.04, bandwidth=300 * 10**9, memory=24 * 10**9,
    ),
    "h200": describe_gpu(
        228, name="H200", capability=(9, 0), cores=132, fpus=128, threads=2048,
        l2=52428800, clock=1.98, bandwidth=4800 * 10**9, memory=150 * 10**9,
    ),
    "b200": describe_gpu(
        228, name="B200", capability=(10, 0), cores=148, fpus=128, threads=2048,
        l2=132644864, clock=1.965, bandwidth=8000 * 10**9, memory=192 * 10**9,
    ),
}  # fmt: skip
TPUS = {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4"}
"""Target → a topology with some of its chips."""
KERNELS = {"splash": "tpu_custom_call", "triton": "__gpu$xla.gpu.triton"}
TOKENS = 512


def topology(target: str, tpu: str, gpu: str = "1x1x8") -> Any:
    """`gpu` counts partitions, hosts and the GPUs of each."""
    if target not in GPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=tpu)
    return topologies.get_topology_desc(platform="cuda", topology=gpu, target_config=GPUS[target])


def device_memory(run: SFTTrainer, tokens: int) -> dict[str, int]:
    """Bytes that the step takes of a device, and of the host for it, compiled for sequences of so
    many tokens."""
    shapes = run.run.state_shapes
    memory = run.step.lower(shapes, run.layout.batch_shapes(tokens)).compile().memory_analysis()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    argument, output, alias, temporaries = (
        getattr(memory, f"host_{part}_size_in_bytes")
        for part in ("argument", "output", "alias", "temp")
    )
    host, peak = argument + output - alias + temporaries, live + memory.temp_size_in_bytes
    return {
        "state": device_bytes(shapes),
        "temporaries": memory.temp_size_in_bytes,
        # The compiler's own peak counts the host's memory too.
        "peak": peak if host else max(peak, memory.peak_memory_in_bytes),
        "host": host,
    }


def main(target: str, mesh: dict[str, int]) -> None:
    folder = Path(tempfile.mkdtemp())
    written = recipe(folder, mesh=mesh, micro_batch_size=4, gradient_accumulation_steps=2)
    model_folder(
        folder / "model", hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=2048,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    run = SFTTrainer(get_config(written), "plan", devices=topology(target, "v5e:2x4").devices)
    lowered = run.step.lower(run.run.state_shapes, run.layout.batch_shapes(TOKENS))
    memory = lowered.compile().memory_analysis()
    print(
        json.dumps(
            {
                "kernels": [name for name in KERNELS if KERNELS[name] in lowered.as_text()],
                "alias_bytes": memory.alias_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes,
                "peak_bytes": memory.peak_memory_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
