"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere."""

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from jaxreason.train.log import is_primary

_SHORT = {"learning_rate": "lr", "grad_norm": "grad", "bits_per_byte": "bpb"}


class Progress:
    """Shows how far a run is; use it as a context manager.

    In a terminal: one bar with the loss, tokens a second and the time left. Elsewhere (a log file,
    a batch job): a line of fixed width for the first step, for the last, and at most one every
    `interval_s` seconds between. Processes other than the first print nothing.

    Args:
      total_steps: the step at which the run ends.
      title: a few words, such as the run's name.
      start: the step a resumed run starts from, so that the time left counts only what it does.
      interval_s: seconds between two plain lines.
      primary: whether this process prints; by default process 0 does.
      console: where to print; stdout by default.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        start: int = 0,
        interval_s: float = 10.0,
        primary: bool | None = None,
        console: Console | None = None,
    ):
        self._total = total_steps
        self._title = title
        self._start = start
        self._interval_s = interval_s
        self._primary = is_primary() if primary is None else primary
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: RichProgress | None = None
        self._first: tuple[int, float] | None = None  # (step, clock) of the first update
        self._printed = -math.inf

    def __enter__(self) -> "Progress":
        if self._primary and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", markup=False),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._start, numbers=""
            )
            self._bar.start()
        elif self._primary:
            self.note(f"{self._title}: steps {self._start} to {self._total}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, **metrics: float) -> None:
        """Shows the state after `step` updates.

        Args:
          step: updates done.
          **metrics: numbers already on the host, under the names of `metrics.jsonl`; `loss` and
            `time_tokens_per_s` (or `tokens_per_s`) come first, the others follow in the plain
            lines only.
        """
        if not self._primary:
            return
        if self._bar is not None:
            numbers = _numbers(metrics, only_first=True)
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if step < self._total and now - self._printed < self._interval_s:
            return
        self._printed = now
        width = len(str(self._total))
        line = (
            f"step {step:>{width}}/{self._total} {step / max(self._total, 1):>4.0%}  "
            f"left {self._left(step, now):>8}  {_numbers(metrics)}"
        )
        self._print(line.rstrip())

    def note(self, text: str) -> None:
        """Prints a line of its own: a phase that begins, a checkpoint, an evaluation."""
        if self._primary:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def _left(self, step: int, now: float) -> str:
        """Returns the time left, from the pace since the first update (so without compiling)."""
        first_step, first_time = self._first or (step, now)
        if step >= self._total:
            return "0:00:00"
        if step <= first_step:
            return "-:--:--"
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return duration(seconds)


def duration(seconds: float) -> str:
    """Returns seconds as `h:mm:ss`, rounded."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def quantity(value: float, digits: int = 3) -> str:
    """Returns a number with a metric prefix, such as `12.3k`, `1.25M` or `3.1e+21`."""
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 999.5e12:
        return f"{value:.{digits - 1}e}"
    for limit, factor, letter in (
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e6, 1e6, "M"),
        (1e3, 1e3, "k"),
    ):
        if abs(value) >= limit * (1 - 0.5 * 10.0**-digits):
            scaled = value / factor
            places = max(0, digits - len(str(int(abs(scaled) + 0.5 * 10.0 ** (1 - digits)))))
            return f"{scaled:.{places}f}{letter}"
    return f"{value:.{digits}g}"


def _numbers(metrics: dict[str, float], only_first: bool = False) -> str:
    rest = dict(metrics)
    parts = []
    if "loss" in rest:
        parts.append(f"loss {float(rest.pop('loss')):>7.4f}")
    pace = rest.pop("tokens_per_s", None)
    pace = rest.pop("time_tokens_per_s", pace)
    if pace is not None:
        parts.append(f"{quantity(float(pace)):>6} tok/s")
    if not only_first:
        for name, value in rest.items():
            if not name.startswith("time_"):
                parts.append(f"{_SHORT.get(name, name)} {float(value):<9.3g}")
    return "  ".join(parts)
