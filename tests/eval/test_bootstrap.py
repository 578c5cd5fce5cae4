"""Bootstrap intervals against a slow loop, known variances, and their own promises."""

import numpy as np
import pytest

from jaxreason.eval.bootstrap import (
    difference_interval,
    group_index,
    mean_interval,
    resampled_means,
    seed_interval,
    student_t,
)

# Groups of 1 to 4 examples, not side by side.
GROUPS = ["a", "b", "a", "c", "d", "a", "b", "e", "d", "a", "f", "f"]


def slow_means(scores: np.ndarray, groups: list, resamples: int, seed: int) -> np.ndarray:
    """Draws seeds and groups one by one."""
    rng, found, names = np.random.default_rng(seed), [], sorted(set(groups))
    for _ in range(resamples):
        rows = [rng.integers(len(scores)) for _ in range(len(scores))]
        drawn = [names[rng.integers(len(names))] for _ in names]
        columns = [e for name in drawn for e, group in enumerate(groups) if group == name]
        found.append(np.mean([[scores[s, e] for e in columns] for s in rows]))
    return np.array(found)


@pytest.mark.parametrize("groups", [GROUPS, list(range(12))])
def test_resampled_means_are_distributed_as_those_of_a_loop(groups):
    scores = np.random.default_rng(0).gamma(2.0, size=(3, 12)) + np.array([[0.0], [0.5], [1.5]])
    fast = resampled_means(scores, 20_000, 1, group_index(groups, 12))
    slow = slow_means(scores, groups, 4_000, 2)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.03)
    assert fast.std() == pytest.approx(slow.std(), rel=0.05)
    for q in (0.025, 0.5, 0.975):
        assert np.quantile(fast, q) == pytest.approx(np.quantile(slow, q), abs=0.12)


def test_one_seed_has_the_standard_error_of_the_mean():
    scores = np.random.default_rng(1).normal(5.0, 2.0, (1, 400))
    found = mean_interval(scores)
    half = 1.96 * scores.std() / 20
    assert found.mean == pytest.approx(scores.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_seeds_widen_the_interval():
    noise = np.random.default_rng(2).normal(0.0, 1.0, (3, 200))
    apart = noise + np.array([[-2.0], [0.0], [2.0]])
    narrow, wide = mean_interval(noise), mean_interval(apart)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_pairing_takes_out_what_arms_share():
    rng = np.random.default_rng(3)
    hard, own = rng.normal(0, 10, (1, 300)), rng.normal(0, 0.5, (2, 3, 300))
    a, b = 1.0 + hard + own[0], hard + own[1]
    paired = difference_interval(a, b)
    assert 0.9 < paired.low < paired.mean < paired.high < 1.1
    assert paired.mean == pytest.approx((a - b).mean())
    swapped = difference_interval(b, a)
    assert swapped.low == pytest.approx(-paired.high, abs=0.01)


def test_one_run_stands_against_every_seed():
    a, b = np.arange(12.0).reshape(3, 4), np.ones((1, 4))
    assert difference_interval(a, b) == mean_interval(a - 1)


def test_examples_of_a_group_are_drawn_together():
    alike = np.repeat(np.random.default_rng(5).normal(0, 1, 10), 20)[None]  # 10 groups of 20.
    groups = [f"package{i // 20}" for i in range(200)]
    grouped, single = mean_interval(alike, groups), mean_interval(alike)
    assert grouped.high - grouped.low > 4 * (single.high - single.low)
    # As if there were the ten groups' means alone.
    ten = mean_interval(alike[:, ::20])
    assert (grouped.low, grouped.high) == pytest.approx((ten.low, ten.high))


def test_without_a_group_an_example_stands_alone():
    scores = np.random.default_rng(6).normal(0, 1, (2, 8))
    assert mean_interval(scores, [None, ""] * 4) == mean_interval(scores)
    assert group_index(["", "x", None, "x"], 4).tolist() == [0, 1, 2, 1]


def test_pairing_goes_by_group_too():
    a, b = np.random.default_rng(7).normal(0, 1, (2, 3, 12))
    assert difference_interval(a, b, GROUPS) == mean_interval(a - b, GROUPS)
    assert difference_interval(a, b, GROUPS) != difference_interval(a, b)


def test_coverage_with_groups():
    """Drawn one by one, 600 examples in 12 unlike groups would cover in a third of the trials."""
    rng, inside = np.random.default_rng(8), 0
    groups = [i // 50 for i in range(600)]
    for trial in range(120):
        scores = np.repeat(rng.normal(0, 1, 12), 50)[None] + rng.normal(0, 1, (1, 600))
        found = mean_interval(scores, groups, resamples=400, seed=trial)
        inside += found.low <= 0 <= found.high
    assert inside / 120 > 0.86


@pytest.mark.parametrize(
    ("probability", "degrees", "want"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.95, 4, 2.13185), (0.975, 199, 1.97196)],
)
def test_student_t(probability, degrees, want):
    assert student_t(probability, degrees) == pytest.approx(want, rel=1e-5)


def test_interval_over_seeds():
    found = seed_interval([1.0, 2.0, 4.5])
    half = 4.30265 * np.std([1.0, 2.0, 4.5], ddof=1) / np.sqrt(3)
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-5)
    with pytest.raises(ValueError, match="1 seeds"):
        seed_interval([1.0])


def test_coverage():
    rng, inside = np.random.default_rng(4), 0
    for trial in range(200):
        found = mean_interval(rng.normal(0, 1, (1, 60)), resamples=400, seed=trial)
        inside += found.low <= 0 <= found.high
    assert 0.89 < inside / 200 < 0.99


@pytest.mark.parametrize("scores", [np.zeros((0, 3)), np.zeros(3), np.array([[np.nan]])])
def test_no_scores(scores):
    with pytest.raises(ValueError, match=r"score"):
        mean_interval(scores)


def test_other_examples():
    with pytest.raises(ValueError, match="same seeds and examples"):
        difference_interval(np.zeros((3, 4)), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="same seeds and examples"):
        difference_interval(np.zeros((3, 4)), np.zeros((2, 4)))


def test_one_group_and_wrong_groups():
    with pytest.raises(ValueError, match="one group"):
        mean_interval(np.zeros((2, 3)), ["io"] * 3)
    with pytest.raises(ValueError, match="2 groups for 3 examples"):
        mean_interval(np.zeros((2, 3)), ["io", "os"])
