"""Compile a Llama's step for a mesh of devices, here or not; prints the collectives of the compiled
program, by kind, shape and number, the largest arrays in it, and the bytes of a device."""

import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain import SFTTrainer, get_config
from jaxtrain.plan import device_bytes
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import topology
from tests.runs import model_folder, recipe

TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 64}  # fmt: skip
SMALL = {
    "hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_hidden_layers": 8, "vocab_size": 32768,
    "max_position_embeddings": 2048,
}  # fmt: skip
MODELS = {"tiny": (TINY, 64), "small": (SMALL, 2048), "8b": (LLAMA_8B, 4096)}
KINDS = "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}


class Collective(NamedTuple):
    kind: str
    shape: str
    """of what comes out on a device, such as f32[8,4096]"""
    name: str
    """what it belongs to in the traced program"""


def collectives(text: str) -> Counter[Collective]:
    """How often each runs in a compiled program, whose loops run as often as XLA knows."""
    bodies, entry, name = {}, "", ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif " = " in line:
            bodies[name].append(line)
    found: Counter[Collective] = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies[name]:
            kinds = "|".join(KINDS)
            # A start and its end are one; what a fusion or an async computation calls is in it.
            if made := re.search(rf" = (.*?) ({kinds})(-start)?\(", line):
                shapes = re.findall(r"\w+\[[\d,]*\]", made[1])
                if made[3] and made[2] in ("all-gather", "collective-permute"):
                    shapes = shapes[len(shapes) // 2 :][: len(shapes) // 2 or 1]
                named = re.search(r'op_name="([^"]*)"', line)
                for shape in shapes:
                    if shape.split("[")[0] in BYTES:
                        found[Collective(made[2], shape, named[1] if named else "")] += times
            trips = 1
            if " while(" in line:
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                trips = int(known[1]) if known else 1
            called = re.findall(r"(?:calls|body|to_apply|async_computation)=%?([\w.\-]+)", line)
            for group in re.findall(r"(?:branch_computations)=\{([^}]*)\}", line):
                called += [one.strip().lstrip("%") for one in group.split(",")]
            called += re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", line)
            for one in called:
                if one in bodies:
                    walk(one, times * trips)

    walk(entry, 1)
    return found


def num_bytes(shape: str) -> int:
    kind, sizes = shape.rstrip("]").split("[")
    total = BYTES[kind]
    for size in filter(None, sizes.split(",")):
        total *= int(size)
    return total


def compile_step(devices: Any, size: str, **written: Any) -> tuple[Any, Any]:
    folder = Path(tempfile.mkdtemp())
    config, tokens = MODELS[size]
    tokens = written.pop("tokens", tokens)
    written = recipe(folder, **{"data": {"max_length": tokens}, "micro_batch_size": 1, **written})
    model_folder(folder / "model", **config)
    run = SFTTrainer(get_config(written), "plan", devices=devices)
    shapes = run.run.state_shapes
    return run.step.lower(shapes, run.layout.batch_shapes(tokens)).compile(), shapes


def main(target: str, written: dict[str, Any]) -> None:
    keep = written.pop("keep", None)
    devices = jax.devices() if target == "cpu" else topology(target, written.pop("chips", "v5e:2x4")).devices
    compiled, shapes = compile_step(devices, **written)
    text = compiled.as_text()
    if keep:
        Path(keep).write_text(text)
    report(text, compiled.memory_analysis(), device_bytes(shapes))


def report(text, memory, state) -> None:
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    GiB = 2**30
    found = collectives(text)
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for one, times in found.items():
        sums[one.kind, one.shape.split("[")[0]] += times * num_bytes(one.shape)
        counts[one.kind, one.shape.split("[")[0]] += times
    rows = Counter()
    for one, times in found.items():
        rows[one] = times * num_bytes(one.shape)
    for one, size in rows.most_common(40):
        print(f"{one.kind:18} {found[one]:5} x {one.shape:28} {size / 2**20:10.2f} MiB  {one.name[-110:]}")
    for key, size in sums.most_common():
        print(f"{' '.join(key):24} {counts[key]:6} {size / GiB:8.3f} GiB")
    print(f"state {state / GiB:.2f} temp {memory.temp_size_in_bytes / GiB:.2f} live "
          f"{(live + memory.temp_size_in_bytes) / GiB:.2f} peak {memory.peak_memory_in_bytes / GiB:.2f} GiB")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
