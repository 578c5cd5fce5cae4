"""The CPU forms of the parts against the plain ones, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.core.errors import UserError
from jaxreason.nn import attention as A
from jaxreason.nn import rope
from jaxreason.nn.linear import linear, resolve_kernels
from jaxreason.nn.mlp import swiglu
from jaxreason.nn.norm import rms_norm

B, T, D = 2, 6, 16


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same(f, *args, rtol=1e-4, atol=1e-5):
    """Compares value and gradients of `f(kernels, *args)` for the two platforms."""

    def run(kernels):
        out = jax.jit(lambda *a: f(kernels, *a))(*args)
        weights = normal(99, *out.shape)
        loss = lambda *a: jnp.sum(f(kernels, *a) * weights)  # noqa: E731
        return out, jax.jit(jax.grad(loss, tuple(range(len(args)))))(*args)

    (a, ga), (b, gb) = run("xla"), run("cpu")
    np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
    for x, y in zip(ga, gb, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("x", "w", "inputs"),
    [((B, T, D), (D, 5), 1), ((B, T, D), (D, 4, 3), 1), ((B, T, 4, 3), (4, 3, D), 2)],
)
def test_linear(x, w, inputs):
    same(lambda k, x, w: linear(x, w, k, inputs), normal(0, *x), normal(1, *w))


def test_rms_norm():
    same(lambda k, x, s: rms_norm(x, s, 1e-5, k), normal(0, B, T, D), normal(1, D))
    heads = normal(0, B, T, 4, 8)
    same(lambda k, x, s: rms_norm(x, s, 1e-5, k), heads, normal(1, 8))


def test_swiglu():
    p = {"gate": normal(0, D, 24), "up": normal(1, D, 24), "down": normal(2, 24, D)}
    same(lambda k, x: swiglu(p, x, k), normal(3, B, T, D))
    same(lambda k, g: swiglu({**p, "gate": g}, normal(3, B, T, D), k), p["gate"])


def test_rope():
    positions = jnp.tile(jnp.arange(T), (B, 1))
    tables = rope.rope_tables(positions, rope.frequencies(8, 100.0))
    same(lambda k, x: rope.apply_rope(x, *tables, k), normal(0, B, T, 4, 8))


def mask(positions, segments, window=None, backend="reference"):
    """The mask of queries that are also the keys."""
    return A.make_mask(
        q_positions=positions, kv_positions=positions, q_segments=segments, kv_segments=segments,
        window=window, backend=backend, dtype=jnp.float32,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_attention(groups, window):
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0], [1] * 6])

    def f(kernels, q, k, v):
        backend = {"xla": "reference", "cpu": "cpu"}[kernels]
        return A.attention(q, k, v, mask(positions, segments, window, backend), backend=backend)

    same(f, normal(0, B, T, 4, 8), normal(1, B, T, groups, 8), normal(2, B, T, groups, 8))


def test_attention_oracle():
    """One head, loops, float64."""
    q, k, v = (normal(i, 1, T, 1, 4) for i in range(3))
    positions = jnp.arange(T)[None]
    segments = jnp.asarray([[1, 1, 1, 1, 2, 2]])
    out = A.attention(q, k, v, mask(positions, segments), backend="reference")
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    for t in range(T):
        seen = [s for s in range(t + 1) if (s < 4) == (t < 4)]
        scores = np.array([q[t] @ k[s] / 2 for s in seen])
        p = np.exp(scores - scores.max())
        expected = (p / p.sum()) @ v[seen]
        np.testing.assert_allclose(out[0, t, 0], expected, atol=1e-5)


def test_a_backend_that_cannot_refuses():
    x = normal(0, 1, 2, 1, 4)
    where = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match="soft cap"):
        A.attention(x, x, x, mask(where, where, None, "cpu"), soft_cap=1.0, backend="cpu")
    with pytest.raises(UserError, match="its own mask"):
        A.attention(x, x, x, mask(where, where), backend="cpu")
    with pytest.raises(UserError, match="flash9"):
        A.attention(x, x, x, mask(where, where), backend="flash9")


def test_rope_scalings():
    plain = rope.frequencies(8, 1e4)
    np.testing.assert_allclose(rope.frequencies(8, 1e4, rope.LinearScaling(factor=4.0)), plain / 4)
    scaled = rope.frequencies(64, 5e5, rope.Llama3Scaling(factor=8.0))
    base = rope.frequencies(64, 5e5)
    np.testing.assert_allclose(scaled[0], base[0])  # Short wavelengths are kept.
    np.testing.assert_allclose(scaled[-1], base[-1] / 8)  # Long ones are interpolated.
    assert np.all(np.diff(scaled) < 0)


def test_platform_decides():
    assert resolve_kernels("auto", "cpu") == "cpu"
    assert resolve_kernels("auto", "tpu") == "xla"
    assert resolve_kernels("xla", "cpu") == "xla"
