"""Kills, full disks and rotten bytes cost at most the newest checkpoint, never a wrong one."""

import errno
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import REPO, environment, run_python

from jaxreason.core.errors import UserError
from jaxreason.train import manifest
from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer

KILLS, DAMAGES = 8, 50


def checkpointer(path, **fields) -> Checkpointer:
    cfg = CheckpointConfig(**fields)
    return Checkpointer(path, cfg, config_json="{}", model_fingerprint="m", version="0")


def small_state(step: int) -> dict:
    w = jax.random.normal(jax.random.key(step), (64, 64))
    return {"params": {"w": w}, "opt_state": (w * 2, None), "step": jnp.int32(step)}


def complete(path: pathlib.Path) -> list[int]:
    root = manifest.absolute(path)
    return [s for s in manifest.steps(root) if manifest.is_complete(manifest.step_folder(root, s))]


TRAINER = """
    import os, sys, jax, jax.numpy as jnp, numpy as np
    from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer

    shape = jax.ShapeDtypeStruct((1024, 1280), jnp.float32)
    saver = Checkpointer(sys.argv[1], CheckpointConfig(keep_best=0), config_json="{}",
                         model_fingerprint="m", version="0")
    restored = saver.latest({"params": [shape] * 6, "step": jax.ShapeDtypeStruct((), jnp.int32)})
    start = 0 if restored is None else restored.step
    if restored is not None:
        assert int(restored.state["step"]) == start
        assert all((np.asarray(w) == start).all() for w in restored.state["params"])
    print("restored", start, flush=True)
    for step in range(start + 1, start + 1000):
        weights = [jnp.full(shape.shape, step, shape.dtype) for _ in range(6)]
        saver.save(step, {"params": weights, "step": jnp.int32(step)})
        saver.wait()
        print("saved", step, flush=True)
"""


def test_kill_9_in_mid_save(tmp_path):
    """Eight lives of one run, 31 MB of state: each finds what the last had completed."""
    delays, last, abandoned = random.Random(0), 0, 0
    for _ in range(KILLS):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAINER), str(tmp_path)],
            cwd=REPO,
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        try:
            word, start = child.stdout.readline().split()
            # A save may have committed in the moment between its manifest and the kill.
            assert word == "restored" and last <= int(start) <= last + 1
            assert child.stdout.readline().split() == ["saved", str(int(start) + 1)]
            time.sleep(delays.uniform(0, 0.5))
        finally:
            os.kill(child.pid, signal.SIGKILL)
            rest = child.stdout.read().split()
            child.wait()
        last = int(rest[-1]) if rest else int(start) + 1
        folders = manifest.steps(manifest.absolute(tmp_path))
        abandoned += len(folders) - len(complete(tmp_path))
        assert complete(tmp_path)[-1] >= last
    assert abandoned >= 2, "the kills did not fall into a save"

    shape = jax.ShapeDtypeStruct((1024, 1280), jnp.float32)
    wanted = {"params": [shape] * 6, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    saver = checkpointer(tmp_path, keep_best=0)
    restored = saver.latest(wanted)
    assert restored is not None and last <= restored.step <= last + 1
    assert all((np.asarray(w) == restored.step).all() for w in restored.state["params"])
    saver.save(restored.step + 1, restored.state)  # and an abandoned folder does not survive
    saver.close()
    assert complete(tmp_path) == manifest.steps(manifest.absolute(tmp_path))


def damage(folder: pathlib.Path, kind: str, rng: random.Random) -> str:
    """Does `kind` of damage to a random file and returns the file's name in the checkpoint."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    if kind == "manifest":
        path, kind = folder / manifest.NAME, rng.choice(["cut", "flip", "missing"])
    elif kind == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
        return manifest.NAME
    else:
        path = rng.choice(files)
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(bytes(data[: rng.randrange(len(data))]))
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
    return path.relative_to(folder).as_posix()


def test_fifty_damages_give_fifty_fallbacks(tmp_path):
    whole, rng = tmp_path / "whole", random.Random(1)
    with checkpointer(whole) as saver:
        for step in (1, 2):
            saver.save(step, small_state(step))
    wanted = jax.eval_shape(lambda: small_state(0))
    assert (found := checkpointer(whole).latest(wanted)) is not None and found.step == 2
    kinds = ["cut", "flip", "missing", "manifest", "empty folder"]
    for trial in range(DAMAGES):
        run = tmp_path / f"run{trial}"
        shutil.copytree(whole, run)
        path = damage(run / "00000002", kinds[trial % len(kinds)], rng)
        restored = checkpointer(run).latest(wanted)
        assert restored is not None and restored.step == 1, path
        for got, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(small_state(1))):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes(), path
        (reason,) = restored.skipped
        assert reason.startswith(f"00000002: {path} ") and "\n" not in reason, (path, reason)


def test_a_run_goes_on_past_a_damaged_checkpoint(tmp_path):
    with checkpointer(tmp_path) as saver:
        for step in (10, 20):
            saver.save(step, small_state(step))
    (tmp_path / "00000020" / "meta.json").write_text("{}")
    wanted = jax.eval_shape(lambda: small_state(0))
    with checkpointer(tmp_path) as saver:
        restored = saver.latest(wanted)
        assert restored is not None and restored.step == 10
        for step in (15, 20, 25):  # 20 takes the place of the damaged one
            saver.save(step, small_state(step))
    assert complete(tmp_path) == [20, 25]
    restored = checkpointer(tmp_path).latest(wanted)
    assert restored is not None and (restored.step, restored.skipped) == (25, [])


def test_only_damaged_checkpoints_are_no_fresh_start(tmp_path):
    with checkpointer(tmp_path) as saver:
        for step in (1, 2):
            saver.save(step, small_state(step))
    (tmp_path / "00000001" / "meta.json").unlink()
    (tmp_path / "00000002" / "config.json").write_text("[]")
    with pytest.raises(UserError) as e:
        checkpointer(tmp_path).latest(jax.eval_shape(lambda: small_state(0)))
    assert "every checkpoint" in str(e.value) and "\n" not in str(e.value)
    assert "00000001: meta.json is missing" in str(e.value)
    assert "00000002: config.json has SHA-256" in str(e.value)


@pytest.mark.parametrize("where", ["manifest", "arrays", "folder"])
def test_a_full_disk_is_told_at_the_next_call(tmp_path, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = checkpointer(tmp_path)
    saver.save(1, small_state(1))
    saver.wait()
    with monkeypatch.context() as patch:
        if where == "manifest":
            patch.setattr(manifest, "write", full)
        elif where == "arrays":
            patch.setattr("orbax.checkpoint.AsyncCheckpointer.wait_until_finished", full)
        else:
            patch.setattr("jaxreason.train.arrays.start_write", full)
        with pytest.raises(UserError) as e:
            saver.save(2, small_state(2))
            saver.save(3, small_state(3))
    assert "00000002 could not be written: the disk is full (" in str(e.value)
    assert "free space" in str(e.value) and "\n" not in str(e.value)
    assert manifest.steps(manifest.absolute(tmp_path)) == [1]
    saver.save(4, small_state(4))  # there is room again
    saver.close()
    assert complete(tmp_path) == [1, 4]


def test_an_error_of_the_loop_is_not_hidden_by_one_of_the_save(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    with pytest.raises(ZeroDivisionError) as e, checkpointer(tmp_path) as saver:
        saver.save(1, small_state(1))
        raise ZeroDivisionError
    assert "the disk is full" in e.value.__notes__[0]


def test_the_system_refuses_to_write(tmp_path):
    """A real failed write, below Orbax: the kernel allows no file above 1 MB."""
    code = """
        import os
        os.dup2(1, 2)
        import resource, sys, jax, jax.numpy as jnp
        from jaxreason.core.errors import UserError
        from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer

        saver = Checkpointer(sys.argv[1], CheckpointConfig(), config_json="{}",
                             model_fingerprint="m", version="0")
        saver.save(1, {"w": jnp.ones((1000, 2000))})
        saver.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        saver.save(2, {"w": jnp.zeros((1000, 2000))})
        try:
            saver.wait()
        except UserError as e:
            print(e)
        print(sorted(os.listdir(sys.argv[1])))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        restored = saver.latest({"w": jax.ShapeDtypeStruct((1000, 2000), jnp.float32)})
        assert restored.step == 1 and (restored.state["w"] == 1).all()
        saver.save(2, {"w": jnp.zeros((1000, 2000))})
        saver.close()
        print(sorted(os.listdir(sys.argv[1])))
    """
    lines = run_python(code, str(tmp_path), devices=1).splitlines()
    assert len(lines) == 3, lines
    assert "00000002 could not be written: the disk is full" in lines[0]
    assert lines[1:] == ["['00000001']", "['00000001', '00000002']"]
