"""Runs beside FiRST's table: cut to other numbers of updates, held against the right ones."""

import numpy as np
import pytest
from first_records import run

from benchmarks import first_arms, first_updates
from benchmarks.first_arms import Arm, Job
from benchmarks.first_updates import FIRST, RANDOM, cut, differences, jobs

TASK, RATE = "gsm_symbolic", (("optim.learning_rate", 4e-3),)


@pytest.fixture(autouse=True)
def lengths(monkeypatch):
    monkeypatch.setattr(first_updates, "given_length", lambda task, arm: (120, 40))
    monkeypatch.setattr(first_arms, "given_length", lambda task, arm: (120, 40))


def steps_of(job: Job) -> list[str]:
    return [flag for flag in job.command() if "train.steps" in flag]


def test_adapters_have_equally_many_updates():
    found = jobs(TASK, {FIRST: RATE, RANDOM: RATE}, longer=True)
    assert [(job.arm, job.seed) for job in found] == [
        (a, s) for a in (RANDOM, FIRST) for s in (1, 2, 3)
    ]
    assert all(steps_of(job) == ["--config.train.steps=80"] for job in found[:3])
    assert all(steps_of(job) == ["--config.train.steps=160"] for job in found[3:])
    assert len({job.name for job in found}) == 6
    assert jobs(TASK, {FIRST: RATE, RANDOM: RATE}, longer=False) == found[:3]


def test_sides_are_those_of_the_same_adapters():
    def record(arm: Arm, seed: int, quality: float, steps: int) -> dict:
        return run(Job(TASK, arm, seed, RATE), quality) | {"steps": steps, "loss": quality / 100}

    table = {
        f"{arm.label}{seed}": record(arm, seed, quality, 120)
        for arm, quality in ((FIRST, 40.0), (RANDOM, 50.0))
        for seed in (1, 2, 3)
    }
    here = {
        f"{job.name}": record(job.arm, job.seed, 30.0 if job.arm == RANDOM else 55.0, steps)
        for steps, arms in ((80, (RANDOM, RANDOM)), (160, (FIRST,)))
        for job in (cut(TASK, arm, seed, RATE, steps) for seed, arm in enumerate(arms, 1))
    }
    found = {(u, m): (seeds, e) for u, m, seeds, e in differences(TASK, table, here)}
    assert found["80 updates", "loss"][0] == "1, 2" and found["120 updates", "loss"][0] == "1"
    assert found["80 updates", "loss"][1]["mean"] == pytest.approx(0.10)
    assert found["120 updates", "loss"][1]["mean"] == pytest.approx(0.05)
    for updates, first, other in (("80 updates", table, here), ("120 updates", here, table)):
        seeds, entry = found[updates, "rouge_l"]
        chosen = [
            [
                np.mean(r["test"]["scores"]["rouge_l"])
                for r in side.values()
                if r["arm"]["method"] == method and str(r["seed"]) in seeds
            ]
            for side, method in ((first, "first"), (other, "random"))
        ]
        assert entry["mean"] == pytest.approx(np.mean(chosen[0]) - np.mean(chosen[1]))
