"""What tells a process that it is one of several, and how it joins and leaves them."""

import contextlib
import random
import socket
import subprocess
import sys
import textwrap

import pytest
from support import REPO, environment

from jaxreason.core.errors import UserError
from jaxreason.train import hosts

ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (ADDRESS | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
         {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3,
          "cluster_detection_method": "deactivate"}),
        (SLURM, {}),
        (SLURM | ADDRESS, {"coordinator_address": "10.0.0.1:1234"}),
        # The shell of a batch script or of `salloc`: its job has tasks, it is none of them.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, {}),
        ({"JAXREASON_DISTRIBUTED": "1"}, {}),
        ({"JAXREASON_DISTRIBUTED": "auto"}, None),
        (SLURM | {"JAXREASON_DISTRIBUTED": "0"}, None),
    ],
)  # fmt: skip
def test_where_the_others_are(environ, expected):
    assert hosts.found(environ) == expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        (ADDRESS, "JAX_NUM_PROCESSES is ''"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID is 'x'"),
        (ADDRESS | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "expected 0 to 1"),
        ({"JAXREASON_DISTRIBUTED": "yes"}, "expected 0, 1 or auto"),
    ],
)
def test_contradictions_are_user_errors(environ, says):
    with pytest.raises(UserError, match=says):
        hosts.found(environ)


def test_a_pod_host_that_was_not_told_says_so(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_WORKER_HOSTNAMES", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hosts.os.path, "exists", lambda path: path == "/dev/vfio/0")
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 4)
    with pytest.raises(UserError, match="one of 4 hosts of a TPU pod; set JAXREASON_DISTRIBUTED=1"):
        hosts.join()


SLURM_TASK = """
    from jaxreason.train import hosts
    hosts.join()
    import jax
    count = hosts.any_host(jax.process_index() == 1)
    print("joined", jax.process_index(), jax.process_count(), count, flush=True)
"""


def test_tasks_of_a_slurm_step_find_each_other():
    """By SLURM's variables alone, as JAX reads them."""
    with socket.socket() as free:
        while True:  # JAX makes the port of the job's number: 61440 + number mod 4096
            job = random.randrange(4096)
            with contextlib.suppress(OSError):
                free.bind(("127.0.0.1", 61440 + job))
                break
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SLURM_TASK)], cwd=REPO, text=True,
            env=environment(**step, SLURM_PROCID=rank, SLURM_LOCALID=rank),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        results = [task.communicate(timeout=60) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    for rank, (out, err) in enumerate(results):
        assert f"joined {rank} 2 True" in out, err[-2000:]


LEAVER = """
    import os, sys, time
    from jaxreason.train import hosts
    hosts._JOIN_SECONDS = 30
    hosts.join()
    if os.environ["JAX_PROCESS_ID"] == sys.argv[1]:
        print("bad input", file=sys.stderr)
        sys.exit(hosts.leave(2))
    time.sleep(60)
"""


def test_a_process_that_fails_alone_does_not_wait_for_the_others():
    """JAX's exit would wait for them for minutes, and they for it."""
    parent = (
        "import sys; from launch.local import launch; "
        "sys.exit(launch([sys.executable, '-c', *sys.argv[1:]], 2, end_seconds=0.1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, textwrap.dedent(LEAVER), "1"],
        cwd=REPO, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "error: process 1 of 2 failed with exit code 2" in done.stderr
    assert "its last line: bad input" in done.stderr


@pytest.mark.parametrize(
    ("address", "says"), [("127.0.0.1:9", "Connection refused"), ("nowhere", "invalid literal")]
)
def test_no_coordinator_is_a_user_error(monkeypatch, address, says):
    monkeypatch.setattr(hosts, "_JOIN_SECONDS", 0.3)
    environ = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=f"no answer from JAX_COORDINATOR_ADDRESS {address}.*{says}"
    ):
        hosts.join()
