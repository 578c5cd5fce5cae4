"""The mixture of experts against NumPy, its forms against each other, and its losses."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import REPO, run_python

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.objective import combine
from jaxreason.core.outputs import Outputs
from jaxreason.models import decoder
from jaxreason.nn.expert_parallel import room
from jaxreason.nn.moe import Moe, moe, moe_specs, route
from jaxreason.objectives.lm import NextToken, next_token
from jaxreason.objectives.moe import router_losses
from jaxreason.recipes.methods import make_phases
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step

B, T, D, F, E = 2, 7, 6, 10, 5


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_params():
    return P.initialise(moe_specs(Moe(num_experts=E), D, F, 0.7, 0.7), jax.random.key(0))


def oracle(p, x, top_k, normalise):
    """Token by token, expert by expert, in float64; returns outputs and chosen experts."""
    p = {name: np.asarray(w, np.float64) for name, w in p.items()}
    x = np.asarray(x, np.float64)
    out, chosen = np.zeros_like(x), []
    for row in np.ndindex(x.shape[:2]):
        scores = x[row] @ p["router"]
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        best = np.argsort(-probs)[:top_k]
        total = probs[best].sum() if normalise else 1.0
        for e in best:
            gate = x[row] @ p["gate"][e]
            hidden = gate / (1 + np.exp(-gate)) * (x[row] @ p["up"][e])
            out[row] += probs[e] / total * (hidden @ p["down"][e])
        chosen.append(best)
    return out, np.array(chosen).reshape(*x.shape[:2], top_k)


@pytest.mark.parametrize("form", ["dense", "grouped"])
@pytest.mark.parametrize("kernels", ["xla", "cpu"])
@pytest.mark.parametrize(("top_k", "normalise"), [(1, False), (2, True), (3, False), (5, True)])
def test_experts_equal_the_oracle(form, kernels, top_k, normalise):
    cfg = Moe(num_experts=E, top_k=top_k, normalise_top_k=normalise, form=form)
    p, x = make_params(), normal(0, B, T, D)
    y, aux = jax.jit(lambda p, x: moe(cfg, p, x, kernels))(p, x)
    expected, chosen = oracle(p, x, top_k, normalise)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(aux["experts"], chosen)
    np.testing.assert_allclose(aux["router_logits"], x @ p["router"], rtol=1e-4, atol=1e-5)


def gradients(cfg, kernels, p, x, dtype=jnp.float32):
    def loss(p, x):
        y, aux = moe(cfg, p, x, kernels)
        return jnp.sum(y.astype(jnp.float32) * weights) + jnp.sum(aux["router_logits"] ** 2)

    weights = normal(7, *x.shape)
    p = {name: w if name == "router" else w.astype(dtype) for name, w in p.items()}
    return jax.jit(jax.grad(loss, (0, 1)))(p, x.astype(dtype))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kernels", ["xla", "cpu"])
def test_the_forms_have_the_same_gradients(normalise, kernels):
    cfg = Moe(num_experts=E, top_k=2, normalise_top_k=normalise)
    p, x = make_params(), normal(0, B, T, D)
    dense, grouped = (
        gradients(dataclasses.replace(cfg, form=form), kernels, p, x)
        for form in ("dense", "grouped")
    )
    chex.assert_trees_all_close(dense, grouped, rtol=1e-4, atol=1e-4)
    for leaf in jax.tree.leaves(grouped):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-3


def test_the_forms_agree_in_bfloat16():
    cfg, p, x = Moe(num_experts=E, top_k=2), make_params(), normal(0, B, T, D)
    x = x.astype(jnp.bfloat16).astype(jnp.float32)  # The same experts for both precisions.
    exact = gradients(dataclasses.replace(cfg, form="dense"), "xla", p, x)
    for form in ("dense", "grouped"):
        for kernels in ("xla", "cpu"):
            got = gradients(dataclasses.replace(cfg, form=form), kernels, p, x, jnp.bfloat16)
            for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(got), strict=True):
                apart = np.linalg.norm(a - b.astype(jnp.float32)) / np.linalg.norm(a)
                assert apart < 0.02, (form, kernels)


def test_all_tokens_to_one_expert():
    # Groups of no tokens beside one of all: nothing is dropped.
    cfg = Moe(num_experts=E, top_k=1)
    p = make_params()
    p["router"] = jnp.zeros((D, E)).at[:, 3].set(1.0)
    x = jnp.abs(normal(0, B, T, D))
    run = jax.jit(moe, static_argnums=(0, 3))
    outs = [run(dataclasses.replace(cfg, form=f), p, x, "xla") for f in ("dense", "grouped")]
    assert (np.asarray(outs[0][1]["experts"]) == 3).all()
    np.testing.assert_allclose(outs[0][0], outs[1][0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outs[1][0], oracle(p, x, 1, False)[0], rtol=1e-4, atol=1e-4)


def test_routing_is_float32_for_bfloat16_inputs():
    x = normal(0, B, T, D).astype(jnp.bfloat16)
    weights, _, logits = route(Moe(num_experts=E, top_k=2), make_params()["router"], x)
    assert weights.dtype == logits.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(make_params()["router"], np.float64)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


# On meshes.


@pytest.fixture(scope="module")
def on_meshes():
    out = run_python(REPO / "tests/fixtures/moe_meshes.py", timeout=3000)
    return json.loads(out.splitlines()[-1])


def test_experts_on_a_mesh_equal_one_device(on_meshes):
    """Values and gradients; also where one expert gets every token of all devices."""
    for name, found in on_meshes["meshes"].items():
        assert found["apart"] < (0.02 if name == "bfloat16" else 1e-5), name
        assert found["all_to_all"] == ("fsdp 4" not in name), name


def test_what_finds_no_room_is_dropped_and_counted(on_meshes):
    found = on_meshes["dropped"]
    assert 0.1 < found["lost"] / found["of"] < 0.9
    assert found["counted"] and found["apart"] < 1e-4


def test_what_the_mesh_does_not_divide(on_meshes):
    error, apart, experts, width = on_meshes["errors"]
    assert "does not cut 3 x 8 tokens evenly" in error
    assert apart < 1e-5
    assert experts.startswith("model.moe.num_experts is 12, mesh.expert is 8;")
    assert width.startswith("model.d_ff is 7, mesh.tensor is 2;")


@pytest.mark.parametrize(
    ("factor", "rows"), [(0.0, 64), (1.0, 16), (1.5, 24), (100.0, 64), (1e-9, 1)]
)
def test_room_is_over_that_of_even_routing(factor, rows):
    assert room(64, 8, 2, factor) == rows
    assert room(64, 2, 8, 1.0) == 64  # Eight experts a token on two devices: all go to both.


@pytest.mark.parametrize("form", ["auto", "all_to_all"])
def test_without_a_mesh_nothing_is_sent(form):
    cfg = Moe(num_experts=E, top_k=2, form=form, capacity_factor=0.5)
    y, aux = jax.jit(moe, static_argnums=(0, 3))(cfg, make_params(), normal(0, B, T, D), "xla")
    expected, _ = oracle(make_params(), normal(0, B, T, D), 2, False)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert not aux["dropped"].any()


# Losses.

LAYERS, K = 3, 2
LOSS = Moe(num_experts=E, top_k=K, balance=0.5, router_z=0.25)


def routed(seed=0, batch=4):
    """Outputs of a router, and a batch with padding."""
    logits = normal(seed, LAYERS, batch, T, E)
    segments = np.ones((batch, T), np.int32)
    segments[0, 4:], segments[2, 1:] = 0, 0
    _, experts = jax.lax.top_k(logits, K)
    aux = {"router_logits": logits, "experts": experts}
    return Outputs(jnp.zeros(()), {}, aux=aux), {"segment_ids": jnp.asarray(segments)}


def np_losses(logits, segments):
    """Balance and z-loss by loops; the first is `load_balancing_loss_func` of transformers."""
    counts, probs, squares, n = np.zeros(E), np.zeros(E), 0.0, 0
    for layer in np.asarray(logits, np.float64):
        for scores, segment in zip(layer.reshape(-1, E), segments.reshape(-1), strict=True):
            if segment == 0:
                continue
            p = np.exp(scores) / np.exp(scores).sum()
            counts[np.argsort(-p)[:K]] += 1
            probs += p
            squares += np.log(np.exp(scores).sum()) ** 2
            n += 1
    return E * np.sum(counts / n * probs / n), squares / n


def test_losses_equal_the_oracle():
    outputs, batch = routed()
    objective = router_losses(LOSS)
    sums, metrics, _ = objective.terms(outputs, {}, batch, None, None, 0)
    counts = objective.denominators(batch)
    expected = np_losses(outputs.aux["router_logits"], np.asarray(batch["segment_ids"]))
    for name, value in zip(("balance", "router_z"), expected, strict=True):
        assert float(sums[name] / counts[name]) == pytest.approx(value, rel=1e-5)
        assert float(metrics[name][0] / metrics[name][1]) == pytest.approx(value, rel=1e-5)
    weights = {name: schedule(0) for name, schedule in objective.coefficients.items()}
    assert weights == {"balance": 0.5, "router_z": 0.25}


def test_even_routing_gives_the_least_balance_loss_and_metric_one():
    logits = jnp.zeros((1, 1, E, E))
    experts = jnp.stack([jnp.arange(E), (jnp.arange(E) + 1) % E], -1)[None, None]
    outputs = Outputs(jnp.zeros(()), {}, aux={"router_logits": logits, "experts": experts})
    batch = {"segment_ids": jnp.ones((1, E), jnp.int32)}
    sums, metrics, _ = router_losses(LOSS).terms(outputs, {}, batch, None, None, 0)
    assert float(sums["balance"]) / E == pytest.approx(K)
    assert float(metrics["busiest_expert"][0] / metrics["busiest_expert"][1]) == pytest.approx(1.0)


def test_dropped_is_the_share_of_assignments():
    outputs, batch = routed()
    dropped = jnp.asarray(np.random.default_rng(1).integers(0, K + 1, (LAYERS, 4, T)))
    outputs = outputs.replace(aux=outputs.aux | {"dropped": dropped})
    _, metrics, _ = router_losses(LOSS).terms(outputs, {}, batch, None, None, 0)
    real = np.asarray(batch["segment_ids"]) > 0
    expected = np.asarray(dropped)[:, real].sum() / (LAYERS * K * real.sum())
    assert float(metrics["dropped"][0] / metrics["dropped"][1]) == pytest.approx(expected)


def test_a_batch_of_padding_adds_nothing():
    outputs, batch = routed()
    batch = {"segment_ids": jnp.zeros_like(batch["segment_ids"])}
    sums, _, _ = router_losses(LOSS).terms(outputs, {}, batch, None, None, 0)
    assert [float(s) for s in sums.values()] == [0.0, 0.0]


def test_a_model_without_experts_is_refused():
    with pytest.raises(UserError, match="model.moe"):
        router_losses(LOSS).terms(Outputs(jnp.zeros(()), {}), {}, routed()[1], None, None, 0)


MOE = Moe(num_experts=4, top_k=2, balance=0.1, router_z=0.1)
CFG = decoder.ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_ff=12, init_std=0.3, moe=MOE
)


def batch_of(rows):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (rows, 9)).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:]),
        "positions": jnp.tile(jnp.arange(8)[None], (rows, 1)),
        "segment_ids": jnp.ones((rows, 8), jnp.int32), "loss_weights": jnp.ones((rows, 8)),
    }  # fmt: skip


def train(moe_cfg, accumulate=1, steps=1):
    """Gradient steps with the phases that the recipe makes; returns the last metrics and state."""
    cfg = dataclasses.replace(CFG, moe=moe_cfg)
    phase, = make_phases(
        NextToken(), steps=steps, optimiser=optax.sgd(0.5), student_layers=2, moe=moe_cfg
    )  # fmt: skip
    forward = lambda p, b, c, key: decoder.forward(p["model"], cfg, b, capture=c)  # noqa: E731
    params = P.initialise(decoder.specs(cfg), jax.random.key(0))
    state = state_lib.create({"model": params}, (phase,))
    step = jax.jit(make_train_step(forward, phase, key=jax.random.key(1), accumulate=accumulate))
    rows = []
    for _ in range(steps):
        state, metrics = step(state, {}, batch_of(4))
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state


def test_training_balances_the_experts():
    strong = dataclasses.replace(MOE, balance=1.0, router_z=0.0)
    none = dataclasses.replace(MOE, balance=0.0, router_z=0.0)
    with_loss, without = (train(m, steps=30)[0] for m in (strong, none))
    assert with_loss[0]["balance"] == without[0]["balance"] > 2.02
    assert with_loss[-1]["balance"] < 2.02 < without[-1]["balance"]
    assert with_loss[-1]["nll"] < with_loss[0]["nll"]


def test_accumulation_is_the_mean_over_micro_batches():
    """Every other term is exact; the balance loss counts assignments a micro-batch."""
    (whole,), _ = train(MOE)
    (halves,), _ = train(MOE, accumulate=2)
    for name in ("nll", "router_z"):
        assert halves[name] == pytest.approx(whole[name], rel=1e-5)
    params = P.initialise(decoder.specs(CFG), jax.random.key(0))
    out = jax.jit(lambda b: decoder.forward(params, CFG, b))(batch_of(4))
    parts = [np_balance(out.aux["router_logits"][:, rows::2]) for rows in (0, 1)]
    assert halves["balance"] == pytest.approx(np.mean(parts), rel=1e-4)


def np_balance(logits):
    logits = np.asarray(logits, np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-probs, axis=-1)[..., :2]
    share = np.bincount(chosen.reshape(-1), minlength=4) / probs[..., 0].size
    return 4 * np.sum(share * probs.reshape(-1, 4).mean(0))


def test_the_losses_join_next_token_prediction():
    both = combine(next_token(), router_losses(MOE))
    assert set(both.coefficients) == {"nll", "balance", "router_z"}
    assert set(both.needs) == {"tokens", "targets", "loss_weights", "segment_ids"}


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_grouped_form_lowers_for(platform):
    cfg, x = Moe(num_experts=E, top_k=2, form="grouped"), normal(0, B, T, D)
    total = jax.grad(lambda p, x: jnp.sum(moe(cfg, p, x, "xla")[0]))
    text = jax.jit(total).trace(make_params(), x).lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_dot" in text
