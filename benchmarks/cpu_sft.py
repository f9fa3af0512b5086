"""Compares fine-tuning on real chats with TRL's SFTTrainer, in turn on one machine.

    python benchmarks/cpu_sft.py                  needs the packages trl and accelerate
    python benchmarks/cpu_sft.py --dtype bf16     jaxtrain in bfloat16; the sides of TRL as they are

The chats of the quick start that have at most 512 tokens, of all lengths below, and a model of
SmolLM2-135M's shape, which every side reads from the same folder. jaxtrain packs and has the
quick start's `remat: dots`; TRL takes eight chats a step and pads them, as it does where nothing is
said (bfloat16 by autocast, gradient checkpointing), the same in float32, and with its own packing.
All train the assistant's tokens alone.

Each side is a process of its own, whose lines are timed from outside. Prints the seconds from the
command to the end of the first step, and the trained tokens per second from there to the end of
the last; the first round compiles, and the ratios are of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cpu_step import COMMON, DTYPES, PRESETS
from data import MARKED_TEMPLATE, write_inputs

MAX_TOKENS = 512
CHATS = 8
"""Of a step of TRL, as where nothing is said; they have about as many tokens as ROWS full rows."""
ROWS = 4
TRL: dict[str, dict] = {
    "trl": {"per_device_train_batch_size": CHATS},
    "trl-float32": {"per_device_train_batch_size": CHATS, "bf16": False},
    "trl-packed": {"per_device_train_batch_size": ROWS, "packing": True},
}
SIDES = ("jaxtrain", *TRL)


def write_folder(folder: Path) -> None:
    """Writes a model with its tokenizer, and the chats that are short enough."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    write_inputs(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    config = COMMON | PRESETS["smollm2-135m"]["config"]
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open() as rows, (folder / "short.jsonl").open("w") as kept:
        for line in rows:
            found = tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=True)
            if len(found["input_ids"]) <= MAX_TOKENS:
                kept.write(line)


def write_recipe(folder: Path, steps: int, dtype: str) -> Path:
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": dtype, "remat": "dots"},
        "data": {
            "sources": [str(folder / "short.jsonl")], "max_length": MAX_TOKENS,
            "pack_samples": True,
        },
        "micro_batch_size": ROWS,
        "train_iters": steps,
    }  # fmt: skip
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe))
    return file


def train_with_trl(side: str, folder: Path, steps: int) -> None:
    """Prints `step N` at the end of each, and the trained tokens of all in a file."""
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            print(f"step {state.global_step}", flush=True)

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = MARKED_TEMPLATE
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_length=MAX_TOKENS, max_steps=steps, save_strategy="no",
        report_to="none", assistant_only_loss=True, use_cpu=True, disable_tqdm=True, **TRL[side],
    )  # fmt: skip
    rows = datasets.load_dataset("json", data_files=str(folder / "short.jsonl"), split="train")
    trainer = SFTTrainer(
        str(folder / "model"), config, train_dataset=rows, processing_class=tokenizer,
        callbacks=[Steps()],
    )  # fmt: skip
    collate, trained = trainer.data_collator, []

    def count(examples: list) -> dict:  # in the order of the steps
        batch = collate(examples)
        trained.append(int((batch["labels"] != -100).sum()))
        return batch

    trainer.data_collator = count
    trainer.train()
    (folder / f"{side}.json").write_text(json.dumps(trained[:steps]))


def run(side: str, folder: Path, steps: int, dtype: str) -> tuple[float, float]:
    """Seconds to the first step, and trained tokens per second from there on."""
    run_dir = folder / f"run-{time.time_ns()}"
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--steps", str(steps)]
    if side == "jaxtrain":
        recipe = write_recipe(folder, steps, dtype)
        command = [sys.executable, "-m", "jaxtrain", str(recipe), f"run_dir={run_dir}"]
    own = {
        "JAX_PLATFORMS": "cpu", "JAXTRAIN_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    began, ends, said = time.perf_counter(), [], []
    with subprocess.Popen(
        command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if line.startswith("step "):
                ends.append(time.perf_counter() - began)
    if process.returncode or len(ends) != steps:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(said)[-3000:]}")
    if side == "jaxtrain":
        rows = map(json.loads, (run_dir / "train-log-metrics.jsonl").open())
        trained = [row["trained_tokens"] for row in rows if "trained_tokens" in row]
    else:
        trained = json.loads((folder / f"{side}.json").read_text())
    return ends[0], sum(trained[1:]) / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of jaxtrain")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--side", choices=TRL, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        train_with_trl(args.side, args.folder, args.steps)
        return
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in args.sides}
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name))
        for round_ in range(args.rounds):
            for side, figures in found.items():
                figures.append(run(side, Path(name), args.steps, DTYPES[args.dtype]))
                print(
                    f"round {round_ + 1}  {side:11}  first step after {figures[-1][0]:5.1f} s  "
                    f"{figures[-1][1]:6.1f} trained tokens/s",
                    flush=True,
                )
    rates = {side: statistics.median(rate for _, rate in of) for side, of in found.items()}
    for side in rates:
        if side != "jaxtrain" and "jaxtrain" in rates:
            print(f"ratio jaxtrain / {side}: {rates['jaxtrain'] / rates[side]:.2f}")
    if args.json:
        firsts = {side: [first for first, _ in of] for side, of in found.items()}
        args.json.write_text(json.dumps({"trained_per_s": rates, "first_step_s": firsts}))


if __name__ == "__main__":
    main()
