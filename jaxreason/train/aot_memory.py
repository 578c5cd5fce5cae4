"""Why a step does not fit: bytes needed and there, and the largest arrays by name."""

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
from typing import Any

import jax

from jaxreason.train import aot_hlo


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A large array of a step: bytes a device, type and shape, and the operation it is from."""

    bytes: float
    shape: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """A step does not fit: bytes a device that it needs and that are there.

    `arguments` and `temporaries` make up what is needed; `buffers` are the largest of those that
    live at the peak, the largest first.
    """

    arguments: float
    temporaries: float
    limit: float
    buffers: tuple[Buffer, ...]

    @property
    def needed(self) -> float:
        """Bytes needed."""
        return self.arguments + self.temporaries


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+[KMGT]?)i?B?"
# The compiler says either what the temporaries need, or what they and the arguments do.
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_ALL = re.compile(rf"[Uu]sed {_SIZE} of {_SIZE} hbm")
_LISTED = re.compile(
    r"Size: (?P<size>[\d.]+[KMGT]?)\n(?:\s+Operator: op_name=\"(?P<name>[^\"]*)\"[^\n]*\n)?"
    r"\s+Shape: (?P<shape>[a-z]\w*\[[\d,]*\])"
)
_LIVE = re.compile(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes \(cumulative", re.MULTILINE)


def _bytes(text: str) -> float:
    unit = text[-1] if text[-1] in _UNITS else ""
    return float(text.removesuffix(unit)) * _UNITS[unit]


def read_message(message: str, arguments: float, limit: float) -> OutOfMemory:
    """What the compiler's message tells; `arguments` and `limit` hold where it does not."""
    temporaries, there = math.nan, limit
    if found := _TEMPORARIES.search(message):
        temporaries, there = _bytes(found[1]), _bytes(found[2])
    elif found := _ALL.search(message):
        temporaries, there = _bytes(found[1]) - arguments, _bytes(found[2])
    listed = {
        Buffer(_bytes(found["size"]), found["shape"], found["name"] or "")
        for found in _LISTED.finditer(message)
    }
    buffers = tuple(sorted(listed, key=lambda b: (-b.bytes, b.name)))
    return OutOfMemory(arguments=arguments, temporaries=temporaries, limit=there, buffers=buffers)


def explain(lowered: Any, message: str, arguments: float, limit: float) -> OutOfMemory:
    """The message, with the arrays of the peak: from a second try that leaves the compiler's notes.

    A step that does not fit fails early, so that this costs less than a compilation.
    """
    over = read_message(message, arguments, limit)
    if over.buffers:
        return over
    with tempfile.TemporaryDirectory() as folder:
        try:
            lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError:
            pass  # As before.
        notes = sorted(pathlib.Path(folder).glob("*live-range.txt"))
        modules = sorted(pathlib.Path(folder).glob("*after_optimizations.txt"))
        if not notes or not modules:
            return over
        buffers = at_peak(notes[-1].read_text(), modules[-1].read_text())
    return dataclasses.replace(over, buffers=buffers)


def at_peak(live_ranges: str, module: str, n: int = 8) -> tuple[Buffer, ...]:
    """The largest arrays of the peak from XLA's notes on live ranges, named by the module's text.

    A loop's result is allocated by an instruction without a name; it is then named by the
    operation that most often makes an array of its shape.
    """
    computations, _ = aot_hlo.parse(module)
    made: dict[str, aot_hlo.Instruction] = {}
    makers: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for instructions in computations.values():
        for i in instructions:
            made[i.name] = i
            if (name := aot_hlo.source(i)) and "/" in name:
                makers[aot_hlo.plain_type(i.result)][name] += 1
    buffers = []
    peak = live_ranges.partition("(peak):")[2].partition("Stack trace")[0]
    for name, index, size in _LIVE.findall(peak):
        if name not in made:
            continue
        shape = aot_hlo.element(made[name].result, [int(i) for i in index.split(",") if i])
        named = aot_hlo.source(made[name])
        if "/" not in named and makers[shape]:
            named = makers[shape].most_common(1)[0][0]
        if named.endswith("dynamic_update_slice"):
            named = "what a scan keeps of every turn, for the backward pass"
        buffers.append(Buffer(float(size), shape, named or name))
    return tuple(sorted(buffers, key=lambda b: -b.bytes)[:n])


def largest(module: str, n: int = 8) -> tuple[Buffer, ...]:
    """The largest arrays that a module's instructions make, whether they live at once or not."""
    computations, entry = aot_hlo.parse(module)
    times = aot_hlo.counts(computations, entry)
    fused = {
        callee
        for instructions in computations.values()
        for i in instructions
        if i.opcode == "fusion"
        for callee in re.findall(r"calls=%?([\w.\-]+)", i.attributes)
    }
    skipped = ("parameter", "tuple", "get-tuple-element", "while", "bitcast", "constant", "call")
    seen: dict[tuple[str, str], Buffer] = {}
    for name, instructions in computations.items():
        if name in fused or not times[name]:
            continue
        for i in instructions:
            if i.opcode in skipped or i.result.startswith("("):
                continue
            key = (aot_hlo.plain_type(i.result), aot_hlo.source(i) or i.opcode)
            seen[key] = Buffer(aot_hlo.type_bytes(key[0]), *key)
    return tuple(sorted(seen.values(), key=lambda b: -b.bytes)[:n])
