"""Skipped layers in the decoder: against Hugging Face, against deleted layers, trained = run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from depth.models import (
    ALL,
    GOLDEN,
    SCANNED,
    cached,
    forced,
    plain,
    random_model,
    rows,
    static,
)
from goldens import golden, llama_params

from jaxreason.depth import first
from jaxreason.depth.decision import (
    Decision,
    Reading,
    Skipper,
    decide,
    keep_wrap,
    over_threshold,
)
from jaxreason.models import decoder

SCOPES = ("everywhere", "decode_only")
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 37, n).tolist() for n in (5, 1, 9, 7, 3, 0)]  # The last is empty.
COMPLETIONS = RNG.integers(0, 37, (6, 4))
FULL = [p + c.tolist() for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
BATCH = rows(FULL, list(map(len, PROMPTS)), length=16)
REAL = np.asarray(BATCH["segment_ids"]) > 0
PROMPTED = REAL & (np.arange(6) < 5)[:, None]  # Without a prompt, every layer runs.


def config(scope, **change):
    return first.FirstConfig(scope=scope, **change)


def without_layers(params, skipped):
    kept = np.array([layer for layer in range(5) if layer not in skipped])
    return {**params, "blocks": jax.tree.map(lambda leaf: leaf[kept], params["blocks"])}


def short_model(layers):
    return dataclasses.replace(SCANNED, num_layers=layers)


def test_skipped_everywhere_equals_hugging_face():
    z = golden("llama_tiny_skip_lora")
    params, ids = llama_params(z, 5), z["ids"].tolist()
    assert z["skip"].tolist() == [1, 3]
    cfg = config("everywhere", decision=ALL)
    got, gates = forced(params, cfg, static(), rows(ids, [9, 9]), model=GOLDEN)
    np.testing.assert_allclose(got, z["logits_skip_everywhere"], atol=1e-4)
    assert gates.keep[:, 0, 1].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("scope", "name"),
    [("everywhere", "A_skip_everywhere"), ("decode_only", "B_skip_decode_only")],
)
def test_greedy_cached_decode_equals_hugging_face(scope, name):
    z = golden("llama_tiny_skip_lora")
    skipper = Skipper(static(), scope, ALL)
    got, keep, tokens = cached(llama_params(z, 5), skipper, z["ids"].tolist(), 6)
    np.testing.assert_allclose(got, z[f"dec_logits_{name}"], atol=1e-4)
    np.testing.assert_array_equal(tokens, z[f"dec_tokens_{name}"])
    assert keep.tolist() == [[True, False, True, False, True]] * 2
    # The two scopes choose other tokens here, so neither passes for the other.
    other = {"A": "B_skip_decode_only", "B": "A_skip_everywhere"}[name[0]]
    assert (tokens != z[f"dec_tokens_{other}"]).any()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("hard", [True, False])
def test_saturated_at_keep_is_the_base_model(scope, hard):
    params, _ = random_model()
    got, _ = forced(params, config(scope, decision=ALL), static(range(5)), BATCH, hard=hard)
    np.testing.assert_array_equal(np.asarray(got)[REAL], np.asarray(plain(params, BATCH))[REAL])


@pytest.mark.parametrize("skipped", [(1,), (0, 3)])
def test_saturated_at_skip_is_the_model_without_those_layers(skipped):
    params, _ = random_model()
    kept = tuple(layer for layer in range(5) if layer not in skipped)
    got, _ = forced(params, config("everywhere", decision=ALL), static(kept), BATCH)
    expected = plain(without_layers(params, skipped), BATCH, short_model(len(kept)))
    np.testing.assert_array_equal(np.asarray(got)[PROMPTED], np.asarray(expected)[PROMPTED])


@pytest.mark.parametrize(
    ("scope", "decision"),
    [
        ("everywhere", ALL),
        ("decode_only", ALL),
        ("decode_only", Decision(rule="top", kept=3, normalise=False)),
    ],
)
def test_what_is_trained_is_what_runs(scope, decision):
    params, routers = random_model()
    cfg = config(scope, decision=decision)
    got, keep, _ = cached(params, first.skipper(cfg, routers), PROMPTS, COMPLETIONS)
    trained, gates = forced(params, cfg, routers, BATCH)
    np.testing.assert_array_equal(gates.keep[:, :, 1].T, keep)
    for row, prompt in enumerate(PROMPTS):
        at = max(len(prompt) - 1, 0)
        expected = trained[row, at : len(prompt) + 4]
        np.testing.assert_allclose(got[row, -len(expected) :], expected, atol=2e-5)
    assert keep[-1].all()  # Of the empty prompt.
    # Rows differ, every layer but those always kept is somewhere skipped, and it matters.
    assert len({tuple(row) for row in keep.tolist()}) > 2
    base = plain(params, BATCH)
    skipping = np.flatnonzero(~np.asarray(keep).all(axis=1))
    after = [(row, len(PROMPTS[row])) for row in skipping]
    assert all(np.abs(trained[i] - base[i]).max() > 1e-2 for i in after)


def test_under_decode_only_prompts_run_every_layer():
    params, _ = random_model()
    got, _ = forced(params, config("decode_only", decision=ALL), static((0,)), BATCH)
    prompt = np.asarray(BATCH["prompt_mask"]) > 0
    expected = np.asarray(plain(params, BATCH))
    np.testing.assert_array_equal(np.asarray(got)[prompt], expected[prompt])
    completion = PROMPTED & ~prompt
    assert np.abs(np.asarray(got) - expected)[completion].max(axis=-1).min() > 1e-2


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("hard", [True, False])
def test_packed_segments_equal_separate_rows(scope, hard):
    params, routers = random_model()
    cfg = config(scope, decision=ALL)
    apart, alone = forced(params, cfg, routers, BATCH, hard=hard)
    packed = rows([sum(FULL[:3], []), sum(FULL[3:], [])], [0, 0], length=32)
    packed = {k: np.array(v) for k, v in packed.items()}
    places = []
    for i, tokens in enumerate(FULL):
        row, number = divmod(i, 3)
        at = sum(map(len, FULL[row * 3 : i]))
        span = slice(at, at + len(tokens))
        packed["segment_ids"][row, span] = number + 1
        packed["positions"][row, span] = np.arange(len(tokens))
        packed["prompt_mask"][row, at : at + len(PROMPTS[i])] = 1
        places.append((row, number + 1, span))
    together, gates = forced(params, cfg, routers, packed, hard=hard)
    for i, (row, number, span) in enumerate(places):
        np.testing.assert_allclose(together[row, span], apart[i, : len(FULL[i])], atol=2e-5)
        np.testing.assert_allclose(gates.p[:, row, number], alone.p[:, i, 1], atol=1e-6)
        np.testing.assert_array_equal(gates.keep[:, row, number], alone.keep[:, i, 1])


@pytest.mark.parametrize("scope", SCOPES)
def test_permuted_rows_permute_decisions_and_padding_changes_nothing(scope):
    params, routers = random_model()
    skipper = Skipper(routers, scope, ALL)
    logits, keep, _ = cached(params, skipper, PROMPTS, COMPLETIONS)
    order = [3, 0, 5, 1, 4, 2]
    permuted, keep_permuted, _ = cached(
        params, skipper, [PROMPTS[i] for i in order], COMPLETIONS[order]
    )
    np.testing.assert_array_equal(keep_permuted, keep[np.array(order)])
    np.testing.assert_allclose(permuted, logits[np.array(order)], atol=1e-5)
    # The longest prompt sets the padding of all: alone, the others have none.
    one, own, _ = cached(params, skipper, PROMPTS[:1], COMPLETIONS[:1])
    np.testing.assert_array_equal(own[0], keep[0])
    np.testing.assert_allclose(one[0], logits[0], atol=1e-5)


def test_prompts_read_in_pieces_are_decided_alike():
    params, routers = random_model()
    skipper = Skipper(routers, "decode_only", ALL)
    whole, keep, _ = cached(params, skipper, PROMPTS, COMPLETIONS)
    pieces, keep_pieces, _ = cached(params, skipper, PROMPTS, COMPLETIONS, pieces=3)
    np.testing.assert_array_equal(keep_pieces, keep)
    np.testing.assert_allclose(pieces, whole, atol=1e-5)


@pytest.mark.parametrize("rule", ["threshold", "top"])
def test_degenerate_prompts_keep_every_layer(rule):
    decision = Decision(rule=rule, kept=2)
    total = jnp.asarray([[0.0, jnp.nan, 0.1, 0.9]] * 5)
    count = jnp.asarray([[0.0, 2.0, 1.0, 1.0]] * 5)
    reading = Reading(total, count, jnp.ones((5, 4), bool))
    keep = decide(Skipper(static(), "decode_only", decision), reading)
    assert keep[:2].all()
    assert keep[2].tolist() == ([True, False, False, False, True])
    assert keep[3].sum() == (5 if rule == "threshold" else 2)


def test_top_keeps_its_number_and_prefers_lower_layers():
    p = jnp.asarray([[0.1, 0.9], [0.5, 0.2], [0.5, 0.3], [0.7, 0.2], [0.0, 0.0]])
    reading = Reading(p, jnp.ones((5, 2)), jnp.ones((5, 2), bool))
    keep = decide(Skipper(static(), "decode_only", Decision(rule="top", kept=4)), reading)
    assert keep.tolist() == [[True, True, False, True, True], [True, True, True, False, True]]
    assert not over_threshold(Decision(), jnp.float32(0.9), jnp.float32(2), jnp.bool_(False))


def test_a_given_set_runs_and_says_what_was_computed():
    params, _ = random_model()
    batch = rows([[1, 2, 3], [4, 5, 6]], [3, 3])
    keep = jnp.asarray([[1, 0, 1, 0, 1], [1, 0, 0, 0, 1]], bool)
    out = jax.jit(lambda p, k: decoder.forward(p, SCANNED, batch, wrap=keep_wrap(k)))(params, keep)
    assert out.depth.tolist() == [True, False, True, False, True]
    for row, skipped in ((0, (1, 3)), (1, (1, 2, 3))):
        short = without_layers(params, skipped)
        expected = plain(short, batch, short_model(5 - len(skipped)))
        np.testing.assert_allclose(decoder.logits(out)[row], expected[row], atol=1e-5)
