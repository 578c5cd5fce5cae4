"""Speculative sampling draws from the full model's distribution: counted, and shown to be able to
fail."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from rollout_model import tiny_model

from jaxreason.models import decoder
from jaxreason.rollout import Sampling, SelfSpeculation, generate
from jaxreason.rollout import speculative_sampling as rule
from jaxreason.rollout.sampling import stack_settings

V = 6
WARM = Sampling(temperature=1.2, top_p=0.95)


def chi_square(counts, p) -> float:
    """Pearson's statistic over its mean plus five of its standard deviations: for the right
    distribution, 1 or more is less likely than 1e-4. Rare cells count as one."""
    counts, expected = np.ravel(counts), np.ravel(p) * np.sum(counts)
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    if counts[expected < 1e-9].any():  # What cannot be drawn was.
        return np.inf
    rare = np.searchsorted(np.cumsum(expected), 8) + 1
    counts = np.append(counts[:rare].sum(), counts[rare:])
    expected = np.append(expected[:rare].sum(), expected[rare:])
    freedom = len(counts) - 1
    assert freedom > 1
    return float(((counts - expected) ** 2 / expected).sum() / (freedom + 5 * (2 * freedom) ** 0.5))


def nucleus(logits, sampling):
    """The distribution of `sampling`, the slow way."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
    return p / p.sum()


def first_two(rows: int = 8000):
    """What `verify` takes after drafts from q: counts of the first token and of pairs, and p's."""
    rng = np.random.default_rng(2)
    logits, q_logits = rng.normal(size=(2, 3, V)) * 1.5
    p = np.stack([nucleus(x, WARM) for x in logits])
    q = np.stack([nucleus(x, WARM) for x in q_logits[:2]])
    assert np.abs(p[:2] - q).sum(axis=-1).min() > 0.3
    drafted = np.stack([rng.choice(V, rows, p=x) for x in q], axis=1).astype(np.int32)
    one = stack_settings([WARM])
    settings = jax.tree.map(lambda x: np.repeat(x, rows), one)
    # A part of the rows has one draft, and a part none.
    number = rng.integers(0, 3, rows).astype(np.int32)
    found = jax.jit(lambda *args: rule.verify(*args))(  # Compiled anew each time.
        jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, 3, V)), drafted, number,
        jnp.broadcast_to(jnp.asarray(q, jnp.float32), (rows, 2, V)), settings,
        jax.random.split(jax.random.key(1), rows), jnp.zeros(rows, jnp.int32),
    )  # fmt: skip
    assert (np.asarray(found.accepted) <= number).all()
    tokens, two = np.asarray(found.tokens), np.asarray(found.accepted) >= 1
    drawn = np.exp(found.sampling_logprobs[:, 0])
    np.testing.assert_allclose(drawn, p[0][tokens[:, 0]], atol=1e-5)
    firsts = [np.bincount(tokens[number == n, 0], minlength=V) for n in range(3)]
    pairs = np.zeros((V, V))
    np.add.at(pairs, (tokens[two, 0], tokens[two, 1]), 1)
    return firsts, pairs, p, q


def test_what_is_taken_has_the_full_models_distribution(monkeypatch):
    firsts, pairs, p, q = first_two()
    for counts in firsts:
        assert chi_square(counts, p[0]) < 1
    # Given that the first was accepted, it has the overlap's distribution; the second p's own.
    overlap = np.minimum(p[0], q[0])
    assert chi_square(pairs, np.outer(overlap / overlap.sum(), p[1])) < 1
    # The test can fail: with everything accepted, and with the wrong replacement.
    monkeypatch.setattr(rule, "_accepts", lambda u, p, q: u >= 0)
    firsts = first_two()[0]
    assert chi_square(firsts[0], p[0]) < 1 and chi_square(firsts[2], p[0]) > 5
    assert chi_square(firsts[2], q[0]) < 1
    monkeypatch.setattr(rule, "_accepts", lambda u, p, q: u * q < 0.5 * p)
    assert chi_square(first_two()[0][2], p[0]) > 5


NEW, END = 4, 2


@functools.cache
def small():
    model = tiny_model(vocab_size=V, num_layers=2)
    return dataclasses.replace(model, tokenizer=None, eos_ids=(END,))


@functools.cache
def by_enumeration(prompt: tuple[int, ...]) -> np.ndarray:
    """The probability [V+1,V+1,V+1,V+1] of every completion of up to four tokens, where V stands
    for each place behind an end."""
    completions = np.array(list(itertools.product(range(V), repeat=NEW)))
    rows = np.concatenate([np.tile(prompt, (len(completions), 1)), completions], axis=1)
    ones = np.ones(rows.shape, np.int32)
    batch = {"tokens": rows, "segment_ids": ones, "positions": np.cumsum(ones, 1) - 1}
    outputs = jax.jit(decoder.forward, static_argnums=1)(small().params, small().config, batch)
    logits = np.asarray(decoder.logits(outputs))[:, len(prompt) - 1 : -1]
    total = np.ones(len(rows))
    for i in range(NEW):
        at = {key: None for key in map(tuple, completions[:, :i])}
        for key in at:
            same = (completions[:, :i] == key).all(axis=1)
            dist = nucleus(logits[np.argmax(same), i].astype(np.float64), WARM)
            total[same] *= dist[completions[same, i]]
    ends = np.cumsum(completions == END, axis=1)
    behind = (ends > 0) & ~((ends == 1) & (completions == END))
    result = np.zeros((V + 1,) * NEW)
    np.add.at(result, tuple(np.where(behind, V, completions).T), total)
    return result


def statistic(speculation, prompt=(1, 4, 2), n=2000) -> tuple[float, float]:
    """The worst statistic over pairs of positions of sampled completions.

    And by how many standard deviations the share of those that end is off.
    """
    done = generate(
        small(), [list(prompt)], WARM, max_new_tokens=NEW, n=n, slots=400, speculation=speculation
    )
    rows = [[*c.tokens, *[V] * (NEW - len(c.tokens))] for c in done]
    tokens, p, worst = np.array(rows), by_enumeration(prompt), 0.0
    # Ends, also inside a draft: what follows one is no part of the completion.
    share = p[(np.indices(p.shape) == END).any(axis=0)].sum()
    assert 0.2 < share < 1
    ended = np.mean([c.finish_reason == "eos" for c in done])
    off = float(abs(ended - share) / np.sqrt(share * (1 - share) / len(done)))
    for i, j in itertools.combinations(range(NEW), 2):
        other = tuple(k for k in range(NEW) if k not in (i, j))
        pair, counts = p.sum(axis=other), np.zeros((V + 1, V + 1))
        np.add.at(counts, (tokens[:, i], tokens[:, j]), 1)
        worst = max(worst, chi_square(counts, pair))
    return worst, off


def test_completions_have_the_full_models_distribution(monkeypatch):
    worst, off = statistic(SelfSpeculation(exit_layer=1, tokens=3))
    assert worst < 1 and off < 4
    monkeypatch.setattr(rule, "_accepts", lambda u, p, q: u >= 0)
    # Compiled with the patch: no other test may have this number of tokens.
    worst, off = statistic(SelfSpeculation(exit_layer=1, tokens=1))
    assert worst > 5 and off > 10, "without the test of acceptance it is the draft's distribution"
