"""Compile the packed step of a Llama for devices that are not here; prints the GB that a device reads
and writes in its memory in one step, by the part of the package that asks for them.

    python tests/compile_traffic.py h200 '{"size": "8b", "mesh": {"fsdp": 8}}'

The arguments and the environment are those of `compile_collectives.py`. A fusion reads its inputs and
writes its outputs once, of an array of which it takes or replaces a slice that slice alone; so does a
Pallas kernel, though what its blocks read again may have left the cache.
"""

import json
import re
import sys
from collections import Counter
from math import prod
from typing import Any, NamedTuple

from tests.compile_ahead import topology
from tests.compile_collectives import BYTES, compile_step

PARTS = {
    "kernels/attention/": "attention", "kernels/cross_entropy": "loss",
    "kernels/product": "products of layers and loss", "model/": "layers", "trainer/": "update",
}  # fmt: skip
FREE = {
    "after-all", "bitcast", "constant", "get-tuple-element", "iota", "parameter", "partition-id",
    "tuple",
}  # fmt: skip
WRAPPERS = {"bitcast", "copy", "convert"}


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
            number = inside if one[4] == "parameter" else rest
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
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", of_type)
    return sum(BYTES.get(d, 0) * prod(int(n) for n in s.split(",") if n) for d, s in arrays)


def fusion_bytes(body: Computation, inputs: list[int]) -> int:
    """`inputs` are the bytes of its parameters."""
    users: dict[str, list[Op]] = {name: [] for name in body.ops}
    for op in body.ops.values():
        for operand in op.operands:
            users[operand].append(op)
    total = 0
    for op in body.ops.values():
        if op.kind != "parameter":
            continue
        kinds = {use.kind if use.operands[0] == op.name else "other" for use in users[op.name]}
        if kinds == {"dynamic-slice"}:
            total += sum(num_bytes(use.type) for use in users[op.name])
        elif kinds != {"dynamic-update-slice"}:
            total += inputs[int(op.rest)]
    is_several = body.root.kind == "tuple"
    outputs = [body.ops[name] for name in body.root.operands] if is_several else [body.root]
    return total + sum(output_bytes(body, op) for op in outputs)


def output_bytes(body: Computation, op: Op) -> int:
    inner = op
    while inner.kind in WRAPPERS and inner.operands:
        inner = body.ops[inner.operands[0]]
    if inner.kind == "dynamic-update-slice":
        return num_bytes(body.ops[inner.operands[1]].type)
    return num_bytes(op.type)


class Frames:
    """Where in the package an operation was asked for."""

    def __init__(self, text: str):
        self.files = dict(re.findall(r'^(\d+) "(.*\.py)"', text, re.M))
        self.locations = dict(re.findall(r"^(\d+) \{file_name_id=(\d+)", text, re.M))
        frame = r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?"
        self.frames = {one: (at, above) for one, at, above in re.findall(frame, text, re.M)}

    def part(self, rest: str) -> str:
        known = re.search(r"stack_frame_id=(\d+)", rest)
        frame = known[1] if known else ""
        while frame in self.frames:
            at, above = self.frames[frame]
            _, found, file = self.files.get(self.locations.get(at, ""), "").rpartition("/jaxtrain/")
            if found:
                return next((part for place, part in PARTS.items() if place in file), "other")
            frame = above if above != frame else ""
        return "other"


def count_traffic(text: str) -> Counter[str]:
    """Bytes by part."""
    computations, entry = parse(text)
    frames, total = Frames(text), Counter[str]()

    def walk(name: str, times: int) -> None:
        ops = computations[name].ops
        for op in ops.values():
            sizes = [num_bytes(ops[operand].type) for operand in op.operands]
            called = re.findall(r"(?:body|to_apply|calls|_computation)=%?([\w.\-]+)", op.rest)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", op.rest):
                called += re.findall(r"%([\w.\-]+)", group)
            if op.kind in ("while", "call", "conditional", "async-start"):
                trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', op.rest)
                for one in called:
                    walk(one, times * int(trips[1] if trips else 1))
            elif op.kind == "fusion":
                total[frames.part(op.rest)] += times * fusion_bytes(computations[called[0]], sizes)
            elif op.kind == "dynamic-slice":
                total[frames.part(op.rest)] += times * 2 * num_bytes(op.type)
            elif op.kind == "dynamic-update-slice":
                total[frames.part(op.rest)] += times * 2 * sizes[1]
            elif op.kind not in FREE:
                total[frames.part(op.rest)] += times * (num_bytes(op.type) + sum(sizes))

    walk(entry, 1)
    return total


def main(target: str, written: dict[str, Any]) -> None:
    chips = written.pop("chips", "v5e:2x4")
    compiled = compile_step(topology(target, chips).devices, written)
    moved = count_traffic(compiled.as_text())
    print(json.dumps({part: round(size / 1e9, 1) for part, size in moved.most_common()}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
