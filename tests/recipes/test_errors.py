"""Every mistake of a user ends in exit code 2 and one line, and leaves the run's folder alone."""

import errno
import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
from support import REPO, environment

from jaxreason.main import main
from jaxreason.train import arrays

TINY = f"--config={REPO}/tests/fixtures/tiny.py"
SHORT = (
    "--config.train.steps=4",
    "--config.train.eval_every=0",
    "--config.checkpoint.every_steps=2",
)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> pathlib.Path:
    """A folder with a finished run (`run`) and awkward data."""
    room = tmp_path_factory.mktemp("errors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXREASON_CACHE", str(room / "cache"))
        assert main([f"{TINY}:teacher", *SHORT, f"--config.run.dir={room}/run"]) == 0
    for name in ("empty", "no_text", "short"):
        (room / name).mkdir()
    (room / "no_text/a.txt").write_text("")
    for i in range(4):
        (room / f"short/{i}.txt").write_text(f"{i} bytes")
    (room / "file").write_text("a file")
    (room / "broken.py").write_text("def get_config(arg=''):\n    return 1 / 0\n")
    return room


@pytest.fixture(autouse=True)
def cache(room, monkeypatch):
    monkeypatch.setenv("JAXREASON_CACHE", str(room / "cache"))


def tree(folder: pathlib.Path) -> dict[str, str]:
    """Names and contents of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def fails(capsys, *argv: str) -> str:
    """Runs a command line that must fail as it should, and returns the line that says why."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "Traceback" not in out + err
    return err


# What is written on the command line, and what the line must say. {room} is the fixture's folder.
WRONG = {
    "wrong field": (["--config.train.stepz=3"], ["stepz", "did you mean"]),
    "wrong type": (["--config.train.steps=many"], ["train.steps", "many", "int"]),
    "wrong choice": (["--config.compute_dtype=int8"], ["int8", "bfloat16"]),
    "wrong method": (["--config.method=Lett"], ["Lett", "did you mean", "Let"]),
    "value out of range": (["--config.train.steps=0"], ["train.steps", "0"]),
    "missing data path": (["--config.data.path={room}/nowhere"], ["nowhere"]),
    "empty folder of data": (["--config.data.path={room}/empty"], ["empty"]),
    "empty corpus": (["--config.data.path={room}/no_text"], ["no"]),
    "sequence longer than the source": (
        ["--config.data.path={room}/short", "--config.data.seq_len=4096"],
        ["seq_len"],
    ),
    "mesh": (["--config.mesh.fsdp=3"], ["mesh", "3", "device"]),
    "batch on a mesh": (["--config.data.batch_size=6", "--config.train.accumulate=4"], ["6", "4"]),
    "model shape": (["--config.model.num_heads=5"], ["num_heads", "5"]),
    "small vocabulary": (["--config.model.vocab_size=100"], ["vocab_size", "100"]),
    "tokenizer that is not there": (
        ["--config.data.tokenizer=HfJson", "--config.data.tokenizer.path={room}/t.json"],
        ["t.json"],
    ),
    "LET without a teacher": (["--config.method=Let"], ["teacher.path"]),
    "LET beyond the layers": (
        [
            "--config.method=Let",
            "--config.method.student_layer=3",
            "--config.teacher.path={room}/run",
        ],
        ["student_layer", "3", "2"],
    ),
    "LET fraction": (
        [
            "--config.method=Let",
            "--config.method.stop_fraction=2",
            "--config.teacher.path={room}/run",
        ],
        ["stop_fraction", "2"],
    ),
    "negative weight": (
        ["--config.method=Let", "--config.method.lambda_0=-1", "--config.teacher.path={room}/run"],
        ["lambda_0", "-1"],
    ),
    "no temperature": (
        [
            "--config.method=Distill",
            "--config.method.temperature=0",
            "--config.teacher.path={room}/run",
        ],
        ["temperature", "0"],
    ),
    "teacher that is not there": (
        ["--config.method=Let", "--config.teacher.path={room}/nobody"],
        ["nobody", "does not exist"],
    ),
    "teacher without a checkpoint": (
        ["--config.method=Let", "--config.teacher.path={room}/empty"],
        ["no complete checkpoint"],
    ),
    "teacher at a step it has not": (
        ["--config.method=Let", "--config.teacher.path={room}/run", "--config.teacher.step=3"],
        ["step 3", "2, 4"],
    ),
    "two teachers": (
        ["--config.teacher.path={room}/run", "--config.teacher.factory=a:b"],
        ["keep one"],
    ),
    "factory that is not there": (
        ["--config.method=Let", "--config.teacher.factory=fixtures.nothing:teacher"],
        ["fixtures.nothing"],
    ),
    "factory of something else": (
        ["--config.method=Let", "--config.teacher.factory=os:getcwd"],
        ["FlaxTeacher", "str"],
    ),
    "folder is a file": (["--config.run.dir={room}/file"], ["file", "folder"]),
    "folder below a file": (["--config.run.dir={room}/file/run"], ["file", "folder"]),
    "folder that cannot be made": (["--config.run.dir=/proc/nobody/run"], ["/proc/nobody"]),
    "folder not named": (["--config.run.dir="], ["run.dir"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_the_config(name, room, capsys):
    given, said = WRONG[name]
    given = [arg.format(room=room) for arg in given]
    before = tree(room / "run")
    line = fails(capsys, TINY, f"--config.run.dir={room}/new", *SHORT, *given)
    for part in said:
        assert part in line
    assert not (room / "new").exists() and tree(room / "run") == before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config={room}/nothing.py"], "nothing.py"),
        (["--config={room}/broken.py"], "ZeroDivisionError"),
        (["--config={room}/file"], "FILE.py"),
        (["--config={room}/run"], "config.json"),
        (["--config.train.steps=3"], "--config=FILE.py"),
        (["--confg=x.py"], "did you mean"),
        (["demmo"], "did you mean 'demo'"),
        (["demo", "a", "b"], "demo"),
        (["compare", "{room}/run"], "two runs"),
        (["compare", "{room}/run", "{room}/nothing"], "config.json"),
        (["report"], "one run"),
        (["report", "{room}/nothing"], "config.json"),
        (["report", "{room}/run", "--agianst={room}/run"], "did you mean"),
        (["export", "{room}/run"], "--to="),
        (["export", "{room}/run", "--to=paper"], "paper"),
    ],
)
def test_a_mistake_on_the_command_line(argv, said, room, capsys):
    before = tree(room)
    assert said in fails(capsys, *(arg.format(room=room) for arg in argv))
    assert tree(room) == before


def test_no_arguments_at_all(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("usage: ") and "--config=" in err and not out


def test_teacher_with_another_vocabulary(room, capsys):
    """The teacher reads bytes, the student pieces of a sentencepiece model."""
    line = fails(
        capsys, f"{TINY}:let", f"--config.run.dir={room}/new", f"--config.teacher.path={room}/run",
        "--config.data.tokenizer=SentencePiece", "--config.data.tokenizer.train_vocab_size=320",
    )  # fmt: skip
    assert "the teacher's tokenizer" in line and not (room / "new").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--config.model.d_model=40", "model.d_model 24"),
        ("--config.model.d_model=40 --config.run.allow_changes=true", "another model"),
        ("--config.optim.learning_rate=0.5", "optim.learning_rate 0.01"),
        ("--config.train.steps=3", "train.steps"),
        ("--config.train.steps=1 --config.run.allow_changes=true", "train.steps is 1"),
        ("--config.data.seed=5", "plan_sha256"),
        ("--config.data.held_out_fraction=0.2", "corpus_sha256"),
        ("--config.optim.name=muon", "optim.name 'adamw'"),
        ("--config.optim.name=muon --config.run.allow_changes=true", "another model"),
    ],
)
def test_a_folder_with_another_run(change, said, room, capsys):
    before = tree(room / "run")
    line = fails(capsys, f"{TINY}:teacher", *SHORT, f"--config.run.dir={room}/run", *change.split())
    assert said in line and ("run folder" in line or "run.dir" in line or "config" in line)
    assert tree(room / "run") == before


def test_a_teacher_that_has_trained_on(room, capsys):
    """A run is resumed with the checkpoint it began with; the saved config still names it."""
    command = [f"{TINY}:let", f"--config.run.dir={room}/guided", *SHORT]
    old = [f"--config.teacher.path={room}/run", "--config.teacher.step=2"]
    assert main([*command, *old]) == 0
    line = fails(capsys, *command, old[0])
    assert "teacher_step is 2" in line and "config.json" in line
    assert main([f"--config={room}/guided/config.json"]) == 0


def test_a_factory_that_gives_no_layers(room, capsys):
    line = fails(
        capsys, f"{TINY}:linen", f"--config.run.dir={room}/linen", *SHORT,
        "--config.method.pairing=M2E",
    )  # fmt: skip
    assert "hidden state of layer 1" in line and "L2E" in line


def leftovers(folder: pathlib.Path) -> list[str]:
    """Temporary names, and folders of checkpoints that were not completed."""
    names = [str(path) for path in folder.rglob("*") if path.name.endswith(".tmp")]
    saves = [path for path in folder.glob("checkpoints/*") if path.is_dir()]
    return names + [str(path) for path in saves if not (path / "manifest.json").exists()]


def test_disk_full_in_a_checkpoint(room, capsys, monkeypatch):
    start = arrays.start_write

    def full(folder, leaves, key):
        if int(folder.parent.name) == 4:
            (folder.parent / "half").write_text("half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return start(folder, leaves, key)

    monkeypatch.setattr(arrays, "start_write", full)
    line = fails(capsys, TINY, *SHORT, f"--config.run.dir={room}/full")
    assert "disk is full" in line and "earlier checkpoints are untouched" in line
    assert [path.name for path in (room / "full/checkpoints").iterdir()] == ["00000002"]
    assert not leftovers(room / "full")


@pytest.mark.parametrize("what", ["metrics", "facts", "report"])
def test_disk_full_in_a_small_file(what, room, capsys, monkeypatch):
    reason = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args, **kw):
        raise reason

    write = os.write
    if what == "metrics":
        starts = lambda fd, data: refuse() if data[:8] == b'{"step":' else write(fd, data)  # noqa: E731
        monkeypatch.setattr(os, "write", starts)
    elif what == "facts":
        monkeypatch.setattr("jaxreason.recipes.facts.save", refuse)
    else:
        monkeypatch.setattr("jaxreason.recipes.execute.report_for_run", refuse)
    line = fails(capsys, TINY, *SHORT, f"--config.run.dir={room}/full_{what}")
    monkeypatch.undo()
    assert "disk is full" in line and not leftovers(room / f"full_{what}")


def test_training_that_is_not_finite_stops(room, capsys):
    line = fails(
        capsys, TINY, f"--config.run.dir={room}/nan", "--config.optim.learning_rate=1e30",
        "--config.optim.warmup_steps=0", "--config.train.max_bad_steps=3",
    )  # fmt: skip
    assert "3 steps in a row" in line and "learning rate" in line
    assert not leftovers(room / "nan")


def test_the_process_ends_with_the_code(room):
    """What a shell sees: the code, one line on stderr, nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxreason.main", TINY, "--config.train.steps=x"],
        cwd=REPO, env=environment(JAXREASON_CPU_FLAGS="0"), capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
