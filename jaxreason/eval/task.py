"""Task scores: a model's answers to examples, each scored and kept as a line of JSON.

What answers is passed in (`complete`), so this knows no sampler. A file of records that is there
is gone on with, as far as its records were asked the same (`asked`) of the same model.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.eval.metrics import METRICS


class Question(Protocol):
    """What is asked: a prompt, the wanted completion, and a name; `data.Example` is one."""

    @property
    def prompt(self) -> str: ...
    @property
    def completion(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def group(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote to one question."""

    text: str
    """Without the end of text."""
    tokens: int
    """Tokens drawn."""
    finish_reason: str
    """Why it ended: eos, stop, length."""
    layers: tuple[int, ...] | None = None
    """Layers that its tokens ran; None where none may be skipped."""
    seconds_per_token: float | None = None
    """Decoding time of a token after the first; None where it was not measured alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One example: what was asked (by name), wanted, written, and how good it is."""

    name: str
    group: str
    """What it shares with other examples (a docstring's package), for draws of whole groups; empty:
    nothing."""
    reference: str
    text: str
    scores: dict[str, float]
    """By the name of the metric, in percent."""
    tokens: int
    finish_reason: str
    layers: list[int] | None = None
    seconds_per_token: float | None = None
    asked: str = ""
    """Hash of what was asked of what: model, settings, prompt; empty where nobody told it."""


def evaluate(
    complete: Callable[[Sequence[Question]], Sequence[Answer]],
    questions: Sequence[Question],
    metrics: Sequence[str],
    *,
    path: str | os.PathLike | None = None,
    batch_size: int = 8,
    asked: Callable[[Question], str] | None = None,
) -> list[Record]:
    """Asks every question, scores the answers, returns the records in the questions' order.

    Args:
        complete: gives the answers to some questions, in order.
        questions: with names that differ.
        metrics: names in `eval.metrics.METRICS`.
        path: JSON lines to which records are added as they come; what is in it is not asked again.
        batch_size: questions given to `complete` at a time; between two the file is written.
        asked: the hash that a question's record has (`recipes.score_task.asked_of`). A record in
            the file that has another, or none, is refused. None: records have none, and those in
            the file are taken as they are.

    Raises:
        UserError: a metric is unknown, its package is not there, or the file's records are of other
            questions, metrics, models or settings.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"no metric {metric!r}; expected one of {', '.join(METRICS)}")
    by_name = {question.name: question for question in questions}
    if len(by_name) < len(questions):
        raise UserError("two questions have one name; expected names that differ")
    done = {record.name: record for record in read_records(path)} if path is not None else {}
    for record in done.values():
        _check_same(record, by_name, metrics, path, asked)
    waiting = [question for question in questions if question.name not in done]
    for start in range(0, len(waiting), batch_size):
        put = waiting[start : start + batch_size]
        answers = complete(put)
        new = [_record(q, a, metrics, asked) for q, a in zip(put, answers, strict=True)]
        done |= {record.name: record for record in new}
        if path is not None:
            _append(path, new)
    return [done[question.name] for question in questions]


def read_records(path: str | os.PathLike) -> list[Record]:
    """The records of a file; none where it is not there. An unfinished last line is left out.

    Raises:
        UserError: a line is no record.
    """
    file = epath.Path(path)
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    found = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no record ({error}); remove the file, or the line"
            ) from None
    return found


def means(records: Iterable[Record]) -> dict[str, Any]:
    """Mean scores, tokens and layers of records, and the median time of a token where measured."""
    records = list(records)
    out: dict[str, Any] = {"examples": len(records)}
    for metric in records[0].scores if records else ():
        out[metric] = statistics.fmean(record.scores[metric] for record in records)
    if records:
        out["tokens"] = statistics.fmean(record.tokens for record in records)
        out["finished"] = statistics.fmean(record.finish_reason != "length" for record in records)
    layers = [len(record.layers) for record in records if record.layers is not None]
    if layers:
        out["layers"] = statistics.fmean(layers)
    times = [r.seconds_per_token for r in records if r.seconds_per_token is not None]
    if times:
        out["seconds_per_token"] = statistics.median(times)
    return out


def _record(question: Question, answer: Answer, metrics: Sequence[str], asked) -> Record:
    return Record(
        name=question.name,
        group=question.group,
        reference=question.completion,
        text=answer.text,
        scores={name: METRICS[name](answer.text, question.completion) for name in metrics},
        tokens=answer.tokens,
        finish_reason=answer.finish_reason,
        layers=None if answer.layers is None else list(answer.layers),
        seconds_per_token=answer.seconds_per_token,
        asked="" if asked is None else asked(question),
    )


def _check_same(record: Record, by_name: dict[str, Question], metrics, path, asked) -> None:
    question = by_name.get(record.name)
    if question is None or question.completion != record.reference:
        raise UserError(
            f"{path} has a record of {record.name!r}, which is not asked with that reference; "
            "remove the file, or give another path"
        )
    if list(record.scores) != list(metrics):
        raise UserError(
            f"{path} has scores {', '.join(record.scores)}, expected {', '.join(metrics)}; "
            "remove the file, or give another path"
        )
    if asked is not None and record.asked != asked(question):
        raise UserError(
            f"{path} has an answer to {record.name!r} of another model, or asked with another "
            "prompt or other settings; remove the file, or give another path"
        )


def _append(path: str | os.PathLike, records: Sequence[Record]) -> None:
    """Adds whole lines, behind the last whole line: a killed writer leaves a part of one."""
    file = epath.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    old = file.read_text() if file.exists() else ""
    whole = old[: old.rfind("\n") + 1]
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records]
    new = file.parent / f".{file.name}.{os.getpid()}"
    new.write_text(whole + "".join(f"{line}\n" for line in lines))
    new.replace(file)
