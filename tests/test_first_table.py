"""FiRST's table: which runs it starts, what it keeps, and the numbers that it makes of records."""

import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from benchmarks import first_report, first_score, first_summary, first_table
from benchmarks.first_table import ARMS, SEEDS, Arm, Job
from jaxreason import config
from jaxreason.eval.bootstrap import difference_interval
from jaxreason.recipes import recipes


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(first_table, "RECORDS", tmp_path / "results" / "runs.json")
    monkeypatch.setattr(first_table, "ROOT", tmp_path / "runs")


def record(task: str, arm: Arm, seed: int, quality: float, ratio: float, sets=None) -> dict:
    """A run's record as `main`, `evaluate` and `time` leave it, of 6 examples and 4 layers."""
    rng = np.random.default_rng([seed, len(arm.label)])
    metrics = first_summary.METRICS[task]
    return {
        "task": task, "seed": seed, "setting": {}, "loss": 1.0, "tokens": 2e5, "flops": 1e12,
        "wall_s": 60.0, "arm": {"method": arm.method, "skip": arm.skip, "lora": arm.lora},
        "test": {
            "examples_sha256": task,
            "means": {"finished": 1.0},
            "scores": {m: (quality + rng.normal(0, 1, 6)).tolist() for m in metrics},
            "sets": sets or ["1111"] * 6,
        },
        "time": {"seconds_per_token": 0.03 * ratio, "all_layers": 0.03, "ratio": ratio},
    }  # fmt: skip


def table() -> dict[str, dict]:
    """Records of both tasks: FiRST at 0.2 is timed between the peers' 0.2 and no skipping."""
    plan = {
        Arm("none", 0.0): (50, 1.0), Arm("none", 0.0, False): (20, 1.0),
        Arm("first", 0.2): (45, 0.85), Arm("unified", 0.2): (40, 0.8),
        Arm("unified", 0.4): (20, 0.6), Arm("random", 0.2): (30, 0.8),
        Arm("first", 0.2, False): (25, 0.85),
    }  # fmt: skip
    sets = {
        "docstrings": ["1101", "1101", "1101", "1011", "1011", "1011"],
        "gsm_symbolic": ["1011"] * 6,
    }
    found = {}
    for task, chosen in sets.items():
        for arm, (quality, ratio) in plan.items():
            for seed in arm.seeds:
                own = chosen if arm.method == "first" else None
                found[f"{task}-{arm.label}-{seed}"] = record(task, arm, seed, quality, ratio, own)
    return found


def test_arms():
    assert len(ARMS) == len(set(ARMS)) == 18
    assert sum(len(arm.seeds) for arm in ARMS) == 3 * 6 + 12
    assert {a.label for a in ARMS} >= {"first-skip20", "unified-skip40-plain", "none", "none-plain"}


def test_commands(monkeypatch):
    monkeypatch.setattr(first_table, "given_length", lambda task, arm: (100, 40))
    changes = (("optim.learning_rate", 5e-4), ("router_optim.learning_rate", 3e-3))
    job = Job("docstrings", Arm("first", 0.2), 2, changes)
    command = job.command()
    given = "experiments/first/smollm2.py:docstrings,first,skip=0.2,seed=2"
    assert command[:4] == [sys.executable, "-m", "jaxreason.main", f"--config={given}"]
    assert "--config.optim.learning_rate=0.0005" in command
    assert "--config.data.source.part=train" in command
    assert not [flag for flag in command if "steps" in flag or "lora" in flag]
    tune = Job("docstrings", Arm("first", 0.2), 100, changes, True).command()
    assert "--config.train.steps=50" in tune and "--config.router_steps=20" in tune
    plain = Job("docstrings", Arm("first", 0.4, False), 1, changes).command()
    assert "--config.train.steps=40" in plain and "--config.lora=None" in plain
    peer = Job("docstrings", Arm("unified", 0.4, False), 1, ()).command()
    assert "--config.train.steps=1" in peer and "--config.lora=None" in peer


def test_every_run_is_a_config():
    known = {cls.__name__: cls for cls in recipes()}
    for task in first_table.TASKS:
        for arm in ARMS:
            settings = tuple(first_table.TUNING[arm.method][-1].items())
            cfg = config.parse(Job(task, arm, 3, settings).config(), recipes=known).config
            assert (cfg.run.seed, cfg.data.source.part) == (3, "train")
            assert cfg.optim.learning_rate == 1e-3 and (cfg.lora is not None) == arm.lora
            tokens = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
            assert tokens >= first_table.LEAST_TOKENS or not arm.lora
            kept = cfg.method.decision.kept if arm.method == "first" else None
            kept = getattr(cfg.method, "kept", 30 if arm.method == "none" else kept)
            assert kept == round(30 * (1 - arm.skip))
            if arm.lora:
                tune = Job(task, arm, 3, settings, True).config()
                assert config.parse(tune, recipes=known).config.train.steps == cfg.train.steps // 2


def test_names_tell_settings_apart():
    def name(**rates):
        changes = tuple((f"{k}.learning_rate", v) for k, v in rates.items())
        return Job("docstrings", Arm("first", 0.2), 1, changes).name

    names = {name(optim=1e-3, router_optim=3e-3), name(optim=1e-3, router_optim=1e-2)}
    assert len(names | {name(optim=5e-4, router_optim=3e-3)}) == 3


def test_every_method_has_equal_tuning():
    assert {len(runs) for runs in first_table.TUNING.values()} == {3}
    for method, runs in first_table.TUNING.items():
        assert len({job.name for job in first_table.tuning_jobs("docstrings", method)}) == len(runs)


def test_the_best_setting_is_chosen_once_all_are_tuned():
    jobs = first_table.tuning_jobs("docstrings", "unified")
    for job, loss in zip(jobs[:2], (1.5, 1.2)):
        first_table.keep_record(job.name, loss=loss)
    assert first_table.setting("docstrings", "unified") is None
    with pytest.raises(SystemExit, match="first is not tuned on docstrings"):
        first_table.main_jobs(["docstrings"])
    first_table.keep_record(jobs[2].name, loss=1.9)
    assert first_table.setting("docstrings", "unified") == jobs[1].changes


def test_what_is_on_record_is_not_measured_again(monkeypatch):
    jobs = [Job("docstrings", Arm("unified", 0.2), seed) for seed in SEEDS]
    for job in jobs[:2]:
        first_table.keep_record(job.name, loss=1.0)
    first_table.keep_record(jobs[0].name, test={"means": 1})
    ran = []

    def fake(command, what):
        ran.append(what)
        out = jobs[1].folder / "test.json"
        out.parent.mkdir(parents=True)
        out.write_text(json.dumps({"means": 2}))

    monkeypatch.setattr(first_table, "run", fake)
    first_table.measure(jobs, "test", 5, 1e12)
    first_table.measure(jobs, "test", 5, 1e12)
    assert ran == [f"test {jobs[1].name}"]
    assert first_table.records()[jobs[1].name] == {"loss": 1.0, "test": {"means": 2}}
    first_table.measure(jobs, "time", 5, 0.0)  # Time is up.
    assert len(ran) == 1


def test_test_examples_are_spread_and_the_same():
    pytest.importorskip("reasoning_gym", reason="pip install 'jaxreason[tasks]'")
    found = first_score.test_examples("gsm_symbolic", 7)
    assert found == first_score.test_examples("gsm_symbolic", 7) and len(found) == 7
    numbers = [int(e.name.split("/")[-1]) for e in found]
    assert numbers == sorted(numbers) and numbers[-1] > 2500
    assert all(e.name.startswith("gsm_symbolic/1/") for e in found)


def test_summary_numbers():
    records = table()
    result = first_summary.summary(records)
    task = result["tasks"]["docstrings"]
    first, unified, none = (
        np.array([records[f"docstrings-{arm}-{s}"]["test"]["scores"]["rouge_l"] for s in seeds])
        for arm, seeds in (("first-skip20", SEEDS), ("unified-skip20", SEEDS), ("none", (1,)))
    )
    found = task["arms"]["first-skip20"]
    assert found["rouge_l"]["mean"] == pytest.approx(first.mean())
    assert found["rouge_l"]["low"] < first.mean() < found["rouge_l"]["high"]
    assert found["layers"] == [3, 3, 3] and found["ratio"] == pytest.approx(0.85)
    (same_rate,) = [
        d
        for d in task["differences"]
        if (d["arm"], d["other"], d["metric"]) == ("first-skip20", "unified-skip20", "rouge_l")
    ]
    want = difference_interval(first, unified)
    assert (same_rate["mean"], same_rate["low"]) == (want.mean, want.low)
    # At 0.85 of the time the peer stands a quarter of the way from its 0.8 to no skipping at 1.
    (equal,) = [d for d in task["at_equal_time"] if d["other"] == "unified"]
    assert equal["mean"] == pytest.approx((first - (0.75 * unified + 0.25 * none)).mean())
    assert {(d["arm"], d["other"]) for d in task["differences"]} >= {
        ("first-skip20", "first-skip20-plain"), ("first-skip20", "none"), ("none", "none-plain"),
    }  # fmt: skip


def test_layer_maps():
    result = first_summary.summary(table())
    entry = result["tasks"]["docstrings"]["maps"]["first-skip20"]
    assert entry["share"] == [[1.0, 0.5, 0.5, 1.0]] * 3
    assert entry["distinct_sets"] == [2] * 3
    # 9 of the 15 pairs of inputs differ, in two layers.
    assert entry["hamming"] == pytest.approx([2 * 9 / 15] * 3)
    assert result["tasks"]["gsm_symbolic"]["maps"]["first-skip20"]["hamming"] == [0.0] * 3
    between = result["between_tasks"]["first-skip20"]
    assert between == {"tasks": pytest.approx(1.0), "seeds": 0.0}


def test_other_examples_are_not_compared():
    records = table()
    records["docstrings-none-1"]["test"]["examples_sha256"] = "other"
    with pytest.raises(ValueError, match="other examples"):
        first_summary.summary(records)


def test_no_time_outside_what_a_peer_has():
    records = table()

    def at(ratio: float) -> list[dict]:
        for seed in SEEDS:
            records[f"docstrings-first-skip20-{seed}"]["time"]["ratio"] = ratio
        return first_summary.summary(records)["tasks"]["docstrings"]["at_equal_time"]

    assert at(0.5) == []
    # Faster than the peer's fastest by less than timing can tell: compared with that one.
    (found,) = [d for d in at(0.59) if d["other"] == "unified"]
    first, fastest = (
        np.array([records[f"docstrings-{arm}-{s}"]["test"]["scores"]["rouge_l"] for s in SEEDS])
        for arm in ("first-skip20", "unified-skip40")
    )
    assert found["mean"] == pytest.approx((first - fastest).mean()) and found["ratio"] == 0.6


class Page(HTMLParser):
    """Collects the texts and counts the marks of a page, and holds that every tag is closed."""

    VOID = {"meta", "link", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.circles = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.circles += tag == "circle"
        links = [v for k, v in attrs if k in ("src", "href")]
        assert not links  # Self-contained.

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page(tmp_path):
    result = json.loads(json.dumps(first_summary.summary(table())))
    first_report.write(tmp_path / "first.html", result)
    page = Page()
    page.feed((tmp_path / "first.html").read_text())
    assert not page.open
    text = " ".join(page.texts)
    mean = result["tasks"]["docstrings"]["arms"]["first-skip20"]["chrf"]["mean"]
    assert f"{mean:.2f}" in text and "first-skip20 − unified-skip20" in text
    assert page.circles == 3 * 7  # Seven arms on three charts.
    assert "nan" not in text and "seed 3" in text


def test_page_before_anything_is_timed(tmp_path):
    records = table()
    for entry in records.values():
        del entry["time"]
    first_report.write(tmp_path / "first.html", first_summary.summary(records))
    page = Page()
    page.feed((tmp_path / "first.html").read_text())
    assert page.circles == 0 and not page.open
