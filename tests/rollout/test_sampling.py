"""The filters against a NumPy oracle with exact sets; frequencies; log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core.errors import UserError
from jaxreason.rollout import sampling as S

V = 97
LOGITS = (3 * np.random.default_rng(0).normal(size=(6, V))).astype(np.float32)
process, sample = jax.jit(S.process), jax.jit(S.sample)


def oracle(logits, cfg):
    """The kept set and its probabilities, float64, from the definitions, one token at a time."""
    if cfg.temperature == 0:
        return {int(np.argmax(logits))}, np.eye(len(logits))[np.argmax(logits)]
    scores = logits.astype(np.float64) / cfg.temperature
    p = np.exp(scores - scores.max())
    kept = set(range(len(p)))
    if cfg.top_k:
        kept = {i for i in kept if sum(p[j] > p[i] for j in kept) < cfg.top_k}
    total = sum(p[j] for j in kept)
    if cfg.top_p < 1:
        kept = {i for i in kept if sum(p[j] for j in kept if p[j] > p[i]) < cfg.top_p * total}
    kept = {i for i in kept if p[i] >= cfg.min_p * max(p)}
    q = np.where([i in kept for i in range(len(p))], p, 0.0)
    return kept, q / q.sum()


SETTINGS = [
    S.GREEDY,
    S.Sampling(),
    S.Sampling(temperature=0.6),
    S.Sampling(top_k=1),
    S.Sampling(top_k=7, temperature=1.7),
    S.Sampling(top_k=V + 5),
    S.Sampling(top_p=0.9),
    S.Sampling(top_p=0.05),
    S.Sampling(min_p=0.1),
    S.Sampling(min_p=1.0),
    S.Sampling(temperature=1.3, top_k=20, top_p=0.8, min_p=0.02),
]


@pytest.mark.parametrize("cfg", SETTINGS, ids=str)
def test_filters_keep_exactly_the_oracles_tokens(cfg):
    scores = np.asarray(process(LOGITS, S.stack_settings([cfg] * 6)))
    for row, logits in zip(scores, LOGITS):
        kept, q = oracle(logits, cfg)
        assert set(np.flatnonzero(row > S.FILTERED)) == kept
        np.testing.assert_allclose(jax.nn.softmax(row), q, atol=1e-6)


def test_rows_with_different_settings_share_a_program_and_do_not_mix():
    compiled = process._cache_size()
    for start in range(0, 6, 3):
        mixed = [*SETTINGS[start:], *SETTINGS[:start]][:6]
        scores = np.asarray(process(LOGITS, S.stack_settings(mixed)))
        for row, logits, cfg in zip(scores, LOGITS, mixed):
            assert set(np.flatnonzero(row > S.FILTERED)) == oracle(logits, cfg)[0], cfg
    assert process._cache_size() <= max(compiled, 1)


def test_ties_stay_together():
    logits = np.array([[2.0, 1.0, 1.0, 1.0, 0.0, -np.inf]], np.float32)
    for cfg, kept in (
        (S.Sampling(top_k=2), {0, 1, 2, 3}),
        (S.Sampling(top_p=0.5), {0, 1, 2, 3}),
        (S.Sampling(top_p=0.4), {0}),
        (S.Sampling(min_p=float(np.exp(-1.0)) - 1e-6), {0, 1, 2, 3}),
    ):
        scores = np.asarray(process(logits, S.stack_settings([cfg])))[0]
        assert set(np.flatnonzero(scores > S.FILTERED)) == kept, cfg


def test_a_wide_vocabulary_and_large_logits():
    logits = np.random.default_rng(1).normal(size=(2, 50_000)).astype(np.float32)
    logits[1] = 1e4 + logits[1]
    cfg = S.Sampling(top_k=50, temperature=0.7)
    scores = np.asarray(process(logits, S.stack_settings([cfg] * 2)))
    np.testing.assert_array_equal((scores > S.FILTERED).sum(axis=1), [50, 50])
    assert set(np.flatnonzero(scores[0] > S.FILTERED)) == set(np.argsort(logits[0])[-50:])


@pytest.mark.parametrize(
    "cfg", [S.Sampling(), S.Sampling(temperature=0.5, top_k=12, top_p=0.9, min_p=0.01)], ids=str
)
def test_frequencies(cfg):
    n = 20_000
    logits = np.broadcast_to(LOGITS[0] / 2, (n, V))
    keys = jax.random.split(jax.random.key(3), n)
    drawn = np.asarray(sample(logits, S.stack_settings([cfg] * n), keys).tokens)
    kept, q = oracle(LOGITS[0] / 2, cfg)
    counts = np.bincount(drawn, minlength=V)
    assert set(np.flatnonzero(counts)) <= kept
    cells = q * n >= 5  # Pearson's chi-square; rare tokens are one cell.
    seen = np.append(counts[cells], counts[~cells].sum())
    want = np.append(q[cells] * n, q[~cells].sum() * n)
    chi2 = np.sum((seen - want)[want > 0] ** 2 / want[want > 0])
    freedom = (want > 0).sum() - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom), (chi2, freedom)


def test_greedy_is_the_exact_argmax_and_the_first_of_equals():
    logits = LOGITS.copy()
    logits[0, [5, 50]] = 40.0
    keys = jax.random.split(jax.random.key(0), 6)
    mixed = [S.GREEDY, S.Sampling(top_k=3)] * 3
    for settings in ([S.GREEDY] * 6, mixed):
        got = sample(logits, S.stack_settings(settings), keys)
        rows = [i for i, cfg in enumerate(settings) if cfg is S.GREEDY]
        np.testing.assert_array_equal(np.asarray(got.tokens)[rows], np.argmax(logits, axis=1)[rows])
        np.testing.assert_array_equal(np.asarray(got.sampling_logprobs)[rows], 0.0)
    assert np.asarray(got.tokens)[0] == 5


def test_logprobs_of_the_model_and_of_the_sampling():
    cfg = S.Sampling(temperature=0.7, top_k=9)
    keys = jax.random.split(jax.random.key(1), 6)
    got = sample(LOGITS, S.stack_settings([cfg] * 6), keys)
    for i, token in enumerate(np.asarray(got.tokens)):
        _, model = oracle(LOGITS[i], S.Sampling())
        _, q = oracle(LOGITS[i], cfg)
        np.testing.assert_allclose(got.logprobs[i], np.log(model[token]), atol=1e-5)
        np.testing.assert_allclose(got.sampling_logprobs[i], np.log(q[token]), atol=1e-5)


def test_a_rows_draw_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(2), 6)
    settings = [S.Sampling(top_p=0.95)] * 6
    together = np.asarray(sample(LOGITS, S.stack_settings(settings), keys).tokens)
    order = np.array([4, 1, 5, 0, 2, 3])
    mixed = sample(LOGITS[order], S.stack_settings(settings), keys[order])
    np.testing.assert_array_equal(mixed.tokens, together[order])
    alone = sample(LOGITS[:1], S.stack_settings(settings[:1]), keys[:1])
    assert int(alone.tokens[0]) == together[0]


@pytest.mark.parametrize(
    "change", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2}]
)
def test_settings_out_of_range(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(S.Sampling(), **change).validate()


def test_bfloat16_logits_are_processed_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    assert process(logits, S.stack_settings([S.Sampling()] * 6)).dtype == jnp.float32
