"""The token loop's products and attention equal their definitions, in every form that they take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.nn.attention import reference_attention
from jaxreason.nn.kernels import decode


def rand(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * 0.3, dtype)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("pieces", [1, 12])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_equals_the_plain_one(rows, pieces, dtype):
    x, w = rand(0, rows, 40, dtype=dtype), rand(1, 40, 100, dtype=dtype)
    prepared = decode.out_in(w, pieces=pieces)
    assert len(prepared.pieces) == pieces
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    got = jax.jit(lambda x, w: decode.product(x, w, jnp.float32))(x, prepared)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-6)
    rounded = jax.jit(decode.product)(x, prepared)
    assert rounded.dtype == dtype
    np.testing.assert_allclose(np.asarray(rounded, np.float32), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("rows", [1, 2, 21, 22])  # The last is a product in float32.
def test_a_bfloat16_weight_times_float32_rows_loses_nothing(rows):
    # Sizes that differ by ten orders: the parts of the small must not be lost beside the large.
    x = rand(0, rows, 40) * 10.0 ** (np.arange(40) % 11 - 5.0)[None]
    w = rand(1, 40, 100, dtype=jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    scale = np.abs(np.asarray(x, np.float64)) @ np.abs(np.asarray(w, np.float64))
    got = jax.jit(decode.product)(x, decode.out_in(w))
    assert got.dtype == jnp.float32
    # In float64: JAX would first round `exact` to float32.
    assert (np.abs(np.asarray(got, np.float64) - exact) <= 3e-7 * scale).all()
    parts = decode.bfloat16_parts(x)
    assert {p.dtype for p in parts} == {jnp.dtype(jnp.bfloat16)}
    whole = sum(np.asarray(p, np.float64) for p in parts)
    np.testing.assert_array_equal(whole, np.asarray(x, np.float64))


def test_what_bfloat16_must_hold_are_the_weights_of_products():
    narrow, wide = rand(0, 6, 4, dtype=jnp.bfloat16).astype(jnp.float32), rand(1, 6, 4)
    block = {"mlp": {"up": narrow, "up_bias": wide}, "norm": wide}
    held = lambda params, tied: bool(decode.held_by_bfloat16(params, tied=tied))  # noqa: E731
    assert held({"embed": wide, "unembed": narrow, "blocks": block}, tied=False)
    assert not held({"embed": wide, "blocks": block}, tied=True)
    assert held({"embed": narrow, "blocks": block}, tied=True)
    assert not held({"embed": narrow, "unembed": wide, "blocks": block}, tied=False)
    adapted = {"mlp": {"up": {"base": wide}}}
    assert not held({"embed": narrow, "unembed": narrow, "blocks": adapted}, tied=False)


@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (2, 7)])
def test_product_of_several_axes_and_joined_weights(lead):
    x = rand(0, *lead, 4, 8)
    o = rand(1, 4, 8, 24)
    np.testing.assert_allclose(
        decode.product(x, decode.out_in(o, inputs=2, pieces=5), inputs=2),
        jnp.einsum("bthk,hkd->btd", x, o),
        atol=1e-5,
    )
    q, k = rand(2, 24, 6, 8), rand(3, 24, 2, 8)
    h = rand(4, *lead, 24)
    got = decode.product(h, decode.out_in(q, k, k, pieces=3))
    for part, w in zip(decode.split_heads(got, 6, 2), (q, k, k), strict=True):
        np.testing.assert_allclose(part, jnp.einsum("btd,dhk->bthk", h, w), atol=1e-5)


def test_a_product_of_one_head_keeps_the_leading_axes():
    x, o = rand(0, 2, 1, 1, 8), rand(1, 1, 8, 24)
    got = decode.product(x, decode.out_in(o, inputs=2), inputs=2)
    np.testing.assert_allclose(got, jnp.einsum("bthk,hkd->btd", x, o), atol=1e-5)


def test_a_product_of_the_wrong_width_is_refused():
    with pytest.raises(ValueError, match="no last axes of 40"):
        decode.product(rand(0, 2, 39), decode.out_in(rand(1, 40, 8)))


def test_the_tied_unembedding_is_the_embedding():
    block = {
        "attn": {"q": rand(0, 24, 6, 4), "k": rand(1, 24, 2, 4), "v": rand(2, 24, 2, 4),
                 "o": rand(3, 6, 4, 24), "q_bias": rand(4, 6, 4)},
        "mlp": {"gate": rand(5, 24, 40), "up": rand(6, 24, 40), "down": rand(7, 40, 24)},
        "attn_norm": rand(8, 24),
    }  # fmt: skip
    params = {"embed": rand(9, 50, 24), "blocks": (block,)}
    got = decode.prepare(params, tied=True, dtype=jnp.bfloat16, rows=1)
    assert got["unembed"].pieces[0] is got["embed"]
    p = got["blocks"][0]
    assert set(p["attn"]) == {"qkv", "o", "q_bias"} and set(p["mlp"]) == {"gate_up", "down"}
    assert len(p["attn"]["qkv"].pieces) == 1
    x = rand(10, 1, 24)
    logits = decode.product(x.astype(jnp.bfloat16), got["unembed"], jnp.float32)
    embed = params["embed"].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(
        logits, x.astype(jnp.bfloat16).astype(jnp.float32) @ embed.T, atol=1e-5
    )
    plain = {"embed": params["embed"], "unembed": rand(11, 24, 50), "blocks": (block,)}
    got = decode.prepare(plain, tied=False, dtype=jnp.float32, rows=1)
    assert len(got["blocks"][0]["mlp"]["gate_up"].pieces) > 8  # Both cores, see the module.
    np.testing.assert_allclose(decode.product(x, got["unembed"]), x @ plain["unembed"], atol=1e-5)
    both = decode.product(x, got["blocks"][0]["mlp"]["gate_up"])
    np.testing.assert_allclose(both[:, 40:], x @ block["mlp"]["up"], atol=1e-5)


def test_a_mixture_and_a_plain_layer_keep_what_is_not_known():
    attn = {"q": rand(0, 8, 2, 4), "k": rand(1, 8, 2, 4), "v": rand(2, 8, 2, 4),
            "o": rand(3, 2, 4, 8)}  # fmt: skip
    experts = {"router": rand(4, 8, 3), "gate": rand(5, 3, 8, 6), "up": rand(6, 3, 8, 6),
               "down": rand(7, 3, 6, 8)}  # fmt: skip
    kept = decode.prepare_block({"attn": attn, "mlp": experts})["mlp"]
    assert all(kept[name] is experts[name] for name in experts)
    plain = decode.prepare_block({"attn": attn, "mlp": {"up": experts["router"],
                                                        "down": rand(8, 3, 8)}})["mlp"]  # fmt: skip
    assert isinstance(plain["up"], decode.OutIn) and isinstance(plain["down"], decode.OutIn)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_attention_to_a_ragged_cache(batch, soft_cap):
    h, g, d, s = 6, 2, 8, 16
    lengths = jnp.asarray([5, 0, 15][:batch])
    q, new = rand(0, batch, h, d), rand(1, 2, batch, g, d)
    k, v = rand(2, batch, g, s, d), rand(3, batch, g, s, d)

    @jax.jit
    def step(q, k, v, new, lengths):
        k, v = decode.append(k, v, new[0], new[1], decode.places(lengths))
        seen = jnp.arange(s)[None] <= lengths[:, None]
        return decode.attend(q, k, v, jnp.where(seen, 0.0, -1e30), soft_cap), k, v

    got, k_new, v_new = step(q, k, v, new, lengths)
    for row, n in enumerate(lengths.tolist()):
        expected_k = k[row].at[:, n].set(new[0, row])
        np.testing.assert_array_equal(k_new[row], expected_k)
        keys = jnp.swapaxes(k_new[row : row + 1, :, : n + 1], 1, 2)
        values = jnp.swapaxes(v_new[row : row + 1, :, : n + 1], 1, 2)
        expected = reference_attention(
            q[row : row + 1, None], keys, values, jnp.ones((1, 1, n + 1), bool), soft_cap=soft_cap
        )
        np.testing.assert_allclose(got[row], expected[0, 0], atol=2e-6)


def test_a_full_row_writes_nothing():
    k = rand(0, 2, 1, 4, 2)
    ones, at = jnp.ones((2, 1, 2)), decode.places(jnp.asarray([4, 1]))
    k_new, _ = decode.append(k, k, ones, ones, at)
    np.testing.assert_array_equal(k_new[0], k[0])
    assert (k_new[1, 0, 1] == 1).all()


def test_the_cache_is_updated_in_place():
    """A token loop must not copy its caches: they may be larger than the weights."""

    def loop(k, v, q, lengths):
        def body(state):
            k, v, q, lengths, out = state
            k, v = decode.append(k, v, q[:, :2], q[:, 2:4], decode.places(lengths))
            o = decode.attend(q, k, v, jnp.where(jnp.arange(64)[None] <= lengths[:, None], 0, -9.0))
            return k, v, o, lengths + 1, out + o

        return jax.lax.while_loop(lambda s: s[3][0] < 20, body, (k, v, q, lengths, q))

    for batch in (1, 2):
        cache, q = jnp.zeros((batch, 2, 64, 8)), jnp.ones((batch, 4, 8))
        jitted = jax.jit(loop, donate_argnums=(0, 1))
        compiled = jitted.lower(cache, cache + 1, q, jnp.zeros(batch, jnp.int32)).compile()
        copies = [x for x in compiled.as_text().splitlines() if " copy(" in x]
        assert not [x for x in copies if f"[{batch},2,64,8]" in x or "[2,64,8]" in x]


def test_best_takes_the_first_of_equals():
    logits = rand(0, 4, 300).at[1, 7].set(9.0).at[1, 250].set(9.0).at[2, 299].set(9.0)
    token, log_prob = jax.jit(decode.best)(logits)
    assert token.tolist() == np.asarray(logits).argmax(-1).tolist()
    expected = jax.nn.log_softmax(logits)[jnp.arange(4), token]
    np.testing.assert_allclose(log_prob, expected, atol=1e-6)
