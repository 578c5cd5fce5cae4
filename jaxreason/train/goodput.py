"""Goodput over a whole run, restarts included: the share of wall time that went into kept steps.

`goodput.jsonl` in the run's folder is appended to by every attempt (process) and never cut, also
where `metrics.jsonl` is cut back to the checkpoint that a later attempt was restored from:

    {"kind": "start", "time": 1.7e9, "step": 200}            process start (Unix), updates restored
    {"kind": "lap", "step": 300, "seconds": {"compute": ..}} seconds by cause since that start
    {"kind": "end", "step": 400, "seconds": {..}, "why": "done" | "preempted" | "ValueError"}

A killed attempt has no end: it is counted to its last lap. Laps are written after every save and
evaluation and every 10 s (once an attempt is older than 1000 s: 1 % of its age; in a bucket, where
the file is written anew each time: 60 s), so at most that much of a killed attempt is counted as
`down`.

Definition, as in Google's ML Goodput Measurement (docs.cloud.google.com/tpu/docs/goodput), whose
goodput is the share of time spent on "productive, preserved training progress":

    wall     first process start to the last lap, without the time after an attempt that was done
    goodput  seconds of `compute` (see train/clock.py) in steps that were kept, over wall
    lost     seconds of `compute` in steps that a later attempt was restored from before
    down     end of one attempt (its last lap) to the start of the next process
    others   seconds of all attempts by the cause's name

They add up to the wall time. Steps after the newest checkpoint count as kept until a restart shows
otherwise.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from jaxreason.train.log import is_local, is_primary
from jaxreason.train.manifest import atomic_write
from jaxreason.train.progress import duration

if TYPE_CHECKING:
    from jaxreason.train.clock import Clock  # It imports JAX, which reading needs not.

FILE_NAME = "goodput.jsonl"
CAUSES = {
    "compute": "training steps on the devices",
    "data": "devices idle, waiting for a batch",
    "checkpoint": "saving, as far as training waits for it",
    "eval": "evaluation, with its compiling",
    "compile": "first step of a phase, until its result",
    "load": "reading checkpoints and frozen models",
    "startup": "process start to the loop, first batch of a phase",
    "profile": "starting and writing traces",
    "other": "rows, notes, hosts agreeing",
}
"""What a second of a process is charged to, and what each cause covers."""
NAMES = {
    **CAUSES,
    "compute": "training steps on the devices, kept",
    "lost": "training steps done again after a restart",
    "down": "end of one process to the start of the next",
}
"""What the wall time of a whole run is divided among."""


class GoodputLog:
    """Writes one attempt's lines; a disk that refuses them stops no training.

    Args:
      run_dir: the run's folder, local or in a bucket.
      clock: of this attempt.
      step: updates that the attempt begins after.
      primary: whether this process writes; by default process 0 does.
      every_s: seconds between two laps; by default 10 on a disk, 60 in a bucket.
    """

    def __init__(
        self,
        run_dir: epath.PathLike,
        clock: "Clock",
        step: int,
        *,
        primary: bool | None = None,
        every_s: float | None = None,
    ):
        self.path = epath.Path(run_dir) / FILE_NAME
        self.error: OSError | None = None  # The first one met.
        self._clock = clock
        self.primary = is_primary() if primary is None else primary
        self._appends = is_local(self.path)
        self._every_s = every_s if every_s is not None else 10.0 if self._appends else 60.0
        self._last = time.monotonic()
        self._text = ""  # In a bucket: the whole file.
        if not self.primary:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
            # A line that a kill has torn stays alone in its line, and is passed over by readers.
            torn = "\n" if text and not text.endswith("\n") else ""
            self._text = "" if self._appends else text
            self._write({"kind": "start", "time": clock.started_unix, "step": step}, before=torn)
        except OSError as error:
            self.error = error

    def due(self) -> bool:
        """Whether a lap should be written by now."""
        age = time.time() - self._clock.started_unix
        return time.monotonic() - self._last >= max(self._every_s, 0.01 * age)

    def lap(self, step: int) -> None:
        """Writes the seconds so far, after `step` updates."""
        self._line({"kind": "lap", "step": step, "seconds": self._seconds()})

    def end(self, step: int, why: str) -> None:
        """Writes the last line; `why` is "done", "preempted", or the name of an error."""
        self._line({"kind": "end", "step": step, "seconds": self._seconds(), "why": why})

    def _seconds(self) -> dict[str, float]:
        return {name: round(s, 4) for name, s in self._clock.seconds().items() if s}

    def _line(self, row: Mapping[str, Any]) -> None:
        if not self.primary or self.error is not None:
            return
        try:
            self._write(row)
        except OSError as error:
            self.error = error

    def _write(self, row: Mapping[str, Any], before: str = "") -> None:
        line = f"{before}{json.dumps(row)}\n"
        if self._appends:
            # Opened each time: nothing to close, and a folder that was replaced is found again.
            with open(self.path, "ab", buffering=0) as file:
                file.write(line.encode())
        else:
            self._text += line
            atomic_write(self.path, self._text)
        self._last = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the wall time of a whole run went; see the definition at the top of this file."""

    seconds: Mapping[str, float]
    """Seconds by cause, in the order of `NAMES`; those of none are left out."""
    attempts: int
    """Processes that have worked on the run."""
    finished: bool
    """Whether the last attempt came to the run's end."""

    @property
    def wall_s(self) -> float:
        """Seconds from the first process' start to the last lap."""
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """Goodput: between 0 and 1."""
        return self.share("compute")

    @property
    def tries(self) -> str:
        """The number of attempts in words: `1 attempt` or `3 attempts`."""
        return "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"

    def share(self, cause: str) -> float:
        """Returns a cause's part of the wall time, between 0 and 1."""
        return self.seconds.get(cause, 0.0) / self.wall_s if self.wall_s else 0.0

    def line(self) -> str:
        """Says it in one line, with the causes of at least half a per cent, the largest first."""
        largest = sorted(self.seconds, key=self.share, reverse=True)
        parts = [
            f"{cause} {self.share(cause):.1%}"
            for cause in largest
            if cause != "compute" and self.share(cause) >= 0.005
        ]
        rest = f": {', '.join(parts)}" if parts else ""
        return f"goodput {self.fraction:.1%} of {duration(self.wall_s)} in {self.tries}{rest}"


@dataclasses.dataclass
class _Attempt:
    started: float
    step: int
    compute: list[tuple[int, float]]  # (updates, seconds of compute until then), rising
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    why: str | None = None

    def kept(self, until: float) -> float:
        """Seconds of compute in the updates up to `until`; between laps a straight line."""
        step, before = self.compute[0]
        if until <= step:
            return 0.0
        for here, seconds in self.compute[1:]:
            if until < here:
                return before + (seconds - before) * (until - step) / (here - step)
            step, before = here, seconds
        return before


def read_goodput(run_dir: epath.PathLike) -> Goodput | None:
    """Returns where a run's time went, or None where nothing is recorded.

    Lines that are not whole (torn by a kill) are passed over.
    """
    path = epath.Path(run_dir) / FILE_NAME
    if not path.exists():
        return None
    attempts: list[_Attempt] = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
            if row["kind"] == "start":
                attempts.append(_Attempt(float(row["time"]), step, [(step, 0.0)]))
            elif attempts:
                seconds = {str(k): float(v) for k, v in row["seconds"].items()}
                attempts[-1].seconds, attempts[-1].why = seconds, row.get("why")
                attempts[-1].compute.append((step, seconds.get("compute", 0.0)))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return _total(attempts) if attempts else None


def _total(attempts: list[_Attempt]) -> Goodput:
    total = dict.fromkeys(NAMES, 0.0)
    restored_from = float("inf")  # The least step that any later attempt began after.
    following: float | None = None
    for attempt in reversed(attempts):
        for name, seconds in attempt.seconds.items():
            total[name] = total.get(name, 0.0) + seconds
        lost = attempt.compute[-1][1] - attempt.kept(restored_from)
        total["compute"] -= lost
        total["lost"] += lost
        end = attempt.started + sum(attempt.seconds.values())
        if following is not None and attempt.why != "done":
            total["down"] += max(following - end, 0.0)
        restored_from, following = min(restored_from, attempt.step), attempt.started
    seconds = {name: s for name, s in total.items() if s > 0}
    return Goodput(seconds, len(attempts), attempts[-1].why == "done")
