"""Compiles a step for hardware that is not here, and says what the compiler made of it.

The numbers that come from the compiler: bytes a chip, and the collectives. Those that come from
peaks: the time that compute, memory and interconnect need at least. They bound what a run can
reach; no run has been made.
"""

import dataclasses
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxreason.core.chips import Chip, Target
from jaxreason.train import aot_hlo, aot_memory
from jaxreason.train.aot_hlo import Collective
from jaxreason.train.aot_memory import OutOfMemory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes a device: what a step is given, holds meanwhile and returns.

    `aliased` output lies where a donated argument lay. `peak` is what must fit into `limit`, the
    memory of the chip that JAX takes (GPUs: three quarters, or XLA_PYTHON_CLIENT_MEM_FRACTION).
    """

    arguments: float
    temporaries: float
    output: float
    aliased: float
    code: float
    peak: float
    limit: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Seconds that one step needs at least, by what limits it, and what follows.

    `interconnect` by mesh axis: transfers over one axis follow one another, over different axes
    they may overlap, and all of them may overlap with compute. `intensity` FLOPs a byte of memory.
    """

    compute: float
    memory: float
    interconnect: dict[str, float]
    step: float
    limited_by: str
    tokens_per_s: float
    mfu: float
    intensity: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What compiling one phase's step gave; `memory` and `bound` are None where it did not fit."""

    phase: str
    seconds_lower: float
    seconds_compile: float
    memory: Memory | None
    collectives: tuple[Collective, ...]
    flops: float
    traffic: float
    tokens: int
    bound: Bound | None
    out_of_memory: OutOfMemory | None = None

    @property
    def sent(self) -> float:
        """Bytes that a device sends a step."""
        return sum(c.sent for c in self.collectives)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a phase's step computes, from its shapes: FLOPs and tokens over all devices.

    `traffic`: bytes a device that its memory must move at least.
    """

    flops: float
    traffic: float
    tokens: int


def compile_step(
    name: str, step: Any, arguments: tuple, work: Work, target: Target, mesh: Any
) -> Compiled:
    """Compiles a jitted step, called with shapes, for the devices of a mesh.

    The mesh is active (`use_mesh`). A step that does not fit is no error: its report says so.
    """
    begin = time.perf_counter()
    lowered = step.lower(*arguments)
    middle = time.perf_counter()
    share = mesh.size / _chips(target)
    limit = target.chip.hbm * _usable(target.chip) / share
    common: dict[str, Any] = {
        "phase": name, "seconds_lower": middle - begin, **dataclasses.asdict(work)
    }  # fmt: skip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(
            **common,
            seconds_compile=time.perf_counter() - middle,
            memory=None,
            collectives=(),
            bound=None,
            out_of_memory=aot_memory.explain(lowered, str(error), shard_bytes(arguments), limit),
        )
    seconds = time.perf_counter() - middle
    stats, text = compiled.memory_analysis(), compiled.as_text()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        output=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        peak=total + stats.generated_code_size_in_bytes,
        limit=limit,
    )
    found = tuple(aot_hlo.collectives(text, dict(mesh.shape)))
    over = None
    if memory.peak > limit:  # A GPU's compiler does not say so.
        over = OutOfMemory(
            arguments=memory.arguments,
            temporaries=memory.peak - memory.arguments,
            limit=limit,
            buffers=aot_memory.largest(text),
        )
    return Compiled(
        **common,
        seconds_compile=seconds,
        memory=memory,
        collectives=found,
        bound=bound(work, found, target, mesh),
        out_of_memory=over,
    )


def _usable(chip: Chip) -> float:
    """The part of a chip's memory that JAX takes: on GPUs its allocator's share."""
    if chip.platform != "gpu":
        return 1.0
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))


def _chips(target: Target) -> int:
    return math.prod(target.shape)


def shard_bytes(tree: Any) -> int:
    """Bytes of a device's part of arrays that are described with their shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def bound(work: Work, found: tuple[Collective, ...], target: Target, mesh: Any) -> Bound:
    """The least time of a step, were every part at its peak and all parts at once."""
    chip, chips = target.chip, _chips(target)
    share = mesh.size / chips  # Devices of a chip: two on v7x.
    compute = work.flops / chips / chip.peak_bf16
    memory = work.traffic / (chip.hbm_bandwidth / share)
    axes: dict[str, float] = {}
    for collective in found:
        for axis in {name.removeprefix("part of ") for name in collective.axes}:
            seconds = transfer_seconds(collective, target, mesh) * share
            axes[axis] = axes.get(axis, 0.0) + seconds
    limits = {"compute": compute, "memory": memory} | {f"links of {a}": s for a, s in axes.items()}
    limited_by = max(limits, key=lambda name: limits[name])
    step = limits[limited_by]
    return Bound(
        compute=compute,
        memory=memory,
        interconnect=axes,
        step=step,
        limited_by=limited_by,
        tokens_per_s=work.tokens / step,
        mfu=compute / step,
        intensity=work.flops / mesh.size / work.traffic,
    )


def transfer_seconds(collective: Collective, target: Target, mesh: Any) -> float:
    """Seconds of a collective at the peak of all links that lead along its group.

    On a torus a group uses both directions of every dimension in which its chips differ, one where
    the dimension does not close into a ring. GPUs of one node have their NVLink; what leaves a node
    (or a slice) shares the network of all its members.
    """
    chip, devices = target.chip, mesh.devices.flat
    members = [devices[i] for i in collective.members]
    homes = [_home(device, chip) for device in members]
    inside = collective.sent / _bandwidth(members, target)
    outside = len(set(homes))
    if outside < 2:
        return inside
    if collective.kind == "collective-permute":
        return collective.sent / chip.network
    whole = collective.sent * collective.group / (collective.group - 1)
    return max(inside, whole * (outside - 1) / outside / (len(homes) / outside) / chip.network)


def _home(device: Any, chip: Chip) -> int:
    """The slice or the node of a device; a node is one process of a GPU's topology."""
    if chip.platform == "tpu":
        return getattr(device, "slice_index", 0) or 0
    return device.process_index


def _bandwidth(members: list, target: Target) -> float:
    """Bytes a second that one chip can send to the others of its group."""
    chip = target.chip
    if chip.platform == "gpu":
        return chip.links * chip.link_bandwidth
    coordinates = list(zip(*(device.coords for device in members), strict=True))
    links = 0
    for size, along in zip(target.shape, coordinates, strict=False):
        if len(set(along)) > 1:
            links += 2 if size % chip.ring_from == 0 else 1
    return max(links, 1) * chip.link_bandwidth


def to_json(compiled: Compiled) -> dict[str, Any]:
    """The report as plain values."""
    plain: Mapping[str, Any] = dataclasses.asdict(compiled)
    for collective in plain["collectives"]:
        del collective["members"]
    if compiled.out_of_memory is not None:
        over = plain["out_of_memory"]
        over["needed"] = compiled.out_of_memory.needed
        plain["out_of_memory"] = {k: None if v != v else v for k, v in over.items()}  # No NaN.
    return {**plain, "sent": compiled.sent}
