"""Compile the step of a Llama for a mesh of devices, here or not; prints what its collectives give a
device, by kind and dtype with the largest alone, and the bytes of a device.

    python tests/compile_collectives.py v5e '{"size": "8b", "chips": "v5e:16x16", "mesh": {"fsdp": 256}}'

The environment is that of `compile_with` in test_ahead_of_time.py; `cpu` has the devices that there
are. Other keys are those of the recipe, but for `tokens` of a sequence; `text` names a file for the
compiled program.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain import SFTTrainer, get_config
from tests.compile_adapters import LLAMA_8B
from tests.compile_ahead import topology
from tests.runs import model_folder, recipe

TINY = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_1B = {
    **LLAMA_8B, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {"tiny": (TINY, 64), "1b": (LLAMA_1B, 4096), "8b": (LLAMA_8B, 4096)}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


class Collective(NamedTuple):
    kind: str
    dtype: str
    sizes: tuple[int, ...]
    """of what a device gets, of one of the arrays"""
    name: str
    """in the traced program"""
    times: int
    """that it runs in a step"""

    @property
    def num_bytes(self) -> int:
        return self.times * prod(self.sizes) * BYTES[self.dtype]


def find_collectives(text: str) -> list[Collective]:
    """Those of a compiled program, in which a loop runs as often as its condition says."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    # On TPU the start, the end and what an asynchronous one is fused with are one, of one channel.
    is_fused = "AsyncCollectiveStart" in text
    found: dict[str, list[Collective]] = {}

    def walk(name: str, times: int) -> None:
        for line in bodies[name]:
            if made := re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line):
                channel = re.search(r"channel_id=\d+", line) if is_fused else None
                label = re.search(r'op_name="([^"]*)"', line)
                arrays = re.findall(r"(\w+)\[([\d,]*)\]", made[1])
                if "-start(" in line and made[2] != "all-reduce":
                    arrays = arrays[len(arrays) // 2 :]  # after the operands
                found[f"{channel[0]} {arrays}" if channel else line] = [
                    Collective(
                        made[2], dtype, tuple(int(n) for n in sizes.split(",") if n),
                        label[1] if label else "", times,
                    )
                    for dtype, sizes in arrays if dtype in BYTES
                ]  # fmt: skip
            trips = count_trips(bodies, line) if " while(" in line else 1
            called = re.findall(r"(?:calls|body|to_apply|_computation)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += re.findall(r"[\w.\-]+", group)
            for one in called:
                if one in bodies:
                    walk(one, times * trips)

    walk(entry, 1)
    return [one for several in found.values() for one in several]


def count_trips(bodies: dict[str, list[str]], line: str) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    assert condition
    lines = [*bodies[condition[1]]]
    for called in re.findall(r"calls=%?([\w.\-]+)", "\n".join(lines)):
        lines += bodies[called]
    ends = re.findall(r"constant\((\d+)\)", "\n".join(lines))
    return int(ends[-1]) if len(ends) == 1 else 1


def lower_step(devices: Any, written: dict[str, Any]) -> Any:
    folder = Path(tempfile.mkdtemp())
    config, tokens = MODELS[written.pop("size", "tiny")]
    tokens = written.pop("tokens", tokens)
    written = recipe(folder, data={"max_length": tokens}, **{"micro_batch_size": 1, **written})
    model_folder(folder / "model", **config)
    run = SFTTrainer(get_config(written), "plan", devices=devices)
    return run.step.lower(run.run.state_shapes, run.layout.batch_shapes(tokens))


def main(target: str, written: dict[str, Any]) -> None:
    chips, file = written.pop("chips", "v5e:2x4"), written.pop("text", None)
    devices = jax.devices() if target == "cpu" else topology(target, chips).devices
    compiled = lower_step(devices, written).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if file:
        Path(file).write_text(text)
    found, sums = find_collectives(text), Counter()
    for one in sorted(found, key=lambda one: -one.num_bytes)[:24]:
        shape = f"{one.dtype}{list(one.sizes)}"
        print(
            f"{one.num_bytes / 2**20:10.1f} MiB {one.times:4} {one.kind} {shape} {one.name[-70:]}"
        )
    for one in found:
        sums[one.kind, one.dtype] += one.num_bytes
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    bytes_of = {" ".join(kind): size for kind, size in sums.most_common()}
    bytes_of |= {"temporaries": memory.temp_size_in_bytes, "peak": memory.peak_memory_in_bytes}
    print(json.dumps({**bytes_of, "live": live + memory.temp_size_in_bytes}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
