"""The tools of the tests do what the tests take for granted."""

import socket

import jax
import jax.numpy as jnp
import pytest
from support import run_python


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.ones(3) + jnp.ones((2, 3))


def test_the_network_is_out_of_reach():
    with pytest.raises(ConnectionRefusedError, match="mark it `network`"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)


def test_a_child_has_the_devices_asked_for():
    code = """
        import jax, os, sys
        print(jax.device_count(), jax.config.jax_numpy_rank_promotion, sys.argv[1], os.environ["A"])
    """
    assert run_python(code, "x", devices=8, A="b").split() == ["8", "raise", "x", "b"]
    assert jax.device_count() >= 1


def test_a_failing_child_shows_why():
    with pytest.raises(AssertionError, match="exit code 1(.|\n)*ValueError: here"):
        run_python("raise ValueError('here')", devices=1)
    with pytest.raises(AssertionError, match="no end within 1 s"):
        run_python("import time; time.sleep(60)", devices=1, timeout=1)
