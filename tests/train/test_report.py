"""Speed-ups are what they say, and a report shows what it was given and loads nothing."""

import html.parser
import json
import math
import re

import pytest

from jaxreason.core.errors import UserError
from jaxreason.train import charts
from jaxreason.train.report import (
    SAMPLE_SEPARATOR,
    RunData,
    Table,
    report_for_run,
    speedup,
    write_report,
)
from jaxreason.train.runs import difference_at_equal_steps, steps_to_reach, value_at

VOID = {"meta", "line", "circle", "path", "rect", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and gathers text, tags and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.words, self.json = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            if self.open[-1][1].get("type") == "application/json":
                self.json.append(json.loads(data))
        elif self.open and self.open[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def run(
    name="run", losses=(4.0, 3.0, 2.0), corpus: str | None = "c" * 64, train=(), group=None, **facts
):
    rows = [{"step": i + 1, "kind": "train", **row} for i, row in enumerate(train)]
    rows += [{"step": 100 * i, "kind": "eval", "loss": loss} for i, loss in enumerate(losses)]
    return RunData(
        name=name,
        rows=rows,
        config={"seed": 0, "train": {"steps": 200}},
        facts={"corpus_sha256": corpus} | facts,
        group=group,
    )


def page(tmp_path, **kwargs):
    kwargs = {"title": "A title", "runs": [run()]} | kwargs
    text = write_report(tmp_path / "report.html", **kwargs).read_text()
    parsed = Page(text)
    assert not parsed.links and "@import" not in text and "url(" not in text
    return parsed


def test_speedup_by_hand():
    baseline = [(0, 10.0), (100, 4.0), (200, 3.0), (400, 2.0)]
    assert speedup(baseline, [(0, 10.0), (100, 2.5)]) == pytest.approx(3.0)
    assert speedup(baseline, [(0, 10.0), (200, 3.5)]) == pytest.approx(0.75)
    assert speedup(baseline, baseline) == pytest.approx(1.0)
    assert speedup(baseline, [(100, 2.5), (200, math.nan)]) == pytest.approx(3.0)


def test_speedup_is_none_where_it_is_unknown():
    assert speedup([], [(100, 1.9)]) is None
    assert speedup([(0, 1.0)], []) is None
    assert speedup([(0, 1.0)], [(0, 1.0)]) is None
    assert speedup([(0, 1.0)], [(100, math.nan)]) is None


def test_curves_between_points():
    curve = [(0, 5.0), (100, 3.0), (200, 4.0), (300, 1.0)]
    assert steps_to_reach(curve, 3.5) == pytest.approx(75.0)
    assert steps_to_reach(curve, 6.0) == 0.0
    assert steps_to_reach(curve, 2.0) == pytest.approx(200 + 100 * 2 / 3)
    assert value_at(curve, 250) == pytest.approx(2.5)
    assert value_at(curve, 301) is None
    assert difference_at_equal_steps(curve, [(0, 5.0), (250, 2.0)]) == (250, pytest.approx(-0.5))


def test_time_adds_over_resumes():
    seconds = [1.0, 2.0, 3.0, 0.5, 1.5]
    assert run(train=[{"time_s": s} for s in seconds]).wall_time_s == pytest.approx(4.5)


def test_smoothing_keeps_gaps_out():
    curve = [(0, 1.0), (1, 3.0), (2, math.nan), (3, 5.0), (4, 7.0)]
    smooth = charts.smoothed(curve, 3)
    assert [v for _, v in smooth if math.isfinite(v)] == [2.0, 2.0, 6.0, 6.0]
    assert math.isnan(smooth[2][1])


@pytest.mark.parametrize(
    ("low", "high"), [(0, 8000), (2.1, 4.3), (0, 1e-3), (36_000, 41_000), (-3e-5, 7e-5), (5, 5)]
)
def test_ticks_are_inside_and_round(low, high):
    ticks = charts._ticks(low, high, 5)
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert 3 <= len(ticks) <= 9 or low == high
    labels = [charts._tick(tick, charts._decimals(ticks)) for tick in ticks]
    assert len(set(labels)) == len(ticks)


def test_chart_geometry():
    line = charts.Line(label="a", colour=1, points=[(0, 0.0), (100, 10.0)])
    text = charts.figure([line], title="t")
    ((x0, y0, x1, y1),) = re.findall(r'd="M(\S+) (\S+)L(\S+) ([\d.]+)"', text)
    assert (x0, x1) == ("46.0", "508.0") and float(y1) < float(y0)
    broken = charts.Line(label="a", colour=1, points=[(0, 1.0), (1, math.nan), (2, 2.0), (3, 3.0)])
    text = charts.figure([broken], title="t")
    assert text.count("<circle") == 1 and "nan" not in text.lower()
    assert (
        charts.figure([charts.Line(label="a", colour=0, points=[(0, math.nan)])], title="t") == ""
    )


def test_long_curves_stay_small_and_keep_their_end():
    points = [(i, math.sin(i / 1e4)) for i in range(100_000)]
    text = charts.figure([charts.Line(label="a", colour=0, points=points)], title="t")
    assert len(text) < 30_000
    assert Page(text).json[0]["lines"][0]["p"][-1][0] == 99_999


def test_page_shows_what_it_was_given(tmp_path):
    found = page(
        tmp_path,
        runs=[run("base", (4.0, 3.0, 2.0)), run("let", (4.0, 2.5), train=[{"loss": 3.0, "z": 2}])],
        baseline="base",
        summary=[Table(title="Seeds", columns=["Arm", "Loss"], rows=[["let", "2.5 ± 0.1"]])],
        command="python -m jaxreason.main --config=a.py",
        samples=["Once upon"],
        expected="2.4 (paper)",
        about="One sentence.",
    )
    for words in (
        "A title",
        "One sentence.",
        "2.5000",
        "1.50×",  # The base reaches 2.5 at step 150, the other at 100.
        "−0.5000",
        "Expected: 2.4 (paper)",
        "2.5 ± 0.1",
        "--config=a.py",
        "Once upon",
        "c" * 64,
        "The configs are equal.",
        "The same in every row: z 2.",
    ):
        assert words in found.text, words
    assert found.tags.count("figure") == 2
    (held_out, train) = found.json
    assert [line["label"] for line in held_out["lines"]] == ["base", "let"]
    assert held_out["lines"][1]["p"] == [[0, 4.0], [100, 2.5]]


def test_everything_is_escaped(tmp_path):
    evil = '</script><img src="http://x" onerror=alert(1)>&"\''
    plain = page(tmp_path)
    found = page(
        tmp_path,
        title=evil,
        runs=[
            RunData(
                name=evil,
                rows=[{"step": s, "kind": "train", "loss": 1.0 / s, evil: s} for s in (1, 2, 3)],
                config={evil: evil},
                facts={evil: evil},
                group=evil,
            ),
            run("other" + evil, corpus=None),
        ],
        summary=[Table(title=evil, columns=[evil], rows=[[evil]], note=evil)],
        command=evil,
        samples=[evil],
        expected=evil,
        about=evil,
    )
    assert "img" not in found.tags and "script" in plain.tags
    assert found.text.count(evil) > 10
    assert found.json[0]["lines"][0]["label"] == evil


def test_dollar_signs_survive(tmp_path):
    assert "run $DATA ${title}" in page(tmp_path, command="run $DATA ${title}").text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "kind": "train", "loss": math.nan}],
        [{"step": 0, "kind": "eval", "loss": 3.0}],
        [{"step": 5, "kind": "event", "name": "phase"}],
        [{"step": 1, "kind": "train", "loss": 2.0, "learning_rate": math.inf}],
    ],
)
def test_missing_numbers_leave_a_page(tmp_path, rows):
    found = page(tmp_path, runs=[RunData(name="r", rows=rows)])
    assert "n/a" in found.text
    page(tmp_path, runs=[run("b"), RunData(name="r", rows=rows, facts=run().facts)], baseline="b")


def test_non_finite_losses_are_named(tmp_path):
    rows = [{"loss": 1.0}, {"loss": math.nan}, {"loss": math.inf}]
    assert "not finite in 2 row(s), first at step 2" in page(tmp_path, runs=[run(train=rows)]).text


def test_runs_on_other_text_are_left_out(tmp_path):
    runs = [run("base", corpus="d" * 64), run("let")]
    found = page(tmp_path, runs=runs, baseline="base")
    assert "Left out" in found.text and "Speed-up" not in found.text
    assert [line["label"] for line in found.json[0]["lines"]] == ["let"]


def test_a_baseline_group_is_paired_by_seed(tmp_path):
    runs = [run(f"base {s}", (4.0, 3.0 + s), group="base", seed=s) for s in (0, 1)]
    runs += [run(f"let {s}", (4.0, 2.0), group="let", seed=s) for s in (0, 1, 2)]
    found = page(tmp_path, runs=runs, baseline="base")
    assert "−1.0000 at 100" in found.text and "−2.0000 at 100" in found.text
    assert found.text.count("at 100") == 2  # Seed 2 has no baseline.


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'base'"):
        page(tmp_path, runs=[run("base")], baseline="bass")
    with pytest.raises(UserError, match="different names"):
        page(tmp_path, runs=[run(), run()])
    with pytest.raises(UserError, match="at least one run"):
        page(tmp_path, runs=[])
    assert not list(tmp_path.iterdir())


def test_report_from_folders(tmp_path):
    for name, last in (("one", 2.0), ("two", 1.0)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": s, "kind": "eval", "loss": v} for s, v in ((0, 4.0), (100, last))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.json").write_text('{"model": {"layers": 12}}')
        facts = {"corpus_sha256": "e" * 64, "params": 1_234_000, "command": f"do {name}"}
        (folder / "facts.json").write_text(json.dumps(facts))
    (tmp_path / "two" / "samples.txt").write_text(f"first{SAMPLE_SEPARATOR}<second>")
    path = report_for_run(tmp_path / "two", against=tmp_path / "one")
    found = Page(path.read_text())
    assert "A model of 1.23M parameters trained for 100 steps." in found.text
    assert "do two" in found.text and "<second>" in found.text and "−1.0000" in found.text
    assert found.tags.count("pre") == 5  # The command, two samples, two configs.
    with pytest.raises(UserError, match="no config.json"):
        report_for_run(tmp_path)
