"""Every attention backend against the definition: values, gradients, masks, refusals.

The GPU's kernel runs nowhere here; tests/aot gives it to its compiler.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.models import decoder
from jaxreason.nn import attention as A
from jaxreason.nn.kernels import blocked, cudnn, splash

B, T, H, G, K = 2, 37, 4, 2, 8
BLOCKED = functools.partial(blocked.attention, block=16)
SPLASH = functools.partial(splash.attention, interpret=True)


def draw(t=T, groups=G, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, t, n, K)), jnp.float32) for n in (H, groups, groups, H)]


def first_three(t=T):
    q, k, v, _ = draw(t)
    return q, k, v


def packed(t=T, window=None, **changes) -> A.Mask:
    """Rows of several documents and padding; positions begin again with each."""
    segments, positions = np.zeros((2, B, t), np.int32)
    for row, spans in enumerate([[5, 18, t - 26], [t]]):
        start = 0
        for i, n in enumerate(spans):
            segments[row, start : start + n] = i + 1
            positions[row, start : start + n] = np.arange(n)
            start += n
    p, s = jnp.asarray(positions), jnp.asarray(segments)
    return dataclasses.replace(A.Mask(p, p, s, s, window, in_row_order=True), **changes)


def both(f, mask, cap, arrays):
    """Values and gradients of a backend and of the definition, where a token is not padding."""
    *inputs, weights = arrays
    weights = weights * (mask.q_segments > 0)[..., None, None]

    def run(f):
        def loss(*inputs):
            out = f(*inputs, mask, soft_cap=cap)
            return jnp.sum(out * weights), out * (weights != 0)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)

    (_, got), got_grads = run(f)
    (_, want), want_grads = run(functools.partial(A.attention, backend="reference"))
    return [got, *got_grads], [want, *want_grads]


@pytest.mark.parametrize(
    ("backend", "groups", "window", "cap"),
    [
        (BLOCKED, 2, None, None),
        (BLOCKED, 1, 7, 3.0),
        (SPLASH, 2, None, None),
        (SPLASH, 4, 7, 3.0),
    ],
    ids=["blocked", "blocked window cap", "splash", "splash window cap"],
)
def test_a_backend_is_the_definition(backend, groups, window, cap):
    got, want = both(backend, packed(window=window), cap, draw(groups=groups))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6)


def test_blocked_reads_positions_and_other_keys():
    """Keys in another order than the queries, and more of them, as a cache has them."""
    order = np.random.default_rng(1).permutation(T)
    mask = packed(window=9)
    mask = dataclasses.replace(
        mask,
        kv_positions=mask.kv_positions[:, order],
        kv_segments=mask.kv_segments[:, order],
        in_row_order=False,
    )
    got, want = both(BLOCKED, mask, None, draw())
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-6)


def test_a_query_without_keys_gives_zeros_and_finite_gradients():
    mask = dataclasses.replace(packed(), q_segments=jnp.full((B, T), 9, jnp.int32))
    q, k, v = first_three()
    loss = lambda q, k, v: jnp.sum(BLOCKED(q, k, v, mask))  # noqa: E731
    out, grads = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
    assert out == 0 and all(jnp.all(g == 0) for g in grads)


def shapes(jaxpr):
    """Shapes of everything that a jaxpr and those inside it compute."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_blocked_never_holds_all_pairs(backend):
    """Also not for a scan over layers that are computed again in the backward pass."""
    t = 96
    f = BLOCKED if backend == "blocked" else functools.partial(A.attention, backend=backend)

    def loss(q, k, v, mask):
        layer = jax.checkpoint(lambda x, _: (x + f(x, k, v, mask), None), prevent_cse=False)
        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0])

    grad = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*first_three(t), packed(t))
    largest = max(int(np.prod(s)) for s in shapes(grad.jaxpr))
    assert (largest < B * t * t) == (backend == "blocked")
    if backend == "blocked":
        # Layers of queries, or one block of scores.
        assert largest == max(2 * B * H * t * K, B * H * 16 * 16)


def test_splash_refuses_rows_out_of_order():
    with pytest.raises(UserError, match="splash attention sees rows as they lie.*blocked"):
        SPLASH(*first_three(), packed(in_row_order=False))


@pytest.mark.parametrize(("length", "block"), [(128, 128), (2048, 512), (1920, 384), (896, 128)])
def test_splash_blocks_divide_the_row(length, block):
    assert splash.block(length) == block


@pytest.mark.parametrize(
    ("dtype", "width", "cap", "message"),
    [
        (jnp.float32, 64, None, "queries are float32; set compute_dtype to bfloat16"),
        (jnp.bfloat16, 64, 30.0, "no soft cap"),
        (jnp.bfloat16, 20, None, "multiple of 8"),
        (jnp.float16, 256, None, "up to 128, got 256"),
    ],
)
def test_cudnn_says_what_it_refuses(dtype, width, cap, message):
    x = jnp.zeros((B, T, H, width), dtype)
    with pytest.raises(UserError, match=message):
        A.attention(x, x, x, packed(), soft_cap=cap, backend="cudnn")
    assert not cudnn.refusal(jnp.bfloat16, 128, None)


def test_an_unknown_backend():
    with pytest.raises(UserError, match="'splish'; expected one of .* did you mean 'splash'"):
        A.attention(*first_three(), packed(), backend="splish")


LONG = A.CPU_BLOCKED_FROM


@pytest.mark.parametrize(
    ("platform", "known", "changes", "backend"),
    [
        ("tpu", {}, {}, "splash"),
        ("tpu", {"dtype": jnp.float32}, {"attention_soft_cap": 5.0, "head_dim": 20}, "splash"),
        ("gpu", {"dtype": "bfloat16"}, {}, "cudnn"),
        ("cuda", {"dtype": jnp.float16}, {}, "cudnn"),
        ("gpu", {"dtype": jnp.float32}, {}, "blocked"),
        ("gpu", {}, {}, "blocked"),
        ("gpu", {"dtype": jnp.bfloat16}, {"attention_soft_cap": 5.0}, "blocked"),
        ("cpu", {}, {}, "cpu"),
        ("cpu", {"seq_len": LONG - 1}, {}, "cpu"),
        ("cpu", {"seq_len": LONG}, {}, "blocked"),
        ("cpu", {}, {"attention_soft_cap": 5.0}, "reference"),
        ("cpu", {}, {"kernels": "xla"}, "reference"),
        ("tpu", {}, {"attention": "blocked"}, "blocked"),
    ],
)
def test_auto_by_platform(platform, known, changes, backend):
    cfg = decoder.ModelConfig(vocab_size=64, d_model=32, num_heads=4, **changes)
    assert decoder.resolve(cfg, platform, **known).attention == backend


@pytest.mark.parametrize(
    ("backend", "platform"), [("splash", "cpu"), ("cudnn", "tpu"), ("cudnn", "cpu")]
)
def test_a_kernel_of_another_platform(backend, platform):
    cfg = decoder.ModelConfig(vocab_size=64, attention=backend)
    with pytest.raises(UserError, match=f"attention is {backend}, a kernel of .* on {platform}"):
        decoder.resolve(cfg, platform)


def test_a_token_loop_has_attention_of_its_own():
    """A model whose rows go through another platform's kernel reads and writes a cache here."""
    cfg = decoder.ModelConfig(
        vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=16, kernels="xla",
        attention="splash",
    )  # fmt: skip
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    batch = {
        "tokens": tokens,
        "positions": jnp.arange(6, dtype=jnp.int32)[None],
        "segment_ids": jnp.ones((1, 6), jnp.int32),
    }
    plain = dataclasses.replace(cfg, attention="reference")
    want = decoder.logits(decoder.forward(params, plain, batch))
    cache, got = decoder.init_cache(cfg, 1, 8, jnp.float32), []
    for part in (slice(0, 4), slice(4, 5), slice(5, 6)):
        new = {name: field[:, part] for name, field in batch.items()}
        out = decoder.forward(params, cfg, new, cache=cache, cache_is_empty=part.start == 0)
        cache = out.cache
        got.append(decoder.logits(out))
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=2e-5, atol=1e-5)
