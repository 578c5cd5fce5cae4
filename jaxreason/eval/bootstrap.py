"""Intervals of mean scores: bootstrap over seeds and groups of examples, Student's t over seeds.

Scores are arrays [S,E]: S seeds (runs), E examples, the same ones for every seed and arm; paired
differences of two arms are such an array too. A mean is one over all examples.

*Bootstrap* (Efron and Tibshirani 1993): a resample draws S seeds, and groups of examples, with
replacement, and takes the mean of what it drew. Examples of a group (the docstrings of one package)
are alike, so they are drawn together. Of G groups the percentiles are taken further out, as
Student's t with G - 1 degrees of freedom is wider than the normal distribution, and a sample's
spread smaller than the population's (Hesterberg 2015, arXiv 1411.5279, "expanded percentile").

*Student's t* over seeds: S runs' means are S numbers, and three numbers drawn again have no tails.
It takes the examples as given, as the bootstrap takes three seeds for all there are.

How often "95 %" held the true mean in 600 simulated tables of 200 examples in 15 groups, of the
sizes that the docstrings' test part has; spreads are standard deviations, the examples' own is 1:

    spread of groups, of seeds     examples drawn   groups drawn   groups, expanded   t over seeds
    0.3, one run                        73 %            91 %             94 %
    0.5, one run                        50 %            89 %             91 %
    0.3, three seeds of 0.05            72 %            95 %             97 %             78 %
    0.3, three seeds of 0.5             72 %            77 %             82 %             94 %

So neither is enough alone: a difference is taken for one where both intervals say so.
"""

import functools
import math
import statistics
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_BLOCK = 1000


class Interval(NamedTuple):
    """A mean with the bounds of its interval."""

    mean: float
    low: float
    high: float


def mean_interval(
    scores_se: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of scores [S,E] and its bootstrap interval.

    With one seed the interval is over examples alone. `groups` names each example's group [E];
    None, and examples whose group is None or "": each its own.

    Raises:
        ValueError: there is no score, one is not finite, or the examples are of one group.
    """
    scores, index = _checked(scores_se), group_index(groups, np.shape(scores_se)[-1])
    count = int(index.max()) + 1
    if count < 2:
        raise ValueError("all examples are of one group; expected two groups or more")
    means = resampled_means(scores, resamples, seed, index)
    wider = math.sqrt(count / (count - 1)) * student_t((1 + level) / 2, count - 1)
    tail = statistics.NormalDist().cdf(-wider)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(scores.mean()), float(low), float(high))


def difference_interval(
    scores_se: np.ndarray,
    others_se: np.ndarray,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `scores` minus that of `others`, and its bootstrap interval, paired.

    Both are [S,E] with the same seeds and examples in the same places: a resample draws the same
    of both. Where one has a single seed (an untrained model) it stands against every seed.

    Raises:
        ValueError: the shapes do not fit, or as `mean_interval`.
    """
    a, b = _checked(scores_se), _checked(others_se)
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(f"scores {a.shape} and {b.shape}; expected the same seeds and examples")
    return mean_interval(a - b, groups, level=level, resamples=resamples, seed=seed)


def seed_interval(values_s: Sequence[float], *, level: float = 0.95) -> Interval:
    """The mean of one number a seed (a paired difference, say) and its Student-t interval.

    Raises:
        ValueError: there are fewer than two numbers, or one is not finite.
    """
    values = np.asarray(values_s, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"{len(values)} seeds; expected two finite numbers or more")
    half = student_t((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return Interval(mean, mean - float(half), mean + float(half))


@functools.cache
def student_t(probability: float, degrees: int) -> float:
    """The quantile of Student's t, for a probability from 0.5 to 1 (to six digits).

    With t = sqrt(n) tan(a) its density is that of a, cos(a)^(n-1), on a finite interval.
    """
    angle = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    a = np.interp(2 * probability - 1, below / below[-1], angle)
    return float(np.sqrt(degrees) * np.tan(a))


def group_index(groups: Sequence[Hashable] | None, examples: int) -> np.ndarray:
    """Numbers [E] of the examples' groups, from 0; those without one are groups of their own.

    Raises:
        ValueError: there is not one name an example.
    """
    if groups is None:
        return np.arange(examples)
    if len(groups) != examples:
        raise ValueError(f"{len(groups)} groups for {examples} examples; expected one each")
    known: dict[object, int] = {}
    keys = [(i,) if name in (None, "") else name for i, name in enumerate(groups)]
    return np.array([known.setdefault(key, len(known)) for key in keys], int)


def resampled_means(
    scores_se: np.ndarray, resamples: int, seed: int, index_e: np.ndarray | None = None
) -> np.ndarray:
    """Means [resamples] of scores [S,E], seeds and groups drawn with replacement.

    A resample's mean is over its examples, whose number varies where groups differ in size.
    """
    num_seeds, num_examples = scores_se.shape
    index = np.arange(num_examples) if index_e is None else index_e
    sizes_g = np.bincount(index).astype(np.float64)
    sums_sg = np.zeros((num_seeds, len(sizes_g)))
    np.add.at(sums_sg.T, index, scores_se.T)
    rng, groups = np.random.default_rng(seed), len(sizes_g)
    means = []
    for start in range(0, resamples, _BLOCK):  # Counts of 10,000 resamples at once may not fit.
        n = min(_BLOCK, resamples - start)
        weights_s = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), n) / num_seeds
        counts_g = rng.multinomial(groups, np.full(groups, 1 / groups), n)
        totals = np.sum((weights_s @ sums_sg) * counts_g, axis=1)
        means.append(totals / (counts_g @ sizes_g))
    return np.concatenate(means)


def _checked(scores_se: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores_se, np.float64)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores of shape {scores.shape}; expected [seeds, examples]")
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; expected numbers")
    return scores
