"""FiRST's table: which runs it starts and how, side by side, and what it keeps of them."""

import fcntl
import json
import os
import pathlib
import sys
import time

import pytest

from benchmarks import first_arms, first_score, first_table, first_workers
from benchmarks.first_arms import ARMS, COMPARED, TUNING, Arm, Job, given_hash
from benchmarks.first_workers import Work, core_shares, side_by_side
from jaxreason import config
from jaxreason.core.errors import UserError
from jaxreason.data.tasks import sha256
from jaxreason.recipes import recipes
from jaxreason.train.runs import RunData


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(first_table, "RECORDS", tmp_path / "results" / "runs.json")
    monkeypatch.setattr(first_arms, "ROOT", tmp_path / "runs")


def test_arms():
    assert len(ARMS) == len(set(ARMS)) == 28
    assert sum(len(arm.seeds) for arm in ARMS) == 3 * 2 * len(COMPARED) + 22
    labels = {arm.label for arm in ARMS}
    assert labels >= {
        "first-skip20",
        "evenly-skip40-plain",
        "none",
        "none-plain",
        "layerskip-skip20",
    }
    assert "layerskip-skip20-plain" not in labels


def test_commands(monkeypatch):
    monkeypatch.setattr(first_arms, "given_length", lambda task, arm: (100, 40))
    changes = (("optim.learning_rate", 5e-4), ("router_optim.learning_rate", 3e-3))
    job = Job("docstrings", Arm("first", 0.2), 2, changes)
    command = job.command()
    given = "experiments/first/smollm2.py:docstrings,first,skip=0.2,seed=2"
    assert command[:4] == [sys.executable, "-m", "jaxreason.main", f"--config={given}"]
    assert "--config.optim.learning_rate=0.0005" in command
    assert "--config.data.source.part=train" in command
    assert "--config.train.eval_every=0" in command and "--config.run.samples=0" in command
    assert not [flag for flag in command if "steps" in flag or "lora" in flag]
    tune = Job("docstrings", Arm("first", 0.2), 100, changes, True).command()
    assert "--config.train.steps=50" in tune and "--config.router_steps=20" in tune
    plain = Job("docstrings", Arm("first", 0.4, False), 1, changes).command()
    assert "--config.train.steps=40" in plain and "--config.lora=None" in plain
    peer = Job("docstrings", Arm("unified", 0.4, False), 1, ()).command()
    assert "--config.train.steps=1" in peer and "--config.lora=None" in peer


@pytest.mark.parametrize("method", [m for m in TUNING if m != "cost"])  # Not tuned.
def test_the_config_files_have_the_tuned_rates(method):
    kept = pathlib.Path(first_table.__file__).parents[1] / "docs" / "results" / "first_runs.json"
    rate = dict(first_arms.chosen("docstrings", method, json.loads(kept.read_text())))[
        "optim.learning_rate"
    ]
    files = [f"{first_arms.CONFIG}:docstrings,{method}"]
    if method == "layerskip":
        files.append("experiments/layerskip/smollm2.py:docstrings")
    known = {f"{cls.__module__}.{cls.__name__}": cls for cls in recipes()}
    for file in files:
        found = config.parse([f"--config={file}"], recipes=known).config
        assert found.optim.learning_rate == rate


def test_every_run_is_a_config():
    known = {cls.__name__: cls for cls in recipes()}
    for task in first_table.TASKS:
        for arm in (arm for arm in ARMS if arm.method in first_arms.offered()):
            settings = tuple(TUNING[arm.method][1].items())
            cfg = config.parse(Job(task, arm, 3, settings).config(), recipes=known).config
            assert (cfg.run.seed, cfg.data.source.part) == (3, "train")
            assert cfg.optim.learning_rate == first_arms.RATES[1]
            assert (cfg.lora is not None) == arm.lora
            tokens = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
            assert tokens >= first_table.LEAST_TOKENS or not arm.lora
            kept = cfg.method.decision.kept if arm.method == "first" else None
            kept = getattr(cfg.method, "kept", 30 if arm.method == "none" else kept)
            assert kept == round(30 * (1 - arm.skip))
            if arm.lora and task == "docstrings":
                tune = Job(task, arm, 3, settings, True).config()
                assert config.parse(tune, recipes=known).config.train.steps == cfg.train.steps // 2


def test_names_tell_settings_apart():
    def name(**rates):
        changes = tuple((f"{k}.learning_rate", v) for k, v in rates.items())
        return Job("docstrings", Arm("first", 0.2), 1, changes).name

    names = {name(optim=1e-3, router_optim=3e-3), name(optim=1e-3, router_optim=1e-2)}
    assert len(names | {name(optim=5e-4, router_optim=3e-3)}) == 3


def test_every_method_has_the_same_tuning():
    first, *others = TUNING.values()
    assert len(first) == 3 and all(runs == first for runs in others)
    for method, runs in TUNING.items():
        assert len({job.name for job in first_arms.tuning_jobs("docstrings", method)}) == len(runs)


def test_a_task_without_tuning_of_its_own_takes_the_settings_of_the_other(capsys):
    jobs = tune("docstrings", "random", 1.5, 1.2, 1.3)
    assert first_table.setting("gsm_symbolic", "random") == jobs[1].changes
    first_table.main(["--stage=tune", "--methods=random", "--list"])
    assert capsys.readouterr().out.count("tune-docstrings-random") == len(jobs)


def tune(task: str, method: str, *losses: float) -> list[Job]:
    jobs = first_arms.tuning_jobs(task, method)
    for job, loss in zip(jobs, losses):
        first_table.keep_record(job.name, loss=loss, given=given_hash(task, job.arm))
    return jobs


def test_the_best_setting_is_chosen_once_all_are_tuned():
    jobs = tune("docstrings", "unified", 1.5, 1.2)
    assert first_table.setting("docstrings", "unified") is None
    with pytest.raises(SystemExit, match="not tuned: unified on docstrings"):
        first_table.main_jobs(["docstrings"], ["unified"])
    given = given_hash("docstrings", jobs[2].arm)
    first_table.keep_record(jobs[2].name, loss=1.9, given=given)
    assert first_table.setting("docstrings", "unified") == jobs[1].changes
    main = first_table.main_jobs(["docstrings"], ["unified"])
    assert len(main) == 2 * 3 + 2 and {job.changes for job in main} == {jobs[1].changes}
    arms = [Arm("unified", skip) for skip in (0.2, 0.4)]
    timed = first_arms.timed(main, first_table.timeable)
    assert [(job.seed, job.arm) for job in timed] == [(1, arm) for arm in arms]
    # The first seed that is on this machine, or timed already.
    second = next(job for job in main if (job.seed, job.arm) == (2, arms[0]))
    third = next(job for job in main if (job.seed, job.arm) == (3, arms[1]))
    second.folder.mkdir(parents=True)
    (second.folder / "report.html").touch()
    first_table.keep_record(third.name, time={"asked": 8})
    assert first_arms.timed(main, first_table.timeable) == [second, third]


def test_a_method_that_the_config_lacks_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(first_table, "offered", lambda: ("none", "first"))
    assert first_table.methods_here(["none", "layerskip", "first"]) == ["none", "first"]
    assert "smollm2.py has no method layerskip; its arms are left out" in capsys.readouterr().out
    first_table.main(["--stage=tune", "--tasks=docstrings", "--methods=layerskip", "--list"])
    assert "layerskip" in capsys.readouterr().out


def work(folder: pathlib.Path, code: str, finish=lambda cores: None, waits=lambda: True) -> Work:
    return Work(folder.name, folder, [sys.executable, "-c", code], waits, finish)


WAIT = "import time, pathlib\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.01)\n"
TELL = "import os, pathlib\npathlib.Path({!r}).write_text(str(sorted(os.sched_getaffinity(0))))\n"


def test_two_run_at_once_on_cores_of_their_own(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    a, b = tmp_path / "a", tmp_path / "b"
    # Each ends only when the other has begun.
    works = [
        work(own, TELL.format(f"{own}.cores") + WAIT.format(f"{other}.cores"))
        for own, other in ((a, b), (b, a))
    ]
    done = []
    works = [Work(w.name, w.folder, w.command, w.waits, done.append) for w in works]
    before = os.sched_getaffinity(0)
    side_by_side(works, 2, time.time() + 60)
    assert os.sched_getaffinity(0) == before and done == [len(before) // 2] * 2
    cores = [set(json.loads(pathlib.Path(f"{f}.cores").read_text())) for f in (a, b)]
    assert cores[0] and cores[1] and not cores[0] & cores[1]


def test_core_shares(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 6})
    assert core_shares(1) == [[0, 1, 2, 5, 6]] and core_shares(2) == [[0, 1], [2, 5]]
    for jobs in (0, 6):
        with pytest.raises(SystemExit, match="expected 1 to 5"):
            core_shares(jobs)


def test_a_failure_is_named_when_the_others_have_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(first_workers, "core_shares", lambda jobs: [[0]] * jobs)
    done, slow, late = [], tmp_path / "slow", tmp_path / "late"
    bad = "import sys; print('the cause', file=sys.stderr); sys.exit(3)"
    works = [
        work(tmp_path / "bad", bad),
        work(slow, "import time; time.sleep(1)", lambda cores: done.append("slow")),
        work(late, "", lambda cores: done.append("late")),
    ]
    with pytest.raises(SystemExit) as error:
        side_by_side(works, 2, time.time() + 60)
    assert done == ["slow"]
    assert str(error.value).startswith("error: bad ended with exit code 3: the cause")
    assert (tmp_path / "bad.log").read_text() == "the cause\n"


def test_what_runs_elsewhere_or_is_done_or_late_is_not_started(tmp_path, capsys):
    ran = []
    other = work(tmp_path / "other", "", lambda cores: ran.append("other"))
    done = work(tmp_path / "done", "", lambda cores: ran.append("done"), lambda: False)
    with open(tmp_path / "other.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        side_by_side([other, done], 1, time.time() + 60)
    assert not ran and "other runs elsewhere, passed over" in capsys.readouterr().out
    side_by_side([other], 1, 0.0)
    assert not ran and "time is up before other" in capsys.readouterr().out
    side_by_side([other], 1, time.time() + 60)
    assert ran == ["other"]


def test_the_lock_lasts_as_long_as_the_command(tmp_path):
    stop, folder = tmp_path / "stop", tmp_path / "run"
    running = first_workers.start(work(folder, WAIT.format(str(stop))), core_shares(1)[0])
    assert running is not None
    with open(f"{folder}.lock", "w") as lock:
        with pytest.raises(BlockingIOError):  # The table holds nothing: it is the command's.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stop.touch()
        assert running.process.wait(60) == 0
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


RUN = """
import json, pathlib
folder = pathlib.Path({folder!r})
folder.mkdir(parents=True)
rows = [
    dict(kind="eval", step=0, loss=9.0), dict(kind="train", step=4, tokens={tokens}, flops=1e9,
    learned_tokens=11.0, time_s=2.0), dict(kind="eval", step=4, loss=1.5),
]
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
(folder / "config.json").write_text("{{}}")
(folder / "facts.json").write_text(json.dumps(dict(commit="abc", corpus_sha256="c")))
(folder / "report.html").touch()
"""


def test_what_training_leaves_is_put_on_record(monkeypatch, capsys):
    tokens = {1: 245760.0, 2: 1000.0}
    commands = {
        seed: [sys.executable, "-c", RUN.format(folder=str(job.folder), tokens=tokens[seed])]
        for seed in tokens
        for job in [Job("docstrings", Arm("random", 0.4), seed)]
    }
    monkeypatch.setattr(Job, "command", lambda job: commands[job.seed])
    jobs = [Job("docstrings", Arm("random", 0.4), seed) for seed in (1, 2)]
    first_table.train(jobs[:1], time.time() + 60, 1)
    known = first_table.records()[jobs[0].name]
    want = {"loss": 1.5, "steps": 4, "tokens": 245760.0, "learned_tokens": 11.0, "seed": 1}
    assert {key: known[key] for key in want} == want
    assert known["cores"] == len(os.sched_getaffinity(0)) and known["facts"]["commit"] == "abc"
    assert known["arm"] == {"method": "random", "skip": 0.4, "lora": True}
    for _ in range(2):  # Also where it is on record.
        with pytest.raises(SystemExit, match="saw 1000 tokens of 200,000"):
            first_table.train(jobs, time.time() + 60, 1)
    capsys.readouterr()
    first_table.train(jobs[:1], time.time() + 60, 1)
    assert not capsys.readouterr().out


def test_records_are_whole_when_processes_write_at_once(tmp_path):
    code = f"""
        import pathlib, sys, threading
        from benchmarks import first_table
        first_table.RECORDS = pathlib.Path({str(first_table.RECORDS)!r})
        for i in range(25):
            first_table.keep_record(f"run{{i % 5}}", **{{f"{{sys.argv[1]}}-{{i}}": i}})
    """
    works = [
        Work(who, tmp_path / who, [sys.executable, "-c", _dedent(code), who], lambda: True, print)
        for who in ("a", "b", "c")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_workers, "core_shares", lambda jobs: [[0]] * jobs)
        side_by_side(works, 3, time.time() + 60)
    found = first_table.records()
    assert sum(len(entries) for entries in found.values()) == 3 * 25


def _dedent(code: str) -> str:
    return "\n".join(line[8:] for line in code.strip("\n").split("\n"))


def measured(job: Job, what: str, examples: int, result: int) -> list[str]:
    """Runs `measure` with a command that writes `result`; returns the names that it started."""
    started = []
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"

    def fake(works, jobs, until):
        for one in works:
            out = one.command[-1]
            text = json.dumps({"asked": examples, "means": result})
            command = [sys.executable, "-c", code, out, text]
            one.folder.mkdir(parents=True, exist_ok=True)
            if one.waits():
                started.append(one.name)
            side_by_side([Work(one.name, one.folder, command, one.waits, one.finish)], 1, until)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_table, "side_by_side", fake)
        first_table.measure([job], what, examples, time.time() + 60, 1)
    return started


def test_what_is_on_record_is_not_measured_again():
    job = Job("docstrings", Arm("unified", 0.2), 1)
    assert measured(job, "test", 5, 1) == []  # Not trained.
    first_table.keep_record(job.name, loss=1.0, given="of another config file")
    with pytest.raises(UserError, match="another config file"):
        measured(job, "test", 5, 1)
    given = given_hash("docstrings", job.arm)
    first_table.keep_record(job.name, given=given)
    assert measured(job, "test", 5, 2) == [f"test-{job.name}"]
    assert measured(job, "test", 5, 3) == []
    want = {"loss": 1.0, "given": given, "test": {"asked": 5, "means": 2}}
    assert first_table.records()[job.name] == want
    # Other examples are another scoring; one whose file is there was only not put on record.
    assert measured(job, "test", 6, 4) == [f"test-{job.name}"]
    assert first_table.records()[job.name]["test"] == {"asked": 6, "means": 4}
    assert measured(job, "test", 5, 5) == []
    assert first_table.records()[job.name] == want


def test_other_examples_are_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(first_table, "train", lambda *args: pytest.fail("trained"))
    of = {"asked": first_table.EXAMPLES, "examples_sha256": "a" * 64}
    first_table.keep_record("r", task="docstrings", test=of, facts={"python": "3.12.1"})
    for stage in ("main", "tune", "evaluate"):
        with pytest.raises(UserError, match=r"docstrings: the 200 .* aaaaaaaa \(Python 3.12.1\)"):
            first_table.main([f"--stage={stage}", "--tasks=docstrings"])
    here = first_score.test_examples("docstrings", first_table.EXAMPLES)
    first_table.keep_record("s", task="docstrings", test=of | {"examples_sha256": sha256(here)})
    first_table.check_examples(["docstrings"])


def test_times_are_measured_alone(capsys):
    with pytest.raises(SystemExit):
        first_table.main(["--stage=time", "--jobs=2"])
    assert "times are measured one at a time" in capsys.readouterr().err


def run_data(**row) -> RunData:
    facts = {"plan_sha256": "p", "corpus_sha256": "c"}
    return RunData(name="r", rows=[{"kind": "train", "step": 9, **row}], facts=facts)


def test_learned_tokens(monkeypatch):
    job, counted = Job("docstrings", Arm("unified", 0.2), 1), []
    monkeypatch.setattr(
        first_score, "count_learned", lambda folder, steps: counted.append(steps) or 7.0
    )
    assert first_table.learned_tokens(job, run_data(learned_tokens=5.0)) == 5.0
    assert first_table.learned_tokens(job, run_data()) == 7.0 and counted == [9]
    # An untrained arm of the same rows learned nothing; a trained one learned the same.
    facts = {"plan_sha256": "p", "corpus_sha256": "c"}
    first_table.keep_record("plain", steps=9, facts=facts, learned_tokens=0.0)
    assert first_table.learned_tokens(job, run_data()) == 7.0 and counted == [9, 9]
    first_table.keep_record("other", steps=9, facts=facts, learned_tokens=8.0)
    assert first_table.learned_tokens(job, run_data()) == 8.0 and counted == [9, 9]


def test_test_examples_are_spread_and_the_same():
    pytest.importorskip("reasoning_gym", reason="pip install 'jaxreason[tasks]'")
    found = first_score.test_examples("gsm_symbolic", 7)
    assert found == first_score.test_examples("gsm_symbolic", 7) and len(found) == 7
    numbers = [int(e.name.split("/")[-1]) for e in found]
    assert numbers == sorted(numbers) and numbers[-1] > 2500
    assert all(e.name.startswith("gsm_symbolic/1/") for e in found)
