"""FiRST's table summed up: which records count, the numbers, their intervals, and the page."""

import json
from html.parser import HTMLParser

import first_records
import numpy as np
import pytest
from first_records import LAYERS, name_of, table

from benchmarks import first_counted, first_report, first_summary
from benchmarks.first_arms import ARMS, SEEDS, TASKS, TUNING, Arm, Job, tuning_jobs
from benchmarks.first_maps import between_tasks, layer_map
from jaxreason.core.errors import UserError
from jaxreason.eval.bootstrap import difference_interval, seed_interval

RESAMPLES = 100
FIRST, PLAIN = Arm("first", 0.2), Arm("first", 0.2, False)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(first_summary, "RESAMPLES", RESAMPLES)


def rouge(records: dict, arm: Arm, *seeds: int) -> np.ndarray:
    names = [name_of("docstrings", arm, seed) for seed in seeds or arm.seeds]
    return np.array([records[name]["test"]["scores"]["rouge_l"] for name in names])


def entry(found: list[dict], arm: str, other: str, metric: str = "rouge_l") -> dict:
    (one,) = [d for d in found if (d["arm"], d["other"], d["metric"]) == (arm, other, metric)]
    return one


def summed(records: dict) -> dict:
    return first_summary.summary(records)["tasks"]["docstrings"]


def test_a_difference_has_both_intervals():
    records = table()
    a, b = rouge(records, FIRST), rouge(records, Arm("unified", 0.2))
    found = entry(summed(records)["differences"], "first-skip20", "unified-skip20")
    groups = first_records.GROUPS["docstrings"]
    want = difference_interval(a, b, groups, resamples=RESAMPLES)
    assert (found["mean"], found["low"], found["high"]) == want
    assert want != difference_interval(
        a, b, resamples=RESAMPLES
    )  # Packages were drawn, not examples.
    over = seed_interval((a - b).mean(1).tolist())
    assert found["seeds_t"] == {"n": 3, "low": over.low, "high": over.high}


def test_records_that_tell_no_groups():
    records = table()
    for record in records.values():
        if "test" in record:
            del record["test"]["groups"]
    found = summed(records)
    a, b = rouge(records, FIRST), rouge(records, Arm("unified", 0.2))
    want = difference_interval(a, b, resamples=RESAMPLES)
    assert entry(found["differences"], "first-skip20", "unified-skip20")["low"] == want.low
    assert found["groups"] == first_records.EXAMPLES


def test_one_seed_stands_for_all_only_by_design():
    records = table()
    plain = entry(summed(records)["differences"], "first-skip20", "first-skip20-plain")
    want = rouge(records, FIRST).mean() - rouge(records, PLAIN).mean()
    assert plain["mean"] == pytest.approx(want) and plain["seeds"] == 3
    assert plain["seeds_t"] is None  # Its seeds do not stand in pairs.
    # Two runs of a peer of three seeds are missing: what is compared is the third.
    for seed in (1, 3):
        del records[name_of("docstrings", Arm("unified", 0.2), seed)]
    found = entry(summed(records)["differences"], "first-skip20", "unified-skip20")
    one = rouge(records, FIRST, 2) - rouge(records, Arm("unified", 0.2), 2)
    assert found["mean"] == pytest.approx(one.mean())
    assert found["seeds"] == 1 and found["seeds_t"] is None
    del records[name_of("docstrings", FIRST, 2)]
    pairs = [(d["arm"], d["other"]) for d in summed(records)["differences"]]
    assert ("first-skip20", "unified-skip20") not in pairs
    assert ("first-skip20", "random-skip20") in pairs


def timed_at(records: dict, arm: Arm, ratio: float) -> None:
    for task in TASKS:
        records[name_of(task, arm, 1)]["time"]["ratio"] = ratio


def test_equal_time_is_a_line_between_a_peers_rates():
    records = table()
    timed_at(records, FIRST, 0.859)  # A quarter of the way from 0.812 to 1.
    first, unified = rouge(records, FIRST), rouge(records, Arm("unified", 0.2))
    mixed = 0.75 * unified + 0.25 * rouge(records, Arm("none", 0.0))
    found = entry(summed(records)["at_equal_time"], "first-skip20", "unified")
    assert found["mean"] == pytest.approx((first - mixed).mean())
    assert found["ratio"] == pytest.approx(0.859) and found["seeds_t"]["n"] == 3


def test_equal_time_has_the_seeds_that_all_have():
    records = table()
    timed_at(records, FIRST, 0.7)  # Between both rates of the peer, of which one lacks a seed.
    del records[name_of("docstrings", Arm("unified", 0.4), 3)]
    share = (0.7 - 0.624) / (0.812 - 0.624)
    fast, slow = (rouge(records, Arm("unified", skip), 1, 2) for skip in (0.4, 0.2))
    found = entry(summed(records)["at_equal_time"], "first-skip20", "unified")
    want = rouge(records, FIRST, 1, 2) - ((1 - share) * fast + share * slow)
    assert found["mean"] == pytest.approx(want.mean()) and found["seeds"] == 2
    for seed in (1, 2):
        del records[name_of("docstrings", Arm("unified", 0.2), seed)]
    others = [d["other"] for d in summed(records)["at_equal_time"] if d["arm"] == "first-skip20"]
    assert "unified" not in others and "random" in others


def test_no_time_outside_what_a_peer_has():
    records = table()
    timed_at(records, FIRST, 0.5)
    assert not [d for d in summed(records)["at_equal_time"] if d["arm"] == "first-skip20"]
    # Faster than the peer's fastest by less than timing can tell: compared with that one.
    timed_at(records, FIRST, 0.61)
    found = entry(summed(records)["at_equal_time"], "first-skip20", "unified")
    want = rouge(records, FIRST) - rouge(records, Arm("unified", 0.4))
    assert found["mean"] == pytest.approx(want.mean()) and found["ratio"] == 0.624


def test_a_time_holds_for_as_many_layers_only():
    records = table()
    arms = summed(records)["arms"]
    assert arms["first-skip20"]["ratio"] == pytest.approx(arms["first-skip20-plain"]["ratio"])
    sets = records[name_of("docstrings", PLAIN, 1)]["test"]["sets"]
    sets[0] = "1" * LAYERS
    arms = summed(records)["arms"]
    assert "ratio" in arms["first-skip20"] and "ratio" not in arms["first-skip20-plain"]


def test_runs_of_a_setting_that_is_not_chosen_any_more_are_left_out():
    records = table()
    job = tuning_jobs("docstrings", "random")[0]
    arm = Arm("random", 0.2)
    stale = Job("docstrings", arm, 1, job.changes)
    records[stale.name] = first_records.run(stale, 99.0)
    result = first_summary.summary(records)
    assert len(result["tasks"]["docstrings"]["arms"]["random-skip20"]["seeds"]) == 3
    (note,) = result["notes"]
    assert (
        note.startswith("1 run of a setting that is not the tuned one now") and stale.name in note
    )
    # Now that setting is the best, on both tasks: the others are stale.
    records[job.name]["loss"] = 0.5
    result = first_summary.summary(records)
    found = result["tasks"]["docstrings"]["arms"]
    assert found["random-skip20"]["seeds"] == [1] and "random-skip40" not in found
    assert result["notes"][0].startswith("16 runs of a setting that is not the tuned one now")


def test_methods_and_seeds_and_grids_that_are_gone():
    records = table()
    del records[tuning_jobs("docstrings", "unified")[2].name]
    more = Job("docstrings", Arm("none", 0.0), 2, tuning_jobs("docstrings", "none")[1].changes)
    records[more.name] = first_records.run(more, 99.0)
    other = Job("docstrings", Arm("first", 0.2), 100, (("router_optim.learning_rate", 1e-2),), True)
    records[other.name] = first_records.base(other)
    result = first_summary.summary(records)
    arms = result["tasks"]["docstrings"]["arms"]
    assert arms["none"]["seeds"] == [1] and "unified-skip20" not in arms
    notes = "\n".join(result["notes"])
    for part in ("16 runs of methods that are not tuned", "1 run of seeds", "1 run of the tuning"):
        assert part in notes
    assert result["tuning"]["docstrings"]["unified"]["best"] is None
    assert len(result["tuning"]["docstrings"]["first"]["runs"]) == len(TUNING["first"])


def test_tuning_tells_a_best_at_the_edge():
    records = table()
    assert first_counted.tuning(records)["docstrings"]["first"]["edge"] is False
    records[tuning_jobs("docstrings", "first")[2].name]["loss"] = 0.1
    assert first_counted.tuning(records)["docstrings"]["first"]["edge"] is True


@pytest.mark.parametrize("what", ["test", "text"])
def test_what_is_not_of_one_kind_is_not_compared(what):
    records = table()
    record = records[name_of("docstrings", Arm("none", 0.0), 1)]
    record["test"]["examples_sha256" if what == "test" else "asked"] = "other"
    record["facts"]["corpus_sha256"] = "docstrings" if what == "test" else "other"
    with pytest.raises(UserError, match="answered other" if what == "test" else "learned from"):
        first_summary.summary(records)


def test_what_adapters_give_back():
    records = table()
    arms = summed(records)["arms"]
    mean = {name: arm["rouge_l"]["mean"] for name, arm in arms.items()}
    found = summed(records)["recovered"]["rouge_l"]["first-skip20"]
    assert found["plain"] == pytest.approx(mean["none-plain"] - mean["first-skip20-plain"])
    assert found["adapted"] == pytest.approx(mean["none"] - mean["first-skip20"])
    low = mean["first-skip20-plain"]
    assert found["share"] == pytest.approx((mean["first-skip20"] - low) / (mean["none"] - low))


def test_held_out_losses_are_paired_by_seed():
    records = table()
    losses = {1: 1.3, 2: 1.1, 3: 1.2}
    for seed, loss in losses.items():
        records[name_of("docstrings", FIRST, seed)]["loss"] = loss
    found = {(d["arm"], d["other"]): d for d in summed(records)["losses"]}
    over = seed_interval([0.3, 0.1, 0.2])  # The peers' are 1.
    got = found["first-skip20", "unified-skip20"]
    assert got["mean"] == pytest.approx(0.2)
    assert got["seeds_t"] == {
        "n": 3,
        "low": pytest.approx(over.low),
        "high": pytest.approx(over.high),
    }
    assert found["first-skip20", "none"]["seeds_t"] is None


def test_a_score_that_is_zero_throughout(tmp_path):
    """No exact answer at all is a result too."""
    records = table()
    for record in records.values():
        if "test" in record and record["task"] == "gsm_symbolic":
            record["test"]["scores"]["exact"] = [0.0] * first_records.EXAMPLES
    _, text, result = written(tmp_path, records)
    found = result["tasks"]["gsm_symbolic"]
    none = {"plain": 0, "adapted": 0, "share": None}
    assert found["recovered"]["exact"]["first-skip20"] == none
    difference = entry(found["differences"], "first-skip20", "unified-skip20", "exact")
    assert difference["low"] == difference["high"] == 0 and not first_report.clear(difference)
    assert "nan" not in text


def test_layer_maps():
    def of(seed: int, *rows: str) -> dict:
        return {"seed": seed, "test": {"sets": list(rows)}}

    a = layer_map([of(1, *["1101"] * 3, *["1011"] * 3), of(3, *["1101"] * 6)])
    assert a["share"] == [[1.0, 0.5, 0.5, 1.0], [1, 1, 0, 1]] and a["distinct_sets"] == [2, 1]
    # 9 of the 15 pairs of inputs differ, in two layers; of four layers two vary.
    assert a["hamming"] == pytest.approx([2 * 9 / 15, 0]) and a["varies"] == [0.5, 0]
    b = layer_map([of(2, *["1111"] * 6), of(3, *["1011"] * 6)])
    tasks = {"one": {"maps": {"first-skip20": a}}, "two": {"maps": {"first-skip20": b}}}
    # Seed 3 is in both: its maps differ in two layers. Seeds differ by 1 and by 1.
    assert between_tasks(tasks) == {"first-skip20": {"tasks": 2.0, "seeds": 1.0}}
    del b["share"][1], b["seeds"][1]
    assert between_tasks(tasks)["first-skip20"]["tasks"] is None


class Page(HTMLParser):
    """Collects the texts and counts the marks of a page, and holds that every tag is closed."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.marks = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        links = [v for k, v in attrs if k in ("src", "href")]
        assert not links  # Self-contained.

    def handle_startendtag(self, tag, attrs):
        self.marks += tag in ("circle", "polygon")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def written(tmp_path, records: dict) -> tuple[Page, str, dict]:
    result = json.loads(json.dumps(first_summary.summary(records)))
    first_report.write(tmp_path / "first.html", result)
    page = Page((tmp_path / "first.html").read_text())
    assert not page.open
    return page, " ".join(page.texts), result


def test_page(tmp_path):
    records = table()
    del records[name_of("gsm_symbolic", Arm("unified", 0.4), 3)]
    page, text, result = written(tmp_path, records)
    mean = result["tasks"]["docstrings"]["arms"]["first-skip20"]["chrf"]["mean"]
    assert f"{mean:.2f}" in text and "first-skip20 − unified-skip20" in text
    # Every arm on four charts, every method in two legends.
    assert page.marks == 4 * len(ARMS) + 2 * len(TUNING)
    assert "nan" not in text and "seed 3" in text and "n = 3" in text and "n = 2" in text
    assert "21.0k" in text  # Learned tokens, beside all of them.


def test_page_before_anything_is_timed(tmp_path):
    records = table()
    for record in records.values():
        record.pop("time", None)
    page, text, _ = written(tmp_path, records)
    assert page.marks == 2 * len(TUNING) and "at equal measured time" not in text


def test_page_of_a_table_that_begins(tmp_path):
    records = table()
    kept = {
        name_of("docstrings", arm, seed)
        for arm in (FIRST, Arm("unified", 0.2))
        for seed in SEEDS[:2]
    }
    records = {n: r for n, r in records.items() if n.startswith("tune-") or n in kept}
    _, text, result = written(tmp_path, records)
    assert result["tasks"]["docstrings"]["arms"]["first-skip20"]["seeds"] == [1, 2]
    assert "n = 2" in text and not result["notes"]
    first_report.write(tmp_path / "none.html", first_summary.summary({}))
