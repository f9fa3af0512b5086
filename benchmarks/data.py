"""Compares preparing training data with `datasets.map` and TRL's packing on the same records.

    python benchmarks/data.py                     needs the packages trl and accelerate
    nice -n 19 python benchmarks/data.py --no-trl

Each side runs in its own process with an empty cache; they take turns. The records are the chats of
the quick start with its tokenizer: rendered, tokenised with a mask of the assistant's tokens, and
packed best-fit into sequences of 2048. Also measures a start with a warm cache, the rate of batches
of 4096 relative to a training step, and the memory of a process that prepared few and many records.
Prints tokens per second and the ratios.
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

ROOT = Path(__file__).resolve().parents[1]
ROW_TOKENS, FEED_TOKENS = 2048, 4096
FEED_BATCHES, FEED_ROWS = 200, 4
STEP_TOKENS_PER_S = 174.6  # the highest measured with cpu_step.py; see README.md
MARKED_TEMPLATE = (  # ChatML with generation marks around trained text, which TRL needs
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
)


def write_inputs(folder: Path) -> None:
    """Writes the records and the tokenizer of the quick start."""
    from jaxtrain import registry
    from jaxtrain.model_folder import find_model_files
    from jaxtrain.recipe.resolve import get_config
    from jaxtrain.tokenizer import load_tokenizer

    config = get_config(ROOT / "recipes" / "quickstart.yaml")
    tokenizer = load_tokenizer(config.tokenizer, find_model_files(config.model).path)
    tokenizer.save_pretrained(folder / "tokenizer")
    source = config.data.sources[0]
    rows = registry.find("data_source", source.type)(source).read("train")
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(len(rows)):
            file.write(json.dumps(rows[index]) + "\n")


def prepare(folder: Path, sequence_tokens: int):
    """Prepares batches from the file; returns them and the seconds that it took."""
    from transformers import AutoTokenizer

    from jaxtrain.data import BatchShape, JsonLinesSource, SFTDataFactory
    from jaxtrain.recipe.data import LocalDataSourceConfig, SFTDataConfig

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    source = JsonLinesSource(LocalDataSourceConfig(path=str(folder / "rows.jsonl")))
    config = SFTDataConfig(sources=("rows",), pack_samples=True, overlong="truncate", num_proc=2)
    began = time.perf_counter()
    data = SFTDataFactory(config, tokenizer, sequence_tokens).prepare(
        [source], {}, BatchShape(1, FEED_ROWS)
    )
    return data, time.perf_counter() - began


def side_jaxtrain(folder: Path) -> dict[str, float]:
    data, seconds = prepare(folder, ROW_TOKENS)
    counts = data.ledger.sets[0]
    return {"seconds": seconds, "tokens": counts.tokens, "trained": counts.trained_tokens,
            "fill": counts.fill}  # fmt: skip


def side_trl(folder: Path) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer
    from trl.data_utils import pack_dataset

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = MARKED_TEMPLATE

    def encode(row):
        found = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            truncation=True, max_length=ROW_TOKENS,
        )  # fmt: skip
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    began = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    rows = rows.map(encode, remove_columns=rows.column_names, num_proc=2)
    packed = pack_dataset(rows, ROW_TOKENS, "bfd")
    seconds = time.perf_counter() - began
    tokens = sum(map(len, packed["input_ids"]))
    return {"seconds": seconds, "tokens": tokens,
            "trained": sum(map(sum, packed["assistant_masks"])),
            "fill": tokens / len(packed) / ROW_TOKENS}  # fmt: skip


def side_warm(folder: Path) -> dict[str, float]:
    """Starts the same run twice in one process; times the second start."""
    prepare(folder, ROW_TOKENS)
    data, seconds = prepare(folder, ROW_TOKENS)
    assert data.ledger.notes[0].startswith("cache: hit"), data.ledger.notes
    return {"seconds": seconds}


def side_feed(folder: Path) -> dict[str, float]:
    data, _ = prepare(folder, FEED_TOKENS)
    batches = data.train_batches(0, FEED_BATCHES + 8)
    for _ in range(8):
        next(batches)
    began = time.perf_counter()
    tokens = sum(int(batch.segments.astype(bool).sum()) for batch in batches)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def side_memory(folder: Path, rows: int) -> dict[str, float]:
    """Anonymous memory of the process after preparing all rows and some batches: pages of mapped
    files do not count, since the system can drop them."""
    from transformers import AutoTokenizer

    from jaxtrain.data import BatchShape, SFTDataFactory, SyntheticSource
    from jaxtrain.recipe.data import SFTDataConfig, SyntheticDataSourceConfig

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = SFTDataConfig(sources=("synthetic",), num_proc=1)
    source = SyntheticSource(SyntheticDataSourceConfig(rows=rows))
    data = SFTDataFactory(config, tokenizer, 256).prepare([source], {}, BatchShape(1, FEED_ROWS))
    for _ in data.train_batches(0, 100):
        pass
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(line for line in status if line.startswith("RssAnon"))
    return {"megabytes": int(own.split()[1]) / 1024}


def run(folder: Path, side: str, rows: int = 0) -> dict[str, float]:
    """Runs one side in its own process, with an empty cache."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = os.environ | {
            "JAXTRAIN_CACHE": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--rows", str(rows)], env=environment, capture_output=True, text=True
        )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path, rounds: int, sides: tuple[str, ...]) -> dict[str, float]:
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for round_ in range(rounds):
        for side in sides:
            found = run(folder, side)
            rates[side].append(found["tokens"] / found["seconds"])
            print(
                f"round {round_ + 1}  {side:9} {rates[side][-1]:10,.0f} tokens/s  "
                f"{found['tokens']:,.0f} tokens, {found['trained']:,.0f} trained, "
                f"filled {found['fill']:.2%}",
                flush=True,
            )
    return {side: statistics.median(values) for side, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-trl", action="store_true", help="only the jaxtrain side")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--cpu-step", type=Path, help="the file that cpu_step.py --json wrote")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        sides = {"jaxtrain": side_jaxtrain, "trl": side_trl, "warm": side_warm, "feed": side_feed}
        one = sides.get(args.side) or (lambda folder: side_memory(folder, args.rows))
        print(json.dumps(one(args.folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        rates = compare(folder, args.rounds, ("jaxtrain",) if args.no_trl else ("jaxtrain", "trl"))
        if "trl" in rates:
            print(f"ratio jaxtrain / datasets.map + TRL: {rates['jaxtrain'] / rates['trl']:.2f}")
        rates["warm_seconds"] = run(folder, "warm")["seconds"]
        print(f"start with a warm cache: {rates['warm_seconds']:.2f} s")
        fed = run(folder, "feed")
        rates["feed"] = fed["tokens"] / fed["seconds"]
        step = STEP_TOKENS_PER_S
        if args.cpu_step:
            step = json.loads(args.cpu_step.read_text())["tokens_per_sec"]["jaxtrain"]
        print(
            f"feed at {FEED_TOKENS}: {rates['feed']:,.0f} tokens/s, {rates['feed'] / step:,.0f} "
            f"times the {step:.1f} of a CPU step"
        )
        for rows in (1_000, 100_000):
            rates[f"megabytes_{rows}"] = run(folder, "memory", rows)["megabytes"]
            print(f"memory with {rows:,} rows prepared: {rates[f'megabytes_{rows}']:,.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2))


if __name__ == "__main__":
    main()
