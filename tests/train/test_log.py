"""The metrics file outlives kills and resumes; progress and the other viewers read it."""

import io
import json
import math
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from support import REPO

from jaxreason.core.errors import UserError
from jaxreason.train import log as log_lib
from jaxreason.train.log import MetricsLog, read_metrics, without_time
from jaxreason.train.progress import Progress, quantity
from jaxreason.train.readers import export


def fill(log, start, stop):
    """Writes what a run writes from update `start` to update `stop`."""
    log.write(0, "event", name="phase", phase="lm")
    for step in range(start + 1, stop + 1):
        log.write(step, "train", loss=5.0 / step, time_s=0.1 * step)
        if step % 4 == 0:
            log.write(step, "eval", loss=5.1 / step)


def raw(folder):
    return (folder / "metrics.jsonl").read_bytes()


def test_values_are_valid_json_and_come_back(tmp_path):
    values = {
        "loss": jnp.float32(1.5),
        "n": np.int64(3),
        "bad": math.nan,
        "up": np.float32(np.inf),
        "down": -math.inf,
        "flag": np.bool_(True),
        "text": "warm",
    }
    with MetricsLog(tmp_path) as log:
        log.write(7, "train", **values)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(raw(tmp_path), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert row.pop("time_unix") == pytest.approx(time.time(), abs=60)
    assert math.isnan(row.pop("bad"))
    assert row == {"step": 7, "kind": "train", "loss": 1.5, "n": 3, "up": math.inf} | {
        "down": -math.inf,
        "flag": True,
        "text": "warm",
    }


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("torn", ["", '{"step": 11, "ki', '{"step": 11, "kind": "train"}\0\0'])
def test_resumed_file_equals_straight_file(tmp_path, monkeypatch, bucket, torn):
    if bucket:
        monkeypatch.setattr(log_lib, "is_local", lambda path: False)
    with MetricsLog(tmp_path / "straight") as log:
        fill(log, 0, 20)
    with MetricsLog(tmp_path / "resumed") as log:
        fill(log, 0, 11)
    with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
        file.write(torn)
    with MetricsLog(tmp_path / "resumed") as log:
        log.truncate_after(8)
        assert (log.last_step("train"), log.last_step("eval")) == (8, 8)
        fill(log, 8, 20)
    straight, resumed = read_metrics(tmp_path / "straight"), read_metrics(tmp_path / "resumed")
    assert len(straight) == 26
    assert without_time(resumed) == without_time(straight)
    assert list(resumed[3]) == list(straight[3])
    assert [p.name for p in (tmp_path / "resumed").iterdir()] == ["metrics.jsonl"]


WRITE_FOREVER = """
import sys
from jaxreason.train.log import MetricsLog
log = MetricsLog(sys.argv[1], primary=True)
for step in range(10**9):
    log.write(step, "train", loss=1.0 / 3.0)
"""


def test_kill_leaves_only_whole_rows(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], cwd=REPO)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and (
            not (tmp_path / "metrics.jsonl").exists() or len(raw(tmp_path)) < 10_000
        ):
            time.sleep(0.01)
    finally:
        child.kill()
        child.wait()
    assert len(raw(tmp_path)) >= 10_000
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(len(steps)))
    MetricsLog(tmp_path, primary=True).truncate_after(49)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(50))


def test_torn_tail_is_cut_on_opening_and_a_torn_middle_is_an_error(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", loss=1.0)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "kin')
    assert len(read_metrics(tmp_path)) == 1
    with MetricsLog(tmp_path) as log:
        log.write(2, "train", loss=2.0)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0]
    lines = raw(tmp_path).splitlines()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([lines[0][:9], lines[1]]))
    with pytest.raises(UserError, match="line 1"):
        read_metrics(tmp_path)


def test_rows_of_an_older_run_are_refused(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(5, "train", loss=1.0)
        with pytest.raises(UserError, match="step 3 after one of step 5"):
            log.write(3, "train", loss=1.0)
        log.truncate_after(-1)
        log.write(3, "train", loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [3]


def test_bucket_is_written_at_flush_only(tmp_path, monkeypatch):
    monkeypatch.setattr(log_lib, "is_local", lambda path: False)
    log = MetricsLog(tmp_path, bucket_flush_s=1e9)
    log.write(1, "train", loss=1.0)
    assert read_metrics(tmp_path) == []
    log.flush()
    log.write(2, "train", loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log.truncate_after(2)  # Must not drop the row that is still in memory.
    log.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_other_processes_write_and_print_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", primary=False) as log:
        log.truncate_after(0)
        log.write(1, "train", loss=1.0)
    assert not (tmp_path / "run").exists()
    out = io.StringIO()
    with Progress(10, "run", primary=False, console=Console(file=out)) as progress:
        progress.update(10, loss=1.0)
        progress.note("done")
    assert out.getvalue() == ""


def test_plain_progress_has_fixed_width_lines():
    out = io.StringIO()
    with Progress(1000, "[run]", interval_s=0, console=Console(file=out)) as progress:
        for step, loss in ((1, 10.25), (500, 4.0), (1000, math.nan)):
            progress.update(step, loss=loss, time_tokens_per_s=12345.6, learning_rate=1e-3)
        progress.note("[bold]kept[/bold] as it is")
    head, *lines, note = out.getvalue().splitlines()
    assert head == "[run]: steps 0 to 1000"
    assert note == "[bold]kept[/bold] as it is"
    assert lines[0].startswith("step    1/1000   0%  left  -:--:--  loss 10.2500   12.3k tok/s  lr")
    assert lines[1].startswith("step  500/1000  50%  left  0:00:00  loss  4.0000   12.3k tok/s  lr")
    assert len({line.index("tok/s") for line in lines}) == 1


def test_plain_progress_keeps_its_interval():
    out = io.StringIO()
    with Progress(100, "run", interval_s=1e9, console=Console(file=out)) as progress:
        for step in range(1, 101):
            progress.update(step, loss=1.0)
    assert [line.split("/")[0] for line in out.getvalue().splitlines()[1:]] == [
        "step   1",
        "step 100",
    ]


def test_terminal_progress_draws_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=90)
    with Progress(100, "run", start=40, console=console) as progress:
        progress.update(50, loss=3.21)
        progress.note("checkpoint at 50")
    assert "50/100" in out.getvalue() and "loss  3.2100" in out.getvalue()
    assert "checkpoint at 50" in out.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.9, "1.00k"), (12345, "12.3k"), (999_960, "1.00M")]
    + [(1.344e8, "134M"), (3.1e21, "3.10e+21"), (0.0123, "0.0123"), (math.nan, "nan")],
)
def test_quantity(value, text):
    assert quantity(value) == text


def finished_run(folder):
    with MetricsLog(folder) as log:
        fill(log, 0, 8)
        log.write(9, "train", loss=math.nan)
    (folder / "config.json").write_text('{"seed": 3}')


def test_export_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    event_type = getattr(event_pb2, "Event")  # noqa: B009 (made at run time)
    finished_run(tmp_path)
    export(tmp_path, to="tensorboard")
    assert "tensorboard --logdir=" in export(tmp_path, to="tensorboard")  # Replaces the first.
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:  # TFRecord: length, its CRC, the event, its CRC.
        size = int.from_bytes(data[:8], "little")
        event = event_type.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    losses = {step: value for tag, step, value in found if tag == "train/loss"}
    assert losses[2] == pytest.approx(2.5) and math.isnan(losses[9]) and len(losses) == 9
    assert [step for tag, step, _ in found if tag == "eval/loss"] == [4, 8]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_export_to_a_tracker(tmp_path, monkeypatch, package):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **kw: calls.append(("init", kw)),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, package, fake)
    finished_run(tmp_path / "tiny")
    export(tmp_path / "tiny", to=package, project="p")
    assert calls[0] == ("init", {"project": "p", "name": "tiny", "config": {"seed": 3}})
    assert [call[0] for call in calls[1:-1]] == list(range(10)) and calls[-1] == "finish"
    assert calls[5][1]["train/loss"] == 1.25 and calls[5][1]["eval/loss"] == 5.1 / 4


def test_export_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="expected the folder of a run"):
        export(tmp_path, to="wandb")
    finished_run(tmp_path)
    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        export(tmp_path, to="tensorbord")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'jaxreason\[track\]'"):
        export(tmp_path, to="wandb")
