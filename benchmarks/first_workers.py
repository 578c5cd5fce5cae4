"""Commands side by side, each on cores of its own; and files that several tables may share.

Two processes of one core each do more than one process of two: small products do not divide well.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO


@dataclasses.dataclass(frozen=True)
class Work:
    """A command, and what to do when it has ended well."""

    name: str
    """What it is, for messages; also the name of its log."""
    folder: pathlib.Path
    """The run that it writes: two commands of one folder never run at once, whoever starts them."""
    command: list[str]
    waits: Callable[[], bool]
    """Asked just before it would start: whether it is still to be done."""
    finish: Callable[[int], None]
    """Called with the number of its cores after exit code 0; may raise SystemExit."""


@dataclasses.dataclass
class _Running:
    work: Work
    cores: list[int]
    process: subprocess.Popen
    log: pathlib.Path


def side_by_side(works: Sequence[Work], jobs: int, until: float) -> None:
    """Runs what is to be done, `jobs` at a time, and starts nothing after `until` (clock time).

    Each process is pinned to its share of the cores that this one may use. A command that another
    table is running is passed over. When one fails, no further one starts; the others run to their
    end and are put on record, and the process exits with a line that names the failure.
    """
    shares = core_shares(jobs)
    waiting, running, failed = list(works), [], []
    while waiting or running:
        while waiting and shares and not failed and time.time() < until:
            begun = start(waiting.pop(0), shares[0])
            if begun is not None:
                running.append(begun)
                shares.pop(0)
        if not running:
            break
        time.sleep(0.2)
        for done in [r for r in running if r.process.poll() is not None]:
            running.remove(done)
            shares.append(done.cores)
            failed += [line] if (line := end(done)) else []
    if failed:
        sys.exit(failed[0])
    if left := [work.name for work in waiting if work.waits()]:
        print(f"time is up before {left[0]}, {len(left)} left", flush=True)


def core_shares(jobs: int) -> list[list[int]]:
    """The cores of this process in `jobs` parts of equal size, neighbours together."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        sys.exit(f"error: --jobs={jobs}; expected 1 to {len(cores)}, the cores of this machine")
    size = len(cores) // jobs
    return [cores[i * size : (i + 1) * size] for i in range(jobs)]


def start(work: Work, cores: list[int]) -> _Running | None:
    """Starts a command pinned to its cores; None where it is not to be done, or done elsewhere."""
    work.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{work.folder}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{time.strftime('%H:%M')} {work.name} runs elsewhere, passed over", flush=True)
            return None
        if not work.waits():
            return None
        print(f"{time.strftime('%H:%M')} {work.name}", flush=True)
        log, before = work.folder.parent / f"{work.name}.log", os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)  # What is started has the affinity of what starts it.
        try:
            with open(log, "wb") as output:
                # The lock goes with the command, so it lasts as long, also where we are killed.
                process = subprocess.Popen(
                    work.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    pass_fds=[lock.fileno()],
                )  # fmt: skip
        finally:
            os.sched_setaffinity(0, before)
    return _Running(work, cores, process, log)


def end(done: _Running) -> str:
    """Puts a command that ended on record; returns a line that says what failed, or nothing."""
    code, name = done.process.returncode, done.work.name
    if code:
        lines = done.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        return f"error: {name} ended with exit code {code}: {lines[-1]} (all of it: {done.log})"
    try:
        done.work.finish(len(done.cores))
    except SystemExit as error:
        return str(error.code)
    return ""


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[IO]:
    """Holds a file's lock, which lies beside it, while it is read and written anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
