"""Runs side by side: config differences always, numbers only on the same text."""

import json

import pytest

from jaxreason.core.errors import UserError
from jaxreason.train.compare import compare, draw
from jaxreason.train.runs import MISSING, RunData, config_differences, flatten


def make(folder, curve, config, corpus="a" * 64, **facts):
    folder.mkdir(parents=True)
    rows = [{"step": s, "kind": "eval", "loss": v, "bits_per_byte": v / 3} for s, v in curve]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(config))
    if corpus:
        facts["corpus_sha256"] = corpus
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


BASE = [(0, 10.0), (100, 4.0), (200, 3.0), (400, 2.0)]
LET = [(0, 10.0), (100, 2.9), (200, 2.5), (250, 2.6)]


def test_flat_differences():
    assert flatten({"a": {"b": 1, "c": [1, {"d": 2}]}, "e": {}}) == {
        "a.b": 1,
        "a.c": [1, {"d": 2}],
        "e": {},
    }
    runs = [
        RunData(name="x", rows=[], config={"seed": 1, "objective": {"name": "lm"}}),
        RunData(name="y", rows=[], config={"seed": 1, "objective": {"name": "let", "layer": 3}}),
    ]
    assert config_differences(runs) == [
        ("objective.name", ["lm", "let"]),
        ("objective.layer", [MISSING, 3]),
    ]
    assert config_differences([runs[0], runs[0]]) == []


def test_numbers_on_the_same_text(tmp_path):
    a = make(tmp_path / "base", BASE, {"seed": 1, "objective": {"name": "lm"}}, plan_sha256="p")
    b = make(tmp_path / "let", LET, {"seed": 1, "objective": {"name": "let"}}, plan_sha256="p")
    text = compare(a, b)
    assert 'objective.name  "lm"  "let"' in text and "seed" not in text
    table = text[text.index("Held-out") :].splitlines()
    first, second = (next(r.split() for r in table if r.split()[:1] == [n]) for n in "ab")
    assert first[1:5] == ["400", "2.0000", "2.0000", "@400"]
    # At 250 the baseline stands at 2.75. It first reaches 2.6 at step 280, the other at 175.
    assert second[1:8] == ["250", "2.6000", "2.5000", "@200", "-0.1500", "@250", "1.60x"]
    assert "plan hashes" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_method_that_ends_below_the_baseline_is_timed_at_the_baseline_s_loss(tmp_path):
    a = make(tmp_path / "a", BASE, {})  # It ends at 2.0, which the other passes at step 355.6.
    b = make(tmp_path / "b", [(0, 10.0), (400, 1.0)], {})
    line = [r for r in compare(a, b).splitlines() if r.split()[:1] == ["b"]][1]
    assert line.split()[5:8] == ["-1.0000", "@400", "1.12x"]


@pytest.mark.parametrize("corpora", [("a" * 64, "b" * 64), ("a" * 64, None), (None, None)])
def test_other_or_unknown_text_shows_config_only(tmp_path, corpora):
    a = make(tmp_path / "a", BASE, {"seed": 1}, corpus=corpora[0])
    b = make(tmp_path / "b", LET, {"seed": 2}, corpus=corpora[1])
    text = compare(a, b)
    assert "Not comparable" in text and "seed" in text
    assert "2.0000" not in text and "speed-up" not in text and "+---" not in text


def test_other_order_of_the_same_text_is_said(tmp_path):
    a = make(tmp_path / "a", BASE, {}, plan_sha256="p")
    b = make(tmp_path / "b", LET, {}, plan_sha256="q")
    assert "plan hashes differ" in compare(a, b)


def test_three_runs_one_without_evaluations_and_equal_names(tmp_path):
    runs = [make(tmp_path / n / "run", c, {}) for n, c in (("x", BASE), ("y", LET), ("z", []))]
    text = compare(*runs)
    assert "no field differs" in text and str(runs[2]) in text
    assert [r.split()[1] for r in text.splitlines() if r.split()[:1] == ["c"]][1] == "n/a"


def test_drawing():
    text = draw({"a": [(0, 3.0), (100, 1.0)], "b": [(0, 3.0), (100, 3.0)]}, width=21, height=9)
    rows = [line[10:] for line in text.splitlines()]
    assert rows[0] == "**" + "b" * 19
    assert rows[8] == " " * 19 + "aa"
    assert text.splitlines()[-1].endswith("step 100")
    assert draw({"a": []}) == "(no held-out losses)"
    assert "2.0000" in draw({"a": [(0, 2.0)]})


def test_what_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="two or more"):
        compare(make(tmp_path / "a", BASE, {}))
    with pytest.raises(UserError, match="no config.json"):
        compare(tmp_path / "a", tmp_path)
    (tmp_path / "a" / "facts.json").write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object, got list"):
        compare(tmp_path / "a", tmp_path / "a")
