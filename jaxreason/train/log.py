"""`metrics.jsonl`: the one place where a run's numbers go; every reader reads from here.

One JSON object a line: `{"step": 20, "kind": "train", "loss": 3.1, ..., "time_unix": ...}`.

    kind    "train" (a row of step s means "after update s"), "eval" (held out), "event"
    loss    mean nats a token (train: of the batch; eval: of the held-out split)
    others  `bits_per_byte`, `learning_rate`, `grad_norm`, cumulative `tokens` and `flops`, and
            whatever a method reports, by its own name
    time_*  all that depends on the clock: `time_unix` (seconds, added to every row), `time_s`
            (seconds of training so far), `time_tokens_per_s`, `time_mfu`; `time_interval_s` since
            the row before and its parts `time_in_<cause>_s`, by train/clock.py

Without its `time_*` fields a resumed run's file equals an uninterrupted run's, byte for byte.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.train.manifest import atomic_write

FILE_NAME = "metrics.jsonl"
KINDS = ("train", "eval", "event")
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def is_primary() -> bool:
    """Says whether this process is the one that writes and prints (process 0)."""
    import jax  # Here, so that reading a run's numbers starts no accelerator.

    return jax.process_index() == 0


class MetricsLog:
    """Appends rows to `<run_dir>/metrics.jsonl`, so that a kill at any moment loses no written row.

    On a local disk each row is one `write` call to a file opened for appending; `flush` also forces
    it to the disk. A bucket cannot append: there the rows are held in memory and the whole object
    is written anew by `flush`, by `close`, and by a `write` that comes `bucket_flush_s` seconds
    after the last time. So call `flush` before every checkpoint: what a kill then loses is only
    what the resumed run writes again.

    JSON has no NaN: `nan`, `inf` and `-inf` are stored as those strings and read back as floats.

    Args:
      run_dir: the run's folder, local or in a bucket; made when missing.
      primary: whether this process writes; every method does nothing on the others. By default
        process 0 writes.
      bucket_flush_s: see above.
    """

    def __init__(
        self, run_dir: epath.PathLike, *, primary: bool | None = None, bucket_flush_s: float = 60.0
    ):
        self.path = epath.Path(run_dir) / FILE_NAME
        self._primary = is_primary() if primary is None else primary
        self._appends = is_local(self.path)
        self._bucket_flush_s = bucket_flush_s
        self._fd: int | None = None
        self._last: dict[str, int] = {}
        self._events: set[str] = set()
        self._lines: list[str] = []  # In a bucket: the whole file. On a disk: empty.
        if self._primary:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._keep(lambda row: True)

    def write(self, step: int, kind: str, **values: Any) -> None:
        """Appends one row.

        An event that the file holds already (same step and values) is not written again, so that a
        resumed run may announce its phase, with the phase's first step, like an uninterrupted one.

        Args:
          step: updates done so far; for "train" and "eval" never below an earlier row's.
          kind: one of `KINDS`.
          **values: scalars (Python, NumPy or JAX) or, for events, short strings.

        Raises:
          UserError: the file already holds later rows (an old run's folder used without resuming).
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: expected one of {KINDS}")
        if not self._primary:
            return
        step = int(step)
        if kind != "event" and step < self._last.get(kind, step):
            raise UserError(
                f"{self.path}: got a {kind} row of step {step} after one of step "
                f"{self._last[kind]}; resume that run or choose another run folder"
            )
        row = {"step": step, "kind": kind} | {k: _plain(v) for k, v in values.items()}
        if kind == "event":
            if (said := _event(row)) in self._events:
                return
            self._events.add(said)
        row.setdefault("time_unix", round(time.time(), 3))
        line = json.dumps(row, allow_nan=False) + "\n"
        self._last[kind] = step
        if self._appends:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            data = line.encode()
            while data:  # One call, but for a full disk or a signal.
                data = data[os.write(self._fd, data) :]
        else:
            self._lines.append(line)
            if time.monotonic() - self._flushed >= self._bucket_flush_s:
                self.flush()

    def truncate_after(self, step: int) -> None:
        """Cuts every row with a step above `step`, and a last line torn by a kill.

        Call it once after restoring a checkpoint of `step` updates; -1 empties the file. The new
        content replaces the old in one rename.
        """
        if self._primary:
            self._keep(lambda row: row["step"] <= step)

    def last_step(self, kind: str) -> int | None:
        """Returns the step of the last row of a kind, or None.

        A resumed run asks it whether the evaluation of its first step is already written.
        """
        return self._last.get(kind)

    def flush(self) -> None:
        """Makes the rows written so far survive the machine, not only the process."""
        if not self._primary:
            return
        if self._fd is not None:
            os.fsync(self._fd)
        if not self._appends:
            atomic_write(self.path, "".join(self._lines))
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes, and closes the file; a later `write` opens it again."""
        self.flush()
        self._close_fd()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, wanted) -> None:
        """Rewrites the file with the rows that `wanted` accepts, where that changes it."""
        text = self.path.read_text() if self.path.exists() else ""
        if not self._appends and self._lines:
            text = "".join(self._lines)
        kept = [(line, row) for line, row in _parse(text, self.path) if wanted(row)]
        new = "".join(line + "\n" for line, _ in kept)
        if new != text:
            self._close_fd()
            atomic_write(self.path, new)
        self._last = {row["kind"]: row["step"] for _, row in kept}
        self._events = {_event(row) for _, row in kept if row["kind"] == "event"}
        if not self._appends:
            self._lines = [line + "\n" for line, _ in kept]
        self._flushed = time.monotonic()

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def read_metrics(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """Returns the rows of a run's `metrics.jsonl` in written order; none where there is no file.

    A last line that a kill has torn is left out.

    Raises:
      UserError: a line before the last is not a row.
    """
    path = epath.Path(run_dir) / FILE_NAME
    if not path.exists():
        return []
    return [row for _, row in _parse(path.read_text(), path)]


def without_time(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows without their `time_*` fields: what two equal runs have in common."""
    return [{k: v for k, v in row.items() if not k.startswith("time_")} for row in rows]


def _parse(text: str, path: epath.Path) -> list[tuple[str, dict[str, Any]]]:
    lines = text.split("\n")
    while lines and not lines[-1]:
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row["step"], int) or not isinstance(row["kind"], str):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: expected a JSON object with step and kind, got "
                f"{line[:60]!r}; delete that line or restore the file"
            ) from None
        parsed.append((line, {k: _restored(v) for k, v in row.items()}))
    return parsed


def _event(row: Mapping[str, Any]) -> str:
    return repr(sorted(without_time([row])[0].items()))


def _restored(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: Any) -> float | int | bool | str:
    """Returns what JSON can hold for one scalar."""
    if isinstance(value, (str, bool, int)):
        return value
    number = value.item() if hasattr(value, "item") else float(value)
    if isinstance(number, (bool, int)):
        return number
    number = float(number)
    return number if math.isfinite(number) else str(number)


def is_local(path: epath.Path) -> bool:
    """Whether a path is of this machine's disks, not of a bucket."""
    return "://" not in os.fspath(path)
