"""Compares greedy decoding of jaxtrain and of transformers' `generate`, in turn on one machine.

    python benchmarks/generate.py      SmolLM2-135M shape, float32, prompts of 64, 128 new tokens

Both sides read the same folder of random weights and continue the same prompts, and their tokens
are compared. Each runs in a process of its own; its first call, which compiles, is not measured.
Prints new tokens per second, and the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpu_step import COMMON, PRESETS, write_inputs

PROMPT_TOKENS, NEW_TOKENS, CALLS = 64, 128, 3
BATCHES = (1, 8)
PRESET = PRESETS["smollm2-135m"]


def prompts_of(batch: int) -> list[list[int]]:
    return [
        [4 + (37 * row + 101 * at) % 1990 for at in range(PROMPT_TOKENS)] for row in range(batch)
    ]


def write_model(folder: Path) -> None:
    """A folder with a tokenizer and random weights, written by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_inputs(folder, PRESET, steps=1)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(COMMON | PRESET["config"]))).save_pretrained(folder)


def jaxtrain_side(folder: Path) -> Callable[[int], list[list[int]]]:
    import jax

    from jaxtrain.generate import load_speaker
    from jaxtrain.model.generate import generate

    speaker = load_speaker(str(folder), is_raw=True)

    def reply(batch: int) -> list[list[int]]:
        with jax.set_mesh(speaker.run.mesh):
            return generate(*speaker.prepared, prompts_of(batch), max_new_tokens=NEW_TOKENS)

    return reply


def transformers_side(folder: Path) -> Callable[[int], list[list[int]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def generate(batch: int) -> list[list[int]]:
        prompts = torch.tensor(prompts_of(batch))
        with torch.inference_mode():
            tokens = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        return tokens[:, PROMPT_TOKENS:].tolist()

    return generate


SIDES = {"jaxtrain": jaxtrain_side, "transformers": transformers_side}


def measure(side: str, folder: Path) -> dict[str, list]:
    """New tokens per second and the tokens, by size of the batch."""
    generate, found = SIDES[side](folder), {}
    for batch in BATCHES:
        tokens = generate(batch)  # compiles
        seconds = []
        for _ in range(CALLS):
            began = time.perf_counter()
            generate(batch)
            seconds.append(time.perf_counter() - began)
        found[str(batch)] = [batch * NEW_TOKENS / statistics.median(seconds), tokens]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        (args.folder / f"{args.side}.json").write_text(json.dumps(measure(args.side, args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        ratios: dict[str, list[float]] = {str(batch): [] for batch in BATCHES}
        for round_ in range(args.rounds):
            found = {}
            for side in SIDES:
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
                found[side] = json.loads((folder / f"{side}.json").read_text())
            for batch, of_batch in ratios.items():
                (ours, tokens), (theirs, expected) = (found[side][batch] for side in SIDES)
                of_batch.append(ours / theirs)
                same = "equal" if tokens == expected else "DIFFERENT"
                print(
                    f"round {round_ + 1}  batch {batch}  jaxtrain {ours:7.1f} tokens/s  "
                    f"transformers {theirs:7.1f}  ratio {ours / theirs:.2f}  tokens {same}",
                    flush=True,
                )
        for batch, of_batch in ratios.items():
            print(
                f"ratio jaxtrain / transformers, batch {batch}: {statistics.median(of_batch):.2f}"
            )


if __name__ == "__main__":
    main()
