"""Chunked cross-entropy and distillation against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.nn import cross_entropy as cross_entropy_module
from jaxreason.nn.cross_entropy import auto_chunk, cross_entropy, distillation

B, T, D, V = 3, 8, 16, 50


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    h = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    y = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    return h, w, y, weights


def plain(h, w, y, weights, z_loss, cap):
    logits = jnp.einsum("btd,dv->btv", h, w)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    log_z = jax.nn.logsumexp(logits, -1)
    at = jnp.take_along_axis(logits, y[..., None], -1)[..., 0]
    return jnp.sum(weights * (log_z - at + z_loss * log_z**2))


@pytest.mark.parametrize("chunk", [0, 1, 2, 8])
@pytest.mark.parametrize(("z_loss", "cap"), [(0.0, None), (0.01, None), (0.01, 4.0)])
def test_value_and_gradient_equal_the_definition(chunk, z_loss, cap):
    h, w, y, weights = arrays()
    f = lambda h, w: 0.5 * cross_entropy(h, w, y, weights, z_loss, cap, chunk).loss  # noqa: E731
    g = lambda h, w: 0.5 * plain(h, w, y, weights, z_loss, cap)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(h, w)
    expected, expected_grads = jax.value_and_grad(g, (0, 1))(h, w)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("features", "kept"), [(16, True), (8, False)])
@pytest.mark.parametrize("chunk", [0, 2])
def test_a_cut_batch_of_few_tokens_keeps_logits_gradients(features, kept, chunk, monkeypatch):
    """As many tokens a device as features: its table's gradient is not in the loop; else it is."""
    cut = cross_entropy_module._cut
    monkeypatch.setattr(cross_entropy_module, "_cut", lambda *a: ((2, 1), cut(*a)[1]))
    keys = jax.random.split(jax.random.key(0), 4)
    h, w = jax.random.normal(keys[0], (4, 8, features)), jax.random.normal(keys[1], (features, 20))
    y, weights = jax.random.randint(keys[2], (4, 8), 0, 20), jax.random.uniform(keys[3], (4, 8))
    f = jax.value_and_grad(
        lambda h, w: cross_entropy(h, w, y, weights, 0.01, 4.0, chunk).loss, (0, 1)
    )
    scan = next(e for e in jax.make_jaxpr(f)(h, w).eqns if e.primitive.name == "scan")
    tables = [v for v in scan.outvars if v.aval.shape[-2:] == (features, 20)]
    assert len(tables) == (not kept)
    value, grads = jax.jit(f)(h, w)
    expected, wanted = jax.value_and_grad(plain, (0, 1))(h, w, y, weights, 0.01, 4.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_metrics():
    h, w, y, weights = arrays()
    out = cross_entropy(h, w, y, weights, 0.1, None, 4)
    logits = np.einsum("btd,dv->btv", h, w).astype(np.float64)
    hit = logits.argmax(-1) == np.asarray(y)
    np.testing.assert_allclose(out.correct, (np.asarray(weights) * hit).sum())
    np.testing.assert_allclose(out.loss, out.nll + 0.1 * out.z_squared, rtol=1e-6)


def test_no_float32_logits_of_the_whole_batch_are_held():
    b, t, d, v = 4, 64, 8, 4096
    shapes = [
        jax.ShapeDtypeStruct(s, dt)
        for s, dt in (
            ((b, t, d), jnp.float32),
            ((d, v), jnp.float32),
            ((b, t), jnp.int32),
            ((b, t), jnp.float32),
        )
    ]
    f = jax.grad(lambda h, w, y, m: cross_entropy(h, w, y, m, 0.0, None, 4).loss, (0, 1))
    memory = jax.jit(f).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < b * t * v * 4 / 2


def test_auto_chunk_divides_the_sequence():
    assert auto_chunk((2, 12), 2**25) == 1
    assert auto_chunk((1, 12), 8) == 12
    assert auto_chunk((1, 12), 8, chunk=5) == 4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_equals_kl(temperature):
    h, w, _, weights = arrays()
    th, tw, _, _ = arrays(5)
    tw = jnp.concatenate([tw, tw[:, :3]], axis=1)  # A teacher's table padded to more rows.

    def definition(h, w):
        p = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", th, tw[:, :V]) / temperature)
        q = jax.nn.log_softmax(jnp.einsum("btd,dv->btv", h, w) / temperature)
        return temperature**2 * jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), -1))

    f = lambda h, w: distillation(h, w, th, tw, weights, temperature=temperature, chunk=2)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(f, (0, 1)))(h, w)
    expected, expected_grads = jax.value_and_grad(definition, (0, 1))(h, w)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    same = distillation(h, w, h, w, weights, chunk=2)
    np.testing.assert_allclose(same, 0.0, atol=1e-4)


@pytest.mark.parametrize("kernels", ["xla", "cpu"])
@pytest.mark.parametrize("frozen", [False, True])
def test_unweighted_chunks_passed_over_change_nothing(frozen, kernels):
    h, w, y, _ = arrays()
    weights = jnp.zeros((B, T)).at[0, 5].set(2.0).at[2, 1].set(1.0).at[2, 7].set(0.5)

    def losses(sparse):
        def f(h, w):
            return cross_entropy(h, w, y, weights, 0.01, 4.0, 0, kernels, sparse)

        of_loss = jax.value_and_grad(lambda *a: f(*a).loss, 0 if frozen else (0, 1))
        return jax.jit(lambda: (f(h, w), of_loss(h, w)))()

    for a, b in zip(jax.tree.leaves(losses(True)), jax.tree.leaves(losses(False)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_only_weighted_chunks_make_logits():
    """Counted by a callback in the branch: 2 of the 8 chunks hold the weighted tokens."""
    h, w, y, _ = arrays()
    weights = jnp.zeros((B, T)).at[0, 5].set(1.0).at[2, 1].set(1.0).at[2, 7].set(1.0)
    calls, logits = [], cross_entropy_module._logits

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return logits(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_module, "_logits", counted)
        f = jax.jit(lambda h: cross_entropy(h, w, y, weights, 0.0, None, 0, "xla", True).loss)
        f(h).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 2
        jax.jit(jax.grad(f))(h).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == 4


def test_a_frozen_table_has_no_gradient_work():
    """The compiled gradient by `hidden` alone multiplies twice a chunk, not three times."""
    h, w, y, weights = arrays()

    def products(argnums):
        f = jax.grad(lambda h, w: cross_entropy(h, w, y, weights, 0.0, None, 4).loss, argnums)
        return jax.jit(f).lower(h, w).as_text().count("dot_general")

    assert (products(0), products((0, 1))) == (2, 3)
