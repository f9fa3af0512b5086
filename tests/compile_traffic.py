"""Compile the packed step of a Llama for devices that are not here; prints what a device reads and
writes in its memory in one step, and how long that takes at best: by the part of the package that
asks for it, then by phase and kind of work in the layers and in the loss.

    python tests/compile_traffic.py h200 '{"size": "8b", "mesh": {"fsdp": 8}}'

The arguments and the environment are those of `compile_collectives.py`. A fusion reads its inputs and
writes its outputs once, of an array of which it takes or replaces a slice that slice alone; so does a
Pallas kernel, though what its blocks read again may have left the cache. On GPU an operation takes the
longer of its products at the peak and its bytes at the bandwidth, on TPU the cycles that the compiler
estimates, which it does for no Pallas kernel and no collective.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from tests.compile_ahead import topology
from tests.compile_collectives import BYTES, lower_step

PARTS = {
    "kernels/attention/": "attention", "kernels/cross_entropy": "loss",
    "kernels/product": "products of layers and loss", "model/": "layers", "trainer/": "update",
}  # fmt: skip
WORK = {
    "normalize": "norms", "standardize": "norms", "rotate": "rope", "mlp": "activation",
    "Block.__call__": "residual", "MLP.__call__": "residual", "_score": "scores",
    "_d_total": "gradients of logits", "summed": "sums over devices",
}  # fmt: skip
"""Function → what it computes; of a product, and of all else, by what the operation is."""
FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "parameter", "partition-id",
    "tuple",
}  # fmt: skip
VIEWS = {"bitcast", "reshape"}
WRAPPERS = {"bitcast", "copy", "convert", "reshape"}
SLICES = {"dynamic-slice", "slice", "gather"}
PRODUCTS = {"dot", "convolution"}
H200 = 989e12, 4.8e12
"""FLOP and bytes per second."""
V5E_HZ = 1.5e9


class Op(NamedTuple):
    name: str
    type: str
    kind: str
    operands: list[str]
    rest: str
    """attributes; of a parameter its number"""


class Computation(NamedTuple):
    ops: dict[str, Op]
    root: Op


class Cost(NamedTuple):
    """Of one operation, in all the turns of its loops."""

    op: Op
    times: int
    part: str
    phase: str
    work: str
    num_bytes: int
    flops: int
    cycles: int

    @property
    def seconds(self) -> float:
        if self.cycles:
            return self.cycles / V5E_HZ
        return max(self.flops / H200[0], self.num_bytes / H200[1])


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a compiled program by name, and the name of the first."""
    found: dict[str, dict[str, Op]] = {}
    roots: dict[str, Op] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            name = head[2]
            found[name], entry = {}, name if head[1] else entry
        elif one := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$", line):
            inside, rest = split_operands(one[5])
            number = inside if one[4] in ("parameter", "constant") else rest
            op = Op(one[2], one[3], one[4], re.findall(r"%([\w.\-]+)", inside), number)
            found[name][op.name] = op
            if one[1]:
                roots[name] = op
    return {name: Computation(ops, roots[name]) for name, ops in found.items() if ops}, entry


def split_operands(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes, and what follows."""
    depth = 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth < 0:
            return text[:place], text[place:]
    raise ValueError(f"no end of operands in {text[:80]}")


def num_bytes(of_type: str) -> int:
    """In the memory of a device, not in the part of a TPU that is nearer, S(1)."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?", of_type)
    sizes = (BYTES.get(d, 0) * prod(map(int, s.split(","))) if s else 0 for d, s, _ in arrays)
    return sum(n for n, (_, _, layout) in zip(sizes, arrays, strict=True) if "S(1)" not in layout)


def fusion_bytes(body: Computation, inputs: list[int]) -> int:
    """`inputs` are the bytes of its parameters."""
    users: dict[str, list[Op]] = {name: [] for name in body.ops}
    for op in body.ops.values():
        for operand in op.operands:
            users[operand].append(op)

    def read(op: Op, most: int) -> int:
        total = 0
        for use in users[op.name]:
            if use.kind in VIEWS:
                total += read(use, most)
            elif use.kind in SLICES and use.operands[0] == op.name:
                total += num_bytes(use.type)
            elif use.kind != "dynamic-update-slice" or use.operands[0] != op.name:
                return most
        return min(total, most)

    parameters = (op for op in body.ops.values() if op.kind == "parameter")
    total = sum(read(op, inputs[int(op.rest)]) for op in parameters)
    is_several = body.root.kind == "tuple"
    outputs = [body.ops[name] for name in body.root.operands] if is_several else [body.root]
    return total + sum(output_bytes(body, op) for op in outputs)


def passed_on(op: Op, inputs: list[int]) -> int:
    """Bytes of what a fusion returns as it came: a TPU's fusions take along what is being gathered."""
    if "async_collective" not in op.rest:
        return 0
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.rest)
    return sum(
        inputs[int(at)] for at in set(re.findall(r"\((\d+),", aliased[1] if aliased else ""))
    )


def output_bytes(body: Computation, op: Op) -> int:
    inner = op
    while inner.kind in WRAPPERS and inner.operands:
        inner = body.ops[inner.operands[0]]
    if inner.kind == "dynamic-update-slice":
        return min(num_bytes(op.type), num_bytes(body.ops[inner.operands[1]].type))
    return num_bytes(op.type)


class Frames:
    """Where in the package an operation was asked for."""

    def __init__(self, text: str):
        self.files = dict(re.findall(r'^(\d+) "(.*\.py)"', text, re.M))
        self.functions = dict(re.findall(r'^(\d+) "([^"/]*)"$', text, re.M))
        place = r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+)"
        self.places = {one: (file, name) for one, file, name in re.findall(place, text, re.M)}
        frame = r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
        self.frames = {one: (at, above) for one, at, above in re.findall(frame, text, re.M)}

    def of(self, rest: str) -> Iterator[tuple[str, str]]:
        """(file, function) in the package, the innermost first."""
        known = re.search(r"stack_frame_id=(\d+)", rest)
        frame = known[1] if known else ""
        while frame in self.frames:
            at, above = self.frames[frame]
            file, name = self.places.get(at, ("", ""))
            _, found, file = self.files.get(file, "").rpartition("/jaxtrain/")
            if found:
                yield file, self.functions.get(name, "").rpartition("<locals>.")[2]
            frame = above if above != frame else ""

    def part(self, rest: str) -> str:
        file = next((file for file, _ in self.of(rest)), "")
        return next((part for place, part in PARTS.items() if place in file), "other")

    def work(self, rest: str, kinds: set[str]) -> str:
        if kinds & PRODUCTS:
            return "products"
        names = (name for _, name in self.of(rest))
        return next((WORK[name] for name in names if name in WORK), "copies, casts, slices")


def phase_of(rest: str) -> str:
    label = re.search(r'op_name="([^"]*)"', rest)
    name = label[1] if label else ""
    if "rematted_computation" in name:
        return "recomputed"
    return "backward" if "transpose(" in name else "forward" if "jvp(" in name else "update"


def find_costs(text: str) -> Iterator[Cost]:
    computations, entry = parse(text)
    frames = Frames(text)

    def of_op(op: Op, ops: dict[str, Op], body: Computation | None, times: int) -> Cost:
        sizes = [num_bytes(ops[operand].type) for operand in op.operands]
        inner = list(body.ops.values()) if body else [op]
        if body:
            moved = fusion_bytes(body, sizes) - 2 * passed_on(op, sizes)
        elif op.kind == "dynamic-slice":
            moved = 2 * num_bytes(op.type)
        elif op.kind == "dynamic-update-slice":
            moved = 2 * sizes[1]
        elif op.kind.endswith("-done"):  # counted where it starts
            moved = 0
        else:
            moved = num_bytes(op.type) + sum(sizes)
        flops = sum(dot_flops(one, body.ops if body else ops) for one in inner if one.kind == "dot")
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        return Cost(
            op, times, frames.part(op.rest), phase_of(op.rest),
            frames.work(op.rest, {one.kind for one in inner}),
            times * moved, times * flops, times * int(cycles[1]) if cycles else 0,
        )  # fmt: skip

    def walk(name: str, times: int) -> Iterator[Cost]:
        ops = computations[name].ops
        for op in ops.values():
            called = re.findall(r"(?:body|to_apply|calls|_computation)=%?([\w.\-]+)", op.rest)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", op.rest):
                called += re.findall(r"%([\w.\-]+)", group)
            if op.kind in ("while", "call", "conditional", "async-start"):
                for one in called:
                    yield from walk(one, times * count_turns(op, computations))
            elif op.kind not in FREE:
                body = computations[called[0]] if op.kind == "fusion" else None
                yield of_op(op, ops, body, times)

    yield from walk(entry, 1)


def count_turns(loop: Op, computations: dict[str, Computation]) -> int:
    """As many as there may be: a loop that can end early names the most in its condition."""
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    ops = [*computations[condition[1]].ops.values()] if condition else []
    for fusion in [op for op in ops if op.kind == "fusion"]:
        ops += computations[re.findall(r"calls=%?([\w.\-]+)", fusion.rest)[0]].ops.values()
    ends = [int(op.rest) for op in ops if op.kind == "constant" and op.rest.isdigit()]
    return ends[0] if len(ends) == 1 else 1


def dot_flops(op: Op, ops: dict[str, Op]) -> int:
    sizes = lambda of_type: [int(n) for n in re.findall(r"\[([\d,]*)\]", of_type)[0].split(",")]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    left = sizes(ops[op.operands[0]].type)
    common = [left[int(dim)] for dim in dims[1].split(",")] if dims else []
    return 2 * prod(sizes(op.type)) * prod(common)


def main(target: str, written: dict[str, Any]) -> None:
    chips, file = written.pop("chips", "v5e:2x4"), written.pop("text", None)
    compiled = lower_step(topology(target, chips).devices, written).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if file:
        Path(file).write_text(text)
    print_costs(list(find_costs(text)))
    live = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = {
        "temporaries": memory.temp_size_in_bytes,
        "peak": max(memory.peak_memory_in_bytes, live + memory.temp_size_in_bytes),
    }
    print(json.dumps({part: round(size / 2**30, 2) for part, size in sizes.items()}))


def print_costs(costs: list[Cost]) -> None:
    by_part, by_work = Counter[str](), {}
    for cost in costs:
        by_part[cost.part] += cost.num_bytes
        by_work.setdefault((cost.part, cost.phase, cost.work), []).append(cost)
    print(f"{'part':28} {'phase':11} {'work':22} {'GB':>8} {'ms':>8}  operations")
    for (part, phase, work), some in by_work.items():
        moved, seconds = (sum(getattr(one, of) for one in some) for of in ("num_bytes", "seconds"))
        if moved > 5e8 or seconds > 1e-3:
            start = f"{part:28} {phase:11} {work:22}"
            print(f"{start} {moved / 1e9:8.1f} {seconds * 1e3:8.2f}  {len(some)}")
    print(json.dumps({part: round(size / 1e9, 1) for part, size in by_part.most_common()}))
    whole = {of: sum(getattr(one, of) for one in costs) for of in ("seconds", "cycles", "flops")}
    print(json.dumps({of: float(f"{size:.4g}") for of, size in whole.items()}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
