"""LayerSkip's rates, weights and curricula by hand; its forward and loss against slow oracles."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from depth.models import GOLDEN, SCANNED, random_model, rows

from jaxreason.core.errors import UserError
from jaxreason.core.objective import weighted_total
from jaxreason.core.outputs import Outputs
from jaxreason.core.params import initialise
from jaxreason.depth import exits
from jaxreason.depth.decision import keep_wrap
from jaxreason.depth.layerskip import (
    LayerSkip,
    LayerSkipPretraining,
    LayerSkipRecipe,
    dropout_rates,
    enabled,
    exits_a_step,
    front,
    loss_scales,
    time_scale,
)
from jaxreason.models import decoder
from jaxreason.nn import cross_entropy as cross_entropy_module
from jaxreason.nn.norm import rms_norm
from jaxreason.objectives.lm import next_token
from jaxreason.train import state as state_lib
from jaxreason.train.phase import Phase
from jaxreason.train.step import make_train_step

L = GOLDEN.num_layers


def layers_on(cfg, num_layers, steps, step):
    return set(np.flatnonzero(np.asarray(enabled(cfg, num_layers, steps, step))).tolist())


def test_dropout_rises_exponentially_over_layers_and_time():
    np.testing.assert_allclose(dropout_rates(0.5, 4), [0, 0.129961, 0.293701, 0.5], atol=1e-6)
    for l, rate in enumerate(dropout_rates(0.2, 24)):
        assert rate == pytest.approx(0.2 * (math.exp(l * math.log(2) / 23) - 1))
    got = [float(time_scale(5, t)) for t in range(5)]
    np.testing.assert_allclose(got, [0, 0.189207, 0.414214, 0.681793, 1], atol=1e-6)


def test_weights_by_hand():
    every = functools.partial(LayerSkipRecipe, curriculum="none")
    for cfg, num_layers, expected in (
        (every(e_scale=1.0), 5, [0, 1, 3, 6, 10]),
        (every(e_scale=0.5), 4, [0, 0.5, 1.5, 4.5]),
        (every(e_scale=0.0), 4, [0, 0, 0, 3]),
        (every(e_scale=0.5, scale="uniform"), 4, [0.5, 0.5, 0.5, 1]),
        (every(e_scale=0.5, scale="linear"), 4, [0.5, 1, 1.5, 4]),
        (every(e_scale=0.5, scale="sum"), 4, [0.5, 1.5, 3, 10]),
        (every(), 1, [1]),
    ):
        got = np.asarray(loss_scales(cfg, num_layers, 9, 2))
        np.testing.assert_allclose(got, np.array(expected) / sum(expected), rtol=1e-6)
    # The official sum is over the enabled layers: 0, 2 and 4 of 5 give 1, 1 + 3 and 1 + 3 + 5.
    turns = LayerSkipRecipe(scale="sum", interval=2)
    got = np.asarray(loss_scales(turns, 5, 9, 0))
    np.testing.assert_allclose(got, np.array([1, 0, 4, 0, 9]) / 14, rtol=1e-6)
    # A turn of the first layer alone: nothing has a weight, and nothing is divided by zero.
    alone = LayerSkipRecipe(interval=4, last_layer="curriculum")
    assert np.asarray(loss_scales(alone, 4, 9, 0)).tolist() == [0, 0, 0, 0]
    assert np.asarray(loss_scales(alone, 4, 9, 2)).tolist() == [0, 0, 1, 0]


def test_curricula_by_hand():
    turns = LayerSkipRecipe(interval=2, last_layer="curriculum")
    assert [layers_on(turns, 5, 9, t) for t in (0, 1, 2, 5)] == [
        {0, 2, 4}, {0, 1, 3}, {1, 2, 4}, {0, 2, 4},
    ]  # fmt: skip
    always = dataclasses.replace(turns, last_layer="always")
    assert layers_on(always, 5, 9, 1) == {0, 1, 3, 4}
    # T/2L = 2 steps a layer, from the last down; the official code waits a turn and a step longer.
    gradual = LayerSkipRecipe(curriculum="gradual")
    assert [min(layers_on(gradual, 4, 16, t)) for t in range(8)] == [3, 3, 2, 2, 1, 1, 0, 0]
    late = LayerSkipRecipe(curriculum="gradual_official")
    first = [min(layers_on(late, 4, 16, t)) for t in range(11)]
    assert first == [3, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0]
    assert layers_on(LayerSkipRecipe(curriculum="none"), 3, 9, 0) == {0, 1, 2}
    assert exits_a_step(gradual, 4, 16) == (2 * 1 + 12 * 2) / 16  # The first layer's e is 0.


def test_curricula_are_those_of_the_official_loop():
    """A list of booleans that is rolled, or filled, after each step, as torchtune's classes do."""
    for num_layers, steps, interval in ((6, 13, 4), (5, 20, 5), (8, 11, 3), (4, 24, 1)):
        turns = LayerSkipRecipe(interval=interval)
        late = LayerSkipRecipe(curriculum="gradual_official", gradual_share=0.75)
        rolled = np.arange(num_layers) % interval == 0
        grown = np.zeros(num_layers, bool)
        for step in range(steps):
            for cfg, mask in ((turns, rolled), (late, grown)):
                expected = set(np.flatnonzero(mask).tolist()) | {num_layers - 1}
                assert layers_on(cfg, num_layers, steps, step) == expected
            rolled = np.roll(rolled, 1)
            share = step / steps
            grown = np.array([share >= 0.75 * (num_layers - i) / num_layers
                              for i in range(num_layers)])  # fmt: skip
        open_turns = dataclasses.replace(turns, last_layer="curriculum")
        counts = {len(layers_on(open_turns, num_layers, steps, t)) for t in range(steps)}
        assert counts == {math.ceil(num_layers / interval)}


def batch_of(ids=(7, 3, 11, 5)):
    """Rows of different lengths with targets; `ids` are their examples."""
    rng = np.random.default_rng(1)
    lengths = [9, 6, 12, 8][: len(ids)]
    batch = dict(rows([rng.integers(0, 37, n).tolist() for n in lengths], [3, 2, 4, 1][: len(ids)]))
    batch["targets"] = jnp.asarray(rng.integers(0, 37, (len(ids), 12)).astype(np.int32))
    real = (batch["segment_ids"] > 0).astype(jnp.float32)
    batch["loss_weights"] = real * (1.0 - batch["prompt_mask"])
    batch["example_id"] = jnp.tile(jnp.asarray(ids, jnp.int32)[:, None], (1, 12))
    return batch


def trained(params, cfg, batch, key, *, capture=(), model=SCANNED, steps=0):
    def run(wrap):
        return decoder.forward(params, model, batch, capture=capture, wrap=wrap)

    return exits.forward(cfg, model, params, batch, run, key=key, steps=steps)


def test_dropped_layers_are_the_identity_and_the_others_the_model():
    params, _ = random_model()
    cfg, batch, key = LayerSkipRecipe(dropout=1.0), batch_of(), jax.random.key(4)
    rates = jnp.asarray(dropout_rates(1.0, L), jnp.float32)
    keep = exits.dropout_wrap(rates, key, batch).per_layer.T
    assert keep[:, 0].all() and not keep[:, -1].any() and 0 < keep[:, 1:-1].mean() < 1
    assert len({tuple(row) for row in np.asarray(keep).tolist()}) > 1  # Not the same for all rows.
    got = jax.jit(lambda p: trained(p, cfg, batch, key).final)(params)
    want = jax.jit(lambda p: decoder.forward(p, SCANNED, batch, wrap=keep_wrap(keep)).final)(params)
    np.testing.assert_array_equal(got, want)
    wraps, outputs = [], Outputs(got, {})
    for settings, given in (
        (LayerSkipRecipe(dropout=0.0), key),
        (cfg, None),
    ):  # The model as it is.
        exits.forward(settings, SCANNED, params, batch, lambda w: wraps.append(w) or outputs,
                      key=given)  # fmt: skip
    assert wraps == [None, None]


def test_a_rows_lot_follows_from_its_example_alone():
    rates = jnp.full(3, 0.3)
    lots = lambda key, ids: np.asarray(  # noqa: E731
        exits.dropout_wrap(rates, key, {"example_id": jnp.asarray(ids)[:, None]}).per_layer
    )
    ids = np.arange(4000, dtype=np.int32)
    one = lots(jax.random.key(0), ids)
    np.testing.assert_array_equal(one[:, 100:200][:, ::-1], lots(jax.random.key(0), ids[199:99:-1]))
    # 4000 draws at 0.3: four standard deviations are 0.029. Layers and steps draw anew.
    np.testing.assert_allclose(one.mean(axis=1), 0.7, atol=0.03)
    other = lots(jax.random.fold_in(jax.random.key(0), 1), ids)
    for a, b in ((one[0], one[1]), (one[0], other[0])):
        assert (a & b).mean() == pytest.approx(0.49, abs=0.035)


def test_rates_grow_with_time_in_pretraining():
    params, _ = random_model()
    batch, key = batch_of(), jax.random.key(4)

    def kept(cfg, step):
        wraps, outputs = [], Outputs(jnp.zeros((1, 1, 1)), {})
        exits.forward(cfg, SCANNED, params, {**batch, "step": jnp.int32(step)},
                      lambda w: wraps.append(w) or outputs, key=key, steps=9)  # fmt: skip
        return np.asarray(wraps[0].per_layer)

    grows = LayerSkipPretraining(dropout=1.0)
    assert kept(grows, 0).all()
    counts = [kept(grows, step).sum() for step in range(9)]
    assert counts == sorted(counts, reverse=True) and counts[4] > counts[8]
    for cfg in (LayerSkipRecipe(dropout=1.0), dataclasses.replace(grows, over_time="constant")):
        np.testing.assert_array_equal(kept(grows, 8), kept(cfg, 0))


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layer", "embed_width": 12, "kernels": "cpu"}, {"final_norm": False}]
)
def test_an_exit_is_the_model_without_its_upper_layers(changes):
    cfg = dataclasses.replace(SCANNED, init_std=0.3, **changes)
    params, batch = initialise(decoder.specs(cfg), jax.random.key(2)), batch_of()
    outputs = trained(params, LayerSkip(), batch, None, capture=(3,), model=cfg)
    short = dataclasses.replace(cfg, num_layers=3)
    front_params = {**params, "blocks": jax.tree.map(lambda x: x[:3], params["blocks"])}
    want = decoder.forward(front_params, short, batch)
    np.testing.assert_allclose(outputs.depth(outputs.captured[3]), want.final, rtol=1e-6, atol=1e-6)
    assert front(5, 3) == (True, True, True, False, False)


@jax.jit
@jax.value_and_grad
def slow_loss(params, batch, scales, keep):
    """Equation 5 with all logits of all exits, the layers of `keep` [B,L] for each row."""
    layers = tuple(range(1, L + 1))
    out = decoder.forward(params, SCANNED, batch, capture=layers, wrap=keep_wrap(keep))
    total = 0.0
    for layer in range(L):
        hidden = rms_norm(out.captured[layer + 1], params["final_norm"], GOLDEN.norm_eps, "xla")
        log_p = jax.nn.log_softmax(hidden @ params["unembed"])
        nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        total += scales[layer] * jnp.sum(nll * batch["loss_weights"])
    return total / jnp.sum(batch["loss_weights"])


@pytest.mark.parametrize(
    "cfg",
    [
        LayerSkipRecipe(interval=2, dropout=0.4, last_layer="curriculum", scale="linear"),
        LayerSkipRecipe(curriculum="gradual", scale="sum", e_scale=0.3, dropout=0.0),
    ],
)
def test_the_loss_is_the_sum_over_all_exits(cfg):
    params, _ = random_model()
    batch, key, steps = batch_of(), jax.random.key(5), 8
    objective = exits.with_exits(cfg, next_token(), L, steps)
    rates = jnp.asarray(dropout_rates(cfg.dropout, L), jnp.float32)
    keep = exits.dropout_wrap(rates, key, batch).per_layer.T

    @jax.jit
    def chunked(params, step):
        out = trained(params, cfg, batch, key, capture=objective.captures)
        sums, metrics, _ = objective.terms(out, {}, batch, objective.init_aux(), key, step)
        return weighted_total(objective, sums, objective.denominators(batch), step), metrics

    ours = jax.jit(jax.value_and_grad(chunked, has_aux=True))
    for step in (0, 1, 7):
        (loss, metrics), grads = ours(params, jnp.int32(step))
        scales = loss_scales(cfg, L, steps, step)
        expected, expected_grads = slow_loss(params, batch, scales, keep)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)
        count, tokens = metrics["exits_enabled"]
        assert count / tokens == pytest.approx((np.asarray(scales)[:-1] > 0).sum())


def test_logits_are_made_for_the_enabled_exits_alone(monkeypatch):
    params, _ = random_model()
    batch, made, logits = batch_of(), [], cross_entropy_module._logits
    batch["loss_weights"] = jnp.ones_like(batch["loss_weights"])

    def counted(hidden, *args):
        jax.debug.callback(lambda: made.append(hidden.shape[0] * hidden.shape[1]))
        return logits(hidden, *args)

    monkeypatch.setattr(cross_entropy_module, "_logits", counted)
    tokens = batch["tokens"].size

    def exits_at(cfg, steps):
        """How many exits' worth of logits a loss and its gradient make, the last layer apart."""
        objective = exits.with_exits(cfg, next_token(), L, 10)

        @jax.jit
        @jax.grad
        def gradient(params, step):
            out = trained(params, cfg, batch, None, capture=objective.captures)
            sums, _, _ = objective.terms(out, {}, batch, (None, None), jax.random.key(0), step)
            return weighted_total(objective, sums, objective.denominators(batch), step)

        found = []
        for step in steps:
            made.clear()
            jax.block_until_ready(gradient(params, jnp.int32(step)))
            jax.effects_barrier()
            found.append(sum(made) / tokens - 1)
        return found

    # {0, 1, 3} and {1, 2, 4} of a list that is always of three; the last is the plain loss.
    assert exits_at(LayerSkipRecipe(interval=2), (1, 2)) == [2, 2]
    none, some, every = exits_at(LayerSkipRecipe(curriculum="gradual"), (0, 1, 9))
    # Chunks may hold tokens of two exits, an eighth of all at most. The first exit's e is 0.
    assert none == 0 and 1 <= some <= 1.5 and every == L - 2
    assert exits.with_exits(LayerSkipRecipe(e_scale=0.0), next_token(), L, 10).captures == ()


def test_accumulation_equals_the_big_batch():
    params, _ = random_model()
    cfg, steps = LayerSkipRecipe(interval=2, dropout=0.5), 6
    objective = exits.with_exits(cfg, next_token(), L, steps)

    def forward(params, batch, capture, key=None):
        return trained(params["model"], cfg, batch, key, capture=capture)

    phase = Phase("p", steps, objective, {"model": optax.sgd(0.1)})
    state = dataclasses.replace(state_lib.create({"model": params}, (phase,)), step=jnp.int32(3))
    ends = []
    for accumulate in (1, 4):
        step = make_train_step(forward, phase, key=jax.random.key(1), accumulate=accumulate)
        ends.append(jax.jit(step)(state, {}, batch_of()))
    (big, big_metrics), (small, metrics) = ends
    for a, b in zip(jax.tree.leaves(big.params), jax.tree.leaves(small.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for name in ("total", "nll", "exits", "exits_enabled", "grad_norm"):
        np.testing.assert_allclose(metrics[name], big_metrics[name], rtol=1e-5)
    assert big_metrics["exits_enabled"] == 2  # Layers 1 and 3, beside the last.


def test_wrong_settings_are_refused():
    for cfg, message in (
        (LayerSkipRecipe(dropout=1.5), "dropout is 1.5; expected 0 to 1"),
        (LayerSkipRecipe(e_scale=-0.1), "e_scale is -0.1; expected 0 to 1"),
        (LayerSkipRecipe(interval=0), "interval is 0"),
        (LayerSkipRecipe(gradual_share=0.0), "gradual_share is 0.0"),
        (LayerSkipRecipe(e_scale=0.0, last_layer="curriculum"), "set last_layer to always"),
    ):
        with pytest.raises(UserError, match=message):
            cfg.validate()
    with pytest.raises(UserError, match="interval is 16, the model has 5 layers"):
        LayerSkip().check(5)
    for kept in (0, 6):
        with pytest.raises(UserError, match=f"kept is {kept}; expected 1 to 5"):
            front(5, kept)
