"""launch/tpu_worker.py on its own: notices of the metadata server, hosts restarted under a run."""

import http.server
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import REPO

MAIN = f"""#!{sys.executable} -S
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("under way", flush=True)
time.sleep(20)
"""


class Host:
    """A home with the code and a stand-in for the environment, and its metadata server."""

    def __init__(self, home: pathlib.Path):
        self.home, self.values = home, {"maintenance-event": "NONE"}
        (home / "jaxreason/launch").mkdir(parents=True)
        text = (REPO / "launch/tpu_worker.py").read_text()
        assert "NOTICE_SECONDS = 5.0" in text and "SETTLE_SECONDS = 60.0" in text
        text = text.replace("NOTICE_SECONDS = 5.0", "NOTICE_SECONDS = 0.1")
        text = text.replace("SETTLE_SECONDS = 60.0", "SETTLE_SECONDS = 0.1")
        (home / "jaxreason/launch/tpu_worker.py").write_text(text)
        python = home / "jaxreason/.venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(MAIN)
        python.chmod(0o755)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _handler(self):
        values = self.values

        class Metadata(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.removeprefix("/computeMetadata/v1/instance/")
                known = name in values and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(values.get(name, "").encode())

            def log_message(self, *_):
                pass

        return Metadata

    def call(self, *args: str) -> str:
        env = {"HOME": str(self.home), "PATH": "/usr/bin:/bin",
               "GCE_METADATA_HOST": f"127.0.0.1:{self.server.server_port}"}  # fmt: skip
        script = str(self.home / "jaxreason/launch/tpu_worker.py")
        done = subprocess.run([sys.executable, script, *args], env=env, timeout=30,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, run: str) -> int:
        """Starts a run and returns its supervisor, once it can be told."""
        self.call("start", run, "--config=x")
        self.until(lambda: "under way" in (self.home / ".jaxreason_run/log").read_text())
        return int((self.home / ".jaxreason_run/pid").read_text())

    def until(self, ready) -> None:
        deadline = time.monotonic() + 15
        while not ready():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.server.shutdown()
    host.server.server_close()


@pytest.mark.parametrize(
    "notice", [{"preempted": "TRUE"}, {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}]
)
def test_a_notice_lets_the_run_save(host, notice):
    host.start("one")
    time.sleep(0.3)
    assert host.call("status") == "running one\n"
    host.values |= notice
    assert "notice: " in host.call("follow") and host.call("status") == "exited 75 one\n"
    # Started again on the same host, the notice still stands: it has been heeded.
    host.start("two")
    time.sleep(0.5)
    assert host.call("status") == "running two\n"
    host.call("stop")
    host.call("follow")
    assert host.call("status") == "exited 75 two\n"


def test_sigterm_of_the_host_lets_the_run_save(host):
    os.kill(host.start("one"), signal.SIGTERM)
    assert "under way" in host.call("follow") and host.call("status") == "exited 75 one\n"


def test_a_host_restarted_under_a_run_is_seen(host):
    assert host.call("status") == "none\n"
    os.killpg(host.start("one"), signal.SIGKILL)
    host.until(lambda: host.call("status") == "gone one\n")


def test_an_earlier_run_that_does_not_end_is_killed(host):
    python = host.home / "jaxreason/.venv/bin/python"
    python.write_text(MAIN.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN"))
    first = host.start("one")
    host.start("one")  # the same run: nothing happens
    assert int((host.home / ".jaxreason_run/pid").read_text()) == first
    python.write_text(MAIN)
    second = host.start("two")
    assert second != first and host.call("status") == "running two\n"
    assert (host.home / ".jaxreason_run/log.before").exists()
    os.killpg(second, signal.SIGKILL)


def test_an_environment_that_is_not_there_is_said(host):
    (host.home / "jaxreason/.venv/bin/python").unlink()
    host.call("start", "one", "--config=x")
    assert "cannot be run (No such file" in host.call("follow")
    assert host.call("status") == "exited 2 one\n"
