"""The decoder against Hugging Face's Llama, and its invariants."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden, llama_params

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.models.presets import PRESETS

GOLDEN = decoder.ModelConfig(
    vocab_size=37, d_model=16, num_layers=5, num_heads=4, num_kv_heads=2, d_ff=24
)
TINY = decoder.ModelConfig(
    vocab_size=64, d_model=32, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=48, init_std=0.2
)


def make_batch(tokens, positions=None, segments=None):
    tokens = jnp.asarray(tokens, jnp.int32)
    b, t = tokens.shape
    if positions is None:
        positions = np.tile(np.arange(t, dtype=np.int32), (b, 1))
    if segments is None:
        segments = np.ones((b, t), np.int32)
    return {
        "tokens": tokens,
        "positions": jnp.asarray(positions),
        "segment_ids": jnp.asarray(segments),
    }


def run(params, cfg, batch, **kw):
    return jax.jit(lambda p, b: decoder.forward(p, cfg, b, **kw))(params, batch)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_llama_untied_equals_hugging_face(mode):
    z = golden("llama_tiny_skip_lora")
    cfg = dataclasses.replace(GOLDEN, layers=mode)
    out = run(llama_params(z, 5), cfg, make_batch(z["ids"]), capture=(0, 1, 2, 3, 4))
    np.testing.assert_allclose(decoder.logits(out), z["logits_full"], atol=1e-4)
    for layer in range(5):
        np.testing.assert_allclose(out.captured[layer], z["hidden_full"][layer], atol=1e-4)
    np.testing.assert_allclose(out.final, z["hidden_full"][5], atol=1e-4)


def test_llama_tied_uses_the_transposed_embedding():
    # The golden model is untied; with its embedding in both places it is the tied one, whose
    # logits follow from the golden final state by one product.
    z = golden("llama_tiny_skip_lora")
    params = llama_params(z, 5)
    del params["unembed"]
    cfg = dataclasses.replace(GOLDEN, tie_embeddings=True)
    chex.assert_trees_all_equal_shapes(params, P.abstract(decoder.specs(cfg)))
    out = run(params, cfg, make_batch(z["ids"]))
    expected = z["hidden_full"][5] @ z["p/model.embed_tokens.weight"].T
    np.testing.assert_allclose(decoder.logits(out), expected, atol=1e-4)


def test_cached_decode_equals_hugging_face():
    z = golden("llama_tiny_skip_lora")
    params = llama_params(z, 5)
    cache = decoder.init_cache(GOLDEN, 2, 16, jnp.float32)
    out = run(params, GOLDEN, make_batch(z["ids"]), cache=cache)
    step = jax.jit(lambda p, b, c: decoder.forward(p, GOLDEN, b, cache=c))
    last = decoder.logits(out)[:, -1]
    np.testing.assert_allclose(last, z["dec_logits_none"][:, 0], atol=1e-4)
    for i in range(6):
        token = jnp.argmax(last, axis=-1)[:, None]
        np.testing.assert_array_equal(token[:, 0], z["dec_tokens_none"][:, i])
        batch = make_batch(token, positions=np.asarray(out.cache.lengths)[:, None])
        out = step(params, batch, out.cache)
        last = decoder.logits(out)[:, 0]
        np.testing.assert_allclose(last, z["dec_logits_none"][:, i + 1], atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"qkv_bias": True, "rope_base": 1e6},
        {"qk_norm": True, "head_dim": 12},
        {"window": 3},
        {"attention_soft_cap": 2.0, "logit_soft_cap": 3.0},
    ],
)
def test_packing_equals_unpacked_documents(change):
    cfg = dataclasses.replace(TINY, **change)
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 64, 7), rng.integers(0, 64, 5)
    packed = make_batch(
        [np.concatenate([a, b, [0, 0]])],
        [np.concatenate([np.arange(7), np.arange(5), [0, 0]]).astype(np.int32)],
        [np.array([1] * 7 + [2] * 5 + [0, 0], np.int32)],
    )
    got = decoder.logits(run(params, cfg, packed))[0]
    for tokens, where in ((a, slice(0, 7)), (b, slice(7, 12))):
        alone = decoder.logits(run(params, cfg, make_batch([tokens])))[0]
        np.testing.assert_allclose(got[where], alone, atol=2e-5)


def test_future_tokens_do_not_change_the_past():
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (1, 9))
    other = tokens.copy()
    other[0, 6:] = (other[0, 6:] + 1) % 64
    a, b = (decoder.logits(run(params, TINY, make_batch(t))) for t in (tokens, other))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots", "minimal"])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_remat_and_mode_give_the_same_gradients(remat, mode):
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    batch = make_batch(np.random.default_rng(0).integers(0, 64, (2, 6)))

    def grad(cfg):
        def loss(p):
            out = decoder.forward(p, cfg, batch, capture=(1,))
            return jnp.sum(out.final**2) + jnp.sum(out.captured[1] ** 3)

        return jax.jit(jax.grad(loss))(params)

    plain = grad(dataclasses.replace(TINY, layers="unroll"))
    chex.assert_trees_all_close(
        grad(dataclasses.replace(TINY, layers=mode, remat=remat)), plain, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("remat", "without"), [("attention", "full"), ("minimal_attention", "minimal")]
)
def test_remat_that_keeps_attention_computes_it_once(remat, without):
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    batch = make_batch(np.random.default_rng(0).integers(0, 64, (2, 6)))

    def grad(remat):
        cfg = dataclasses.replace(TINY, attention="blocked", layers="scan", remat=remat)
        return jax.grad(lambda p: jnp.sum(decoder.forward(p, cfg, batch).final ** 2))

    kept, again = (str(jax.make_jaxpr(grad(name))(params)) for name in (remat, without))
    # The forward loop over keys has two exponentials, the backward's one.
    assert kept.count("= exp ") == again.count("= exp ") - 2
    plain = jax.jit(grad("none"))(params)
    chex.assert_trees_all_close(jax.jit(grad(remat))(params), plain, rtol=1e-4, atol=1e-4)


def test_input_embeddings_in_place_of_tokens():
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    batch = make_batch(np.random.default_rng(0).integers(0, 64, (2, 6)))
    embeds = params["embed"][batch["tokens"]]
    replaced = {**batch, "tokens": jnp.zeros_like(batch["tokens"]), "inputs_embeds": embeds}
    a, b = (decoder.logits(run(params, TINY, x)) for x in (batch, replaced))
    np.testing.assert_array_equal(a, b)


def test_cache_truncate_and_gather_equal_recomputation():
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8))
    cache = decoder.init_cache(TINY, 2, 12, jnp.float32)
    out = run(params, TINY, make_batch(tokens), cache=cache)
    cut = out.cache.gather(jnp.array([1, 0, 1])).truncate(jnp.array([5, 3, 8]))
    new = np.array([[7], [9], [11]])
    batch = make_batch(new, positions=np.asarray(cut.lengths)[:, None])
    got = decoder.logits(run(params, TINY, batch, cache=cut))[:, 0]
    for i, (row, length) in enumerate([(1, 5), (0, 3), (1, 8)]):
        full = np.concatenate([tokens[row, :length], new[i]])[None]
        expected = decoder.logits(run(params, TINY, make_batch(full)))[0, -1]
        np.testing.assert_allclose(got[i], expected, atol=2e-5)


def test_embedding_gradient_sums_in_float32():
    # One token 4,096 times: in bfloat16 the sum would stall.
    cfg = dataclasses.replace(TINY, num_layers=1)
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    batch = make_batch(np.full((16, 256), 7))

    def table_gradient(dtype):
        def total(p):
            out = decoder.forward(p, cfg, batch, dtype=dtype, capture=(0,))
            return jnp.sum(out.captured[0].astype(jnp.float32))

        return jax.jit(jax.grad(total))(params)["embed"]

    np.testing.assert_allclose(table_gradient(jnp.bfloat16)[7], 4096.0)


def test_without_jit():
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    batch = make_batch(np.random.default_rng(0).integers(0, 64, (1, 4)))
    with jax.disable_jit():
        eager = decoder.logits(decoder.forward(params, TINY, batch))
    np.testing.assert_allclose(eager, decoder.logits(run(params, TINY, batch)), atol=2e-5)


def test_presets_have_their_published_sizes():
    def millions(name):
        cfg = PRESETS[name]
        cfg = cfg if cfg.vocab_size else dataclasses.replace(cfg, vocab_size=49152)
        return P.count(decoder.specs(cfg)) / 1e6

    # Published parameter counts of the released models.
    assert millions("smollm2_135m") == pytest.approx(134.5, abs=0.1)
    assert millions("qwen2p5_500m") == pytest.approx(494.0, abs=0.1)
    assert millions("qwen3_600m") == pytest.approx(596.0, abs=0.1)
    assert millions("llama3p2_1b") == pytest.approx(1235.8, abs=0.1)
    assert millions("llama2_7b") == pytest.approx(6738.4, abs=0.1)
    for cfg in PRESETS.values():
        cfg.validate()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "d_model"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"num_layers": 0}, "num_layers"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(TINY, **change).validate()


def test_capture_beyond_the_stack_is_refused():
    params = P.initialise(decoder.specs(TINY), jax.random.key(0))
    with pytest.raises(UserError, match="layer 4"):
        run(params, TINY, make_batch([[1, 2]]), capture=(4,))
