"""A notice to stop ends a run after a whole step, on all hosts after the same one."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import REPO, environment

from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer
from jaxreason.train.preempt import Preemption


def test_sigterm_asks_for_a_stop_and_the_old_handler_returns():
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda *args: seen.append("outer"))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # a second notice changes nothing
            assert preemption.requested(2) and preemption.requested(3)
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_first_ctrl_c_stops_like_sigterm(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.requested(1)
    assert signal.getsignal(signal.SIGINT) is before
    assert "Ctrl-C again kills" in capfd.readouterr().err


def test_second_ctrl_c_kills():
    code = """
        import os, signal
        from jaxreason.train.preempt import Preemption
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert preemption.requested(1)
            print("still here", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            print("not killed")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=REPO,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGINT and done.stdout == "still here\n"


def test_switched_off_or_outside_the_main_thread_it_installs_nothing():
    before = signal.getsignal(signal.SIGTERM)
    answers = []

    def enter(preemption):
        with preemption:
            answers.append((signal.getsignal(signal.SIGTERM), preemption.requested(1)))

    enter(Preemption(enabled=False))
    thread = threading.Thread(target=enter, args=(Preemption(),))
    thread.start()
    thread.join()
    assert answers == [(before, False)] * 2


HOST = """
    import os, signal, sys, time, numpy as np, jax, jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from jaxreason.core.errors import UserError
    from jaxreason.train import manifest
    from jaxreason.train.checkpoint import CheckpointConfig, Checkpointer
    from jaxreason.train.load import load
    from jaxreason.train.preempt import Preemption

    folder, port, rank, service, signal_name = sys.argv[1:]
    rank = int(rank)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", service == "on")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
    shard, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    init = jax.jit(lambda: {"params": {"w": jnp.arange(64.0)}, "step": jnp.int32(0)},
                   out_shardings={"params": {"w": shard}, "step": whole})
    update = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)

    def checkpointer():
        return Checkpointer(folder, CheckpointConfig(every_steps=0, every_minutes=1e-4),
                            config_json="{}", model_fingerprint="m", version="0")

    state, step, late = init(), 0, 0
    with checkpointer() as saver, Preemption() as preemption:
        assert saver.latest(jax.eval_shape(init)) is None
        while not preemption.requested(step) and step < 3000:
            state, step = update(state), step + 1
            late += saver.due(step)
            if step == 5:
                saver.save(step, state, {"loss": 1.0})
            if step == 20 and rank == 1:
                os.kill(os.getpid(), getattr(signal, signal_name))
            time.sleep(0.01)
        saver.save(step, state)
    print("stopped", step)
    assert late > 0
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                          state)
    restored = checkpointer().latest(wanted)
    assert restored.step == step and int(restored.state["step"]) == step
    for piece in restored.state["params"]["w"].addressable_shards:
        assert (np.asarray(piece.data) == np.arange(64)[piece.index] + step).all()
    w = load(folder, wanted["params"])["w"]
    assert w.sharding == shard and w.addressable_data(0)[0] == rank * 32 + step

    # What fails on the first host is one and the same line on both.
    if rank == 0:
        def full(*args):
            raise OSError(28, "No space left on device")
        manifest.write = full
    with checkpointer() as saver:
        saver.latest(wanted)
        saver.save(step + 1, state)
        try:
            saver.wait()
        except UserError as e:
            assert "the disk is full" in str(e), e
        else:
            raise AssertionError("no error")
        assert saver.latest(wanted).step == step
    print("done")
"""


# With the service, Ctrl-C reaches it as a SIGTERM: one case for both signals.
@pytest.mark.parametrize(("service", "name"), [("on", "SIGINT"), ("off", "SIGTERM")])
def test_two_hosts_save_stop_and_restore_together(tmp_path, service, name):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(HOST), str(tmp_path), str(port), rank]
            + [service, name],
            cwd=REPO,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        results = [host.communicate(timeout=100) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, err) in zip(hosts, results):
        assert host.returncode == 0, err[-3000:]
    # Gloo prints its own lines before these.
    first, second = (out[out.index("stopped") :].split() for out, _ in results)
    assert first == second and first[2] == "done", results
    step = int(first[1])
    assert 20 <= step < 3000

    # One host, from what two have saved.
    wanted = jax.eval_shape(lambda: {"params": {"w": jnp.arange(64.0)}, "step": jnp.int32(0)})
    saver = Checkpointer(
        tmp_path, CheckpointConfig(), config_json="{}", model_fingerprint="m", version="0"
    )
    restored = saver.latest(wanted)
    assert restored is not None and restored.step == step
    assert (np.asarray(restored.state["params"]["w"]) == np.arange(64) + step).all()
