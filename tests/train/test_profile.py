"""Traces hold exactly the chosen updates, once, whole, and under names that xprof finds."""

import gzip
import json
import pathlib
import tempfile
import warnings

import jax
import jax.numpy as jnp
import pytest
from fixtures.paced_run import Paced

from jaxreason.core.errors import UserError
from jaxreason.train import profile
from jaxreason.train.goodput import read_goodput
from jaxreason.train.loop import TrainConfig

CFG = TrainConfig(steps=12, log_every=1, eval_every=0, profile_at=(3, 8), profile_steps=2)


@pytest.fixture(autouse=True)
def room(tmp_path, monkeypatch) -> pathlib.Path:
    """Where unfinished traces lie."""
    room = tmp_path / "room"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    return room


def traces(run: pathlib.Path) -> dict[str, list[str]]:
    """File endings by session, as xprof would list them."""
    found = {}
    for path in sorted(run.rglob("profile/plugins/profile/*/*")):
        found.setdefault(path.parent.name, []).append(path.name.partition(".")[2])
    return found


def events(run: pathlib.Path, session: str) -> list[tuple[str, int | None, int]]:
    """(name, step number, nanoseconds) of all events of one trace."""
    (file,) = (run / "profile/plugins/profile" / session).glob("*.xplane.pb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # A type of jaxlib names no module.
        return [
            (event.name, dict(event.stats).get("step_num"), int(event.duration_ns))
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
        ]


def work() -> Paced:
    """Updates of at least 5 ms that run a compiled function."""

    @jax.jit
    def traced_work(x):
        return jnp.sin(x @ x).sum()

    x = jnp.ones((64, 64))
    return Paced(step=0.005, at_step=lambda step: traced_work(x).block_until_ready())


def test_chosen_steps_and_no_others(tmp_path, room):
    paced = work()
    paced.run(tmp_path, CFG)
    names = ["steps_00000003_00000004", "steps_00000008_00000009"]
    assert traces(tmp_path) == dict.fromkeys(names, ["trace.json.gz", "xplane.pb"])
    for name, wanted in zip(names, ([3, 4], [8, 9]), strict=True):
        found = events(tmp_path, name)
        steps = [event for event in found if event[0] == "train"]
        assert [step for _, step, _ in steps] == wanted
        assert len([event for event in found if event[0] == "data"]) == 2
        assert any("traced_work" in event[0] for event in found)  # What JAX ran.
        # The devices were idle before, and the second step had ended: a whole step lies inside.
        assert steps[1][2] > 4e6
        assert f"trace in {tmp_path}/profile/plugins/profile/{name}" in "\n".join(paced.notes)
    assert not list(room.iterdir())
    total = read_goodput(tmp_path)
    assert total is not None and total.seconds["profile"] > 0


def test_perfetto_s_file_is_json_without_the_field_it_refuses(tmp_path):
    work().run(tmp_path, CFG)
    (file,) = (tmp_path / "profile/plugins/profile/steps_00000003_00000004").glob("*.json.gz")
    trace = json.loads(gzip.decompress(file.read_bytes()))
    assert "metadata" not in trace
    assert any(event.get("name") == "train" for event in trace["traceEvents"])


def test_a_resumed_run_takes_only_what_is_missing(tmp_path):
    work().run(tmp_path, CFG)
    sessions = sorted((tmp_path / "profile/plugins/profile").iterdir())
    before = {path: path.stat().st_mtime_ns for s in sessions for path in s.iterdir()}
    for path in list(before):
        if path.parent == sessions[1]:
            path.unlink()
            del before[path]
    paced = work()
    paced.run(tmp_path, CFG, start=2)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(traces(tmp_path)["steps_00000008_00000009"]) == 2
    assert sum("trace in" in note for note in paced.notes) == 1


def test_an_error_and_a_preemption_keep_what_was_traced(tmp_path, room):
    cfg = TrainConfig(steps=12, eval_every=0, profile_at=(5,), profile_steps=6)
    with pytest.raises(ValueError, match="no such batch"):
        Paced(fail_at=8).run(tmp_path / "a", cfg)
    assert list(traces(tmp_path / "a")) == ["steps_00000005_00000007"]
    found = [step for name, step, _ in events(tmp_path / "a", "steps_00000005_00000007")
             if name == "train"]  # fmt: skip
    assert found == [5, 6, 7, 8]  # The one that failed, too.
    Paced(stop_at=6).run(tmp_path / "b", cfg)
    assert list(traces(tmp_path / "b")) == ["steps_00000005_00000006"]
    assert not list(room.iterdir())
    Paced().run(tmp_path / "b", cfg)  # The profiler is free again.
    assert "steps_00000005_00000010" in traces(tmp_path / "b")


def test_every_host_has_its_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        traced = profile.Profiler(tmp_path, (1,), 1)
        assert traced.begins(1) and not traced.begins(2)
        traced.start(1)
        assert traced.ends(1)
        traced.stop(1)
        assert not traced.begins(1)
    files = {path.name.partition(".")[0][-2:] for path in tmp_path.rglob("*.xplane.pb")}
    assert files == {"-0", "-1"}


@pytest.mark.parametrize("at", [(0,), (12,), (3, 4), (-5,)])
def test_settings_that_cannot_be_are_refused(at):
    with pytest.raises(UserError, match=r"train.profile_at is .*; expected updates from 1 to 11"):
        TrainConfig(steps=12, profile_at=at, profile_steps=2).validate()
    TrainConfig(steps=12, profile_at=(11, 1), profile_steps=2).validate()
    with pytest.raises(UserError, match="train.profile_steps is 0"):
        TrainConfig(profile_steps=0).validate()
