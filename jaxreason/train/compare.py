"""Two or more runs side by side, as text: what was set differently and what came out of it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.train import runs as runs_lib
from jaxreason.train.progress import duration
from jaxreason.train.runs import RunData


def compare(*run_dirs: epath.PathLike) -> str:
    """Compares runs; the first one is the baseline of every difference.

    Shows the config fields that differ, the held-out losses (final, best, and at the last step that
    both have), and the curves. Losses on different text say nothing about the runs: where the
    SHA-256 of the corpora differ, or one is not recorded, only the config fields are shown.

    Args:
      *run_dirs: two or more run folders.

    Returns:
      Text of several lines, at most about 100 columns wide.

    Raises:
      UserError: fewer than two runs, or a folder that is no run's.
    """
    if len(run_dirs) < 2:
        raise UserError(f"compare: got {len(run_dirs)} run(s), expected two or more run folders")
    runs = [
        runs_lib.load_run(path, name)
        for path, name in zip(run_dirs, _short_names(run_dirs), strict=True)
    ]
    letters = "abcdefghijklmnopqrstuvwxyz"
    if len(runs) > len(letters):
        raise UserError(f"compare: got {len(runs)} runs, expected at most {len(letters)}")
    parts = ["\n".join(f"{letter}  {run.name}" for letter, run in zip(letters, runs, strict=False))]
    parts.append("Config\n" + _indent(_config_text(runs, letters)))
    hashes = [run.facts.get("corpus_sha256") for run in runs]
    if None in hashes or len(set(hashes)) > 1:
        listed = "\n".join(
            f"{letter}  {str(value)[:16] if value else 'not recorded'}"
            for letter, value in zip(letters, hashes, strict=False)
        )
        parts.append(
            "Not comparable: not known to be trained on the same text (SHA-256 of the corpora "
            "below),\nso no losses or curves are shown.\n" + _indent(listed)
        )
        return "\n\n".join(parts) + "\n"
    if len({run.facts.get("plan_sha256") for run in runs}) > 1:
        parts.append("Note: same corpus, but packed or ordered differently (plan hashes differ).")
    parts.append("Held-out loss (nats a token)\n" + _indent(_loss_text(runs, letters)))
    curves = {letter: run.held_out for letter, run in zip(letters, runs, strict=False)}
    parts.append(_indent(draw(curves)))
    return "\n\n".join(parts) + "\n"


def draw(curves: Mapping[str, runs_lib.Curve], width: int = 68, height: int = 16) -> str:
    """Draws curves over a common step axis with one letter each; `*` where curves meet.

    The vertical range leaves out what lies above the values reached after 10 % of the steps.
    """
    points = {mark: [p for p in curve if p[1] == p[1]] for mark, curve in curves.items()}
    every = [p for curve in points.values() for p in curve]
    if not every:
        return "(no held-out losses)"
    first, last = min(s for s, _ in every), max(s for s, _ in every)
    low = min(v for _, v in every)
    high = max((v for s, v in every if s >= first + 0.1 * (last - first)), default=low)
    high = high if high > low else low + 1e-6 + abs(low) * 1e-3
    grid = [[" "] * width for _ in range(height)]
    for mark, curve in points.items():
        for column in range(width):
            step = first + (last - first) * column / (width - 1)
            value = runs_lib.value_at(curve, step)
            if value is None or value > high:
                continue
            row = round((high - value) / (high - low) * (height - 1))
            grid[row][column] = mark if grid[row][column] == " " else "*"
    lines = []
    for number, cells in enumerate(grid):
        labelled = number % 5 == 0 or number == height - 1
        value = high - (high - low) * number / (height - 1)
        label = f"{value:8.4f} " if labelled else " " * 9
        lines.append(label + ("+" if labelled else "|") + "".join(cells).rstrip())
    ends = f"{first:,.0f}"
    lines.append(" " * 9 + "+" + "-" * width)
    lines.append(" " * 10 + ends + f"step {last:,.0f}".rjust(width - len(ends)))
    return "\n".join(lines)


def _config_text(runs: Sequence[RunData], letters: str) -> str:
    rows = [
        [field, *[_short(value) for value in values]]
        for field, values in runs_lib.config_differences(runs)
    ]
    if not rows:
        return "no field differs"
    return _table(["field", *letters[: len(runs)]], rows, numbers=False)


def _loss_text(runs: Sequence[RunData], letters: str) -> str:
    base = runs[0].held_out
    rows = []
    for letter, run in zip(letters, runs, strict=False):
        curve = run.held_out
        if not curve:
            rows.append([letter, *["n/a"] * 7])
            continue
        best_step, best = min(curve, key=lambda point: point[1])
        difference = runs_lib.difference_at_equal_steps(base, curve)
        ratio = runs_lib.speedup(base, curve)
        seconds = run.wall_time_s
        is_base = run is runs[0]
        rows.append(
            [
                letter,
                f"{curve[-1][0]:,}",
                f"{curve[-1][1]:.4f}",
                f"{best:.4f} @{best_step:,}",
                ""
                if is_base
                else f"{difference[1]:+.4f} @{difference[0]:,}"
                if difference
                else "n/a",
                "" if is_base else f"{ratio:.2f}x" if ratio is not None else "n/a",
                _bits(run),
                duration(seconds) if seconds is not None else "n/a",
            ]
        )
    header = ["", "steps", "final", "best", "minus a", "speed-up", "bits/byte", "time"]
    if any(run.goodput for run in runs):
        header.append("goodput")
        for row, run in zip(rows, runs, strict=True):
            row.append(f"{run.goodput.fraction:.1%}" if run.goodput else "n/a")
    return _table(header, rows) + (
        "\n\nminus a: at the last step both have. speed-up: steps a needs to the run's final loss,"
        "\ndivided by the run's steps (n/a: a never gets there)."
    )


def _bits(run: RunData) -> str:
    value = run.last("eval", "bits_per_byte")
    return "n/a" if value is None else f"{value:.4f}"


def _table(header: list[str], rows: list[list[str]], numbers: bool = True) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is runs_lib.MISSING:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _short_names(paths: Sequence[epath.PathLike]) -> list[str]:
    """Returns the folders' own names, or whole paths where two would be the same."""
    names = [epath.Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _indent(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.split("\n"))
