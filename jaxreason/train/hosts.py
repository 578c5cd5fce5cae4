"""The processes of a run: how one joins the others, and how all agree on what one has seen.

What tells a process that it is one of several, first match counts:

    JAXREASON_DISTRIBUTED=0   it is alone, whatever else is set
    JAX_COORDINATOR_ADDRESS   host:port of process 0, with JAX_NUM_PROCESSES and JAX_PROCESS_ID;
                              launch/local.py sets them, any other launcher can
    a SLURM step of 2+ tasks  JAX reads the rest from SLURM; one process a GPU, unless
                              JAX_LOCAL_DEVICE_IDS=0,1,... gives a process several
    TPU_WORKER_HOSTNAMES      of 2+ hosts, as GKE sets it, or MEGASCALE_NUM_SLICES of 2+ slices
    JAXREASON_DISTRIBUTED=1   JAX finds the others by itself or it is an error; launch/tpu_vm.sh
                              sets it, for on a Cloud TPU VM only the metadata server knows them
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxreason.core.errors import UserError

_MEET_SECONDS = 3600
_JOIN_SECONDS = 300  # A pod's hosts set out minutes apart where each installs and downloads first.


def join() -> None:
    """Connects this process to the others of its run, where the environment says there are any.

    Call it once, before anything touches a device. The module's text lists the variables.

    Raises:
      UserError: the variables contradict each other, the others did not come within 5 minutes, or
        this is one host of a TPU pod and nothing said so.
    """
    arguments = found(os.environ)
    if arguments is None:
        if _is_tpu_host() and jax.process_count() > 1:
            raise UserError(
                f"this is one of {jax.process_count()} hosts of a TPU pod; set "
                "JAXREASON_DISTRIBUTED=1 on all of them and start all (launch/tpu_vm.sh does)"
            )
        return
    if arguments.get("process_id"):
        _await(arguments["coordinator_address"])
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=_JOIN_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        where = arguments.get("coordinator_address", "which JAX could not find")
        raise UserError(
            f"could not join the run's other processes; coordinator: {where}; {reason}; start all "
            "processes with the same address, or set JAXREASON_DISTRIBUTED=0 to run alone"
        ) from error


def found(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a process on its own.

    Args:
      environ: the variables of the module's text.

    Raises:
      UserError: one of them has a value that cannot be, or its companions are missing.
    """
    told = environ.get("JAXREASON_DISTRIBUTED", "auto")
    if told not in ("auto", "0", "1"):
        raise UserError(f"JAXREASON_DISTRIBUTED is {told!r}; expected 0, 1 or auto")
    if told == "0":
        return None
    step = environ.get("SLURM_STEP_NUM_TASKS", "1") if "SLURM_PROCID" in environ else "1"
    slurm = step.isdecimal() and int(step) > 1
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        numbers = [environ.get(name, "") for name in names]
        if not any(numbers) and slurm:
            return {"coordinator_address": address}
        for name, number in zip(names, numbers):
            if not number.isdecimal():
                raise UserError(
                    f"JAX_COORDINATOR_ADDRESS is {address} and {name} is {number!r}; expected a "
                    "number; launch/local.py sets all three"
                )
        count, index = map(int, numbers)
        if not 0 <= index < count:
            raise UserError(
                f"JAX_PROCESS_ID is {index} of JAX_NUM_PROCESSES {count}; expected 0 to {count - 1}"
            )
        # Its host and port are all there is to know: nothing else may be looked for.
        given = {"coordinator_address": address, "num_processes": count, "process_id": index}
        return given | {"cluster_detection_method": "deactivate"}
    hosts = "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return {} if slurm or hosts or slices or told == "1" else None


def _await(address: str) -> None:
    """Waits until the coordinator listens; JAX would abort the process where it never does."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, ValueError, OverflowError) as error:
            if time.monotonic() > deadline or not isinstance(error, OSError):
                raise UserError(
                    f"no answer from JAX_COORDINATOR_ADDRESS {address} in {_JOIN_SECONDS} s "
                    f"({error}); start process 0 there, or set JAXREASON_DISTRIBUTED=0 to run alone"
                ) from error
            time.sleep(0.2)


def _is_tpu_host() -> bool:
    if os.environ.get("JAX_PLATFORMS", "").strip() == "cpu":
        return False
    return any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))


def leave(code: int) -> int:
    """Returns the exit code of a process that joined; ends it at once where it failed alone.

    Python's exit waits for all processes to come to theirs, up to 5 minutes; but the others may
    wait for this one in the middle of a step.
    """
    # Not jax.process_count(): that would wait for the others' devices if nothing has done so yet.
    if code in (0, 75) or not jax.distributed.is_initialized():
        return code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def meet(name: str) -> None:
    """Waits until all hosts are here, for an hour at most; it needs no device.

    Call it before the first collective operation: connecting the devices of two hosts fails where
    one comes half a minute after the other (gloo), waiting for each other later does not.
    """
    if jax.process_count() > 1:
        import orbax.checkpoint as ocp  # half a second that a process on its own need not spend

        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _MEET_SECONDS)


def on_first_host(look: Callable[[], Any]) -> Any:
    """Calls `look` on the first host and returns its result on every host.

    Called by all hosts at the same place; it synchronises them through their devices.

    Args:
      look: returns something that JSON can carry.

    Raises:
      UserError: `look` raised it on the first host; every host raises the same line.
    """
    if jax.process_count() == 1:
        return look()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": look()}
        except UserError as e:
            answer = {"error": str(e)}
    answer = _broadcast(answer)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def any_host(flag: bool) -> bool:
    """Returns whether `flag` is set on at least one host; called by all at the same place."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def _broadcast(answer: dict[str, Any]) -> dict[str, Any]:
    data = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    # The size is rounded up, so that few shapes are compiled; spaces after JSON are harmless.
    padded = np.full(1 << max(size - 1, 1).bit_length(), ord(" "), np.uint8)
    if jax.process_index() == 0:
        padded[: data.size] = data
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)).decode())
