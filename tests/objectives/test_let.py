"""LET's operators against torch, its schedule, and where its gradient may and may not go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from goldens import golden

from jaxreason.core import params as P
from jaxreason.core.objective import combine, weighted_total
from jaxreason.models import decoder
from jaxreason.objectives import let
from jaxreason.objectives.lm import next_token

CFG = decoder.ModelConfig(
    vocab_size=64, d_model=32, num_layers=4, num_heads=4, d_ff=48, init_std=0.2
)
TEACHER = decoder.ModelConfig(
    vocab_size=64, d_model=24, num_layers=2, num_heads=4, d_ff=32, init_std=0.2
)


def make_batch(seed=0, b=2, t=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (b, t)).astype(np.int32)
    segments = np.ones((b, t), np.int32)
    segments[0, -2:] = 0
    weights = (segments > 0).astype(np.float32)
    weights[:, 3] = 0
    return {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(np.roll(tokens, -1, 1)),
        "positions": jnp.asarray(np.tile(np.arange(t, dtype=np.int32), (b, 1))),
        "segment_ids": jnp.asarray(segments),
        "loss_weights": jnp.asarray(weights),
    }


def parts(lambda_0=0.3, k=2, pairing_layer=let.FINAL, stop=10):
    align = let.alignment(
        student_layer=k,
        teacher_layer=pairing_layer,
        schedule=let.late_to_early_schedule(lambda_0, stop),
    )
    teacher = P.initialise(decoder.specs(TEACHER), jax.random.key(7))
    student = P.initialise(decoder.specs(CFG), jax.random.key(1))
    return align, student, teacher


def loss_fn(objective, teacher, batch, step=0):
    def loss(params):
        out = decoder.forward(params, CFG, batch, capture=objective.captures)
        capture = objective.frozen_captures.get("teacher", ())
        frozen = {"teacher": decoder.forward(teacher, TEACHER, batch, capture=capture)}
        sums, metrics, _ = objective.terms(
            out, frozen, batch, objective.init_aux(), jax.random.key(0), step
        )
        return weighted_total(objective, sums, objective.denominators(batch), step), metrics

    return loss


@pytest.mark.parametrize("case", ["up", "down", "same"])
def test_operators_equal_torch(case):
    z = golden("let_ops_torch")
    teacher, student = (jnp.asarray(z[f"{case}_{n}"]) for n in ("teacher", "student"))
    for suffix, mode in (("", "linear"), ("_align_corners", "linear_align_corners")):
        projected = let.project(teacher, student.shape[-1], mode)
        np.testing.assert_allclose(projected, z[f"{case}_proj{suffix}"], atol=1e-5)
        loss = -let.cosine(student, projected).mean()
        np.testing.assert_allclose(loss, z[f"{case}_loss{suffix}"], atol=1e-5)
    grad = jax.grad(lambda s: -let.cosine(s, let.project(teacher, s.shape[-1])).mean())(student)
    np.testing.assert_allclose(grad, z[f"{case}_grad_student"], atol=1e-5)


def test_schedule_exact_values():
    schedule = let.late_to_early_schedule(0.25, 8)
    values = [float(schedule(s)) for s in (0, 4, 7, 8, 9, 1000)]
    assert values == [0.25, 0.125, 0.03125, 0.0, 0.0, 0.0]
    assert float(let.late_to_early_schedule(0.25, 0)(0)) == 0.0


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_gradient_is_exactly_zero_above_layer_k(mode):
    import dataclasses

    align, student, teacher = parts(k=2)
    batch = make_batch()
    global CFG
    before, CFG = CFG, dataclasses.replace(CFG, layers=mode)
    try:
        grads = jax.jit(jax.grad(loss_fn(align, teacher, batch), has_aux=True))(student)[0]
    finally:
        CFG = before
    for leaf in jax.tree.leaves(grads["blocks"]):
        assert np.all(np.asarray(leaf[2:]) == 0.0)
        assert np.any(np.asarray(leaf[:2]) != 0.0)
    assert np.all(np.asarray(grads["unembed"]) == 0) and np.all(
        np.asarray(grads["final_norm"]) == 0
    )
    assert np.any(np.asarray(grads["embed"]) != 0)


def test_no_gradient_reaches_the_teacher():
    align, student, teacher = parts()
    batch = make_batch()
    grads = jax.grad(lambda t: loss_fn(align, t, batch)(student)[0])(teacher)
    assert all(np.all(np.asarray(g) == 0) for g in jax.tree.leaves(grads))


def test_lambda_zero_is_bit_identical_to_next_token():
    align, student, teacher = parts(lambda_0=0.0)
    batch = make_batch()
    plain = next_token()
    with_term = combine(plain, align)
    g_plain = jax.jit(jax.grad(loss_fn(combine(plain), teacher, batch), has_aux=True))(student)[0]
    g_let = jax.jit(jax.grad(loss_fn(with_term, teacher, batch), has_aux=True))(student)[0]
    for a, b in zip(jax.tree.leaves(g_plain), jax.tree.leaves(g_let), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scale_invariance_and_bounds():
    align, student, teacher = parts()
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32) for _ in range(2))
    c = let.cosine(a, b)
    np.testing.assert_allclose(let.cosine(3.0 * a, 0.1 * b), c, atol=1e-6)
    assert np.all(np.abs(c) <= 1 + 1e-6)
    np.testing.assert_allclose(let.cosine(a, a), 1.0, atol=1e-6)
    zero = jax.grad(lambda x: let.cosine(x, b).sum())(jnp.zeros_like(a))
    assert np.all(np.isfinite(np.asarray(zero)))


def test_padding_does_not_count():
    align, student, teacher = parts()
    batch = make_batch()
    other = {**batch, "tokens": batch["tokens"].at[0, -2:].set(5)}
    value = loss_fn(align, teacher, batch)(student)[0]
    np.testing.assert_allclose(loss_fn(align, teacher, other)(student)[0], value, rtol=1e-6)
    # Every token counts, also those without a target.
    assert float(align.denominators(batch)["align"]) == 14.0


def test_term_equals_its_definition():
    align, student, teacher = parts(lambda_0=0.5, k=1)
    batch = make_batch()
    total, metrics = loss_fn(align, teacher, batch, step=5)(student)
    h = np.asarray(decoder.forward(student, CFG, batch, capture=(1,)).captured[1], np.float64)
    t = np.asarray(decoder.forward(teacher, TEACHER, batch).final, np.float64)
    t = t @ let.interpolation_matrix(24, 32).astype(np.float64)
    cos = (h * t).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(t, axis=-1)
    mask = np.asarray(batch["segment_ids"]) > 0
    np.testing.assert_allclose(float(total), -0.25 * cos[mask].mean(), rtol=1e-5)
    got, weight = metrics["align_cosine"]
    np.testing.assert_allclose(float(got / weight), cos[mask].mean(), rtol=1e-5)


def test_pairings():
    layers = {p: let.paired_layers(p, 24, 12) for p in ("L2E", "L2M", "L2L", "M2E", "M2M", "M2L")}
    assert layers == {
        "L2E": (3, let.FINAL), "L2M": (12, let.FINAL), "L2L": (24, let.FINAL),
        "M2E": (3, 6), "M2M": (12, 6), "M2L": (24, 6),
    }  # fmt: skip
    assert let.paired_layers("L2E", 4, 12) == (1, let.FINAL)
    assert let.paired_layers("L2E", 24, 12, early=5) == (5, let.FINAL)


def test_combine_refuses_doubled_terms():
    with pytest.raises(ValueError, match="nll"):
        combine(next_token(), next_token())
    assert (
        combine(next_token(coefficient=optax.constant_schedule(0.5))).coefficients["nll"](0) == 0.5
    )
