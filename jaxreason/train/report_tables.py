"""The tables of a report, as HTML."""

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.train.progress import duration, quantity
from jaxreason.train.runs import (
    MISSING,
    RunData,
    difference_at_equal_steps,
    speedup,
    steps_to_reach,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of plain text cells; what is shown is escaped."""

    title: str = ""
    """A heading above it."""
    columns: Sequence[str]
    """The head; the first column holds names, the others numbers."""
    rows: Sequence[Sequence[str]]
    """As many cells a row as there are columns."""
    note: str = ""
    """A line below it."""
    text: bool = False
    """Whether the cells are text that wraps (a config), not numbers."""


def comparison(runs: Sequence[RunData], baselines: Mapping[str, RunData | None]) -> Table:
    """Compares held-out losses; `baselines[name]` is the run that run is compared with, or None."""
    compared = any(baselines[run.name] for run in runs)
    bits = any(run.series("eval", "bits_per_byte") for run in runs)
    columns = ["Run", "Steps", "Held-out loss", "Best"]
    columns += ["Bits per byte"] if bits else []
    columns += ["Difference", "To baseline’s loss", "Speed-up"] if compared else []
    rows = []
    for run in runs:
        curve, base = run.held_out, baselines[run.name]
        cells = [run.name, f"{run.last_step:,}"]
        cells.append(f"{curve[-1][1]:.4f}" if curve else "n/a")
        cells.append(f"{min(value for _, value in curve):.4f}" if curve else "n/a")
        if bits:
            value = run.last("eval", "bits_per_byte")
            cells.append("n/a" if value is None else f"{value:.4f}")
        if compared and base is None:
            cells += ["", "", ""]
        elif base is not None:
            gap = difference_at_equal_steps(base.held_out, curve)
            reached = steps_to_reach(curve, base.held_out[-1][1]) if base.held_out else None
            ratio = speedup(base.held_out, curve)
            cells.append("n/a" if gap is None else f"{signed(gap[1])} at {gap[0]:,.0f}")
            cells.append("n/a" if reached is None else f"step {reached:,.0f}")
            cells.append("n/a" if ratio is None else f"{ratio:.2f}×")
        rows.append(cells)
    note = ""
    if compared:
        note = (
            "Difference: this run’s held-out loss minus the baseline’s at the last step that both "
            "cover. To baseline’s loss: the step at which this run reaches the baseline’s final "
            "loss. Speed-up: the baseline’s steps to the higher of the two final losses, divided "
            "by this run’s; for the better run a lower bound where the learning rate decays. "
            "Between evaluations the loss is taken as a straight line."
        )
    return Table(columns=columns, rows=rows, note=note)


def cost(runs: Sequence[RunData]) -> Table:
    """Shows what each run used: tokens, floating-point operations, time."""
    rows = []
    for run in runs:
        pace = run.median("train", "time_tokens_per_s")
        flops, seconds, mfu = run.flops, run.wall_time_s, run.mfu
        rows.append(
            [
                run.name,
                "n/a" if run.tokens is None else quantity(run.tokens),
                "n/a" if flops is None else f"{flops:.2e}",
                "n/a" if seconds is None else spoken(seconds),
                "n/a" if pace is None else quantity(pace),
                "n/a" if mfu is None else f"{mfu:.1%}",
                str(run.facts.get("device", "n/a")),
            ]
        )
    columns = ["Run", "Tokens", "FLOPs", "Training time", "Tokens/s (median)", "MFU (median)"]
    note = "Training time: without starting, compiling, evaluating and saving."
    return Table(columns=[*columns, "Device"], rows=rows, note=note)


def config(runs: Sequence[RunData], differences: Sequence[tuple[str, Sequence[Any]]]) -> str:
    """Renders the config fields in which runs differ."""
    if not differences:
        return "<p>The configs are equal.</p>"
    rows = [[field, *[_value(value) for value in values]] for field, values in differences]
    return render(
        Table(columns=["Field that differs", *[r.name for r in runs]], rows=rows, text=True)
    )


def section(heading: str, *tables: Table) -> str:
    """Renders tables under a heading."""
    return f"<h2>{html.escape(heading)}</h2>" + "".join(render(table) for table in tables)


def render(table: Table) -> str:
    """Renders one table."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>"
        for row in table.rows
    )
    kind = ' class="text"' if table.text else ""
    return (
        (f"<h3>{html.escape(table.title)}</h3>" if table.title else "")
        + f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        + f"<tbody>{rows}</tbody></table></div>"
        + (f'<p class="note">{html.escape(table.note)}</p>' if table.note else "")
    )


def signed(value: float) -> str:
    """Returns a loss difference with its sign, in a true minus."""
    return f"{value:+.4f}".replace("-", "−")


def spoken(seconds: float) -> str:
    """Returns a time as one reads it: `48 s`, `12 min 5 s`, `3:20:00` and above in hours."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{duration(seconds)} h"


def fact(value: Any) -> str:
    """Returns a fact for reading: whole numbers in groups of three digits, large ones rounded."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
    if abs(value) >= 1e12:
        return f"{value:.4g}"
    return f"{value:,}"


def _value(value: Any) -> str:
    if value is MISSING:
        return "(none)"
    return json.dumps(value, ensure_ascii=False, default=str)
