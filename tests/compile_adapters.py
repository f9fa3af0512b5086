"""Compile the packed step of adapters on Llama 3.1 8B for hardware that is not here; prints the bytes
of a device that it takes, as JSON."""

import json
import sys
import tempfile
from pathlib import Path

from jaxtrain import SFTTrainer, get_config
from tests.compile_ahead import device_memory, topology
from tests.runs import model_folder, recipe

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
PEFT = {"peft_type": "Lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TOKENS = 4096


def main(target: str, quantization: str | None) -> None:
    found = topology(target, "v5e:2x2")
    folder = Path(tempfile.mkdtemp())
    written = recipe(
        folder,
        model={"from_scratch": False, "peft_config": PEFT, "quantization": quantization},
        data={"max_length": TOKENS},
        mesh={"fsdp": 4} if target == "v5e" else {},
        micro_batch_size=1,
    )
    model_folder(folder / "model", **LLAMA_8B)
    devices = found.devices if target == "v5e" else found.devices[:1]
    run = SFTTrainer(get_config(written), "plan", devices=devices)
    print(json.dumps(device_memory(run, TOKENS)))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
