"""launch.local with children that need no JAX: who is named, what comes out, who is left behind.

Runs of the real thing on several processes are in tests/recipes/test_processes.py.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from support import REPO, environment

# A child knows its number as i and can wait to be told; the parent gets a few numbers more.
CHILD = """
import os, signal, sys, time
i, n = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
def until_told():
    print("ready", flush=True)
    while not told: time.sleep(0.01)
def say(text):
    print(text, file=sys.stderr, flush=True)
"""
PARENT = """
import sys
from launch.local import launch
sys.exit(launch([sys.executable, "-S", "-c", sys.argv[1]], int(sys.argv[2]),
                restarts=int(sys.argv[3]), end_seconds=0.5, together_seconds=1.0))
"""


def begin(body: str, processes: int = 3, restarts: int = 0) -> subprocess.Popen:
    child = CHILD + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, child, str(processes), str(restarts)],
        cwd=REPO, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(parent: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = parent.communicate(timeout=30)
    finally:
        parent.kill()
    return parent.returncode, out, err


def run(body: str, processes: int = 3, restarts: int = 0) -> tuple[int, str, str]:
    return finish(begin(body, processes, restarts))


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


def pids(err: str) -> list[int]:
    return [int(pid) for pid in re.search(r"processes: ([\d ]+)", err)[1].split()]


def assert_gone(numbers: list[int]) -> None:
    deadline = time.monotonic() + 5
    while [n for n in numbers if os.path.exists(f"/proc/{n}")] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [n for n in numbers if os.path.exists(f"/proc/{n}")]


def test_lines_of_all_processes_come_out_whole_and_numbered():
    code, out, err = run('[print(f"line {k} of {i}") for k in range(200)]; say(f"to stderr {i}")')
    assert code == 0 and not errors(err)
    assert sorted(out.splitlines()) == sorted(
        f"[{i}] line {k} of {i}" for i in range(3) for k in range(200)
    )
    assert {f"[{i}] to stderr {i}" for i in range(3)} <= set(err.splitlines())


def test_each_finds_the_coordinator_and_its_number():
    names = "JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID JAXREASON_DISTRIBUTED"
    code, out, _ = run(f"print(*(os.environ[name] for name in {names.split()}))")
    found = sorted(line.split(" ", 1)[1].split() for line in out.splitlines())
    assert code == 0 and len({address for address, *_ in found}) == 1
    assert [rest for _, *rest in found] == [["3", str(i), "auto"] for i in range(3)]
    assert re.fullmatch(r"127\.0\.0\.1:\d+", found[0][0])


@pytest.mark.parametrize(
    ("body", "expected", "line"),
    [
        ("i == 1 and (say('no room'), os._exit(3)); until_told(); time.sleep(9)", 3,
         "process 1 of 3 failed with exit code 3; the 2 others were ended; its last line: no room"),
        ("i == 2 and os.kill(os.getpid(), signal.SIGKILL); until_told()", 137,
         "process 2 of 3 was ended by SIGKILL; the 2 others were ended; it wrote nothing to "),
        # Their peers, who fail of its death at the same moment, are not to blame.
        ("i == 1 and os.kill(os.getpid(), signal.SIGSEGV)\nos.abort()", 139,
         "process 1 of 3 was ended by SIGSEGV"),
        ("say('as the peer is gone' if i else 'error: bad flag')\n"
         "os._exit(1 if i else 2)", 2, "process 0 of 3 failed with exit code 2"),
    ],
)  # fmt: skip
def test_the_first_to_fail_is_named_and_the_others_are_ended(body, expected, line):
    began = time.monotonic()
    code, _, err = run(body)
    assert time.monotonic() - began < 8
    assert code == expected, err
    assert len(errors(err)) == 1 and line in errors(err)[0], err
    assert_gone(pids(err))


def test_one_that_does_not_end_with_the_others_is_ended():
    code, _, err = run("i == 1 and time.sleep(20)")
    assert code == 1 and "process 1 of 3 was still running 1 s after" in errors(err)[0]
    assert_gone(pids(err))


def test_a_preempted_run_starts_again_as_often_as_allowed():
    code, out, err = run('print("again"); sys.exit(75)', restarts=2)
    assert code == 75 and out.count("again") == 9 and not errors(err)
    assert "1 more restarts allowed" in err and "0 more restarts allowed" in err
    assert run("sys.exit(75)")[0] == 75


def test_it_stops_starting_again_once_a_run_is_done(tmp_path):
    mark = str(tmp_path / "mark")
    body = f"""
        path = {mark!r} + str(i)
        if not os.path.exists(path):
            open(path, "w").close()
            sys.exit(75)
    """
    assert run(body, restarts=5)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_notice_to_the_parent_reaches_all_and_is_not_followed_by_a_restart(number):
    parent = begin("until_told(); print('saved', flush=True); sys.exit(75)", restarts=3)
    lines = [parent.stdout.readline() for _ in range(3)]
    assert all("ready" in line for line in lines)
    parent.send_signal(number)
    code, out, err = finish(parent)
    assert code == 75 and out.count("saved") == 3 and not errors(err)


def test_a_second_notice_kills():
    parent = begin("until_told()\nprint('slow', flush=True)\ntime.sleep(20)")
    [parent.stdout.readline() for _ in range(3)]
    parent.send_signal(signal.SIGTERM)
    assert all("slow" in parent.stdout.readline() for _ in range(3))
    parent.send_signal(signal.SIGTERM)
    code, _, err = finish(parent)
    assert code == 137 and "SIGKILL" in errors(err)[0] and "last complete checkpoint" in err
    assert_gone(pids(err))


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_parent_leaves_none_behind(tmp_path):
    parent = begin(f"""
        until_told()
        open({str(tmp_path)!r} + f"/told{{i}}", "w").close()
    """)
    [parent.stdout.readline() for _ in range(3)]
    parent.kill()
    assert_gone(pids(parent.communicate()[1]))
    assert sorted(path.name for path in pathlib.Path(tmp_path).iterdir()) == [
        f"told{i}" for i in range(3)
    ]


@pytest.mark.parametrize(
    "args", [[], ["--processes=2"], ["--processes=2", "--"], ["--processes=0", "--", "--config=x"],
             ["--processes=two", "--", "--config=x"], ["--process=2", "--", "--config=x"],
             ["2", "--", "--config=x"]]
)  # fmt: skip
def test_bad_input_is_one_line(args):
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *args],
        cwd=REPO, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
