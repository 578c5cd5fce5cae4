"""Where a process' wall time goes: every second since its start is charged to one cause.

A second in which the devices work on a training step counts as `compute`, whatever the host does
meanwhile; any other second counts as what the host does in it. So waiting for a batch is charged
only as far as the devices waited too, and nothing is ever counted twice or not at all. The causes
are `CAUSES` in train/goodput.py, which adds up the attempts at a run.
"""

import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jaxreason.train.goodput import CAUSES

TRAINING = ("compute", "data", "other")
"""What the pace of training (`time_s`, `time_tokens_per_s`) counts."""

_taken = threading.Event()  # Set once a clock has begun at the process' start.


def process_age() -> float:
    """Seconds since this process was started (Linux), or 0 where the system does not say."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        born = ticks / os.sysconf("SC_CLK_TCK")
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - born, 0.0)
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Clock:
    """Charges the wall time of one attempt at a run, from the start of its process.

    It begins with `startup`. A run whose process does other things first (a notebook, the second
    run of one process) begins where its clock is made.

    Args:
      age: seconds that have passed since the start; by default the process' age where the process
        was started as one of this package's commands and this is its first clock, else 0.
      now: the clock that is read, in seconds; it must never go back.
    """

    def __init__(self, *, age: float | None = None, now: Callable[[], float] = time.perf_counter):
        if age is None:
            age = 0.0 if _taken.is_set() or not _is_own_command() else process_age()
        _taken.set()
        self.started_unix = time.time() - age
        self._now, self._lock = now, threading.Lock()
        self._seconds = dict.fromkeys(CAUSES, 0.0) | {"startup": age}
        self._cause, self._since = "startup", now()
        self._running: set[int] = set()
        self._watched: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._watcher: threading.Thread | None = None

    def seconds(self) -> dict[str, float]:
        """Returns the seconds by cause until now; their sum is the time since the start."""
        with self._lock:
            self._advance()
            return dict(self._seconds)

    def switch(self, cause: str) -> str:
        """Charges what the host does from now on to `cause`; returns the cause before."""
        if cause not in CAUSES:
            raise ValueError(f"cause {cause!r}: expected one of {list(CAUSES)}")
        with self._lock:
            self._advance()
            before, self._cause = self._cause, cause
            return before

    @contextlib.contextmanager
    def charge(self, cause: str) -> Iterator[None]:
        """Charges a block to `cause`, and names it so on the host's line of a trace."""
        before = self.switch(cause)
        try:
            with jax.profiler.TraceAnnotation(cause):
                yield
        finally:
            self.switch(before)

    def begun(self, step: int, result: Any) -> None:
        """Says that the devices work on `step` until `result` (a pytree of arrays) is there.

        A thread waits for that, so that the caller need not.
        """
        with self._lock:
            self._advance()
            self._running.add(step)
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="clock", daemon=True)
            self._watcher.start()
        self._watched.put((step, result))

    def ended(self, step: int) -> None:
        """Says that the result of `step` is known to be there; not an error if it was before."""
        with self._lock:
            self._advance()
            self._running.discard(step)

    def close(self) -> None:
        """Ends the thread; the clock goes on."""
        if self._watcher is not None:
            self._watched.put(None)
            self._watcher = None

    def _advance(self) -> None:
        now = self._now()
        self._seconds["compute" if self._running else self._cause] += now - self._since
        self._since = now

    def _watch(self) -> None:
        while (item := self._watched.get()) is not None:
            step, result = item
            try:
                jax.block_until_ready(result)
            except Exception:  # The loop meets the same error when it reads the result.
                pass
            self.ended(step)
            del item, result  # Nothing is kept alive while waiting for the next.


def training(seconds: Mapping[str, float]) -> float:
    """Returns the seconds of training among seconds by cause."""
    return sum(seconds[cause] for cause in TRAINING)


def _is_own_command() -> bool:
    """Whether this process was started as `python -m jaxreason...`, and so for one run."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.partition(".")[0] == "jaxreason"
