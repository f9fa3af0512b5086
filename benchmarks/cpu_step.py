"""Compares a full fine-tuning step of jaxtrain and transformers + torch, in turn on one machine.

    python benchmarks/cpu_step.py                        SmolLM2-135M shape, 2 x 512, float32, CPU
    python benchmarks/cpu_step.py --dtype bf16           the same in bfloat16; autocast in torch
    python benchmarks/cpu_step.py --preset llama-1.2b    1.2B Llama shape, 4 x 4096, bfloat16, GPU

Each side runs in its own process, started as a user would: `python -m jaxtrain recipe.yaml`, and a
plain loop over `LlamaForCausalLM` with AdamW. A step is forward, backward, clipping and update on
random weights; the first two are not measured. Prints tokens per second, peak memory of the
process, and their ratios.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PRESETS = {
    "smollm2-135m": {
        "config": {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
            "vocab_size": 49152, "rope_theta": 100000.0,
            "tie_word_embeddings": True,
        },
        "rows": 2, "tokens": 512, "dtype": "float32", "remat": "dots", "device": "cpu",
    },
    "llama-1.2b": {
        "config": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "vocab_size": 128256, "rope_theta": 500000.0, "tie_word_embeddings": True,
        },
        "rows": 4, "tokens": 4096, "dtype": "bfloat16", "remat": "full", "device": "cuda",
    },
}  # fmt: skip
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "attention_bias": False,
    "mlp_bias": False, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
WARMUP_STEPS = 2
DTYPES = {"float32": "float32", "bf16": "bfloat16"}


def write_inputs(folder: Path, preset: dict, steps: int, peft: dict | None = None) -> Path:
    """Writes a model folder without weights, conversations, and the recipe, with `peft` one of
    adapters; returns the recipe."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(2000)]
    specials = ["<unk>", "<|end|>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: i for i, word in enumerate([*specials, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "config.json").write_text(json.dumps(COMMON | preset["config"]))

    rng = random.Random(0)
    say = lambda n: " ".join(rng.choices(words, k=n))
    rows = preset["rows"] * steps + 1
    with (folder / "rows.jsonl").open("w") as stream:
        for _ in range(rows):
            turns = [("user", say(64)), ("assistant", say(preset["tokens"] - 64 - 4))]
            messages = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "model": {
            "name_or_path": str(folder), "from_scratch": True, "dtype": preset["dtype"],
            "remat": preset["remat"], "peft_config": peft and {"peft_type": "Lora", **peft},
        },
        "data": {
            "sources": [str(folder / "rows.jsonl")], "max_length": preset["tokens"],
            "pack_samples": True,
        },
        "micro_batch_size": preset["rows"],
        "train_iters": steps,
    }  # fmt: skip
    file = folder / "recipe.json"  # JSON is YAML
    file.write_text(json.dumps(recipe))
    return file


def torch_steps(preset: dict, steps: int, peft: dict | None) -> list[float]:
    """Seconds per step of the plain torch loop."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = torch.device(preset["device"])
    model = LlamaForCausalLM(LlamaConfig(**(COMMON | preset["config"]))).to(device)
    if preset["remat"] == "full":
        model.gradient_checkpointing_enable()
    if peft is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **peft))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.1)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=preset["dtype"] == "bfloat16")
    shape = (preset["rows"], preset["tokens"])
    seconds = []
    for _ in range(steps):
        ids = torch.randint(0, 2000, shape, device=device)
        began = time.perf_counter()
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - began)
    return seconds


def read_preset(args: argparse.Namespace) -> dict:
    preset = PRESETS[args.preset]
    return preset | {"dtype": DTYPES.get(args.dtype, preset["dtype"])}


def run_jaxtrain(args: argparse.Namespace) -> tuple[list[float], float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        preset = read_preset(args)
        recipe = write_inputs(folder, preset, args.steps, args.peft)
        command = [sys.executable, "-m", "jaxtrain", str(recipe), f"run_dir={folder / 'run'}"]
        peak = run(command, {"JAX_PLATFORMS": "cpu"} if preset["device"] == "cpu" else {})
        rows = [json.loads(line) for line in (folder / "run/train-log-metrics.jsonl").open()]
        return [row["step_time"] for row in rows if "step_time" in row], peak


def run_torch(args: argparse.Namespace) -> tuple[list[float], float]:
    with tempfile.NamedTemporaryFile() as file:
        options = ["--torch", file.name, "--preset", args.preset, "--steps", str(args.steps)]
        options += ["--dtype", args.dtype] if args.dtype else []
        options += ["--peft", json.dumps(args.peft)]
        peak = run([sys.executable, __file__, *options], {})
        return json.loads(Path(file.name).read_text()), peak


def run(command: list[str], environment: dict[str, str]) -> float:
    """Runs a command to its end; returns its peak resident memory in GB."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read()[-3000:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main(description: str | None = __doc__, peft: dict | None = None) -> None:
    """Compares full steps, or with `peft` those of adapters."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="smollm2-135m")
    parser.add_argument("--dtype", choices=DTYPES, help="in place of the preset's")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--torch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peft", type=json.loads, default=peft, help=argparse.SUPPRESS)
    args = parser.parse_args()
    preset = read_preset(args)
    if args.torch:
        args.torch.write_text(json.dumps(torch_steps(preset, args.steps, args.peft)))
        return
    tokens = preset["rows"] * preset["tokens"]
    sides = {"jaxtrain": run_jaxtrain, "torch": run_torch}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(args.rounds):
        for name, side in sides.items():
            seconds, peak = side(args)
            rates[name].append(tokens / statistics.median(seconds[WARMUP_STEPS:]))
            peaks[name].append(peak)
            rate = f"{rates[name][-1]:10,.1f} tokens/s"
            print(f"round {round_ + 1}  {name:9} {rate}  peak {peak:.2f} GB", flush=True)
    ratios = [a / b for a, b in zip(rates["jaxtrain"], rates["torch"], strict=True)]
    figures = {
        "preset": args.preset,
        "dtype": preset["dtype"],
        "tokens_per_sec": {name: statistics.median(values) for name, values in rates.items()},
        "ratio": statistics.median(ratios),
        "peak_gb": {name: max(values) for name, values in peaks.items()},
        "peak_ratio": max(peaks["jaxtrain"]) / max(peaks["torch"]),
    }
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(
        f"ratio jaxtrain / torch: speed {figures['ratio']:.2f} (rounds: {rounds}), "
        f"peak memory {figures['peak_ratio']:.2f}"
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
