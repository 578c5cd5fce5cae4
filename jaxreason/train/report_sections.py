"""The parts of a report between its heading and its end, as HTML."""

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.train import charts, report_tables
from jaxreason.train.goodput import CAUSES
from jaxreason.train.progress import quantity
from jaxreason.train.runs import (
    RunData,
    config_differences,
    difference_at_equal_steps,
    speedup,
    steps_to_reach,
)

_NAMES = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "bits_per_byte": "Bits per byte",
    "time_tokens_per_s": "Tokens per second",
    "time_mfu": "Model FLOPs utilisation (fraction)",
    "time_step_s": "Seconds a step",
    "time_in_data_s": "Seconds waiting for data since the row before",
}
_NO_PANEL = {"step", "kind", "loss", "tokens", "flops", "time_unix", "time_s", "time_interval_s"}
# Where an interval's time went is added up in the section on time.
_NO_PANEL |= {f"time_in_{cause}_s" for cause in CAUSES if cause != "data"}
_MOST_PANELS = 24


def about(run: RunData) -> str:
    """Says in one sentence what a run was, from whatever its facts hold."""
    size, per_step = run.facts.get("params"), run.facts.get("tokens_per_step")
    parts = ["A model" if size is None else f"A model of {quantity(float(size))} parameters"]
    parts.append(f"trained for {run.last_step:,} steps")
    if per_step is not None:
        learned = run.facts.get("learned_tokens_per_step")
        of = "" if learned is None else f" (some {learned:,.0f} of them learned)"
        parts.append(f"of {int(per_step):,} tokens{of}")
    if run.facts.get("device"):
        parts.append(f"on {run.facts['device']}")
    return " ".join(parts) + "."


def cards(run: RunData, baseline: RunData | None, expected: str | None) -> str:
    """Draws the few numbers that one looks for first."""
    shown = []
    curve = run.held_out
    if curve:
        more, best = [], min(curve, key=lambda point: point[1])
        difference = difference_at_equal_steps(baseline.held_out, curve) if baseline else None
        if baseline and difference:
            step, value = difference
            kind = "good" if value < 0 else "bad" if value > 0 else ""
            more.append(
                f'<span class="{kind}">{report_tables.signed(value)}</span> against '
                f"{escape(baseline.name)} at step {step:,.0f}"
            )
        elif best[0] != curve[-1][0]:
            more.append(f"best {best[1]:.4f} at step {best[0]:,}")
        shown.append(("Held-out loss", f"{curve[-1][1]:.4f}", " ".join(more)))
    else:
        loss = run.last("train", "loss")
        value = "n/a" if loss is None else f"{loss:.4f}"
        shown.append(("Training loss (last row)", value, "no held-out losses were recorded"))
    bits = run.last("eval", "bits_per_byte")
    if bits is not None:
        reference = baseline.last("eval", "bits_per_byte") if baseline else None
        shown.append(
            ("Bits per byte", f"{bits:.4f}", f"baseline {reference:.4f}" if reference else "")
        )
    if baseline:
        ratio = speedup(baseline.held_out, curve)
        more = "steps of both to the higher of the two final losses"
        end = baseline.held_out[-1] if baseline.held_out else None
        reached = steps_to_reach(curve, end[1]) if end else None
        if end and reached is not None:
            name = escape(baseline.name)
            more = f"{name}’s loss of step {end[0]:,} is reached at step {reached:,.0f}"
        shown.append(("Speed-up in steps", "n/a" if ratio is None else f"{ratio:.2f}×", more))
    if run.tokens is not None:
        shown.append(("Trained on", f"{quantity(run.tokens)}", f"tokens, {run.last_step:,} steps"))
    if run.wall_time_s is not None:
        pace = run.median("train", "time_tokens_per_s")
        more = "" if pace is None else f"{quantity(pace)} tokens a second (median)"
        shown.append(("Training time", report_tables.spoken(run.wall_time_s), more))
    if run.goodput is not None:
        more = f"of {report_tables.spoken(run.goodput.wall_s)} in {run.goodput.tries}"
        shown.append(("Goodput", f"{run.goodput.fraction:.1%}", more))
    cells = "".join(
        f'<div><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{more}</dd></div>'
        for name, value, more in shown
    )
    note = f'<p class="expected">Expected: {escape(expected)}</p>' if expected else ""
    return f'<dl class="cards">{cells}</dl>{note}'


def curves(runs: Sequence[RunData]) -> str:
    """Draws the two losses large, and every other logged metric small."""
    groups = list(dict.fromkeys(run.group or run.name for run in runs))
    colour = {group: (i if len(groups) > 1 else 1) for i, group in enumerate(groups)}

    def lines(kind: str, key: str, span: int = 1) -> list[charts.Line]:
        drawn = []
        for run in runs:
            curve = run.series(kind, key)
            line = charts.Line(label=run.name, colour=colour[run.group or run.name], points=curve)
            if span > 1:
                smooth = charts.smoothed(curve, span)
                line = dataclasses.replace(line, points=smooth, faint=curve)
            drawn.append(line)
        return drawn

    rows = max(len(run.series("train", "loss")) for run in runs)
    span = rows // 40 if rows >= 80 else 1
    note = f"Bold: mean over {span} rows. Faint: every row." if span > 1 else ""
    large = [
        charts.figure(lines("eval", "loss"), title="Held-out loss (nats a token)", cut=True),
        charts.figure(
            lines("train", "loss", span), title="Training loss (nats a token)", note=note, cut=True
        ),
    ]
    metrics, constant = _metrics(runs)
    small = [
        charts.figure(
            lines(kind, key, span if kind == "train" and _is_noisy(key) else 1),
            title=_title(kind, key),
            small=True,
        )
        for kind, key in metrics[:_MOST_PANELS]
    ]
    if not any(large) and not any(small):
        return "<h2>Curves</h2><p>No numbers were recorded.</p>"
    legend = ""
    if len(groups) > 1:
        entries = "".join(
            f'<li><i class="c{colour[group] % charts.COLOURS}"></i>{escape(group)}</li>'
            for group in groups
        )
        legend = f'<ul class="legend">{entries}</ul>'
    notes = [f"The same in every row: {', '.join(constant)}."] if constant else []
    more = [_title(kind, key) for kind, key in metrics[_MOST_PANELS:]]
    notes += [f"Also in metrics.jsonl: {', '.join(more)}."] if more else []
    rest = f'<p class="note">{escape(" ".join(notes))}</p>' if notes else ""
    return (
        f'<h2>Curves</h2>{legend}<div class="charts">{"".join(large)}</div>'
        f'<div class="charts">{"".join(small)}</div>{rest}'
    )


def _metrics(runs: Sequence[RunData]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns (kind, key) of the other numbers, a method's own first, and the constant ones."""
    values: dict[tuple[str, str], set[float]] = {}
    for run in runs:
        for row in run.rows:
            for key, value in row.items():
                if (
                    row["kind"] in ("train", "eval")
                    and key not in _NO_PANEL
                    and isinstance(value, (int, float))
                    and math.isfinite(value)
                ):
                    values.setdefault((row["kind"], key), set()).add(value)
    changing = [item for item, seen in values.items() if len(seen) > 1]
    constant = [
        f"{_title(*item)} {next(iter(seen)):.4g}" for item, seen in values.items() if len(seen) == 1
    ]
    return sorted(changing, key=lambda item: item[1] in _NAMES), constant


def _is_noisy(key: str) -> bool:
    """Says whether to smooth a metric; a method's own (a schedule, say) is drawn as it is."""
    return key == "grad_norm" or key.startswith("time_")


def _title(kind: str, key: str) -> str:
    held_out = ", held out" if kind == "eval" else ""
    return _NAMES.get(key, key.removeprefix("time_").replace("_", " ")) + held_out


def texts(samples: Sequence[str]) -> str:
    """Shows the texts that the model wrote."""
    if not samples:
        return ""
    return "<h2>Samples</h2>" + "".join(f"<pre>{escape(text)}</pre>" for text in samples)


def reproduce(command: str, facts: Mapping[str, Any]) -> str:
    """Shows the exact command, and the versions, hashes and sizes it ran with."""
    if not command and not facts:
        return ""
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    entries = "".join(
        f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(report_tables.fact(value))}</dd>"
        for name, value in facts.items()
        if name != "command" or not command
    )
    return f'<h2>To repeat it</h2>{shown}<dl class="facts">{entries}</dl>'


def configs(runs: Sequence[RunData]) -> str:
    """Shows the fields in which the runs differ, and every config folded away."""
    given = [run for run in runs if run.config]
    if not given:
        return ""
    parts = ["<h2>Config</h2>"]
    if len(given) > 1:
        parts.append(report_tables.config(given, config_differences(given)))
    for run in given:
        text = json.dumps(run.config, indent=2, ensure_ascii=False, default=str)
        parts.append(
            f"<details><summary>{escape(run.name)}</summary><pre>{escape(text)}</pre></details>"
        )
    return "".join(parts)


def escape(text: object) -> str:
    """Returns text as HTML shows it."""
    return html.escape(str(text))
