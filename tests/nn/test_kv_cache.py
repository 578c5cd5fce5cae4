"""The cache contract against recomputation: append, gather, truncate, branches, gradients."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.nn import kv_cache

TINY = decoder.ModelConfig(
    vocab_size=64, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=48, init_std=0.2
)
PARAMS = P.initialise(decoder.specs(TINY), jax.random.key(0))
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 64, (3, 9))


@jax.jit
def full_logits(params, tokens):
    ones = jnp.ones(tokens.shape, jnp.int32)
    batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.cumsum(ones, 1) - 1}
    return decoder.logits(decoder.forward(params, TINY, batch))


def feed(params, cache, tokens, counts=None, cfg=TINY):
    """Appends tokens [B,T] (the first `counts` of a row) and returns (logits, cache)."""
    b, t = tokens.shape
    counts = jnp.full(b, t) if counts is None else jnp.asarray(counts)
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "positions": cache.lengths[:, None] + jnp.arange(t)[None],
        "segment_ids": (jnp.arange(t)[None] < counts[:, None]).astype(jnp.int32),
    }
    out = decoder.forward(params, cfg, batch, cache=cache)
    return decoder.logits(out), out.cache


step = jax.jit(feed)


def windowed(window):
    return dataclasses.replace(TINY, window=window)


def prefilled(capacity=12):
    return step(PARAMS, decoder.init_cache(TINY, 3, capacity, jnp.float32), TOKENS)[1]


def expected(tokens):
    """Logits of the whole sequence; one program: what stands behind changes nothing before it."""
    return full_logits(PARAMS, np.resize(tokens, 16)[None])[0, : len(tokens)]


def test_ragged_appends_equal_recomputation():
    cache = decoder.init_cache(TINY, 3, 9, jnp.float32)
    done, counts = np.zeros(3, int), [(4, 2, 1), (1, 3, 0), (2, 4, 4)]
    for more in counts:
        pieces = [TOKENS[r, d : d + n] for r, (d, n) in enumerate(zip(done, more))]
        padded = np.stack([np.pad(p, (0, 4 - len(p)), constant_values=63) for p in pieces])
        got, cache = step(PARAMS, cache, padded, np.array(more))
        done = done + more
        np.testing.assert_array_equal(cache.lengths, done)
        for r in range(3):
            want = expected(TOKENS[r, : done[r]])[done[r] - more[r] :]
            np.testing.assert_allclose(got[r, : more[r]], want, atol=2e-5)


def test_gather_truncate_and_grow_equal_recomputation():
    rows, lengths = np.array([2, 0, 2, 1]), np.array([5, 9, 1, 7])
    cache = prefilled().gather(jnp.asarray(rows)).truncate(jnp.asarray(lengths)).grow(20)
    assert cache.capacity == 20
    new = RNG.integers(0, 64, (4, 3))
    got, cache = step(PARAMS, cache, new)
    np.testing.assert_array_equal(cache.lengths, lengths + 3)
    for i in range(4):
        want = expected(np.concatenate([TOKENS[rows[i], : lengths[i]], new[i]]))[-3:]
        np.testing.assert_allclose(got[i], want, atol=2e-5)


PARENT, CUT = np.array([2, 0, 2, 2, 1]), np.array([9, 4, 3, 0, 6])


def branches(cache, capacity=6, fan_out=None):
    return kv_cache.branch(cache, PARENT, CUT, capacity, fan_out)


@pytest.mark.parametrize("window", [None, 3])
def test_branches_equal_recomputation(window):
    cfg = windowed(window)
    run = jax.jit(lambda p, c, t, n: feed(p, c, t, n, cfg))
    whole = np.full(3, 9)
    _, cache = run(PARAMS, decoder.init_cache(cfg, 3, 12, jnp.float32), TOKENS, whole)
    cache = branches(cache)
    assert cache.fan_out == 3
    new, seen = RNG.integers(0, 64, (5, 5)), np.zeros(5, int)
    for counts in ((2, 1, 2, 2, 0), (1, 2, 0, 2, 2), (2, 2, 2, 1, 2)):
        counts = np.array(counts)
        piece = np.stack([np.resize(new[i, seen[i] : seen[i] + counts[i]], 2) for i in range(5)])
        got, cache = run(PARAMS, cache, piece, counts)
        seen += counts
        np.testing.assert_array_equal(cache.lengths, CUT + seen)
        for i in range(5):
            tokens = np.concatenate([TOKENS[PARENT[i], : CUT[i]], new[i, : seen[i]]])
            alone = decoder.init_cache(cfg, 1, 16, jnp.float32)
            want, _ = run(PARAMS, alone, np.resize(tokens, 16)[None], np.array([len(tokens)]))
            want = want[0, len(tokens) - counts[i] : len(tokens)]
            np.testing.assert_allclose(got[i, : counts[i]], want, atol=2e-5)


def test_branches_are_gathered_truncated_and_copied():
    new, last = RNG.integers(0, 64, (5, 4)), RNG.integers(0, 64, (4, 1))
    _, cache = step(PARAMS, branches(prefilled()), new)
    rows, lengths = np.array([4, 2, 0, 2]), np.array([8, 1, 12, 6])
    cut = cache.gather(jnp.asarray(rows)).truncate(jnp.asarray(lengths))
    np.testing.assert_array_equal(cut.lengths, lengths)
    for resumed in (cut, cut.copied(16)):
        kv_cache.require_complete(resumed)
        got, after = step(PARAMS, resumed, last)
        np.testing.assert_array_equal(after.lengths, lengths + 1)
        for i, (row, length) in enumerate(zip(rows, lengths)):
            tokens = np.concatenate([TOKENS[PARENT[row], : CUT[row]], new[row]])[:length]
            want = expected(np.concatenate([tokens, last[i]]))[-1]
            np.testing.assert_allclose(got[i, 0], want, atol=2e-5)


def test_the_prefix_of_branches_is_not_copied():
    # Two parents of 4,096 tokens with 64 branches: copied keys and values would be 256 MiB.
    cfg = dataclasses.replace(TINY, num_layers=1, num_kv_heads=4, head_dim=32)
    params = P.abstract(decoder.specs(cfg))

    def run(params, cache, tokens):
        return feed(params, kv_cache.branch(
            cache, jnp.repeat(jnp.arange(2), 32), jnp.full(64, 4096), 4, fan_out=32
        ), tokens, cfg=cfg)[0]  # fmt: skip

    cache = jax.eval_shape(lambda: decoder.init_cache(cfg, 2, 4096, jnp.float32))
    shapes = (params, cache, jax.ShapeDtypeStruct((64, 1), jnp.int32))
    memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 2**20


def test_gradients_through_append_and_branch_equal_the_full_forward():
    new = RNG.integers(0, 64, (5, 3))
    weights = RNG.normal(size=(5, 3, 64)).astype(np.float32)

    def with_branches(params):
        _, cache = feed(params, decoder.init_cache(TINY, 3, 12, jnp.float32), TOKENS)
        cache = branches(cache, capacity=4)
        first, cache = feed(params, cache, new[:, :2])
        second, _ = feed(params, cache.gather(jnp.arange(5), 3), new[:, 2:])
        return jnp.sum(jnp.concatenate([first, second], axis=1) * weights)

    def recomputed(params):
        total = 0.0
        for i in range(5):
            tokens = np.concatenate([TOKENS[PARENT[i], : CUT[i]], new[i]])
            logits = full_logits(params, np.resize(tokens, 16)[None])[0, : len(tokens)]
            total += jnp.sum(logits[-3:] * weights[i])
        return total

    value, grads = jax.jit(jax.value_and_grad(with_branches))(PARAMS)
    want_value, want = jax.value_and_grad(recomputed)(PARAMS)
    np.testing.assert_allclose(value, want_value, rtol=1e-4)
    chex.assert_tree_all_finite(grads)
    chex.assert_trees_all_close(grads, want, rtol=1e-3, atol=2e-4)


def test_missing_entries_are_found_and_recomputed():
    cache = prefilled()
    kv_cache.require_complete(cache)
    # The second layer is skipped for two tokens; its entries are garbage from there on.
    skipped = jnp.array([True, False, True])
    cache = cache.truncate(jnp.array([5, 6, 7])).advance(jnp.array([2, 2, 0]), skipped)
    np.testing.assert_array_equal(cache.valid, [[7, 8, 7], [5, 6, 7], [7, 8, 7]])
    later = cache.advance(jnp.array([1, 0, 1]))  # All layers run again; the hole stays a hole.
    np.testing.assert_array_equal(later.valid, [[8, 8, 8], [5, 6, 8], [8, 8, 8]])
    row_0 = np.zeros(2, int)
    for broken in (cache, later, kv_cache.branch(later, row_0, np.array([6, 5]), 4)):
        with pytest.raises(UserError, match="^row 0 .* truncate"):
            kv_cache.require_complete(broken)
        kv_cache.require_complete(broken.truncate(kv_cache.complete_lengths(broken)))
    kv_cache.require_complete(kv_cache.branch(later, row_0, np.array([4, 5]), 4))
    cut = cache.truncate(kv_cache.complete_lengths(cache))
    np.testing.assert_array_equal(cut.lengths, [5, 6, 7])
    got, _ = step(PARAMS, cut, TOKENS[:, 5:7])
    want = expected(TOKENS[0, :7])[5:]
    np.testing.assert_allclose(got[0], want, atol=2e-5)


def test_rows_that_skip_other_layers_are_complete_where_they_run():
    cache = prefilled().truncate(jnp.array([5, 6, 7]))
    kept = jnp.array([[True, True, False], [False, True, False], [True, False, True]])  # [L,B]
    cache = cache.advance(jnp.array([2, 1, 2]), kept)
    np.testing.assert_array_equal(cache.valid, [[7, 7, 7], [5, 7, 7], [7, 6, 9]])
    kv_cache.require_complete(cache, kept)
    np.testing.assert_array_equal(kv_cache.complete_lengths(cache), [5, 6, 7])
    more = kept.at[0, 2].set(True)
    np.testing.assert_array_equal(kv_cache.complete_lengths(cache, more), [7, 7, 7])
    with pytest.raises(UserError, match="^row 2 .* has 9 tokens, but some layer stored only 7"):
        kv_cache.require_complete(cache, more)
    # Branches of rows 2 and 0, whose own tokens the same layers store, or others.
    parent = np.array([2, 0])
    branched = kv_cache.branch(cache, parent, np.array([9, 7]), 4)
    own = kept[:, parent]
    kv_cache.require_complete(branched.advance(jnp.array([1, 1]), own), own)
    with pytest.raises(UserError, match="^row 0 "):
        kv_cache.require_complete(branched.advance(jnp.array([1, 1]), own), ~own)
    with pytest.raises(UserError, match="^row 1 .* has 8 tokens, but some layer stored only 7"):
        kv_cache.require_complete(branched.advance(jnp.array([1, 1]), own.at[2, 1].set(False)), own)


def test_traced_parents_need_a_fan_out():
    with pytest.raises(ValueError, match="fan_out"):
        jax.jit(lambda c, p: kv_cache.branch(c, p, p, 2))(prefilled(), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("kernels", ["xla", "cpu"])
def test_an_empty_cache_takes_a_ragged_prompt_at_once(kernels):
    cfg = decoder.ModelConfig(
        vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=48, window=5,
        kernels=kernels,
    )  # fmt: skip
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    lengths = np.array([7, 3], np.int32)
    batch = {
        "tokens": jax.random.randint(jax.random.key(1), (2, 7), 0, 64),
        "positions": jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (2, 7)),
        "segment_ids": (jnp.arange(7)[None] < lengths[:, None]).astype(jnp.int32),
    }
    outputs = [
        decoder.forward(
            params, cfg, batch, cache=decoder.init_cache(cfg, 2, 9, jnp.float32), cache_is_empty=e
        )
        for e in (True, False)
    ]
    for row, n in enumerate(lengths):
        a, b = (o.final[row, :n] for o in outputs)
        np.testing.assert_allclose(a, b, atol=1e-5)
        for layer in range(2):
            a, b = (o.cache.k[layer][row, :, :n] for o in outputs)
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert (outputs[0].cache.lengths == lengths).all()
