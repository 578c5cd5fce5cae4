"""A Cloud that records its calls, runs commands on folders, and misbehaves.

The fake `gcloud` keeps a VM's state in a file; `ssh` runs the command line on this machine, with a
folder as the host's home, so that launch/tpu_worker.py is the real one. The environment it would
install is one script, which stands for jaxreason.main and ends with the codes it is told.
"""

import json
import pathlib
import shutil
import subprocess
import sys

from support import REPO

AWKWARD = ["--config=a b.py", '--config.run.title=it\'s "50 %" of $HOME; `x` * \\ é', "--x=a\nb"]
HOSTS = 2
GCLOUD = f"""#!{sys.executable} -S
import json, os, signal, subprocess, sys
room, args = os.environ["ROOM"], sys.argv[1:]
path = room + "/cloud.json"
cloud = json.load(open(path))
def leave(code, text=""):
    json.dump(cloud, open(path, "w"))
    if text: print(text, file=sys.stderr)
    sys.exit(code)
def value(name):
    return next((a.split("=", 1)[1] for a in args if a.startswith(name + "=")), None)
def next_of(kind):
    # The last state stays.
    states = cloud[kind]
    return states.pop(0) if len(states) > 1 else states[0]
with open(room + "/calls", "a") as f:
    f.write(json.dumps(args) + "\\n")
assert args[:2] == ["compute", "tpus"], args
kind, verb = args[2:4]
what = "vm" if kind == "tpu-vm" else "queue"
half = 0
for word, failures in cloud["fail"].items():
    if word in " ".join(args) and failures:
        code, text = failures.pop(0)
        if text == "half": half = code  # one host does what it is told, the others are not reached
        elif code: leave(code, text)
if verb == "describe":
    state = next_of(what)
    if state == "MISSING": leave(1, "ERROR: (gcloud) NOT_FOUND: no such thing")
    print(state)
elif verb == "create":
    cloud["vm"] = list(cloud["made"])
    if what == "queue": cloud["queue"] = list(cloud["queue_made"])
elif verb == "delete":
    for i in range({HOSTS}):  # a VM takes its disks and processes along
        home = f"{{room}}/host{{i}}"
        if os.path.exists(home + "/.jaxreason_run/pid"):
            try: os.kill(int(open(home + "/.jaxreason_run/pid").read()), signal.SIGTERM)
            except ProcessLookupError: pass
        if os.path.exists(home): os.rename(home, f"{{home}}.{{os.getpid()}}")
    cloud["vm"] = ["MISSING"]
    cloud["queue"] = ["MISSING"]
elif verb == "scp":
    for i in range({HOSTS}):
        os.makedirs(f"{{room}}/host{{i}}", exist_ok=True)
        subprocess.run(["cp", args[4], f"{{room}}/host{{i}}/jaxreason.tar.gz"], check=True)
elif verb == "ssh":
    worker, command = value("--worker"), value("--command")
    command = command.replace("python3 jaxreason/launch/tpu_worker.py install", "sh $ROOM/install")
    chosen = range(1 if half else {HOSTS}) if worker == "all" else [int(worker)]
    json.dump(cloud, open(path, "w"))
    codes = []
    for i in chosen:
        home = f"{{room}}/host{{i}}"
        os.makedirs(home, exist_ok=True)
        env = dict(os.environ, HOME=home, GCE_METADATA_HOST="127.0.0.1:9", HOST=str(i))
        codes.append(subprocess.run(["bash", "-c", command], cwd=home, env=env).returncode)
    sys.exit(half or max(codes))
leave(0)
"""
# Stands for .venv/bin/python: the codes lie in $ROOM/exits, one for each start.
MAIN = f"""#!{sys.executable} -S
import json, os, signal, sys, time
room, host = os.environ["ROOM"], os.environ["HOST"]
with open(f"{{room}}/runs{{host}}", "a+") as f:
    f.seek(0)
    number = len(f.readlines())
    shown = {{k: v for k, v in os.environ.items() if k.startswith("JAXREASON")}}
    f.write(json.dumps([sys.argv[1:], shown]) + "\\n")
code = open(room + "/exits").read().split()[number]
print(f"start {{number}} on host {{host}}", flush=True)
if code.startswith("told"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(code[4:])))
    time.sleep(30)
time.sleep(4 if code.startswith("slow") else 0.1)
sys.exit(int(code.removeprefix("slow")))
"""


class Cloud:
    """A checkout, a PATH with the fake gcloud, and the state of what it manages."""

    def __init__(self, room: pathlib.Path):
        self.room = room
        self.repo = room / "a checkout"
        shutil.copytree(REPO / "launch", self.repo / "launch")
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "x"]):
            subprocess.run(["git", *command], cwd=self.repo, check=True)
        for name, text in {"bin/gcloud": GCLOUD, "venv_python": MAIN}.items():
            (room / name).parent.mkdir(exist_ok=True)
            (room / name).write_text(text)
            (room / name).chmod(0o755)
        (room / "install").write_text(
            "echo installed >>installs; mkdir -p jaxreason/.venv/bin; "
            'cp "$ROOM/venv_python" jaxreason/.venv/bin/python\n'
        )
        self.set(vm=["MISSING"], queue=["MISSING"], made=["READY"], queue_made=["ACTIVE"], fail={})
        self.exits("0")

    def set(self, **state) -> None:
        path = self.room / "cloud.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | state))

    def exits(self, codes: str) -> None:
        (self.room / "exits").write_text(codes)

    def command(self, *args: str) -> list[str]:
        return ["/bin/bash", str(self.repo / "launch/tpu_vm.sh"), *args]

    def env(self, path: str = "") -> dict[str, str]:
        home = self.room / "home"
        home.mkdir(exist_ok=True)
        return {"PATH": path or f"{self.room / 'bin'}:/usr/bin:/bin", "ROOM": str(self.room),
                "HOME": str(home), "TMPDIR": str(home)}  # fmt: skip

    def run(self, *args: str, path: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*args), env=self.env(path), capture_output=True, text=True, timeout=100
        )

    def train(self, *options: str, args=AWKWARD) -> subprocess.CompletedProcess:
        base = ["--name=my-tpu", "--zone=z", "--accelerator=v5litepod-16", "--poll=0.05"]
        return self.run("run", *base, *options, "--", *args)

    def calls(self, *verbs: str) -> list[list[str]]:
        path = self.room / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [c for c in map(json.loads, lines) if not verbs or c[3] in verbs]

    def runs(self, host: int) -> list:
        path = self.room / f"runs{host}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def installs(self) -> int:
        path = self.room / "host1/installs"
        return len(path.read_text().split()) if path.exists() else 0
