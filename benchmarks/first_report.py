"""FiRST's table as one self-contained page: quality against measured time, and the layer maps."""

import html
import importlib.resources
import pathlib
import string
from collections.abc import Mapping, Sequence

import numpy as np

import jaxreason
from benchmarks.first_arms import METRICS
from benchmarks.first_figures import COLOURS, NAMES, STYLE, layer_maps, legend, quality
from jaxreason.train.report_tables import Table, section

LEAD = (
    "Quality against measured time a token at batch 1, as a share of the same weights’ time with "
    "all layers, measured in turn. Bars are 95 % bootstrap intervals over seeds and groups of test "
    "examples (docstrings: packages). Marks at one time are moved apart sideways."
)
INTERVALS = (
    "Bootstrap: over groups of test examples and seeds. Student’s t: over the seeds’ paired "
    "differences of means, for these test examples (n seeds; n/a where one of the two arms has one "
    "seed). Clear: both intervals lie on one side of zero; where there is no t interval, the "
    "bootstrap’s, and the arm’s one seed is not in it."
)


def write(path: pathlib.Path, result: Mapping) -> None:
    """Writes the page of `first_summary.summary`'s result."""
    body = [
        STYLE,
        f'<header><h1>FiRST on SmolLM2-135M</h1><p class="lead">{LEAD}</p></header>',
        *[f'<p class="warning">{html.escape(note)}</p>' for note in result["notes"]],
    ]
    for task, found in result["tasks"].items():
        body.append(
            f"<h2>{html.escape(task)}, {found['examples']} test examples in {found['groups']} "
            "groups</h2>"
        )
        body.append(legend(found["arms"]))
        body += [quality(found["arms"], metric) for metric in METRICS[task]]
    if maps := layer_maps(result):
        body.append(
            "<h2>Layers that run</h2><p>Dark: run. Above, each seed’s share of inputs; then single "
            f"inputs of the first seed, sorted; below, what ignores the input.</p>{maps}"
        )
    if result["between_tasks"]:
        body.append(section("Maps of tasks and of seeds", map_table(result["between_tasks"])))
    for task, found in result["tasks"].items():
        tables = [arms_table(found["arms"], METRICS[task]), *difference_tables(found)]
        body.append(section(f"Numbers, {task}", *tables))
    if tables := [tuning_table(task, found) for task, found in result["tuning"].items() if found]:
        body.append(section("Tuning", *tables))
    body.append(f"<footer>Written by jaxreason {jaxreason.__version__}.</footer>")
    template = importlib.resources.files("jaxreason.train").joinpath("report_page.html")
    page = string.Template(template.read_text(encoding="utf-8")).substitute(
        title="FiRST on SmolLM2-135M", body="\n".join(part for part in body if part)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def arms_table(arms: Mapping[str, Mapping], metrics: Sequence[str]) -> Table:
    """Every arm's scores, layers, time and training tokens."""
    rows = []
    for name, arm in sorted(arms.items(), key=lambda item: _order(item[0])):
        cells = [name, str(len(arm["seeds"]))]
        cells += [_shown(arm[metric]) for metric in metrics]
        cells.append(f"{np.mean(arm['layers']):.1f}")
        cells.append(f"{1e3 * arm['seconds_per_token']:.1f}" if "ratio" in arm else "n/a")
        cells.append(f"{arm['ratio']:.3f}" if "ratio" in arm else "n/a")
        cells += [_thousands(arm[key]) for key in ("tokens", "learned_tokens")]
        rows.append(cells)
    heads = [*[NAMES[m] for m in metrics], "Layers", "ms a token", "Share of full time"]
    note = (
        "Tokens: those of training batches, padding and prompts included; learned: those that the "
        "loss is a mean of, both a seed. A time is measured on one seed with adapters, and holds "
        "for all runs of as many layers."
    )
    columns = ["Arm", "Seeds", *heads, "Tokens", "Learned"]
    return Table(columns=columns, rows=rows, note=note)


def difference_tables(found: Mapping) -> list[Table]:
    """Paired differences: what the claim says first, then what adapters and skipping change."""
    same, metrics = found["differences"], list(found["recovered"])
    kinds = {
        "FiRST against peers at equal measured time": found["at_equal_time"],
        "FiRST against peers at the same rate": [
            d for d in same if _method(d["arm"]) != _method(d["other"]) and d["other"] != "none"
        ],
        "With adapters against without": [d for d in same if d["other"] == f"{d['arm']}-plain"],
        "Against no skipping": [d for d in same if d["other"] == "none"],
    }
    tables = []
    for title, entries in kinds.items():
        rows = []
        for d in sorted(entries, key=lambda d: (metrics.index(d["metric"]), _order(d["arm"]))):
            over, shown = d["seeds_t"], f"{d['arm']} − {d['other']}"
            t = "n/a" if over is None else f"{_bounds(over)}, n = {over['n']}"
            cells = [shown, NAMES[d["metric"]], f"{d['mean']:+.2f}".replace("-", "−")]
            rows.append([*cells, _bounds(d), t, "yes" if clear(d) else "no"])
        if rows:
            columns = ["Difference", "Score", "Mean", "Bootstrap, 95 %", "Student’s t, 95 %"]
            note = INTERVALS if not tables else ""
            tables.append(Table(title=title, columns=[*columns, "Clear"], rows=rows, note=note))
    rows = [
        [f"{d['arm']} − {d['other']}", f"{d['mean']:+.4f}".replace("-", "−"),
         "n/a" if d["seeds_t"] is None else f"{_bounds(d['seeds_t'], 4)}, n = {d['seeds_t']['n']}"]
        for d in sorted(found["losses"], key=lambda d: _order(d["arm"]))
    ]  # fmt: skip
    if rows:
        columns = ["Difference", "Mean", "Student’s t, 95 %"]
        title = "Held-out loss of the completions (training part), nats a token; lower is better"
        tables.append(Table(title=title, columns=columns, rows=rows))
    for metric, arms in found["recovered"].items():
        rows = [
            [name, f"{of['plain']:.2f}", f"{of['adapted']:.2f}",
             "n/a" if of["share"] is None else f"{of['share']:.0%}"]
            for name, of in sorted(arms.items(), key=lambda item: _order(item[0]))
        ]  # fmt: skip
        columns = ["Arm", "Cost without adapters", "With", "Given back"]
        note = (
            "Cost: points below no skipping, which has adapters where the arm has. Given back: how "
            "far adapters bring the arm from where it was to no skipping with adapters."
        )
        if rows:
            title = f"What skipping costs, {NAMES[metric]}"
            tables.append(Table(title=title, columns=columns, rows=rows, note=note))
    return tables


def clear(found: Mapping) -> bool:
    """Whether a difference's intervals all lie on one side of zero."""
    both = [found, *([found["seeds_t"]] if found["seeds_t"] else [])]
    return all(i["low"] > 0 for i in both) or all(i["high"] < 0 for i in both)


def map_table(entries: Mapping[str, Mapping]) -> Table:
    """How far maps are apart."""
    rows = [
        [name, *["n/a" if e[key] is None else f"{e[key]:.2f}" for key in ("tasks", "seeds")]]
        for name, e in entries.items()
    ]
    note = "Sum over layers of the difference between two mean keep shares, in layers."
    return Table(columns=["Arm", "Two tasks", "Two seeds of one task"], rows=rows, note=note)


def tuning_table(task: str, methods: Mapping[str, Mapping]) -> Table:
    """Held-out losses of the tuning runs, by method; every method has the same settings."""
    heads = sorted({_setting(run) for entry in methods.values() for run in entry["runs"]})
    rows = []
    for method, entry in methods.items():
        losses = {_setting(run): f"{run['loss']:.4f}" for run in entry["runs"]}
        best = entry["best"] and _setting(entry["best"])
        cells = [f"{losses.get(h, 'n/a')}{' *' if h == best else ''}" for h in heads]
        rows.append([method, *cells, {None: "n/a", True: "yes", False: "no"}[entry["edge"]]])
    note = "*: taken. At the edge: a rate beyond the grid may be better."
    return Table(title=task, columns=["Method", *heads, "At the edge"], rows=rows, note=note)


def _setting(run: Mapping) -> str:
    """A setting in words, its losses left out."""
    return ", ".join(
        f"{field.removeprefix('optim.').replace('_', ' ')} {value:g}"
        for field, value in run.items()
        if field != "loss"
    )


def _method(name: str) -> str:
    return name.split("-")[0]


def _order(name: str) -> tuple:
    """Adapted arms before the others, then by method, then by rate."""
    return name.endswith("-plain"), list(COLOURS).index(_method(name)), name


def _thousands(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "n/a"
    mean = float(np.mean(known))
    return f"{mean / 1e3:.1f}k" if mean else "none"


def _bounds(found: Mapping, digits: int = 2) -> str:
    low, high = (f"{found[key]:+.{digits}f}" for key in ("low", "high"))
    return f"{low} to {high}".replace("-", "−")


def _shown(found: Mapping) -> str:
    values = [f"{found[k]:.2f}" for k in ("mean", "low", "high")]
    return f"{values[0]} ({values[1]} to {values[2]})".replace("-", "−")
