"""The report of compiling ahead of time as a table for people."""

import collections
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from jaxreason.core.chips import Target
from jaxreason.train.aot import Compiled
from jaxreason.train.aot_memory import OutOfMemory

NOTE = (
    "The step time, tokens/s and MFU are a bound from the makers' peaks, with compute, memory and "
    "links all busy at once; no step has run. Compute: the model's FLOPs. Memory: state, weights "
    "and saved activations moved once a pass. Links: ring algorithms, one axis after another."
)


def size(value: float) -> str:
    """Bytes for people: `12.3 MB`, powers of ten as the makers count."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A time for people."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def print_report(console: Console, title: str, target: Target, phases: Sequence[Compiled]) -> None:
    """Prints memory, bound and collectives of every phase."""
    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("a chip, a step")
    for compiled in phases:
        table.add_column(compiled.phase, justify="right")
    for name, values in _rows(phases).items():
        if any(value != "-" for value in values):
            table.add_row(name, *values)
    console.print(table)
    for compiled in phases:
        if compiled.collectives:
            console.print(_collectives(compiled))
    if any(compiled.bound for compiled in phases):
        console.print(NOTE, style="dim")
    console.print(f"chip: {target.chip.source}", style="dim", soft_wrap=True)


def _rows(phases: Sequence[Compiled]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = collections.defaultdict(list)
    for c in phases:
        m, b = c.memory, c.bound
        for name in ("arguments", "temporaries", "output", "aliased", "code"):
            rows[name].append(size(getattr(m, name)) if m else "-")
        rows["peak"].append(size(m.peak) if m else "does not fit")
        limit = m.limit if m else c.out_of_memory.limit if c.out_of_memory else 0
        rows["memory there"].append(size(limit) + (f" ({m.peak / m.limit:.0%} used)" if m else ""))
        rows["sent over links"].append(size(c.sent) if m else "-")
        rows["FLOPs, all chips"].append(f"{c.flops:.3g}")
        rows["FLOPs a byte of memory"].append(f"{b.intensity:.0f}" if b else "-")
        rows["bound: compute"].append(seconds(b.compute) if b else "-")
        rows["bound: memory"].append(seconds(b.memory) if b else "-")
        links = [f"{axis} {seconds(s)}" for axis, s in b.interconnect.items()] if b else []
        rows["bound: links"].append(", ".join(links) or "-")
        rows["bound: step"].append(f"{seconds(b.step)} ({b.limited_by})" if b else "-")
        rows["bound: tokens/s, all chips"].append(f"{b.tokens_per_s:,.0f}" if b else "-")
        rows["bound: MFU"].append(f"{b.mfu:.0%}" if b else "-")
        rows["lower + compile here"].append(f"{c.seconds_lower:.1f} + {c.seconds_compile:.1f} s")
    return rows


def by_kind(compiled: Compiled) -> dict[str, tuple[int, float]]:
    """Collectives summed up: `kind over axes` -> (count, bytes a chip sends)."""
    total: dict[str, tuple[int, float]] = {}
    for c in compiled.collectives:
        key = f"{c.kind} over {'+'.join(c.axes)}"
        count, sent = total.get(key, (0, 0.0))
        total[key] = (count + c.count, sent + c.sent)
    return dict(sorted(total.items(), key=lambda item: -item[1][1]))


def _collectives(compiled: Compiled) -> Table:
    table = Table(
        title=f"collectives of {compiled.phase}", title_justify="left", header_style="bold",
        pad_edge=False,
    )  # fmt: skip
    table.add_column("kind and axes")
    table.add_column("a step", justify="right")
    table.add_column("bytes a chip sends", justify="right")
    table.add_column("largest part")
    for key, (count, sent) in by_kind(compiled).items():
        parts = [c for c in compiled.collectives if f"{c.kind} over {'+'.join(c.axes)}" == key]
        table.add_row(key, str(count), size(sent), short(parts[0].source))
    return table


def short(source: str, width: int = 60) -> str:
    """The end of an operation's name, which tells most."""
    name = source.replace("jit(train_step)/", "").replace("eval_jaxpr/", "")
    return name if len(name) <= width else f"...{name[3 - width :]}"


def print_out_of_memory(
    console: Console, phase: str, over: OutOfMemory, advice: Sequence[str]
) -> None:
    """Prints what was needed, the largest arrays and what to change."""
    console.print(
        f"out of memory in phase {phase}: {size(over.arguments)} of arguments and "
        f"{size(over.temporaries)} of temporaries a chip, {size(over.limit)} are there",
        style="bold red", soft_wrap=True,
    )  # fmt: skip
    if over.buffers:
        console.print("the largest arrays:")
    for buffer in over.buffers:
        console.print(f"  {size(buffer.bytes):>10}  {buffer.shape}  {short(buffer.name, 80)}",
                      soft_wrap=True, highlight=False)  # fmt: skip
    for line in advice:
        console.print(f"try {line}", soft_wrap=True)
