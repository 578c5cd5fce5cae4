"""Stops a run in good order on SIGTERM or Ctrl-C, on all hosts after the same step."""

import itertools
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from jaxreason.train.hosts import any_host

_AGREE_EVERY = 16  # steps between two agreements when JAX's preemption service is switched off
# The service agrees on the highest number that a host has asked about, plus 1. That is 1 for a
# notice that comes before the first question (data, compiling): a run that goes on after step 500
# and asks about 501 would never hear of it. So the questions of this process are counted instead.
_questions = itertools.count(1)


class Preemption:
    """While it is entered, asks whether the run was told to stop.

    SIGTERM (the notice of a cloud or of SLURM) and the first Ctrl-C ask for a stop: the loop
    saves and ends after the step in hand. A second Ctrl-C kills the process. The previous
    handlers come back on exit.

    On several hosts one notice anywhere stops all after one and the same step: JAX's preemption
    service listens for SIGTERM and agrees on a step that no host has passed yet, without waiting
    for the devices. Where `jax_enable_preemption_service` is off, the hosts compare their flags
    every 16 steps.

    Args:
      enabled: when off, no handler is installed and nothing is ever requested.
    """

    def __init__(self, enabled: bool = True):
        self._enabled = enabled
        self._told = False
        self._agreed = False
        self._previous: dict[int, object] = {}
        self._many = False
        self._service = False

    def __enter__(self) -> "Preemption":
        if not self._enabled:
            return self
        self._many = jax.process_count() > 1
        self._service = self._many and bool(jax.config.jax_enable_preemption_service)
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread install handlers
        # With the service SIGTERM is its own: a handler here would take the notice from it.
        if not self._service:
            self._install(signal.SIGTERM, self._on_notice)
        self._install(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def requested(self, step: int) -> bool:
        """Says whether to save and stop after `step` updates.

        On several hosts all call it after every step, equally often and with the same numbers, and
        all get the same answer. Once true it stays true.
        """
        if not self._enabled or self._agreed:
            return self._agreed
        if self._service:
            self._agreed = multihost_utils.reached_preemption_sync_point(next(_questions))
        elif not self._many:
            self._agreed = self._told
        elif step % _AGREE_EVERY == 0:
            self._agreed = any_host(self._told)
        return self._agreed

    def _install(self, number: int, handler) -> None:
        self._previous[number] = signal.getsignal(number) or signal.SIG_DFL
        signal.signal(number, handler)

    def _on_notice(self, number, frame) -> None:
        self._told = True

    def _on_interrupt(self, number, frame) -> None:
        if self._told:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
            return
        self._told = True
        # os.write and not print: a handler may interrupt a print that holds the stream's lock.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _MESSAGE)
        if self._service:
            os.kill(os.getpid(), signal.SIGTERM)  # tells the service, and so all hosts


_MESSAGE = b"\nstopping after this step, with a checkpoint; Ctrl-C again kills at once\n"
