"""launch/tpu_vm.sh with a Cloud that records its calls and misbehaves (tests/fake_cloud.py)."""

import os
import shlex
import shutil
import subprocess
import time

import pytest
from fake_cloud import AWKWARD, HOSTS, Cloud


@pytest.fixture
def cloud(tmp_path) -> Cloud:
    return Cloud(tmp_path)


def test_a_run_from_nothing_to_the_end_with_a_restart(cloud):
    cloud.exits("75 0")
    done = cloud.train("--spot", "--project=p", "--gcloud=--network=a b")
    assert done.returncode == 0, done.stderr
    [create] = cloud.calls("create")
    assert create == ["compute", "tpus", "tpu-vm", "create", "my-tpu", "--project=p", "--zone=z",
                      "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot",
                      "--network=a b"]  # fmt: skip
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=cloud.repo, capture_output=True,
                            text=True).stdout[:12]  # fmt: skip
    for host in range(HOSTS):
        runs = cloud.runs(host)
        assert [args for args, _ in runs] == [["-m", "jaxreason.main", *AWKWARD]] * 2
        assert all(env["JAXREASON_DISTRIBUTED"] == "1" for _, env in runs)
        assert all(env["JAXREASON_COMMIT"] == commit for _, env in runs)
    assert cloud.installs() == 1 and not cloud.calls("delete")
    assert "start 0 on host 0" in done.stdout and "start 1 on host 0" in done.stdout
    assert "starting again (99 more restarts allowed)" in done.stderr
    assert "launch/tpu_vm.sh delete --name=my-tpu" in done.stderr
    assert not list((cloud.room / "home").iterdir()), "something temporary was left"


def test_a_vm_that_is_taken_away_is_made_anew(cloud):
    """It goes while the log is read: the connection breaks and the run says nothing more."""
    cloud.exits("told0 0")
    lost = [[255, "ssh: connect to host: Connection timed out"]]
    cloud.set(
        vm=["READY", "PREEMPTED", "PREEMPTED"], made=["READY"],
        fail={"tpu_worker.py follow": list(lost), "tpu_worker.py status": [[0, ""], *lost]},
    )  # fmt: skip
    done = cloud.train("--restarts=1")
    assert done.returncode == 0, done.stderr
    assert "my-tpu is PREEMPTED; starting again" in done.stderr
    assert [c[2:5] for c in cloud.calls("delete", "create")] == [
        ["tpu-vm", "delete", "my-tpu"], ["tpu-vm", "create", "my-tpu"],
    ]  # fmt: skip
    assert cloud.installs() == 1 and len(list(cloud.room.glob("host1*"))) == 2


def test_a_run_that_fails_is_not_started_again(cloud):
    cloud.exits("3")
    done = cloud.train()
    assert done.returncode == 3 and "failed with exit code 3" in done.stderr
    assert len(cloud.runs(0)) == 1 and not cloud.calls("delete")


def test_restarts_are_counted(cloud):
    cloud.exits("75 75 75")
    done = cloud.train("--restarts=1")
    assert done.returncode == 75 and "not started again after 1 restarts" in done.stderr
    assert len(cloud.runs(0)) == 2


def test_a_host_that_does_not_answer_at_the_start_is_asked_again(cloud):
    """The other one has begun by then, and does not begin twice."""
    cloud.set(vm=["READY"], fail={"tpu_worker.py start": [[0, ""], [255, "half"]]})
    cloud.exits("75 0")
    done = cloud.train()
    assert done.returncode == 0, done.stderr
    starts = [c for c in cloud.calls("ssh") if any("tpu_worker.py start" in a for a in c)]
    ids = [next(a for a in c if "start" in a).split(" start ")[1].split()[0] for c in starts]
    assert len(ids) == 3 and ids[1] == ids[2] != ids[0]
    assert len(cloud.runs(0)) == len(cloud.runs(1)) == 2


def test_a_run_under_way_is_followed_stopped_and_its_code_kept(cloud):
    cloud.set(vm=["READY"])
    cloud.exits("told75 0")
    base = ["--name=my-tpu", "--accelerator=v5p-64", "--poll=0.05", "--restarts=0", "--", "--x"]
    first = subprocess.Popen(cloud.command("run", *base), env=cloud.env(),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (len(cloud.runs(0)) and len(cloud.runs(1))) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.kill()  # the laptop is closed
    first.wait()
    assert cloud.run("status", "--name=my-tpu").stderr.count("running ") == 1
    second = subprocess.Popen(cloud.command("run", *base), env=cloud.env(), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert "following it" in second.stderr.readline()
    time.sleep(0.3)  # the signal handler of the fake run
    assert cloud.run("stop", "--name=my-tpu").returncode == 0
    out, err = second.communicate(timeout=60)
    assert second.returncode == 75 and "told to stop, and has saved" in err, err
    assert "start 0 on host 0" in out and len(cloud.runs(0)) == len(cloud.runs(1)) == 1
    assert "exited 75" in cloud.run("status", "--name=my-tpu").stderr
    assert "start 0 on host 1" in cloud.run("logs", "--name=my-tpu", "--worker=all").stdout


def test_a_connection_that_keeps_breaking_ends_no_run(cloud):
    """The run says each time that it is under way."""
    cloud.set(vm=["READY"], fail={"tpu_worker.py follow": [[255, "Connection reset"]] * 12})
    cloud.exits("slow0")
    done = cloud.train()
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the connection to my-tpu was lost") == 12
    assert len(cloud.runs(0)) == 1 and "ten times" not in done.stderr


def test_a_run_that_ends_out_of_sight_is_not_started_again(cloud):
    lost = [255, "Connection reset"]
    cloud.set(vm=["READY"], fail={
        "tpu_worker.py follow": [lost], "tpu_worker.py status": [[0, ""], lost],
    })  # fmt: skip
    done = cloud.train("--poll=1")
    assert done.returncode == 0 and "does not say how the run is" in done.stderr, done.stderr
    assert len(cloud.runs(0)) == 1


def test_a_create_that_fails_leaves_nothing_behind(cloud):
    cloud.set(fail={"tpu-vm create": [[1, "ERROR: no more capacity in the zone"]]}, vm=["MISSING"])
    done = cloud.train()
    assert done.returncode == 1 and "no more capacity" in done.stderr
    assert "could not be made" in done.stderr and not cloud.calls("delete", "ssh", "scp")
    # Half made: gcloud failed, the VM is there all the same.
    cloud.set(fail={"tpu-vm create": [[1, "ERROR: timed out"]]}, vm=["MISSING", "CREATING"])
    (cloud.room / "calls").unlink()
    done = cloud.run("create", "--name=my-tpu", "--accelerator=v5p-8", "--poll=0.05")
    assert done.returncode == 1
    assert [c[2:5] for c in cloud.calls("delete")] == [["tpu-vm", "delete", "my-tpu"]]


def test_what_someone_else_has_made_is_not_deleted(cloud):
    cloud.set(fail={"tpu-vm create": [[1, "ERROR: ALREADY_EXISTS: my-tpu"]]}, vm=["MISSING"])
    done = cloud.train()
    assert done.returncode == 1 and "made by someone else" in done.stderr
    assert not cloud.calls("delete")


@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN", "UNKNOWN"])
def test_a_vm_in_another_state_is_left_alone(cloud, state):
    cloud.set(vm=[state])
    done = cloud.train()
    assert done.returncode == 1 and f"my-tpu is {state}" in done.stderr
    assert {c[3] for c in cloud.calls()} == {"describe"}


def test_the_queue_is_waited_for(cloud):
    cloud.set(queue_made=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    done = cloud.run("create", "--name=q", "--accelerator=v6e-16", "--queued", "--spot",
                     "--poll=0.05")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WAITING_FOR_RESOURCES" in done.stderr and "PROVISIONING" in done.stderr
    [create] = cloud.calls("create")
    assert create[2:] == ["queued-resources", "create", "q", "--node-id=q",
                          "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e",
                          "--spot"]  # fmt: skip
    cloud.set(vm=["MISSING"], queue=["MISSING"], queue_made=["ACCEPTED", "FAILED"])
    done = cloud.run("create", "--name=q", "--accelerator=v6e-16", "--queued", "--poll=0.05")
    assert done.returncode == 1 and "the request for q is FAILED" in done.stderr
    assert [c[2:6] for c in cloud.calls("delete")] == [
        ["queued-resources", "delete", "q", "--force"]
    ]


def test_a_suspended_request_makes_room_for_a_new_one(cloud):
    cloud.set(vm=["MISSING"], queue=["SUSPENDED"])
    done = cloud.train("--queued")
    assert done.returncode == 0, done.stderr
    assert [c[2:4] for c in cloud.calls("delete", "create")] == [
        ["queued-resources", "delete"], ["queued-resources", "create"],
    ]  # fmt: skip


def test_an_active_request_whose_vm_is_gone_is_replaced(cloud):
    cloud.set(vm=["MISSING"], queue=["ACTIVE"])
    done = cloud.train("--queued")
    assert done.returncode == 0, done.stderr
    assert "is ACTIVE and its VM is gone; asking anew" in done.stderr
    assert [c[2:4] for c in cloud.calls("delete", "create")] == [
        ["queued-resources", "delete"], ["queued-resources", "create"],
    ]  # fmt: skip


def test_an_active_request_whose_vm_shows_late_is_kept(cloud):
    cloud.set(vm=["MISSING", "READY"], queue=["ACTIVE"])
    done = cloud.train("--queued")
    assert done.returncode == 0, done.stderr
    assert not cloud.calls("delete", "create")


@pytest.mark.parametrize(
    ("vm", "queue", "deleted"),
    [("READY", "MISSING", ["tpu-vm"]), ("READY", "ACTIVE", ["queued-resources"]),
     ("MISSING", "SUSPENDED", ["queued-resources"]), ("MISSING", "MISSING", [])],
)  # fmt: skip
def test_delete_removes_what_is_there(cloud, vm, queue, deleted):
    cloud.set(vm=[vm], queue=[queue])
    assert cloud.run("delete", "--name=my-tpu").returncode == 0
    assert [c[2] for c in cloud.calls("delete")] == deleted


def test_a_cloud_that_refuses_is_believed(cloud):
    cloud.set(fail={"describe": [[1, "ERROR: (gcloud.auth) You are not logged in"]] * 9})
    done = cloud.train()
    assert done.returncode == 1 and "not logged in" in done.stderr
    assert "error: gcloud cannot say how my-tpu is" in done.stderr
    assert {c[3] for c in cloud.calls()} == {"describe"}


def test_a_dry_run_shows_the_commands_and_calls_nothing(cloud):
    done = cloud.run("run", "--name=my-tpu", "--accelerator=v5p-64", "--dry-run", "--", *AWKWARD,
                     path="/usr/bin:/bin")  # fmt: skip
    assert done.returncode == 0 and not cloud.calls()
    shown = shlex.split(done.stdout, comments=False)
    for word in ("create", "scp", "describe", "archive", "--accelerator-type=v5p-64",
                 "--version=v2-alpha-tpuv5"):  # fmt: skip
        assert word in shown
    start = next(word for word in shown if "tpu_worker.py start" in word)
    bash = ["/bin/bash", "-c", f"set -- {start.removeprefix('--command=')}; printf '%s|' \"$@\""]
    words = subprocess.run(bash, capture_output=True, text=True).stdout.split("|")
    assert words[-4:-1] == AWKWARD
    for action in ("create", "delete", "logs", "stop", "status"):
        more = ["--accelerator=v5p-64"] if action == "create" else []
        done = cloud.run(action, "--name=my-tpu", "--dry-run", *more, path="/usr/bin:/bin")
        assert done.returncode == 0 and done.stdout.startswith("gcloud compute tpus "), action
    assert not cloud.calls() and not list((cloud.room / "home").iterdir())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "got command ''"),
        (["destroy"], "got command 'destroy'"),
        (["delete"], "--name is ''"),
        (["delete", "--name=my tpu"], "--name is 'my tpu'"),
        (["delete", "--name=a'; rm -rf \"x"], "--name is"),
        (["delete", "--name=-x"], "--name is '-x'"),
        (["delete", "--name=x", "--force"], "unknown option '--force'"),
        (["delete", "--name=x", "--", "y"], "takes no arguments of a run, got 'y'"),
        (["run", "--name=x", "--accelerator=v5p-8"], "no run is named"),
        (["run", "--name=x", "--accelerator=v5p-8", "--"], "no run is named"),
        (["run", "--name=x", "--", "y"], "--accelerator is not set"),
        (["create", "--name=x", "--accelerator=a100"], "no image is known"),
        (["create", "--name=x", "--accelerator=v5p-8", "--restarts=x"], "--restarts is 'x'"),
        (["logs", "--name=x", "--worker=first"], "--worker is 'first'"),
        (["logs", "--name=x", "--poll=soon"], "--poll is 'soon'"),
    ],
)
def test_bad_input_is_one_line_and_calls_nothing(cloud, args, says):
    done = cloud.run(*args)
    assert done.returncode == 2 and done.stdout == "" and not cloud.calls()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_missing_tools_are_one_line(cloud):
    few = cloud.room / "few"
    few.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "git"):
        (few / name).symlink_to(shutil.which(name) or "/bin/true")
    done = cloud.run("run", "--name=x", "--accelerator=v5p-8", "--", "y", path=str(few))
    assert done.returncode == 2 and "gcloud is not on the PATH" in done.stderr
    assert done.stderr.count("\n") == 1
    shutil.rmtree(cloud.repo / ".git")
    done = cloud.run("run", "--name=x", "--accelerator=v5p-8", "--", "y")
    assert done.returncode == 2 and "no git checkout with a commit" in done.stderr
    assert not cloud.calls() and not os.listdir(cloud.room / "home")
