"""`report.html`: one self-contained page that shows a colleague what a run was and what it gave.

It loads nothing from anywhere: text, tables and curves are in the file, in light and dark.
"""

import importlib.resources
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

import jaxreason
from jaxreason.core.errors import UserError, nearest
from jaxreason.train import report_sections, report_tables, report_time
from jaxreason.train.report_sections import escape
from jaxreason.train.report_tables import Table
from jaxreason.train.runs import RunData, load_run, speedup

__all__ = ["RunData", "SAMPLE_SEPARATOR", "Table", "report_for_run", "speedup", "write_report"]

SAMPLE_SEPARATOR = "\n\f\n"
"""What stands between two texts in a run's `samples.txt`."""


def write_report(
    path: epath.PathLike,
    *,
    title: str,
    runs: Sequence[RunData],
    baseline: str | None = None,
    summary: Sequence[Table] = (),
    command: str = "",
    facts: Mapping[str, Any] | None = None,
    samples: Sequence[str] = (),
    expected: str | None = None,
    about: str = "",
) -> epath.Path:
    """Writes a report of one run, or of several beside each other, as one HTML file.

    The page's subject is the first run that is not the baseline. A run whose corpus has another
    SHA-256 than the subject's is named and left out, because losses on different text say nothing
    about runs. What a run did not record is left out or shown as "n/a".

    Args:
      path: the file, local or in a bucket; replaced in one rename.
      title: the page's heading.
      runs: the runs, at least one, with names of their own.
      baseline: the name of the run that the others are compared with, or of a group of runs, where
        each run is compared with the baseline of the same `facts["seed"]`.
      summary: more tables, such as means over seeds.
      command: the exact command that repeats this.
      facts: what to print about the environment; by default the subject's `facts`.
      samples: texts that the model wrote.
      expected: the number to expect and where it is from, such as "held-out loss 3.21 (paper)".
      about: one sentence saying what the run was; by default one made from its facts.

    Returns:
      The path.

    Raises:
      UserError: no runs, two with one name, or a baseline that is not among them.
    """
    if not runs:
        raise UserError(f"{path}: a report needs at least one run, got none")
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: runs of a report need different names, got {names}")
    known = [*names, *(run.group for run in runs if run.group)]
    if baseline is not None and baseline not in known:
        raise UserError(
            f"{path}: baseline {baseline!r} is not among the runs {names}{nearest(baseline, known)}"
        )
    others = [run for run in runs if baseline not in (run.name, run.group)]
    subject = others[0] if others else runs[0]
    facts = dict(subject.facts if facts is None else facts)
    shown, warnings = _comparable(runs, subject)
    pairs = {run.name: _baseline_of(run, shown, baseline) for run in shown}
    warnings += _non_finite(shown)

    body = [
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{escape(about or report_sections.about(subject))}</p></header>',
        *(f'<p class="warning">{escape(text)}</p>' for text in warnings),
        report_sections.cards(subject, pairs[subject.name], expected),
        report_tables.section("Result", report_tables.comparison(shown, pairs), *summary),
        report_sections.curves(shown),
        report_tables.section("Cost", report_tables.cost(shown)),
        report_time.section(shown),
        report_sections.texts(samples),
        report_sections.reproduce(command, facts),
        report_sections.configs(shown),
        f"<footer>Written by jaxreason {jaxreason.__version__} from metrics.jsonl.</footer>",
    ]
    template = importlib.resources.files("jaxreason.train").joinpath("report_page.html")
    page = string.Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(part for part in body if part)
    )
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(page)
    temporary.replace(path)
    return path


def report_for_run(
    run_dir: epath.PathLike, *, against: epath.PathLike | None = None, expected: str | None = None
) -> epath.Path:
    """Writes `<run_dir>/report.html` from what the folder holds.

    Reads `config.json`, `metrics.jsonl` and, where present, `goodput.jsonl`, `facts.json` and
    `samples.txt` (texts apart by `SAMPLE_SEPARATOR`).

    Args:
      run_dir: the run's folder.
      against: the folder of a run to show as the baseline.
      expected: as in `write_report`; by default `facts["expected"]`.

    Raises:
      UserError: a folder that is no run's.
    """
    run_dir = epath.Path(run_dir)
    run = load_run(run_dir)
    runs, baseline = [run], None
    if against is not None:
        other = load_run(against)
        if other.name == run.name:
            other = load_run(against, name=str(against))
        runs, baseline = [other, run], other.name
    file = run_dir / "samples.txt"
    samples = file.read_text().split(SAMPLE_SEPARATOR) if file.exists() else []
    own = ("command", "expected", "about")
    return write_report(
        run_dir / "report.html",
        title=run.name,
        runs=runs,
        baseline=baseline,
        command=str(run.facts.get("command", "")),
        facts={name: value for name, value in run.facts.items() if name not in own},
        samples=[text for text in samples if text.strip()],
        expected=expected or run.facts.get("expected"),
        about=str(run.facts.get("about", "")),
    )


def _comparable(runs: Sequence[RunData], subject: RunData) -> tuple[list[RunData], list[str]]:
    """Returns the runs on the subject's text, and what to tell the reader about the others."""
    corpus = subject.facts.get("corpus_sha256")
    shown = [run for run in runs if run.facts.get("corpus_sha256") == corpus]
    left_out = [run.name for run in runs if run.facts.get("corpus_sha256") != corpus]
    warnings = []
    if left_out:
        warnings.append(
            f"Left out, because not known to be trained on the same text as {subject.name} (the "
            f"SHA-256 of the corpora differ): {', '.join(left_out)}."
        )
    if corpus is None and len(shown) > 1:
        warnings.append(
            "The runs do not record the SHA-256 of their text: compare them only if it is the same."
        )
    return shown, warnings


def _baseline_of(run: RunData, runs: Sequence[RunData], baseline: str | None) -> RunData | None:
    """Returns the run to compare with: of the same seed, where the baseline is a group."""
    if baseline is None or baseline in (run.name, run.group):
        return None
    for other in runs:
        if other.name == baseline:
            return other
    group = [other for other in runs if other.group == baseline]
    same = [other for other in group if other.facts.get("seed") == run.facts.get("seed")]
    return same[0] if len(same) == 1 else group[0] if len(group) == 1 else None


def _non_finite(runs: Sequence[RunData]) -> list[str]:
    found = []
    for run in runs:
        for kind, what in (("train", "training"), ("eval", "held-out")):
            steps = [step for step, value in run.series(kind, "loss") if not math.isfinite(value)]
            if steps:
                found.append(
                    f"{run.name}: the {what} loss is not finite in {len(steps)} row(s), first at "
                    f"step {steps[0]:,}."
                )
    return found
