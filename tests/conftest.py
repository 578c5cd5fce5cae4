"""What every test stands on: one CPU device, strict ranks, no network, no settings of the user.

`JAXREASON_TEST_PLATFORM=cuda` (or `tpu`) runs the tests on an accelerator instead.
`JAX_DISABLE_JIT` is left as it is: tests on the tiny config must hold with it too.
"""

import os
import socket
from collections.abc import Iterator

import pytest

# Set before the first import of JAX, which is in a test. A user's own settings would change numbers
# or the device count.
for _name in (
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_ENABLE_X64",
    "JAX_NUM_CPU_DEVICES",
):
    os.environ.pop(_name, None)
# Most of the time of a test goes into compiling: this takes a third less, for slower programs.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Command lines that run inside a test would keep programs in the user's cache on disk, and all
# later tests of the process too; writing one has crashed a process (docs/log.md, 2026-11-30).
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAXREASON_TEST_PLATFORM", "cpu")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses connections beyond this machine in any test not marked `network`."""
    if request.node.get_closest_marker("network") is None:
        connect = socket.socket.connect

        def local_only(self: socket.socket, address):
            host = address[0] if self.family in (socket.AF_INET, socket.AF_INET6) else "localhost"
            if host not in ("localhost", "127.0.0.1", "::1"):
                raise ConnectionRefusedError(f"a test reached for {host}; mark it `network`")
            return connect(self, address)

        monkeypatch.setattr(socket.socket, "connect", local_only)
    yield
