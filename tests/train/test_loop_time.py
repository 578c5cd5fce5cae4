"""Each row says where its interval went: injected waits show under their own cause and no other."""

import threading
import time

import pytest
from fixtures.paced_run import Paced

from jaxreason.train.clock import Clock, process_age
from jaxreason.train.goodput import CAUSES, read_goodput
from jaxreason.train.log import read_metrics
from jaxreason.train.loop import TrainConfig

QUICK = TrainConfig(steps=20, log_every=5, eval_every=0)


def rows(folder) -> list[dict]:
    return [row for row in read_metrics(folder) if row["kind"] == "train"]


def seconds(folder) -> dict[str, float]:
    """Seconds by cause over all training rows."""
    return {c: sum(row.get(f"time_in_{c}_s", 0.0) for row in rows(folder)) for c in CAUSES}


def test_a_slow_device_is_compute_although_the_host_never_waits_for_it_alone(tmp_path):
    Paced(step=0.02).run(tmp_path, QUICK)
    spent = seconds(tmp_path)
    assert spent["compute"] >= 0.95 * 19 * 0.02  # The first step counts as compiling.
    assert spent["data"] < 0.2 * spent["compute"]
    assert spent["compile"] >= 0.02


def test_a_slow_data_source_is_data_wait_as_far_as_the_device_waited(tmp_path):
    # Of 50 ms a batch, the device still works through 10: 40 are waited for.
    Paced(step=0.01, data=0.05).run(tmp_path, QUICK)
    spent = seconds(tmp_path)
    assert 0.9 * 19 * 0.04 <= spent["data"]
    assert spent["compute"] < 0.6 * spent["data"]
    assert spent["compute"] >= 0.9 * 19 * 0.01
    assert spent["startup"] >= 0.05  # The first batch of a phase.


def test_a_data_source_faster_than_the_device_costs_nothing(tmp_path):
    Paced(step=0.1, data=0.02).run(tmp_path, TrainConfig(steps=10, log_every=5, eval_every=0))
    assert seconds(tmp_path)["data"] < 0.5 * 9 * 0.02  # Half of what the host waited.


@pytest.mark.parametrize(
    ("part", "cause", "times"),
    [("save", "checkpoint", 3), ("evaluate", "eval", 1), ("compile", "compile", 1),
     ("load", "load", 1)],
)  # fmt: skip
def test_other_waits_show_under_their_own_name(tmp_path, part, cause, times):
    paced = Paced(step=0.002, every=5)
    setattr(paced, part, 0.15)
    paced.run(tmp_path, QUICK)
    spent = seconds(tmp_path)  # Until the last row: saves of steps 5, 10, 15; one evaluation.
    assert spent[cause] >= times * 0.15
    assert max(s for name, s in spent.items() if name != cause) < 0.5 * spent[cause] + 0.06
    total = read_goodput(tmp_path)
    assert total is not None and total.seconds[cause] >= (times + (times != 1)) * 0.15


def test_the_parts_add_up_to_the_time_between_rows(tmp_path):
    began = time.perf_counter()
    Paced(step=0.004, data=0.006, save=0.02, evaluate=0.02, every=5).run(
        tmp_path, TrainConfig(steps=20, log_every=5, eval_every=10)
    )
    took = time.perf_counter() - began
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    for row, before in zip(found, [None, *found], strict=False):
        parts = [row.get(f"time_in_{cause}_s", 0.0) for cause in CAUSES]
        assert min(parts) >= 0
        assert row["time_interval_s"] == pytest.approx(sum(parts), abs=1e-5)
        if before is not None:  # `time_unix` is of another clock, and in milliseconds.
            wall = row["time_unix"] - before["time_unix"]
            assert row["time_interval_s"] == pytest.approx(wall, abs=0.1)
    total = read_goodput(tmp_path)
    # An evaluation and a save of 20 ms follow the last row; then the files are closed.
    assert total is not None
    assert sum(row["time_interval_s"] for row in found) + 0.04 <= total.wall_s <= took
    assert found[-1]["time_s"] <= sum(row["time_interval_s"] for row in found)


def test_the_pace_leaves_out_saves_and_evaluations(tmp_path):
    Paced(step=0.01, save=0.2, evaluate=0.2, every=5).run(
        tmp_path, TrainConfig(steps=15, log_every=5, eval_every=5)
    )
    for row in rows(tmp_path)[1:]:  # Each interval has a save and an evaluation: 80 ms a step.
        assert 0.01 <= row["time_step_s"] < 0.06
        assert row["time_tokens_per_s"] == pytest.approx(8 / row["time_step_s"])


def test_a_clock_charges_each_second_once_and_a_busy_device_first():
    now = [0.0]
    clock = Clock(age=5.0, now=lambda: now[0])
    wait = lambda s: now.__setitem__(0, now[0] + s)  # noqa: E731
    wait(1)
    with clock.charge("data"):
        wait(2)
        with clock.charge("checkpoint"):
            wait(4)
        wait(8)
    # A result that is never there: only `ended` says that the step is done.
    never = threading.Event()
    waits = type("Result", (), {"block_until_ready": lambda self: never.wait(30)})()
    clock.begun(1, waits)
    with clock.charge("data"):
        wait(16)
        clock.ended(1)
        wait(32)
    never.set()
    clock.close()
    assert clock.seconds() == dict.fromkeys(CAUSES, 0.0) | {
        "startup": 5.0 + 1, "data": 2 + 8 + 32, "checkpoint": 4, "compute": 16
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected one of"):
        clock.switch("lunch")


def test_a_process_knows_its_age():
    one = process_age()
    time.sleep(0.05)
    assert one > 0.1 and 0.03 < process_age() - one < 5
