"""The training step: accumulation, phases, the guard, optimisers, schedules."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.objective import Objective
from jaxreason.models import decoder
from jaxreason.objectives.distill import Distill, Salt
from jaxreason.objectives.let import Let
from jaxreason.objectives.lm import NextToken
from jaxreason.recipes.methods import make_phases
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimConfig, make_optimiser, make_schedule
from jaxreason.train.phase import FrozenModel, Phase, active
from jaxreason.train.step import make_train_step

CFG = decoder.ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=4, d_ff=48)
TEACHER = decoder.ModelConfig(vocab_size=64, d_model=24, num_layers=1, num_heads=4, d_ff=32)
SPECS = decoder.specs(CFG)


def make_batch(seed=0, b=8, t=8):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 64, (b, t + 1)).astype(np.int32)
    segments = np.ones((b, t), np.int32)
    segments[: b // 2, -3:] = 0  # Micro-batches of different weight.
    return {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.asarray(np.tile(np.arange(t, dtype=np.int32), (b, 1))),
        "segment_ids": jnp.asarray(segments),
        "loss_weights": jnp.asarray((segments > 0).astype(np.float32)),
    }


def forward(params, batch, capture, key=None):
    return decoder.forward(params["model"], CFG, batch, capture=capture)


def teacher():
    params = P.initialise(decoder.specs(TEACHER), jax.random.key(9))
    apply = lambda p, b, c: decoder.forward(p, TEACHER, b, capture=c)  # noqa: E731
    return FrozenModel(lambda: params, apply), params


def phases_of(method, optim=None, steps=10):
    optim = optim or OptimConfig(warmup_steps=2)
    frozen, _ = teacher()
    return make_phases(
        method,
        steps=steps,
        optimiser=make_optimiser(optim, SPECS, steps),
        student_layers=2,
        teacher=frozen,
        teacher_layers=1,
    )


def new_state(phases):
    return state_lib.create({"model": P.initialise(SPECS, jax.random.key(0))}, phases)


def one_step(phase, state, batch, **kw):
    step = jax.jit(make_train_step(forward, phase, key=jax.random.key(3), **kw))
    frozen = {name: model.load() for name, model in phase.frozen.items()}
    return step(state, frozen, batch)


@pytest.mark.parametrize("method", [Let(lambda_0=0.5), Distill()])
def test_accumulation_equals_the_big_batch(method):
    phases = phases_of(method)
    big, big_metrics = one_step(phases[0], new_state(phases), make_batch(), clip_norm=1.0)
    small, metrics = one_step(
        phases[0], new_state(phases), make_batch(), clip_norm=1.0, accumulate=4
    )
    chex.assert_trees_all_close(small.opt_state, big.opt_state, rtol=1e-4, atol=1e-7)
    for name in ("total", "nll", "grad_norm"):
        np.testing.assert_allclose(metrics[name], big_metrics[name], rtol=1e-5)


def test_learning_happens_and_every_method_learns():
    for method in (NextToken(), Let(), Distill(), Salt()):
        phase = phases_of(method, OptimConfig(learning_rate=1e-2, warmup_steps=2), 40)[0]
        state, batch = new_state([phase]), make_batch()
        step = jax.jit(make_train_step(forward, phase, key=jax.random.key(3), clip_norm=1.0))
        frozen = {name: model.load() for name, model in phase.frozen.items()}
        losses = []
        for _ in range(20):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["nll"]))
        assert losses[-1] < losses[0] - 0.3, method


def test_guard_skips_rolls_back_and_counts():
    def poisoned(weight):
        def terms(outputs, frozen, batch, aux_state, key, step):
            total = jnp.sum(outputs.final.astype(jnp.float32) ** 2)
            bad = jnp.where(step == 1, jnp.nan, 1.0)
            return {"a": total * bad}, {"a": (total, jnp.float32(1))}, aux_state + 1

        return Objective(
            denominators=lambda batch: {"a": jnp.float32(weight)},
            terms=terms,
            coefficients={"a": optax.constant_schedule(1.0)},
            init_aux=lambda: jnp.float32(0),
        )

    phase = Phase("p", 9, poisoned(4.0), {"model": make_optimiser(OptimConfig(), SPECS, 9)})
    state = new_state([phase])
    step = jax.jit(make_train_step(forward, phase, key=jax.random.key(3)))
    states = [state]
    for _ in range(3):
        states.append(step(states[-1], {}, make_batch())[0])
    assert [int(s.skipped) for s in states] == [0, 0, 1, 1]
    assert [int(s.streak) for s in states] == [0, 0, 1, 0]
    assert [float(s.aux_state["p"]) for s in states] == [0, 1, 1, 2]
    for part in ("params", "opt_state"):
        chex.assert_trees_all_equal(getattr(states[2], part), getattr(states[1], part))
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), states[3].params, states[2].params
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_a_step_touches_only_its_phase_s_groups():
    extra = {"w": P.ParamSpec((4,), ("embed",), P.normal(1.0))}
    optim = make_optimiser(OptimConfig(), extra, 9)
    model = make_optimiser(OptimConfig(), SPECS, 9)
    objective = phases_of(NextToken())[0].objective
    first = Phase("first", 5, objective, {"model": model})
    second = Phase("second", 9, objective, {"extra": optim})
    params = {
        "model": P.initialise(SPECS, jax.random.key(0)),
        "extra": P.initialise(extra, jax.random.key(0)),
    }
    state = state_lib.create(params, [first, second])
    after, _ = one_step(first, state, make_batch())
    chex.assert_trees_all_equal(after.params["extra"], state.params["extra"])
    chex.assert_trees_all_equal(after.opt_state["extra"], state.opt_state["extra"])
    again, _ = one_step(second, after, make_batch())
    chex.assert_trees_all_equal(again.params["model"], after.params["model"])
    chex.assert_trees_all_equal(again.opt_state["model"], after.opt_state["model"])
    assert [active([first, second], s) for s in (0, 4, 5, 8)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="beyond"):
        active([first, second], 9)


def test_phases_of_the_methods():
    names = lambda m: [(p.name, p.until, sorted(p.frozen)) for p in phases_of(m)]  # noqa: E731
    plain = ("next_token", 10, [])
    assert names(NextToken()) == [plain]
    assert names(Let()) == [("let", 5, ["teacher"]), plain]
    assert names(Let(stop_steps=3)) == [("let", 3, ["teacher"]), plain]
    assert names(Let(lambda_0=0.0)) == [plain]
    assert names(Let(stop_fraction=0.0)) == [plain]
    assert names(Distill()) == [("distill", 10, ["teacher"])]
    assert names(Salt(stop_fraction=0.3)) == [("distill", 3, ["teacher"]), plain]
    # The slope of lambda(s) is that of the S_stop asked for, also where the run ends before it.
    beyond = phases_of(Let(lambda_0=1.0, stop_steps=20))
    assert [(p.name, p.until) for p in beyond] == [("let", 10)]
    assert float(beyond[0].objective.coefficients["align"](10)) == 0.5
    with pytest.raises(UserError, match="stop_fraction"):
        Let(stop_fraction=1.5).validate()
    with pytest.raises(UserError, match="stop_steps"):
        Salt(stop_steps=-1).validate()
    with pytest.raises(UserError, match="pairing"):
        Let(student_layer=2, pairing="L2L").validate()
    with pytest.raises(UserError, match="student_layer"):
        phases_of(Let(student_layer=3))
    with pytest.raises(UserError, match="weight"):
        Distill(weight=1.5).validate()
    with pytest.raises(UserError, match="teacher"):
        make_phases(Let(), steps=3, optimiser=optax.sgd(1.0), student_layers=2)


def test_muon_trains_matrices_by_orthogonal_updates():
    cfg = OptimConfig(name="muon", warmup_steps=0, weight_decay=0.0, schedule="constant")
    phase = phases_of(NextToken(), cfg)[0]
    state = new_state([phase])
    after, _ = one_step(phase, state, make_batch())
    change = (
        after.params["model"]["blocks"]["attn"]["q"] - state.params["model"]["blocks"]["attn"]["q"]
    )
    for layer in np.asarray(change).reshape(2, 32, 32):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.max() / np.median(singular) < 3  # A plain gradient's are far apart.
    # Norms, biases and tables are AdamW's, with its mask: a norm without gradient does not move.
    still = jax.tree.map(jnp.zeros_like, state.params["model"])
    optimiser = phases_of(NextToken(), dataclasses.replace(cfg, weight_decay=1.0))[0].optimisers
    tx = optimiser["model"]
    updates, _ = tx.update(still, tx.init(state.params["model"]), state.params["model"])
    assert np.all(np.asarray(updates["final_norm"]) == 0)
    assert np.all(np.asarray(updates["blocks"]["attn_norm"]) == 0)
    assert np.any(np.asarray(updates["embed"]) != 0)
    grads = jax.tree.leaves(after.opt_state)
    assert all(np.all(np.isfinite(np.asarray(g))) for g in grads if g.dtype == jnp.float32)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules(name):
    cfg = OptimConfig(schedule=name, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(cfg, 100)
    values = np.array([float(schedule(s)) for s in range(101)])
    np.testing.assert_allclose(values[0], 0.2, rtol=1e-6)
    np.testing.assert_allclose(values[10], 2.0, rtol=1e-6)
    assert np.all(np.diff(values[:10]) > 0) and np.all(np.diff(values[10:]) <= 1e-6)
    np.testing.assert_allclose(values[100], 2.0 if name == "constant" else 0.2, rtol=1e-5)
    if name == "wsd":
        np.testing.assert_allclose(values[10:80], 2.0)
        assert values[90] == pytest.approx(1.1, rel=1e-3)


def test_weight_decay_spares_norms():
    cfg = OptimConfig(learning_rate=0.1, warmup_steps=0, weight_decay=1.0, schedule="constant")
    tx = make_optimiser(cfg, SPECS, 10)
    params = P.initialise(SPECS, jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert np.all(np.asarray(updates["final_norm"]) == 0)
    assert np.all(np.asarray(updates["blocks"]["attn_norm"]) == 0)
    np.testing.assert_allclose(updates["embed"], -0.1 * params["embed"], rtol=1e-5)


def test_moments_lie_like_their_parameters():
    state = jax.eval_shape(lambda: new_state(phases_of(Let())))
    marks = jax.tree_util.tree_map_with_path(lambda path, _: P.path_name(path), SPECS)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    out = state_lib.shardings(state, {"model": marks}, mesh)
    adam = out.opt_state["model"][0]
    assert adam.mu == marks and adam.nu == marks


def test_missing_batch_field_is_refused_before_compiling():
    objective = phases_of(Let())[0].objective
    with pytest.raises(UserError, match="segment_ids"):
        objective.check_batch({"tokens": 0, "targets": 0, "loss_weights": 0})


def test_config_ranges():
    with pytest.raises(UserError, match="clip_norm"):
        dataclasses.replace(OptimConfig(), clip_norm=-1.0).validate()
    with pytest.raises(UserError, match="b1"):
        dataclasses.replace(OptimConfig(), b1=1.5).validate()
