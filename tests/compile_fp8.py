"""Compile a small Llama's step with fp8 products for GPUs that are not here; prints what came of it
as JSON."""

import json
import re
import sys
import tempfile
from pathlib import Path

from jax.experimental import topologies

from jaxtrain import SFTTrainer, get_config
from jaxtrain.recipe.errors import RecipeError
from tests.compile_ahead import GPUS, TOKENS, topology
from tests.runs import model_folder, recipe

# Without them the compiler takes CUDA for too old.
VERSIONS = 'runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"'
CUBLAS = re.compile(r'custom_call_target="(__cublas\$lt\$matmul[^"]*)"')


def main(target: str, _: None) -> None:
    folder = Path(tempfile.mkdtemp())
    written = recipe(folder, model={"matmul_precision": "fp8"}, mesh={"fsdp": 8})
    model_folder(
        folder / "model", hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=2048,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    if target != "h200":
        try:
            SFTTrainer(get_config(written), "plan", devices=topology(target, "v5e:2x4").devices)
        except RecipeError as error:
            print(json.dumps({"refused": str(error)}))
        return
    device = GPUS["h200"].replace("device_memory_size", f"{VERSIONS} device_memory_size")
    found = topologies.get_topology_desc(platform="cuda", topology="1x1x8", target_config=device)
    run = SFTTrainer(get_config(written), "plan", devices=found.devices)
    lowered = run.step.lower(run.run.state_shapes, run.layout.batch_shapes(TOKENS))
    # With its Triton products, a GPU is there to measure which are faster.
    texts = {
        name: lowered.compile(compiler_options=options).as_text()
        for name, options in {"cublas": {"xla_gpu_enable_triton_gemm": False}, "all": {}}.items()
    }
    print(json.dumps({
        "cublas": CUBLAS.findall(texts["cublas"]),
        "triton": sum(" dot(" in part and "f8e" in part for part in texts["all"].split("\n\n")),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
