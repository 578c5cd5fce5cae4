"""Bootstrap intervals against a slow loop, known variances, and their own promises."""

import numpy as np
import pytest

from jaxreason.eval.bootstrap import difference_interval, mean_interval, resampled_means


def slow_means(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Draws seeds and examples one by one."""
    rng, found = np.random.default_rng(seed), []
    num_seeds, num_examples = scores.shape
    for _ in range(resamples):
        rows = [rng.integers(num_seeds) for _ in range(num_seeds)]
        columns = [rng.integers(num_examples) for _ in range(num_examples)]
        found.append(np.mean([[scores[s, e] for e in columns] for s in rows]))
    return np.array(found)


def test_resampled_means_are_distributed_as_those_of_a_loop():
    scores = np.random.default_rng(0).gamma(2.0, size=(3, 12)) + np.array([[0.0], [0.5], [1.5]])
    fast, slow = resampled_means(scores, 20_000, 1), slow_means(scores, 4_000, 2)
    assert fast.mean() == pytest.approx(scores.mean(), abs=0.02)
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
