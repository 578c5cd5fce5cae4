"""A checkpoint gives back the same bits, on any mesh, and says clearly when it cannot."""

import json
import math
import textwrap
import threading
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import run_python

from jaxreason.core.errors import UserError
from jaxreason.train import manifest
from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer
from jaxreason.train.load import load, load_config

FINGERPRINT = {"d_model": 8, "layers": 2}


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: Any
    aux: dict


def make_state(seed: int = 0) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (16, 8)),
        "blocks": [{"wq": jax.random.normal(key, (8, 8), jnp.bfloat16)} for _ in range(2)],
        "a/b.c": jnp.float16(1.5),
    }
    aux = {
        "rng": jax.random.key_data(key),
        "nothing": None,
        "empty": (),
        "no_rows": jnp.zeros((0, 3)),
        "mask": jnp.array([True, False]),
        "bytes": jnp.arange(5, dtype=jnp.uint8),
        "special": jnp.array([math.nan, -0.0, math.inf, 1e-42]),
        "host": np.arange(3, dtype=np.int32),
        "eps": 0.25,
    }
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(params), aux)


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def checkpointer(path, **fields) -> Checkpointer:
    cfg = CheckpointConfig(**fields)
    return Checkpointer(
        path, cfg, config_json='{"a": 1}', model_fingerprint=FINGERPRINT, version="0"
    )


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want)):
        w = np.asarray(jnp.asarray(w))
        assert (g.dtype, g.shape) == (w.dtype, w.shape), path
        assert np.asarray(g).tobytes() == w.tobytes(), path


def test_restores_the_same_bits(tmp_path):
    state = make_state()
    with checkpointer(tmp_path) as saver:
        saver.save(3, state, {"loss": 2.5})
    restored = checkpointer(tmp_path).latest(abstract(state))
    assert restored is not None
    assert_same_bits(restored.state, state)
    assert isinstance(restored.state.opt_state[0], optax.ScaleByAdamState)
    assert (restored.step, restored.skipped) == (3, [])
    assert restored.meta["metrics"] == {"loss": 2.5} and restored.meta["version"] == "0"
    names = {p.name for p in (tmp_path / "00000003").iterdir()}
    assert names == {"arrays", "meta.json", "config.json", "manifest.json"}


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    assert checkpointer(tmp_path / "none").latest(abstract(make_state())) is None


def test_the_state_may_be_donated_at_once(tmp_path):
    update = jax.jit(lambda x: jax.tree.map(lambda a: a * 0 - 7, x), donate_argnums=0)
    state = {"w": jax.random.normal(jax.random.key(0), (1024, 1024)), "b": jnp.arange(3.0)}
    want = jax.tree.map(lambda a: np.array(a, copy=True), state)
    with checkpointer(tmp_path) as saver:
        saver.save(1, state)
        for _ in range(3):
            state = update(state)
    restored = checkpointer(tmp_path).latest(abstract(state))
    assert restored is not None
    assert_same_bits(restored.state, want)


def test_saving_is_behind_the_training(tmp_path, monkeypatch):
    go, write = threading.Event(), manifest.write
    monkeypatch.setattr(manifest, "write", lambda *args: go.wait(30) and write(*args))
    state = make_state()
    with checkpointer(tmp_path) as saver:
        saver.save(1, state)  # returns, although the commit hangs
        assert not manifest.is_complete(manifest.step_folder(manifest.absolute(tmp_path), 1))
        assert checkpointer(tmp_path).latest(abstract(state)) is None
        go.set()
        saver.wait()
        assert checkpointer(tmp_path).latest(abstract(state)) is not None
    go.clear()
    threading.Timer(0.3, go.set).start()
    checkpointer(tmp_path / "sync", async_=False).save(1, state)
    assert go.is_set() and manifest.is_complete(manifest.absolute(tmp_path / "sync/00000001"))


def test_keeps_the_last_and_the_best(tmp_path):
    state = {"params": {"w": jnp.ones(4)}}
    with checkpointer(tmp_path, keep_last=2, keep_best=1) as saver:
        for step, loss in enumerate([5.0, 1.0, 3.0, math.nan, 2.0, 4.0], start=1):
            saver.save(step, state, {"loss": loss})
        saver.save(7, state)
    assert manifest.steps(manifest.absolute(tmp_path)) == [2, 6, 7]


def test_nothing_is_deleted_before_the_new_one_reads_back(tmp_path, monkeypatch):
    state, write = {"params": {"w": jnp.ones(400)}}, manifest.write

    def write_then_spoil(folder, step):
        write(folder, step)
        (folder / "meta.json").write_text("{}")

    with checkpointer(tmp_path, keep_last=1, keep_best=0) as saver:
        saver.save(1, state)
        saver.wait()
        monkeypatch.setattr(manifest, "write", write_then_spoil)
        saver.save(2, state)
        with pytest.raises(UserError, match="step 2 .* does not read back .* meta.json has 2 byte"):
            saver.wait()
        monkeypatch.setattr(manifest, "write", write)
        restored = saver.latest(abstract(state))
        assert restored is not None and restored.step == 1
        saver.save(2, state)  # takes the place of the damaged one
    assert manifest.steps(manifest.absolute(tmp_path)) == [2]


def test_due(tmp_path, monkeypatch):
    assert [s for s in range(7) if checkpointer(tmp_path, every_steps=3).due(s)] == [0, 3, 6]
    never = checkpointer(tmp_path, every_steps=0)
    assert not any(never.due(s) for s in range(7))
    timed = checkpointer(tmp_path, every_steps=0, every_minutes=1.0)
    timed._last_save -= 59
    assert not timed.due(5)
    timed._last_save -= 1
    assert timed.due(5)
    with pytest.raises(UserError, match="checkpoint.keep_last is 0, expected at least 1"):
        CheckpointConfig(keep_last=0)


def test_another_model_is_refused_by_name(tmp_path):
    state = {"params": {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, "step": jnp.int32(0)}
    with checkpointer(tmp_path) as saver:
        saver.save(1, state)
    saver = checkpointer(tmp_path)

    def refused(change: dict) -> str:
        with pytest.raises(UserError) as e:
            saver.latest(abstract({"params": state["params"] | change, "step": state["step"]}))
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "params/a is float32[2,3] in the checkpoint, expected float32[3,2]" in refused(
        {"a": jnp.ones((3, 2))}
    )
    assert "params/b is float32[4] in the checkpoint, expected bfloat16[4]" in refused(
        {"b": jnp.ones(4, jnp.bfloat16)}
    )
    assert "params/c is nothing in the checkpoint, expected float32[]" in refused({"c": 1.0})
    assert "params/b is float32[4] in the checkpoint, expected nothing" in refused({"b": None})
    other = Checkpointer(
        tmp_path,
        CheckpointConfig(),
        config_json="{}",
        model_fingerprint={"d_model": 16, "layers": 2},
        version="0",
    )
    with pytest.raises(UserError, match="d_model is 8 in the checkpoint, 16 in this run"):
        other.latest(abstract(state))


def test_newer_checkpoints_of_another_life_are_not_overwritten(tmp_path):
    state = {"params": jnp.ones(2)}
    with checkpointer(tmp_path) as saver:
        saver.save(5, state)
        saver.save(5, {"params": jnp.zeros(2)})  # already saved: the same step is the same state
    fresh = checkpointer(tmp_path)
    for step in (2, 5):
        with pytest.raises(UserError, match="step 5 that this run, now at step"):
            fresh.save(step, state)
    restored = fresh.latest(abstract(state))
    assert restored is not None and np.asarray(restored.state["params"]).sum() == 2
    fresh.save(5, state)
    fresh.save(6, state)
    fresh.close()
    assert manifest.steps(manifest.absolute(tmp_path)) == [5, 6]


def test_a_part_is_loaded_without_reading_the_rest(tmp_path):
    state, run = make_state(), tmp_path / "run"
    with checkpointer(run / "checkpoints") as saver:
        saver.save(1, make_state(1))
        saver.save(2, state)
    newest = run / "checkpoints" / "00000002"
    for path in (newest / "arrays" / "opt_state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"the moments are not looked at")
    for path in (run, run / "checkpoints", newest):
        assert_same_bits(load(path, abstract(state.params)), state.params)
    assert_same_bits(
        load(run, abstract(state.params["embed"]), subtree="params/embed"), state.params["embed"]
    )
    first = load(run, abstract(state.step), subtree="step", step=1)
    assert first == 1
    assert json.loads(load_config(run)) == {"a": 1}

    with pytest.raises(UserError, match=r"arrays/opt_state/.* has 29 bytes instead of"):
        load(run, abstract(state.opt_state), subtree="opt_state")
    with pytest.raises(UserError, match="holds no 'parms'; did you mean 'params'"):
        load(run, abstract(state.params), subtree="parms")
    with pytest.raises(UserError, match="params/embed is float32.16,8. in the checkpoint, expecte"):
        load(run, abstract(state.params | {"embed": jnp.ones(3)}))
    with pytest.raises(UserError, match="no complete checkpoint of step 9; there are 1, 2"):
        load(run, abstract(state.params), step=9)
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "none", abstract(state.params))
    (newest / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json has 2 bytes instead of 8"):
        load_config(run)


def test_what_cannot_be_stored_is_refused(tmp_path):
    saver = checkpointer(tmp_path)
    with pytest.raises(TypeError, match="rng is a typed PRNG key"):
        saver.save(1, {"rng": jax.random.key(0)})
    with pytest.raises(TypeError, match="x is float64, which JAX would change"):
        saver.save(1, {"x": np.ones(2)})
    with pytest.raises(ValueError, match="no unique name"):
        saver.save(1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    assert manifest.steps(manifest.absolute(tmp_path)) == []


def test_another_mesh_and_a_silent_terminal(tmp_path):
    code = """
        import sys, numpy as np, jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer
        from jaxreason.train.load import load

        def mesh(fsdp, tensor):
            devices = np.array(jax.devices()[:fsdp * tensor]).reshape(fsdp, tensor)
            return jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)

        def state(m):
            put = lambda x, *spec: jax.device_put(x, NamedSharding(m, P(*spec)))
            w = np.random.default_rng(0).standard_normal((16, 24), np.float32)
            return {
                "params": {"w": put(w, "fsdp", "tensor"), "v": put(w.T, None, "fsdp"),
                           "b": put(np.arange(8).astype(jnp.bfloat16), "fsdp"),
                           "scale": put(np.ones(3, np.float32))},
                "step": put(np.int32(4)),
            }

        def checkpointer():
            return Checkpointer(sys.argv[1], CheckpointConfig(), config_json="{}",
                                model_fingerprint="m", version="0")

        want = state(mesh(8, 1))
        with checkpointer() as saver:
            saver.save(4, want)
        for shape in ((8, 1), (2, 2), (1, 1), (1, 8)):
            target = state(mesh(*shape))
            wish = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
            restored = checkpointer().latest(wish)
            restored.state["params"] = load(sys.argv[1], wish["params"])
            for got, goal, first in zip(*map(jax.tree.leaves, (restored.state, target, want))):
                assert got.sharding == goal.sharding, (got.sharding, goal.sharding)
                assert np.asarray(got).tobytes() == np.asarray(first).tobytes()
            assert len(restored.state["params"]["w"].addressable_shards) == shape[0] * shape[1]
    """
    # stderr is sent to stdout, so that a warning anywhere fails the test
    quiet = "import os\nos.dup2(1, 2)\n"
    assert run_python(quiet + textwrap.dedent(code), str(tmp_path), devices=8) == ""
