"""Layers that are skipped in generation: against goldens, deleted layers, and the training form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import golden, llama_params
from rollout_model import ragged_prompts, tiny_model
from skip_model import (
    LAYERS,
    SCOPES,
    WIDTH,
    constant,
    deleted,
    plain,
    random_routers,
    tiny,
    with_depth,
)

from jaxreason.core.errors import UserError
from jaxreason.depth import first
from jaxreason.depth.decision import Decision, Skipper, keep_wrap, static_routers
from jaxreason.models import decoder
from jaxreason.models.decoder import ModelConfig
from jaxreason.models.model import Model
from jaxreason.nn.moe import Moe
from jaxreason.rollout import GREEDY, Request, Sampling, Stats, generate, run
from jaxreason.rollout import prompts as reading

# Most of a test's time is compiling: three slots and prompts of up to 16 tokens nearly everywhere.
PROMPTS = ragged_prompts(6, seed=3, longest=16)
HOW = dict(max_new_tokens=10, slots=3)
MIXED = (True, False, True, False)


@functools.cache
def answers(scope: str, batching: str = "union", order: tuple[int, ...] = tuple(range(6))):
    """Completions of PROMPTS by their number, under routers that choose by prompt, and stats."""
    stats = Stats()
    requests = [
        Request(tokens=tuple(PROMPTS[i]), prompt_index=i, max_new_tokens=10, sampling=GREEDY)
        for i in order
    ]
    done = run(random_routers(scope), requests, slots=3, batching=batching, stats=stats)
    return {c.prompt_index: c for c in done}, stats.layers


@pytest.mark.parametrize("routed", [False, True], ids=["given", "routers"])
def test_both_scopes_equal_the_official_decode(routed):
    z = golden("llama_tiny_skip_lora")
    cfg = ModelConfig(
        vocab_size=37, d_model=16, num_layers=5, num_heads=4, num_kv_heads=2,
        d_ff=z["p/model.layers.0.mlp.gate_proj.weight"].shape[0],
    )  # fmt: skip
    base = Model(params=llama_params(z, 5), config=cfg)
    keep = tuple(layer not in z["skip"] for layer in range(5))
    names = {"decode_only": "B_skip_decode_only", "everywhere": "A_skip_everywhere"}
    for scope, name in names.items():
        model, how = base, {"keep": keep, "skip_scope": scope}
        if routed:
            decision = Decision(always_keep=())
            model, how = with_depth(base, Skipper(static_routers(keep, 16), scope, decision)), {}
        done = generate(model, z["ids"].tolist(), GREEDY, max_new_tokens=6, logprobs=True, **how)
        want = jax.nn.log_softmax(z[f"dec_logits_{name}"], axis=-1).max(axis=-1)[:, :6]
        np.testing.assert_array_equal([c.tokens for c in done], z[f"dec_tokens_{name}"])
        np.testing.assert_allclose([c.logprobs for c in done], want, atol=1e-4)
        assert [c.layers for c in done] == [[0, 2, 4]] * 2


@pytest.mark.parametrize("scope", SCOPES)
def test_routers_that_keep_everything_are_the_model(scope):
    want = generate(tiny(), PROMPTS, GREEDY, **HOW)
    got = generate(constant((True,) * LAYERS, scope), PROMPTS, GREEDY, **HOW)
    assert plain(got) == plain(want)
    assert {c.layers is None for c in want} == {True}
    assert {tuple(c.layers) for c in got} == {tuple(range(LAYERS))}
    asked = generate(tiny(), PROMPTS, GREEDY, keep=[True] * LAYERS, skip_scope=scope, **HOW)
    assert plain(asked) == plain(want)


def test_skipping_everywhere_is_the_model_without_those_layers():
    want = generate(deleted(MIXED), PROMPTS, GREEDY, **HOW)
    routed = generate(constant(MIXED, "everywhere"), PROMPTS, GREEDY, **HOW)
    given = generate(tiny(), PROMPTS, GREEDY, keep=MIXED, skip_scope="everywhere", **HOW)
    assert plain(routed) == plain(given) == plain(want)
    assert {tuple(c.layers) for c in routed + given} == {(0, 2)}
    other = generate(tiny(), PROMPTS, GREEDY, keep=MIXED, **HOW)
    assert plain(other) != plain(given), "the scopes should differ on these prompts"


def test_no_layer_at_all_still_generates():
    none = (False,) * LAYERS
    model = tiny()
    done = generate(model, PROMPTS, GREEDY, keep=none, skip_scope="everywhere", **HOW)
    embed, scale = np.asarray(model.params["embed"]), np.asarray(model.params["final_norm"])
    for c, prompt in zip(done, PROMPTS):
        tokens = [prompt[-1], *c.tokens]
        x = embed[tokens[:-1]]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps) * scale
        assert (x @ np.asarray(model.params["unembed"])).argmax(-1).tolist() == tokens[1:]


@functools.partial(jax.jit, static_argnames=("cfg", "scope"))
def _trained(params, skipper, batch, cfg, scope):
    """Logits and decisions of stage 2's training forward, which recomputes everything by masks."""

    def model(wrap):
        return decoder.forward(params, cfg, batch, wrap=wrap)

    gating = first.FirstConfig(scope=scope, decision=skipper.decision)
    outputs = first.forward(gating, skipper.routers, batch, model, hard=True)
    return decoder.logits(outputs), outputs.depth.keep[:, 0, 1]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_cached_decode_is_what_training_computes(scope):
    done, _ = answers(scope)
    assert len({tuple(c.layers) for c in done.values()}) > 2, "prompts should choose differently"
    params, cfg, skipper = tiny().params, tiny().config, random_routers(scope).depth
    for i, c in done.items():
        width, prompt = 32, PROMPTS[i]
        row = np.zeros((1, width), np.int32)
        row[0, : len(prompt) + len(c.tokens)] = [*prompt, *c.tokens]
        at = np.arange(width, dtype=np.int32)[None]
        batch = {
            "tokens": row, "positions": at, "prompt_mask": at < len(prompt),
            "segment_ids": (at < len(prompt) + len(c.tokens)).astype(np.int32),
        }  # fmt: skip
        logits, keep = _trained(params, skipper, batch, cfg, scope)
        assert np.flatnonzero(keep).tolist() == c.layers
        logprobs = jax.nn.log_softmax(logits[0])[len(prompt) - 1 :][: len(c.tokens)]
        assert logprobs.argmax(-1).tolist() == c.tokens
        np.testing.assert_allclose(logprobs.max(-1), c.logprobs, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_company_order_and_batching_change_nothing(scope):
    want, union = answers(scope)
    shuffled, _ = answers(scope, order=(4, 2, 0, 5, 3, 1))
    grouped, group = answers(scope, "group")
    chosen = lambda done: {i: (c.tokens, c.layers, c.text) for i, c in done.items()}  # noqa: E731
    assert chosen(shuffled) == chosen(grouped) == chosen(want)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(random_routers(scope), [prompt], GREEDY, **HOW)
        assert (alone.tokens, alone.layers) == (want[i].tokens, want[i].layers)
    for stats, name in ((union, "union"), (group, "group")):
        assert stats.batching == name and name in stats.summary()
        assert stats.distinct_sets == len({tuple(c.layers) for c in want.values()})
        assert stats.tokens == sum(len(c.tokens) - 1 for c in want.values())
    # A step of a group computes its set alone, one of a union what any of its rows keeps.
    assert group.computed <= sum(sum(e.keep) * e.tokens for e in group.completions)
    assert union.computed_per_step > union.kept_per_token == group.kept_per_token
    assert union.steps < group.steps < group.tokens, "some rows should share a set"


def test_samples_of_a_prompt_share_its_set_and_requests_bring_their_own():
    requests = [
        Request(
            tokens=tuple(PROMPTS[1]), sample_index=j, max_new_tokens=8, keep=keep,
            skip_scope=scope, sampling=Sampling(temperature=0.8), prompt_index=j // 2,
        )
        for j, (keep, scope) in enumerate([
            (None, "decode_only"), (None, "decode_only"), (MIXED, "decode_only"),
            (MIXED, "everywhere"), ((True,) * LAYERS, "decode_only"),
        ])
    ]  # fmt: skip
    stats, model = Stats(), random_routers("decode_only")
    done = run(model, requests, slots=3, stats=stats)
    assert stats.prefill_tokens == 3 * len(PROMPTS[1])  # Watched by routers, plain, and cut down.
    assert done[0].layers == done[1].layers == answers("decode_only")[0][1].layers
    assert done[2].layers == done[3].layers == [0, 2]
    assert done[0].tokens != done[1].tokens
    assert done[4].layers == list(range(LAYERS))
    without = run(tiny(), requests[2:], slots=3)
    assert plain(without) == plain(done[2:])


def test_long_prompts_are_decided_as_a_whole(monkeypatch):
    prompts = [p for p in PROMPTS if len(p) > 8][:2] + PROMPTS[:1]
    for scope in SCOPES:
        calls = (
            lambda s=scope: generate(random_routers(s), prompts, GREEDY, **HOW),
            lambda s=scope: generate(tiny(), prompts, GREEDY, keep=MIXED, skip_scope=s, **HOW),
        )
        for call in calls:
            monkeypatch.setattr(reading, "PIECE", 512)
            want = call()
            monkeypatch.setattr(reading, "PIECE", 8)
            got = call()
            assert [(c.tokens, c.layers) for c in got] == [(c.tokens, c.layers) for c in want]


@pytest.mark.parametrize("scope", SCOPES)
def test_degenerate_statistics_keep_every_layer(scope):
    model = constant((False,) * LAYERS, scope)
    broken = dataclasses.replace(
        model.depth, routers={**model.depth.routers, "b": jnp.full(LAYERS, jnp.nan)}
    )
    prompts = [[5], *PROMPTS[1:3]]
    want = generate(tiny(), prompts, GREEDY, **HOW)
    got = generate(with_depth(tiny(), broken), prompts, GREEDY, **HOW)
    assert plain(got) == plain(want)
    # A prompt of one token has statistics like any other.
    (one,) = generate(model, prompts[:1], GREEDY, **HOW)
    assert one.layers == []


@functools.partial(jax.jit, static_argnames="cfg")
def _after_prompts(params, keep, tokens, cfg):
    batch = {
        "tokens": tokens, "segment_ids": jnp.ones_like(tokens),
        "positions": jnp.cumsum(jnp.ones_like(tokens), 1) - 1,
    }  # fmt: skip
    cache = decoder.init_cache(cfg, *tokens.shape, jnp.float32)
    wrap = None if keep is None else keep_wrap(jnp.broadcast_to(keep, (tokens.shape[0], 2)))
    return decoder.forward(params, cfg, batch, cache=cache, wrap=wrap)


def test_a_mixture_of_experts_skips_too():
    model = tiny_model(moe=Moe(num_experts=4, top_k=2))
    tokens = np.random.default_rng(0).integers(0, 64, (3, 7)).astype(np.int32)
    got = _after_prompts(model.params, np.array([[False, True]]), tokens, model.config)
    # The other layer adds nothing where its last product is 0.
    blocks = model.params["blocks"]
    still = {
        **blocks,
        "attn": {**blocks["attn"], "o": blocks["attn"]["o"].at[0].set(0)},
        "mlp": {**blocks["mlp"], "down": blocks["mlp"]["down"].at[0].set(0)},
    }
    want = _after_prompts({**model.params, "blocks": still}, None, tokens, model.config)
    np.testing.assert_allclose(got.final, want.final, atol=1e-6)
    np.testing.assert_array_equal(got.aux["experts"][1], want.aux["experts"][1])
    assert not np.any(got.aux["router_logits"][0]) and np.all(want.aux["router_logits"][0])


def test_what_cannot_be_served_is_told_in_a_line():
    narrow = Skipper(static_routers((True,) * LAYERS, WIDTH // 2))
    top = Skipper(static_routers(MIXED, WIDTH), "decode_only", Decision(rule="top", kept=9))
    for message, call in {
        "keep has 2 truth values; the model has 4": lambda: generate(tiny(), [[1]], keep=MIXED[:2]),
        "skip_scope is 'both'": lambda: generate(
            tiny(), [[1]], keep=MIXED, skip_scope="both"
        ),
        "batching is 'mixed'; expected one of union, group": lambda: generate(
            tiny(), [[1]], batching="mixed"
        ),
        "the routers are for 4 layers of width 16": lambda: generate(
            with_depth(tiny(), narrow), [[1]]
        ),
        "decision.kept is 9": lambda: generate(with_depth(tiny(), top), [[1]]),
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()
