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

H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""
L4 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536
  core_count: 58 fpus_per_core: 128 shared_memory_per_block: 49152
  shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 300000000000 l2_cache_size: 50331648 clock_rate_ghz: 2.04
  device_memory_size: 24000000000 cuda_compute_capability { major: 8 minor: 9 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA L4"
"""
A100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 108 fpus_per_core: 64 shared_memory_per_block: 49152
  shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: 85000000000 cuda_compute_capability { major: 8 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""
B200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 148 fpus_per_core: 128 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 8000000000000 l2_cache_size: 132644864 clock_rate_ghz: 1.965
  device_memory_size: 192000000000 cuda_compute_capability { major: 10 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA B200"
"""
GPUS = {"a100": A100, "l4": L4, "h200": H200, "b200": B200}
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
