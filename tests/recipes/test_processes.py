"""Real processes on loopback: they train as one does, die together, and go on where they were.

Every run is the same 20 SGD steps in float32 (Adam would turn rounding into steps), started as a
user does, by `launch.local`. Weights are compared leaf by leaf, relative to the leaf's largest.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from support import REPO, environment, tail

from jaxreason.train import arrays, load, manifest
from jaxreason.train.log import read_metrics, without_time

STEPS, STOP = 20, 5
EXIT_PREEMPTED = 75


class Job:
    """A run in a folder, under way on some processes of this machine."""

    def __init__(self, room: pathlib.Path, folder: str, processes: int, every: int):
        self.run, self.seconds, self.output = room / folder, 0.0, ""
        config = [
            f"--config={REPO}/tests/fixtures/tiny.py:baseline",
            f"--config.run.dir={self.run}",
            f"--config.train.steps={STEPS}",
            "--config.train.eval_every=0",
            "--config.optim.name=sgd",
            "--config.optim.learning_rate=0.3",
            f"--config.checkpoint.every_steps={every}",
            f"--config.checkpoint.keep_last={STEPS}",
            "--config.checkpoint.async_=false",
        ]
        env = environment(
            JAXREASON_CPU_FLAGS="0",
            JAXREASON_CACHE=str(room / "cache"),
            JAX_COMPILATION_CACHE_DIR=str(room / "xla"),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        )
        command = [sys.executable, "-m", "launch.local", f"--processes={processes}", "--", *config]
        self.parent = subprocess.Popen(
            command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.parent.stdout:
            self.output += line

    def pids(self) -> list[int]:
        """Of the processes, by their number in the run."""
        return [int(p) for p in re.search(r"processes: ([\d ]+)", self.output)[1].split()]

    def until(self, ready) -> None:
        """Returns as soon as `ready()` holds; the run must not end before."""
        deadline = time.monotonic() + 300
        while not ready():
            assert self.parent.poll() is None, f"ended too early:\n{tail(self.output)}"
            assert time.monotonic() < deadline, tail(self.output)
            time.sleep(0.005)

    def saved(self) -> int:
        """The newest complete checkpoint's step."""
        folders = (self.run / "checkpoints").glob(f"*/{manifest.NAME}")
        return max((int(path.parent.name) for path in folders), default=0)

    def end(self) -> int:
        """Waits for the end and returns the exit code; `seconds` is what that took."""
        began = time.monotonic()
        try:
            self.parent.wait(timeout=400)
        finally:
            self.parent.kill()
        self.seconds = time.monotonic() - began
        self._reader.join()
        return self.parent.returncode

    def finish(self) -> None:
        assert self.end() == 0, tail(self.output)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Job]:
    """All runs of this file: straight on 1, 2 and 4 processes; killed; told to stop."""
    room, jobs = tmp_path_factory.mktemp("processes"), {}

    def begin(name: str, folder: str, processes: int, every: int = STEPS - 1) -> Job:
        jobs[name] = Job(room, folder, processes, every)
        return jobs[name]

    begin("one", "one", 1).finish()
    begin("two", "two", 2).finish()
    begin("four", "four", 4, every=STOP).finish()

    # It must not be done before it is killed: it saves after every step.
    job = begin("killed", "killed", 2, every=1)
    job.until(lambda: job.saved() >= 3)
    os.kill(job.pids()[1], signal.SIGKILL)
    job.end()
    begin("killed, again", "killed", 2).finish()

    # 4 -> 2 -> 1: from what four processes had saved at STOP, and a notice to one of two before
    # their first step.
    shutil.copytree(room / "four", room / "told")
    for folder in (room / "told/checkpoints").iterdir():
        if int(folder.name) > STOP:
            shutil.rmtree(folder)
    job = begin("told", "told", 2)
    job.until(lambda: "[1] [Gloo] Rank 1 is connected" in job.output)
    os.kill(job.pids()[1], signal.SIGTERM)
    job.end()
    begin("told, on one", "told", 1).finish()
    return jobs


def content(job: Job, step: int = STEPS) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by name."""
    import jax

    folder = load.find(job.run, step)
    described = json.loads((folder / "meta.json").read_text())["leaves"]
    as_leaf = lambda leaf: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])  # noqa: E731
    abstract = {name: as_leaf(leaf) for name, leaf in described.items()}
    read = arrays.read(folder / manifest.ARRAYS, described, abstract)
    return {name: np.asarray(leaf) for name, leaf in read.items()}


def assert_same_training(job: Job, one: Job, tolerance: float = 1e-5) -> None:
    ours, reference = content(job), content(one)
    assert ours.keys() == reference.keys()
    for name, array in reference.items():
        scale = np.abs(array).max()
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=tolerance * scale, err_msg=name)
    rows, expected = (
        [row for row in without_time(read_metrics(j.run)) if row["kind"] != "event"]
        for j in (job, one)
    )
    assert len(rows) == len(expected) == STEPS + 2
    for row, other in zip(rows, expected):
        assert row.pop("kind") == other.pop("kind")
        assert row == pytest.approx(other, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("name", ["two", "four"])
def test_processes_train_to_the_parameters_of_one(name, jobs):
    assert_same_training(jobs[name], jobs["one"])


def test_what_is_compared_is_not_trivial(jobs):
    """Other rows of data would show in the losses, and an update in the weights."""
    losses = [row["loss"] for row in read_metrics(jobs["one"].run) if row["kind"] == "train"]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.3
    assert min(abs(a - b) for a, b in zip(losses, losses[1:])) > 1e-4
    last, before = (content(jobs["one"], step) for step in (STEPS, STEPS - 1))
    moved = [n for n in last if np.abs(last[n] - before[n]).max() > 1e-4 * np.abs(last[n]).max()]
    assert len(moved) > 5


def test_a_killed_process_ends_the_job_and_is_named(jobs):
    job = jobs["killed"]
    assert job.parent.returncode == 128 + signal.SIGKILL
    assert job.seconds < 60
    lines = [line for line in job.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "process 1 of 2 was ended by SIGKILL" in lines[0], job.output
    assert "the 1 other was ended" in lines[0]
    for pid in job.pids():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_after_a_kill_it_goes_on_bit_for_bit(jobs):
    resumed, straight = jobs["killed, again"], jobs["two"]
    step = int(re.search(r"goes on after step (\d+)", resumed.output)[1])
    assert 3 <= step < STEPS
    ours, expected = content(resumed), content(straight)
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        assert ours[name].tobytes() == array.tobytes(), name
    assert without_time(read_metrics(resumed.run)) == without_time(read_metrics(straight.run))


def test_a_notice_to_one_process_stops_all_with_a_checkpoint(jobs):
    """Here it comes before the first step of a run that goes on after another."""
    job = jobs["told"]
    assert job.parent.returncode == EXIT_PREEMPTED, tail(job.output)
    assert f"goes on after step {STOP}" in job.output
    stops = re.findall(r"\[(\d)\] stopped after step (\d+), which is saved", job.output)
    assert sorted(process for process, _ in stops) == ["0", "1"]
    assert len({step for _, step in stops}) == 1 and STOP < int(stops[0][1]) < STEPS


def test_fewer_processes_go_on_with_the_same_rows(jobs):
    job = jobs["told, on one"]
    before = re.search(r"stopped after step (\d+)", jobs["told"].output)[1]
    assert f"goes on after step {before}" in job.output
    assert_same_training(job, jobs["one"])
