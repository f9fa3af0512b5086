"""Compile the step of Llama 3.1 8B on one sequence that all devices share, for hardware that is not
here; prints the bytes of a device that it takes, as JSON."""

import json
import sys
import tempfile
from pathlib import Path

from jaxtrain import SFTTrainer, get_config
from jaxtrain.plan import device_bytes
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import topology
from tests.runs import model_folder, recipe


def main(target: str, tokens: int) -> None:
    folder, devices = Path(tempfile.mkdtemp()), topology(target, "v5e:2x4").devices
    written = recipe(
        folder,
        data={"max_length": tokens},
        sequence_parallel_size=len(devices),
        deepspeed={"zero_optimization": {"stage": 3}},
        tiled_mlp_compute=True,
        micro_batch_size=1,
    )
    model_folder(folder / "model", **{**LLAMA_8B, "max_position_embeddings": tokens})
    run = SFTTrainer(get_config(written), "plan", devices=devices)
    shapes = run.run.state_shapes
    memory = run.step.lower(shapes, run.layout.batch_shapes(tokens)).compile().memory_analysis()
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    print(
        json.dumps(
            {
                "state": device_bytes(shapes),
                "temporaries": memory.temp_size_in_bytes,
                "peak": max(memory.peak_memory_in_bytes, live + memory.temp_size_in_bytes),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
