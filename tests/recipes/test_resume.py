"""A run that is killed and started again equals one that is not: weights, moments, rows."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support import REPO, environment, tail

from jaxreason.train import arrays, load, manifest
from jaxreason.train.goodput import read_goodput
from jaxreason.train.log import read_metrics, without_time

STEPS, STOP, EVERY = 60, 30, 2  # LET ends at step STOP; a checkpoint every EVERY steps
TINY = f"--config={REPO}/tests/fixtures/tiny.py"
EXIT_PREEMPTED = 75


class Killed:
    """What happened to a run on its way."""

    def __init__(self):
        self.codes: list[int] = []  # of every process but the last
        self.starts: list[int] = []  # the step that every process but the first went on after
        self.mid_save = 0  # kills that left an unfinished checkpoint
        self.output = ""
        self.damaged = 0  # the step of the checkpoint that was damaged
        self.seconds = 0.0  # from the first start to the last end


def start(room: pathlib.Path, arm: str, folder: str, *more: str) -> subprocess.Popen:
    """Starts the command of a run; it is the same every time."""
    command = [sys.executable, "-m", "jaxreason.main", f"{TINY}:{arm}",
               f"--config.run.dir={room / folder}", *more]  # fmt: skip
    # Compiled programs are shared, so that a new start takes seconds.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(room / "xla"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    env = environment(JAXREASON_CPU_FLAGS="0", JAXREASON_CACHE=str(room / "cache"), **cache)
    return subprocess.Popen(
        command, cwd=REPO, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def start_let(room: pathlib.Path, folder: str) -> subprocess.Popen:
    return start(
        room, "let", folder, f"--config.teacher.path={room / 'teacher'}",
        f"--config.train.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}",
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, tail(output)
    return output


def saves(run: pathlib.Path) -> tuple[list[int], list[int]]:
    """Steps of the complete and of the unfinished checkpoints of a run."""
    done, open_ = [], []
    for folder in sorted((run / "checkpoints").glob("[0-9]*")):
        (done if (folder / manifest.NAME).exists() else open_).append(int(folder.name))
    return done, open_


def newest(run: pathlib.Path) -> int:
    return max(saves(run)[0], default=0)


def until(process: subprocess.Popen, ready) -> None:
    """Returns as soon as `ready()` holds; the process must not end before."""
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, f"ended too early:\n{tail(process.communicate()[0])}"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def end(process: subprocess.Popen, number: int, killed: Killed) -> None:
    process.send_signal(number)
    killed.output += process.communicate(timeout=60)[0]
    killed.codes.append(process.returncode)


def damage(run: pathlib.Path) -> int:
    """Flips a bit of the newest checkpoint's largest file; returns its step."""
    step = newest(run)
    files = [p for p in (run / f"checkpoints/{step:08d}").rglob("*") if p.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return step


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[pathlib.Path, Killed]:
    """A straight run, and one that is killed often, told to stop once and damaged once."""
    room, rng, killed = tmp_path_factory.mktemp("resume"), random.Random(0), Killed()
    finish(start(room, "teacher", "teacher"))
    straight, run = start_let(room, "straight"), room / "killed"

    def begin():
        if killed.codes:
            killed.starts.append(newest(run))
        return start_let(room, "killed")

    # Before there is any checkpoint, and then at random: the delay may or may not hit a save.
    began = time.monotonic()
    process = begin()
    until(process, lambda: (run / "metrics.jsonl").exists())
    time.sleep(rng.uniform(0, 0.3))
    end(process, signal.SIGKILL, killed)
    process, before = begin(), newest(run)
    until(process, lambda: newest(run) > before)
    time.sleep(rng.uniform(0, 0.1))
    end(process, signal.SIGKILL, killed)
    # In the middle of a save: where the save wins the race, once more.
    for _ in range(5):
        process, before = begin(), newest(run)
        until(process, lambda before=before: newest(run) > before and saves(run)[1])
        end(process, signal.SIGKILL, killed)
        killed.mid_save += bool(saves(run)[1])
        if killed.mid_save == 2:
            break
    # Told to stop, in the first phase or right after it.
    process, before = begin(), newest(run)
    until(process, lambda: newest(run) > before)
    end(process, signal.SIGTERM, killed)
    # Over the end of LET's phase, then damaged.
    process = begin()
    until(process, lambda: newest(run) > STOP)
    end(process, signal.SIGKILL, killed)
    killed.damaged = damage(run)
    killed.output += finish(begin())
    killed.seconds = time.monotonic() - began
    finish(straight)
    return room, killed


def content(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by name: step, parameters, moments, counters."""
    import jax

    folder = load.find(run, step)
    described = json.loads((folder / "meta.json").read_text())["leaves"]
    as_leaf = lambda leaf: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])  # noqa: E731
    abstract = {name: as_leaf(leaf) for name, leaf in described.items()}
    read = arrays.read(folder / manifest.ARRAYS, described, abstract)
    return {name: np.asarray(leaf) for name, leaf in read.items()}


def test_it_was_killed_as_meant(killed):
    room, what = killed
    assert what.codes.count(-signal.SIGKILL) >= 4
    assert what.codes.count(EXIT_PREEMPTED) == 1
    assert what.mid_save >= 1
    assert what.starts[0] == 0 or what.starts[0] % EVERY == 0
    assert any(0 < step < STOP for step in what.starts) and max(what.starts) > STOP
    assert "stopped after step" in what.output and "the same command goes on" in what.output
    assert f"passed over a damaged checkpoint: {what.damaged:08d}" in what.output


def test_weights_moments_and_counters_are_the_same_bits(killed):
    room, _ = killed
    straight, resumed = (content(room / name, STEPS) for name in ("straight", "killed"))
    assert straight.keys() == resumed.keys() and len(straight) > 30
    assert any("opt_state" in name for name in straight)
    for name, array in straight.items():
        assert array.dtype == resumed[name].dtype, name
        np.testing.assert_array_equal(
            array.view(np.uint8) if array.ndim else array,
            resumed[name].view(np.uint8) if array.ndim else resumed[name],
            err_msg=name,
        )


def test_rows_are_the_same(killed):
    """Losses of every step (so the data's order), evaluations, phases: none lost, none twice."""
    room, _ = killed
    straight, resumed = (without_time(read_metrics(room / name)) for name in ("straight", "killed"))
    assert [row["step"] for row in straight if row["kind"] == "train"] == [*range(1, STEPS + 1)]
    assert resumed == straight


def test_the_wall_time_of_all_attempts_adds_up(killed):
    """Nothing of a killed attempt is forgotten, though its rows were cut: lost work shows."""
    room, what = killed
    found = read_goodput(room / "killed")
    assert found is not None and found.finished
    assert found.attempts == len(what.codes) + 1
    assert sum(found.share(cause) for cause in found.seconds) == pytest.approx(1)
    # The clock of the tests went from before the first process started to after the last ended.
    assert 0.95 * what.seconds - 2 < found.wall_s <= what.seconds
    assert found.seconds["lost"] > 0 and found.seconds["down"] > 0
    assert 0 < found.fraction < 1 and found.line() in what.output
    straight = read_goodput(room / "straight")
    assert straight is not None and straight.attempts == 1 and "lost" not in straight.seconds
    assert found.seconds["startup"] > straight.seconds["startup"]  # Every attempt starts anew.


def test_config_and_facts_are_the_same(killed):
    room, _ = killed
    for name in ("config.json", "facts.json"):
        one, two = ((room / run / name).read_text() for run in ("straight", "killed"))
        assert two.replace(str(room / "killed"), str(room / "straight")) == one


def test_a_finished_run_started_again_changes_nothing(killed):
    room, _ = killed
    before = read_metrics(room / "straight"), saves(room / "straight")
    output = finish(start_let(room, "straight"))
    assert f"goes on after step {STEPS}" in output and "report:" in output
    assert (read_metrics(room / "straight"), saves(room / "straight")) == before
    assert os.path.getsize(room / "straight/report.html") > 10_000
