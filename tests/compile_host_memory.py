"""Compile a Llama's step for hardware that is not here, with changes to its recipe; prints the bytes
that it takes of a device and of the host as JSON."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxtrain import SFTTrainer, get_config
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import device_memory, topology
from tests.runs import model_folder, recipe

SMALL = {
    "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_hidden_layers": 16, "vocab_size": 2048,
    "max_position_embeddings": 2048,
}  # fmt: skip
DEEP = {**SMALL, "num_hidden_layers": 128}
MODELS = {"small": (SMALL, 2048), "deep": (DEEP, 2048), "8b": (LLAMA_8B, 4096)}


def main(target: str, written: dict[str, Any]) -> None:
    folder = Path(tempfile.mkdtemp())
    config, tokens = MODELS[written.pop("size")]
    written = recipe(folder, data={"max_length": tokens}, mesh={"fsdp": 8}, **written)
    model_folder(folder / "model", **config)
    chips = "v5p:2x2x2" if target == "v5p" else "v5e:2x4"
    run = SFTTrainer(get_config(written), "plan", devices=topology(target, chips).devices)
    print(json.dumps(device_memory(run, tokens)))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
