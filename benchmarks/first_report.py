"""FiRST's table as one self-contained page: quality against measured time, and the layer maps."""

import html
import importlib.resources
import pathlib
import string
from collections.abc import Mapping, Sequence

import numpy as np

import jaxreason
from jaxreason.train.report_tables import Table, section

NAMES = {"rouge_l": "ROUGE-L", "chrf": "chrF", "exact": "Exact answer, %"}
# Line colours of the page: c0 grey for the full model.
COLOURS = {"none": 0, "first": 1, "unified": 2, "random": 3, "influence": 4, "layerskip": 5}
TITLES = {
    "none": "no skipping",
    "first": "FiRST",
    "unified": "Unified Layer Skipping",
    "random": "random layers",
    "influence": "block influence (ShortGPT)",
    "layerskip": "LayerSkip",
}


def write(path: pathlib.Path, result: Mapping) -> None:
    """Writes the page of `first_summary.summary`'s result."""
    body = [
        "<header><h1>FiRST on SmolLM2-135M</h1>"
        '<p class="lead">Quality against measured time a token, batch 1. Time is a share of the '
        "same weights’ with all layers, measured in turn; bars are 95 % bootstrap intervals over "
        "test examples and seeds, too narrow for few seeds and for examples of a kind "
        "(jaxreason/eval/bootstrap.py).</p></header>"
    ]
    for task, found in result["tasks"].items():
        body.append(f"<h2>{html.escape(task)}, {found['examples']} test examples</h2>")
        body.append(legend(found["arms"]))
        metrics = [m for m in NAMES if m in next(iter(found["arms"].values()))]
        charts = [scatter(found["arms"], metric) for metric in metrics]
        body.append(f'<div class="charts">{"".join(charts)}</div>')
        body.append(section("Arms", arms_table(found["arms"], metrics)))
        body.append(section("Differences", *difference_tables(found)))
        maps = "".join(heat_map(name, entry) for name, entry in found["maps"].items())
        if maps:
            body.append(f'<h2>Layers that run, {html.escape(task)}</h2><div class="charts">{maps}')
            body.append("</div>")
    if result["between_tasks"]:
        body.append(section("Maps of tasks and of seeds", map_table(result["between_tasks"])))
    body.append(f"<footer>Written by jaxreason {jaxreason.__version__}.</footer>")
    template = importlib.resources.files("jaxreason.train").joinpath("report_page.html")
    page = string.Template(template.read_text(encoding="utf-8")).substitute(
        title="FiRST on SmolLM2-135M", body="\n".join(part for part in body if part)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def legend(arms: Mapping[str, dict]) -> str:
    """Names of the methods' colours; open marks have no adapters."""
    methods = {arm["arm"]["method"] for arm in arms.values()}
    items = [
        f'<li class="c{COLOURS[m]}"><i></i><span style="color: var(--ink)">{TITLES[m]}</span></li>'
        for m in COLOURS
        if m in methods
    ]
    note = "<li>filled: with LoRA; open: without</li>"
    return f'<ul class="legend">{"".join(items)}{note}</ul>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within a range."""
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.75 * rough)
    return [i * step for i in range(int(np.ceil(low / step)), int(high / step + 1e-9) + 1)]


def scatter(arms: Mapping[str, dict], metric: str) -> str:
    """One chart: time a token (share of all layers', to the right slower) against a score."""
    shown = {name: arm for name, arm in arms.items() if "ratio" in arm}
    if not shown:
        return ""
    width, height, left, right, top, bottom = 520, 330, 46, 14, 10, 40
    x_low = min(arm["ratio"] for arm in shown.values()) - 0.03
    x_high = max(1.0, *(arm["ratio"] for arm in shown.values())) + 0.03
    y_low = min(arm[metric]["low"] for arm in shown.values())
    y_high = max(arm[metric]["high"] for arm in shown.values())
    margin = 0.06 * (y_high - y_low) or 1.0
    y_low, y_high = max(0.0, y_low - margin) if y_low >= 0 else y_low - margin, y_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x_low) / (x_high - x_low) * (width - left - right),
            top + (y_high - y) / (y_high - y_low) * (height - top - bottom),
        )

    parts, base = [], height - bottom
    for tick in ticks(y_low, y_high):
        y = at(x_low, tick)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tick in ticks(x_low, x_high):
        x = at(tick, y_low)[0]
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>'
            f'<text x="{x:.1f}" y="{base + 17}" text-anchor="middle">{tick:.2g}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>'
        f'<text class="name" x="{width - right}" y="{height - 4}" text-anchor="end">'
        "time a token / time with all layers</text>"
    )
    for method in COLOURS:
        for lora in (True, False):
            points = [
                (arm["ratio"], arm[metric], name)
                for name, arm in shown.items()
                if arm["arm"]["lora"] == lora and arm["arm"]["method"] in (method, "none")
            ]
            if any(shown[name]["arm"]["method"] == method for *_, name in points):
                parts.append(_line(sorted(points, key=lambda p: p[0]), at, method, lora))
    title = html.escape(NAMES[metric])
    return (
        f'<figure class="large"><figcaption>{title}</figcaption><svg style="width: 100%" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _line(points: Sequence[tuple[float, dict, str]], at, method: str, lora: bool) -> str:
    """A method's points, joined with the full model's, with their intervals."""
    colour = f"c{COLOURS[method]}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(r, s["mean"]) for r, s, _ in points))
    dash = "" if lora else ' stroke-dasharray="4 4"'
    parts = [f'<polyline class="line {colour}" points="{path}"{dash} opacity="0.55"/>']
    for ratio, score, name in points:
        if not name.startswith(method):
            continue
        (x, y), (_, low), (_, high) = (at(ratio, score[k]) for k in ("mean", "low", "high"))
        fill = "currentColor" if lora else "var(--paper)"
        tip = f"{name}: {score['mean']:.2f} ({score['low']:.2f} to {score['high']:.2f})"
        parts.append(
            f'<g class="line {colour}"><line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" '
            f'y2="{high:.1f}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill: {fill}">'
            f"<title>{html.escape(tip)}</title></circle></g>"
        )
    return "".join(parts)


def heat_map(name: str, entry: Mapping) -> str:
    """Layers from left to right: each seed's share of inputs that ran it, then single inputs."""
    layers, left, cell = len(entry["share"][0]), 52, 14
    rows = [(f"seed {i + 1}", row, cell) for i, row in enumerate(entry["share"])]
    rows += [
        ("" if i else "inputs", [int(c) for c in row], 5) for i, row in enumerate(entry["inputs"])
    ]
    parts, y = [], 4
    for label, values, size in rows:
        if label:
            y += 6 * (label == "inputs")
            parts.append(f'<text x="{left - 6}" y="{y + 11}" text-anchor="end">{label}</text>')
        for layer, value in enumerate(values):
            parts.append(
                f'<rect x="{left + layer * cell}" y="{y}" width="{cell - 1}" height="{size - 1}" '
                f'fill="currentColor" opacity="{0.06 + 0.94 * value:.2f}">'
                f"<title>layer {layer}: {value:.2f}</title></rect>"
            )
        y += size
    for layer in range(0, layers, 5):
        parts.append(f'<text x="{left + layer * cell}" y="{y + 15}">{layer}</text>')
    note = (
        f"{np.mean(entry['distinct_sets']):.1f} different sets a seed; two inputs differ in "
        f"{np.mean(entry['hamming']):.2f} layers."
    )
    return (
        f"<figure><figcaption>{html.escape(name)}</figcaption>"
        f'<svg class="c1" style="width: 100%" viewBox="0 0 {left + layers * cell} {y + 20}" '
        f'role="img" aria-label="layers of {html.escape(name)}">{"".join(parts)}</svg>'
        f'<p class="note">{note}</p></figure>'
    )


def arms_table(arms: Mapping[str, dict], metrics: Sequence[str]) -> Table:
    """Every arm's scores, layers, time and training tokens."""
    rows = []
    for name, arm in sorted(arms.items(), key=lambda item: _order(item[0])):
        cells = [name, str(len(arm["seeds"]))]
        cells += [_shown(arm[metric]) for metric in metrics]
        cells.append(f"{np.mean(arm['layers']):.1f}")
        cells.append(f"{1e3 * arm['seconds_per_token']:.1f}" if "ratio" in arm else "n/a")
        cells.append(f"{arm['ratio']:.3f}" if "ratio" in arm else "n/a")
        cells.append(f"{np.mean(arm['tokens']) / 1e3:.0f}k")
        rows.append(cells)
    heads = [*[NAMES[m] for m in metrics], "Layers", "ms a token", "Share of full time", "Tokens"]
    return Table(columns=["Arm", "Seeds", *heads], rows=rows)


def difference_tables(found: Mapping) -> list[Table]:
    """Paired differences: what the claim says first, then what adapters and skipping change."""
    same = found["differences"]
    groups = {
        "FiRST against peers at equal measured time": found["at_equal_time"],
        "FiRST against peers at the same rate": [
            d for d in same if _method(d["arm"]) != _method(d["other"]) and d["other"] != "none"
        ],
        "With adapters against without": [d for d in same if d["other"] == f"{d['arm']}-plain"],
        "Against no skipping": [d for d in same if d["other"] == "none"],
    }
    tables = []
    for title, entries in groups.items():
        rows = [
            [f"{d['arm']} − {d['other']}", NAMES[d["metric"]], _shown(d, sign=True)]
            for d in sorted(entries, key=lambda d: _order(d["arm"]))
        ]
        if rows:
            columns = ["Difference", "Score", "Mean (95 % interval)"]
            tables.append(Table(title=title, columns=columns, rows=rows))
    return tables


def _method(name: str) -> str:
    return name.split("-")[0]


def _order(name: str) -> tuple:
    """Adapted arms before the others, then by method, then by rate."""
    return name.endswith("-plain"), list(COLOURS).index(_method(name)), name


def map_table(entries: Mapping[str, dict]) -> Table:
    """How far maps are apart."""
    rows = [
        [name, f"{e['tasks']:.2f}", "n/a" if e["seeds"] is None else f"{e['seeds']:.2f}"]
        for name, e in entries.items()
    ]
    note = "Sum over layers of the difference between two mean keep shares, in layers."
    return Table(columns=["Arm", "Two tasks", "Two seeds of one task"], rows=rows, note=note)


def _shown(found: Mapping, sign: bool = False) -> str:
    values = [f"{found[k]:+.2f}" if sign else f"{found[k]:.2f}" for k in ("mean", "low", "high")]
    return f"{values[0]} ({values[1]} to {values[2]})".replace("-", "−")
