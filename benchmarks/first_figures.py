"""FiRST's two figures as SVG: quality against measured time, and the layers that run."""

import html
from collections.abc import Callable, Mapping, Sequence

import numpy as np

NAMES = {"rouge_l": "ROUGE-L", "chrf": "chrF", "exact": "Exact answer, %"}
# The page's line colours (c0 to c5); c6 and c7 are ours (STYLE).
COLOURS = {
    "none": 0, "first": 1, "unified": 2, "evenly": 6, "random": 3, "influence": 4, "cost": 7,
    "layerskip": 5,
}  # fmt: skip
TITLES = {
    "none": "no skipping",
    "first": "FiRST",
    "unified": "Unified, official rule",
    "evenly": "evenly spread",
    "random": "random set",
    "influence": "block influence (ShortGPT)",
    "cost": "skip cost of each layer",
    "layerskip": "LayerSkip, early exit",
}
STYLE = (
    "<style>:root{--c6:#a07d00;--c7:#7a5230}"
    "@media(prefers-color-scheme:dark){:root{--c6:#d9b84a;--c7:#c79a72}}"
    ".c6{color:var(--c6)}.c7{color:var(--c7)}svg.whole{display:block;width:100%;height:auto}"
    "figure + figure{margin-top:20px}.legend svg{flex:none;width:16px;height:16px}"
    "svg .panel{font-weight:600;fill:var(--ink)}"
    "</style>"
)
# A mark for each method, so that the figure is read without colours: points around the origin.
MARKS: dict[str, Sequence[tuple[float, float]]] = {
    "unified": [(-4, -4), (4, -4), (4, 4), (-4, 4)],
    "evenly": [(0, -5.4), (5.4, 0), (0, 5.4), (-5.4, 0)],
    "random": [(0, -5.2), (5, 3.9), (-5, 3.9)],
    "influence": [(0, 5.2), (5, -3.9), (-5, -3.9)],
    "cost": [(-5, 0), (4, -5), (4, 5)],
    "layerskip": [(0, -5.2), (4.9, -1.6), (3.1, 4.2), (-3.1, 4.2), (-4.9, -1.6)],
}
APART = 8
"""Pixels between the marks of two methods at one time, which would hide one another's bars."""

At = Callable[[float, float], tuple[float, float]]


def mark(method: str, x: float, y: float) -> str:
    """A method's mark; FiRST's is a disc, no skipping's a ring."""
    if method not in MARKS:
        fill = "var(--paper)" if method == "none" else "currentColor"
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" style="fill: {fill}"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in MARKS[method])
    return f'<polygon points="{points}" style="fill: currentColor"/>'


def legend(arms: Mapping[str, Mapping]) -> str:
    """The methods' marks, colours and names."""
    methods = {arm["arm"]["method"] for arm in arms.values()}
    items = [
        f'<li class="c{COLOURS[m]}"><svg viewBox="-8 -8 16 16" aria-hidden="true">'
        f'<g class="line">{mark(m, 0, 0)}</g></svg>'
        f'<span style="color: var(--ink)">{TITLES[m]}</span></li>'
        for m in COLOURS
        if m in methods
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within a range."""
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.75 * rough)
    return [i * step for i in range(int(np.ceil(low / step)), int(high / step + 1e-9) + 1)]


def quality(arms: Mapping[str, Mapping], metric: str) -> str:
    """Time a token against a score: with adapters on the left, without on the right, one scale."""
    shown = {name: arm for name, arm in arms.items() if "ratio" in arm}
    sides = [[a for a in shown.values() if a["arm"]["lora"] == lora] for lora in (True, False)]
    sides = [(i, side) for i, side in enumerate(sides) if side]
    if not sides:
        return ""
    width, height, left, gap, top, bottom = 1040, 350, 46, 34, 26, 42
    panel = (width - left - 12 - gap) / 2
    x_low = min(arm["ratio"] for arm in shown.values()) - 0.06
    x_high = max(1.0, *(arm["ratio"] for arm in shown.values())) + 0.06
    y_low = min(arm[metric]["low"] for arm in shown.values())
    y_high = max(arm[metric]["high"] for arm in shown.values())
    margin = 0.06 * (y_high - y_low) or 1.0
    y_low = 0.0 if 0 <= y_low <= 0.4 * y_high else y_low - margin
    y_high += margin
    parts, base = [], height - bottom
    for place, (i, side) in enumerate(sides):
        start = left + place * (panel + gap)

        def at(x: float, y: float, start: float = start) -> tuple[float, float]:
            return (
                start + (x - x_low) / (x_high - x_low) * panel,
                top + (y_high - y) / (y_high - y_low) * (base - top),
            )

        title = ("with adapters (LoRA)", "without")[i]
        parts.append(f'<text class="panel" x="{start}" y="14">{title}</text>')
        for tick in ticks(y_low, y_high):
            y = at(x_low, tick)[1]
            parts.append(
                f'<line class="grid" x1="{start}" x2="{start + panel:.1f}" y1="{y:.1f}" '
                f'y2="{y:.1f}"/>'
            )
            if not place:
                parts.append(
                    f'<text x="{start - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
                )
        for tick in ticks(x_low, x_high):
            x = at(tick, y_low)[0]
            parts.append(
                f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
                f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{tick:.2g}</text>'
            )
        parts.append(
            f'<line class="axis" x1="{start}" x2="{start + panel:.1f}" y1="{base}" y2="{base}"/>'
            f'<text x="{start + panel:.1f}" y="{height - 6}" text-anchor="end">'
            "time a token / time with all layers</text>"
        )
        parts += _methods(side, metric, at)
    title = html.escape(NAMES[metric])
    return (
        f'<figure><figcaption>{title}</figcaption><svg class="whole" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{title} against time a token">'
        f"{''.join(parts)}</svg></figure>"
    )


def _methods(side: Sequence[Mapping], metric: str, at: At) -> list[str]:
    """The lines first, then the marks with their intervals, FiRST's uppermost."""
    present = [m for m in COLOURS if any(a["arm"]["method"] == m for a in side)]
    # FiRST stands where its time is, the others in turn to its left and right.
    skipping = [m for m in present if m not in ("none", "first")]
    shift = {m: APART * (i // 2 + 1) * (-1) ** i for i, m in enumerate(skipping)}
    full = [arm for arm in side if arm["arm"]["method"] == "none"]
    lines, marks = [], []
    for method in sorted(present, key=lambda m: m == "first"):
        own = sorted((a for a in side if a["arm"]["method"] == method), key=lambda a: a["ratio"])
        points = []
        for arm in own:
            score = arm[metric]
            x, y = at(arm["ratio"], score["mean"])
            x += shift.get(method, 0.0)
            points.append((x, y))
            low, high = (at(arm["ratio"], score[key])[1] for key in ("low", "high"))
            tip = f"{TITLES[method]}, {arm['arm']['skip']:.0%} skipped: {_range(score)}"
            marks.append(
                f'<g class="line c{COLOURS[method]}"><line x1="{x:.1f}" x2="{x:.1f}" '
                f'y1="{low:.1f}" y2="{high:.1f}" opacity="0.7"/>{mark(method, x, y)}'
                f"<title>{html.escape(tip)}</title></g>"
            )
        points += [at(arm["ratio"], arm[metric]["mean"]) for arm in full if method != "none"]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        wide = 1.9 if method == "first" else 1.2
        lines.append(
            f'<polyline class="line c{COLOURS[method]}" points="{path}" opacity="0.5" '
            f'style="stroke-width: {wide}"/>'
        )
    return lines + marks


def _range(score: Mapping[str, float]) -> str:
    return f"{score['mean']:.2f} ({score['low']:.2f} to {score['high']:.2f})"


def layer_maps(result: Mapping) -> str:
    """For each of FiRST's arms with adapters: the tasks side by side, peers' sets below."""
    names = {name: None for task in result["tasks"].values() for name in task["maps"]}
    return "".join(
        layer_figure(name, result["tasks"]) for name in names if not name.endswith("-plain")
    )


def layer_figure(name: str, tasks: Mapping[str, Mapping]) -> str:
    """Layers from left to right, a panel a task.

    From above: each seed's share of inputs that ran a layer, the sets of single inputs of the first
    seed (sorted, so that equal ones stand together), and the peers' sets at the same rate.
    """
    left, gap, width, panels, notes, bottom = 92, 30, 1040, [], [], 0.0
    shown = [(task, found["maps"][name], found) for task, found in tasks.items()
             if name in found["maps"]]  # fmt: skip
    cell = ((width - left - gap) / 2) / max(len(entry["share"][0]) for _, entry, _ in shown)
    for place, (task, entry, found) in enumerate(shown):
        start = left + place * (width - left - gap) / 2 + place * gap
        rows = [
            (f"seed {seed}", row, 15.0, "c1") for seed, row in zip(entry["seeds"], entry["share"])
        ]
        inputs = sorted((tuple(int(c) for c in row) for row in entry["inputs"]), reverse=True)
        rows += [("inputs" if not i else "", row, 3.6, "c1") for i, row in enumerate(inputs)]
        for peer, sets in peer_sets(name, found["fixed_sets"]):
            for i, row in enumerate(sets):
                label = peer if len(sets) == 1 else f"{peer} {i + 1}"
                rows.append((label, [int(c) for c in row], 13.0, f"c{COLOURS[peer]}"))
        parts, y, before = [f'<text class="panel" x="{start:.1f}" y="14">{task}</text>'], 22.0, ""
        for label, values, size, colour in rows:
            kind = "inputs" if size < 10 else "seed" if colour == "c1" else "peers"
            y += 8 if before and kind != before else 0
            before = kind
            if label and not place:
                parts.append(
                    f'<text x="{left - 8}" y="{y + 11:.1f}" text-anchor="end">{label}</text>'
                )
            cells = "".join(
                f'<rect x="{start + i * cell:.1f}" y="{y:.1f}" width="{cell - 1:.1f}" '
                f'height="{size - (0.6 if kind == "inputs" else 1.5):.1f}" fill="currentColor" '
                f'opacity="{0.08 + 0.92 * value:.2f}"/>'
                for i, value in enumerate(values)
            )
            parts.append(f'<g class="{colour}">{cells}</g>')
            y += size
        for layer in range(0, len(entry["share"][0]), 5):
            x = start + (layer + 0.5) * cell
            parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{layer}</text>')
        if not place:
            parts.append(f'<text x="{left - 8}" y="{y + 16:.1f}" text-anchor="end">layer</text>')
        panels.append("".join(parts))
        bottom = max(bottom, y + 24)
        notes.append(
            f"{task}: two inputs differ in {np.mean(entry['hamming']):.2f} layers on average, "
            f"{np.mean(entry['varies']):.0%} of the layers run for some inputs and not for others, "
            f"{np.mean(entry['distinct_sets']):.1f} different sets (means over seeds)."
        )
    title = html.escape(f"FiRST, {name.partition('-skip')[2]} % skipped")
    return (
        f'<figure><figcaption>{title}</figcaption><svg class="whole" '
        f'viewBox="0 0 {width} {bottom:.0f}" role="img" aria-label="layers of {title}">'
        f'{"".join(panels)}</svg><p class="note">{html.escape(" ".join(notes))}</p></figure>'
    )


def peer_sets(name: str, fixed: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """The peers' sets at the rate of one of FiRST's arms; one of each that seeds do not change."""
    rate = name.partition("-")[2]
    return [
        (method, list(dict.fromkeys(fixed[f"{method}-{rate}"])))
        for method in COLOURS
        if f"{method}-{rate}" in fixed
    ]
