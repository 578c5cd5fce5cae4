"""Traces of chosen steps, by JAX's profiler: what host and devices did, and when.

`train.profile_at=20,220` and `train.profile_steps=3` trace updates 20 to 22 and 220 to 222, into

    <run>/profile/plugins/profile/steps_00000020_00000022/<host>.xplane.pb      for xprof
                                                          <host>.trace.json.gz  for Perfetto

with one pair of files a host. To look at them, on any machine, no accelerator needed:

    pip install xprof
    xprof --logdir=<run>/profile          (local or gs://; then open http://localhost:8791)
    tensorboard --logdir=<run>/profile    (the same pages, in TensorBoard's tab Profile)

or drop the trace.json.gz on https://ui.perfetto.dev, which loads it in the browser. The host's line
shows every update as `train` with its number, and inside it the causes of train/clock.py by name.
"""

import gzip
import pathlib
import re
import shutil
import socket
import tempfile

import jax
from etils import epath

FOLDER = "profile"
MARK = ".xplane.pb"


class Profiler:
    """Starts and stops the traces of one process; several hosts each write their own.

    A trace that the folder holds already is not taken again, so a resumed run goes on without one.
    One that an error or a preemption ends early is kept, under the steps that it covers.

    Args:
      run_dir: the run's folder, local or in a bucket.
      at: the updates that a trace begins with, counted from 1; the first update of a phase
        compiles, so one after it shows the steady state.
      steps: updates in a trace.
    """

    def __init__(self, run_dir: epath.PathLike, at: tuple[int, ...], steps: int):
        self.folder = epath.Path(run_dir) / FOLDER
        self._at, self._steps = frozenset(at), steps
        self._first: int | None = None
        self._room: pathlib.Path | None = None

    def begins(self, step: int) -> bool:
        """Whether a trace begins with update `step`; the devices must be idle by then."""
        if step not in self._at or self._first is not None:
            return False
        return not (self._session(step, step + self._steps - 1) / f"{_host()}{MARK}").exists()

    def start(self, step: int) -> None:
        """Starts the trace that begins with update `step`."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Every Python call: large, and it slows the host.
        # Written here first and moved when whole: a kill leaves no half trace, and any bucket does.
        self._room = pathlib.Path(tempfile.mkdtemp(prefix="trace-"))
        try:
            jax.profiler.start_trace(self._room, profiler_options=options)
        except BaseException:
            self._clear()
            raise
        self._first = step

    def ends(self, step: int) -> bool:
        """Whether the running trace ends with update `step`."""
        return self._first is not None and step >= self._first + self._steps - 1

    @property
    def running(self) -> bool:
        """Whether a trace is being taken."""
        return self._first is not None

    def stop(self, step: int) -> epath.Path:
        """Writes the trace of the updates up to `step`, all done; returns its folder."""
        assert self._first is not None and self._room is not None, "no trace was started"
        target, self._first = self._session(self._first, max(step, self._first)), None
        try:
            jax.profiler.stop_trace()
            target.mkdir(parents=True, exist_ok=True)
            (mark,) = self._room.rglob(f"*{MARK}")
            others = [file for file in mark.parent.iterdir() if file != mark]
            for file in [*others, mark]:  # The mark last: with it the trace is there.
                name = _host() + file.name.removeprefix(mark.name.removesuffix(MARK))
                temporary = target / f".{name}.tmp"
                if file.name.endswith(".trace.json.gz"):
                    _without_metadata(file)
                epath.Path(file).copy(temporary, overwrite=True)
                temporary.replace(target / name)
        finally:
            self._clear()
        return target

    def _session(self, first: int, last: int) -> epath.Path:
        return self.folder / "plugins" / "profile" / f"steps_{first:08d}_{last:08d}"

    def _clear(self) -> None:
        if self._room is not None:
            shutil.rmtree(self._room, ignore_errors=True)
            self._room = None


def _without_metadata(file: pathlib.Path) -> None:
    """Takes out the head's field `metadata`, which Perfetto does not read (as JAX does)."""
    plain = file.with_suffix(".plain")
    with gzip.open(file, "rb") as old, gzip.open(plain, "wb", compresslevel=6) as new:
        new.write(re.sub(rb'"metadata":\{[^{}]*\},', b"", old.read(4096), count=1))
        shutil.copyfileobj(old, new)
    plain.replace(file)


def _host() -> str:
    """A name for this process' files: two processes of one machine must not share one."""
    name = socket.gethostname().partition(".")[0] or "host"
    return f"{name}-{jax.process_index()}" if jax.process_count() > 1 else name
