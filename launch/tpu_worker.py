"""What launch/tpu_vm.sh runs on every host of a TPU VM; needs Python 3.8, nothing installed.

    python3 tpu_worker.py install           the package and Python 3.12, into .venv
    python3 tpu_worker.py start ID ARGS     jaxreason.main ARGS in the background, once for each ID
    python3 tpu_worker.py status            prints none, running ID, exited CODE ID or gone ID
    python3 tpu_worker.py follow [LAST]     prints the log (its LAST bytes) until the run ends
    python3 tpu_worker.py stop              tells the run to save and stop

A run outlives the connection that started it. SIGTERM (the host shuts down) and the metadata
server's notices of a preemption or a maintenance become a SIGTERM of the run, which then saves with
the other hosts and exits 75. Its log and exit code lie in ~/.jaxreason_run.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request

CODE = pathlib.Path(__file__).resolve().parent.parent
ROOM = pathlib.Path.home() / ".jaxreason_run"
# What the metadata server says when the host is about to go; other values are no notice.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
NOTICE_SECONDS = 5.0
SETTLE_SECONDS = 60.0  # that an earlier run has to end before it is killed
INSTALL = """set -eu
cd "$1"
python3 -m pip --version >/dev/null 2>&1 || sudo apt-get install -y -q python3-pip
python3 -m pip install --quiet --user uv
uv="$(python3 -m site --user-base)/bin/uv"
[ -x .venv/bin/python ] || "$uv" venv --quiet --python 3.12 .venv
"$uv" pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs]'
.venv/bin/python -c 'import jax, jaxreason; print(jaxreason.__version__, "jax", jax.__version__)'
"""


def install() -> int:
    """Brings the environment up to date; returns the exit code."""
    return subprocess.call(["bash", "-c", INSTALL, "install", str(CODE)])


def write(name: str, text: str) -> None:
    """Puts a small file into the room in one rename."""
    temporary = ROOM / (name + ".tmp")
    temporary.write_text(text)
    temporary.replace(ROOM / name)


def read(name: str) -> str:
    """Returns a small file of the room, an empty text where there is none."""
    try:
        return (ROOM / name).read_text()
    except FileNotFoundError:
        return ""


def supervisor() -> "int | None":
    """Returns the process number of the run's supervisor while it lives."""
    text = read("pid")
    if not text:
        return None
    try:
        os.kill(int(text), 0)
        # The number may belong to another process since.
        line = pathlib.Path(f"/proc/{text}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return int(text) if b"supervise" in line else None


def status() -> str:
    """Returns the state of the last run in one line."""
    if not read("id"):
        return "none"
    if supervisor() is not None:
        return f"running {read('id')}"
    # Without a code the supervisor was killed, or the host was restarted under it.
    return f"exited {read('exit')} {read('id')}" if read("exit") else f"gone {read('id')}"


def start(run: str, argv: "list[str]") -> int:
    """Starts a run, unless this very one has been started; ends an earlier one first."""
    ROOM.mkdir(exist_ok=True)
    if read("id") == run:
        return 0
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        before = supervisor()
        if before is None:
            break
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(before, signal.SIGKILL)
        time.sleep(0.2)
    for name in ("exit", "pid"):
        with contextlib.suppress(FileNotFoundError):
            (ROOM / name).unlink()
    with contextlib.suppress(FileNotFoundError):
        (ROOM / "log").replace(ROOM / "log.before")
    with (ROOM / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "supervise", *argv],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    write("pid", str(process.pid))
    write("id", run)
    return 0


def supervise(argv: "list[str]") -> int:
    """Runs jaxreason.main, passes notices on, and leaves its exit code in the room."""
    env = dict(os.environ, JAXREASON_DISTRIBUTED="1", PYTHONUNBUFFERED="1")
    command = [str(CODE / ".venv/bin/python"), "-m", "jaxreason.main", *argv]
    try:
        child = subprocess.Popen(command, cwd=CODE, env=env)
    except OSError as error:
        print(f"error: {command[0]} cannot be run ({error.strerror})", flush=True)
        write("exit", "2")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    known, looked = notices(), time.monotonic()
    while child.poll() is None:
        time.sleep(0.1)
        if time.monotonic() - looked < NOTICE_SECONDS:
            continue
        # A notice that was there before this run is of a stop that is over or has been missed.
        now, looked = notices(), time.monotonic()
        if now - known:
            print(f"notice: {', '.join(sorted(now - known))}; saving and stopping", flush=True)
            child.send_signal(signal.SIGTERM)
        known |= now
    code = child.returncode
    write("exit", str(128 - code if code < 0 else code))
    return 0


def notices() -> "set[str]":
    """Returns the notices that the metadata server shows now; none where there is no server."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    shown = set()
    for name, value in NOTICES.items():
        request = urllib.request.Request(
            f"http://{host}/computeMetadata/v1/instance/{name}",
            headers={"Metadata-Flavor": "Google"},
        )
        try:
            with opener.open(request, timeout=2) as answer:
                if answer.read(100).decode(errors="replace").strip() == value:
                    shown.add(f"{name}={value}")
        except (OSError, ValueError):  # URLError is an OSError
            pass
    return shown


def follow(last: "int | None") -> int:
    """Copies the log to stdout until the run has ended."""
    log = ROOM / "log"
    with log.open("rb") as file:
        if last is not None:
            file.seek(max(0, log.stat().st_size - last))
        while True:
            over = supervisor() is None  # asked first: what came before the end is still copied
            piece = file.read()
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
            if over and not piece:
                return 0
            if not piece:
                time.sleep(0.2)


def main(argv: "list[str]") -> int:
    """Runs one of the commands of the module's text; returns the exit code."""
    command, rest = (argv[0], argv[1:]) if argv else ("", [])
    if command == "install" and not rest:
        return install()
    if command == "start" and len(rest) >= 2:
        return start(rest[0], rest[1:])
    if command == "supervise":
        return supervise(rest)
    if command == "status" and not rest:
        print(status())
        return 0
    if command == "follow" and len(rest) < 2 and all(arg.isdecimal() for arg in rest):
        if not (ROOM / "log").exists():
            print("error: nothing has been run here", file=sys.stderr)
            return 2
        return follow(int(rest[0]) if rest else None)
    if command == "stop" and not rest:
        running = supervisor()
        if running is not None:
            os.kill(running, signal.SIGTERM)
        print(status())
        return 0
    print(f"error: got {' '.join(argv)!r}; expected one of the commands in {__file__}",
          file=sys.stderr)  # fmt: skip
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
