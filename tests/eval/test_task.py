"""A scoring: what is asked, kept, gone on with."""

import dataclasses
import json

import pytest

from jaxreason.core.errors import UserError
from jaxreason.data import Example
from jaxreason.eval.task import Answer, evaluate, means, read_records

QUESTIONS = [Example(f"{i} + 1?", f"#### {i + 1}", f"q{i}", "sums") for i in range(5)]


class Model:
    """Answers rightly but for question 3; fails at a question when told so."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def __call__(self, questions):
        if any(q.name == self.fails_at for q in questions):
            raise KeyboardInterrupt
        self.asked += [q.name for q in questions]
        return [
            Answer(
                text="#### 0" if q.name == "q3" else q.completion,
                tokens=4,
                finish_reason="length" if q.name == "q3" else "eos",
                layers=(0, 2) if q.name == "q0" else (0, 1, 2),
                seconds_per_token=0.1 * (1 + int(q.name[1])),
            )
            for q in questions
        ]


def test_records_and_means(tmp_path):
    path = tmp_path / "deep" / "test.jsonl"
    found = evaluate(Model(), QUESTIONS, ["exact"], path=path, batch_size=2)
    assert [r.name for r in found] == ["q0", "q1", "q2", "q3", "q4"]
    assert [r.scores["exact"] for r in found] == [100, 100, 100, 0, 100]
    assert found[0].layers == [0, 2] and found[0].reference == "#### 1"
    assert read_records(path) == found
    total = means(found)
    assert total == {
        "examples": 5, "exact": 80, "tokens": 4, "finished": 0.8,
        "layers": pytest.approx(2.8), "seconds_per_token": pytest.approx(0.3),
    }  # fmt: skip


def test_a_killed_scoring_goes_on(tmp_path):
    path = tmp_path / "test.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Model(fails_at="q3"), QUESTIONS, ["exact"], path=path, batch_size=1)
    with path.open("a") as file:
        file.write('{"name": "q3", "gro')  # A line that was never finished.
    model = Model()
    found = evaluate(model, QUESTIONS, ["exact"], path=path, batch_size=1)
    assert model.asked == ["q3", "q4"]
    assert found == evaluate(Model(), QUESTIONS, ["exact"])
    assert read_records(path) == found


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "test.jsonl"
    evaluate(Model(), QUESTIONS, ["exact"], path=path)
    other = [dataclasses.replace(QUESTIONS[0], completion="#### 9"), *QUESTIONS[1:]]
    with pytest.raises(UserError, match="'q0', which is not asked with that reference"):
        evaluate(Model(), other, ["exact"], path=path)
    with pytest.raises(UserError, match="'q4', which is not asked"):
        evaluate(Model(), QUESTIONS[:4], ["exact"], path=path)
    with pytest.raises(UserError, match="has scores exact, expected rouge_l"):
        evaluate(Model(), QUESTIONS, ["rouge_l"], path=path)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        read_records(path)


def test_what_was_asked_otherwise_is_not_gone_on_with(tmp_path):
    path = tmp_path / "test.jsonl"

    def by(model: str, wording: str = ""):
        return lambda question: f"{model}: {question.prompt}{wording}"

    found = evaluate(Model(), QUESTIONS[:3], ["exact"], path=path, asked=by("one"))
    assert [r.asked for r in found] == ["one: 0 + 1?", "one: 1 + 1?", "one: 2 + 1?"]
    again = Model()
    whole = evaluate(again, QUESTIONS, ["exact"], path=path, asked=by("one"))
    assert again.asked == ["q3", "q4"] and whole[:3] == found and read_records(path) == whole
    before = path.read_bytes()
    for other in (by("two"), by("one", " Think.")):
        with pytest.raises(UserError, match="an answer to 'q0' of another model, or asked with an"):
            evaluate(Model(), QUESTIONS, ["exact"], path=path, asked=other)
        assert path.read_bytes() == before
    evaluate(Model(), QUESTIONS[:2], ["exact"], path=tmp_path / "untold.jsonl")
    with pytest.raises(UserError, match="'q0' of another model"):
        evaluate(Model(), QUESTIONS, ["exact"], path=tmp_path / "untold.jsonl", asked=by("one"))


def test_records_name_their_group(tmp_path):
    path = tmp_path / "test.jsonl"
    alone = Example("6 + 1?", "#### 7", "q6")
    evaluate(Model(), [*QUESTIONS[:2], alone], ["exact"], path=path)
    assert [json.loads(line)["group"] for line in path.open()] == ["sums", "sums", ""]


def test_wrong_calls():
    with pytest.raises(UserError, match="no metric 'bleu'; expected one of rouge_l"):
        evaluate(Model(), QUESTIONS, ["bleu"])
    with pytest.raises(UserError, match="two questions have one name"):
        evaluate(Model(), QUESTIONS[:1] * 2, ["exact"])
