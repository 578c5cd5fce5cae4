"""FiRST's training forward and losses against a slow NumPy oracle."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import first as oracle

from jaxreason.core import params as P
from jaxreason.core.errors import UserError
from jaxreason.core.objective import weighted_total
from jaxreason.core.outputs import Outputs
from jaxreason.depth import first, segments
from jaxreason.depth.decision import Decision, Scope

L, D = 4, 6
RNG = np.random.default_rng(3)
MIX = RNG.normal(size=(L, D, D)).astype(np.float32)
ROUTERS = {
    "w": jnp.asarray(RNG.normal(size=(L, D)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=L) * 0.5, jnp.float32),
}
# (prompt tokens, completion tokens) of the segments of two rows; one has no prompt.
LENGTHS = [[(4, 3), (1, 2), (0, 3)], [(2, 5), (5, 1)]]
T = 15


def make_batch():
    segment_ids, prompt_mask = np.zeros((2, T), np.int32), np.zeros((2, T), np.float32)
    x = RNG.normal(size=(2, T, D)).astype(np.float32)
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, (prompt, completion) in enumerate(lengths):
            segment_ids[row, at : at + prompt + completion] = number + 1
            prompt_mask[row, at : at + prompt] = 1
            at += prompt + completion
    batch = {"segment_ids": jnp.asarray(segment_ids), "prompt_mask": jnp.asarray(prompt_mask)}
    return batch, x


BATCH, X = make_batch()


def np_block(layer, h):
    """A causal layer: each token adds a function of the mean of what came before."""
    seen = np.cumsum(h, axis=0) / np.arange(1, len(h) + 1)[:, None]
    return h + np.tanh(seen @ MIX[layer])


def layers_of(x, layers=range(L)):
    """Each layer over packed rows, as a wrap runs it."""
    ids = BATCH["segment_ids"]
    same = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))[None]
    weight = same / jnp.sum(same, axis=2, keepdims=True)

    def run(x, cache, mix):
        seen = jnp.einsum("bts,bsd->btd", weight, x)
        return x + jnp.tanh(seen @ mix), cache, ()

    return [functools.partial(run, mix=jnp.asarray(MIX[layer])) for layer in layers]


def stack(wrap, x, layers=range(L)):
    """The layers over packed rows, through the wrap; returns (states, depth)."""
    aux = []
    for layer, run in zip(layers, layers_of(x, layers), strict=True):
        extra = jax.tree.map(lambda leaf, i=layer: leaf[i], wrap.per_layer)
        x, _, _, own = wrap.apply(run, x, (), extra)
        aux.append(own)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)


def each_segment(row_array):
    """The slices of the packed rows, one a segment, in order."""
    for row, lengths in enumerate(LENGTHS):
        at = 0
        for number, (prompt, completion) in enumerate(lengths):
            yield row, number + 1, row_array[row, at : at + prompt + completion], prompt
            at += prompt + completion


FORMS = [
    {"scope": s, "gate": g, "form": f, "hard": h}
    for s, (g, f, h) in itertools.product(
        ("decode_only", "everywhere"),
        [
            ("sequence", "soft", False), ("token", "soft", False),
            ("sequence", "straight_through", False), ("token", "straight_through", False),
            ("sequence", "soft", True),
        ],
    )
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: "-".join(map(str, f.values())))
def test_gated_layers_equal_the_oracle(form):
    hard = form["hard"]
    cfg = first.FirstConfig(**{k: v for k, v in form.items() if k != "hard"})
    wrap = first.training_wrap(cfg, ROUTERS, BATCH, hard=hard)
    states, gates = jax.jit(lambda x: stack(wrap, x))(jnp.asarray(X))
    decided = set()
    for (row, number, h, prompt), (*_, got, _) in zip(
        each_segment(X), each_segment(np.asarray(states)), strict=True
    ):
        mask = [t < prompt for t in range(len(h))]
        expected, facts = oracle.sequence(np_block, ROUTERS, h, mask, cfg, hard=hard)
        np.testing.assert_allclose(got, expected, atol=2e-5)
        for layer, fact in enumerate(facts):
            np.testing.assert_allclose(gates.p[layer, row, number], fact["p"], atol=1e-6)
            assert bool(gates.keep[layer, row, number]) == fact["keep"]
            decided.add((layer, fact["keep"]))
    assert {(1, False), (2, True)} <= decided or {(1, True), (2, False)} <= decided


@pytest.mark.parametrize("regulariser", ["binary", "l2"])
@pytest.mark.parametrize("rate_over", ["sequence", "batch"])
@pytest.mark.parametrize("penalty_tokens", ["prompt", "valid"])
def test_penalties_equal_the_oracle(regulariser, rate_over, penalty_tokens):
    cfg = first.FirstConfig(
        alpha=0.3, reg_weight=0.01, rate_weight=2.0, rate_target=0.6, regulariser=regulariser,
        rate_over=rate_over, penalty_tokens=penalty_tokens, decision=Decision(always_keep=(0,)),
    )  # fmt: skip
    x, gates = stack(first.training_wrap(cfg, ROUTERS, BATCH, hard=False), jnp.asarray(X))
    objective = first.penalties(cfg, L)
    sums, metrics, _ = objective.terms(Outputs(x, {}, depth=gates), {}, BATCH, None, None, 0)
    denominators = objective.denominators(BATCH)
    facts = [
        oracle.sequence(np_block, ROUTERS, h, [t < n for t in range(len(h))], cfg, hard=False)[1]
        for _, _, h, n in each_segment(X)
        if n  # A segment without a prompt is not penalised.
    ]
    expected = oracle.penalties(facts, ROUTERS, cfg)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name] / denominators[name], value, rtol=1e-5)
    total = 0.3 * expected["keep"] + 0.01 * expected["reg"] + 2.0 * expected["rate"]
    np.testing.assert_allclose(weighted_total(objective, sums, denominators, 0), total, rtol=1e-5)

    def mean(name):
        return float(metrics[name][0] / metrics[name][1])

    routed = [[f["p"] for f in of_layers[1:]] for of_layers in facts]
    np.testing.assert_allclose(mean("depth/p"), np.mean(routed), rtol=1e-5)
    np.testing.assert_allclose(
        mean("depth/distance"), np.mean(np.minimum(routed, 1 - np.array(routed))), rtol=1e-5
    )
    kept = np.mean([[f["keep"] for f in of_layers] for of_layers in facts], axis=0)
    np.testing.assert_allclose(mean("depth/kept_layers"), kept.sum(), rtol=1e-6)
    np.testing.assert_allclose([mean(f"depth/keep_{l:02d}") for l in range(L)], kept, rtol=1e-6)
    np.testing.assert_allclose(mean("depth/penalty"), total, rtol=1e-5)


def test_soft_gates_report_the_layers_that_top_would_keep():
    cfg = first.FirstConfig(decision=Decision(rule="top", kept=3))
    x, gates = stack(first.training_wrap(cfg, ROUTERS, BATCH, hard=False), jnp.asarray(X))
    _, metrics, _ = first.watched(cfg, L).terms(Outputs(x, {}, depth=gates), {}, BATCH, None, 0, 0)
    assert float(metrics["depth/kept_layers"][0] / metrics["depth/kept_layers"][1]) == 3
    has = np.asarray(segments.of_batch(BATCH).has_prompt())
    inner = np.asarray(gates.p)[1:3, has]  # Of layers 1 and 2, the one with the larger p.
    assert float(metrics["depth/keep_01"][0]) == (inner[0] >= inner[1]).sum()


def test_micro_batches_add_up_to_the_batch():
    cfg = first.FirstConfig(rate_weight=1.0, regulariser="l2")
    _, gates = stack(first.training_wrap(cfg, ROUTERS, BATCH, hard=False), jnp.asarray(X))
    objective = first.penalties(cfg, L)

    def terms(rows):
        batch = {name: field[rows] for name, field in BATCH.items()}
        part = dataclasses.replace(
            gates, p=gates.p[:, rows], mean=gates.mean[:, rows], keep=gates.keep[:, rows]
        )
        sums, metrics, _ = objective.terms(
            Outputs(jnp.asarray(X), {}, depth=part), {}, batch, None, None, 0
        )
        return sums, metrics, objective.denominators(batch)

    halves = [terms(slice(row, row + 1)) for row in (0, 1)]
    added = jax.tree.map(lambda a, b: a + b, *halves)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), added, terms(slice(2)))


def test_straight_through_has_the_gradient_of_the_probabilities_at_the_hard_point():
    cfg = first.FirstConfig(form="straight_through", decision=Decision(always_keep=()))
    target = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    @jax.jit
    @jax.grad
    def grad(routers):
        wrap = first.training_wrap(cfg, routers, BATCH, hard=False)
        return jnp.sum((stack(wrap, jnp.asarray(X))[0] - target) ** 2)

    # The last layer's gate moves no later statistic: dL/dp = sum dL/dx . (B(h) - h), by hand.
    hard = first.training_wrap(cfg, ROUTERS, BATCH, hard=True)
    before, _ = stack(hard, jnp.asarray(X), range(L - 1))
    new, _, _ = layers_of(before)[L - 1](before, ())
    last, _ = stack(hard, jnp.asarray(X))
    ids, prompt = np.asarray(BATCH["segment_ids"]), np.asarray(BATCH["prompt_mask"])
    expected = 0.0
    for row, number, _, length in each_segment(X):
        here = (ids[row] == number) & (prompt[row] == 0)
        if not length:
            continue
        slope = np.sum(2 * (last - target)[row][here] * (new - before)[row][here])
        r = oracle.router(ROUTERS["w"][L - 1], ROUTERS["b"][L - 1], np.asarray(before[row]), True)
        first_token = int(np.flatnonzero(ids[row] == number)[0])
        of_prompt = np.array(r[first_token : first_token + length])
        expected += slope * np.mean(of_prompt * (1 - of_prompt))
    np.testing.assert_allclose(grad(ROUTERS)["b"][L - 1], expected, rtol=1e-4)


EXPLORED = {**BATCH, "example_id": 10 * BATCH["segment_ids"] + np.arange(2)[:, None]}


def test_explored_gates_are_drawn_by_example():
    cfg = first.FirstConfig(form="explore", explore=0.4)
    draw = jax.jit(lambda key, batch: first.explored_gates(cfg, key, batch, L))
    drawn = np.asarray(draw(jax.random.key(1), EXPLORED))
    assert drawn.shape == (L, 2, T + 1)
    row = {name: field[1:] for name, field in EXPLORED.items()}  # A micro-batch of one row.
    np.testing.assert_array_equal(draw(jax.random.key(1), row), drawn[:, 1:])
    many = np.stack([draw(jax.random.key(i), EXPLORED)[:, :, 1:3] for i in range(300)])
    assert abs((many < 1).mean() - 0.4) < 0.03
    values = many[many < 1]
    assert abs(values.mean() - 0.5) < 0.02
    assert len(np.unique(values)) > 0.99 * len(values)  # No two layers, examples or steps share.
    with pytest.raises(ValueError, match="key"):
        first.explored_gates(cfg, None, EXPLORED, L)


def test_explored_gates_give_the_probabilities_their_slope():
    """A layer that is drawn is mixed in by its draw; its p moves as that draw would, others not."""
    cfg = first.FirstConfig(form="explore", explore=0.5, decision=Decision(always_keep=(0,)))
    drawn = first.explored_gates(cfg, jax.random.key(3), EXPLORED, L)
    target = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)

    def loss(routers, drawn):
        def run(wrap):
            return Outputs(*stack(wrap, jnp.asarray(X))[:1], {}, depth=None)

        wrap = first.training_wrap(cfg, routers, EXPLORED, hard=False, drawn=drawn)
        return jnp.sum((run(wrap).final - target) ** 2)

    value, (of_routers, of_gates) = jax.jit(jax.value_and_grad(loss, (0, 1)))(ROUTERS, drawn)
    h = jnp.asarray(X)  # Mixed by hand, a layer after the other.
    ids, prompt = BATCH["segment_ids"], BATCH["prompt_mask"] > 0
    has = segments.of_batch(BATCH).has_prompt()
    for layer in range(L):
        new, _, _ = layers_of(h)[layer](h, ())
        gate = drawn[layer] if layer else jnp.ones_like(drawn[layer])
        gate = jnp.take_along_axis(jnp.where(has, gate, 1.0), ids, axis=1)
        gate = jnp.where(prompt | (ids == 0), 1.0, gate)[:, :, None]
        h = gate * new + (1 - gate) * h
    np.testing.assert_allclose(value, jnp.sum((h - target) ** 2), rtol=1e-5)
    # Prompts run every layer, so p and its slope do not depend on the gates.
    free = first.training_wrap(cfg, ROUTERS, EXPLORED, hard=False, drawn=jnp.ones_like(drawn))

    def p_of(b):
        layers = (ROUTERS["w"], b, *free.per_layer[2:])
        return stack(dataclasses.replace(free, per_layer=layers), jnp.asarray(X))[1].p

    slope = jnp.where((drawn < 1) & has[None], of_gates, 0.0)
    expected = jax.vjp(p_of, ROUTERS["b"])[1](slope)[0]
    assert np.abs(expected[1:]).min() > 1e-4
    np.testing.assert_allclose(of_routers["b"], expected, rtol=1e-4, atol=1e-6)


def test_a_later_turn_of_the_user_is_no_prompt():
    ids = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
    mask = jnp.asarray([[1, 1, 0, 1, 0, 1, 1, 0, 1]])
    where = segments.of_batch({"segment_ids": ids, "prompt_mask": mask})
    assert where.prompt.tolist() == [[True, True, False, False, False, True, True, False, False]]
    assert where.has_prompt()[0, :4].tolist() == [False, True, True, False]


def test_routers_start_by_keeping_every_layer():
    cfg = first.FirstConfig(init_std=0.01)
    routers = P.initialise(first.specs(cfg, L, D), jax.random.key(0))
    assert routers["w"].shape == (L, D) and routers["b"].shape == (L,)
    _, gates = stack(first.training_wrap(cfg, routers, BATCH, hard=False), jnp.asarray(X))
    has = np.asarray(segments.of_batch(BATCH).has_prompt())
    assert np.asarray(gates.p)[:, has].min() > 0.97


def test_wrong_settings_are_user_errors():
    for cfg in (
        first.FirstConfig(alpha=-1.0),
        first.FirstConfig(rate_target=1.5),
        first.FirstConfig(form="explore", explore=0.0),
        first.FirstConfig(form="explore", gate="token"),
    ):
        with pytest.raises(UserError):
            cfg.validate()
    wrong: list[tuple[Decision, Scope]] = [
        (Decision(rule="top", kept=3), "everywhere"),
        (Decision(rule="top", kept=1), "decode_only"),
        (Decision(rule="top", kept=5), "decode_only"),
        (Decision(always_keep=(7,)), "decode_only"),
        (Decision(threshold=1.5), "decode_only"),
    ]
    for decision, scope in wrong:
        with pytest.raises(UserError):
            decision.check(L, scope)
