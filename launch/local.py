"""Runs one training run as several processes on this machine.

    python -m launch.local --processes=4 [--restarts=N] -- --config=experiments/let/stdlib.py ...

What follows `--` are the arguments of `jaxreason.main`. Every process gets the address of process
0 on loopback and its own number; its lines appear behind `[number]`. On a machine without
accelerators they work together through gloo; JAX_NUM_CPU_DEVICES gives each more than one device.

One of them fails or is killed: the others are ended, and one line on stderr names the first, how
it ended, and the last line it wrote there. SIGTERM or Ctrl-C: all are told, so that they save and
stop; a second one kills them. With --restarts, a run that was preempted is started again, at most
N times.

Exit codes: 0 done, 75 all saved and stopped (start again), 2 bad input; else that of the first
process that failed, 128 + the number of a signal that ended it.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

EXIT_USER_ERROR, EXIT_PREEMPTED = 2, 75
END_SECONDS = 5.0  # between SIGTERM and SIGKILL for those whose peer has failed: they cannot save
TOGETHER_SECONDS = 60.0  # in which all must have ended after the first has ended well
_POLL_SECONDS = 0.02
_CAUSE_SECONDS = 0.3  # in which those that end with the first to fail are looked at together


class Process:
    """One of the processes, and the threads that pass on what it writes."""

    def __init__(self, index: int, command: Sequence[str], env: dict[str, str]):
        self.index, self.last_line = index, ""
        self.popen = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # the terminal's Ctrl-C comes to the parent alone
            preexec_fn=_die_with_parent,
        )
        self._threads: list[threading.Thread] = []

    def follow(self, lock: threading.Lock) -> None:
        """Begins to pass on the lines; `lock` keeps those of several processes apart."""
        for source, target in ((self.popen.stdout, sys.stdout), (self.popen.stderr, sys.stderr)):
            thread = threading.Thread(target=self._copy, args=(source, target, lock), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _copy(self, source: IO[bytes], target: IO[str], lock: threading.Lock) -> None:
        for raw in source:
            line = raw.decode(errors="replace").rstrip("\r\n")
            if target is sys.stderr and line.strip():
                self.last_line = line.strip()
            with lock:
                try:
                    target.write(f"[{self.index}] {line}\n")
                    target.flush()
                except OSError:
                    pass  # Nobody reads any more (`| head`): the run goes on.

    def tell(self, number: int) -> None:
        """Sends a signal to the process; to its children too where it cannot be caught."""
        try:
            if number == signal.SIGKILL:
                os.killpg(self.popen.pid, number)
            elif self.popen.poll() is None:
                self.popen.send_signal(number)
        except ProcessLookupError:
            pass

    def read_out(self) -> None:
        """Waits for the last lines of a process that has ended."""
        for thread in self._threads:
            thread.join(timeout=2)  # a grandchild may hold the pipe open


def _die_with_parent() -> None:
    """Asks Linux for a SIGTERM when the parent is gone, however it went."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class _Notices:
    """Signals that ask the parent to stop; handlers are put back on exit."""

    def __init__(self, tell: Callable[[int], None]):
        self.count, self._tell, self._previous = 0, tell, {}

    def __enter__(self) -> "_Notices":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame) -> None:
        self.count += 1
        self._tell(signal.SIGTERM if self.count == 1 else signal.SIGKILL)


def launch(
    command: Sequence[str],
    processes: int,
    *,
    restarts: int = 0,
    end_seconds: float = END_SECONDS,
    together_seconds: float = TOGETHER_SECONDS,
) -> int:
    """Runs `command` as one job of several processes; returns the job's exit code.

    Args:
      command: what each of them runs; see `train.hosts.join` for the variables it finds.
      processes: their number.
      restarts: how often to start anew when all of them ended with exit code 75.
      end_seconds: how long the others have after one has failed, before they are killed.
      together_seconds: how long the others have after one has ended with 0 or 75.
    """
    running: list[Process] = []

    def tell(number: int) -> None:
        for process in running:
            process.tell(number)

    with _Notices(tell) as notices:
        while True:
            running[:] = _start(command, processes)
            if notices.count:  # it came while they were being started
                tell(signal.SIGTERM)
            code = _wait(running, notices, end_seconds, together_seconds)
            if code != EXIT_PREEMPTED or notices.count or restarts == 0:
                return code
            restarts -= 1
            _say(f"preempted and saved; started again, {restarts} more restarts allowed")


def _start(command: Sequence[str], processes: int) -> list[Process]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "JAXREASON_DISTRIBUTED": "auto",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
    }
    started: list[Process] = []
    try:
        for index in range(processes):
            env["JAX_PROCESS_ID"] = str(index)
            started.append(Process(index, command, env))
    except OSError:
        for process in started:
            process.tell(signal.SIGKILL)
        raise
    _say(f"started {processes} processes: {' '.join(str(p.popen.pid) for p in started)}")
    lock = threading.Lock()  # threads only now: a fork with threads about may hang
    for process in started:
        process.follow(lock)
    return started


def _wait(running: list[Process], notices: _Notices, end: float, together: float) -> int:
    """Waits for the end of all, or ends them; returns the job's exit code."""
    first: tuple[Process, float] | None = None  # the first that ended, and when
    while True:
        codes = {p.index: p.popen.poll() for p in running}
        ended = [p for p in running if codes[p.index] is not None]
        good = {0, EXIT_PREEMPTED} | ({-signal.SIGTERM} if notices.count else set())
        failed = [p for p in ended if codes[p.index] not in good]
        if failed:
            return _fail(running, _cause(failed, running, good), notices, end)
        if len(ended) == len(running):
            for process in running:
                process.read_out()
            return EXIT_PREEMPTED if any(codes.values()) else 0
        if ended and first is None:
            first = ended[0], time.monotonic()
        if first and time.monotonic() - first[1] > together:
            late = next(p for p in running if codes[p.index] is None)
            early = f"process {first[0].index} ended with exit code {codes[first[0].index]}"
            _say(
                f"error: process {late.index} of {len(running)} was still running {together:.0f} s "
                f"after {early}; all were ended"
            )
            _end(running, end)
            return 1
        time.sleep(_POLL_SECONDS)


def _cause(failed: list[Process], running: list[Process], good: set[int]) -> Process:
    """Returns the one that the others failed of, where several fail at almost the same time.

    A killed process is the cause: its peers fail of its death by an exception or by JAX's abort.
    """

    def rank(process: Process) -> int:
        code = process.popen.returncode
        if code < 0:
            return 0 if code == -signal.SIGABRT else 3
        return 2 if code == EXIT_USER_ERROR else 1

    time.sleep(_CAUSE_SECONDS)
    later = [p for p in running if p not in failed and p.popen.poll() not in good | {None}]
    return max([*failed, *later], key=rank)


def _fail(running: list[Process], cause: Process, notices: _Notices, end: float) -> int:
    """Ends all for the failure of one, and says which one in one line."""
    code = cause.popen.returncode
    _end(running, end)
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
    else:
        how = f"failed with exit code {code}"
    last = f"its last line: {cause.last_line}" if cause.last_line else "it wrote nothing to stderr"
    others = len(running) - 1
    tail = f"; the {others} other{'s were' if others > 1 else ' was'} ended" if others else ""
    _say(f"error: process {cause.index} of {len(running)} {how}{tail}; {last}")
    if notices.count:
        _say("stopped before all had saved; the last complete checkpoint stands")
    return 128 - code if code < 0 else code


def _end(running: list[Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in running:
        process.tell(signal.SIGTERM)
    while any(p.popen.poll() is None for p in running) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for process in running:
        process.tell(signal.SIGKILL)
    for process in running:
        process.popen.wait()
        process.read_out()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line and runs the job; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own = argv[: argv.index("--")] if "--" in argv else argv
    if "--help" in own or "-h" in own:
        print(__doc__)
        return 0
    numbers = {"processes": 0, "restarts": 0}
    for arg in own:
        name, _, value = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or name not in numbers or not value.isdecimal():
            _say(
                f"error: got {arg!r}; expected --processes=N, --restarts=N, and after `--` the "
                "arguments of jaxreason.main"
            )
            return EXIT_USER_ERROR
        numbers[name] = int(value)
    if not numbers["processes"] or len(own) + 1 >= len(argv):
        _say("error: expected --processes=N (1 or more), then `--` and a run: -- --config=FILE")
        return EXIT_USER_ERROR
    command = [sys.executable, "-m", "jaxreason.main", *argv[len(own) + 1 :]]
    return launch(command, numbers["processes"], restarts=numbers["restarts"])


if __name__ == "__main__":
    sys.exit(main())
