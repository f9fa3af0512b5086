"""Compile the step of a recipe in ArcticTraining's manner on one sequence that all devices share, for
8 or 64 H200 that are not here; prints the bytes that it takes of a device and of the host, as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxtrain import SFTTrainer, get_config
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import device_memory, topology
from tests.recipe.arctic import long_sequences
from tests.runs import model_folder

QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 5120,
    "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"llama-3.1-8b": LLAMA_8B, "qwen3-32b": QWEN3_32B}


def main(target: str, written: dict[str, Any]) -> None:
    folder, num_hosts = Path(tempfile.mkdtemp()), written["devices"] // 8
    devices = topology(target, "v5e:2x4", f"1x{num_hosts}x8").devices
    config = MODELS[written["model"]] | {"max_position_embeddings": written["tokens"]}
    model_folder(folder / "model", **config)
    recipe = long_sequences(
        str(folder / "model"), devices=written["devices"], tokens=written["tokens"]
    )
    run = SFTTrainer(get_config(recipe | written.get("recipe", {})), "plan", devices=devices)
    print(json.dumps(device_memory(run, written["tokens"])))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
