"""A wrap around the layers: the identity changes nothing, a skipped layer is not there."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core import params as P
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.nn.layer_wrap import LayerWrap, run_or_skip, run_rows
from jaxreason.nn.moe import Moe

LAYERS = 4
PLAIN = ModelConfig(
    vocab_size=31, d_model=16, num_layers=LAYERS, num_heads=2, d_ff=24, kernels="xla"
)
# Two spans of layers, and experts whose routers' output must come back.
ODD = dataclasses.replace(PLAIN, window=3, window_from=1, moe=Moe(num_experts=3, top_k=2), d_ff=8)


def params_of(cfg):
    return P.initialise(decoder.specs(cfg), jax.random.key(0))


def batch_of(rows=2, length=5):
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 31)
    positions = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    return {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}


def watch(run, x, cache, extra):
    """The layer as it is; says its number and the stream before it."""
    new, cache, routed = run(x, cache)
    return new, cache, routed, {"number": extra, "before": x}


def skip(keep_lb):
    def apply(run, x, cache, keep_b):
        return *run_rows(keep_b, run, x, cache), keep_b

    return LayerWrap(apply, jnp.asarray(keep_lb))


def without(params, kept):
    return {**params, "blocks": jax.tree.map(lambda a: a[np.asarray(kept)], params["blocks"])}


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("cfg", [PLAIN, ODD], ids=["plain", "experts"])
def test_watching_changes_nothing(cfg, layers):
    cfg = dataclasses.replace(cfg, layers=layers)
    params, batch = params_of(cfg), batch_of()
    plain = decoder.forward(params, cfg, batch, capture=(1, 3))
    watched = decoder.forward(
        params, cfg, batch, capture=(1, 3), wrap=LayerWrap(watch, jnp.arange(LAYERS))
    )
    chex.assert_trees_all_equal(dataclasses.replace(watched, depth=None), plain)
    np.testing.assert_array_equal(watched.depth["number"], np.arange(LAYERS))
    np.testing.assert_array_equal(watched.depth["before"][1], plain.captured[1])
    np.testing.assert_array_equal(watched.depth["before"][3], plain.captured[3])
    assert plain.depth is None


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_a_skipped_layer_is_not_there(layers):
    cfg = dataclasses.replace(PLAIN, layers=layers)
    params, batch = params_of(cfg), batch_of()
    keep = np.array([[True, True], [False, True], [True, True], [False, False]])
    final = decoder.forward(params, cfg, batch, wrap=skip(keep)).final
    for row in range(2):
        kept = np.flatnonzero(keep[:, row])
        shorter = dataclasses.replace(cfg, num_layers=len(kept))
        one = {name: field[row : row + 1] for name, field in batch.items()}
        expected = decoder.forward(without(params, kept), shorter, one).final
        np.testing.assert_allclose(final[row], expected[0], rtol=1e-5, atol=1e-6)


def test_a_cache_goes_through_a_wrap():
    cfg, batch = PLAIN, batch_of()
    params = params_of(cfg)
    keep = np.array([True, False, True, True])
    cache = decoder.init_cache(cfg, 2, 8, jnp.float32)
    wrap = skip(np.broadcast_to(keep[:, None], (LAYERS, 2)))
    whole = decoder.forward(params, cfg, batch, wrap=wrap).final
    first = {name: field[:, :3] for name, field in batch.items()}
    rest = {name: field[:, 3:] for name, field in batch.items()}
    cache = decoder.forward(params, cfg, first, cache=cache, cache_is_empty=True, wrap=wrap).cache
    outputs = decoder.forward(params, cfg, rest, cache=cache, wrap=wrap)
    np.testing.assert_allclose(outputs.final, whole[:, 3:], rtol=1e-5, atol=1e-6)
    assert not np.asarray(outputs.cache.k[1]).any() and np.asarray(outputs.cache.k[2]).any()
    np.testing.assert_array_equal(outputs.depth[:, 0], keep)


def test_no_work_is_done_for_a_layer_that_all_skip():
    """The branch not taken would divide by zero and raise under debug_nans."""

    def run(x, cache):
        return x / jnp.zeros(()), cache, ()

    x = jnp.ones((2, 1, 3))
    with jax.debug_nans(True), jax.debug_infs(True):
        new, _, _ = jax.jit(lambda keep: run_or_skip(keep, run, x, ()))(False)
        new, _, _ = jax.jit(lambda keep_b: run_rows(keep_b, run, new, ()))(jnp.zeros(2, bool))
    np.testing.assert_array_equal(new, x)
    assert not np.isfinite(jax.jit(lambda keep: run_or_skip(keep, run, x, ()))(True)[0]).any()
