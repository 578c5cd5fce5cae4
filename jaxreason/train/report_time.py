"""The section of a report that says where the wall time went, restarts included, as HTML."""

import html
from collections.abc import Sequence

from jaxreason.train import report_tables
from jaxreason.train.goodput import NAMES, Goodput
from jaxreason.train.report_tables import Table
from jaxreason.train.runs import RunData

# The page's six colours, and each again in a fainter form; lost and down time is grey.
_CLASSES = dict(
    zip(
        NAMES,
        ("c1", "c2", "c3", "c4", "c5", "c3 faint", "c2 faint", "c4 faint", "c1 faint",
         "c0", "c0 faint"),
        strict=True,
    )
)  # fmt: skip
_NOTE = (
    "Wall time: start of the first process to the last record, without the time after a run was "
    "done. Goodput: the share of it in training steps that were kept. A second in which the "
    "devices work on a step counts as that, whatever the host does meanwhile. Steps after the "
    "newest checkpoint count as kept until a restart shows otherwise."
)


def section(runs: Sequence[RunData]) -> str:
    """Draws a bar for each run that recorded its time, and the table of all of them."""
    given = [(run.name, run.goodput) for run in runs if run.goodput and run.goodput.wall_s]
    if not given:
        return ""
    used = [cause for cause in NAMES if any(cause in found.seconds for _, found in given)]
    entries = "".join(f'<li><i class="dot {_CLASSES[cause]}"></i>{cause}</li>' for cause in used)
    bars = "".join(_bar(name if len(given) > 1 else "", found) for name, found in given)
    rows = [
        [f"{cause}: {NAMES[cause]}", *[_cell(found, cause) for _, found in given]] for cause in used
    ]
    rows.append(["wall time", *[f"{report_tables.spoken(f.wall_s)}, {f.tries}" for _, f in given]])
    columns = ["Where the wall time went", *[name for name, _ in given]]
    table = report_tables.render(Table(columns=columns, rows=rows, note=_NOTE))
    return f'<h2>Time</h2><ul class="legend">{entries}</ul>{bars}{table}'


def _bar(name: str, found: Goodput) -> str:
    parts = "".join(
        f'<i class="{_CLASSES[cause]}" style="width:{found.share(cause):.3%}" '
        f'title="{cause} {found.share(cause):.1%}"></i>'
        for cause in NAMES
        if cause in found.seconds
    )
    label = f"<h3>{html.escape(name)}</h3>" if name else ""
    words = html.escape(found.line())
    return f'{label}<div class="share" role="img" aria-label="{words}">{parts}</div>'


def _cell(found: Goodput, cause: str) -> str:
    if cause not in found.seconds:
        return ""
    return f"{report_tables.spoken(found.seconds[cause])}  ({found.share(cause):.1%})"
