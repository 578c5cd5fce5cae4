"""Scores against their definitions, computed slowly."""

import sys

import pytest

from jaxreason.core.errors import UserError
from jaxreason.eval import metrics


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common_subsequence(a[1:], b[1:])
    return max(longest_common_subsequence(a[1:], b), longest_common_subsequence(a, b[1:]))


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("the red cat sat", "a red dog sat down"),
        ("one two three", "three two one"),
        ("same words here", "same words here"),
        ("nothing", "at all"),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_subsequence(text, reference):
    a, b = text.split(), reference.split()
    common = longest_common_subsequence(a, b)
    want = 200 * common / (len(a) + len(b))
    assert metrics.rouge_l(text, reference) == pytest.approx(want)


def test_rouge_l_stems_and_lowers():
    assert metrics.rouge_l("Returns the names", "return the name") == pytest.approx(100)


def slow_chrf(text: str, reference: str) -> float:
    a, b = ("".join(t.split()) for t in (text, reference))
    precisions, recalls = [], []
    for n in range(1, 7):
        x = [a[i : i + n] for i in range(len(a) - n + 1)]
        y = [b[i : i + n] for i in range(len(b) - n + 1)]
        if not x or not y:
            continue
        rest, match = list(y), 0
        for gram in x:
            if gram in rest:
                rest.remove(gram)
                match += 1
        precisions.append(match / len(x))
        recalls.append(match / len(y))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 100 * 5 * p * r / (4 * p + r) if p + r else 0.0


@pytest.mark.parametrize("text", ["Return the name.", "Gives a name back to us.", "xyz"])
def test_chrf_is_its_definition(text):
    reference = "Return the full name."
    assert metrics.chrf(text, reference) == pytest.approx(slow_chrf(text, reference), abs=0.01)


def test_exact_answer():
    assert metrics.exact_answer("3 * 4 = 12\n#### 12", "#### 12.0") == 100
    assert metrics.exact_answer("3 * 4 = 12", "#### 12") == 0


@pytest.mark.parametrize(("metric", "module"), [("chrf", "sacrebleu"), ("rouge_l", "rouge_score")])
def test_without_the_package(monkeypatch, metric, module):
    metrics._scorer.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"pip install 'jaxreason\[tasks\]'"):
        metrics.METRICS[metric]("a", "b")
