"""Compile the step of Llama 3.1 8B on one sequence that all devices share, for hardware that is not
here; prints the bytes of a device that it takes, as JSON."""

import json
import sys
import tempfile
from pathlib import Path

from jaxtrain import SFTTrainer, get_config
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import device_memory, topology
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
    print(json.dumps(device_memory(run, tokens)))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
