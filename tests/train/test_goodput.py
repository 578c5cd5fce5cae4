"""Goodput of a whole run: the causes add up to the wall time, and cut steps count as lost."""

import json

import pytest
from fixtures.paced_run import Paced

from jaxreason.train import goodput
from jaxreason.train.clock import Clock
from jaxreason.train.compare import compare
from jaxreason.train.goodput import GoodputLog, read_goodput
from jaxreason.train.log import read_metrics
from jaxreason.train.loop import TrainConfig
from jaxreason.train.report import report_for_run


class Attempt:
    """One attempt on a simulated clock: its `now` is the Unix time too."""

    def __init__(self, folder, begins: float, step: int, startup: float = 0.0, **more):
        self.now = begins + startup
        self.clock = Clock(age=startup, now=lambda: self.now)
        self.clock.started_unix = begins
        self.log = GoodputLog(folder, self.clock, step, primary=True, **more)

    def spend(self, **seconds: float) -> "Attempt":
        for cause, s in seconds.items():
            with self.clock.charge(cause):
                self.now += s
        return self

    def lap(self, step: int) -> "Attempt":
        self.log.lap(step)
        return self


def read(folder) -> goodput.Goodput:
    found = read_goodput(folder)
    assert found is not None
    assert sum(found.share(cause) for cause in goodput.NAMES) == pytest.approx(1)
    return found


def test_one_attempt(tmp_path):
    assert read_goodput(tmp_path) is None
    one = Attempt(tmp_path, 1000, 0, startup=10).spend(compile=20, compute=60, data=5)
    one.lap(6).spend(checkpoint=5).log.end(6, "done")
    found = read(tmp_path)
    assert found.seconds == {
        "compute": 60, "data": 5, "checkpoint": 5, "compile": 20, "startup": 10
    }  # fmt: skip
    assert (found.wall_s, found.fraction, found.attempts, found.finished) == (100, 0.6, 1, True)
    assert found.line() == (
        "goodput 60.0% of 0:01:40 in 1 attempt: compile 20.0%, startup 10.0%, data 5.0%, "
        "checkpoint 5.0%"
    )


def test_work_before_an_older_checkpoint_is_lost_and_the_gap_is_down(tmp_path):
    # Killed at step 9: no end, and 3 of its steps come after the save of step 6.
    Attempt(tmp_path, 0, 0, startup=1).spend(compute=60, checkpoint=2).lap(6).spend(
        compute=30, data=1
    ).lap(9)
    # From 94 on nothing is known; the next process starts at 100 and goes on after step 6.
    two = Attempt(tmp_path, 100, 6, startup=4).spend(compute=60, checkpoint=2).lap(12)
    two.log.end(12, "preempted")
    found = read(tmp_path)
    assert found.seconds == {
        "compute": 120, "data": 1, "checkpoint": 4, "startup": 5, "lost": 30, "down": 6
    }  # fmt: skip
    assert found.wall_s == 166 == two.now and not found.finished
    # The checkpoint of step 12 turns out to be damaged: back to 6, and all of the second is lost.
    Attempt(tmp_path, 170, 6).spend(compute=60).log.end(12, "done")
    found = read(tmp_path)
    assert found.seconds["lost"] == 90 and found.seconds["compute"] == 120
    assert found.seconds["down"] == 10 and found.attempts == 3 and found.finished


def test_a_run_that_begins_anew_has_lost_everything(tmp_path):
    Attempt(tmp_path, 0, 0).spend(compute=50).lap(5)
    Attempt(tmp_path, 50, 0).spend(compute=50).lap(5)
    assert read(tmp_path).seconds == {"compute": 50, "lost": 50}


def test_between_two_laps_work_is_spread_evenly(tmp_path):
    Attempt(tmp_path, 0, 10).spend(compute=10).lap(20).spend(compute=40).lap(40)
    Attempt(tmp_path, 50, 25).spend(compute=1).lap(26)
    assert read(tmp_path).seconds == {"compute": 10 + 10 + 1, "lost": 30}


def test_the_time_after_a_run_is_done_is_not_its_own(tmp_path):
    Attempt(tmp_path, 0, 0).spend(compute=10).log.end(10, "done")
    Attempt(tmp_path, 1e6, 10).spend(compute=10).log.end(20, "ValueError")
    found = read(tmp_path)
    assert found.seconds == {"compute": 20} and not found.finished


def test_a_torn_line_and_rubbish_cost_no_more_than_themselves(tmp_path):
    file = tmp_path / goodput.FILE_NAME
    Attempt(tmp_path, 0, 0).spend(compute=10).lap(1).spend(compute=10).lap(2)
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        Attempt(tmp_path, 100, 2).spend(compute=5).lap(3)
        # While the first start is whole, only its laps can be missing.
        attempts = 1 + (cut >= whole.index(b"\n"))
        found = read(tmp_path)
        assert found.attempts == attempts
        assert found.seconds["compute"] in ({5, 15, 25} if attempts == 2 else {5})
    file.write_bytes(b'\xff\xfe\n[]\n{"kind": "lap", "step": 1}\nnull\n' + whole)
    assert read(tmp_path).seconds == {"compute": 20}
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / goodput.FILE_NAME).write_bytes(b"\xff\n")
    assert read_goodput(tmp_path / "empty") is None


def test_a_bucket_s_file_is_replaced_whole_and_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "is_local", lambda path: False)
    Attempt(tmp_path, 0, 0).spend(compute=10).lap(1)
    Attempt(tmp_path, 20, 1).spend(compute=10).lap(2)
    assert read(tmp_path).seconds == {"compute": 20, "down": 10}
    assert [path.name for path in tmp_path.iterdir()] == [goodput.FILE_NAME]


def test_laps_are_due_by_the_second_and_later_by_the_age(tmp_path):
    assert not Attempt(tmp_path, 0, 0).log.due()
    young = Clock(age=-60.0)  # Of no age yet, however long a busy machine takes over these lines.
    assert GoodputLog(tmp_path, young, 0, primary=True, every_s=0.0).due()
    young.started_unix -= 1e6  # So laps are 10,000 s apart.
    assert not GoodputLog(tmp_path, young, 0, primary=True, every_s=0.0).due()


def test_a_folder_that_refuses_the_file_stops_no_training(tmp_path):
    (tmp_path / goodput.FILE_NAME).mkdir()
    paced = Paced()
    assert paced.run(tmp_path, TrainConfig(steps=5)) == 5
    assert any("goodput is not recorded" in note for note in paced.notes)


def test_other_processes_write_nothing(tmp_path):
    clock = Clock(age=0.0)
    log = GoodputLog(tmp_path, clock, 0, primary=False)
    log.lap(1)
    log.end(1, "done")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_stopped_and_goes_on(tmp_path):
    """The loop's own records: lost work is what the second attempt did again."""
    cfg = TrainConfig(steps=20, log_every=1, eval_every=0)
    with pytest.raises(ValueError, match="no such batch"):
        Paced(step=0.02, fail_at=18).run(tmp_path, cfg)  # Saved after step 10.
    assert Paced(step=0.02, stop_at=15).run(tmp_path, cfg, start=10) == 15
    paced = Paced(step=0.02)
    assert paced.run(tmp_path, cfg, start=15) == 20
    lines = [json.loads(line) for line in (tmp_path / goodput.FILE_NAME).read_text().splitlines()]
    assert [line["why"] for line in lines if line["kind"] == "end"] == [
        "ValueError", "preempted", "done"
    ]  # fmt: skip
    assert [line["step"] for line in lines if line["kind"] == "start"] == [0, 10, 15]
    found = read(tmp_path)
    # Rows of steps 11 to 17 were cut from metrics.jsonl; the accounts of them were not.
    assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"] == [*range(1, 21)]
    # The device was still at step 17 when its successor's data failed: 6 to 7 steps.
    assert 5.5 * 0.02 <= found.seconds["lost"] < 0.6 * found.seconds["compute"]
    assert found.attempts == 3 and found.finished
    assert paced.notes[-1] == found.line()
    # The finished run started again trains nothing and leaves its accounts alone.
    before = (tmp_path / goodput.FILE_NAME).read_text()
    Paced().run(tmp_path, cfg, start=20)
    assert (tmp_path / goodput.FILE_NAME).read_text() == before


def test_report_and_comparison_show_it(tmp_path):
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        Paced(step=0.001, evaluate=0.01).run(folder, TrainConfig(steps=5, eval_every=5))
        (folder / "config.json").write_text("{}")
        (folder / "facts.json").write_text(json.dumps({"corpus_sha256": "c"}))
    (tmp_path / "b" / goodput.FILE_NAME).unlink()
    text = compare(tmp_path / "a", tmp_path / "b")
    table = next(part for part in text.split("\n\n") if "goodput" in part).splitlines()
    share = f"{read(tmp_path / 'a').fraction:.1%}"
    assert [line.split()[-1] for line in table[-2:]] == [share, "n/a"]
    assert max(map(len, text.splitlines())) <= 100

    page = report_for_run(tmp_path / "a", against=tmp_path / "b").read_text()
    section = page[page.index("<h2>Time</h2>") :]
    section = section[: section.index("<h2>", 5)]
    assert section.count('class="share"') == 1 and "1 attempt" in section
    widths = [float(part.split("%")[0]) for part in section.split("width:")[1:]]
    assert sum(widths) == pytest.approx(100, abs=0.01) and len(widths) >= 3
    assert "evaluation, with its compiling" in section and share in section
    assert "Goodput" in page[: page.index("<h2>")]
    assert "<h2>Time</h2>" not in report_for_run(tmp_path / "b").read_text()
