"""Line charts as inline SVG, drawn here so that a report needs no library and no network.

Colours come from the page (classes `c0`, `c1`, ...), so one drawing serves light and dark.
"""

import dataclasses
import html
import itertools
import json
import math
from collections.abc import Sequence

from jaxreason.train.progress import quantity
from jaxreason.train.runs import Curve

COLOURS = 6
"""How many line colours the page defines."""
_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    label: str
    """Its name in the read-out."""
    colour: int
    """Index of the page's line colours."""
    points: Curve
    """(step, value); a non-finite value leaves a gap."""
    faint: Curve = ()
    """The same before smoothing, drawn behind."""


def smoothed(curve: Curve, span: int) -> list[tuple[float, float]]:
    """Returns the mean of the (about) `span` values around each point, fewer at the two ends.

    Non-finite values stay where they are, and count in no mean.
    """
    half = max(0, span // 2)
    finite = [math.isfinite(value) for _, value in curve]
    sums = list(
        itertools.accumulate(
            (v if ok else 0.0 for (_, v), ok in zip(curve, finite, strict=True)), initial=0.0
        )
    )
    counts = list(itertools.accumulate(finite, initial=0))
    out = []
    for i, (step, value) in enumerate(curve):
        low, high = max(0, i - half), min(len(finite), i + half + 1)
        mean = (sums[high] - sums[low]) / max(counts[high] - counts[low], 1)
        out.append((step, mean if finite[i] else value))
    return out


def figure(
    lines: Sequence[Line], *, title: str, note: str = "", small: bool = False, cut: bool = False
) -> str:
    """Draws one chart as an HTML `<figure>`, or returns "" where no line has a finite value.

    Args:
      lines: the curves.
      title: above the chart; what the vertical axis shows, with its unit.
      note: a line below it.
      small: draw for a third of the page's width instead of half.
      cut: leave out what lies above the values reached after 10 % of the steps (a loss starts so
        high that the rest would be flat); the note says so where it happens.
    """
    values = [p for line in lines for p in line.points if math.isfinite(p[1])]
    if not values:
        return ""
    width, height = (340, 210) if small else (520, 310)
    left, right, top, bottom = (46, 12, 10, 34)
    x_low, x_high = min(x for x, _ in values), max(x for x, _ in values)
    if x_low > 0 and x_low < 0.1 * x_high:
        x_low = 0
    y_low, y_high, is_cut = _vertical([*values, *_middle(lines)], cut)
    x_ticks = _ticks(x_low, x_high, 4 if small else 6)
    y_ticks = _ticks(y_low, y_high, 4 if small else 6)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    if x_high == x_low:
        x_low, x_high = x_low - 1, x_high + 1
    plot_w, plot_h = width - left - right, height - top - bottom

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * plot_w,
            top + (y_high - y) / (y_high - y_low) * plot_h,
        )

    parts = []
    decimals = _decimals(y_ticks)
    for tick in y_ticks:
        _, y = at(x_low, tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick, decimals)}</text>'
        )
    base = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>')
    for tick in x_ticks:
        x, _ = at(tick, y_low)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{_tick(tick, 0)}</text>'
        )
    parts.append(
        f'<text class="name" x="{width - right}" y="{height - 3}" text-anchor="end">step</text>'
    )
    # An svg within the svg, because it clips what lies outside the axes.
    parts.append(
        f'<svg x="{left}" y="{top - 2}" width="{plot_w}" height="{plot_h + 4}" '
        f'viewBox="{left} {top - 2} {plot_w} {plot_h + 4}">'
    )
    for line in lines:
        parts.append(_path(line.faint, at, f"line faint c{line.colour % COLOURS}"))
    for line in lines:
        parts.append(_path(line.points, at, f"line c{line.colour % COLOURS}"))
    parts.append(f'</svg><line class="cursor" y1="{top}" y2="{base}" hidden=""/>')
    readout = {
        "x": [x_low, x_high, left, width - right],
        "w": width,
        "lines": [
            {
                "label": line.label,
                "c": line.colour % COLOURS,
                "p": [[x, float(f"{y:.5g}")] for x, y in _thin(line.points) if math.isfinite(y)],
            }
            for line in lines
        ],
    }
    if is_cut:
        note = f"{note + ' ' if note else ''}Axis cut: the curve starts higher."
    data = json.dumps(readout, separators=(",", ":")).replace("<", "\\u003c")
    title = html.escape(title)
    return (
        f'<figure class="{"small" if small else "large"}"><figcaption>{title}</figcaption>'
        f'<div class="plot"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
        f'{"".join(parts)}</svg><div class="readout" hidden></div>'
        f'<script type="application/json">{data}</script></div>'
        f"{f'<p class="note">{html.escape(note)}</p>' if note else ''}</figure>"
    )


def _vertical(values: Sequence[tuple[float, float]], cut: bool) -> tuple[float, float, bool]:
    """Returns the lowest and highest value to show, with a margin, and whether values lie above."""
    low, high = min(y for _, y in values), max(y for _, y in values)
    first, last = min(x for x, _ in values), max(x for x, _ in values)
    late = [y for x, y in values if x >= first + 0.1 * (last - first)]
    is_cut = False
    if cut and len(late) >= 4 and max(late) + 0.25 * (max(late) - low) < high:
        high, is_cut = max(late), True
    if high == low:
        margin = abs(low) * 0.05 or 1.0
    else:
        margin = 0.05 * (high - low)
    floor = 0.0 if low >= 0 and low - margin < 0 else low - margin
    return floor, high + margin, is_cut


def _middle(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """Returns the points before smoothing but for the highest and the lowest hundredth."""
    points = sorted((p for line in lines for p in line.faint if math.isfinite(p[1])), key=_value)
    drop = len(points) // 100
    return points[drop : len(points) - drop]


def _value(point: tuple[float, float]) -> float:
    return point[1]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Returns about `count` round numbers (1, 2 or 5 times a power of ten) within the range."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def _decimals(ticks: Sequence[float]) -> int:
    gap = ticks[1] - ticks[0] if len(ticks) > 1 else abs(ticks[0]) or 1.0
    return max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0


def _tick(value: float, decimals: int) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return quantity(value, 3).replace(".00", "").replace(".0k", "k")
    if decimals > 3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.{decimals}f}"


def _thin(curve: Curve) -> list[tuple[float, float]]:
    """Returns every n-th point, and the last, so that a page stays small."""
    points = list(curve)
    every = math.ceil(len(points) / _MOST_POINTS) or 1
    kept = points[::every]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _path(curve: Curve, at, classes: str) -> str:
    """Draws a curve; a gap at each non-finite value, a dot for a point that stands alone."""
    out, commands, run = [], [], 0
    thin = [*_thin(curve), (0.0, math.nan)]
    for step, value in thin:
        if math.isfinite(value):
            x, y = at(step, value)
            # Far outside the plot a coordinate says nothing and some viewers overflow.
            commands.append(f"{'L' if run else 'M'}{x:.1f} {max(-999.0, min(9999.0, y)):.1f}")
            run += 1
        else:
            if run == 1:
                x, y = commands.pop()[1:].split()
                out.append(f'<circle class="{classes} dot" cx="{x}" cy="{y}" r="2.5"/>')
            run = 0
    path = f'<path class="{classes}" d="{"".join(commands)}"/>' if commands else ""
    return path + "".join(out)
