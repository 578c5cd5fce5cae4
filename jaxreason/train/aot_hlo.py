"""Collectives of a compiled module, read from its optimised HLO text.

A loop's body counts as often as the loop turns. Pairs of -start and -done are one collective, and
so is one that the TPU compiler has spread over several fusions (start, steps, done).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16,
    "s32": 32, "u32": 32, "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
    "c64": 64, "c128": 128, "f4e2m1fn": 4, "f8e4m3": 8, "f8e4m3fn": 8, "f8e5m2": 8, "f8e8m0fnu": 8,
    "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e3m4": 8, "token": 0, "opaque": 0,
}  # fmt: skip
KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<= ]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([^\s=]+) = (.*)$")
_CALLS = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its name, result type as text, opcode, what stands in its parentheses and after."""

    name: str
    result: str
    opcode: str
    operands: str
    attributes: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of transfer: `count` times a step, `sent` bytes in all by each chip, over `axes`.

    `group` chips take part in one; `pairs` is true of a permute, which sends to one neighbour.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent: float
    group: int
    members: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    source: str = ""


def type_bytes(text: str) -> float:
    """Bytes of an array type or a tuple of them, layouts ignored."""
    return sum(_array_bytes(kind, dims) for kind, dims in _ARRAY.findall(text))


def _array_bytes(kind: str, dims: str) -> float:
    if kind not in BITS:
        return 0.0
    return BITS[kind] / 8 * math.prod(int(d.strip("<= ")) for d in dims.split(",") if d.strip())


def plain_type(text: str) -> str:
    """A type without its layouts: `f32[8,128]{1,0:T(8,128)}` -> `f32[8,128]`."""
    return re.sub(r"(?<=\])\{[^}]*\}", "", text)


def element(text: str, index: list[int]) -> str:
    """The plain type at a place in a tuple's type, or of an array."""
    for at in index:
        if text.startswith("("):
            text = _split(text[1:-1])[at]
    return plain_type(text)


def _split(text: str) -> list[str]:
    """The parts of a tuple's inside, at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for at, char in enumerate(text):
        depth += (char in "({[") - (char in ")}]")
        if char == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def source(i: Instruction) -> str:
    """The operation of the program that an instruction comes from, as JAX names it."""
    found = re.search(r'op_name="([^"]*)"', i.attributes)
    return found[1] if found else ""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a module, by name, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # A kernel's settings may hold lines that begin with one.
            current = None
        elif current is not None and (found := _LINE.match(line)):
            current.append(_instruction(found[1], found[2]))
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else len(rest.split(" ", 1)[0])
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, opened, _ = rest.partition("(")
    if not opened:
        return Instruction(name, result, opcode, "", "")
    close = _closing(rest, len(opcode))
    return Instruction(name, result, opcode, rest[len(opcode) + 1 : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "({[") - (text[i] in ")}]")
        if depth == 0:
            return i
    return len(text) - 1


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int:
    """How often a while loop turns: as the compiler says, else from its condition and start.

    A loop that neither tells counts once.
    """
    if known := re.search(r'known_trip_count"?[:=]\s*\{"?n"?:"?(\d+)', loop.attributes):
        return int(known[1])
    names = dict(_CALLS.findall(loop.attributes))
    condition = {i.name: i for i in computations.get(names.get("condition", ""), [])}
    body = {i.name: i for i in computations.get(names.get("body", ""), [])}
    for compare in condition.values():
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
            continue
        counter, limit = (condition.get(n) for n in _names(compare.operands))
        if counter is None or limit is None or limit.opcode != "constant":
            continue
        index = re.search(r"index=(\d+)", counter.attributes)
        if index is not None:
            step = _step(int(index[1]), body)
            return max(1, math.ceil(int(limit.operands) / step))
    return 1


def _step(index: int, body: dict[str, Instruction]) -> int:
    """What a loop's body adds to its counter; 1 where it is not a plain sum."""
    roots = [i for i in body.values() if i.opcode == "tuple"]
    if not roots:
        return 1
    parts = _names(roots[-1].operands)
    update = body.get(parts[index]) if index < len(parts) else None
    if update is None or update.opcode != "add":
        return 1
    constants = [body[n].operands for n in _names(update.operands) if n in body
                 and body[n].opcode == "constant"]  # fmt: skip
    return int(constants[0]) if len(constants) == 1 and int(constants[0]) > 0 else 1


def _names(operands: str) -> list[str]:
    """Names of the operands, whose types and comments may be printed too."""
    return re.findall(r"%([\w.\-]+)", operands)


def counts(computations: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in one call of the module."""
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, n: int) -> None:
        times[name] += n
        for instruction in computations.get(name, ()):
            if instruction.opcode.endswith(("-done", "-update")):
                continue  # The pair's start has called it.
            turns = trip_count(instruction, computations) if instruction.opcode == "while" else 1
            for role, callee in _CALLS.findall(instruction.attributes):
                if role != "to_apply" or instruction.opcode == "call":
                    visit(callee, n * turns)
            for several, one in _BRANCHES.findall(instruction.attributes):
                for callee in _names(several) or ([one] if one else []):
                    visit(callee, n)

    visit(entry, 1)
    return times


def groups(attributes: str, devices: int) -> np.ndarray | None:
    """`replica_groups` [groups, members] in any of the forms that XLA prints; None: not there."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        return _mesh_groups(found[1], found[2], attributes[found.end() :])
    if found := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        shape, dims = _ints(found[1]), _ints(found[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(_ints(found[3])) if found[3] else ids).reshape(shape)
    if found := re.search(r"replica_groups=(\{\{.*?\}\}|\{\})", attributes):
        rows = [_ints(row) for row in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.asarray(rows) if rows else np.arange(devices).reshape(1, -1)
    return None


def _mesh_groups(axes: str, chosen: str, after: str) -> np.ndarray:
    """Groups over named axes of a mesh, `'a'=4`, or over parts of one, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    order = np.arange(math.prod(sizes.values()))
    if found := re.match(r",?\s*device_ids=\(([\d,]+)\)", after):
        order = np.asarray(_ints(found[1]))
    parts, wanted = [], []
    picks = {
        name: (int(pre or 1), int(size)) if size else (1, sizes[name])
        for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in sizes.items():
        pre, take = picks.get(name, (size, 1))
        wanted.append(len(parts) + 1)
        parts += [pre, take, size // (pre * take)]
    kept = [i for i in range(len(parts)) if i not in wanted]
    ids = order.reshape(parts).transpose(kept + wanted)
    return ids.reshape(-1, math.prod(parts[i] for i in wanted))


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def axes_of(ids: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; `part of` one that it splits."""
    at = np.unravel_index(ids[0], tuple(mesh.values()))
    varies = {name: len(set(c.tolist())) for name, c in zip(mesh, at, strict=True)}
    return tuple(
        name if n == mesh[name] else f"part of {name}" for name, n in varies.items() if n > 1
    )


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """The collectives of a module over a mesh (axis -> size, devices in its order).

    Equal ones (kind, axes, group, and the operation of the source) are added up; the largest first.
    Bytes are those of ring algorithms: (n-1)/n of the whole for a gather, a scatter and an
    all-to-all, twice that for an all-reduce.
    """
    computations, entry = parse(text)
    times, devices = counts(computations, entry), math.prod(mesh.values())
    started = {
        channel
        for instructions in computations.values()
        if any('"AsyncCollectiveStart"' in i.attributes for i in instructions)
        for i in instructions
        if (channel := _channel(i)) and _kind(i.opcode)
    }
    total: dict[tuple, Collective] = {}
    for name, instructions in computations.items():
        starts = any('"AsyncCollectiveStart"' in i.attributes for i in instructions)
        for i in instructions:
            kind = _kind(i.opcode)
            if kind is None or not times[name] or (_channel(i) in started and not starts):
                continue
            # A sum of which a fusion keeps one slice: its type is that of the whole.
            sliced = kind == "all-reduce" and "all-reduce-scatter" in name
            for found in _one(i, kind, times[name], mesh, devices):
                if sliced:
                    found = dataclasses.replace(found, kind="reduce-scatter", sent=found.sent / 2)
                key = (found.kind, found.axes, found.group, found.source)
                old = total.get(key, dataclasses.replace(found, count=0, sent=0.0))
                total[key] = dataclasses.replace(
                    found, count=old.count + found.count, sent=old.sent + found.sent
                )
    return sorted(total.values(), key=lambda c: (-c.sent, c.kind))


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


def _channel(i: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", i.attributes)
    return found[1] if found else ""


def _one(i: Instruction, kind: str, times: int, mesh, devices: int) -> Iterator[Collective]:
    where, size = source(i), type_bytes(i.result)
    if kind == "collective-permute":
        pairs = [_ints(p) for p in re.findall(r"\{(\d+,\d+)\}", i.attributes.split("}}")[0] + "}}")]
        if i.opcode.endswith("-start"):
            size = type_bytes(_split(i.result[1:-1])[1])
        if moved := [p for p in pairs if p[0] != p[1]]:
            places = np.unravel_index(np.asarray(moved), tuple(mesh.values()))
            named = tuple(a for a, at in zip(mesh, places, strict=True) if np.ptp(at, 1).any())
            group = math.prod(mesh[a] for a in named)
            yield Collective(kind, named, times, times * size, group, tuple(moved[0]), where)
        return
    ids = groups(i.attributes, devices)
    if ids is None or ids.shape[1] < 2:
        return
    n = ids.shape[1]
    if i.opcode.endswith("-start") and kind != "all-reduce":
        size = type_bytes(_split(i.result[1:-1])[1])  # Behind the operands.
    share = (n - 1) / n
    factor = {"all-reduce": 2 * share, "reduce-scatter": n - 1.0, "collective-broadcast": 1.0}
    sent = times * size * factor.get(kind, share)
    members = tuple(int(d) for d in ids[0])
    yield Collective(kind, axes_of(ids, mesh), times, sent, n, members, where)
