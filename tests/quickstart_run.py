"""Run the quick start in this process, then ask the trained model and its export the same question.

Prints as JSON: held-out loss before and after, largest difference of logits, and both answers.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtrain import Batch, SFTTrainer, get_config
from jaxtrain.metrics.writer import read_rows

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


def main(folder: Path) -> None:
    config = get_config(RECIPE, [f"run_dir={folder}/run", f"checkpoint.output_dir={folder}/out"])
    trainer = SFTTrainer(config)
    step = trainer.train().global_step
    rows = read_rows(folder / "run" / "train-log-metrics.jsonl")
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    answers = [row["answer"] for row in rows if "answer" in row]

    export = folder / "out" / f"global_step_{step}"
    tokenizer = AutoTokenizer.from_pretrained(export)
    ids = np.array([tokenizer("The weekend was lovely, and we went to the beach.")["input_ids"]])
    ones = np.ones_like(ids, np.int32)
    positions = np.arange(ids.shape[1], dtype=np.int32)[None]
    batch = Batch(ids.astype(np.int32), positions, ones, ones.astype(np.float32), ones[:, 0])
    with jax.set_mesh(trainer.mesh):
        ours = jax.jit(lambda p, b: trainer.language_model.merge(p)(b))(trainer.state.params, batch)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    difference = float(np.abs(np.asarray(ours) - theirs).max())
    print(json.dumps({"losses": losses, "logits_difference": difference, "answers": answers}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
