"""The study of choice by input finds a signal that was put there, and none where there is none."""

import numpy as np

from benchmarks.choice_by_input import choices, pool_of, reliability


def drawn(signal: float, n=240, k=12, t=24, features=60):
    """Losses of N texts under K sets: the text's own level, a set's cost, noise by token, and what
    a set costs this text, which is linear in its features."""
    rng = np.random.default_rng(0)
    seen = rng.normal(size=(n, features))
    own = signal * seen @ rng.normal(size=(features, k)) / features**0.5
    noise = 0.5 * rng.normal(size=(n, k, t)) + rng.normal(size=(n, 1, 1))
    loss = 3 + 0.1 * np.linspace(0, 1, k)[None, :, None] + own[:, :, None] + noise
    return loss, np.arange(t)[None] < rng.integers(8, t, n)[:, None], seen


def test_a_signal_in_the_prompt_is_found():
    loss, valid, seen = drawn(0.3)
    found = choices(loss, valid, seen)
    assert found["variance_explained_by_prompt"] > 0.2
    for way in ("its prompt", "own tokens"):
        assert (
            found[way]["interval"][0] > 0.1 and found[way]["loss"] < found["common"]["loss"] - 0.1
        )
    assert reliability(loss, valid)["correlation_of_halves"] > 0.5


def test_noise_gains_nothing_but_in_hindsight():
    loss, valid, seen = drawn(0.0)
    found = choices(loss, valid, seen)
    for way in ("its prompt", "own tokens"):
        assert found[way]["interval"][0] < 0.01 and found[way]["gain"] < 0.01
    assert found["hindsight"]["gain"] > 0.1
    assert found["variance_explained_by_prompt"] < 0.02
    assert abs(reliability(loss, valid)["correlation_of_halves"]) < 0.1


def test_the_pool_has_each_tasks_cheapest_and_keeps_the_ends():
    rng = np.random.default_rng(1)
    costs, other = rng.random(30), rng.random(30)
    costs[0] = costs[-1] = -1.0
    sets = pool_of(costs, [other])
    assert sets.shape == (32, 30) and (sets.sum(axis=1) == 24).all() and sets[:, [0, -1]].all()
    assert set(np.flatnonzero(~sets[0])) == set(1 + np.argsort(costs[1:-1])[:6])
    assert set(np.flatnonzero(~sets[1])) == set(1 + np.argsort(other[1:-1])[:6])
    assert set(np.flatnonzero(~sets[2:].all(axis=0))) <= set(1 + np.argsort(costs[1:-1])[:12])
    assert len({tuple(keep) for keep in sets.tolist()}) == 32
