"""Checkpoints that are either whole or not there: saved behind the training, verified, thinned.

A checkpoint is the train state after `step` updates, in `<directory>/<step:08d>/`: `arrays/`
(Orbax), `meta.json`, `config.json`, and `manifest.json` with the SHA-256 of every file, written
last as the commit mark and compared with the files before anything is restored.
"""

import dataclasses
import datetime
import errno
import json
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxreason.core.errors import UserError
from jaxreason.train import arrays, manifest
from jaxreason.train.hosts import on_first_host

PyTree = Any
_CLOCK_EVERY = 16  # steps between two looks at the first host's clock, when there are many hosts
_BARRIER_SECONDS = 1800
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves its state, and how many of its checkpoints it keeps."""

    every_steps: int = 1000
    """Steps between two saves; 0 saves only at the end."""
    every_minutes: float = 0.0
    """Also save when this many minutes have passed since the last save; 0 is never."""
    keep_last: int = 2
    """Number of newest checkpoints kept; at least 1, and 2 survive damage to the newest."""
    keep_best: int = 1
    """Number of checkpoints with the best `metric` kept besides the newest ones; only those saved
    at a step that is also evaluated have one."""
    metric: str = "loss"
    """Name of the metric that `keep_best` compares; lower is better."""
    async_: bool = True
    """Write behind the training; when off, a save returns after the checkpoint is complete."""
    on_preemption: bool = True
    """Save and stop on SIGTERM or the first Ctrl-C."""

    def __post_init__(self):
        least = {"every_steps": 0, "every_minutes": 0, "keep_last": 1, "keep_best": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                got = getattr(self, name)
                raise UserError(f"checkpoint.{name} is {got}, expected at least {bound}")


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.latest` found."""

    state: PyTree
    """The state, on the shardings that were asked for."""
    step: int
    """Number of updates that the state has seen."""
    meta: dict
    """Content of meta.json: step, version, metrics, model_fingerprint, leaves, ..."""
    skipped: list[str]
    """One line for each newer folder that was passed over: its name, the file, what was wrong."""


class Checkpointer:
    """Saves and restores the checkpoints of one run; use it in a `with` block.

    On several hosts every method is called by all of them, in the same order, and `directory` is
    shared storage. An error of the background writing is raised as a UserError by the next call;
    earlier checkpoints are untouched by it, and a later save may succeed.

    Args:
      directory: the run's `checkpoints` folder, local or a bucket.
      cfg: when and what to keep.
      config_json: the resolved config of the run, stored beside the arrays.
      model_fingerprint: what makes the state's meaning (a dict of architecture fields, or a hash);
        restoring demands that it is equal.
      version: of the program, for the reader of meta.json.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        cfg: CheckpointConfig,
        *,
        config_json: str,
        model_fingerprint: dict | str,
        version: str,
    ):
        self._directory = manifest.absolute(directory)
        self._cfg = cfg
        self._config_json = config_json
        self._fingerprint = json.loads(json.dumps(model_fingerprint))
        self._version = version
        self._thread: threading.Thread | None = None
        self._failure: UserError | None = None
        self._own: set[int] = set()  # steps that this process saved or restored
        self._damaged: set[int] = set()
        self._saves = 0
        self._last_save = time.monotonic()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.close()
            return
        # Another host may be elsewhere: finish what this one has begun, agree on nothing.
        self._join()
        if self._failure is not None:
            error.add_note(str(self._failure))

    def due(self, step: int) -> bool:
        """Says whether the config asks for a save after `step` updates; call it at every step."""
        if self._cfg.every_steps and step % self._cfg.every_steps == 0:
            return True
        if not self._cfg.every_minutes:
            return False
        late = time.monotonic() - self._last_save >= 60 * self._cfg.every_minutes
        if jax.process_count() == 1:
            return late
        return step % _CLOCK_EVERY == 0 and on_first_host(lambda: late)

    def save(self, step: int, state: PyTree, metrics: dict | None = None) -> None:
        """Saves the state after `step` updates; returns when the arrays are copied to the host.

        So the caller may donate them at once. Waits first for an unfinished earlier save. A step
        that this process has already saved or restored is not saved again.

        Args:
          step: number of updates made.
          state: pytree of arrays, sharded or not; PRNG keys as raw uint32.
          metrics: plain floats, kept in meta.json; `cfg.metric` among them decides `keep_best`.

        Raises:
          UserError: this or the previous save failed (disk full, ...), or the folder holds newer
            checkpoints that this run was not restored from.
        """
        step = int(step)
        folder = manifest.step_folder(self._directory, step)
        leaves = arrays.flatten(state)
        meta = {
            "format": 1,
            "step": step,
            "version": self._version,
            "jax_version": jax.__version__,
            "process_count": jax.process_count(),
            "time_saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "metrics": {k: float(v) for k, v in (metrics or {}).items()},
            "model_fingerprint": self._fingerprint,
            "leaves": arrays.describe(leaves),
        }
        self.wait()
        if not on_first_host(lambda: self._open(step)):
            return
        self._saves += 1
        self._last_save = time.monotonic()
        key = f"save{self._saves}_{step}_{zlib.crc32(str(self._directory).encode()):08x}"
        try:
            wait_for_arrays = arrays.start_write(folder / manifest.ARRAYS, leaves, key)
        except OSError as e:
            raise self._abandon(step, e) from e
        self._thread = threading.Thread(
            target=self._finish, args=(step, meta, wait_for_arrays, key), name="checkpoint"
        )
        self._thread.start()
        if not self._cfg.async_:
            self.wait()

    def latest(self, abstract_state: PyTree) -> Restored | None:
        """Restores the newest sound checkpoint, or returns None if none was ever completed.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with the shardings wanted; the mesh and
            the number of hosts may differ from those that saved.

        Raises:
          UserError: every checkpoint is damaged, or the newest is of another model.
        """
        self.wait()
        found = on_first_host(self._newest_sound)
        self._damaged.update(found["damaged"])
        if found["step"] is None:
            return None
        folder = manifest.step_folder(self._directory, found["step"])
        meta = manifest.read_meta(folder)
        self._check_fingerprint(folder, meta["model_fingerprint"])
        arrays.check(meta["leaves"], abstract_state, str(folder))
        state = arrays.read(folder / manifest.ARRAYS, meta["leaves"], abstract_state)
        self._own.add(found["step"])
        return Restored(state, found["step"], meta, found["skipped"])

    def wait(self) -> None:
        """Waits until the last save is complete; raises its error if it failed."""
        self._join()
        failure, self._failure = self._failure, None
        on_first_host(lambda: _raise(failure))  # so that no host goes on without the first
        _raise(failure)

    def close(self) -> None:
        """The same as `wait`: nothing is left running."""
        self.wait()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _open(self, step: int) -> bool:
        """Makes the folder of a new save and removes abandoned ones; False if it is saved."""
        new = manifest.step_folder(self._directory, step)
        try:
            for other in manifest.steps(self._directory):
                folder = manifest.step_folder(self._directory, other)
                if not manifest.is_complete(folder) or (other == step and other in self._damaged):
                    manifest.remove(folder)
                elif other == step and other in self._own:
                    return False
                elif other >= step and other not in self._own | self._damaged:
                    raise UserError(
                        f"{folder} holds a checkpoint of step {other} that this run, now at step "
                        f"{step}, was not restored from; resume it, or choose another run folder"
                    )
            new.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise _explain(new, e) from e
        return True

    def _finish(self, step: int, meta: dict, wait_for_arrays: Callable, key: str) -> None:
        """Commits a save in the background; keeps the error for the next call."""
        folder = manifest.step_folder(self._directory, step)
        try:
            wait_for_arrays()
            try:
                if jax.process_index() == 0:
                    manifest.atomic_write(folder / manifest.META, json.dumps(meta, indent=1))
                    manifest.atomic_write(folder / manifest.CONFIG, self._config_json)
                    manifest.write(folder, step)
            finally:
                barrier = ocp.multihost.get_barrier_sync_fn()
                barrier(key=f"{key}_manifest", timeout_ms=1000 * _BARRIER_SECONDS)
            if not manifest.is_complete(folder):
                raise OSError("the first host could not complete it")
            self._own.add(step)
            self._damaged.discard(step)
            if jax.process_index() == 0:
                self._thin(step)
        except UserError as e:
            self._failure = e
        except Exception as e:  # whatever happened, it must reach the main thread
            self._failure = self._abandon(step, e)

    def _thin(self, step: int) -> None:
        """Deletes what retention does not keep, once the new checkpoint reads back as written."""
        complete = {
            s: manifest.step_folder(self._directory, s)
            for s in manifest.steps(self._directory)
            if manifest.is_complete(manifest.step_folder(self._directory, s))
        }
        sound = [s for s in complete if s not in self._damaged]
        values = {s: _metric(complete[s], self._cfg.metric) for s in sound}
        ranked = sorted((s for s in sound if math.isfinite(values[s])), key=lambda s: values[s])
        keep = {step, *sound[-self._cfg.keep_last :], *ranked[: self._cfg.keep_best]}
        victims = [s for s in complete if s not in keep]
        if not victims:
            return
        try:
            manifest.verify(complete[step])
        except manifest.Damaged as e:
            self._damaged.add(step)
            raise UserError(
                f"the checkpoint of step {step} in {self._directory} does not read back as it was "
                f"written: {e}; older ones are kept; check the disk"
            ) from e
        try:
            for s in victims:
                manifest.remove(complete[s])
        except OSError as e:
            raise UserError(
                f"the checkpoint of step {step} is complete, but an older one in {self._directory} "
                f"could not be removed: {e}; check the permissions"
            ) from e

    def _abandon(self, step: int, error: Exception) -> UserError:
        """Removes what a failed save left and returns the error to show."""
        folder = manifest.step_folder(self._directory, step)
        if jax.process_index() == 0:
            try:
                manifest.remove(folder)
            except OSError:
                pass  # without a manifest it is no checkpoint, and the next save tries again
        return _explain(folder, error)

    def _newest_sound(self) -> dict:
        skipped, damaged = [], []
        for step in reversed(manifest.steps(self._directory)):
            folder = manifest.step_folder(self._directory, step)
            try:
                found = manifest.verify(folder)["step"]
                if found == step:
                    return {"step": step, "skipped": skipped, "damaged": damaged}
                raise manifest.Damaged(f"{manifest.NAME} is of step {found}")
            except manifest.Damaged as e:
                skipped.append(f"{folder.name}: {e}")
                if not isinstance(e, manifest.Unfinished):
                    damaged.append(step)
        if damaged:
            raise UserError(
                f"every checkpoint in {self._directory} is damaged: {'; '.join(skipped)}; put back "
                "a good copy, or choose another run folder to start afresh"
            )
        return {"step": None, "skipped": skipped, "damaged": []}

    def _check_fingerprint(self, folder: epath.Path, got: Any) -> None:
        expected = self._fingerprint
        if got == expected:
            return
        if isinstance(got, dict) and isinstance(expected, dict):
            names = [*expected, *(n for n in got if n not in expected)]
            name = next(n for n in names if got.get(n) != expected.get(n))
            difference = f"{name} is {got.get(name)!r} in the checkpoint, {expected.get(name)!r}"
        else:
            difference = f"its fingerprint is {got!r}, {expected!r}"
        raise UserError(
            f"{folder} is of another model: {difference} in this run; use the config saved with "
            "the checkpoint, or choose another run folder"
        )


def _metric(folder: epath.Path, name: str) -> float:
    try:
        return float(manifest.read_meta(folder)["metrics"].get(name, math.nan))
    except (OSError, ValueError, KeyError):  # damaged: it cannot be anybody's best
        return math.nan


def _raise(error: UserError | None) -> None:
    if error is not None:
        raise error


def _explain(folder: epath.Path, error: BaseException) -> UserError:
    """Puts a failed save into one line that says what to do."""
    chain, seen = error, []
    while chain is not None and chain not in seen:
        seen.append(chain)
        chain = chain.__cause__ or chain.__context__
    full = any(
        (isinstance(e, OSError) and e.errno in _FULL) or any(w in str(e) for w in _FULL_WORDS)
        for e in seen
    )
    if full:
        what, cure = "the disk is full", "free space, or choose another run folder"
        try:
            what += f" ({shutil.disk_usage(os.fspath(folder.parent)).free / 1e9:.2f} GB free)"
        except OSError:
            pass  # a bucket, or a folder that is gone
    else:
        lines = str(error).splitlines() or [""]
        what, cure = f"{type(error).__name__}: {lines[0][:300]}", "check the folder's storage"
    return UserError(
        f"{folder} could not be written: {what}; {cure}; earlier checkpoints are untouched"
    )
